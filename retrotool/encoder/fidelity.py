"""How far vectors are from those of ``transformers`` in float32: by angle, and by the neighbours that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

K = 10


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of ``sample`` vectors: cosine with the true ones, the least and the mean, and recall@10.

    The recall is the share of each vector's true 10 nearest, among the sample and by squared L2, that are among its 10
    nearest here too; ``worst`` is the place of the least cosine.
    """

    sample: int
    cosine_min: float
    cosine_mean: float
    recall_at_10: float
    worst: int


def cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Cosine of each row of ``a`` [n, d] with that of ``b``, float64 [n]; two zero rows are alike."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a * b).sum(1)
    alike = (a == b).all(axis=1)
    found: npt.NDArray[np.float64] = np.where(alike, 1.0, products / np.where(lengths > 0, lengths, 1.0))
    return found


def compare(found: npt.NDArray[Any], true: npt.NDArray[Any], document: npt.NDArray[Any] | None = None) -> Fidelity:
    """Hold vectors [n, d] against the true ones. ``document`` [n]: neighbours are of other documents than the own."""
    cosine = cosines(found, true)
    same = np.eye(len(true), dtype=np.bool_) if document is None else document[:, None] == document[None, :]
    k = min(K, len(true) - int(same.sum(1).max())) if len(true) else 0
    recall = 1.0
    if k > 0:
        nearest = [_nearest(vectors, same, k) for vectors in (found, true)]
        hits = [len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True)]
        recall = float(np.mean(hits)) / k
    if not len(cosine):
        return Fidelity(0, 1.0, 1.0, 1.0, 0)
    return Fidelity(len(true), float(cosine.min()), float(cosine.mean()), recall, int(cosine.argmin()))


def _nearest(vectors: npt.NDArray[Any], same: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """Places of the k nearest of each vector, [n, k], without those that are ``same`` [n, n]."""
    wide = vectors.astype(np.float64)
    squares = (wide * wide).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * (wide @ wide.T)
    distances[same] = np.inf
    return np.argpartition(distances, k - 1, axis=1)[:, :k]
