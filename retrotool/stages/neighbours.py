"""``neighbours``: the nearest keys of every key, outside its own document.

A task is a part of the query store: list-major search (``ann.search``) of all its searchable vectors through the
database's shards, with the query's own document and all tombstones masked before the top-k. Rows of purged or erased
queries are empty, and so are those of values of key-value records. The table lies in the query store.

A table is done again once the database has parts that it had not, or another index is asked for. After purges only the
rows are searched again that have fewer than k neighbours left; finding them costs reading the tables once, and nothing
as long as nothing was purged. A name is of one database: its record is set with the first task, or before (``claim``),
and each table says in the log which index, and which commit of the database, it is from. So what two runs wrote under
one name is told apart, and so is a copy of the database that went its own way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.ann.excluded import Queries
from retrotool.errors import UsageError
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.database import (
    count_keys,
    embedded_parts,
    has_commit,
    is_same_directory,
    own_documents,
    purges,
    read_part_vectors,
    searchable_rows,
)
from retrotool.stages.index_files import held_parts, shards
from retrotool.stages.searching import Database
from retrotool.store import parts, staging, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR, NeighbourTable
from retrotool.store.tombstones import read_tombstones

_QUERY_BLOCK = 1 << 14
_HEAD_DIGITS = 16
_SAME = ("index", "encoder")
"""In what tables of one name must agree with its record."""

_counted: dict[tuple[str, str, str, int], int] = {}
"""Rows to refill by table, purges of database and queries, and k: a plan is made several times in one run."""
_COUNTED = 1 << 17


@dataclass(frozen=True, slots=True)
class NeighboursStage:
    """All parts of the query store without an up-to-date table ``table`` of neighbours in ``database``."""

    database: str
    index: str
    table: str
    saved: int
    k: int
    name: str = field(default="neighbours", init=False)
    unit: str = field(default="chunk", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a part that has embeddings, and no table or one to be done again, in whole or in some rows.

        ``UsageError`` if the name is of another database, or of a copy that went its own way, or if the encoders of
        queries and database differ.
        """
        database = Database(Store.open(self.database), self.index)
        check_encoders(store, database)
        record = self.record(store, database)
        known = store.state.records.get(self.key, record)
        self._check_database(store.state, record)
        version = _version(database, self.index, record)
        tasks = []
        checked: set[tuple[Any, Any]] = set()
        for part in embedded_parts(store, database.encoder):
            path = parts.part_entry(store, "embeddings", part, database.encoder).path
            old = store.state.part_file("neighbours", part, self.table)
            settings: dict[str, Any] = {"table": self.table, "version": version}
            weight = count_keys(store, part)
            if old is not None and _commit(old) not in checked:
                _check_commit(old, self.table, database.store)
                checked.add(_commit(old))
            refill = old is not None and _is_of(old, record, known) and (old.about or {}).get("version") == version
            if old is not None and refill:
                weight = _count_few(store, database, part, old, self.k)
                if not weight:
                    continue
                settings["refill"] = [old.path, purges(database.store), self.k]
            key = task_key("neighbours", settings, [path])
            if not staging.is_staged(store.root, key):
                inputs = {"part": part, "path": path, "version": version, "replaces": old.path if old else None}
                tasks.append(Task(key, f"part {part}", weight, {**inputs, "refill": refill}))
        return tasks

    @property
    def key(self) -> str:
        """Key of the record of these tables."""
        return f"neighbours:{self.table}"

    def record(self, store: Store, database: Database) -> dict[str, Any]:
        """The record ``neighbours:<table>``."""
        return {
            "database": database.store.identity.uuid, "path": str(database.store.root.absolute()),
            "within": is_same_directory(store, database.store), "index": self.index, "encoder": database.encoder,
            "saved": self.saved, "k": self.k,
        }  # fmt: skip

    def _check_database(self, state: State, record: Mapping[str, Any]) -> None:
        known = state.records.get(self.key, record)
        if known["database"] != record["database"]:
            raise UsageError(
                f"the neighbours {self.table!r} are chunks of another database, {known['path']}",
                "Give these a name of their own with --name.",
            )

    def claim(self, state: State, record: dict[str, Any]) -> Draft | None:
        """The commit that makes the name one of ``record``, and removes the tables that are of another index."""
        self._check_database(state, record)
        known = state.records.get(self.key, record)
        group = state.group("neighbours", self.table)
        entries = [entry for slot in group if (entry := group.get(slot)) is not None]
        others = tuple(entry.path for entry in entries if not _is_of(entry, record, known))
        if state.records.get(self.key) == record and not others:
            return None
        settings = {"name": self.table, "index": self.index}
        return Draft("neighbours", settings, remove=others, records={self.key: record})

    def open(self, store: Store) -> NeighboursWorker:
        """Open the database."""
        return NeighboursWorker(store, self)


def check_encoders(store: Store, database: Database) -> None:
    """``UsageError`` unless queries and database were embedded by the same encoder."""
    key = f"encoder:{database.encoder}"
    ours, theirs = store.state.records.get(key), database.store.state.records.get(key)
    if ours is None:
        raise UsageError(
            f"{store.root} has no embeddings of {database.encoder!r}, which the index was made with",
            f"Make them with: retrotool embed {store.root} --encoder {database.encoder}",
        )
    if theirs is None or ours["sha256"] != theirs["sha256"]:
        raise UsageError(
            f"{store.root} and {database.store.root} were embedded by different encoders, both {database.encoder!r}",
            "Embed one of them again with the encoder of the other.",
        )


def _version(database: Database, index: str, record: Mapping[str, Any]) -> str:
    """Changes when the database can give other neighbours (new parts, another index), not when chunks are purged."""
    held = held_parts(database.store.state, index)
    fields = [record["database"], index, database.point, database.record.get("generation", 0), record["saved"], held]
    return hashlib.blake2b(repr(fields).encode(), digest_size=8).hexdigest()


def _is_of(entry: FileEntry, record: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a table is of ``record``'s index; one that doesn't say is of the record that was there, ``known``."""
    made = {**known, **(entry.about or {})}
    return all(made[name] == record[name] for name in _SAME)


def _commit(entry: FileEntry) -> tuple[Any, Any]:
    about = entry.about or {}
    return about.get("commit"), about.get("head")


def _check_commit(entry: FileEntry, table: str, database: Store) -> None:
    """``UsageError`` if the database has not the commit that a table is from."""
    number, head = _commit(entry)
    if head is not None and not has_commit(database, int(number), str(head)):
        raise UsageError(
            f"the neighbours {table!r} are not of {database.root} as it is now, but of a copy that went its own way",
            "Put that one back, or compute them anew with a --name of their own.",
        )


def check_table(store: Store, entry: FileEntry, table: str, database: Store) -> None:
    """``UsageError`` if the ids in a table can't be taken for chunks of ``database`` as the table's record says."""
    record = store.state.records[f"neighbours:{table}"]
    part = int(FileName.parse(entry.path).slot)
    if not _is_of(entry, record, record):
        raise UsageError(
            f"part {part} has no neighbours {table!r} of the index {record['index']!r} yet: its table is of another",
            "Compute them: retrotool neighbours",
        )
    _check_commit(entry, table, database)
    if _commit(entry)[1] is None and _database_in(store, entry) not in (None, record["database"]):
        raise UsageError(
            f"the neighbours {table!r} of part {part} are chunks of another database than {record['path']}",
            "Compute them again: retrotool neighbours",
        )


def _database_in(store: Store, entry: FileEntry) -> str | None:
    """The uuid that a table's own metadata has, for one of which the log says nothing; None if the file is broken."""
    try:
        metadata = pq.read_schema(store.path(entry)).metadata or {}
    except pa.ArrowException:
        return None  # reading it will say so
    return str(metadata.get(b"retrotool.database", b"").decode())


def _count_few(store: Store, database: Database, part: int, old: FileEntry, k: int) -> int:
    """How many rows of a table are to be refilled; reads it only if chunks were purged since it was made."""
    purged = purges(database.store)
    if (old.about or {}).get("purges") == purged:
        return 0
    key = (old.path, purged, purges(store), k)
    if key not in _counted:
        if len(_counted) >= _COUNTED:
            _counted.clear()
        _counted[key] = len(_few(store, database, part, tables.read_table(store, old), k))
    return _counted[key]


def _few(store: Store, database: Database, part: int, table: NeighbourTable, k: int) -> npt.NDArray[np.int64]:
    """Searchable rows with fewer than k living neighbours, ascending."""
    living = (table.ids != NO_NEIGHBOUR) & ~database.tombstones.contains(table.ids)
    few = np.flatnonzero(living.sum(axis=1) < k)
    return np.intersect1d(few, searchable_rows(store, part, read_tombstones(store))) if len(few) else few


class NeighboursWorker:
    """Finds the neighbours of parts."""

    def __init__(self, store: Store, stage: NeighboursStage) -> None:
        self._store = store
        self._stage = stage
        self._database = Database(Store.open(stage.database), stage.index)
        self._commit = self._database.store.state.number
        self._within = is_same_directory(store, self._database.store)

    def _current_database(self) -> Database:
        """The database at its newest commit: an erase may have replaced files since."""
        if self._database.store.refresh().number != self._commit:
            self._database = Database(self._database.store, self._stage.index)
            self._commit = self._database.store.state.number
        return self._database

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Find the neighbours of one part, or of those of its rows that have too few."""
        store, stage = self._store, self._stage
        store.refresh()
        database = self._current_database()
        part = int(task.inputs["part"])
        vectors = read_part_vectors(store, database.encoder, part)
        table, asking = self._begin(task, database, part, len(vectors))
        own = own_documents(store, part, database.store, database.tombstones, within=self._within)
        for start in range(0, len(asking), _QUERY_BLOCK):
            rows = asking[start : start + _QUERY_BLOCK]
            best = database.search(Queries(vectors[rows].astype(np.float32), own.take(rows)), stage.saved)
            table.ids[rows], table.distances[rows] = best.ids, best.distances
            report(len(rows))
        report(task.weight - len(asking))
        record = stage.record(store, database)
        state = database.store.state
        about = {
            "version": task.inputs["version"], **{name: record[name] for name in _SAME},
            "commit": state.number, "head": state.head[:_HEAD_DIGITS], "purges": purges(database.store),
        }  # fmt: skip
        name = FileName.new(run, "neighbours", part_slot(part), "parquet", stage.table)
        entry = tables.write_table(
            store.root, name, table, database=record["database"], commit=state.number, path=record["path"], about=about
        )
        replaced = task.inputs["replaces"]
        reads = [str(task.inputs["path"])]
        if self._within:  # an erase replaces them: what was found before it must not come after it
            reads += [entry.path for entry in shards(state, stage.index).values()]
        # Where nobody has claimed the name yet, the first table does: a run with another database is refused then.
        claim = {} if stage.key in store.state.records else {stage.key: record}
        return Staged(
            task.key, "neighbours", run, {"name": stage.table, "index": stage.index},
            tuple(reads), (entry,), (replaced,) if replaced else (), claim,
        )  # fmt: skip

    def _begin(
        self, task: Task, database: Database, part: int, rows: int
    ) -> tuple[NeighbourTable, npt.NDArray[np.int64]]:
        """The table to fill, and the rows to search for."""
        store, stage = self._store, self._stage
        old = store.state.part_file("neighbours", part, stage.table)
        if task.inputs["refill"] and old is not None and old.path == task.inputs["replaces"]:
            table = tables.read_table(store, old)
            table = NeighbourTable(np.array(table.ids), np.array(table.distances))
            return table, _few(store, database, part, table, stage.k)
        table = NeighbourTable(
            np.full((rows, stage.saved), NO_NEIGHBOUR, np.int64), np.full((rows, stage.saved), np.inf, np.float32)
        )
        return table, searchable_rows(store, part, read_tombstones(store))


def database_of(store: Store, table: str) -> tuple[Store, Mapping[str, Any]]:
    """The database that a table's neighbours are chunks of, opened at its newest commit, and the table's record.

    ``UsageError`` if the table or the database is not there, or another store lies where the database was.
    """
    record = store.state.records.get(f"neighbours:{table}")
    if record is None:
        have = ", ".join(store.state.with_prefix("neighbours:")) or "none"
        raise UsageError(
            f"{store.root} has no neighbours {table!r}; it has: {have}", "Make them with: retrotool neighbours"
        )
    # By its uuid alone a copy of the database would take itself for it.
    if record.get("within", record["database"] == store.identity.uuid):
        return store, record
    database = Store.open(Path(record["path"]))
    if database.identity.uuid != record["database"]:
        raise UsageError(
            f"{record['path']} is not the database that the neighbours {table!r} come from",
            "Put it back, or compute the neighbours again: tombstones can't be applied without it.",
        )
    return database, record
