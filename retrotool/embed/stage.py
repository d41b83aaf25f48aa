"""The ``embed`` stage: encode every key, one float16 ``.npy`` file per part and one task per part.

Erased chunks and values of key-value records get zeros without computation. Purged chunks are embedded until
erased. If a part's chunks are erased during its task, the commit is refused and the part is embedded again.
Blocks of about 64 batches are read, computed and written concurrently, so memory does not grow with the part.

Once a minute the blocks that are done are staged as a *piece*. The next run takes rows from pieces of the
same chunks, encoder and settings, and computes the others in the same batches, so that vectors are equal to
the bit. Folding drops pieces once their part is committed, or its chunks are replaced, as by an erase.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from retrotool.embed.search_scope import count_live_keys
from retrotool.embed.store_encoder import EncoderRows
from retrotool.encoder import Encoder, EncoderIdentity, Rows
from retrotool.encoder.encoder import Vectors
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.errors import CorruptError, ErasedError, NotFiniteError, UsageError
from retrotool.store import parts, staging
from retrotool.store.log import FileEntry
from retrotool.store.parts import ROW_GROUP, Chunks
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.store.vectors import MappedVectors, read_vectors, write_vector_blocks
from retrotool.tokenizers import FastTokenizer, TokensDiffer

if TYPE_CHECKING:
    from retrotool.embed.foreign_vectors import VectorFiles

_BLOCK_ROWS = (256, 1 << 16)  # least and most rows of a block
_END_BLOCK = 8  # divisor for the size of the first and last block of a part
_VERIFIED = 64  # chunks to verify an encoder on
_MANY = 100_000  # chunks from which preparing the fast tokenizer for a GPU pays off


@dataclass(frozen=True, slots=True)
class EmbedStage:
    """Embed all parts that encoder ``spec`` has not embedded.

    ``files`` have the vectors of the parts ``given``, one after the other; no others are embedded then.
    ``broken``: paths of embeddings to compute again instead.
    """

    spec: str
    identity: EncoderIdentity
    devices: tuple[str, ...] = ("auto",)
    dtype: str = "auto"
    files: VectorFiles | None = None
    given: tuple[int, ...] = ()
    broken: tuple[str, ...] = ()
    name: str = field(default="embed", init=False)
    unit: str = field(default="chunk", init=False)

    def plan(self, store: Store) -> list[Task]:
        """Plan one task per part; raise ``UsageError`` if another encoder has the name."""
        check_encoder_identity(store, self.identity)
        tasks, row, tombstones = [], 0, read_tombstones(store)
        done = store.state.group("embeddings", self.identity.name)
        for part in store.state.all_parts() if self.files is None else self.given:
            entry, old = parts.part_entry(store, "chunks", part), done.get(part_slot(part))
            replaces = None if old is None else old.path
            if replaces in self.broken if self.broken else old is None:
                again = {"repair": replaces} if replaces else {}
                key = task_key("embed", {"encoder": self.identity.sha256, **again}, [entry.path])
                inputs = {"part": part, "path": entry.path, "row": row, "replaces": replaces}
                weight = count_live_keys(store, part, tombstones)
                tasks.append(Task(key, f"part {part}", weight, inputs, claimed=True))
            row += entry.rows
        return tasks

    def size_of(self, store: Store, task: Task) -> int:
        """Return the bytes of a part's vectors."""
        return parts.part_entry(store, "chunks", int(task.inputs["part"])).rows * self.identity.dimension * 2

    def open(self, store: Store) -> Worker:
        """Load the encoder, if vectors are not given."""
        from retrotool.embed.foreign_vectors import ForeignWorker

        return EmbedWorker(store, self) if self.files is None else ForeignWorker(store, self)


def check_encoder_identity(store: Store, identity: EncoderIdentity) -> Mapping[str, Any]:
    """Return the store's record of an encoder, or a new one; ``UsageError`` if another has its name."""
    # The same model from another location is the same encoder; keep the first record.
    record: Mapping[str, Any] = store.state.records.get(f"encoder:{identity.name}") or asdict(identity)
    if (record["sha256"], record["dimension"]) != (identity.sha256, identity.dimension):
        raise UsageError(
            f"the store has embeddings of another encoder under the name {identity.name!r}, "
            f"of {record['dimension']} dimensions",
            f"If it is the same model, give its options (--pooling {record['pooling']}); else another --name.",
        )
    return record


def unfinished_part(store: Store, task: Task, encoder: str) -> FileEntry | None:
    """Return the chunks of a task's part in the newest commit; None if they are embedded already."""
    part = int(task.inputs["part"])
    old = store.refresh().part_file("embeddings", part, encoder)
    if old is not None and old.path != task.inputs["replaces"]:
        return None
    entry = parts.part_entry(store, "chunks", part)
    if entry.path != task.inputs["path"]:
        raise ErasedError(f"chunks of part {part} were erased after planning")
    return entry


def row_blocks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of a part's blocks: ``most`` rows, fewer at both ends to overlap more work."""
    least = max(1, most // _END_BLOCK)
    start, size = 0, least
    while start < rows:
        size = max(least, min(size, most, (rows - start) // 2))
        stop = start + size
        if size >= ROW_GROUP:
            stop -= stop % ROW_GROUP
        elif stop // ROW_GROUP > start // ROW_GROUP:
            stop = (start // ROW_GROUP + 1) * ROW_GROUP
        yield start, min(stop, rows)
        start, size = stop, 2 * size


class EmbedWorker:
    """Embeds parts with a loaded encoder, verified on the first chunks."""

    def __init__(self, store: Store, stage: EmbedStage) -> None:
        self._store = store
        identity = stage.identity
        self.encoder = Encoder(stage.spec, stage.devices[0], stage.dtype, **identity.settings)
        if self.encoder.identity.sha256 != identity.sha256:
            raise UsageError(f"encoder {stage.spec!r} has just changed", "Run the same command again.")
        self.texts = EncoderRows(store, self.encoder)
        self._verified = False
        self._batch_tokens = self.encoder.batch_tokens  # which the encoder lowers when memory runs out
        self._many = self.encoder.device != "cpu" and sum(task.weight for task in stage.plan(store)) > _MANY

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Embed one part; return None if it is already embedded."""
        part, identity = int(task.inputs["part"]), self.encoder.identity
        replaces = task.inputs["replaces"]
        if unfinished_part(self._store, task, identity.name) is None:
            return None
        if not self._verified:
            self._prepare(part)
        encoder = self.encoder
        settings = {
            "encoder": identity.name, "device": encoder.device_name, "dtype": encoder.dtype,
            "forward": encoder.forward, "why": encoder.why, **({"gelu": encoder.gelu} if encoder.gelu else {}),
        }  # fmt: skip
        name = partial(FileName.new, run, "embeddings", part_slot(part), "npy", identity.name)
        made_with = {**settings, "sha256": identity.sha256, "dimension": identity.dimension}
        kept = partial(PartPieces, self._store, task.inputs["path"], made_with, encoder.cosine or 0.0, name)
        begun = self._measure()
        rows, keys = 0, parts.n_keys(parts.part_entry(self._store, "chunks", part))
        reported = 0

        def progress(embedded: int) -> None:
            nonlocal rows, reported
            rows += embedded
            before, reported = reported, task.weight * rows // max(keys, 1)  # erased and purged chunks do not count
            report(reported - before)

        try:
            entry = self._write(part, name(), pieces := kept(), progress)
        except TokensDiffer as error:
            # Repeat this part without the fast tokenizer; --check can validate earlier parts.
            encoder.say(f"{error.summary}; continuing with tokenizers, which is slower")
            encoder.fast = None
            progress(-rows)
            drop_pieces(self._store, task.inputs["path"])
            entry = self._write(part, name(), pieces := kept(), progress)
        except NotFiniteError as error:
            computed = parts.read_embedded(self._store, part)
            for start, stop in self._blocks(len(computed)):
                computed[start:stop] &= pieces.rows(start, stop) is None
            raise self._not_finite(part, int(np.flatnonzero(computed)[error.row])) from error
        report(task.weight - reported)
        self._store.refresh()
        records = {f"encoder:{identity.name}": check_encoder_identity(self._store, identity)}
        # What differs between workers is recorded with the file, as tasks with equal settings share a commit.
        entry = replace(entry, about={"cosine": pieces.cosine})
        reads = (str(task.inputs["path"]),)
        measured = {name: now - begun[name] for name, now in self._measure().items()}
        removed = () if replaces is None else (str(replaces),)
        return Staged(
            "embed", settings, reads, (entry,), removed, records=records, measured=measured, task=task.key, run=run
        )

    def _measure(self) -> dict[str, float]:
        return {"tokens": self.encoder.tokens, "forward": self.encoder.seconds, "working": time.perf_counter()}

    def _prepare(self, part: int) -> None:
        """Verify the encoder on chunks of the part, then prepare the fast tokenizer if it pays off."""
        chunks = parts.read_chunks(self._store, part, [0])
        rows = np.flatnonzero(chunks.embedded)
        some = np.random.default_rng(0).permutation(rows)[:_VERIFIED]
        try:
            self.encoder.verify(self.texts.rows(chunks.tokens[some], chunks.n_tokens[some]))
        except NotFiniteError as error:
            if not len(some):
                raise
            raise self._not_finite(part, int(some[error.row % len(some)])) from error
        self._verified = True
        if self._many and not self.texts.straight:
            self.encoder.fast = FastTokenizer(self.encoder.tokenizer)

    def _write(self, part: int, name: FileName, pieces: PartPieces, report: Report) -> FileEntry:
        entry = parts.part_entry(self._store, "chunks", part)
        dimension = self.encoder.identity.dimension
        embedded = parts.read_embedded(self._store, part)
        blocks = [(start, stop, pieces.rows(start, stop)) for start, stop in self._blocks(entry.rows)]
        report(sum(int(embedded[start:stop].sum()) for start, stop, kept in blocks if kept is not None))

        def to_compute() -> Iterator[Rows]:
            for chunks in self._read(part, [(start, stop) for start, stop, kept in blocks if kept is None]):
                yield self.texts.rows(chunks.tokens[chunks.embedded], chunks.n_tokens[chunks.embedded])

        def filled(coming: Iterator[Vectors]) -> Iterator[Vectors]:
            for start, stop, kept in blocks:
                if (block := kept) is None:
                    block = next(coming)
                    if len(block) < stop - start:
                        whole = np.zeros((stop - start, dimension), np.float16)
                        whole[embedded[start:stop]] = block
                        block = whole
                    pieces.add(start, block)
                yield block

        with self.encoder.stream(to_compute(), report) as coming:
            return write_vector_blocks(self._store, name, entry.rows, dimension, filled(coming))

    def _blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        least, most = _BLOCK_ROWS
        return row_blocks(rows, min(max(self._batch_tokens, least), most))

    def _read(self, part: int, blocks: Iterable[tuple[int, int]]) -> Iterator[Chunks]:
        """Yield a part's chunks in blocks, holding at most two row groups beyond a block."""
        held, first = None, 0
        for start, stop in blocks:
            if held is None or stop > first + len(held):
                groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
                held, first = parts.read_chunks(self._store, part, groups), groups[0] * ROW_GROUP
            yield held.between(start - first, stop - first)

    def _not_finite(self, part: int, row: int) -> NotFiniteError:
        chunks = parts.read_chunks(self._store, part, [row // ROW_GROUP])
        document = parts.read_documents(self._store, part, ["id"])["id"][int(chunks.doc[row % ROW_GROUP])].as_py()
        chunk = int(parts.chunk_ids(part, np.array([row]))[0])
        return NotFiniteError(
            f"encoder {self.encoder.identity.name} returned NaN or infinity for chunk {chunk} "
            f"(row {row} of part {part}, document {document!r})",
            row,
        )


PIECE_SECONDS = 60.0
_MOST_BYTES = 1 << 30  # held for a piece; a device that computes more in a minute needs about that for a part


class PartPieces:
    """The pieces of the part with the chunks file ``path``; ``new_name`` names the file of another one."""

    def __init__(
        self, store: Store, path: str, settings: Mapping[str, Any], cosine: float, new_name: Callable[[], FileName]
    ) -> None:
        self._store, self._path, self._settings, self._new_name = store, path, settings, new_name
        self._found: list[tuple[int, int, MappedVectors]] = []
        self.cosine = cosine  # the least of those that computed a row
        for staged in staging.read_staged(store.storage).values():
            if staged.piece is not None and staged.reads == (path,) and staged.settings == settings:
                with contextlib.suppress(CorruptError, ErasedError):  # else its rows are computed again
                    vectors = read_vectors(store, staged.add[0])
                    np.asarray(vectors)  # checks all blocks
                    self._found.append((*staged.piece, vectors))
                    self.cosine = min(self.cosine, float((staged.add[0].about or {})["cosine"]))
        self._held: list[Vectors] = []
        self._first, self._since = 0, time.monotonic()

    def rows(self, start: int, stop: int) -> Vectors | None:
        """Return rows [start, stop) of the part, float16 [n, d], if one piece has all of them."""
        for first, last, vectors in self._found:
            if first <= start and stop <= last + 1:
                return vectors[start - first : stop - first]
        return None

    def add(self, start: int, block: Vectors) -> None:
        """Keep a finished block, float16 [n, d], and stage those since the last piece once a minute."""
        held = sum(map(len, self._held))
        if self._held and start != self._first + held:  # what is between is in another piece
            self._stage()
        if not self._held:
            self._first = start
        self._held.append(block)
        if time.monotonic() - self._since >= PIECE_SECONDS:
            self._stage()
        elif (held + len(block)) * block[0].nbytes > _MOST_BYTES:
            self._held = []

    def _stage(self) -> None:
        rows = sum(map(len, self._held))
        piece = (self._first, self._first + rows - 1)
        entry = write_vector_blocks(self._store, self._new_name(), rows, self._held[0].shape[1], self._held)
        entry = replace(entry, about={"cosine": self.cosine})
        key = task_key("embed", {**self._settings, "piece": piece}, [self._path])
        run = FileName.parse(entry.path).run
        staged = Staged("embed", self._settings, (self._path,), (entry,), piece=piece, task=key, run=run)
        staging.stage(self._store.storage, staged)
        self._held, self._since = [], time.monotonic()


def drop_pieces(store: Store, path: str) -> None:
    """Remove all pieces that were made from the chunks file ``path``."""
    gone = [one for one in staging.read_staged(store.storage).values() if one.piece is not None and path in one.reads]
    store.storage.delete(file for one in gone for file in one.files())
    store.storage.delete(staging.staged_path(one.task) for one in gone)  # last, as after a kill they name the files
