"""The running k nearest of many queries in torch's terms, for GPUs and for float64; ``ann.heaps`` is for the rest.

To choose the k best of each product takes longer than the product. So what a query has found sets a limit, the score of
its k-th best, and of a product only what is better is kept: one comparison a score, some work for the few that pass.
Of the first list that a query meets, which should be its nearest, the k best are chosen, so that the limit is tight
from then on. What was kept is cut to the k best whenever a query's row of the buffer is full.

Scores are the larger the nearer. Memory: 12 bytes for each of ``columns_for(k)`` columns a query; while scores are
looked at, some 40 bytes for each that passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrotool.ann.excluded import Ids

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
