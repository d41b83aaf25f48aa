"""Inverted lists in faiss files: made from float16 vectors and read back as arrays.

A flat index is an ``IndexIDMap2`` over a float16 scalar quantiser and is read as a single list; an IVF index is an
``IndexIVFScalarQuantizer`` whose codes are the float16 vectors themselves (not residuals). So codes lose nothing,
and distances to them are distances to the stored embeddings. Ids are chunk ids, ascending in every list.

faiss writes through a Python file, and what it wrote is read back: on its own it only prints that a disk was full when
the file was closed. That costs a copy, and one more read of what has just been written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import CorruptError, StorageError

_WRITE_BYTES = 1 << 20

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class InvertedLists:
    """The lists of one shard; ``centroids`` float32 [nlist, d] is None for a flat index, which has one list.

    The arrays may lie in a memory-mapped file, and are then read-only.
    """

    centroids: npt.NDArray[np.float32] | None
    ids: tuple[Ids, ...]
    vectors: tuple[Vectors, ...]

    def __len__(self) -> int:
        """Vectors in all lists."""
        return sum(map(len, self.ids))


def empty_flat(d: int) -> Any:
    """An empty exact index, float16."""
    import faiss

    return faiss.IndexIDMap2(faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2))


def empty_ivf(centroids: npt.NDArray[np.float32]) -> Any:
    """An empty inverted file, float16, with these coarse centroids [nlist, d]."""
    import faiss

    nlist, d = centroids.shape
    quantizer: Any = faiss.IndexFlatL2(d)
    quantizer.add(np.ascontiguousarray(centroids))
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(quantizer, d, nlist, kind, faiss.METRIC_L2, False)
    index.own_fields = True
    quantizer.this.disown()
    index.is_trained = True  # float16 codes have nothing to learn
    return index


def centroids_of(index: Any) -> npt.NDArray[np.float32] | None:
    """Coarse centroids [nlist, d] of an index; None for a flat one."""
    import faiss

    if not isinstance(index, faiss.IndexIVF):
        return None
    quantizer = faiss.downcast_index(index.quantizer)
    return np.array(quantizer.reconstruct_n(0, index.nlist), np.float32)


def add(index: Any, ids: Ids, vectors: Vectors, assigned: Ids | None) -> None:
    """Add float16 vectors [n, d] under chunk ids [n]; ``assigned`` [n] are their lists (IVF)."""
    import faiss

    values = np.ascontiguousarray(vectors, np.float32)  # exact: float16 codes give the same bits back
    if assigned is None:
        index.add_with_ids(values, ids)
    else:
        pointers = (faiss.swig_ptr(np.ascontiguousarray(a)) for a in (values, ids, assigned))
        index.add_core(len(ids), *pointers)


def write(index: Any, path: Path) -> int:
    """Write an index to a path; return how many vectors it holds. Use through the store's door only, with ``check``."""
    import faiss

    library: Any = faiss  # type checkers miss some of its names
    with path.open("xb") as file:
        failed: list[BaseException] = []

        def put(data: bytes) -> None:
            try:
                file.write(data)
            except BaseException as error:
                failed.append(error)
                raise

        try:
            library.write_index(index, library.PyCallbackIOWriter(put, _WRITE_BYTES))
        except RuntimeError:
            if failed:  # faiss does not say what the callback raised
                raise failed[0] from None
            raise
    return int(index.ntotal)


def check(index: Any, path: Path) -> None:
    """``StorageError`` unless the file holds what ``index`` does: as many vectors, and the same in every list."""
    meant = _arrays(index, path)
    try:
        found = read(path)
    except CorruptError as error:
        raise _not_written(path) from error
    if not (
        len(meant.ids) == len(found.ids)
        and _equal(meant.centroids, found.centroids)
        and all(map(_equal, meant.ids, found.ids))
        and all(map(_equal, meant.vectors, found.vectors))
    ):
        raise _not_written(path)


def _equal(one: npt.NDArray[Any] | None, other: npt.NDArray[Any] | None) -> bool:
    """Whether two arrays are the same to the bit."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and np.array_equal(one.view(np.uint8), other.view(np.uint8))


def _not_written(path: Path) -> StorageError:
    return StorageError(
        f"{path}: what lies there is not what was written; what was committed before is untouched",
        "Look for a full or failing disk, then run the same command again: it goes on where it stopped.",
    )


def open_index(path: Path, flags: int = 0) -> Any:
    """A faiss index from a file; ``CorruptError`` if faiss can't read it."""
    import faiss

    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CorruptError(f"{path} is no index that faiss can read: {reason}") from error


def read(path: Path) -> InvertedLists:
    """Map an index file; ``CorruptError`` if faiss can't read it or it is of another kind."""
    import faiss

    return _arrays(open_index(path, faiss.IO_FLAG_MMAP), path)


def _arrays(index: Any, path: Path) -> InvertedLists:
    """The lists of an index as arrays over its memory; ``CorruptError`` if it is of another kind."""
    import faiss

    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        inverted: Any = index.invlists
        sizes = [inverted.list_size(i) for i in range(index.nlist)]
        ids = tuple(_view(index, inverted.get_ids(i), (n,), np.int64) for i, n in enumerate(sizes))
        vectors = tuple(_view(index, inverted.get_codes(i), (n, index.d), np.float16) for i, n in enumerate(sizes))
        return InvertedLists(centroids_of(index), ids, vectors)
    if isinstance(index, faiss.IndexIDMap2):
        inner = faiss.downcast_index(index.index)
        if isinstance(inner, faiss.IndexScalarQuantizer) and inner.code_size == 2 * index.d:
            n = int(index.id_map.size())
            if inner.codes.size() != 2 * index.d * n:
                raise CorruptError(f"{path}: {n:,} ids for {inner.codes.size():,} bytes of vectors")
            flat = _view(index, inner.codes.data(), (n, index.d), np.float16)
            return InvertedLists(None, (_view(index, index.id_map.data(), (n,), np.int64),), (flat,))
    raise CorruptError(f"{path}: {type(index).__name__} is no index that retrotool made")


class _Mapped:
    """Memory of a faiss index as numpy sees it; arrays made of it keep the index, and so the memory, alive."""

    def __init__(self, index: Any, pointer: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._index = index
        self.__array_interface__ = {
            "version": 3, "data": (int(pointer), True), "shape": shape, "typestr": np.dtype(dtype).str,
        }  # fmt: skip


def _view(index: Any, pointer: Any, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """A read-only array over a faiss index's memory."""
    return np.asarray(_Mapped(index, pointer, shape, dtype)) if all(shape) else np.zeros(shape, dtype)


def without(lists: InvertedLists, banned: Iterable[npt.NDArray[np.bool_]]) -> Any:
    """A new index with the same lists less the banned ids (for each list, which of its ids to drop)."""
    centroids = lists.centroids
    d = lists.vectors[0].shape[1]
    index = empty_flat(d) if centroids is None else empty_ivf(centroids)
    for number, (ids, vectors, drop) in enumerate(zip(lists.ids, lists.vectors, banned, strict=True)):
        keep = ~drop
        if keep.any():
            assigned = None if centroids is None else np.full(int(keep.sum()), number, np.int64)
            add(index, ids[keep], vectors[keep], assigned)
    return index
