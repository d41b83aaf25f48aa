"""Vectors made elsewhere: read from ``.npy`` or Parquet files, checked, and stored as embeddings.

Rows of ``.npy`` files, in the order of the files' names, are the rows of chunk files by part and row: of all
parts, or of the parts without vectors. Which ones is recorded with a fingerprint of the files, so that the
same files resume a run that was killed. Rows of erased chunks, and of values of key-value records, are
ignored. Rows of Parquet files name their chunks, in any order; purged chunks may be missing. All are checked
before the first is stored, so that wrong files change nothing.

Cost: files are read twice, ``.npy`` files mapped. Of Parquet files, the row groups that overlap a block of a
part are read for it: each about once if they are sorted by chunk number. Memory: a block, and a row group.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool import engine
from retrotool.cli.output import count
from retrotool.embed.stage import EmbedStage, check_encoder_identity, unfinished_part
from retrotool.encoder import EncoderIdentity
from retrotool.engine.progress import counting
from retrotool.engine.task import Report, Task
from retrotool.errors import UsageError, listed
from retrotool.ranges import consecutive_ranges, within
from retrotool.sources import find_inputs
from retrotool.store import parts
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, tombstones_near
from retrotool.store.vectors import write_vector_blocks

_BLOCK_BYTES = 256 << 20  # of vectors held at a time
_BATCH = 8192  # rows read from a Parquet file at a time
_SHOWN = 3  # chunks that an error lists
_FORMS = "Give .npy files [rows, dimension], or Parquet files with the columns chunk and vector (a list of floats)."
_AGAIN = "Nothing was stored. Correct the files and run the same command again."
_Found = tuple[npt.NDArray[np.int64], npt.NDArray[Any], str, int]  # see ``VectorFiles``


@dataclass(frozen=True, slots=True)
class VectorFiles:
    """Files of vectors of one dimension; ``rows`` of each ``.npy`` file, or the ``column`` of Parquet files.

    Reading yields rows of a block [n], their vectors [n, d], the path, and the first row in an ``.npy`` file.
    """

    paths: tuple[str, ...]
    dimension: int
    rows: tuple[int, ...] = ()
    column: str = ""
    fingerprint: str = ""

    def numbered(self, first: int, stop: int) -> Iterator[_Found]:
        """Yield rows [first, stop) of all ``.npy`` files together."""
        begin = 0
        for path, rows in zip(self.paths, self.rows, strict=True):
            low, high = max(first, begin), min(stop, begin + rows)
            if low < high:
                yield np.arange(low - first, high - first), _mapped(path)[low - begin : high - begin], path, low - begin
            begin += rows

    def named(self, first: int, stop: int) -> Iterator[_Found]:
        """Yield the rows of Parquet files for chunks [first, stop) of a part."""
        chunk, table = pc.field("chunk"), _table(self.paths)
        is_number = pa.types.is_integer(kind := table.schema.field("chunk").type)
        if kind not in (pa.int64(), pa.string()):
            chunk = chunk.cast(pa.int64() if is_number else pa.string())
        part = parts.format_id(first).partition(":")[0]
        wanted = (chunk >= first) & (chunk < stop) if is_number else pc.starts_with(chunk, f"{part}:")
        for batch in _batches(table, ["chunk", self.column, "__filename"], wanted):
            ids, path = batch["chunk"], str(batch["__filename"][0]) if batch.num_rows else ""
            numbers = ids.to_numpy() if is_number else [parts.parse_id(text) or 0 for text in ids.to_pylist()]
            rows = np.asarray(numbers, np.int64) - first
            here = np.flatnonzero((rows >= 0) & (rows < stop - first))
            vectors = batch[self.column].take(pa.array(here))
            lengths = pc.list_value_length(vectors).fill_null(0).to_numpy()
            for wrong in np.flatnonzero(lengths != self.dimension).tolist():
                named = f"{path}: chunk {parts.format_id(first + int(rows[here[wrong]]))}"
                raise UsageError(f"{named} has {lengths[wrong]} numbers, others have {self.dimension}", _AGAIN)
            values = vectors.flatten().to_numpy(zero_copy_only=False)  # null becomes NaN
            yield rows[here], values.reshape(len(here), self.dimension), path, 0


def find_vectors(given: str) -> VectorFiles:
    """Find the vectors in a file, folder or pattern; raise ``UsageError`` if they don't fit together."""
    inside = sorted(map(str, Path(given).iterdir())) if Path(given).is_dir() else []
    files = find_inputs([path for path in inside if path.endswith((".npy", ".parquet"))] or [given])
    paths, kinds = tuple(file.path for file in files), {Path(file.path).suffix for file in files}
    digest = hashlib.sha256("".join(file.fingerprint() for file in files).encode()).hexdigest()[:32]
    if kinds == {".parquet"}:
        try:
            return replace(_find_named(paths), fingerprint=digest)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"--from {given}: {str(error).splitlines()[0]}", _FORMS) from error
    if kinds != {".npy"}:
        raise UsageError(f"--from {given}: {', '.join(sorted(kinds))} files can't be read as vectors", _FORMS)
    shapes = [_mapped(path).shape for path in paths]
    for path, (_, dimension) in zip(paths, shapes, strict=True):
        if dimension != shapes[0][1]:
            raise UsageError(f"{path} has {dimension} dimensions, but {paths[0]} has {shapes[0][1]}", _FORMS)
    return VectorFiles(paths, shapes[0][1], tuple(rows for rows, _ in shapes), fingerprint=digest)


def _mapped(path: str) -> npt.NDArray[Any]:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a whole .npy file: {error}", _FORMS) from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.size:
        raise UsageError(f"{path}: {matrix.dtype} {list(matrix.shape)}, not float [rows, dimension]", _FORMS)
    return np.asarray(matrix)


def _table(paths: tuple[str, ...]) -> Any:
    from pyarrow import dataset  # imports slowly

    return dataset.dataset(list(paths), format="parquet")


def _batches(table: Any, columns: list[str], wanted: Any = None) -> Iterator[pa.RecordBatch]:
    """Read Parquet files page by page: by default, several row groups are held at a time."""
    from pyarrow import dataset

    reading = dataset.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
    ahead = {"batch_readahead": 1, "fragment_readahead": 1, "use_threads": False, "batch_size": _BATCH}
    batches: Iterator[pa.RecordBatch] = table.to_batches(
        columns=columns, filter=wanted, fragment_scan_options=reading, **ahead
    )
    return batches


def _find_named(paths: tuple[str, ...]) -> VectorFiles:
    table = _table(paths)
    types = {one.name: one.type for one in table.schema}
    column = next((name for name in ("vector", "embedding") if name in types), "")
    id_type, value = types.get("chunk", pa.null()), getattr(types.get(column), "value_type", pa.null())
    if not (pa.types.is_integer(id_type) or "string" in str(id_type)) or not pa.types.is_floating(value):
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise UsageError(f"{paths[0]} has the columns {columns}", _FORMS)
    lengths = (pc.list_value_length(batch[column])[0].as_py() for batch in _batches(table, [column]) if len(batch))
    if not (dimension := next(lengths, 0)):
        raise UsageError(f"{paths[0]}: the first row has no numbers in the column {column}", _FORMS)
    return VectorFiles(paths, dimension, column=column)


def foreign_identity(maker: str, name: str, dimension: int) -> EncoderIdentity:
    """Describe an encoder known only by the vectors that a model called ``maker`` made."""
    digest = hashlib.sha256(maker.encode()).hexdigest()
    return EncoderIdentity(name, maker, digest, "", dimension, "", normalize=False, max_tokens=0, foreign=True)


def parts_given(store: Store, files: VectorFiles, encoder: str) -> tuple[int, ...]:
    """Return the parts of which ``.npy`` files have all rows: as when they were first used, else by count.

    For Parquet files, return all parts. ``UsageError`` if the number of rows does not decide it.
    """
    everything, done = tuple(store.state.parts()), store.state.group("embeddings", encoder)
    lacking = tuple(part for part in everything if done.get(part_slot(part)) is None)
    if files.column or not lacking:
        return lacking

    def rows_of(some: Sequence[int]) -> int:
        return sum(parts.part_entry(store, "chunks", part).rows for part in some)

    uses = [about for entry in done.entries() if (about := entry.about or {}).get("from") == files.fingerprint]
    known = {tuple(sorted(within(about["parts"], everything))) for about in uses} or {everything, lacking}
    rows, left, total = sum(files.rows), rows_of(lacking), rows_of(everything)
    fitting = {some for some in known if rows_of(some) == rows and not set(lacking).isdisjoint(some)}
    if len(fitting) != 1:
        live = total - sum(len(read_tombstones(store).rows(part)) for part in everything)
        reason = "Chunks were added since the vectors were made, or some are missing."
        if rows == live:
            reason = f"{rows:,} chunks are live: those that were purged have no rows in the files."
        elif rows > total:
            reason = "They are of another store, or several files have the same vectors."
        raise UsageError(
            f"the files have {rows:,} vectors, but the store has {count(total, 'chunk')}, purged ones included, "
            f"of which {left:,} have no vectors yet",
            f"{reason}\nGive one row for each of these {left:,}{f' or of all {total:,}' if left < total else ''}, by "
            "part and row, or Parquet files that name the chunks.",
        )
    return fitting.pop()


def check_vectors(store: Store, stage: EmbedStage) -> None:
    """Check all vectors that are to be stored; raise ``UsageError`` for the first that can't be."""
    tasks, worker = engine.plan_tasks(stage, store), ForeignWorker(store, stage)
    with counting("check", "chunk", sum(task.weight for task in tasks)) as report:
        for task in tasks:
            for _ in worker.blocks(task, report):
                pass


class ForeignWorker:
    """Checks and stores the vectors of parts."""

    def __init__(self, store: Store, stage: EmbedStage) -> None:
        assert stage.files is not None
        self._store, self._files, self._identity = store, stage.files, stage.identity
        self._about = {"from": stage.files.fingerprint, "parts": consecutive_ranges(stage.given)}

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Store the vectors of one part; return None if it has some already."""
        begun, identity = time.perf_counter(), self._identity
        entry = unfinished_part(self._store, task, identity.name)
        if entry is None:
            return None
        name = FileName.new(run, "embeddings", part_slot(task.inputs["part"]), "npy", identity.name)
        blocks = self.blocks(task, report)
        written = write_vector_blocks(self._store, name, entry.rows, identity.dimension, blocks)
        written, settings = replace(written, about=self._about), {"encoder": identity.name}
        records = {f"encoder:{identity.name}": check_encoder_identity(self._store, identity)}
        measured = {"tokens": 0.0, "forward": 0.0, "working": time.perf_counter() - begun}
        # If one of these purges is undone by now, its chunks need vectors.
        reads = (entry.path, *(tombstones_near(self._store, entry.part) if self._files.column else ()))
        return Staged("embed", settings, reads, (written,), records=records, measured=measured, task=task.key, run=run)

    def blocks(self, task: Task, report: Report) -> Iterator[npt.NDArray[np.float16]]:
        """Yield a part's vectors in blocks of rows; raise ``UsageError`` if some are wrong or missing."""
        files, part, by_row = self._files, int(task.inputs["part"]), not self._files.column
        embedded = parts.read_embedded(self._store, part)
        rows = len(embedded)
        purged = np.zeros(rows, np.bool_)
        purged[read_tombstones(self._store).rows(part)] = True
        size = max(1, _BLOCK_BYTES // (2 * files.dimension))
        for start in range(0, rows, size):
            stop, first, row = min(start + size, rows), parts.join_id(part, start), int(task.inputs["row"])
            block = np.zeros((stop - start, files.dimension), np.float16)
            times = np.zeros(len(block), np.int64)
            found = files.numbered(row + start, row + stop) if by_row else files.named(first, first + stop - start)
            for places, vectors, path, file_row in found:
                with np.errstate(over="ignore"):
                    block[places] = np.where(embedded[start + places, None], vectors, 0)
                np.add.at(times, places, 1)
                if not (finite := np.isfinite(block[places]).all(axis=1)).all():
                    at = int(np.argmin(finite))
                    named = f"chunk {parts.format_id(first + int(places[at]))}" + f" (row {file_row + at:,})" * by_row
                    what = "has NaN, infinity, or more than float16 holds"
                    raise UsageError(f"{path}: the vector of {named} {what}", _AGAIN)
            wrong = np.flatnonzero(embedded[start:stop] & (times != 1) & ~(purged[start:stop] & (times == 0)))
            if len(wrong):
                shown = listed((parts.format_id(first + place) for place in wrong[:_SHOWN].tolist()), len(wrong))
                raise UsageError(f"the files have none or several vectors of these chunks: {shown}", _AGAIN)
            yield block
            report(int(embedded[start:stop].sum()))
