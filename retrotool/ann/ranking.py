"""Select the nearest vectors: the running k best of all products, and exact distances of candidates.

Selecting the k best of every product would take longer than the product, so only scores (larger is nearer)
that beat a query's k-th best are considered. ``Heaps``, for float32 on a CPU, uses faiss: 12 bytes per entry
and query. ``Nearest``, otherwise, uses torch: 12 bytes for each of 1.5·k columns, 40 per passing score.

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
_SPARE_COLUMNS = 32

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

    def take(self, rows: slice) -> Best:
        """Return the entries of the queries ``rows``."""
        return Best(self.distances[rows], self.ids[rows])

    def nearest(self, k: int) -> Best:
        """Return the k nearest of each query from entries in any order; ties keep their order."""
        order = np.argsort(self.distances, axis=1, kind="stable")[:, :k]
        return Best(np.take_along_axis(self.distances, order, 1), np.take_along_axis(self.ids, order, 1))

    def put(self, rows: Any, found: Best) -> None:
        """Replace the entries of the queries ``rows``, in place."""
        self.distances[rows], self.ids[rows] = found.distances, found.ids


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
    """The k nearest of q queries so far, on a CPU. Threads may fill separate rows; faiss drops the GIL."""

    def __init__(self, k: int, q: int) -> None:
        self._scores = np.full((q, k), -np.inf, np.float32)
        self._ids = np.full((q, k), -1, np.int64)
        self._heaps = _over(self._scores, self._ids)

    def offer(self, rows: torch.Tensor, scores: torch.Tensor, ids: Ids, *, first: bool = False) -> None:  # noqa: ARG002
        """Add scores [r, n] of queries ``rows`` [r] and vectors ``ids`` [n]; −inf: none."""
        asked, offered = rows.numpy(), scores.numpy()
        self._heaps.addn_query_subset_with_ids(
            len(asked), faiss.swig_ptr(asked), len(ids), faiss.swig_ptr(offered), faiss.swig_ptr(ids), 0
        )

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best scores and their ids, [q, k] each, best first (−inf, −1: none)."""
        scores, ids = self._scores.copy(), self._ids.copy()
        _over(scores, ids).reorder()
        scores[ids < 0] = -np.inf  # faiss uses its lowest number
        return torch.from_numpy(scores), torch.from_numpy(ids)


def largest(scores: torch.Tensor, k: int) -> Ids:
    """Return the columns of the k largest scores of [r, n], largest first, int64 [r, k]."""
    if scores.device.type != "cpu":
        return np.asarray(scores.topk(k).indices.cpu().numpy())
    offered = scores.float().contiguous().numpy()
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


class Nearest:
    """The k nearest of q queries so far, in torch; a full row of the buffer is reduced to the k best.

    The first list offered to a query should be its nearest, to set a tight limit.
    """

    def __init__(self, k: int, q: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._k, columns = k, k + k // 2 + _SPARE_COLUMNS
        self._scores = torch.full((q, columns), -torch.inf, dtype=dtype, device=device)
        self._ids = torch.full((q, columns), -1, dtype=torch.int64, device=device)
        self._used = torch.zeros(q, dtype=torch.int64, device=device)
        self._limit = torch.full((q,), -torch.inf, dtype=dtype, device=device)

    def offer(self, rows: torch.Tensor, scores: torch.Tensor, ids: Ids, *, first: bool = False) -> None:
        """Add scores as ``Heaps.offer`` does; ``first``: most of these queries have no results yet."""
        there = torch.from_numpy(ids).to(scores.device)
        if first:
            best, columns = scores.topk(min(self._k, len(ids)), sorted=False)
            self._merge(rows, best, there[columns])
            return
        better = torch.gt(scores, self._limit[rows].unsqueeze(1)).view(-1)
        passed = better.nonzero().view(-1)
        if len(passed):
            own = torch.div(passed, len(ids), rounding_mode="floor")
            self._put(rows, own, scores.reshape(-1)[passed], there[passed - own * len(ids)])

    def _put(self, rows: torch.Tensor, own: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> None:
        """Add scores [m] of ``ids`` [m] to rows[own], where ``own`` [m] ascends."""
        counts = torch.bincount(own, minlength=len(rows))
        used = self._used[rows]
        rank = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
        full = used + counts > self._scores.shape[1]
        if bool(full.any()):
            # Merge the new scores of full rows with their old ones.
            width = int(counts[full].max())
            line = full.cumsum(0) - 1  # index among the full rows
            of_full = full[own]
            place = line[own[of_full]] * width + rank[of_full]
            values = torch.full((int(full.sum()), width), -torch.inf, dtype=scores.dtype, device=scores.device)
            found = torch.full(values.shape, -1, dtype=torch.int64, device=scores.device)
            values.view(-1)[place], found.view(-1)[place] = scores[of_full], ids[of_full]
            self._merge(rows[full], values, found)
            rest = ~of_full
            own, rank, scores, ids = own[rest], rank[rest], scores[rest], ids[rest]
            used, counts = used.clone(), torch.where(full, 0, counts)
        place = rows[own] * self._scores.shape[1] + used[own] + rank
        self._scores.view(-1)[place] = scores
        self._ids.view(-1)[place] = ids
        more = counts > 0
        self._used[rows[more]] = (used + counts)[more]

    def _merge(self, rows: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> None:
        if bool(self._used[rows].any()):
            scores, ids = torch.cat([self._scores[rows], scores], 1), torch.cat([self._ids[rows], ids], 1)
        scores, columns = scores.topk(min(self._k, scores.shape[1]), sorted=False)
        kept = scores.shape[1]
        self._scores[rows] = -torch.inf
        self._scores[rows, :kept], self._ids[rows, :kept] = scores, ids.gather(1, columns)
        self._used[rows] = kept
        if kept == self._k:
            self._limit[rows] = scores.amin(1)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best scores and their ids, [q, k] each, best first (−inf, −1: none)."""
        scores, columns = self._scores.topk(self._k)
        return scores, torch.where(torch.isneginf(scores), -1, self._ids.gather(1, columns))
