"""Embeddings of a part: float16 ``.npy``, memory-mapped when read."""

from __future__ import annotations

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

    def write(path: Path) -> int:
        with path.open("xb") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(vectors), version=(1, 0), allow_pickle=False)
        return len(vectors)

    def check(path: Path, rows: int) -> None:
        if np.load(path, mmap_mode="r", allow_pickle=False).shape != (rows, vectors.shape[1]):
            raise CorruptError(f"{path}: not what was written")

    return atomic.write_file(root, name, write, check=check)


def read_vectors(store: Store, entry: FileEntry) -> npt.NDArray[np.float16]:
    """Map a part's embeddings, float16 [n, d]; rows of erased chunks are zero. Checks shape and type, not the sum."""
    path = store.path(entry)
    advice = f"See what else is wrong: retrotool verify {store.root}"
    try:
        vectors: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path}: {error}", advice) from error
    if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != entry.rows:
        raise CorruptError(
            f"{path}: {vectors.dtype} {vectors.shape}, the log says {entry.rows} rows of float16", advice
        )
    return vectors
