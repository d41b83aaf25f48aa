"""Chunk documents: read, tokenise and cut a unit, and write its parts.

A task is a unit of a committed plan. One thread reads and hashes rows, one tokenises batches, for most of the
time outside Python's lock, one collects the columns of parts, and this one writes them as Parquet.
Unreadable rows go to quarantine; documents on the block list are left out. Duplicates are found when the plan
is finished (``deduplicate``). Memory: a few batches, the documents' columns of a part, and the longest
document.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import shlex
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool import sources
from retrotool.chunk import chunk_plan, chunker
from retrotool.chunk.chunk_plan import HASHES, ChunkPlan, InputPiece
from retrotool.chunk.chunker import HashPair, Tokens
from retrotool.chunk.quarantine import Quarantine
from retrotool.engine.engines import is_a_job
from retrotool.engine.task import Report, Task, task_key
from retrotool.errors import ErasedError, TaskError
from retrotool.ranges import is_in
from retrotool.read_ahead import ahead
from retrotool.sources import Document, InputFile, Rejected
from retrotool.sources.heads import NO_FIELDS
from retrotool.sources.inputs import is_spooled
from retrotool.sources.lines import LineCounter
from retrotool.sources.records import content_hash
from retrotool.store import leases, parts
from retrotool.store.blocked import Blocked, read_blocked
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.staging import PLAN_COUNTS, Staged, Unit
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import FastTokenizer, stored_tokenizer

_BATCH_CHARACTERS = 2 << 20
_BATCH_DOCUMENTS = 8192
_AHEAD = 1  # batches that wait, while another one is read and one is tokenised
_TABLES_AHEAD = 2  # that wait while one is written
_FLUSH_ROWS = 8 * parts.ROW_GROUP
COLUMN_BYTES = 128 << 20  # of documents' columns, at which a part ends early
_EXCERPT = 200
_LEAST_SHARE = {"parquet": 64, "arrow": 64}  # bytes of input per byte that is surely written: few columns may be text
Row = Document | Rejected
Batch = tuple[str, Tokens]  # with the input's name
Files = tuple[tuple[FileEntry, ...], ...]  # (documents, chunks) of each part

GIVEN_UP = "given up"  # start of the reason for an input that was not read and may be added later


@dataclass(frozen=True, slots=True)
class ChunkStage:
    """The units of all unfinished plans, except standard input of other runs that are live."""

    exclude: tuple[str, ...] = ()  # patterns of inputs to leave out, although they were planned
    changed: frozenset[str] = frozenset()  # paths whose change is rejected, as they are read again
    check: float = 0.001  # share of documents whose tokens are compared with ``tokenizers``
    run: str = ""
    name: str = "chunk"
    unit: str = "B"
    worker_cores: int = 1

    def plan(self, store: Store) -> list[Task]:
        """Return a task for each unit that is neither committed nor another run's, in order."""
        return [task for task, holder in self._units(store) if not holder]

    def held(self, store: Store) -> dict[str, str]:
        """Return the units whose standard input another live run has, and that run."""
        return {task.label: holder for task, holder in self._units(store) if holder}

    def size_of(self, store: Store, task: Task) -> int:  # noqa: ARG002
        """Return a small share of the input: tokens take about half of a text, and are compressed."""
        return task.weight // _LEAST_SHARE.get(task.inputs["format"], 16)

    def _units(self, store: Store) -> list[tuple[Task, str]]:
        tasks = []
        for plan_id, entry, plan in chunk_plan.open_plans(store):
            is_elsewhere = plan.owner not in ("", self.run) and plan.owner in leases.others(store.storage, self.run)
            for index in range(store.state.records[f"plan:{plan_id}"]["done"], len(plan.units)):
                unit = plan.units[index]
                files = [plan.files[piece.file] for piece in unit]
                holder = plan.owner if is_elsewhere and any(map(is_spooled, files)) else ""
                key = task_key("chunk", {"unit": index}, [entry.path])
                inputs = {"plan": plan_id, "unit": index, "path": entry.path, "format": files[0].base}
                weight = sum(piece.weight for piece in unit)
                label = f"unit {index} ({files[0].path})"
                tasks.append((Task(key, label, weight, inputs, claimed=is_a_job()), holder))
        return tasks

    def open(self, store: Store) -> ChunkWorker:
        """Load the store's tokenizer."""
        return ChunkWorker(store, self)

    def give_up(self, store: Store, task: Task, run: str, error: BaseException) -> Staged:
        """Stage an empty unit and reject its inputs, so that an unreadable unit does not block the next."""
        plan = _read_plan(store, task.inputs["plan"], task.inputs["path"])
        what = "its worker was killed each time" if isinstance(error, BrokenExecutor) else type(error).__name__
        detail = sources.reason_of(error)[:_EXCERPT]
        bad = Quarantine()
        for piece in plan.units[task.inputs["unit"]]:
            bad.open(plan.files[piece.file].path)
            bad.append(Rejected(0, f"{GIVEN_UP}: reading it failed: {what}: {detail}", damage=True))
        return _staged(store, task, run, bad, dict.fromkeys(PLAN_COUNTS, 0), None, ())


def _read_plan(store: Store, plan_id: str, path: str) -> ChunkPlan:
    entry = store.refresh().file("plans", plan_id)
    if entry is None or entry.path != path:
        raise ErasedError(f"plan {plan_id} was finished or changed by another process")
    return chunk_plan.read_plan(store, entry)


def _slot(task: Task) -> str:
    return f"{task.inputs['plan']}.{task.inputs['unit']:06d}"


def _staged(
    store: Store, task: Task, run: str, bad: Quarantine, counts: dict[str, int], blocked: Blocked | None, files: Files,
    seen: FileEntry | None = None,
) -> Staged:  # fmt: skip
    plan_id, index = task.inputs["plan"], task.inputs["unit"]
    quarantine = bad.write(store, FileName.new(run, "quarantine", _slot(task), "parquet"))
    counts = {**counts, "rejected": len(bad), "damaged": bad.damaged}
    unit = Unit(plan_id, index, files, quarantine, counts, None if blocked is None else blocked.slots, seen)
    return Staged("chunk", reads=(task.inputs["path"],), unit=unit, task=task.key, run=run)


class ChunkWorker:
    """Chunks units; keeps the last plan and the tokenizer."""

    def __init__(self, store: Store, stage: ChunkStage) -> None:
        self._store, self._stage = store, stage
        self._exact = stored_tokenizer(store)
        self._encoder = functools.lru_cache(1)(self._load_encoder)
        self._plan = functools.lru_cache(1)(functools.partial(_read_plan, store))
        self._lines = LineCounter()

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Read, tokenise and write one unit; return None if it is committed already."""
        record = self._store.refresh().records.get(f"plan:{task.inputs['plan']}")
        if record is None or task.inputs["unit"] < record["done"]:
            return None
        plan = self._plan(task.inputs["plan"], task.inputs["path"])
        writer = PartWriter(self._store, run, plan.fields.keep, plan.part_size)
        blocked = None
        if not plan.allow_purged:  # as of the refresh: documents may have been purged since the last unit
            blocked = read_blocked(self._store)
        unit = _Unit(self._store, plan, self._encoder(plan.fast), blocked or None, report, self._lines)
        files = writer.write(unit.batches(plan.units[task.inputs["unit"]], self._stage))
        unit.count_tokenised(writer.counts["documents"])
        seen = unit.write_seen(run, _slot(task))
        return _staged(self._store, task, run, unit.bad, {**writer.counts, **unit.counts}, blocked, files, seen)

    def _load_encoder(self, fast: bool) -> FastTokenizer:
        known = chunk_plan.known_findings(self._store.state)
        return FastTokenizer(self._exact, check=self._stage.check, use_tokie=fast, findings=known)


class _Unit:
    def __init__(
        self, store: Store, plan: ChunkPlan, encoder: FastTokenizer, blocked: Blocked | None, report: Report,
        lines: LineCounter,
    ) -> None:  # fmt: skip
        self._store, self._plan, self._encoder, self._blocked, self._report = store, plan, encoder, blocked, report
        self._lines = lines
        self.bad = Quarantine()
        self._seen: list[tuple[int, bytes]] = []  # the number of an input to mirror, and the keys of a batch
        self._known_documents = functools.lru_cache(1)(self._read_known_documents)
        self.counts = dict.fromkeys(("blocked", "known_documents", "keys_cut", "hashed_ids"), 0)
        self.counts |= {"compared": -self._encoder.compared, "exact": -self._encoder.judged}

    def batches(self, pieces: Sequence[InputPiece], stage: ChunkStage) -> Generator[Batch]:
        """Yield the documents to write; report how much was read."""
        return ahead(self._read_and_tokenise(pieces, stage), _AHEAD)

    def _read_and_tokenise(self, pieces: Sequence[InputPiece], stage: ChunkStage) -> Generator[Batch]:
        for piece in pieces:
            file, weight = self._plan.files[piece.file], piece.weight
            self.bad.open(file.path, functools.partial(self._lines.before, file, piece.where, self._plan.fields))
            known = self._known_documents(piece.file)
            is_mirrored = self._plan.existing == "mirror" and piece.file in self._plan.read_before
            done = characters = 0
            with contextlib.closing(ahead(_batches(_rows(self._plan, piece, stage)), _AHEAD)) as batches:
                for documents, hashes, rejected in batches:
                    for row in rejected:
                        self.bad.append(row)
                    if is_mirrored:
                        self._seen.append((piece.file, b"".join(key for key, _ in hashes)))
                    if (found := self._tokenised(file, documents, hashes, known)) is not None:
                        yield file.name, found
                    characters += sum(len(document.text) for document in documents)
                    # Progress in a compressed file is an estimate.
                    read = min(weight, int(characters / chunk_plan.EXPANSION.get(file.compression or file.base, 1.0)))
                    self._report(max(0, read - done))
                    done = max(done, read)
            self._report(weight - done)

    def _read_known_documents(self, file: int) -> npt.NDArray[Any]:
        plans = self._plan.read_before.get(file, ())
        if not plans:
            return np.zeros(0, HASHES)
        return chunk_plan.known_documents(self._store, self._plan.files[file].name, plans, self._not_known)

    @functools.cached_property
    def _not_known(self) -> Tombstones:
        """What was purged may come back; so may a duplicate, if its original is replaced."""
        replaces = self._plan.existing in ("replace", "mirror")
        return read_tombstones(self._store) if replaces else chunk_plan.chunks_of_purges(self._store)

    def write_seen(self, run: str, slot: str) -> FileEntry | None:
        """Write the ids that were read of inputs to mirror; None if there are none."""
        if not self._seen:
            return None
        lengths = [len(keys) // parts.HASH_BYTES for _, keys in self._seen]
        numbers = np.repeat(np.array([number for number, _ in self._seen], np.int32), lengths)
        keys = np.frombuffer(b"".join(keys for _, keys in self._seen), np.uint8).reshape(-1, parts.HASH_BYTES)
        table = pa.table([pa.array(numbers), parts.fixed_binary(keys)], schema=parts.SEEN_SCHEMA)
        return parts.write_parquet(self._store, FileName.new(run, "seen", slot, "parquet"), table)

    def _tokenised(
        self, file: InputFile, batch: list[Document], hashes: list[HashPair], known: npt.NDArray[Any]
    ) -> Tokens | None:
        """Return the documents of a batch that are to be added, if any, with tokens and hashes."""
        if len(known) and batch:
            pairs = np.frombuffer(b"".join(itertools.chain.from_iterable(hashes)), HASHES)
            batch, hashes = self._leave_out("known_documents", is_in(pairs, known), batch, hashes)
        if self._blocked is not None and batch:
            held = self._blocked.holds([d.id for d in batch], [text for _, text in hashes])
            batch, hashes = self._leave_out("blocked", held, batch, hashes)
        if not batch:
            return None
        own = self._store.identity
        found = chunker.tokenise(
            batch, self._encoder, own.tokenizer.vocabulary, own.chunk_length, self.bad.append, hashes
        )
        if self._blocked is not None and found.documents:
            # A different text can have the same tokens.
            held = self._blocked.contains(found.hashed(own.secret, parts.token_dtype(own.tokenizer.token_bytes)))
            self.counts["blocked"] += int(held.sum())
            found = found.without(held)
        self.counts["keys_cut"] += int(found.cut.sum())
        if file.base not in NO_FIELDS:
            contents = [content.hex() for _, content in found.hashes]
            self.counts["hashed_ids"] += sum(map(str.__eq__, contents, (one.id for one in found.documents)))
        return found if found.documents else None

    def _leave_out(
        self, count: str, held: parts.Bools, batch: list[Document], hashes: list[HashPair]
    ) -> tuple[list[Document], list[HashPair]]:
        self.counts[count] += int(held.sum())
        return list(itertools.compress(batch, ~held)), list(itertools.compress(hashes, ~held))

    def count_tokenised(self, documents: int) -> None:
        encoder = self._encoder
        encoder.keep_states()
        self.counts["compared"] += encoder.compared
        self.counts["exact"] += encoder.judged
        if encoder.engine == "tokenizers":
            self.counts["exact"] = documents


def _rows(plan: ChunkPlan, piece: InputPiece, stage: ChunkStage) -> Iterator[Row]:
    """Yield the rows of a piece; what can't be read is one rejected row."""
    file = plan.files[piece.file]
    if is_spooled(file) and plan.owner != stage.run:
        yield Rejected(0, f"{GIVEN_UP}: standard input can't be read twice: pipe it again")
        return
    given_up = sources.is_excluded(Path(file.path), stage.exclude)
    try:
        problem = file.change()
        given_up |= bool(problem) and file.path in stage.changed
    except OSError as error:
        problem = error.strerror or str(error)
    if given_up:
        yield Rejected(0, f"{GIVEN_UP}: {problem or 'excluded'}")
        return
    if not problem:
        yield from sources.read_input(file, plan.fields, piece.where)
        problem = file.change()  # it may have been cut short, or several requests may have read two versions
    if problem:
        leave = f"--exclude {shlex.quote(glob.escape(file.path))}"
        advice = f"Restore it and run the same command again, or leave it out with {leave}."
        raise TaskError(f"{file.path}: {problem}", advice)


def _characters(document: Document) -> int:
    """Estimate a document's size in memory, in characters or tokens."""
    size = len(document.text) + len(document.id) + len(document.value or "")
    size += sum(len(kept) for kept in document.kept if kept is not None)
    return size if document.tokens is None else size + len(document.tokens)


def _batches(rows: Iterator[Row]) -> Generator[tuple[list[Document], list[HashPair], list[Rejected]]]:
    """Yield batches of about two million characters: documents, their hashes, and rows rejected since then.

    Damage comes separately, after what came before it.
    """
    batch: list[Document] = []
    rejected: list[Rejected] = []
    size = 0
    for row in itertools.chain(rows, [None]):
        if isinstance(row, Document):
            batch.append(row)
            size += _characters(row)
        elif row is not None and not row.damage:
            rejected.append(row)
        ends = row is None or (isinstance(row, Rejected) and row.damage)
        full = size >= _BATCH_CHARACTERS or max(len(batch), len(rejected)) >= _BATCH_DOCUMENTS
        if full or (ends and (batch or rejected)):
            yield batch, list(map(_hashes, batch)), rejected
            batch, rejected, size = [], [], 0
        if isinstance(row, Rejected) and row.damage:
            yield [], [], [row]


def _hashes(document: Document) -> HashPair:
    return chunker.id_hash(document.id), content_hash(document.text, document.value, document.tokens)


class PartWriter:
    """Writes the documents of a unit; ends a part at the first document end after ``part_size`` chunks.

    A part's chunks file is written a few row groups at a time. The documents' columns are held as Arrow
    arrays (about 150 bytes per document, plus ``--keep``) until the part ends, at ``COLUMN_BYTES`` at the
    latest. Plain documents and key-value records never share a part: their chunks files differ in columns.
    """

    def __init__(self, store: Store, run: str, keep: Sequence[str], part_size: int) -> None:
        self._store, self._run, self._part_size = store, run, part_size
        self._schema = parts.documents_schema(keep)
        self._dtype = parts.token_dtype(store.identity.tokenizer.token_bytes)
        self._begin_part()
        self.counts = {"documents": 0, "chunks": 0, "tokens": 0}

    def _begin_part(self) -> None:
        self._columns: list[pa.RecordBatch] = []
        self._documents = self._column_bytes = 0
        self._chunks: list[tuple[npt.NDArray[Any], ...]] = []  # doc, index, n_tokens, tokens, and key of records
        self._rows = self._flushed = 0

    def write(self, batches: Generator[Batch]) -> Files:
        """Write all batches; return the entries of all parts."""
        written: list[tuple[FileEntry, ...]] = []
        with contextlib.closing(ahead(self._tables(batches), _TABLES_AHEAD)) as tables:
            for first in tables:
                documents: list[pa.Table] = []
                name = FileName.new(self._run, "chunks", "", "parquet")  # parts are numbered at the commit
                of_part = self._of_part(first, tables, documents)
                chunks = parts.write_batches(self._store, name, first.schema, of_part, row_group=parts.ROW_GROUP)
                name = FileName.new(self._run, "documents", "", "parquet")
                written.append((parts.write_parquet(self._store, name, *documents), chunks))
        return tuple(written)

    def _of_part(self, first: pa.Table, tables: Iterator[pa.Table], documents: list[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables of chunks of a part; add that of its documents, which ends it, to the list."""
        yield first
        for table in tables:
            if "first_row" in table.schema.names:
                documents.append(table)
                return
            yield table

    def _tables(self, batches: Generator[Batch]) -> Generator[pa.Table]:
        """Yield the tables of chunks of each part, and after them the table of its documents."""
        pieces = 1
        with contextlib.closing(batches):
            for name, batch in batches:
                if batch.pieces != pieces and self._rows:
                    yield from self._end_part()
                pieces = batch.pieces
                yield from self._add(name, batch)
        if self._rows:
            yield from self._end_part()

    def _add(self, name: str, batch: Tokens) -> Iterator[pa.Table]:
        cut = chunker.cut_chunks(batch.ids, batch.lengths, self._store.identity.chunk_length, self._dtype, batch.pieces)
        ends = np.cumsum(cut.n_chunks)
        n_tokens = batch.lengths.reshape(-1, batch.pieces).sum(axis=1)
        start = 0
        while start < len(batch.documents):
            before = int(ends[start - 1]) if start else 0
            room = before + self._part_size - self._rows
            stop = min(int(np.searchsorted(ends, room)) + 1, len(batch.documents))
            rows = slice(before, int(ends[stop - 1]))
            some = slice(start, stop)
            first_row = self._rows + ends[some] - cut.n_chunks[some] - before
            documents = batch.documents[some]
            values = [
                [document.id for document in documents],
                [key for key, _ in batch.hashes[some]],
                [text for _, text in batch.hashes[some]],
                [document.source for document in documents],
                first_row,
                cut.n_chunks[some],
                n_tokens[some],
                [name] * len(documents),
                [document.position for document in documents],
                *zip(*(document.kept for document in documents), strict=True),
            ]
            arrays = [pa.array(value, field.type) for value, field in zip(values, self._schema, strict=True)]
            self._columns.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._column_bytes += self._columns[-1].nbytes
            doc = cut.doc[rows] - start + self._documents
            columns = (doc, cut.index[rows], cut.n_tokens[rows], cut.tokens[rows])
            self._chunks.append(columns if cut.key is None else (*columns, cut.key[rows]))
            self._rows += len(doc)
            self._documents += stop - start
            self.counts["documents"] += stop - start
            self.counts["chunks"] += len(doc)
            self.counts["tokens"] += int(n_tokens[some].sum())
            if self._rows - self._flushed >= _FLUSH_ROWS:
                yield self._flush((self._rows - self._flushed) // parts.ROW_GROUP * parts.ROW_GROUP)
            if self._rows >= self._part_size or self._column_bytes >= COLUMN_BYTES:
                yield from self._end_part()
            start = stop

    def _flush(self, rows: int) -> pa.Table:
        columns = [np.concatenate(column) for column in zip(*self._chunks, strict=True)]
        # Copied: a view would keep the whole array.
        self._chunks = [tuple(column[rows:].copy() for column in columns)]
        self._flushed += rows
        return parts.chunks_table(*(column[:rows] for column in columns), first=self._flushed - rows)

    def _end_part(self) -> Iterator[pa.Table]:
        if self._rows > self._flushed:
            yield self._flush(self._rows - self._flushed)
        yield pa.Table.from_batches(self._columns, self._schema).combine_chunks()
        self._begin_part()
