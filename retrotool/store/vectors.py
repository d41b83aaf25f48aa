"""Embeddings of a part: float16 ``.npy``, memory-mapped when read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrotool.errors import CorruptError
from retrotool.store import atomic
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store


def write_vectors(root: Path, name: FileName, vectors: npt.NDArray[np.float16]) -> FileEntry:
    """Write ``vectors``, float16 [n, d], through the store's door."""
    return write_vector_blocks(root, name, vectors.shape[0], vectors.shape[1], [vectors])


def write_vector_blocks(
    root: Path, name: FileName, rows: int, dimension: int, blocks: Iterable[npt.NDArray[np.float16]]
) -> FileEntry:
    """As ``write_vectors``, of blocks float16 [m, d] that have ``rows`` rows together; one is held at a time."""

    def pieces() -> Iterator[bytes | memoryview]:
        header = io.BytesIO()
        described = {"descr": "<f2", "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(header, described)
        start = header.getvalue()  # goes with the first block: each is made durable on its own
        for block in blocks:
            data = np.ascontiguousarray(block, "<f2")
            if start:
                yield start + data.tobytes()
                start = b""
            elif len(data):
                yield data.data.cast("B")
        if start:
            yield start

    def check(path: Path, rows: int) -> None:
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):  # there is less than the header says
            raise CorruptError(f"{path}: it breaks off") from None
        if found.shape != (rows, dimension) or found.offset + found.nbytes != path.stat().st_size:
            raise CorruptError(f"{path}: not what was written")

    return atomic.write_blocks(root, name, pieces(), rows, check=check)


def read_vectors(store: Store, entry: FileEntry) -> npt.NDArray[np.float16]:
    """Map a part's embeddings, float16 [n, d]; rows of erased chunks are zero. Checks shape and type, not the sum."""
    with store.reading(entry) as path:
        try:
            vectors: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise store.corrupt(f"{path}: {error}") from error
    if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != entry.rows:
        raise store.corrupt(f"{path}: {vectors.dtype} {vectors.shape}, the log says {entry.rows} rows of float16")
    return vectors
