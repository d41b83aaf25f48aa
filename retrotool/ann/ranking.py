"""Select the nearest vectors: the running k best of all products, and exact distances of candidates.

Selecting the k best of every product would take longer than the product, so only scores (larger is nearer)
that beat a query's k-th best are considered: ``Heaps``, in faiss, with 12 bytes per entry and query.

``rerank`` computes Σ(q − x)² in float32, in order of id, so that each vector is read once: about 2.5 million
pairs per second and core at 384 dimensions. Memory: 40 bytes per candidate and some megabytes per thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Ids
from retrotool.ann.matmul import one_thread_each
from retrotool.lazy import faiss, torch

_PAIRS, _MANY_PAIRS = 1 << 12, 1 << 15
_FEW_COLUMNS = 32
_COMPARED = 256  # queries compared at a time

Fetch = Callable[[Ids], npt.NDArray[np.float16]]  # returns the vectors, float16 [n, d], of ascending ids [n]


@dataclass(frozen=True, slots=True)
class Best:
    """The k nearest of q queries [q, k]: ascending float32 ``distances`` (+inf: none), int64 ``ids`` (−1)."""

    distances: npt.NDArray[np.float32]
    ids: Ids

    @classmethod
    def nothing(cls, q: int, k: int) -> Best:
        """Return an empty result for q queries."""
        return cls(np.full((q, k), np.inf, np.float32), np.full((q, k), -1, np.int64))

    def take(self, rows: Ids | slice) -> Best:
        """Return the entries of the queries ``rows``."""
        return Best(self.distances[rows], self.ids[rows])

    def nearest(self, k: int) -> Best:
        """Return the k nearest of each query from entries in any order; of equal ones the least ids."""
        order = np.argsort(self.distances, axis=1, kind="stable")
        near = np.take_along_axis(self.distances, order, 1)
        tied = np.flatnonzero(((near[:, 1:] == near[:, :-1]) & np.isfinite(near[:, 1:])).any(axis=1))
        order[tied] = np.lexsort((self.ids[tied], self.distances[tied]), axis=1)
        order = order[:, :k]
        return Best(np.take_along_axis(self.distances, order, 1), np.take_along_axis(self.ids, order, 1))

    def put(self, rows: Any, found: Best) -> None:
        """Replace the entries of the queries ``rows``, in place."""
        self.distances[rows], self.ids[rows] = found.distances, found.ids


def merged(one: Best, other: Best, k: int) -> Best:
    """Merge two results [q, ·] into the k nearest, without repeated ids."""
    again = are_among(other.ids, one.ids)
    distances = np.concatenate([one.distances, np.where(again, np.inf, other.distances)], 1)
    return Best(distances, np.concatenate([one.ids, np.where(again, -1, other.ids)], 1)).nearest(k)


def are_among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Check which ``ids`` [q, n], except −1, are among ``others`` [q, m] of the same query."""
    blocks = [slice(start, start + _COMPARED) for start in range(0, max(len(ids), 1), _COMPARED)]
    same = [(ids[block, :, None] == others[block, None, :]).any(axis=2) for block in blocks]
    return np.concatenate(same) & (ids >= 0)


def rerank(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch, k: int) -> Best:
    """Return the k nearest of candidates [q, c] (−1: none) by exact float32 distances."""
    best = Best.nothing(len(queries), k)

    def rank(rows: slice) -> None:
        found = Best(_distances(queries[rows], candidates[rows], fetch), candidates[rows]).nearest(k)
        best.put((rows, slice(found.ids.shape[1])), found)

    _side_by_side(rank, candidates)
    return best


def exact_distances(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch) -> npt.NDArray[np.float32]:
    """Return squared distances, float32 [q, c], of queries [q, d] to candidates [q, c] (−1: +inf)."""
    distances = np.empty(candidates.shape, np.float32)

    def measure(rows: slice) -> None:
        distances[rows] = _distances(queries[rows], candidates[rows], fetch)

    _side_by_side(measure, candidates)
    return distances


def _side_by_side(do: Callable[[slice], None], candidates: Ids) -> None:
    threads = torch.get_num_threads() if candidates.size >= _MANY_PAIRS else 1
    share = max(-(-len(candidates) // threads), 1)
    with one_thread_each(threads) as run:
        run(do, [slice(start, start + share) for start in range(0, len(candidates), share)])


def _distances(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch) -> npt.NDArray[np.float32]:
    flat = candidates.ravel()
    distances = np.full(len(flat), np.inf, np.float32)
    order = np.argsort(flat)  # the order of equal ids is irrelevant
    order = order[np.searchsorted(flat, 0, sorter=order) :]
    asked = np.ascontiguousarray(queries, np.float32)
    for start in range(0, len(order), _PAIRS):
        pairs = order[start : start + _PAIRS]
        ids = flat[pairs]
        is_new = np.diff(ids, prepend=-1) > 0
        # torch converts float16 in hardware, numpy does not
        vectors = torch.from_numpy(fetch(ids[is_new])).float().numpy()
        query, vector = pairs // candidates.shape[1], np.cumsum(is_new) - 1
        apart = np.empty(len(pairs), np.float32)
        faiss.pairwise_indexed_L2sqr(
            asked.shape[1], len(pairs), faiss.swig_ptr(asked), faiss.swig_ptr(query), faiss.swig_ptr(vectors),
            faiss.swig_ptr(vector), faiss.swig_ptr(apart),
        )  # fmt: skip
        distances[pairs] = apart
    return distances.reshape(candidates.shape)


class Heaps:
    """The k nearest of q queries so far. Threads may fill separate rows; faiss drops the GIL."""

    def __init__(self, k: int, q: int) -> None:
        self._scores = np.full((q, k), -np.inf, np.float32)
        self._ids = np.full((q, k), -1, np.int64)
        self._heaps = _over(self._scores, self._ids)

    def offer(self, rows: torch.Tensor, scores: torch.Tensor, ids: Ids) -> None:
        """Add scores [r, n] of queries ``rows`` [r] and vectors ``ids`` [n]; −inf: none."""
        asked, offered = rows.numpy(), scores.numpy()
        self._heaps.addn_query_subset_with_ids(
            len(asked), faiss.swig_ptr(asked), len(ids), faiss.swig_ptr(offered), faiss.swig_ptr(ids), 0
        )

    def best(self) -> tuple[npt.NDArray[np.float32], Ids]:
        """Return the k best scores and their ids, [q, k] each, best first (−inf, −1: none)."""
        scores, ids = self._scores.copy(), self._ids.copy()
        _over(scores, ids).reorder()
        scores[ids < 0] = -np.inf  # faiss uses its lowest number
        return scores, ids


def largest(scores: torch.Tensor, k: int) -> Ids:
    """Return the columns of the k largest scores of [r, n], largest first, int64 [r, k]."""
    offered = scores.float().contiguous().numpy()
    if k < offered.shape[1] < _FEW_COLUMNS * k:  # where numpy is several times as fast as heaps
        chosen = np.argpartition(-offered, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(offered, chosen, 1), axis=1, kind="stable")
        return np.take_along_axis(chosen, order, 1)
    found, columns = np.empty((len(offered), k), np.float32), np.empty((len(offered), k), np.int64)
    heaps = _over(found, columns)
    heaps.heapify()
    heaps.addn(offered.shape[1], faiss.swig_ptr(offered))
    heaps.reorder()
    return columns


def _over(scores: Any, ids: Any) -> Any:
    heaps = faiss.float_minheap_array_t()
    heaps.nh, heaps.k = scores.shape
    heaps.val, heaps.ids = faiss.swig_ptr(scores), faiss.swig_ptr(ids)
    return heaps
