"""``neighbours --materialise``: the tokens of every row's neighbours in one file a part, for training loops to read.

A task is a part of the query store that has tables. Its file is made anew once a table of it was, the weights of a
mixture or k changed, a chunk was purged that it holds, or one taken back that it may lack; finding that out costs
reading the file's ids once a run, and nothing as long as nothing was purged. The commit that brings a file removes the
one before.

A part is done in blocks of up to 0.5 GiB of tokens: ids are sorted over the whole database, and each row group that
holds any of them is read once a block. So cost is writing (1 µs a row) and, for each block, 3 ms for each of these row
groups, 0.4 s for every million chunks of the database. Rows that an earlier file of the same table still has are
copied. Memory: a block, and 16 row groups of the database.

What is purged while a task runs must not be committed afterwards. In the store itself the commit is refused; a database
elsewhere is looked at once more when the file is done, so what is purged there in the moment between that and the
commit is on the disk until the next run, or until an erase reaches this store (``stages.erase_materialised``). It is
never returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrotool.embed.search_scope import purges
from retrotool.engine.task import Report, Task, own_first, task_key
from retrotool.errors import ErasedError
from retrotool.neighbours.materialised import (
    MaterialisedReader,
    about_of,
    block_rows,
    check_tokenizers,
    current_file,
    lost_continuations,
    lost_rows,
    misses_restored,
)
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.store import disk, materialised, parts, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.materialised import Materialised
from retrotool.store.parts import ROW_GROUP
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones, stands_for

BLOCK_BYTES = 1 << 29
_Held = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]
"""Neighbours of row groups: their ids, and numbers of their databases."""
_fresh: set[tuple[str, tuple[str, ...]]] = set()
"""Files of which is known that nothing they hold is purged, each with what stands for the tombstones."""


@dataclass(frozen=True, slots=True)
class MaterialiseStage:
    """All parts with tables ``table`` (or a mixture of that name), and no current file of all that is living."""

    table: str = "main"
    shard: tuple[int, int] | None = None
    name: str = field(default="materialise", init=False)
    unit: str = field(default="chunk", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a part; ``UsageError`` if there is no such table, or the database has other tokens."""
        reader = NeighbourReader(store, self.table)
        check_tokenizers(reader)
        tasks = []
        for part in reader.parts():
            paths = [entry.path for entry in reader.entries(part)]
            old = store.state.part_file("materialised", part, self.table)
            fresh = current_file(store, self.table, part, reader.k)
            if fresh is not None and (fresh.about or {})["k"] == reader.k and _is_fresh(reader, fresh):
                continue
            settings = {"name": self.table, "k": reader.k, "weights": [member.weight for member in reader.members]}
            settings["purges"] = [purges(member.store) for member in reader.members]
            key = task_key(self.name, settings, [*paths, *([old.path] if old else [])])
            if not staging.is_staged(store.root, key):
                inputs = {"part": part, "tables": paths, "replaces": old.path if old else None}
                rows = parts.part_entry(store, "chunks", part).rows
                tasks.append(Task(key, f"part {part}", rows, inputs, claimed=True))
        return tasks if self.shard is None else own_first(tasks, *self.shard)

    def open(self, store: Store) -> MaterialiseWorker:
        """Nothing to load."""
        return MaterialiseWorker(store, self)


def _is_fresh(reader: NeighbourReader, entry: FileEntry) -> bool:
    """Whether a current file holds nothing that is purged, and lacks nothing that was taken back."""
    if misses_restored(entry, reader.databases):
        return False
    now = [purges(member.store) for member in reader.members]
    if [database["purges"] for database in (entry.about or {})["databases"]] == now:
        return True
    key = (entry.path, tuple(now))
    if key in _fresh:
        return True
    for group in range(-(-entry.rows // ROW_GROUP)):
        stored = materialised.read_materialised(reader.store, entry, [group], tokens=False)
        if lost_rows(reader, stored).any() or lost_continuations(reader, stored).any():
            return False
    _fresh.add(key)
    return True


class MaterialiseWorker:
    """Writes the files of parts."""

    def __init__(self, store: Store, stage: MaterialiseStage) -> None:
        self._store, self._table = store, stage.table

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Write one part's file; ``ErasedError`` if its tables were replaced, or chunks purged that it would hold."""
        store = self._store
        state = store.refresh()
        tombstones = stands_for(state)
        reader = NeighbourReader(store, self._table)
        part = int(task.inputs["part"])
        tables = [entry.path for entry in reader.entries(part)]
        if tables != task.inputs["tables"]:
            raise ErasedError(f"the neighbours of part {part} were computed again since this was planned")
        held: _Held = []

        def groups() -> Iterator[Materialised]:
            for group in self._groups(reader, part):
                held.append((group.ids, group.databases))
                report(len(group))
                yield group

        own = store.identity
        name = FileName.new(run, "materialised", part_slot(part), "parquet", self._table)
        about = about_of(reader, part, reader.k)
        entry = materialised.write_materialised(
            store.root, name, reader.k, own.chunk_length * own.tokenizer.token_bytes, groups(), about=about
        )
        if _any_purged(purged_since(reader), held):
            disk.unlink(Path(store.root) / entry.path)
            raise ErasedError(f"a neighbour of a chunk of part {part} was purged just now")
        replaced = task.inputs["replaces"]
        return Staged(
            task.key, "materialise", run, {"name": self._table, "k": reader.k},
            tuple(tables), (entry,), (replaced,) if replaced else (), tombstones=tombstones,
        )  # fmt: skip

    def _groups(self, reader: NeighbourReader, part: int) -> Iterator[Materialised]:
        """A part's rows, by row group; those of a block are read together."""
        own = self._store.identity
        row_bytes = 2 * reader.k * own.chunk_length * own.tokenizer.token_bytes
        at_once = max(1, BLOCK_BYTES // (row_bytes * ROW_GROUP))
        rows = MaterialisedReader(reader, reader.k)
        total = -(-parts.part_entry(self._store, "chunks", part).rows // ROW_GROUP)
        for first in range(0, total, at_once):
            blocks = [(part, group) for group in range(first, min(first + at_once, total))]
            found = rows.read(blocks)
            start = 0
            for block in blocks:
                some = slice(start, start + block_rows(self._store, block))
                yield found.rows(some)
                start = some.stop


def purged_since(reader: NeighbourReader) -> dict[int, Tombstones]:
    """What databases elsewhere have purged since the reader opened them, by their numbers; refreshes them."""
    found = {}
    for number, member in enumerate(reader.members):
        seen = member.store.state.number
        if not member.within and member.store.refresh().number > seen:
            now = read_tombstones(member.store).ids
            found[number] = Tombstones(np.setdiff1d(now, member.tombstones.ids))
    return found


def _any_purged(purged: dict[int, Tombstones], held: _Held) -> bool:
    """Whether any of some neighbours, or of what follows them, is among what was purged."""
    return any(
        (tombstones.contains(ids) | tombstones.contains(ids + 1))[databases == number].any()
        for number, tombstones in purged.items()
        for ids, databases in held
    )
