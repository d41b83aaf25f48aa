"""The running k nearest of many queries on a CPU, in faiss's heaps: one comparison a score, a step for what is nearer.

To choose the k best of every product on its own takes longer than the product. A heap's worst is the limit that a score
has to beat, and after the first list few do. Scores are float32, the larger the nearer. Memory: 12 bytes for each of k
entries a query. faiss gives the GIL free meanwhile, so threads can fill the heaps of different queries.
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
