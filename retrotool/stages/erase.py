"""``purge --erase``: rewriting the files that hold purged chunks, so that their bytes are gone.

A task is a part (its documents, keys, chunks and every encoder's embeddings) or an index shard. Slots stay, zeroed,
so no id or row ever moves. What is done is read off the data itself: a file that no longer holds a victim is left
alone, so an interrupted erase simply goes on. The commit removes the old files from the state, then they are
unlinked.

Not reached: bare chunk ids in tombstones and neighbour tables, centroids that were trained with the vectors, and
anything outside the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann import lists
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.index import shards, write_index
from retrotool.store import parts, staging, vectors
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EraseStage:
    """The files that still hold any of ``chunks`` (tombstoned ids, as a tuple so that the stage stays plain data)."""

    chunks: tuple[int, ...]
    name: str = field(default="erase", init=False)
    unit: str = field(default="file", init=False)

    def victims(self) -> Tombstones:
        """The chunks to erase, as a set."""
        return Tombstones(np.unique(np.array(self.chunks, np.int64)))

    def plan(self, store: Store) -> list[Task]:
        """One task a part, and one a shard, that holds a victim."""
        victims = self.victims()
        tasks = []
        for part in victims.parts():
            entries = part_files(store, part)
            if _holds(store, part, victims.rows(part)):
                paths = [entry.path for entry in entries]
                key = task_key("erase", {"victims": victims.rows(part).tolist()}, paths)
                tasks.append(Task(key, f"part {part}", len(entries), {"part": part, "paths": paths}))
        touched = set(victims.parts())
        for name in store.state.names("index"):
            for slot, about in shards(store.state, name).items():
                entry = store.state.file("index", slot, name)
                if entry is None or not touched.intersection(about["parts"]):
                    continue
                found = lists.read(store.path(entry))
                if any(victims.contains(ids).any() for ids in found.ids):
                    key = task_key("erase", {"shard": slot, "victims": victims.ids.tolist()}, [entry.path])
                    inputs = {"index": name, "slot": slot, "path": entry.path}
                    tasks.append(Task(key, f"index {name} {slot}", 1, inputs))
        return [task for task in tasks if not staging.is_staged(store.root, task.key)]

    def open(self, store: Store) -> EraseWorker:
        """Nothing to load."""
        return EraseWorker(store, self.victims())


def part_files(store: Store, part: int) -> list[FileEntry]:
    """The files of a part that hold its text, tokens, vectors or ids."""
    found = [store.state.part_file(kind, part) for kind in ("documents", "keys", "chunks")]
    found += [store.state.part_file("embeddings", part, name) for name in store.state.names("embeddings")]
    return [entry for entry in found if entry is not None]


def _holds(store: Store, part: int, rows: Rows) -> bool:
    """Whether a part's chunks or embeddings still hold any of ``rows``."""
    chunks = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])
    if (chunks["n_tokens"].to_numpy()[rows] > 0).any():
        return True
    for name in store.state.names("embeddings"):
        entry = store.state.part_file("embeddings", part, name)
        if entry is not None and vectors.read_vectors(store, entry)[rows].any():
            return True
    return False


class EraseWorker:
    """Rewrites parts and shards without the victims."""

    def __init__(self, store: Store, victims: Tombstones) -> None:
        self._store = store
        self._victims = victims

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Rewrite one part or shard."""
        self._store.refresh()
        if "part" in task.inputs:
            add = self._part(int(task.inputs["part"]), run)
            old = tuple(task.inputs["paths"])
        else:
            add = self._shard(str(task.inputs["index"]), str(task.inputs["slot"]), run)
            old = (str(task.inputs["path"]),)
        report(task.weight)
        return Staged(task.key, "erase", run, reads=old, add=tuple(add), remove=old)

    def _part(self, part: int, run: str) -> list[FileEntry]:
        store, rows, slot = self._store, self._victims.rows(part), part_slot(part)
        chunks = parts.read_chunks(store, part)
        n_tokens, tokens = chunks.n_tokens.copy(), chunks.tokens.copy()
        n_tokens[rows], tokens[rows] = 0, 0
        documents = erase_documents(parts.read_documents(store, part), chunks.doc, n_tokens)
        tables = {
            "documents": documents,
            "keys": parts.keys_table(documents),
            "chunks": parts.chunks_table(chunks.doc, chunks.index, n_tokens, tokens, chunks.key),
        }
        add = [
            parts.write_parquet(store.root, FileName.new(run, kind, slot, "parquet"), table)
            for kind, table in tables.items()
        ]
        for name in store.state.names("embeddings"):
            entry = store.state.part_file("embeddings", part, name)
            if entry is not None:
                matrix = np.array(vectors.read_vectors(store, entry))
                matrix[rows] = 0
                add.append(
                    vectors.write_vectors(store.root, FileName.new(run, "embeddings", slot, "npy", name), matrix)
                )
        return add

    def _shard(self, name: str, slot: str, run: str) -> list[FileEntry]:
        entry = self._store.state.file("index", slot, name)
        assert entry is not None, "the task's file has left the state; its commit will be refused"
        found = lists.read(self._store.path(entry))
        index = lists.without(found, [self._victims.contains(ids) for ids in found.ids])
        return [write_index(self._store.root, index, FileName.new(run, "index", slot, "faiss", name), entry.about)]


def erase_documents(documents: pa.Table, doc: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32]) -> pa.Table:
    """Documents after an erase: counts of what is left, and nulls for those of which nothing is."""
    left = np.bincount(doc, weights=n_tokens, minlength=documents.num_rows).astype(np.int64)
    whole = documents["n_tokens"].to_numpy() == left
    gone = pa.array(left == 0)
    columns = []
    for schema_field in documents.schema:
        column = documents[schema_field.name]
        if schema_field.name == "n_tokens":
            column = pa.array(left)
        elif schema_field.name == "text_hash":
            # The hash of a text that is no longer all there would still tell what it was.
            column = pc.if_else(pa.array(whole), column, pa.scalar(None, column.type))
        elif schema_field.name not in ("first_row", "n_chunks"):
            column = pc.if_else(gone, pa.scalar(None, column.type), column)
        columns.append(column)
    return pa.table(columns, schema=documents.schema)
