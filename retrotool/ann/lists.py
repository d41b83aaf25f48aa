"""Indexes as faiss files: a training (centroids, rotation, codec), and inverted lists of codes.

The kinds of faiss index are listed in ``docs/format.md``. Lists are written from codes, and read back list by
list from mapped memory; an index without lists is read as one list. Ids are chunk ids, ascending in every
list. Readers supply a coarse quantiser that is omitted. faiss writes through a Python callback: its own
writer does not raise if the disk is full when the file is closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann import kmeans
from retrotool.ann.codes import Codec, Codes, Product, Scalar, Whole
from retrotool.ann.excluded import Ids
from retrotool.errors import CorruptError
from retrotool.lazy import faiss, torch

Floats = npt.NDArray[np.float32]
_FEW = 512


@dataclass(frozen=True, eq=False, slots=True)
class Trained:
    """A training: ``centroids`` [nlist, codec.d] (None: no lists) and ``rotation`` [codec.d, d] or None.

    Centroids are of rotated vectors; they have no rows if the coarse quantiser is stored elsewhere.
    """

    d: int
    codec: Codec
    centroids: Floats | None = None
    rotation: Floats | None = None
    nlist: int = 0

    @property
    def by_residual(self) -> bool:
        """Whether codes are of residuals instead of vectors."""
        return self.centroids is not None and not isinstance(self.codec, Whole)

    def rotate(self, rows: torch.Tensor) -> torch.Tensor:
        """Rotate float32 [n, d] to the space of lists and codes, [n, codec.d]."""
        return rows if self.rotation is None else rows @ torch.from_numpy(self.rotation).to(rows.device).T

    def encode(
        self, rows: torch.Tensor, lists: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Return lists int64 [n], codes uint8 [n, size], and the summed squared errors of both.

        ``lists``: where they are known already; by default the nearest.
        """
        rotated = self.rotate(rows)
        if self.centroids is None:
            return torch.zeros(len(rows), dtype=torch.int64), self.codec.encode(rotated), 0.0, 0.0
        table = torch.from_numpy(self.centroids).to(rows.device)
        if lists is None:
            # On a GPU exact float32 is several times as slow and hardly ever gives other lists.
            distances, lists = kmeans.assign(rotated, table, rough=rows.device.type == "cuda")
        else:
            distances = (rotated - table[lists]).square().sum(1)
        aim = rotated - table[lists] if self.by_residual else rotated
        codes, off = self.codec.encode(aim), 0.0
        if not isinstance(self.codec, Whole) and len(aim):
            step = -(-len(aim) // _FEW)  # from all of the rows: neighbours in the text are alike
            few = self.codec.decode(codes[::step].cpu().numpy()).to(aim.device)
            off = float((few - aim[::step]).square().sum()) * len(aim) / len(few)
        return lists, codes, float(distances.sum()), off


def same_training(one: Trained, other: Trained) -> bool:
    """Check whether two are equal to the bit; the coarse quantiser of one may be stored elsewhere."""
    has_none = any(some.centroids is not None and not len(some.centroids) for some in (one, other))
    elsewhere = has_none and one.nlist == other.nlist

    def bits(trained: Trained) -> list[Any]:
        codec, centroids = trained.codec, None if elsewhere else trained.centroids
        fields = [trained.rotation, centroids, *(getattr(codec, name) for name in codec.__slots__)]
        arrays = [None if field is None else np.asarray(field) for field in fields]
        return [type(codec), *(None if array is None else (array.shape, array.tobytes()) for array in arrays)]

    return bits(one) == bits(other)


def to_faiss(trained: Trained, *, quantizer: bool = True) -> Any:
    """Build an empty faiss index with this training; without ``quantizer`` its coarse quantiser is empty."""
    codec = trained.codec
    if isinstance(codec, Whole):
        name = "Flat" if codec.dtype == "float32" else "SQfp16"
    else:
        name = f"PQ{codec.size}" if isinstance(codec, Product) else "SQ8"
    if trained.centroids is None:
        return faiss.index_factory(codec.d, f"IDMap2,{name}")
    index: Any = faiss.index_factory(codec.d, f"IVF{trained.nlist},{name}")
    if quantizer:
        index.quantizer.add(np.ascontiguousarray(trained.centroids))
    if isinstance(codec, Product):
        faiss.copy_array_to_vector(codec.table.ravel(), index.pq.centroids)
    elif isinstance(codec, Scalar):
        faiss.copy_array_to_vector(np.concatenate([codec.least, codec.extent]), index.sq.trained)
    else:
        index.by_residual = False
    index.is_trained = True
    if trained.rotation is None:
        return index
    matrix: Any = faiss.LinearTransform(trained.d, codec.d, False)
    faiss.copy_array_to_vector(trained.rotation.ravel(), matrix.A)
    matrix.is_trained = matrix.is_orthonormal = True
    whole = faiss.IndexPreTransform(matrix, index)
    whole.own_fields = True
    matrix.this.disown()
    index.this.disown()
    return whole


def of_faiss(index: Any) -> Trained | None:
    """Return the training of a faiss index; None if ``to_faiss`` does not build its kind."""
    if index.metric_type != faiss.METRIC_L2:
        return None
    inner: Any = index
    rotation, d = None, int(index.d)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        if chain.size() != 1:
            return None
        matrix = faiss.downcast_VectorTransform(chain.at(0))
        if not isinstance(matrix, faiss.LinearTransform) or matrix.have_bias:
            return None
        rotation = faiss.vector_to_array(matrix.A).reshape(matrix.d_out, matrix.d_in)
        inner = faiss.downcast_index(index.index)
    if isinstance(inner, faiss.IndexIDMap2) and rotation is None:
        codec = _codec(faiss.downcast_index(inner.index))
        return Trained(d, codec) if isinstance(codec, Whole) else None
    if not isinstance(inner, faiss.IndexIVF):
        return None
    coarse = faiss.downcast_index(inner.quantizer)
    codec = _codec(inner)
    if codec is None or not isinstance(coarse, faiss.IndexFlat) or coarse.ntotal not in (0, inner.nlist):
        return None
    centroids = coarse.reconstruct_n(0, coarse.ntotal) if coarse.ntotal else np.zeros((0, codec.d))
    return Trained(d, codec, np.array(centroids, np.float32), rotation, int(inner.nlist))


def _codec(index: Any) -> Codec | None:
    """Return the codec of an index without rotation, or None: whole vectors are no residuals, codes are."""
    d, by_residual = int(index.d), getattr(index, "by_residual", False)
    if isinstance(index, faiss.IndexIVFPQ) and by_residual and index.pq.nbits == 8:
        return Product(faiss.vector_to_array(index.pq.centroids).reshape(index.pq.M, 256, index.pq.dsub))
    if isinstance(index, faiss.IndexIVFFlat | faiss.IndexFlat) and not by_residual:
        return Whole(d, "float32")
    if isinstance(index, faiss.IndexIVFScalarQuantizer | faiss.IndexScalarQuantizer):
        steps = faiss.vector_to_array(index.sq.trained)
        if index.sq.qtype == faiss.ScalarQuantizer.QT_fp16 and not by_residual:
            return Whole(d)
        if index.sq.qtype == faiss.ScalarQuantizer.QT_8bit and by_residual and len(steps) == 2 * d:
            return Scalar(steps[:d], steps[d:])
    return None


CheckBytes = Callable[[int, int], object]
_WRITE_BYTES = 1 << 20
_TIE = 1e-3
_KEPT_LISTS = 64
_KEPT_JOINED = 8


class VectorLists:
    """Vectors, float16 [n, d], with ascending ids [n], in the lists ``numbers`` [n], in any order in memory.

    Without ``numbers``, an index without lists. Of centroids there is only their mean, so that a search must
    be given the lists to probe.
    """

    def __init__(
        self, ids: Ids, vectors: npt.NDArray[np.float16], numbers: npt.NDArray[np.int32] | None = None, nlist: int = 0
    ) -> None:
        d = vectors.shape[1]
        self._ids, self._vectors, centroids = ids, vectors, None
        self._order: Ids | None = None
        self._bounds = np.array([0, len(ids)])
        if numbers is not None:
            mean = vectors.mean(0, dtype=np.float32) if len(vectors) else np.zeros(d, np.float32)
            centroids, self._order = mean[None], np.argsort(numbers, kind="stable")
            self._bounds = np.searchsorted(numbers[self._order], np.arange(nlist + 1))
        self.trained = Trained(d, Whole(d), centroids, None, nlist)
        self.empty = int(np.diff(self._bounds).argmin())  # a list without vectors, if there is one

    def __len__(self) -> int:
        return len(self._ids)

    def _rows(self, number: int) -> Ids | slice:
        rows = slice(self._bounds[number], self._bounds[number + 1])
        return rows if self._order is None else self._order[rows]

    def size(self, number: int) -> int:
        """Return the number of vectors in a list."""
        return int(self._bounds[number + 1] - self._bounds[number])

    def ids(self, number: int) -> Ids:
        """Return chunk ids of a list, int64 [n], ascending."""
        return self._ids[self._rows(number)]

    def codes(self, number: int) -> Codes:
        """Return the vectors of a list as bytes, uint8 [n, 2·d]."""
        return np.ascontiguousarray(self._vectors[self._rows(number)]).view(np.uint8)

    def vectors(self, ids: Ids) -> npt.NDArray[np.float16]:
        """Return the vectors of ``ids``, float16 [n, d]."""
        return self._vectors[np.searchsorted(self._ids, ids)]


class SomeLists:
    """Lists reduced to the vectors whose ids are ``wanted``; no others are decoded or compared.

    Construction counts all ids; lists are filtered when they are read. Recent lists are cached. Thread-safe.
    """

    def __init__(self, lists: InvertedLists, wanted: Callable[[Ids], npt.NDArray[np.bool_]]) -> None:
        self.trained, self._lists, self._wanted = lists.trained, lists, wanted
        # Vectors in each list, all and wanted, int64 [nlist], or [1] without lists.
        self.whole = np.array([lists.size(number) for number in lists.numbers], np.int64)
        self.sizes = np.array([np.count_nonzero(wanted(lists.ids(number))) for number in lists.numbers], np.int64)
        self._list = lru_cache(_KEPT_LISTS)(self._read_list)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def size(self, number: int) -> int:
        """Return the number of wanted vectors in a list."""
        return int(self.sizes[number])

    def ids(self, number: int) -> Ids:
        """Return chunk ids of a list, int64 [n], ascending."""
        return self._list(number)[0]

    def codes(self, number: int) -> Codes:
        """Return codes of a list, uint8 [n, size]."""
        return self._lists.codes(number)[self._list(number)[1]]

    def _read_list(self, number: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        ids = self._lists.ids(number)
        rows = np.flatnonzero(self._wanted(ids))
        return ids[rows], rows


class JoinedLists:
    """The concatenated lists of shards of one training, for wide products; recent ones cached."""

    def __init__(self, shards: Sequence[Lists]) -> None:
        self.trained: Trained = shards[0].trained
        self._shards = shards
        self._joined = lru_cache(_KEPT_JOINED)(self._join)
        self.codes = lru_cache(_KEPT_JOINED)(self._join_codes)

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def size(self, number: int) -> int:
        """Return the number of vectors in a list."""
        return sum(shard.size(number) for shard in self._shards)

    def ids(self, number: int) -> Ids:
        """Return chunk ids of a list, int64 [n], ascending."""
        return self._joined(number)[0]

    def _join(self, number: int) -> tuple[Ids, Ids | None]:
        """Return ids, ascending, and the order of the concatenated rows; None: unchanged."""
        ids = np.concatenate([shard.ids(number) for shard in self._shards])
        if (ids[1:] > ids[:-1]).all():
            return ids, None
        order = np.argsort(ids)
        return ids[order], order

    def _join_codes(self, number: int) -> Codes:
        codes = np.concatenate([shard.codes(number) for shard in self._shards])
        order = self._joined(number)[1]
        return codes if order is None else codes[order]


class InvertedLists:
    """The lists ``numbers`` of a faiss index, as read-only views; ``check`` verifies bytes before use."""

    def __init__(self, index: Any, trained: Trained, check: CheckBytes | None = None) -> None:
        self.trained, self.numbers = trained, range(max(trained.nlist, 1))
        self.holds_quantizer = trained.centroids is not None and len(trained.centroids) > 0
        self._index = index
        inner: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        self._inverted: Any = inner.invlists if trained.centroids is not None else None
        self._flat: Any = faiss.downcast_index(inner.index) if self._inverted is None else None
        mapped: Any = None if self._inverted is None else faiss.downcast_InvertedLists(self._inverted)
        self._mapped: Any = mapped if isinstance(mapped, faiss.OnDiskInvertedLists) else None
        self._check_bytes = check

    def _check(self, number: int) -> None:
        if self._check_bytes is not None and self._mapped is not None:
            place = self._mapped.lists.at(number)
            size = self._mapped.code_size + np.dtype(np.int64).itemsize
            self._check_bytes(place.offset, place.offset + place.capacity * size)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def size(self, number: int) -> int:
        """Return the number of vectors in a list."""
        return len(self) if self._inverted is None else int(self._inverted.list_size(number))

    def ids(self, number: int) -> Ids:
        """Return chunk ids of a list, int64 [n], ascending."""
        self._check(number)
        n = self.size(number)
        pointer = self._index.id_map.data() if self._inverted is None else self._inverted.get_ids(number)
        return _view(self._index, pointer, (n,), np.int64)

    def codes(self, number: int) -> Codes:
        """Return codes of a list, uint8 [n, size]."""
        self._check(number)
        n = self.size(number)
        pointer = self._flat.codes.data() if self._inverted is None else self._inverted.get_codes(number)
        return _view(self._index, pointer, (n, self.trained.codec.size), np.uint8)

    def may_stand_for(self, number: int, rows: Ids, vectors: npt.NDArray[np.float16]) -> bool:
        """Check whether rows [n] of a list code ``vectors`` [n, d], up to float32 ties."""
        trained = self.trained
        some, codes = trained.rotate(torch.from_numpy(vectors.astype(np.float32))), self.codes(number)[rows]
        scale = _TIE * some.square().sum(1)  # accuracy of float32 products
        if trained.centroids is not None and len(trained.centroids):
            table = torch.from_numpy(trained.centroids)
            # Of very many, only nearly the nearest was searched for.
            least = kmeans.assign(some, table)[0] if len(table) <= kmeans.TWO_LEVELS else some.new_tensor(math.inf)
            if ((some - table[number]).square().sum(1) > least * (1 + _TIE) + _TIE * scale).any():
                return False
            some = some - table[number] if trained.by_residual else some
        elif trained.by_residual:
            return True  # can't be checked without the centroids
        best = trained.codec.encode(some).numpy()
        other = (best != codes).any(axis=1)
        if not other.any():
            return True
        if isinstance(trained.codec, Whole):
            return False
        off = [(trained.codec.decode(one[other]) - some[other]).square().sum(1) for one in (codes, best)]
        return bool((off[0] <= off[1] * (1 + _TIE) + _TIE * scale[other]).all())

    def is_whole(self) -> bool:
        """Check whether there are as many ids and codes as the index declares."""
        n = len(self)
        if self._inverted is not None:
            return int(self._inverted.compute_ntotal()) == n
        return int(self._index.id_map.size()) == n and int(self._flat.codes.size()) == n * self.trained.codec.size


Lists = VectorLists | SomeLists | JoinedLists | InvertedLists


def fill(index: Any, numbers: Ids, ids: Ids, codes: Codes) -> None:
    """Append codes [n, size] of chunk ids [n] to the lists ``numbers`` [n] of an index, keeping the order."""
    if not len(ids):
        return
    if isinstance(index, faiss.IndexIDMap2):
        trained = of_faiss(index)
        assert trained is not None, "built by to_faiss"
        index.add_with_ids(trained.codec.decode(codes).numpy(), ids)
        return
    inner: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    order = np.argsort(numbers, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        number, some_ids, some_codes = int(numbers[rows[0]]), ids[rows], np.ascontiguousarray(codes[rows])
        inner.invlists.add_entries(number, len(rows), faiss.swig_ptr(some_ids), faiss.swig_ptr(some_codes))
    inner.ntotal += len(ids)
    index.ntotal = inner.ntotal


def write_lists(index: Any, write: Callable[[bytes], object]) -> int:
    """Write an index in pieces; return the number of vectors it contains."""
    failed: list[BaseException] = []

    def put(data: bytes) -> None:
        try:
            write(data)
        except BaseException as error:
            failed.append(error)
            raise

    try:
        faiss.write_index(index, faiss.PyCallbackIOWriter(put, _WRITE_BYTES))
    except RuntimeError:
        if failed:  # faiss hides the callback's exception
            raise failed[0] from None
        raise
    return int(index.ntotal)


def read_lists(path: Path, trained: Trained | None = None, check: CheckBytes | None = None) -> InvertedLists:
    """Map an index file; raise ``CorruptError`` if faiss can't read it, or its kind or training differs."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CorruptError(f"{path}: faiss can't read the index: {reason}") from error
    own = of_faiss(index)
    if own is None:
        raise CorruptError(f"{path}: {type(index).__name__} is not a kind of index that retrotool writes")
    lists = InvertedLists(index, own, check)
    if not lists.is_whole():
        raise CorruptError(f"{path}: the lists do not contain the declared {len(lists):,} vectors")
    if trained is not None:
        if not same_training(own, trained):
            raise CorruptError(f"{path} does not match the training of its index")
        lists.trained = trained
    return lists


def _view(index: Any, pointer: Any, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    if not all(shape):
        return np.zeros(shape, dtype)
    interface = {"version": 3, "data": (int(pointer), True), "shape": shape, "typestr": np.dtype(dtype).str}
    # The array keeps this object, and so the index and its memory, alive.
    return np.asarray(SimpleNamespace(__array_interface__=interface, index=index))


def without(lists: InvertedLists, banned: Callable[[Ids], npt.NDArray[np.bool_]]) -> Any:
    """Return a new index with the same lists, without the ``banned`` ids."""
    index = to_faiss(lists.trained, quantizer=lists.holds_quantizer)
    for number in lists.numbers:
        ids = lists.ids(number)
        keep = ~banned(ids)
        if keep.any():
            fill(index, np.full(int(keep.sum()), number, np.int64), ids[keep], lists.codes(number)[keep])
    return index
