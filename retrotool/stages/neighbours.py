"""``neighbours``: the nearest keys of every key, outside its own document.

A task is a part of the query store: list-major search (``ann.search``) of all its searchable vectors through the
database's shards, with the interval of the query's own document and all tombstones masked before the top-k. Rows of
purged or erased queries are empty, and so are those of values of key-value records. The table lies in the query store
and names the database by uuid, commit and path. It is stale once the database has parts that it had not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrotool.ann.search import Queries
from retrotool.errors import UsageError
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.database import (
    Database,
    count_keys,
    document_intervals,
    embedded_parts,
    read_part_vectors,
    same_documents,
    searchable_rows,
)
from retrotool.stages.index import shards
from retrotool.store import parts, staging, tables
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR, NeighbourTable
from retrotool.store.tombstones import read_tombstones

_QUERY_BLOCK = 1 << 14


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
        """One task a part that has embeddings and no table, or one made before the database got new parts."""
        database = Database(Store.open(self.database), self.index)
        check_encoders(store, database)
        record = self.record(database)
        known = store.state.records.get(f"neighbours:{self.table}", record)
        if known["database"] != record["database"]:
            raise UsageError(
                f"the neighbours {self.table!r} of {store.root} are chunks of another database, {known['path']}",
                "Give these a name of their own with --name.",
            )
        version = _version(database, self.index, record)
        tasks = []
        for part in embedded_parts(store, database.encoder):
            path = parts.part_entry(store, "embeddings", part, database.encoder).path
            old = store.state.part_file("neighbours", part, self.table)
            if old is not None and (old.about or {}).get("version") == version:
                continue
            key = task_key("neighbours", {"table": self.table, "version": version}, [path])
            if not staging.is_staged(store.root, key):
                inputs = {"part": part, "path": path, "version": version, "replaces": old.path if old else None}
                tasks.append(Task(key, f"part {part}", count_keys(store, part), inputs))
        return tasks

    def record(self, database: Database) -> dict[str, Any]:
        """The record ``neighbours:<table>``."""
        return {
            "database": database.store.identity.uuid, "path": str(database.store.root.absolute()), "index": self.index,
            "encoder": database.encoder, "saved": self.saved, "k": self.k,
        }  # fmt: skip

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
    held = sorted(part for about in shards(database.store.state, index).values() for part in about["parts"])
    fields = [record["database"], index, database.nprobe, record["saved"], held]
    return hashlib.blake2b(repr(fields).encode(), digest_size=8).hexdigest()


class NeighboursWorker:
    """Finds the neighbours of parts."""

    def __init__(self, store: Store, stage: NeighboursStage) -> None:
        self._store = store
        self._stage = stage
        self._database = Database(Store.open(stage.database), stage.index)
        self._commit = self._database.store.state.number

    def _current_database(self) -> Database:
        """The database at its newest commit: an erase may have replaced files since."""
        if self._database.store.refresh().number != self._commit:
            self._database = Database(self._database.store, self._stage.index)
            self._commit = self._database.store.state.number
        return self._database

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Find the neighbours of one part."""
        store, stage = self._store, self._stage
        store.refresh()
        database = self._current_database()
        part = int(task.inputs["part"])
        vectors = read_part_vectors(store, database.encoder, part)
        within = store.identity.uuid == database.store.identity.uuid
        first, last = document_intervals(store, part) if within else same_documents(store, part, database.store)
        table = NeighbourTable(
            np.full((len(vectors), stage.saved), NO_NEIGHBOUR, np.int64),
            np.full((len(vectors), stage.saved), np.inf, np.float32),
        )
        asking = searchable_rows(store, part, read_tombstones(store))
        for start in range(0, len(asking), _QUERY_BLOCK):
            rows = asking[start : start + _QUERY_BLOCK]
            best = database.search(Queries(vectors[rows].astype(np.float32), first[rows], last[rows]), stage.saved)
            table.ids[rows], table.distances[rows] = best.ids, best.distances
            report(len(rows))
        report(task.weight - len(asking))
        record = stage.record(database)
        name = FileName.new(run, "neighbours", part_slot(part), "parquet", stage.table)
        entry = tables.write_table(
            store.root, name, table, database=record["database"], commit=database.store.state.number,
            path=record["path"], about={"version": task.inputs["version"]},
        )  # fmt: skip
        replaced = task.inputs["replaces"]
        return Staged(
            task.key, "neighbours", run, {"name": stage.table, "index": stage.index},
            (str(task.inputs["path"]),), (entry,), (replaced,) if replaced else (),
        )  # fmt: skip


def database_of(store: Store, table: str) -> tuple[Store, int]:
    """The database that a table's neighbours are chunks of, opened at its newest commit, and the table's default k.

    ``UsageError`` if the table or the database is not there, or another store lies where the database was.
    """
    record = store.state.records.get(f"neighbours:{table}")
    if record is None:
        have = ", ".join(store.state.with_prefix("neighbours:")) or "none"
        raise UsageError(
            f"{store.root} has no neighbours {table!r}; it has: {have}", "Make them with: retrotool neighbours"
        )
    if record["database"] == store.identity.uuid:
        return store, int(record["k"])
    database = Store.open(Path(record["path"]))
    if database.identity.uuid != record["database"]:
        raise UsageError(
            f"{record['path']} is not the database that the neighbours {table!r} come from",
            "Put it back, or compute the neighbours again: tombstones can't be applied without it.",
        )
    return database, int(record["k"])
