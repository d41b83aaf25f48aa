"""List-major search: queries are grouped by the lists they probe, one matrix product a list, top-k, merge.

Against searching query by query this turns matrix–vector into matrix–matrix products. A query's own document is an
interval of chunk ids, and ids ascend in a list, so excluding it is an interval of columns, found by binary search
and masked before the top-k together with tombstones. Memory: the queries, k results each, and one block of
``BLOCK_ENTRIES`` distances.

Not done here: compressed codes and re-ranking; vectors are the stored float16 embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Ids, InvertedLists

BLOCK_ENTRIES = 1 << 24
_BLOCK_COLUMNS = 1 << 14

Banned = Callable[[Ids], npt.NDArray[np.bool_]]
"""Tells which ids must not be found."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries float32 [q, d], and the interval of chunk ids [first, last] that each must not find.

    The interval is empty if first > last.
    """

    vectors: npt.NDArray[np.float32]
    first: Ids
    last: Ids

    @classmethod
    def plain(cls, vectors: npt.NDArray[np.float32]) -> Queries:
        """Queries that may find anything."""
        return cls(vectors, np.zeros(len(vectors), np.int64), np.full(len(vectors), -1, np.int64))


class Best:
    """The k nearest found so far, both [q, k].

    ``distances`` are float32 and ascend (+inf: none); ``ids`` are int64 (−1: none).
    """

    def __init__(self, q: int, k: int) -> None:
        self.distances = np.full((q, k), np.inf, np.float32)
        self.ids = np.full((q, k), -1, np.int64)

    def merge(self, rows: Ids, distances: npt.NDArray[np.float32], ids: Ids) -> None:
        """Take in candidates [r, c] of the queries ``rows`` [r], each row once."""
        k = self.ids.shape[1]
        all_distances = np.concatenate([self.distances[rows], distances], axis=1)
        all_ids = np.concatenate([self.ids[rows], ids], axis=1)
        order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
        self.distances[rows] = np.take_along_axis(all_distances, order, 1)
        self.ids[rows] = np.take_along_axis(all_ids, order, 1)


def search(lists: InvertedLists, queries: Queries, nprobe: int, banned: Banned, best: Best) -> None:
    """Merge into ``best`` what ``queries`` find in ``lists``, probing ``nprobe`` lists each."""
    for number, rows in _by_list(lists, queries.vectors, nprobe):
        ids, vectors = lists.ids[number], lists.vectors[number]
        for start in range(0, len(ids), _BLOCK_COLUMNS):
            part = slice(start, start + _BLOCK_COLUMNS)
            _search_block(ids[part], vectors[part], queries, rows, banned, best)


def _by_list(lists: InvertedLists, vectors: npt.NDArray[np.float32], nprobe: int) -> list[tuple[int, Ids]]:
    """(list, queries that probe it), lists ascending."""
    if lists.centroids is None:
        return [(0, np.arange(len(vectors)))]
    probed = nearest_lists(lists.centroids, vectors, nprobe)
    order = np.argsort(probed.ravel(), kind="stable")
    flat = probed.ravel()[order]
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    groups = np.split(order // probed.shape[1], starts[1:])
    return list(zip(flat[starts].tolist(), groups, strict=True))


def nearest_lists(centroids: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32], nprobe: int) -> Ids:
    """The ``nprobe`` nearest centroids of each vector, int64 [q, nprobe], in no order."""
    import torch

    table = torch.from_numpy(centroids)
    if nprobe == 1:
        return assign(torch.from_numpy(vectors), table)[1].numpy().reshape(-1, 1)
    half_norms = table.square().sum(1) / 2
    block = max(1, BLOCK_ENTRIES // len(table))
    found = [
        torch.addmm(-half_norms, rows, table.T).topk(min(nprobe, len(table)), sorted=False).indices
        for rows in torch.split(torch.from_numpy(vectors), block)
    ]
    return torch.cat(found).numpy()


def _search_block(
    ids: Ids, vectors: npt.NDArray[np.float16], queries: Queries, rows: Ids, banned: Banned, best: Best
) -> None:
    """Search one run of a list's vectors for the queries ``rows``."""
    import torch

    keep = ~banned(ids)
    if not keep.all():
        ids, vectors = ids[keep], vectors[keep]
    if not len(ids):
        return
    columns = torch.from_numpy(np.asarray(vectors, np.float32))
    norms = columns.square().sum(1)
    k = min(best.ids.shape[1], len(ids))
    for chosen in np.array_split(rows, -(-len(rows) * len(ids) // BLOCK_ENTRIES)):
        wanted = torch.from_numpy(queries.vectors[chosen])
        distances = torch.addmm(norms, wanted, columns.T, alpha=-2)
        _mask_intervals(distances, ids, queries.first[chosen], queries.last[chosen])
        near, place = distances.topk(k, largest=False)
        near = (near + wanted.square().sum(1, keepdim=True)).clamp_min_(0)
        found = np.where(np.isinf(near.numpy()), -1, ids[place.numpy()])
        best.merge(chosen, near.numpy(), found)


def _mask_intervals(distances: object, ids: Ids, first: Ids, last: Ids) -> None:
    """Set to +inf the distances [r, c] to ids (ascending, [c]) in each row's interval [first, last]."""
    import torch

    assert isinstance(distances, torch.Tensor)
    low = np.searchsorted(ids, first)
    width = np.maximum(np.searchsorted(ids, last, side="right") - low, 0)
    rows = np.repeat(np.arange(len(width)), width)
    if len(rows):
        within = np.arange(len(rows)) - np.repeat(np.cumsum(width) - width, width)
        distances[torch.from_numpy(rows), torch.from_numpy(np.repeat(low, width) + within)] = float("inf")
