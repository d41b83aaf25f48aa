"""``erase``: rewrite the files that hold purged chunks without them.

A task rewrites one of:

- a part: its documents, chunks and the embeddings of every encoder;
- a shard of an index;
- a neighbour table: rows of erased chunks, entries that name one (distances to known vectors reveal a
  vector), and their tokens;
- a quarantine file: all its excerpts are removed, because an unreadable row may belong to an erased document.

Parts come first, other files once no part holds an erased chunk. So the chunks alone show whether an erase
was begun; until then the purge can be undone. Slots stay, zeroed: no id or row moves. Progress is read from
the data, so an interrupted erase is resumed; work on a view overtaken by another commit is planned again, and
an undo invalidates tasks.

Cost: reading the parts concerned, every shard with one of them, and every neighbour table against this store;
writing those that hold an erased chunk. Memory: one part or shard per process, and about 40 bytes per chunk.

Not erased: chunk ids in tombstones; centroids and codebooks, means over thousands of vectors
(``index --retrain``); distances in tables of other stores; anything outside the store.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool import engine
from retrotool.ann import lists
from retrotool.chunk.chunker import id_hash
from retrotool.embed.search_scope import purges_erased
from retrotool.engine.task import Report, Task, check_there, task_key
from retrotool.errors import ConflictError
from retrotool.index.index_records import RECALL, SHARD, ShardRecord
from retrotool.index.searching import read_shard, write_index
from retrotool.machine import cores, memory_of_machine
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.neighbours.tiles import ROUTES
from retrotool.purge import purged_chunks
from retrotool.purge.selectors import scan
from retrotool.store import folding, log, neighbour_tables, parts, tombstones
from retrotool.store.bucket_copies import BucketCopies, bucket_copies
from retrotool.store.gc import clean
from retrotool.store.identity import Identity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.neighbour_tables import NO_NEIGHBOUR, NeighbourText
from retrotool.store.parts import ROW_GROUP, Bools, Ids
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import PREFIX, Tombstones, named_chunks, read_tombstones, standing_purges
from retrotool.store.vectors import read_vectors, write_vectors

WORKER_BYTES = 1 << 29  # memory of a worker, besides the rows of a part


@dataclass(frozen=True, slots=True)
class EraseStage:
    """Erases ``targets``: the chunks of ``purges``, which are tombstones.

    ``holding`` caches for files that are rewritten together, by their paths, whether they hold one. A path
    always names the same bytes, so planning again reads only new files. ``worker_bytes``: memory of a worker.
    """

    targets: Tombstones
    purges: tuple[str, ...]
    worker_bytes: int = WORKER_BYTES
    holding: dict[tuple[str, ...], bool] = field(default_factory=dict, compare=False, repr=False)
    name: str = field(default="erase", init=False)
    unit: str = field(default="file", init=False)
    worker_cores: int = field(default=1, init=False)

    def plan(self, store: Store) -> list[Task]:
        """Return a task per part that holds a target; if none does, per shard, table and quarantine file.

        ``ConflictError`` if one of the purges was undone; ``ErasedError`` or ``CorruptError`` if a file was
        replaced concurrently.
        """
        if not len(self.targets):
            return []
        # Targets may stay tombstones after an undo: another purge may name them.
        tombstones.check_not_undone(store.state, self.purges)
        reads, numbers = tombstones.tombstones_naming(store, self.targets), self.targets.parts()
        of_parts = list(self._tasks(store, reads, (part_files(store, part) for part in numbers)))
        others = ([entry] for entry in files_of_several_parts(store, numbers))
        return of_parts or list(self._tasks(store, reads, others))

    def _tasks(self, store: Store, reads: list[str], several: Iterable[list[FileEntry]]) -> Iterator[Task]:
        """Yield a task for each of several lists of files to rewrite together that hold a target."""
        for entries in several:
            first, paths = entries[0], tuple(entry.path for entry in entries)
            if paths not in self.holding:
                self.holding[paths] = _HOLDS[first.kind](store, first, self.targets)
            if self.holding[paths]:
                label, ids = first.path.rpartition("-")[0], self.targets.ids
                if first.kind == "documents":
                    label, ids = f"part {first.part}", self.targets.rows(first.part)
                digest = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
                inputs = {"paths": paths, "reads": reads}
                key = task_key("erase", {"targets": digest}, paths)
                yield Task(key, label, len(paths), inputs, claimed=engine.is_a_job(), for_all=True)

    def open(self, store: Store) -> EraseWorker:
        """Return the worker; it loads nothing."""
        return EraseWorker(store, self.targets)


def files_of_several_parts(store: Store, numbers: Sequence[int]) -> Iterator[FileEntry]:
    """Yield the files that may hold data of several parts: shards, neighbour tables and quarantine."""
    state, wanted = store.state, set(numbers)
    for name in state.names("index"):
        shards = (one for one in state.group("index", name).entries() if one.slot.startswith(SHARD))
        yield from (one for one in shards if not wanted.isdisjoint(ShardRecord.of(one).parts))
    for name in state.names("neighbours"):
        yield from state.group("neighbours", name).entries()
    yield from state.group("quarantine").entries()


def part_files(store: Store, part: int) -> list[FileEntry]:
    """Return the files of a part that hold its text, tokens, vectors or ids."""
    found = [store.state.part_file(kind, part) for kind in ("documents", "chunks")]
    found += [store.state.part_file("embeddings", part, name) for name in store.state.names("embeddings")]
    return [entry for entry in found if entry is not None]


def _part_holds(store: Store, documents: FileEntry, targets: Tombstones) -> bool:
    part, rows = documents.part, targets.rows(documents.part)
    if len(purged_chunks.unerased(store, parts.chunk_ids(part, rows))):
        return True
    vectors = (entry for entry in part_files(store, part) if entry.kind == "embeddings")
    return any(read_vectors(store, entry)[rows].any() for entry in vectors)


def _shard_holds(store: Store, entry: FileEntry, targets: Tombstones) -> bool:
    shard = read_shard(store, entry)
    return any(targets.contains(shard.ids(number)).any() for number in shard.numbers)


def _table_holds(store: Store, entry: FileEntry, targets: Tombstones) -> bool:
    return any(holds.any() for holds in leftovers_in_table(store, entry, targets, whole=False))


def _has_excerpts(store: Store, entry: FileEntry, _: Tombstones) -> bool:
    table = parts.read_parquet(store, entry, ["excerpt"])
    return bool(pc.any(pc.greater(pc.binary_length(table["excerpt"]), 0)).as_py())


_HOLDS = {"documents": _part_holds, "index": _shard_holds, "neighbours": _table_holds, "quarantine": _has_excerpts}


def leftovers_in_table(store: Store, entry: FileEntry, purged: Tombstones, *, whole: bool) -> Iterator[Bools]:
    """Yield, by row group, which rows of a neighbour table hold data of ``purged`` chunks, bool [n].

    Of a table against another store, n counts only their own rows. Unless ``whole``, distances and tokens
    without an id are not looked for, and not read.
    """
    within = neighbour_tables.is_within(store, entry, parts.read_schema(store, entry).metadata)
    for group, mine in row_groups(entry, purged.rows(entry.part)):
        if not (within or len(mine)):
            continue
        if whole:
            table = neighbour_tables.read_table(store, entry, [group])
            ids, is_empty = table.ids, np.isposinf(table.distances)
            if table.scores is not None:
                is_empty &= np.isneginf(table.scores)
            holds = ((ids == NO_NEIGHBOUR) & ~is_empty).any(axis=1)
        else:
            ids = neighbour_tables.read_ids(store, entry, [group])
            holds = np.zeros(len(ids), np.bool_)
        holds[mine] |= (ids[mine] != NO_NEIGHBOUR).any(axis=1)
        if within:
            holds |= purged.contains(ids).any(axis=1)
        if neighbour_tables.text_size(entry):
            text = neighbour_tables.read_text(store, entry, [group], tokens=whole)
            holds |= _leftovers_in_text(text, mine, purged if within else None, whole=whole)
        yield holds if within else holds[mine]


def _leftovers_in_text(text: NeighbourText, mine: Ids, purged: Tombstones | None, *, whole: bool) -> Bools:
    """Return which rows have tokens of ``purged`` chunks, ``mine`` any, or, if ``whole``, of no neighbour."""
    has_tokens: Bools = (text.n_tokens != 0) | text.tokens.any(axis=3)
    empty = ~(has_tokens[:, :, 0] | has_tokens[:, :, 1])
    # An erase does not remove these: they are damage.
    bad: Bools = (text.ids < 0) & ~(empty & np.isposinf(text.distances)) & whole
    if purged is not None:
        named, followed = purged.contains(text.ids), purged.contains(text.ids + 1) & has_tokens[:, :, 1]
        bad |= (text.ids >= 0) & (named | followed)
    bad[mine] |= (text.ids[mine] != NO_NEIGHBOUR) | ~empty[mine]
    return np.asarray(bad.any(axis=1))


def row_groups(entry: FileEntry, rows: Ids) -> Iterator[tuple[int, Ids]]:
    """Yield each row group's number, and its ``rows`` (ascending) counted from its first row."""
    for group in range(-(-entry.rows // ROW_GROUP)):
        low, high = np.searchsorted(rows, [group * ROW_GROUP, (group + 1) * ROW_GROUP])
        yield group, rows[low:high] - group * ROW_GROUP


class EraseWorker:
    """Rewrites files without ``targets``."""

    def __init__(self, store: Store, targets: Tombstones) -> None:
        self._store = store
        self._targets = targets

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Rewrite the files of a task; ``ErasedError`` if another process replaced one concurrently."""
        old, named = tuple(task.inputs["paths"]), tuple(task.inputs["reads"])
        check_there(self._store, (*old, *named))
        name, slot = FileName.parse(old[0]), self._store.state.slot_of(old[0])
        entry = None if slot is None else self._store.state.file(name.kind, slot, name.name)
        assert entry is not None, "it was there just now"
        if entry.kind == "documents":
            add = self._part(entry.part, run)
        else:
            rewrite = {"index": self._shard, "neighbours": self._table, "quarantine": self._excerpts}[entry.kind]
            add = [rewrite(entry, FileName.new(run, entry.kind, entry.slot, name.extension, entry.name))]
        report(task.weight)
        return Staged("erase", reads=(*old, *named), add=tuple(add), remove=old, task=task.key, run=run)

    def _part(self, part: int, run: str) -> list[FileEntry]:
        store, rows, slot = self._store, self._targets.rows(part), part_slot(part)
        chunks = parts.read_chunks(store, part)
        n_tokens, tokens = chunks.n_tokens.copy(), chunks.tokens.copy()
        n_tokens[rows], tokens[rows] = 0, 0
        documents = erase_documents(parts.read_documents(store, part), chunks.doc, n_tokens, store.identity)
        table = parts.chunks_table(chunks.doc, chunks.index, n_tokens, tokens, chunks.key)
        add = [
            parts.write_parquet(store, FileName.new(run, kind, slot, "parquet"), rewritten)
            for kind, rewritten in (("documents", documents), ("chunks", table))
        ]
        for entry in part_files(store, part):
            if entry.kind == "embeddings":
                matrix = np.array(read_vectors(store, entry))
                matrix[rows] = 0
                add.append(write_vectors(store, FileName.new(run, "embeddings", slot, "npy", entry.name), matrix))
        return add

    def _shard(self, entry: FileEntry, name: FileName) -> FileEntry:
        self._store.check_sum(entry)
        index = lists.without(read_shard(self._store, entry), self._targets.contains)
        return write_index(self._store, index, name, entry.about)

    def _table(self, entry: FileEntry, name: FileName) -> FileEntry:
        store, rows = self._store, self._targets.rows(int(name.slot))
        schema = parts.read_schema(store, entry)
        banned = self._targets.contains if neighbour_tables.is_within(store, entry, schema.metadata) else None

        def groups() -> Iterator[pa.Table]:
            for group, mine in row_groups(entry, rows):
                saved, text = neighbour_tables.read_table(store, entry, [group]), None
                table = neighbour_tables.erase_neighbours(saved, mine, banned)
                if neighbour_tables.text_size(entry):
                    text = neighbour_tables.erase_text(neighbour_tables.read_text(store, entry, [group]), mine, banned)
                yield neighbour_tables.to_arrow(table, text, schema)

        return parts.write_batches(store, name, schema, groups(), row_group=ROW_GROUP, about=entry.about)

    def _excerpts(self, entry: FileEntry, name: FileName) -> FileEntry:
        table = parts.read_parquet(self._store, entry)
        place = table.schema.get_field_index("excerpt")
        table = table.set_column(place, table.schema.field(place), pa.nulls(table.num_rows, pa.string()))
        return parts.write_parquet(self._store, name, table)


def erase_documents(
    documents: pa.Table, doc: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], identity: Identity
) -> pa.Table:
    """Return documents with the token counts that remain, and nulls for those without tokens.

    Partially erased documents have their text hash cleared. If the hash was also the id, the new id is a
    keyed hash of it: deterministic, and only the store can compute it.
    """
    left = np.bincount(doc, weights=n_tokens, minlength=documents.num_rows).astype(np.int64)
    whole = documents["n_tokens"].to_numpy() == left
    renamed = pa.array(~whole & (left > 0) & parts.named_by_text(documents))
    ids = [identity.keyed_hash(f"erased:{name}") for name in documents["id"].filter(renamed).to_pylist()]
    names = {"id": ids, "key": [id_hash(name) for name in ids]} if ids else {}
    columns = {name: documents[name] for name in documents.column_names} | {"n_tokens": pa.array(left)}
    for name, some in names.items():
        old = columns[name]
        columns[name] = pc.replace_with_mask(old.combine_chunks(), renamed, pa.array(some, old.type))
    for name in columns.keys() - {"first_row", "n_chunks", "n_tokens"}:
        # The hash of the whole text would still identify it.
        kept = pa.array(whole if name == "text_hash" else left > 0)
        columns[name] = pc.if_else(kept, columns[name], pa.scalar(None, columns[name].type))
    return pa.table(columns, schema=documents.schema)


ELSEWHERE = (
    "ids of what was erased, distances to it, and its text if materialised, "
    "where other stores have neighbours in this one"
)
_ROWS_A_WORKER = 1 << 16  # rows that a worker must have to be worth its start-up time
_TIMES_A_PART = 3
"""Memory of a process: fixed bytes, and a multiple of the tokens and vectors of a part."""
_Planned = TypeVar("_Planned", bound="EraseResult")


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseResult:
    """What an erase of ``purges`` did or would do.

    * ``unerased``: chunks to erase, copies included. ``unerased_share``: their share of all chunks the store
      ever had.
    * ``erased``: chunks that have been erased, copies included.
    * ``copies``: documents that ``chunk`` rejected as repeats of an erased one.
    * ``not_reached``: what an erase never reaches. ``dependents``: stores with neighbours in this one, also
      unreached. ``bucket``: what the bucket still has of files that the store deleted, now or before.
    """

    purges: tuple[str, ...] = ()
    unerased: int
    unerased_share: float
    erased: int = 0
    copies: int
    files_rewritten: int = 0
    commit: int
    not_reached: tuple[str, ...] = ()
    dependents: tuple[Dependent, ...] = ()
    bucket: tuple[BucketCopies, ...] = ()


def erase(
    root: str | Path,
    purges: Sequence[str] = (),
    *,
    older_than: float | None = None,
    dry_run: bool = False,
    confirm: Callable[[EraseResult], bool] = lambda _: True,
) -> EraseResult:
    """Erase the chunks of these purges, and of all that are more than ``older_than`` seconds old.

    An interrupted erase is resumed; erasing a purge again is not an error. ``confirm`` is called before
    anything is rewritten; if it returns False, or with ``dry_run``, nothing is changed. ``UsageError`` for an
    unknown purge.
    """
    store = Store.open(root)
    given = [purges] if isinstance(purges, str) else purges
    purges = [purged_chunks.find_purge(store, purge)[0] for purge in given]

    def attempt() -> EraseResult:
        # A purge may have been undone since the last attempt.
        wanted = tuple(_wanted(store, purges, older_than))
        left = [purge for purge in wanted if not store.state.records[PREFIX + purge]["erased"]]
        copies, copied = purged_chunks.find_copies(store, named_chunks(store, left))
        targets = np.union1d(named_chunks(store, wanted), copies)
        n = len(purged_chunks.unerased(store, targets))
        planned = EraseResult(
            purges=wanted, unerased=n, unerased_share=n / max(purged_chunks.count_rows(store), 1), copies=copied,
            commit=store.state.number,
        )  # fmt: skip
        if dry_run or (n and not confirm(planned)):
            return planned
        with folding.writing(store) as run:
            _name_copies(store, run, left, copies)
            return carry_out_erase(store, run, targets, planned)

    return retry_overtaken(attempt, store.renew)


def _wanted(store: Store, purges: Sequence[str], older_than: float | None) -> list[str]:
    wanted = [purged_chunks.find_purge(store, purge)[0] for purge in purges]
    if older_than is not None:
        before = datetime.fromtimestamp(max(time.time() - older_than, 0.0), UTC).isoformat(timespec="milliseconds")
        waiting = {p: record["commit"] for p, record in standing_purges(store.state).items() if not record["erased"]}
        times = {purge: log.read(store.storage, int(number)) for purge, number in waiting.items()}
        wanted += [purge for purge, commit in times.items() if commit is not None and commit.time < before]
    return list(dict.fromkeys(wanted))


def _name_copies(store: Store, run: Run, purges: Sequence[str], copies: Ids) -> None:
    """Add ``copies`` to the tombstones of each purge that erases them and does not name them yet.

    Copies can't be found once their originals are erased, so an erase that was killed could not be resumed
    otherwise. Cost: ``find_copies`` for each purge, if there are copies.
    """
    tombstones.check_not_undone(store.state, purges)
    changed: dict[str, tuple[FileEntry, str]] = {}
    for purge in purges:
        named = read_tombstones(store, purge).ids
        own = copies
        if len(purges) > 1 and len(np.setdiff1d(copies, named)):
            own = purged_chunks.find_copies(store, named)[0]
        if len(new := np.setdiff1d(own, named)):
            changed[purge] = tombstones.add_tombstones(store, run.id, purge, new)
    add, remove = [entry for entry, _ in changed.values()], [before for _, before in changed.values()]

    def build(state: State) -> Draft | None:
        tombstones.check_not_undone(state, purges)
        if any(state.records[PREFIX + purge]["erased"] for purge in changed):
            raise ConflictError("the purge is erased by another process, too", "Run the same command again.")
        return Draft("erase", {"purges": []}, add=tuple(add), remove=tuple(remove)) if changed else None

    with purged_chunks.withdrawn(store, add):
        store.commit(run, build)


def carry_out_erase(store: Store, run: Run, chunks: Ids, planned: _Planned) -> _Planned:
    """Erase ``chunks``, tombstones of the purges of ``planned``; return ``planned`` with what was done."""
    done = retry_overtaken(lambda: erase_chunks(store, run, chunks, planned.purges), store.renew)
    # Staged tasks of other runs that read the old files can't be committed any more: remove their files.
    folding.fold(store, run)
    clean(store, run, thorough=True)
    bucket = bucket_copies(store.storage.uri, delete=True)
    state = store.refresh()
    return replace(
        planned, erased=len(chunks), files_rewritten=done, commit=state.number,
        not_reached=(ELSEWHERE,) if len(chunks) and state.names("index") else (),
        dependents=tuple(dependents(store)) if purges_erased(store) else (), bucket=bucket,
    )  # fmt: skip


def erase_chunks(store: Store, run: Run, chunks: Ids, purges: Sequence[str]) -> int:
    """Erase ``chunks``, which are tombstones of ``purges``; return the number of files rewritten.

    ``ConflictError`` if one of the purges was undone, or got more chunks, before the erase was done.
    """
    targets = Tombstones(chunks)
    stage = EraseStage(targets, tuple(purges), _worker_bytes(store, targets))
    rows = sum(parts.part_entry(store, "chunks", part).rows for part in targets.parts())
    room = memory_of_machine() // 2 // stage.worker_bytes
    workers = max(1, min(cores(), len(targets.parts()), room, rows // _ROWS_A_WORKER))
    engine.execute(stage, store, run, workers=workers)
    for table in store.refresh().names("edits"):
        edits, named = neighbour_tables.edits_naming(store, table, targets.contains)
        if named.any():
            neighbour_tables.commit_edits(store, run, table, edits[~named])

    def build(state: State) -> Draft | None:
        done = purged_chunks.erased_purges(store, targets)
        if any(not state.records[PREFIX + p]["erased"] and p not in done for p in purges):
            raise ConflictError("a purge has more chunks than when its erase began", "Run the same command again.")
        records = {f"purge:{p}": {**state.records[f"purge:{p}"], "erased": True} for p in done}
        if not done:
            return None
        # Selector files of purges that share targets may quote their text.
        alike = [p for p in standing_purges(state) if purged_chunks.has_any(store, p, targets)]
        gone = [state.file("selectors", p) for p in {*done, *alike}]
        # Recall files name the sources of documents.
        gone += [state.file("index", RECALL, name) for name in state.names("index")]
        # Scan files hold places in the text of targets, and hashes of what was searched for.
        gone += [entry for name in state.names(scan.KIND) for entry in state.group(scan.KIND, name).entries()]
        # Files of an unfinished search hold vectors of targets.
        gone += [entry for name in state.names(ROUTES) for entry in state.group(ROUTES, name).entries()]
        paths = tuple(entry.path for entry in gone if entry is not None)
        return Draft("erase", {"purges": done}, remove=paths, records=records)

    store.commit(run, build)
    return len({path for paths, holds in stage.holding.items() if holds for path in paths})


def _worker_bytes(store: Store, targets: Tombstones) -> int:
    """Return the memory that a worker needs for the largest part."""
    tokens = store.identity.chunk_length * store.identity.tokenizer.token_bytes
    several = ([entry for entry in part_files(store, part) if entry.kind != "documents"] for part in targets.parts())
    sizes = (sum(one.bytes if one.kind == "embeddings" else one.rows * tokens for one in files) for files in several)
    return WORKER_BYTES + _TIMES_A_PART * max(sizes, default=0)
