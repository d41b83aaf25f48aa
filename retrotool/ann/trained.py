"""A trained index without vectors (centroids, rotation, codec), converted to faiss objects and back.

The kinds of faiss index are listed in ``docs/format.md``. Readers supply a coarse quantiser that is omitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.codes import Codec, Product, Scalar, Whole, is_same_codec
from retrotool.ann.kmeans import assign
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

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Return lists int64 [n], codes uint8 [n, size], and the summed squared errors of both."""
        rotated = self.rotate(rows)
        if self.centroids is None:
            return torch.zeros(len(rows), dtype=torch.int64), self.codec.encode(rotated), 0.0, 0.0
        table = torch.from_numpy(self.centroids).to(rows.device)
        # On a GPU exact float32 is several times as slow and hardly ever gives other lists.
        distances, lists = assign(rotated, table, rough=rows.device.type == "cuda")
        aim = rotated - table[lists] if self.by_residual else rotated
        codes, off = self.codec.encode(aim), 0.0
        if not isinstance(self.codec, Whole) and len(aim):
            few = self.codec.decode(codes[:_FEW].cpu().numpy()).to(aim.device)
            off = float((few - aim[:_FEW]).square().sum()) * len(aim) / len(few)
        return lists, codes, float(distances.sum()), off


def same_training(one: Trained, other: Trained) -> bool:
    """Check whether two are equal to the bit; the coarse quantiser of one may be stored elsewhere."""

    def equal(a: Floats | None, b: Floats | None) -> bool:
        return a is b if a is None or b is None else a.shape == b.shape and a.tobytes() == b.tobytes()

    beside = one.nlist == other.nlist and 0 in (_rows(one), _rows(other))
    return (
        is_same_codec(one.codec, other.codec)
        and equal(one.rotation, other.rotation)
        and (beside or equal(one.centroids, other.centroids))
    )


def _rows(trained: Trained) -> int:
    return -1 if trained.centroids is None else len(trained.centroids)


def to_faiss(trained: Trained, *, quantizer: bool = True) -> Any:
    """Build an empty faiss index with this training; without ``quantizer`` its coarse quantiser is empty."""
    codec, d = trained.codec, trained.codec.d
    if trained.centroids is None:
        return faiss.IndexIDMap2(_flat(codec))
    coarse: Any = faiss.IndexFlatL2(d)
    if quantizer:
        coarse.add(np.ascontiguousarray(trained.centroids))
    index: Any
    if isinstance(codec, Product):
        index = faiss.IndexIVFPQ(coarse, d, trained.nlist, codec.size, 8, faiss.METRIC_L2)
        faiss.copy_array_to_vector(codec.table.ravel(), index.pq.centroids)
    elif isinstance(codec, Scalar):
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(coarse, d, trained.nlist, kind, faiss.METRIC_L2, True)
        faiss.copy_array_to_vector(np.concatenate([codec.least, codec.extent]), index.sq.trained)
    elif codec == Whole(d, "float32"):
        index = faiss.IndexIVFFlat(coarse, d, trained.nlist, faiss.METRIC_L2)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(coarse, d, trained.nlist, kind, faiss.METRIC_L2, False)
    index.own_fields = True
    coarse.this.disown()
    index.is_trained = True
    return index if trained.rotation is None else _rotated(index, trained)


def _flat(codec: Codec) -> Any:
    if codec == Whole(codec.d, "float32"):
        return faiss.IndexFlatL2(codec.d)
    if codec == Whole(codec.d):
        return faiss.IndexScalarQuantizer(codec.d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    raise ValueError("an index without lists holds whole vectors")


def _rotated(index: Any, trained: Trained) -> Any:
    assert trained.rotation is not None
    matrix: Any = faiss.LinearTransform(trained.d, trained.codec.d, False)
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
        whole = _whole(faiss.downcast_index(inner.index))
        return None if whole is None else Trained(d, whole)
    if not isinstance(inner, faiss.IndexIVF):
        return None
    coarse = faiss.downcast_index(inner.quantizer)
    codec = _codec(inner)
    if codec is None or not isinstance(coarse, faiss.IndexFlat) or coarse.ntotal not in (0, inner.nlist):
        return None
    centroids = coarse.reconstruct_n(0, coarse.ntotal) if coarse.ntotal else np.zeros((0, codec.d))
    return Trained(d, codec, np.array(centroids, np.float32), rotation, int(inner.nlist))


def _codec(index: Any) -> Codec | None:
    d = int(index.d)
    if isinstance(index, faiss.IndexIVFPQ):
        pq = index.pq
        if not index.by_residual or pq.nbits != 8:
            return None
        return Product(faiss.vector_to_array(pq.centroids).reshape(pq.M, 256, pq.dsub))
    if isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_8bit:
        steps = faiss.vector_to_array(index.sq.trained)
        return Scalar(steps[:d], steps[d:]) if index.by_residual and len(steps) == 2 * d else None
    return None if getattr(index, "by_residual", False) else _whole(index)


def _whole(index: Any) -> Whole | None:
    if isinstance(index, faiss.IndexIVFFlat | faiss.IndexFlat):
        return Whole(int(index.d), "float32")
    scalar = isinstance(index, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer)
    return Whole(int(index.d)) if scalar and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16 else None
