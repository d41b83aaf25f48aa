"""Embeddings in ``.npy`` files, memory-mapped. Every block of a mapped file is checked on first access.

Cost: 3 µs per block of 16 KiB, once per process (6 GB/s for a whole file), and 9 bytes of memory per block
plus one per row. ``retrotool.store.sums`` describes the sums.
"""

from __future__ import annotations

import io
import mmap
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrotool.errors import CorruptError, listed
from retrotool.ranges import expand_ranges
from retrotool.store.cache import pin
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.storage import Sink, get_if_there
from retrotool.store.store import Store
from retrotool.store.sums import BLOCK, SUM_DTYPE, SUMS, size_of_sums, sum_of

Rows = npt.NDArray[np.int64]
_NAMED = 8  # rows that a message names
_HEADER_BYTES = 1 << 10


class MappedFile:
    """A file of a store's view, mapped. Callers ``check`` bytes before they read them."""

    def __init__(self, store: Store, entry: FileEntry, path: Path) -> None:
        with path.open("rb") as file:
            if not store.is_local:
                pin(file)
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._store, self._path, self._file = store, entry.path, path
        if (sums := get_if_there(store.storage, entry.path + SUMS)) is None:
            raise store.corrupt(f"{store.where(entry.path + SUMS)} is missing")
        if len(sums) != (due := size_of_sums(len(self.bytes))):
            raise store.corrupt(f"{store.where(entry.path + SUMS)} has {len(sums):,} bytes, not {due:,}")
        self._sums = np.frombuffer(sums, SUM_DTYPE)
        self._good = np.zeros(len(self._sums), np.bool_)
        self.unchecked = len(self._sums)  # blocks

    def check(self, start: int, stop: int) -> None:
        """Check the blocks of a range of bytes; ``CorruptError`` if one does not match its checksum."""
        if self.unchecked and stop > start:
            first, last = start // BLOCK, (stop - 1) // BLOCK
            if not self._good[first : last + 1].all():
                self._check_blocks(first + np.flatnonzero(~self._good[first : last + 1]))

    def check_rows(self, rows: Rows, offset: int, size: int) -> None:
        """Check the blocks of rows of ``size`` bytes, the first of which begins at ``offset``."""
        if self.unchecked and len(rows):
            first, last = (rows * size + offset) // BLOCK, (rows * size + (offset + size - 1)) // BLOCK
            blocks = np.unique(expand_ranges(first, last - first + 1))
            self._check_blocks(blocks[~self._good[blocks]])

    def check_all(self) -> None:
        """Check the whole file."""
        self.check(0, len(self.bytes))

    def _check_blocks(self, blocks: npt.NDArray[np.int64]) -> None:
        data = self.bytes
        found = [sum_of(data[start : start + BLOCK]) for start in (blocks * BLOCK).tolist()]
        bad = blocks[np.array(found, np.uint64) != self._sums[blocks]]
        if len(bad):
            wrong = f"the block at byte {bad[0] * BLOCK:,} does not match its checksum"
            if not self._store.is_local:
                self._file.unlink(missing_ok=True)
                raise self._store.corrupt(f"{self._file}, a copy that is now removed: {wrong}")
            raise self._store.corrupt(f"{self._store.where(self._path)}: {wrong}")
        self._good[blocks] = True
        self.unchecked = len(self._good) - int(np.count_nonzero(self._good))


class MappedVectors:
    """The embeddings of a part, float16 [n, d], mapped. Rows are checked when they are taken."""

    dtype = np.dtype(np.float16)

    def __init__(self, file: MappedFile, matrix: npt.NDArray[np.float16], offset: int) -> None:
        self._file, self._matrix, self._offset = file, matrix, offset
        self._row_bytes = matrix.strides[0] if len(matrix) else 0
        self._good = np.zeros(len(matrix), np.bool_)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimensions."""
        rows, dimension = self._matrix.shape
        return rows, dimension

    def __len__(self) -> int:
        return len(self._matrix)

    def __getitem__(self, rows: int | slice | Rows | npt.NDArray[np.bool_] | list[int]) -> npt.NDArray[np.float16]:
        """Return rows as numpy does: a copy for selected rows, a view for a slice."""
        if self._file.unchecked and not np.all(self._good[rows]):
            chosen = self._numbers(rows)
            chosen = chosen[~self._good[chosen]]
            self._file.check_rows(chosen, self._offset, self._row_bytes)
            self._good[chosen] = True
        return np.asarray(self._matrix[rows])

    def _numbers(self, rows: int | slice | Rows | npt.NDArray[np.bool_] | list[int]) -> Rows:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(len(self)))
        chosen = np.atleast_1d(np.asarray(rows))
        return np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64) % max(len(self), 1)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.float16]:
        self._file.check_all()
        return np.array(self._matrix, dtype) if copy or dtype not in (None, self.dtype) else self._matrix


def write_vectors(store: Store, name: FileName, vectors: npt.NDArray[np.float16]) -> FileEntry:
    """Write ``vectors``, float16 [n, d], to a new file."""
    return write_vector_blocks(store, name, vectors.shape[0], vectors.shape[1], [vectors])


def write_vector_blocks(
    store: Store, name: FileName, rows: int, dimension: int, blocks: Iterable[npt.NDArray[np.float16]]
) -> FileEntry:
    """Write blocks, float16 [m, d], with ``rows`` rows in all, one at a time."""

    def write(sink: Sink) -> int:
        np.lib.format.write_array_header_1_0(sink, {"descr": "<f2", "fortran_order": False, "shape": (rows, dimension)})
        written = 0
        for block in blocks:
            sink.write(np.ascontiguousarray(block, "<f2").data)
            sink.sync()
            written += len(block)
        if written != rows:
            raise ValueError(f"{name.path}: {written:,} vectors, not {rows:,}")
        return rows

    return store.write(name, write)


def read_vectors(store: Store, entry: FileEntry) -> MappedVectors:
    """Map a part's embeddings; rows of erased chunks are zero. ``CorruptError`` for a wrong shape or type."""
    with store.reading(entry), store.local(entry) as path:
        file = MappedFile(store, entry, path)
        file.check(0, 1)
        try:
            header = io.BytesIO(file.bytes[:_HEADER_BYTES])
            np.lib.format.read_magic(header)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            offset = header.tell()
            matrix: npt.NDArray[np.float16] = np.frombuffer(file.bytes, dtype, offset=offset).reshape(shape)
        except (OSError, ValueError) as error:
            raise store.corrupt(f"{path}: {error}") from error
    if dtype != np.float16 or fortran or len(shape) != 2 or shape[0] != entry.rows:
        raise store.corrupt(f"{path}: {dtype} {shape}, the log says {entry.rows} rows of float16")
    return MappedVectors(file, matrix, offset)


def check_finite(store: Store, vectors: npt.NDArray[np.float16], part: int, rows: Rows) -> None:
    """Raise ``CorruptError`` naming those of a part's ``vectors``, at ``rows``, that are not finite."""
    wrong = rows[~np.isfinite(vectors).all(axis=1)]
    if len(wrong):
        repair = shlex.join(["retrotool", "repair", store.place])
        raise CorruptError(f"{store.place}: {not_finite(part, wrong)}", f"Compute them again: {repair}")


def not_finite(part: int, rows: Rows) -> str:
    """Return a sentence that names rows of a part whose vectors are not finite."""
    named = listed(rows[:_NAMED].tolist(), len(rows))
    return f"vectors of part {part} are not finite: {'row' if len(rows) == 1 else 'rows'} {named}"
