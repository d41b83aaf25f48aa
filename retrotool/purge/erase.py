"""``purge --erase``: rewriting the files that hold purged chunks, so that their bytes are gone.

A task is one of

- a part: its documents and chunks, and every encoder's embeddings;
- a shard of an index;
- a table of neighbours: the rows of erased chunks, and in the rows of others the entries that name one, as enough
  exact distances to known vectors tell what a vector was; and the tokens of neighbours that a table has;
- a quarantine file that has excerpts. All of them go: a row that could not be
  read may be the victim's, and nothing but reading it tells whose it is.

Parts come first, and the others when no part holds a victim any more: so a look at the chunks tells whether an erase
was begun, and a purge of which nothing is erased can still be taken back. A task reads the tombstones of its victims,
so it is void when these are taken back meanwhile.

Slots stay, zeroed, so no id or row ever moves. What is done is read off the data itself: a file that no longer holds a
victim is left alone, so an interrupted erase simply goes on. The commit removes the old files from the state, then they
are unlinked. Cost: reading what the victims' parts hold, every shard that has one of these parts, and every neighbour
table against this store; writing those that hold a victim. Memory: one part, or one shard, a
process, and some 40 bytes a victim.

Not reached: bare chunk ids in tombstones, centroids that were trained with the vectors, distances in tables of other
stores, and anything outside the store.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann import lists
from retrotool.chunk.chunker import id_hash
from retrotool.engine.task import Report, Task, check_there, task_key
from retrotool.errors import CorruptError
from retrotool.index.generations import all_shards
from retrotool.index.index_files import check_sum, parts_in_shard, write_index
from retrotool.store import neighbour_tables, parts, staging, vectors
from retrotool.store.atomic import FileEntry
from retrotool.store.checked import is_within
from retrotool.store.identity import Identity
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP
from retrotool.store.paths import FileName, part_slot
from retrotool.store.restored import check_not_restored, tombstones_naming
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EraseStage:
    """The files that still hold any of ``victims``, the chunks of ``purges``, which are tombstones.

    ``clean`` remembers paths that were found to hold none. A path always names the same bytes, so planning again reads
    only what is new.
    """

    victims: Tombstones
    purges: tuple[str, ...]
    clean: set[str] = field(default_factory=set, compare=False, repr=False)
    name: str = field(default="erase", init=False)
    unit: str = field(default="file", init=False)

    def plan(self, store: Store) -> list[Task]:
        """One task a part that holds a victim; if none does, one a shard, table and quarantine file.

        ``ConflictError`` if one of the purges was undone; ``ErasedError`` or ``CorruptError`` if a file that is to be
        read was replaced just now.
        """
        tasks = list(self._of_parts(store)) or list(self._of_others(store))
        return [task for task in tasks if not staging.is_staged(store.root, task.key)]

    def tasks(self, store: Store) -> list[Task]:
        """All that there is to do, also what has to wait."""
        return [*self._of_parts(store), *self._of_others(store)]

    def _of_parts(self, store: Store) -> Iterator[Task]:
        reads = self._tombstones(store)
        for part in self.victims.parts():
            entries, rows = part_files(store, part), self.victims.rows(part)
            if self._holds(entries, functools.partial(_part_holds, store, part, rows)):
                paths = [entry.path for entry in entries]
                key = task_key("erase", {"victims": _digest(rows)}, paths)
                yield Task(key, f"part {part}", len(entries), {"part": part, "paths": paths, "reads": reads})

    def _of_others(self, store: Store) -> Iterator[Task]:
        reads, victims = self._tombstones(store), _digest(self.victims.ids)
        for entry, holds in _other_files(store, self.victims):
            if self._holds([entry], holds):
                key, label = task_key("erase", {"victims": victims}, [entry.path]), entry.path.rpartition("-")[0]
                yield Task(key, label, 1, {"paths": [entry.path], "reads": reads})

    def _tombstones(self, store: Store) -> list[str]:
        """Paths of the tombstones of the victims; none if there are no victims."""
        if not len(self.victims):
            return []
        # Other purges may name all victims, so that they stay tombstones.
        check_not_restored(store.state, self.purges)
        return tombstones_naming(store, self.victims)

    def _holds(self, entries: list[FileEntry], holds: Callable[[], bool]) -> bool:
        paths = {entry.path for entry in entries}
        if paths <= self.clean:
            return False
        if holds():
            return True
        self.clean.update(paths)
        return False

    def open(self, store: Store) -> EraseWorker:
        """Nothing to load."""
        return EraseWorker(store, self.victims)


def _digest(ids: Rows) -> str:
    """Stands for ids in the name of a task."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def _other_files(store: Store, victims: Tombstones) -> Iterator[tuple[FileEntry, Callable[[], bool]]]:
    """The files that belong to no part alone, and what says whether one holds something."""
    state, wanted = store.state, set(victims.parts())
    if not wanted:
        return
    for name in state.names("index"):
        for entry in all_shards(state, name).values():
            if not wanted.isdisjoint(parts_in_shard(entry)):
                yield entry, functools.partial(_shard_holds, store, entry, victims)
    for name in state.names("neighbours"):
        for entry in state.group("neighbours", name).entries():
            yield entry, functools.partial(_table_holds, store, entry, victims)
    for entry in state.group("quarantine").entries():
        yield entry, functools.partial(_has_excerpts, store, entry)


def part_files(store: Store, part: int) -> list[FileEntry]:
    """The files of a part that hold its text, tokens, vectors or ids."""
    found = [store.state.part_file(kind, part) for kind in ("documents", "chunks")]
    found += [store.state.part_file("embeddings", part, name) for name in store.state.names("embeddings")]
    return [entry for entry in found if entry is not None]


def _part_holds(store: Store, part: int, rows: Rows) -> bool:
    """Whether a part's chunks or embeddings still hold any of ``rows``."""
    chunks = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])
    if (chunks["n_tokens"].to_numpy()[rows] > 0).any():
        return True
    for name in store.state.names("embeddings"):
        entry = store.state.part_file("embeddings", part, name)
        if entry is not None and vectors.read_vectors(store, entry)[rows].any():
            return True
    return False


def _shard_holds(store: Store, entry: FileEntry, victims: Tombstones) -> bool:
    shard = lists.read_lists(store.path(entry))
    return any(victims.contains(shard.ids(number)).any() for number in shard.numbers)


def _table_holds(store: Store, entry: FileEntry, victims: Tombstones) -> bool:
    rows = victims.rows(int(FileName.parse(entry.path).slot))
    within = is_within(store, entry, table_schema(store, entry).metadata)
    for group, mine in row_groups(entry, rows):
        if not (within or len(mine)):
            continue
        ids = neighbour_tables.read_ids(store, entry, [group])
        if (ids[mine] != NO_NEIGHBOUR).any() or (within and victims.contains(ids).any()):
            return True
        if neighbour_tables.text_size(entry):
            text = neighbour_tables.read_text(store, entry, [group], tokens=False)
            named, followed = neighbour_tables.text_naming(text, victims.contains)
            if (text.ids[mine] != NO_NEIGHBOUR).any() or (within and (named | followed).any()):
                return True
    return False


def row_groups(entry: FileEntry, rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield the numbers of the row groups of a file, and which of ``rows`` (ascending) each has, from its first."""
    for group in range(-(-entry.rows // ROW_GROUP)):
        low, high = np.searchsorted(rows, [group * ROW_GROUP, (group + 1) * ROW_GROUP])
        yield group, rows[low:high] - group * ROW_GROUP


def table_schema(store: Store, entry: FileEntry) -> pa.Schema:
    """The schema of a Parquet file with its metadata; ``CorruptError`` if it can't be read."""
    return parts.read_parquet(store, entry, row_groups=[]).schema


def _has_excerpts(store: Store, entry: FileEntry) -> bool:
    table = parts.read_parquet(store, entry, ["excerpt"])
    return bool(pc.any(pc.greater(pc.binary_length(table["excerpt"]), 0)).as_py())


class EraseWorker:
    """Rewrites files without the victims."""

    def __init__(self, store: Store, victims: Tombstones) -> None:
        self._store = store
        self._victims = victims

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Rewrite what a task names; ``ErasedError`` if another process has replaced it meanwhile."""
        old, tombstones = tuple(task.inputs["paths"]), tuple(task.inputs["reads"])
        check_there(self._store, (*old, *tombstones))
        try:
            add = self._rewritten(task, run)
        except CorruptError:
            check_there(self._store, old)
            raise
        report(task.weight)
        return Staged(task.key, "erase", run, reads=(*old, *tombstones), add=tuple(add), remove=old)

    def _rewritten(self, task: Task, run: str) -> list[FileEntry]:
        if "part" in task.inputs:
            return self._part(int(task.inputs["part"]), run)
        name = FileName.parse(task.inputs["paths"][0])
        entry = self._store.state.file(name.kind, name.slot, name.name)
        assert entry is not None, "it was there just now"
        rewrite = {"index": self._shard, "neighbours": self._table, "quarantine": self._excerpts}[name.kind]
        return [rewrite(entry, FileName.new(run, name.kind, name.slot, name.extension, name.name))]

    def _part(self, part: int, run: str) -> list[FileEntry]:
        store, rows, slot = self._store, self._victims.rows(part), part_slot(part)
        chunks = parts.read_chunks(store, part)
        n_tokens, tokens = chunks.n_tokens.copy(), chunks.tokens.copy()
        n_tokens[rows], tokens[rows] = 0, 0
        documents = erase_documents(parts.read_documents(store, part), chunks.doc, n_tokens, store.identity)
        found = {
            "documents": documents,
            "chunks": parts.chunks_table(chunks.doc, chunks.index, n_tokens, tokens, chunks.key),
        }
        add = [
            parts.write_parquet(store.root, FileName.new(run, kind, slot, "parquet"), table)
            for kind, table in found.items()
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

    def _shard(self, entry: FileEntry, name: FileName) -> FileEntry:
        check_sum(self._store, name.name, entry)
        index = lists.without(lists.read_lists(self._store.path(entry)), self._victims.contains)
        return write_index(self._store.root, index, name, entry.about)

    def _table(self, entry: FileEntry, name: FileName) -> FileEntry:
        store, rows = self._store, self._victims.rows(int(name.slot))
        schema = table_schema(store, entry)
        banned = self._victims.contains if is_within(store, entry, schema.metadata) else None

        def groups() -> Iterator[pa.Table]:
            for group, mine in row_groups(entry, rows):
                table = neighbour_tables.erase_neighbours(
                    neighbour_tables.read_table(store, entry, [group]), mine, banned
                )
                text = None
                if neighbour_tables.text_size(entry):
                    text = neighbour_tables.erase_text(neighbour_tables.read_text(store, entry, [group]), mine, banned)
                yield neighbour_tables.to_arrow(table, text, schema)

        written = parts.write_batches(store.root, name, schema, groups(), row_group=ROW_GROUP)
        return replace(written, about=entry.about)

    def _excerpts(self, entry: FileEntry, name: FileName) -> FileEntry:
        table = parts.read_parquet(self._store, entry)
        place = table.schema.get_field_index("excerpt")
        table = table.set_column(place, table.schema.field(place), pa.nulls(table.num_rows, pa.string()))
        return parts.write_parquet(self._store.root, name, table)


def erase_documents(
    documents: pa.Table, doc: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], identity: Identity
) -> pa.Table:
    """Documents after an erase: counts of what is left, and nulls for those of which nothing is.

    Those of which a part is left lose the hash of their text; where that was their id too, they are named anew.
    """
    left = np.bincount(doc, weights=n_tokens, minlength=documents.num_rows).astype(np.int64)
    whole = documents["n_tokens"].to_numpy() == left
    gone = pa.array(left == 0)
    documents = _named_anew(documents, ~whole & (left > 0) & parts.named_by_text(documents), identity)
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


def _named_anew(documents: pa.Table, which: npt.NDArray[np.bool_], identity: Identity) -> pa.Table:
    """Documents with ids for ``which`` of them that only the store can make of those before, always the same."""
    if not which.any():
        return documents
    old = documents["id"].filter(pa.array(which)).to_pylist()
    ids = [identity.keyed_hash(f"erased:{name}") for name in old]
    for column, values in (("id", ids), ("key", [id_hash(name) for name in ids])):
        place = documents.schema.get_field_index(column)
        field_ = documents.schema.field(place)
        new = pc.replace_with_mask(documents[column].combine_chunks(), pa.array(which), pa.array(values, field_.type))
        documents = documents.set_column(place, field_, new)
    return documents
