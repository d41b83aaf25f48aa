"""Mixtures: one name for the neighbours of several databases, each with a weight.

A mixture is a record that names plain tables, one a database (``main.wiki``, ``main.books``). Each is found and kept up
like any other table; ``stages.reading`` merges them when they are read, by squared distance over weight. So a weight
changes nothing but the record.

A table that was plain becomes the first of a mixture, and the other way round, by new names for its files: hard links,
made with the commit that changes the records. Nothing is searched again. What a mixture leaves out stays, as a plain
table under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrotool.embed.search_scope import is_same_directory
from retrotool.errors import ConflictError, UsageError
from retrotool.neighbours.stage import database_of, members_of
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, check_name
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store

MOST_DATABASES = 255
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30
"""Distances are float32: divided by less or more than that, different ones are all 0, or all infinite."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")

Given = Sequence[tuple[str | Path, float | None]]
"""Databases besides the first, each with its weight; None: what it has, 1 for a new one."""


@dataclass(frozen=True, slots=True)
class Member:
    """A database, as it was named, the table of its neighbours, and its weight."""

    table: str
    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a name is to be: a plain table of one database, or, ``mixed``, a mixture of its members.

    ``left_out`` are tables that the mixture of this name had, and is to have no more.
    """

    name: str
    members: tuple[Member, ...]
    mixed: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """The record ``neighbours:<name>`` of a mixture."""
        return {"mix": [{"table": member.table, "weight": member.weight} for member in self.members]}


def is_mixture(record: Mapping[str, Any] | None) -> bool:
    """Whether a record ``neighbours:<name>`` is of a mixture."""
    return record is not None and "mix" in record


def mixtures_with(state: State, table: str) -> list[str]:
    """Names of the mixtures that a table is in."""
    found = state.with_prefix("neighbours:").items()
    return [name for name, record in found if any(member["table"] == table for member in record.get("mix", ()))]


def choose(store: Store, name: str, first: str | Path, given: Given) -> Mixture:
    """What the neighbours ``name`` are to be: of the database ``first`` and of those that are ``given``.

    If none is given, it is what it was: a mixture stays one. ``UsageError`` for databases that don't go together.
    """
    known = store.state.records.get(f"neighbours:{name}")
    was = _tables_of(store, name) if is_mixture(known) else {}
    if not given:
        return _as_it_was(store, name, first, was) if was else Mixture(name, (Member(name, str(first), 1.0),))
    databases = _databases(first, given)
    if len(databases) == 1:
        path, weight, only = databases[0]
        if weight is not None:
            raise UsageError(
                f"--database {path}={weight:g}: with one database there is nothing to weigh", "Leave =W out."
            )
        left = tuple(table for uuid, (table, _) in was.items() if uuid != only.identity.uuid)
        return Mixture(name, (Member(name, path, 1.0),), left_out=left)
    if of := mixtures_with(store.state, name):
        raise UsageError(
            f"the neighbours {name!r} are a table of the mixture {of[0]!r}", "Give the new one another --name."
        )
    _check_alike([database for _, _, database in databases])
    members: list[Member] = []
    for path, weight, database in databases:
        table, before = was.get(database.identity.uuid, ("", 1.0))
        table = table or _free_name(
            store.state, name, database.root, database.identity.uuid, [m.table for m in members]
        )
        members.append(Member(table, path, before if weight is None else weight))
    kept = {member.table for member in members}
    return Mixture(name, tuple(members), True, tuple(table for table, _ in was.values() if table not in kept))


def _tables_of(store: Store, name: str) -> dict[str, tuple[str, float]]:
    """By the uuid of its database the table and weight of each member of a mixture."""
    records = store.state.records
    return {
        str(records[f"neighbours:{table}"]["database"]): (table, weight) for table, weight in members_of(store, name)
    }


def _as_it_was(store: Store, name: str, first: str | Path, was: Mapping[str, tuple[str, float]]) -> Mixture:
    """The mixture that a name is; ``first`` must be one of its databases, and may have moved."""
    here = Store.open(first)
    if here.identity.uuid not in was:
        have = ", ".join(str(store.state.records[f"neighbours:{table}"]["path"]) for table, _ in was.values())
        raise UsageError(
            f"the neighbours {name!r} are a mixture of {have}",
            "Name all databases that it is to be of with --database, or give another --name.",
        )
    members = []
    for uuid, (table, weight) in was.items():
        path = str(first) if uuid == here.identity.uuid else str(database_of(store, table)[0].root)
        members.append(Member(table, path, weight))
    return Mixture(name, tuple(members), True)


def _databases(first: str | Path, given: Given) -> list[tuple[str, float | None, Store]]:
    """Path, weight and store of each database, the first one first, which may be given again with a weight."""
    here = Store.open(first)
    found: dict[str, tuple[str, float | None, Store]] = {here.identity.uuid: (str(first), None, here)}
    seen: set[str] = set()
    for path, weight in given:
        if weight is not None and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise UsageError(
                f"--database {path}={weight:g}: a weight is above 0 and finite, "
                f"from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            )
        store = Store.open(path)
        uuid = store.identity.uuid
        if uuid in seen or (uuid in found and not is_same_directory(here, store)):
            raise UsageError(f"--database {path}: this database, or a copy of it, is given already", "Name each once.")
        seen.add(uuid)
        found[uuid] = (found[uuid][0] if uuid in found else str(path), weight, store)
    if len(found) > MOST_DATABASES:
        raise UsageError(f"{len(found)} databases are more than a mixture can have, {MOST_DATABASES}")
    return list(found.values())


def _check_alike(databases: Sequence[Store]) -> None:
    """``UsageError`` unless neighbours from all databases can be read together, as tokens."""
    first = databases[0]
    for other in databases[1:]:
        ours, theirs = first.identity, other.identity
        if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
            raise UsageError(
                f"{first.root} and {other.root} have different tokenizers, {ours.tokenizer.name} and "
                f"{theirs.tokenizer.name}: what is found in them can't be read together",
                "Give them names of their own with --name, or chunk one of them again.",
            )
        if ours.chunk_length != theirs.chunk_length:
            raise UsageError(
                f"{first.root} has chunks of {ours.chunk_length} tokens, {other.root} of {theirs.chunk_length}: what "
                "is found in them can't be read together",
                "Give them names of their own with --name.",
            )


def _free_name(state: State, name: str, folder: Path, uuid: str, taken: Sequence[str]) -> str:
    """A name for the table of a database in a mixture, after its folder: one that is of it already, or of nothing."""
    base = _UNFIT.sub("-", folder.absolute().name).strip(".-") or "database"
    number = 1
    while True:
        table = f"{name}.{base}" if number == 1 else f"{name}.{base}-{number}"
        record = state.records.get(f"neighbours:{table}")
        if table not in taken and (record is None or record.get("database") == uuid):
            return check_name(table, "--name")
        number += 1


def known_record(state: State, mixture: Mixture, member: Member) -> Mapping[str, Any] | None:
    """The record of the table that a member has, under its old name perhaps; else that of another one of this name."""
    known = state.records.get(f"neighbours:{mixture.name}")
    names = [member.table, mixture.name, *(one["table"] for one in (known or {}).get("mix", ()))]
    found = [state.records.get(f"neighbours:{table}") for table in dict.fromkeys(names)]
    plain = [record for record in found if record is not None and not is_mixture(record)]
    uuid = _uuid(member.path)
    return next((record for record in plain if record["database"] == uuid), plain[0] if plain else None)


def begin(state: State, run: Run, mixture: Mixture) -> Draft | None:
    """The commit that makes the name's old tables what they are in ``mixture``; None if they are, or there are none."""
    key = f"neighbours:{mixture.name}"
    known = state.records.get(key)
    if known is None or is_mixture(known) == mixture.mixed:
        return None
    if mixture.mixed:
        uuid = known["database"]
        table = next((m.table for m in mixture.members if _uuid(m.path) == uuid), "")
        taken = [member.table for member in mixture.members]
        table = table or _free_name(state, mixture.name, Path(known["path"]), uuid, taken)
        record = {"mix": [{"table": table, "weight": 1.0}]}
        return _renamed(state, run, mixture.name, table, {key: record, f"neighbours:{table}": known})
    uuid = _uuid(mixture.members[0].path)
    for member in known["mix"]:
        old = f"neighbours:{member['table']}"
        record = state.records[old]
        if record["database"] == uuid:
            return _renamed(state, run, member["table"], mixture.name, {key: record, old: None})
    return Draft("neighbours", {"name": mixture.name}, records={key: None})


def _uuid(path: str) -> str:
    return Store.open(path).identity.uuid


def _renamed(state: State, run: Run, source: str, target: str, records: dict[str, Any]) -> Draft:
    """The commit that gives the tables of one name another one, and takes away what was there under that."""
    old, there = (
        [entry for slot in group if (entry := group.get(slot)) is not None]
        for group in (state.group("neighbours", source), state.group("neighbours", target))
    )
    add, links = [], []
    for entry in old:
        name = FileName.parse(entry.path)
        new = FileName.new(run.id, name.kind, name.slot, name.extension, target)
        add.append(FileEntry(new.path, entry.rows, entry.bytes, entry.sha256, entry.about))
        links.append((entry.path, new.path))
    gone = tuple(entry.path for entry in (*old, *there))
    settings = {"name": target, "was": source}
    return Draft("neighbours", settings, add=tuple(add), remove=gone, records=records, links=tuple(links))


def finish(state: State, mixture: Mixture) -> Draft | None:
    """The commit that makes the name a mixture of its members with their weights; None if it is."""
    key = f"neighbours:{mixture.name}"
    known = state.records.get(key)
    if known is not None and not is_mixture(known):
        raise ConflictError(
            f"another run made the neighbours {mixture.name!r} a plain table meanwhile",
            "Give one of them a name of its own with --name.",
        )
    if known == mixture.record:
        return None
    return Draft("neighbours", {"name": mixture.name, **mixture.record}, records={key: mixture.record})
