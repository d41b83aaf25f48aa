"""``chunk``: documents to chunks of ``chunk_length`` tokens, in Parquet.

A task is a unit of a committed plan: it reads its pieces, tokenises in batches, cuts every document into chunks (the
last one zero-padded) and closes a part at the first document end after ``part_size`` chunks. Reading and
decompressing go ahead in one thread, Parquet is written in another. Rows that can't be read go to quarantine, and
documents on the block list are left out. Documents that repeat are found when the plan is finished, see
``deduplicate``. Memory: a few batches, the documents' columns of a part, and the longest document.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrotool import sources
from retrotool.chunk import chunker
from retrotool.chunk.chunk_plan import (
    EXPANSION,
    ChunkPlan,
    InputPiece,
    KnownDocuments,
    chunks_of_purges,
    known_findings,
    open_plans,
    read_plan,
)
from retrotool.chunk.chunker import Tokens
from retrotool.chunk.part_writer import PartWriter
from retrotool.chunk.quarantine import Quarantine
from retrotool.engine.task import Report, Task, task_key
from retrotool.errors import ErasedError, TaskError
from retrotool.sources import Document, Rejected
from retrotool.sources.inputs import is_spooled
from retrotool.sources.lines import lines_before
from retrotool.sources.records import content_hash
from retrotool.store import leases, parts
from retrotool.store.blocked import Blocked, read_blocked
from retrotool.store.paths import FileName
from retrotool.store.staging import PLAN_COUNTS, Staged, Unit
from retrotool.store.store import Store
from retrotool.tokenizers import FastTokenizer, stored_tokenizer

_BATCH_CHARACTERS = 2 << 20
_BATCH_DOCUMENTS = 8192
_EXCERPT = 200
Row = Document | Rejected
Flags = npt.NDArray[np.bool_]

GIVEN_UP = "given up"
"""How the reason begins for an input that is not in the store and may be added later."""


@dataclass(frozen=True, slots=True)
class ChunkStage:
    """The units of all unfinished plans.

    ``skip_missing``: set aside inputs that are gone, or changed, since they were planned; ``changed``: paths of inputs
    of which only a change is set aside, as they are read again. Else that is an error. ``check``: the share of
    documents whose tokens are compared with those of ``tokenizers``. ``run``: the run that does it; standard input that
    another one has is left to it as long as it runs, and rejected when it does not.
    """

    skip_missing: bool = False
    changed: frozenset[str] = frozenset()
    check: float = 0.001
    run: str = ""
    name: str = "chunk"
    unit: str = "B"

    def plan(self, store: Store) -> list[Task]:
        """One task a unit that is neither committed nor another run's, in the order of the plans."""
        tasks = []
        for plan_id, entry, plan in open_plans(store):
            is_elsewhere = plan.owner not in ("", self.run) and plan.owner in leases.others(store.storage, self.run)
            for index in range(store.state.records[f"plan:{plan_id}"]["done"], len(plan.units)):
                if is_elsewhere and plan.is_stream(index):
                    continue
                key = task_key("chunk", {"unit": index}, [entry.path])
                first = plan.files[plan.units[index][0].file].path
                inputs = {"plan": plan_id, "unit": index, "path": entry.path}
                tasks.append(Task(key, f"unit {index} ({first})", plan.weight(index), inputs))
        return tasks

    def open(self, store: Store) -> ChunkWorker:
        """Load the store's tokenizer."""
        return ChunkWorker(store, self)

    def give_up(self, store: Store, task: Task, run: str, error: BaseException) -> Staged:
        """An empty unit, whose inputs are set aside: what can't be read must not keep what comes after it waiting."""
        plan_id, index, path = str(task.inputs["plan"]), int(task.inputs["unit"]), str(task.inputs["path"])
        plan = _plan_at(store, plan_id, path)
        what = "its worker was killed each time" if isinstance(error, BrokenExecutor) else type(error).__name__
        detail = sources.reason_of(error)[:_EXCERPT]
        bad = Quarantine()
        for piece in plan.units[index]:
            bad.open(plan.files[piece.file].path)
            bad.append(Rejected(0, f"{GIVEN_UP}: reading it failed: {what}: {detail}", damage=True))
        quarantine = bad.write(store, FileName.new(run, "quarantine", f"{plan_id}.{index:06d}", "parquet"))
        counts = {**dict.fromkeys(PLAN_COUNTS, 0), "set_aside": len(bad), "damaged": bad.damaged}
        return Staged(task.key, "chunk", run, reads=(path,), unit=Unit(plan_id, index, (), quarantine, counts))


def _plan_at(store: Store, plan_id: str, path: str) -> ChunkPlan:
    entry = store.refresh().file("plans", plan_id)
    if entry is None or entry.path != path:
        raise ErasedError(f"plan {plan_id} was finished or changed by another process")
    return read_plan(store, entry)


class ChunkWorker:
    """Chunks units; keeps the last plan it read, and the tokenizer."""

    def __init__(self, store: Store, stage: ChunkStage) -> None:
        self._store, self._stage = store, stage
        self._exact = stored_tokenizer(store)
        self._fast: tuple[bool, FastTokenizer] | None = None
        self._plan: tuple[str, ChunkPlan] | None = None

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Read, tokenise and write one unit."""
        path, index, plan_id = str(task.inputs["path"]), int(task.inputs["unit"]), str(task.inputs["plan"])
        if self._plan is None or self._plan[0] != path:
            self._plan = (path, _plan_at(self._store, plan_id, path))
        plan = self._plan[1]
        with PartWriter(self._store, run, plan.fields.keep, plan.part_size) as writer:
            blocked = self._block_list(plan)
            unit = _Unit(self._store, plan, self._encoder(plan), blocked or None, writer, report)
            for piece in plan.units[index]:
                unit.chunk(piece, self._stage)
            files = writer.close()
            unit.count_tokenised()
        name = FileName.new(run, "quarantine", f"{plan_id}.{index:06d}", "parquet")
        entry = unit.bad.write(self._store, name)
        slots = None if blocked is None else blocked.slots
        counts = {**writer.counts, **unit.counts, "set_aside": len(unit.bad), "damaged": unit.bad.damaged}
        return Staged(task.key, "chunk", run, reads=(path,), unit=Unit(plan_id, index, files, entry, counts, slots))

    def _encoder(self, plan: ChunkPlan) -> FastTokenizer:
        if self._fast is None or self._fast[0] != plan.fast:
            known = known_findings(self._store.state)
            fast = FastTokenizer(self._exact, check=self._stage.check, use_tokie=plan.fast, findings=known)
            self._fast = (plan.fast, fast)
        return self._fast[1]

    def _block_list(self, plan: ChunkPlan) -> Blocked | None:
        if plan.allow_purged:
            return None
        # Anew for every unit: what was purged while the one before was read must not come back.
        self._store.refresh()
        return read_blocked(self._store)


class _Unit:
    """The work on one unit: rows of its pieces to the writer, to quarantine, or nowhere if they are blocked."""

    def __init__(
        self,
        store: Store,
        plan: ChunkPlan,
        encoder: FastTokenizer,
        blocked: Blocked | None,
        writer: PartWriter,
        report: Report,
    ) -> None:
        self._store, self._plan, self._encoder, self._blocked = store, plan, encoder, blocked
        self._writer, self._report = writer, report
        self.bad = Quarantine()
        self._known: tuple[int, KnownDocuments | None] = (-1, None)
        self.counts = dict.fromkeys(("blocked", "known_documents", "keys_cut"), 0)
        self.counts |= {"compared": -encoder.compared, "exact": -encoder.judged}

    def chunk(self, piece: InputPiece, stage: ChunkStage) -> None:
        """Read a piece to its end."""
        file = self._plan.files[piece.file]
        weight = piece.weight
        self.bad.open(file.path, functools.partial(lines_before, file, piece.where, self._plan.fields))
        known = self._known_documents(piece.file)
        done = characters = 0
        for batch in _batches(_rows(self._plan, piece, self.bad, stage)):
            if isinstance(batch, Rejected):
                self.bad.append(batch)
                continue
            self._add(file.name, batch, known)
            characters += sum(len(document.text) for document in batch)
            # How far it has come in a compressed file can only be guessed.
            ahead = min(weight, int(characters / EXPANSION.get(file.compression or file.base, 1.0)))
            self._report(max(0, ahead - done))
            done = max(done, ahead)
        self._report(weight - done)

    def _known_documents(self, file: int) -> KnownDocuments | None:
        """Documents that the store has of a file that is read again."""
        plans = self._plan.read_before.get(file)
        if plans is None:
            return None
        if self._known[0] != file:
            without = chunks_of_purges(self._store) if self._plan.allow_purged else None
            self._known = (file, KnownDocuments(self._store, self._plan.files[file].name, plans, without))
        return self._known[1]

    def _add(self, name: str, batch: list[Document], known: KnownDocuments | None) -> None:
        hashes = [
            (chunker.id_hash(document.id), content_hash(document.text, document.value, document.tokens))
            for document in batch
        ]
        if known is not None:
            batch, hashes = self._leave_out("known_documents", known.hold(hashes), batch, hashes)
        if self._blocked is not None and batch:
            held = self._blocked.holds([d.id for d in batch], [text for _, text in hashes])
            batch, hashes = self._leave_out("blocked", held, batch, hashes)
        if not batch:
            return
        own = self._store.identity
        found = chunker.tokenise(batch, self._encoder, own.tokenizer.vocabulary, own.chunk_length, self.bad.append)
        if self._blocked is not None and found.documents:
            # Another text can have the same tokens.
            held = self._blocked.contains(found.hashed(own.secret, parts.token_dtype(own.tokenizer.token_bytes)))
            self.counts["blocked"] += int(held.sum())
            found = found.without(held) if held.any() else found
        if found.documents:
            self._write(name, found, hashes)

    def _leave_out(
        self, count: str, held: Flags, batch: list[Document], hashes: list[tuple[bytes, bytes]]
    ) -> tuple[list[Document], list[tuple[bytes, bytes]]]:
        self.counts[count] += int(held.sum())
        left = np.flatnonzero(~held).tolist()
        return [batch[i] for i in left], [hashes[i] for i in left]

    def count_tokenised(self) -> None:
        """Count the documents whose tokens were compared, and those that only the slow tokenizer did."""
        encoder = self._encoder
        self.counts["compared"] += encoder.compared
        self.counts["exact"] += encoder.judged
        if encoder.engine == "tokenizers":
            self.counts["exact"] = self._writer.counts["documents"]

    def _write(self, name: str, found: Tokens, hashes: list[tuple[bytes, bytes]]) -> None:
        if found.kept is not None:
            hashes = [pair for pair, kept in zip(hashes, found.kept, strict=True) if kept]
        self.counts["keys_cut"] += 0 if found.cut is None else int(found.cut.sum())
        self._writer.add(name, found, hashes)


def _rows(plan: ChunkPlan, piece: InputPiece, bad: Quarantine, stage: ChunkStage) -> Iterator[Row]:
    """Documents of a piece, and damage; what else is set aside goes to ``bad``."""
    file = plan.files[piece.file]
    if is_spooled(file) and plan.owner != stage.run:
        bad.append(Rejected(0, f"{GIVEN_UP}: standard input can't be read twice: pipe it again"))
        return
    given_up = stage.skip_missing
    try:
        size = Path(file.path).stat().st_size
        problem = "" if size == file.size else f"it had {file.size:,} bytes when it was planned, now {size:,}"
        given_up |= file.path in stage.changed
    except OSError as error:
        problem = error.strerror or str(error)
    if problem and given_up:
        bad.append(Rejected(0, f"{GIVEN_UP}: {problem}"))
        return
    if problem:
        raise TaskError(
            f"{file.path}: {problem}",
            "Bring it back as it was and run the same command again, or give it up with --skip-missing.",
        )
    for row in sources.read_input(file, plan.fields, piece.where):
        if isinstance(row, Rejected) and not row.damage:
            bad.append(row)
        else:
            yield row


def _characters(document: Document) -> int:
    """What a document holds, about, in characters or tokens: all of it counts in memory."""
    size = len(document.text) + len(document.id) + len(document.value or "")
    size += sum(len(kept) for kept in document.kept if kept is not None)
    return size if document.tokens is None else size + len(document.tokens)


def _batches(rows: Iterator[Row]) -> Iterator[list[Document] | Rejected]:
    """Documents in batches of about two million characters; damage on its own, after what came before it."""
    batch: list[Document] = []
    size = 0
    for row in rows:
        if isinstance(row, Rejected):
            if batch:
                yield batch
                batch, size = [], 0
            yield row
            continue
        batch.append(row)
        size += _characters(row)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
