"""``neighbours``: find neighbours in one database, or in a mixture of several, each with a weight.

A mixture is a record that names plain tables, one per database (``main.wiki``, ``main.books``), which are
made and updated like any other. ``neighbours.table_reader`` merges them on reading, by distance divided by
weight, so weights are stored in the record only. A table that a mixture no longer names is kept as a plain
table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from retrotool import engine
from retrotool.ann.choice import FLAT_LIMIT
from retrotool.cli.command_lines import SAVED, K, command_line, embed_command
from retrotool.embed import search_scope
from retrotool.embed.search_scope import count_keys_of, count_left, embedded_parts, is_same_store, pick_encoder
from retrotool.encoder.encoder import say
from retrotool.engine.progress import Progress
from retrotool.errors import ConflictError, UsageError
from retrotool.index.index_records import default_index
from retrotool.index.searching import NO_INDEX, commands_to_index, pick_index
from retrotool.neighbours.dependents import register_dependent
from retrotool.neighbours.filters import FilterOptions, check_some_left, named
from retrotool.neighbours.stage import FEW, NeighboursStage, check_encoders, database_of, members_of, table_record
from retrotool.neighbours.table_reader import check_same_tokens
from retrotool.neighbours.tiles import ROUTES
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.neighbour_tables import OVERLAP, commit_edits, read_edits
from retrotool.store.paths import check_name
from retrotool.store.state import State
from retrotool.store.store import Store, check_compatible, retry_overtaken
from retrotool.store.tombstones import read_tombstones


@dataclass(frozen=True, slots=True)
class DatabaseResult:
    """Result for one database of a mixture; ``aware``: it has a record of this dependent store."""

    database: str
    table: str
    weight: float
    index: str
    encoder: str
    queries: int
    rows: int
    not_indexed: int
    in_other_runs: int
    filters: dict[str, Any]
    aware: bool = True
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NeighboursResult:
    """Result of ``neighbours``, see ``docs/json.md``; it counts live keys.

    * ``filters``: with names of sources. ``filters_kept``: they are from an earlier run.
    * ``mix``: the databases of a mixture. Other fields are then those of the first one, and counts are sums.
    * ``rerank``: ``overlap`` if they are ordered by that, "" if by distance.
    * ``left_out``: former tables of the mixture. ``unaware``: databases that could not record this store.
    """

    name: str
    database: str
    index: str
    encoder: str
    queries: int
    rows: int
    k: int
    saved: int
    commit: int
    not_embedded: int = 0
    not_indexed: int = 0
    next: tuple[str, ...] = ()
    in_other_runs: int = 0
    filters: dict[str, Any] = field(default_factory=dict)
    filters_kept: bool = False
    mix: tuple[DatabaseResult, ...] = ()
    left_out: tuple[str, ...] = ()
    unaware: tuple[str, ...] = ()
    materialised: bool = False
    rerank: str = ""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search; see ``retrotool neighbours --help``."""

    exact: bool = False
    encoder: str | None = None
    memory: int | None = None
    devices: str = "auto"
    wait: bool = True  # for parts that other runs do


def neighbours(
    root: str | Path,
    *,
    queries: str | Path | None = None,
    k: int = K,
    saved: int = SAVED,
    name: str | None = None,
    index: str | None = None,
    search: SearchOptions | None = None,
    filters: FilterOptions | None = None,
    databases: Given = (),
    materialise: bool = False,
    rerank: Literal["overlap", "distance"] | None = None,
) -> NeighboursResult:
    """Find the neighbours, in the store ``root``, of every chunk of ``queries`` (default: ``root`` itself).

    ``name`` is by default main; only if it is given, a table of another index is replaced. ``databases``:
    more databases with their weights, which makes a mixture. ``materialise``: also store the tokens of the
    first k neighbours; later runs update them. ``rerank``: order what is saved by common tokens (BM25), or
    by distance again; None keeps what the table has.
    """
    may_replace, name = name is not None, "main" if name is None else name
    search, filters = search or SearchOptions(), filters or FilterOptions()
    if not 1 <= k <= saved:
        raise UsageError(f"-k {k} is not between 1 and --saved {saved}")
    if saved > 1000:
        raise UsageError(f"--saved {saved} is more than 1000")
    if rerank not in (None, OVERLAP, "distance"):
        raise UsageError(f"--rerank {rerank} is neither {OVERLAP} nor distance")
    check_name(name, "--name")
    devices = tuple(engine.worker_devices(search.devices))
    store = Store.open(queries if queries is not None else root)
    mixture = choose_mixture(store, name, Store.open(root), databases)
    opened = [one.database for one in mixture.tables]
    filters.check(opened)
    records = store.state.with_prefix("neighbours:")
    text = materialise or any(records.get(one.table, {}).get("text") for one in mixture.tables)
    if text:
        check_same_tokens(store, opened)
    stages, others = [], [table for table, _ in members_of(store, name)]
    for one, database in zip(mixture.tables, opened, strict=True):
        # A new table gets the filters, and the order, of another table of the mixture.
        known = next((records[table] for table in (one.table, *others) if table in records), None)
        applied = filters.applied(known, store)
        order = str((known or {}).get("rerank", "")) if rerank is None else rerank.replace("distance", "")
        stages.append(NeighboursStage(
            database.uri, _choose_index(database, index, search), one.table, saved, k,
            search.encoder, search.memory, devices, applied, text, order,
        ))  # fmt: skip
    _check(store, stages)
    if not may_replace:
        for stage in stages:
            _check_same_index(store, name, stage, by_default=index is None and not search.exact)
    asked_for = bool(filters.as_record())
    if asked_for:
        check_some_left([stage.filters for stage in stages], store, opened)
    with writing(store) as run:
        found = [_fill(store, run, stage, one, search.wait) for stage, one in zip(stages, mixture.tables, strict=True)]
        if mixture.mixed:
            store.commit(run, mixture.commit)
    first = found[0]
    not_embedded = retry_overtaken(
        lambda: count_left(store, embedded_parts(store, first.encoder), read_tombstones(store)), store.renew
    )
    left = [embed_command(store, first.encoder)] if not_embedded else []
    left += [command for one in found for command in one.commands]
    if left:
        given = {"k": None if k == K else k, "saved": None if saved == SAVED else saved}
        searched = index if mixture.mixed or first.index in ("", default_index(opened[0].state)) else first.index
        asked = {"index": searched, "encoder": search.encoder}
        again = command_line("neighbours", root, queries=queries, **given, name=name, **asked)
        left.append(f"{again} --exact" if search.exact else again)
    return NeighboursResult(
        name, str(root), first.index, first.encoder, sum(one.queries for one in found), min(one.rows for one in found),
        k, saved, store.refresh().number, not_embedded, sum(one.not_indexed for one in found),
        tuple(dict.fromkeys(left)), sum(one.in_other_runs for one in found), first.filters,
        bool(first.filters) and not asked_for, tuple(found) if mixture.mixed else (), mixture.left_out,
        tuple(one.database for one in found if not one.aware), text, stages[0].rerank,
    )  # fmt: skip


def _check(store: Store, stages: Sequence[NeighboursStage]) -> None:
    encoders = set()
    for stage in stages:
        database = stage.open_database(store)
        check_encoders(store, database)
        stage.filters.check_can_compare(store, database.store)
        if stage.rerank:
            drop = "Give --rerank distance, or chunk one of the stores again."
            check_compatible(store, database.store, "their tokens can't be compared", drop, lengths=False)
        encoders.add(database.encoder)
    if len(encoders) > 1:
        raise UsageError(
            f"the databases would be searched with different encoders ({' and '.join(sorted(encoders))}), whose "
            "distances can't be compared",
            "Give indexes of one encoder with --index, or make separate tables with --name.",
        )


def _check_same_index(store: Store, name: str, stage: NeighboursStage, *, by_default: bool) -> None:
    """Refuse to replace a table by one of another index, but for the first index after an exact search."""
    known = store.state.records.get(stage.key)
    if known is None or known["index"] == stage.index or (by_default and known["index"] == NO_INDEX):
        return
    old, new = (f"the index {one!r}" if one else "exact search" for one in (known["index"], stage.index))
    raise UsageError(
        f"the neighbours {stage.table!r} are by {old}, this run is by {new}; nothing was changed",
        f"Add --name {stage.index or 'exact'} to make a second table, or --name {name} to replace this one.",
    )


def _fill(store: Store, run: Run, stage: NeighboursStage, given: WeightedTable, wait: bool) -> DatabaseResult:
    with Progress("neighbours", doing="opening the index"):
        database = stage.open_database(store)
        tasks = engine.plan_tasks(stage, store)
        if any("step" in task.inputs for task in tasks):
            tasks = stage.part_tasks(store, database)
            for plan in filter(None, stage.in_rounds(store, database, tasks)):
                say(f"neighbours: {plan}")
    todo = count_keys_of(store, [task.inputs["part"] for task in tasks if task.inputs["mode"] != FEW])
    todo += sum(task.weight for task in tasks if task.inputs["mode"] == FEW)
    record = stage.record(store, database)
    store.commit(run, lambda state: stage.claim(state, record))
    again = {name: record[name] for name in ("index", "encoder", "k", "saved")}
    edits = read_edits(store, stage.table)
    if not record["within"] and (gone := search_scope.erased_chunks(database.store).contains(edits["neighbour"])).any():
        commit_edits(store, run, stage.table, edits[~gone])
    aware = record["within"] or register_dependent(Store.open(stage.database), store, stage.table, again)
    elsewhere = engine.execute(stage, store, run, workers=len(stage.devices), wait=wait)
    known, names = store.refresh().records.get(stage.key), ("database", "index", "encoder", "filters", "rerank")
    if known is None or any(known.get(name) != record.get(name) for name in names):
        what = "with another index, filters or order"
        raise ConflictError(f"a concurrent run made the neighbours {stage.table!r} {what}", _RENAME)
    routes = [entry.path for entry in store.state.group(ROUTES, stage.table).entries()]
    if routes and not engine.plan_tasks(stage, store):
        store.commit(run, lambda state: Draft(
            "neighbours", {"name": stage.table, "routes": "removed"}, remove=tuple(filter(state.has, routes))
        ))  # fmt: skip

    def describe() -> DatabaseResult:
        database = stage.open_database(store)
        rows = count_keys_of(store, map(int, store.refresh().group("neighbours", stage.table)))
        not_indexed = count_left(database.store, database.held(), database.tombstones)
        commands = []
        if not_indexed:
            index = None if stage.index == NO_INDEX else stage.index
            commands = commands_to_index(Store.open(given.database.place), database.encoder, index)
        return DatabaseResult(
            given.database.place, stage.table, given.weight, stage.index, database.encoder, todo, rows, not_indexed,
            elsewhere, named(stage.filters, store, [database.store]), aware, tuple(commands),
        )  # fmt: skip

    return retry_overtaken(describe, store.renew)


def _choose_index(store: Store, index: str | None, search: SearchOptions) -> str:
    """Return the index to search, or ``NO_INDEX`` for --exact, and for a small store without an index."""
    if search.exact:
        if index is not None:
            raise UsageError("--exact can't be combined with --index")
        return NO_INDEX
    if index is None and not store.state.with_prefix("index:") and store.state.names("embeddings"):
        encoder = pick_encoder(store, search.encoder)
        if count_keys_of(store, embedded_parts(store, encoder)) <= FLAT_LIMIT:
            return NO_INDEX
    if search.encoder is not None:
        raise UsageError("--encoder needs --exact, as an index has its own encoder")
    return pick_index(store, index)


MOST_DATABASES = 255
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30  # beyond these weights, distances (float32) become 0 or infinite
_RENAME = "Give one of them another --name."
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")

Given = Sequence[tuple[str | Path, float | None]]  # more databases with weights; None: unchanged, 1 for a new one


@dataclass(frozen=True, slots=True)
class WeightedTable:
    """The neighbour table of a ``database``, opened where the caller has it, and its weight in a mixture."""

    table: str
    database: Store
    weight: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """What to make under a name: a plain table, or, if ``mixed``, a mixture of ``tables``."""

    name: str
    tables: tuple[WeightedTable, ...]
    mixed: bool = False
    left_out: tuple[str, ...] = ()  # tables that the present mixture of this name loses

    def commit(self, state: State) -> Draft | None:
        """Build the commit that makes the name this mixture; None if it is already."""
        key = f"neighbours:{self.name}"
        record = {"mix": [{"table": one.table, "weight": one.weight} for one in self.tables]}
        known = state.records.get(key)
        if known is not None and "mix" not in known:
            raise ConflictError(f"a concurrent run made the neighbours {self.name!r} a plain table", _RENAME)
        return None if known == record else Draft("neighbours", {"name": self.name, **record}, records={key: record})


def choose_mixture(store: Store, name: str, first: Store, given: Given) -> Mixture:
    """Decide what to make under ``name``, from the databases ``first`` and ``given``.

    If none are given, a mixture keeps its databases. Raises ``UsageError`` for databases that are not
    compatible, and if a plain table would become a mixture or a mixture a plain table.
    """
    known = store.state.records.get(f"neighbours:{name}")
    members = members_of(store, name) if known is not None and "mix" in known else []
    was = {str(table_record(store, table)["database"]): (table, weight) for table, weight in members}
    here = first.identity.uuid
    if given:
        databases = _databases(first, given)
        if len(databases) == 1:
            raise UsageError(f"--database {given[0][0]}: a mixture needs another database", "Leave the option out.")
        if known is not None and not was:
            of = f"the neighbours {name!r} are a table of {known['uri']}"
            raise UsageError(of, "Give the mixture another --name.")
        for database, _ in databases[1:]:
            advice = "Make separate tables with --name, or chunk one of the stores again."
            check_compatible(first, database, "their neighbours can't be read together", advice)
    elif not was:
        return Mixture(name, (WeightedTable(name, first, 1.0),))
    elif here in was:  # its path may have changed
        places = {uuid: first if uuid == here else database_of(store, table)[0] for uuid, (table, _) in was.items()}
        databases = [(database, None) for database in places.values()]
    else:
        have = ", ".join(str(store.state.records[f"neighbours:{table}"]["uri"]) for table, _ in was.values())
        advice = "Name all its databases with --database, or give another --name."
        raise UsageError(f"the neighbours {name!r} are a mixture of {have}", advice)
    tables: list[WeightedTable] = []
    for database, weight in databases:
        table, before = was.get(database.identity.uuid, ("", 1.0))
        table = table or _free_name(store.state, name, database, [one.table for one in tables])
        tables.append(WeightedTable(table, database, before if weight is None else weight))
    kept = {one.table for one in tables}
    return Mixture(name, tuple(tables), True, tuple(table for table, _ in was.values() if table not in kept))


def _databases(first: Store, given: Given) -> list[tuple[Store, float | None]]:
    """Open the databases, with their weights: ``first``, then the others that are ``given``."""
    found: dict[str, tuple[Store, float | None]] = {first.identity.uuid: (first, None)}
    seen: set[str] = set()
    for path, weight in given:
        if weight is not None and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise UsageError(f"--database {path}={weight:g} is not between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}")
        store = Store.open(path)
        uuid = store.identity.uuid
        if uuid in seen or (uuid in found and not is_same_store(first, store)):
            raise UsageError(f"--database {path}: this database, or a copy of it, was given before", "Name each once.")
        seen.add(uuid)
        found[uuid] = (first if uuid in found else store, weight)
    if len(found) > MOST_DATABASES:
        raise UsageError(f"{len(found)} databases; a mixture can have {MOST_DATABASES}")
    return list(found.values())


def _free_name(state: State, name: str, database: Store, taken: Sequence[str]) -> str:
    """Return a name, after the database's folder, that is free or belongs to a table of the same database."""
    base = _UNFIT.sub("-", database.uri.rstrip("/").rpartition("/")[2]).strip(".-") or "database"
    number = 1
    while True:
        table = f"{name}.{base}" if number == 1 else f"{name}.{base}-{number}"
        record = state.records.get(f"neighbours:{table}")
        if table not in taken and (record is None or record.get("database") == database.identity.uuid):
            return check_name(table, "--name")
        number += 1
