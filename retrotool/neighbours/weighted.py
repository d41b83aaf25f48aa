"""Mixtures: one name for the neighbours of several databases, each with a weight.

A mixture is a record that names plain tables, one a database (``main.wiki``, ``main.books``). Each is found and kept up
to date like any other table; ``neighbours.table_reader`` merges them when they are read, by squared distance over
weight. So a weight changes nothing but the record. A table that a mixture no longer names stays, as a plain table.
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
from retrotool.store.log import Draft
from retrotool.store.paths import check_name
from retrotool.store.state import State
from retrotool.store.store import Store, check_compatible

MOST_DATABASES = 255
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30
"""Distances are float32: divided by less or more than that, different ones are all 0, or all infinite."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")

Given = Sequence[tuple[str | Path, float | None]]
"""Databases besides the first, each with its weight; None: what it has, 1 for a new one."""


@dataclass(frozen=True, slots=True)
class WeightedTable:
    """A database, as it was named (``path``), the table of its neighbours, and its weight in a mixture."""

    table: str
    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a name is to be: a plain table of one database, or, ``mixed``, a mixture of ``tables``.

    ``left_out`` are tables that the mixture of this name had, and is to have no more.
    """

    name: str
    tables: tuple[WeightedTable, ...]
    mixed: bool = False
    left_out: tuple[str, ...] = ()

    def commit(self, state: State) -> Draft | None:
        """Build the commit that makes the name a mixture of its tables; None if it is."""
        key = f"neighbours:{self.name}"
        record = {"mix": [{"table": one.table, "weight": one.weight} for one in self.tables]}
        known = state.records.get(key)
        if known is not None and "mix" not in known:
            raise ConflictError(
                f"another run made the neighbours {self.name!r} a plain table",
                "Give one of them a name of its own with --name.",
            )
        return None if known == record else Draft("neighbours", {"name": self.name, **record}, records={key: record})


def mixtures_with(state: State, table: str) -> list[str]:
    """Return the names of the mixtures that a table is in."""
    found = state.with_prefix("neighbours:").items()
    return [name for name, record in found if any(member["table"] == table for member in record.get("mix", ()))]


def choose(store: Store, name: str, first: str | Path, given: Given) -> Mixture:
    """Decide what the neighbours ``name`` are to be: of the database ``first`` and of those that are ``given``.

    If none is given a mixture stays what it was. ``UsageError`` for databases that are not compatible, and where a
    plain table would become a mixture, or a mixture a plain table.
    """
    known = store.state.records.get(f"neighbours:{name}")
    was = _tables_of(store, name) if known is not None and "mix" in known else {}
    if not given:
        return _as_it_was(store, name, first, was) if was else Mixture(name, (WeightedTable(name, str(first), 1.0),))
    databases = _databases(first, given)
    if len(databases) == 1:
        raise UsageError(f"--database {given[0][0]}: with one database there is nothing to mix", "Leave it out.")
    if known is not None and not was:
        raise UsageError(
            f"the neighbours {name!r} are a plain table, of {known['path']}", "Give the mixture another --name."
        )
    for _, _, database in databases[1:]:
        advice = "Give them names of their own with --name, or chunk one of them again."
        check_compatible(databases[0][2], database, "what is found in them can't be read together", advice)
    tables: list[WeightedTable] = []
    for path, weight, database in databases:
        table, before = was.get(database.identity.uuid, ("", 1.0))
        table = table or _free_name(store.state, name, database, [one.table for one in tables])
        tables.append(WeightedTable(table, path, before if weight is None else weight))
    kept = {one.table for one in tables}
    return Mixture(name, tuple(tables), True, tuple(table for table, _ in was.values() if table not in kept))


def _tables_of(store: Store, name: str) -> dict[str, tuple[str, float]]:
    """Table and weight by the uuid of the database."""
    records = store.state.records
    return {
        str(records[f"neighbours:{table}"]["database"]): (table, weight) for table, weight in members_of(store, name)
    }


def _as_it_was(store: Store, name: str, first: str | Path, was: Mapping[str, tuple[str, float]]) -> Mixture:
    """Return the mixture that a name is; ``first`` must be one of its databases, and may have moved."""
    here = Store.open(first)
    if here.identity.uuid not in was:
        have = ", ".join(str(store.state.records[f"neighbours:{table}"]["path"]) for table, _ in was.values())
        raise UsageError(
            f"the neighbours {name!r} are a mixture of {have}",
            "Name all databases that it is to be of with --database, or give another --name.",
        )
    tables = []
    for uuid, (table, weight) in was.items():
        path = str(first) if uuid == here.identity.uuid else str(database_of(store, table)[0].root)
        tables.append(WeightedTable(table, path, weight))
    return Mixture(name, tuple(tables), True)


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


def _free_name(state: State, name: str, database: Store, taken: Sequence[str]) -> str:
    """A name for the table of a database in a mixture, after its folder: one that is of it already, or of nothing."""
    base = _UNFIT.sub("-", database.root.absolute().name).strip(".-") or "database"
    number = 1
    while True:
        table = f"{name}.{base}" if number == 1 else f"{name}.{base}-{number}"
        record = state.records.get(f"neighbours:{table}")
        if table not in taken and (record is None or record.get("database") == database.identity.uuid):
            return check_name(table, "--name")
        number += 1


def known_record(store: Store, mixture: Mixture, table: str) -> Mapping[str, Any] | None:
    """Return the record of a table; of a new one that of another table of the mixture, whose filters it takes over."""
    names = [table, *(other for other, _ in members_of(store, mixture.name))]
    found = (store.state.records.get(f"neighbours:{name}") for name in names)
    return next((record for record in found if record is not None), None)
