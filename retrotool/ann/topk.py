"""The running k nearest of many queries: ``Heaps`` for float32 on a CPU, ``Nearest`` in torch, for GPUs and float64.

Choosing the k best of every product separately takes longer than the product. So what a query has found sets a limit,
the score of its k-th best, and of a product only better scores are kept: one comparison a score, some work for the few
that pass. Scores are larger for nearer vectors.

``Heaps`` uses faiss's heaps. Memory: 12 bytes for each of k entries a query. faiss releases the GIL, so threads can
fill the heaps of different queries.

``Nearest`` chooses the k best of the first list that a query meets, which should be its nearest, so that the limit is
tight from then on. The kept scores are cut to the k best whenever a query's row of the buffer is full. Memory: 12 bytes
for each of ``columns_for(k)`` columns a query, and about 40 bytes for each score that passes while it is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from retrotool.ann.excluded import Ids

if TYPE_CHECKING:
    import torch


class Heaps:
    """The k nearest of q queries so far."""

    def __init__(self, k: int, q: int) -> None:
        self._scores = np.full((q, k), -np.inf, np.float32)
        self._ids = np.full((q, k), -1, np.int64)
        self._heaps = _over(self._scores, self._ids)

    def offer(self, rows: torch.Tensor, scores: torch.Tensor, ids: Ids, *, first: bool = False) -> None:  # noqa: ARG002
        """Take in scores [r, n] of some of the queries, ``rows`` [r], and of vectors ``ids`` [n]; −inf: none.

        ``first`` tells nothing here.
        """
        import faiss

        asked, offered = rows.numpy(), scores.numpy()
        self._heaps.addn_query_subset_with_ids(
            len(asked), faiss.swig_ptr(asked), len(ids), faiss.swig_ptr(offered), faiss.swig_ptr(ids), 0
        )

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best scores and their ids, both [q, k], best first (−inf, −1: none)."""
        import torch

        scores, ids = self._scores.copy(), self._ids.copy()
        _over(scores, ids).reorder()
        scores[ids < 0] = -np.inf  # faiss puts its least number there
        return torch.from_numpy(scores), torch.from_numpy(ids)


def largest(scores: torch.Tensor, k: int) -> Ids:
    """Columns of the k largest of scores [r, n], the largest first, int64 [r, k]."""
    if scores.device.type != "cpu":
        return np.asarray(scores.topk(k).indices.cpu().numpy())
    import faiss

    offered = scores.float().contiguous().numpy()
    found, columns = np.empty((len(offered), k), np.float32), np.empty((len(offered), k), np.int64)
    heaps = _over(found, columns)
    heaps.heapify()
    heaps.addn(offered.shape[1], faiss.swig_ptr(offered))
    heaps.reorder()
    return columns


def _over(scores: Any, ids: Any) -> Any:
    """Heaps of faiss's over arrays [q, k]."""
    import faiss

    library: Any = faiss  # type checkers miss some of its names
    heaps = library.float_minheap_array_t()
    heaps.nh, heaps.k = scores.shape
    heaps.val, heaps.ids = faiss.swig_ptr(scores), faiss.swig_ptr(ids)
    return heaps


if TYPE_CHECKING:
    import torch

_SPARE_COLUMNS = 32


def columns_for(k: int) -> int:
    """Columns of the buffer for k nearest."""
    return k + k // 2 + _SPARE_COLUMNS


class Nearest:
    """The k nearest of q queries so far."""

    def __init__(self, k: int, q: int, *, dtype: torch.dtype, device: torch.device) -> None:
        import torch

        self._k = k
        self._scores = torch.full((q, columns_for(k)), -torch.inf, dtype=dtype, device=device)
        self._ids = torch.full((q, columns_for(k)), -1, dtype=torch.int64, device=device)
        self._used = torch.zeros(q, dtype=torch.int64, device=device)
        self._limit = torch.full((q,), -torch.inf, dtype=dtype, device=device)

    def offer(self, rows: torch.Tensor, scores: torch.Tensor, ids: Ids, *, first: bool = False) -> None:
        """Take in scores [r, n] of some of the queries, ``rows`` [r], and of vectors ``ids`` [n]; −inf: none.

        ``first``: most of these queries have found nothing yet.
        """
        import torch

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
        import torch

        counts = torch.bincount(own, minlength=len(rows))
        used = self._used[rows]
        rank = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
        full = used + counts > self._scores.shape[1]
        if bool(full.any()):
            self._cut(rows, full, counts, own, rank, scores, ids)
            rest = ~full[own]
            own, rank, scores, ids = own[rest], rank[rest], scores[rest], ids[rest]
            used, counts = used.clone(), torch.where(full, 0, counts)
        place = rows[own] * self._scores.shape[1] + used[own] + rank
        self._scores.view(-1)[place] = scores
        self._ids.view(-1)[place] = ids
        more = counts > 0
        self._used[rows[more]] = (used + counts)[more]

    def _cut(
        self,
        rows: torch.Tensor,
        full: torch.Tensor,
        counts: torch.Tensor,
        own: torch.Tensor,
        rank: torch.Tensor,
        scores: torch.Tensor,
        ids: torch.Tensor,
    ) -> None:
        """Merge what is new of the rows that are ``full`` bool [r] with what they have."""
        import torch

        width = int(counts[full].max())
        line = full.cumsum(0) - 1  # the place of a full row among the full ones
        of_full = full[own]
        place = line[own[of_full]] * width + rank[of_full]
        values = torch.full((int(full.sum()), width), -torch.inf, dtype=scores.dtype, device=scores.device)
        found = torch.full(values.shape, -1, dtype=torch.int64, device=scores.device)
        values.view(-1)[place], found.view(-1)[place] = scores[of_full], ids[of_full]
        self._merge(rows[full], values, found)

    def _merge(self, rows: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> None:
        """Cut what rows have, and scores [r, n] of ids [r, n] with it, to the k best."""
        import torch

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
        """The k best scores and their ids, both [q, k], best first (−inf, −1: none)."""
        import torch

        scores, columns = self._scores.topk(self._k)
        return scores, torch.where(torch.isneginf(scores), -1, self._ids.gather(1, columns))
