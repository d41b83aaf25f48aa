"""``chunk``: documents to chunks of ``chunk_length`` tokens, in Parquet.

A task is a unit of a committed plan: it reads its pieces, tokenises in batches of a megabyte, cuts every document
into chunks (the last one zero-padded) and closes a part at the first document end after ``part_size`` chunks.
Memory: one part (128 bytes a chunk and its documents' columns) and one batch. Rows that can't be read go to
quarantine. Ids that occur twice are found when the plan is finished, see ``duplicates``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool import sources
from retrotool.errors import ErasedError, TaskError
from retrotool.sources import Document, SetAside
from retrotool.sources.lines import lines_before
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.chunk_plan import Plan, read_plan, unfinished_plans
from retrotool.stages.quarantine import Quarantine
from retrotool.store import parts, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged, Unit
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
GIVEN_UP = "given up"
"""How the reason begins for an input that is not in the store and may be added later."""


@dataclass(frozen=True, slots=True)
class ChunkStage:
    """The units of all unfinished plans.

    ``skip_missing``: set aside inputs that are gone, or changed, since they were planned; else that is an error.
    """

    skip_missing: bool = False
    name: str = "chunk"
    unit: str = "B"

    def plan(self, store: Store) -> list[Task]:
        """One task a unit that is neither committed nor staged, in the order of the plans."""
        tasks = []
        for plan_id in unfinished_plans(store.state):
            entry = store.state.file("plans", plan_id)
            if entry is None:
                continue
            try:
                plan = read_plan(store, entry)
            except ErasedError:
                continue  # another process has just finished it
            for index in range(store.state.records[f"plan:{plan_id}"]["done"], len(plan.units)):
                key = task_key("chunk", {"unit": index}, [entry.path])
                if not staging.is_staged(store.root, key):
                    first = plan.files[plan.units[index][0].file].path
                    inputs = {"plan": plan_id, "unit": index, "path": entry.path}
                    tasks.append(Task(key, f"unit {index} ({first})", plan.weight(index), inputs))
        return tasks

    def open(self, store: Store) -> ChunkWorker:
        """Load the store's tokenizer."""
        name = store.identity.tokenizer.name
        return ChunkWorker(store, Tokenizer(TokenizerFile(name, store.tokenizer_json())), self.skip_missing)


class ChunkWorker:
    """Chunks units; keeps the last plan it read."""

    def __init__(self, store: Store, tokenizer: Tokenizer, skip_missing: bool) -> None:
        self._store = store
        self._skip_missing = skip_missing
        self._tokenizer = tokenizer
        self._plan: tuple[str, Plan] | None = None

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Read, tokenise and write one unit."""
        path, index = str(task.inputs["path"]), int(task.inputs["unit"])
        plan = self._read_plan(str(task.inputs["plan"]), path)
        writer = _UnitWriter(self._store, run, task.key, plan)
        bad = Quarantine()
        for piece in plan.units[index]:
            file = plan.files[piece.file]
            bad.open(file.path)
            rows = _rows(plan, piece.file, piece.start, piece.end, bad, self._skip_missing)
            for batch in _batches(rows):
                writer.add(file.name, batch, self._tokenizer.encode_batch([d.text for d in batch]), bad)
            if piece.start and bad.needs_lines():
                bad.shift_lines(lines_before(Path(file.path), piece.start))
            report((file.size if piece.end is None else piece.end) - piece.start)
        writer.close_part()
        name = FileName.new(run, "staging", f"{task.key}.quarantine", "parquet")
        entry = bad.write(self._store.root, name)
        counts = {**writer.counts, "set_aside": len(bad)}
        unit = Unit(str(task.inputs["plan"]), index, tuple(writer.parts), entry, counts)
        return Staged(task.key, "chunk", run, reads=(path,), unit=unit)

    def _read_plan(self, plan_id: str, path: str) -> Plan:
        if self._plan is None or self._plan[0] != path:
            entry = self._store.state.file("plans", plan_id)
            if entry is None:
                entry = self._store.refresh().file("plans", plan_id)
            if entry is None:
                raise ErasedError(f"plan {plan_id} was finished by another process")
            self._plan = (path, read_plan(self._store, entry))
        return self._plan[1]


def _rows(
    plan: Plan, number: int, start: int, end: int | None, bad: Quarantine, skip_missing: bool
) -> Iterator[Document]:
    """Documents of a piece; what is set aside goes to ``bad``."""
    file = plan.files[number]
    try:
        size = Path(file.path).stat().st_size
        problem = "" if size == file.size else f"it had {file.size:,} bytes when it was planned, now {size:,}"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem and skip_missing:
        bad.append(SetAside(0, f"{GIVEN_UP}: {problem}"))
        return
    if problem:
        raise TaskError(
            f"{file.path}: {problem}",
            "Bring it back as it was and run the same command again, or give it up with --skip-missing.",
        )
    for row in sources.read(file, plan.fields, start, end):
        if isinstance(row, SetAside):
            bad.append(row)
        else:
            yield row


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches of about a million characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut_chunks(
    tokens: Sequence[Sequence[int]], chunk_length: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Cut documents into chunks, without a loop over tokens.

    Args:
        tokens: the token ids of d documents.
        chunk_length: tokens a chunk.
        dtype: of the tokens in the result.

    Returns:
        Chunks of each document, int64 [d]; then for all n chunks in order their index in the document, int64 [n], their
        number of tokens, int64 [n], and their tokens [n, chunk_length], zero-padded.

    """
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    n_chunks = -(-lengths // chunk_length)
    first = np.cumsum(n_chunks) - n_chunks
    n = int(n_chunks.sum())
    index = np.arange(n) - np.repeat(first, n_chunks)
    n_tokens = np.minimum(np.repeat(lengths, n_chunks) - index * chunk_length, chunk_length)
    flat = np.zeros(n * chunk_length, dtype)
    place = np.repeat(first * chunk_length - (np.cumsum(lengths) - lengths), lengths)
    values = [np.asarray(document, dtype) for document in tokens if len(document)]
    if values:
        flat[np.arange(len(place)) + place] = np.concatenate(values)
    return n_chunks, index, n_tokens, flat.reshape(n, chunk_length)


@dataclass
class _Part:
    """The part that is being filled."""

    documents: dict[str, list[Any]]
    chunks: list[tuple[Any, ...]] = field(default_factory=list)
    rows: int = 0


class _UnitWriter:
    """Gathers documents and chunks, and writes a part's three files whenever one is full."""

    def __init__(self, store: Store, run: str, task: str, plan: Plan) -> None:
        self._store, self._run, self._task, self._plan = store, run, task, plan
        self._schema = parts.documents_schema(plan.fields.keep)
        self._dtype = parts.token_dtype(store.identity.tokenizer.token_bytes)
        self._part = self._new_part()
        self.parts: list[tuple[FileEntry, ...]] = []
        self.counts = {"documents": 0, "chunks": 0, "tokens": 0}

    def _new_part(self) -> _Part:
        return _Part({name: [] for name in self._schema.names})

    def add(self, name: str, documents: list[Document], tokens: list[list[int]], bad: Quarantine) -> None:
        """Add documents of the input ``name`` with their tokens; those without a token go to ``bad``."""
        if not all(tokens):
            for document in (d for d, t in zip(documents, tokens, strict=True) if not t):
                bad.append(SetAside(document.line, "text without a token"))
            kept = [(d, t) for d, t in zip(documents, tokens, strict=True) if t]
            documents, tokens = [d for d, _ in kept], [t for _, t in kept]
        start = 0
        while start < len(documents):
            start += self._fill(name, documents[start:], tokens[start:])

    def _fill(self, name: str, documents: list[Document], tokens: list[list[int]]) -> int:
        """Take documents into the part until it is full; return how many."""
        n_chunks, index, n_tokens, values = cut_chunks(tokens, self._store.identity.chunk_length, self._dtype)
        ends = np.cumsum(n_chunks)
        # The part ends with the first document that reaches part_size.
        taken = int(np.searchsorted(ends, self._plan.part_size - self._part.rows)) + 1
        full = taken <= len(documents)
        taken = min(taken, len(documents))
        rows = int(ends[taken - 1])
        columns = self._part.documents
        doc = len(columns["id"]) + np.repeat(np.arange(taken), n_chunks[:taken])
        first = self._part.rows + ends[:taken] - n_chunks[:taken]
        for i, document in enumerate(documents[:taken]):
            columns["id"].append(document.id)
            columns["key"].append(_hash(document.id))
            columns["text_hash"].append(_hash(document.text))
            columns["source"].append(document.source)
            columns["position"].append(document.position)
            columns["n_tokens"].append(len(tokens[i]))
            for column, value in zip(self._plan.fields.keep, document.kept, strict=True):
                columns[column].append(value)
        columns["input"] += [name] * taken
        columns["first_row"] += first.tolist()
        columns["n_chunks"] += n_chunks[:taken].tolist()
        self._part.chunks.append((doc, index[:rows], n_tokens[:rows], values[:rows]))
        self._part.rows += rows
        self.counts["documents"] += taken
        self.counts["chunks"] += rows
        self.counts["tokens"] += int(n_tokens[:rows].sum())
        if full:
            self.close_part()
        return taken

    def close_part(self) -> None:
        """Write the part that is being filled, if there is anything in it."""
        if not self._part.rows:
            return
        documents = parts.columns_of(self._part.documents, self._schema)
        chunks = parts.chunks_table(*(np.concatenate(columns) for columns in zip(*self._part.chunks, strict=True)))
        self._part = self._new_part()
        tables = {"documents": documents, "keys": parts.keys_table(documents), "chunks": chunks}
        self.parts.append(tuple(self._write(kind, table) for kind, table in tables.items()))

    def _write(self, kind: str, table: pa.Table) -> FileEntry:
        name = FileName.new(self._run, "staging", f"{self._task}.{len(self.parts):04d}.{kind}", "parquet")
        return parts.write_parquet(self._store.root, name, table)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=parts.HASH_BYTES).digest()
