"""The nearest of some candidates by exact distances, Σ(q − x)², from the vectors themselves, in float32.

Candidates of all queries are measured in the order of their ids, so that each vector is read, and widened to float32,
once for all queries that it is a candidate of, and what lies together on disk is read together. faiss subtracts,
squares and sums pair by pair. Cost: about 2.5 million pairs a second and core at 384 dimensions, bound by reading
queries from memory. Memory: 40 bytes a candidate, and some megabytes a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Ids
from retrotool.ann.matmul import one_thread_each

_PAIRS, _MANY_PAIRS = 1 << 12, 1 << 15

Fetch = Callable[[Ids], npt.NDArray[np.float16]]
"""Gives the vectors, float16 [n, d], of ids [n], which ascend."""


@dataclass(frozen=True, slots=True)
class Best:
    """The k nearest of q queries, both [q, k].

    ``distances`` are float32 and ascend (+inf: none); ``ids`` are int64 (−1: none).
    """

    distances: npt.NDArray[np.float32]
    ids: Ids

    def take(self, rows: slice) -> Best:
        """The same for some of the queries."""
        return Best(self.distances[rows], self.ids[rows])


def rerank(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch, k: int) -> Best:
    """The k nearest among candidates [q, c] (−1: none) by their distances from the vectors themselves, float32."""
    best = Best(np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64))

    def rank(rows: slice) -> None:
        distances = _distances(queries[rows], candidates[rows], fetch)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        best.distances[rows, : order.shape[1]] = np.take_along_axis(distances, order, 1)
        best.ids[rows, : order.shape[1]] = np.take_along_axis(candidates[rows], order, 1)

    _side_by_side(rank, candidates)
    return best


def exact_distances(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch) -> npt.NDArray[np.float32]:
    """Squared distances, float32 [q, c], of queries [q, d] to the vectors of candidates [q, c] (−1: +inf)."""
    distances = np.empty(candidates.shape, np.float32)

    def measure(rows: slice) -> None:
        distances[rows] = _distances(queries[rows], candidates[rows], fetch)

    _side_by_side(measure, candidates)
    return distances


def _side_by_side(do: Callable[[slice], None], candidates: Ids) -> None:
    """Do it for some of the queries in each thread."""
    import torch

    threads = torch.get_num_threads() if candidates.size >= _MANY_PAIRS else 1
    share = max(-(-len(candidates) // threads), 1)
    with one_thread_each(threads) as run:
        run(do, [slice(start, start + share) for start in range(0, len(candidates), share)])


def _distances(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch) -> npt.NDArray[np.float32]:
    import faiss
    import torch

    library: Any = faiss  # type checkers miss some of its names
    flat = candidates.ravel()
    distances = np.full(len(flat), np.inf, np.float32)
    order = np.argsort(flat)  # which of the same ids comes first is all the same
    order = order[np.searchsorted(flat, 0, sorter=order) :]
    asked = np.ascontiguousarray(queries, np.float32)
    for start in range(0, len(order), _PAIRS):
        pairs = order[start : start + _PAIRS]
        ids = flat[pairs]
        is_new = np.diff(ids, prepend=-1) > 0
        # torch widens float16 by the processor's instruction for it, numpy does not
        vectors = torch.from_numpy(fetch(ids[is_new])).float().numpy()
        query, vector = pairs // candidates.shape[1], np.cumsum(is_new) - 1
        apart = np.empty(len(pairs), np.float32)
        library.pairwise_indexed_L2sqr(
            asked.shape[1], len(pairs), faiss.swig_ptr(asked), faiss.swig_ptr(query), faiss.swig_ptr(vectors),
            faiss.swig_ptr(vector), faiss.swig_ptr(apart),
        )  # fmt: skip
        distances[pairs] = apart
    return distances.reshape(candidates.shape)
