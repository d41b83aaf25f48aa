"""List-major search: queries are grouped by the lists they probe, one matrix product a list, top-k, exact distances.

Against searching query by query this turns matrix–vector into matrix–matrix products. It goes in two steps:

1. ``Search`` chooses candidates by what the codes stand for. Distances of all vectors of a query's lists are laid side
   by side and the least are kept, round by round, over any number of shards. Both sides of a product are shifted by a
   mean first, which changes no distance: products lose digits where vectors have much in common.
2. ``rerank`` computes Σ(q − x)² from the vectors themselves, which the caller fetches by id.

What a query must not find is masked before the best are taken. Its own document is an interval of chunk ids, and ids
ascend in a list, so that is an interval of columns, found by binary search.

Memory: queries twice, candidates, and ``room`` bytes for distances and the vectors of lists. What it is not enough for
is done in more steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries, mask
from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Ids, Lists
from retrotool.ann.products import Table
from retrotool.ann.trained import Floats, Trained

if TYPE_CHECKING:
    import torch

ROOM = 1 << 27
"""Bytes for distances and decoded vectors: with more it gets no faster."""
_COLUMNS = 1 << 14
_PAIRS = 1 << 9
SPARE = 8
"""Candidates beyond k where codes are whole vectors: of distances that products can't tell apart, the true decide."""

Banned = Callable[[Ids], npt.NDArray[np.bool_]]
"""Tells which ids must not be found."""
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


def nothing_banned(ids: Ids) -> npt.NDArray[np.bool_]:
    """Ban no id."""
    return np.zeros(len(ids), np.bool_)


class Search:
    """A search of some queries through the shards of one index, for ``depth`` candidates each.

    ``precise``: products in float64, twice the time, for a truth that others are held against. ``device`` does the
    products and finds the best; lists are decoded on the CPU. ``room``: bytes for distances and decoded vectors.
    """

    def __init__(
        self,
        trained: Trained,
        queries: Queries,
        nprobe: int,
        depth: int,
        banned: Banned,
        *,
        precise: bool = False,
        device: str = "cpu",
        room: int = ROOM,
    ) -> None:
        import torch

        self.scanned = 0
        """Codes that were compared with a query, over all queries."""
        self._trained, self._banned, self._excluded = trained, banned, queries.excluded
        self._device = torch.device(device)
        rotated = trained.rotate(torch.from_numpy(queries.vectors).to(self._device))
        self._groups = _by_list(trained, rotated, nprobe)
        self._dtype = torch.float64 if precise else torch.float32
        self._rotated = rotated
        self._shift: Any = None if trained.centroids is None else torch.from_numpy(trained.centroids).mean(0)
        q = len(rotated)
        # A truth is sought once, in twice the memory a distance: fewer queries at a time cost little there.
        self._entries = room // 8 // (4 if precise else 1)
        self._columns = max(1, min(_COLUMNS, room // 2 // (trained.codec.d * (12 if precise else 4))))
        self._scores = torch.full((q, depth), torch.inf, dtype=self._dtype, device=self._device)
        self._ids = np.full((q, depth), -1, np.int64)

    def add(self, shard: Lists) -> None:
        """Take in what the queries find in a shard."""
        if self._shift is None:
            self._shift = _mean(shard)
        self._wanted = (self._rotated - self._shift.to(self._device)).to(self._dtype)
        # Blocks of queries, each as wide as the lists that they probe: the more that is, the fewer at a time.
        sizes = np.array([shard.size(number) for number, _ in self._groups], np.int64)
        width = np.zeros(len(self._rotated), np.int64)
        for size, (_, rows) in zip(sizes, self._groups, strict=True):
            width[rows] += size
        self.scanned += int(width.sum())
        widest = max(1, min(int(width.max(initial=0)), self._columns))
        block = max(1, self._entries // widest)
        for start in range(0, len(width), block):
            self._add_block(shard, start, min(start + block, len(width)), widest)

    def _add_block(self, shard: Lists, start: int, stop: int, widest: int) -> None:
        found = _Round(stop - start, widest, self._scores)
        for number, rows in self._groups:
            some = rows[(rows >= start) & (rows < stop)] if stop - start < len(self._rotated) else rows
            n = shard.size(number)
            if not len(some) or not n:
                continue
            ids = shard.ids(number)
            banned = self._banned(ids)
            for low in range(0, n, self._columns):
                part = slice(low, min(low + self._columns, n))
                if not found.has_room(some - start, part.stop - part.start):
                    self._keep(found, start, stop)
                scores = self._distances(shard, number, part, some)
                if banned[part].any():
                    scores[:, np.flatnonzero(banned[part])] = np.inf
                mask(scores, ids[part], self._excluded.take(some))
                found.put(some - start, scores, ids[part])
        self._keep(found, start, stop)

    def _distances(self, shard: Lists, number: int, part: slice, rows: Ids) -> torch.Tensor:
        """Squared distances less |q|², [rows, columns], of some vectors of a list."""
        import torch

        columns = self._trained.codec.decode(shard.codes(number)[part])
        if self._trained.by_residual:
            assert self._trained.centroids is not None
            columns.add_(torch.from_numpy(self._trained.centroids[number]) - self._shift)
        else:
            columns.sub_(self._shift)
        columns = columns.to(self._device, self._dtype)
        wanted = self._wanted.index_select(0, torch.from_numpy(rows).to(self._device))
        return torch.addmm(columns.square().sum(1), wanted, columns.T, alpha=-2)

    def _keep(self, found: _Round, start: int, stop: int) -> None:
        """Keep the best of a round and of what was there."""
        import torch

        scores, ids = found.take(self._scores.shape[1])
        scores = torch.cat([self._scores[start:stop], scores], 1)
        ids = np.concatenate([self._ids[start:stop], ids], 1)
        self._scores[start:stop], order = scores.topk(self._scores.shape[1], largest=False)
        self._ids[start:stop] = np.take_along_axis(ids, order.cpu().numpy(), 1)

    @property
    def candidates(self) -> Ids:
        """Ids of the candidates, int64 [q, depth], nearest by their codes first (−1: none)."""
        return np.where(np.isfinite(self._scores.cpu().numpy()), self._ids, -1)


class _Round:
    """Distances of vectors of several lists, side by side for each query, until there is no more room."""

    def __init__(self, q: int, width: int, like: torch.Tensor) -> None:
        import torch

        self._scores = torch.full((q, width), torch.inf, dtype=like.dtype, device=like.device)
        self._used = np.zeros(q, np.int64)
        self._segments: list[tuple[Ids, Ids, Ids]] = []  # queries, their first column, ids

    def has_room(self, rows: Ids, n: int) -> bool:
        """Whether ``n`` more distances fit for all of ``rows``."""
        return int(self._used[rows].max()) + n <= self._scores.shape[1]

    def put(self, rows: Ids, scores: torch.Tensor, ids: Ids) -> None:
        """Add distances [rows, n] of ``ids`` [n]."""
        import torch

        n, width = len(ids), self._scores.shape[1]
        first = self._used[rows]
        if len(rows) == len(self._scores) and not first.any():
            self._scores[:, :n] = scores
        else:
            place = torch.from_numpy(rows * width + first).unsqueeze(1) + torch.arange(n)
            self._scores.view(-1)[place.view(-1).to(self._scores.device)] = scores.reshape(-1)
        self._segments.append((rows, first, ids))
        self._used[rows] += n

    def take(self, k: int) -> tuple[torch.Tensor, Ids]:
        """The k least distances and their ids, both [q, ≤ k], and begin anew."""
        import torch

        used = int(self._used.max(initial=0))
        q = len(self._scores)
        scores, columns = self._scores[:, :used].topk(min(k, used), largest=False, sorted=False)
        ids = self._ids_at(columns.cpu().numpy())
        ids[~np.isfinite(scores.cpu().numpy())] = -1
        if used:
            self._scores[:, :used] = torch.inf
        self._used = np.zeros(q, np.int64)
        self._segments = []
        return scores, ids

    def _ids_at(self, columns: Ids) -> Ids:
        """Ids at columns [q, c]: which segment of the query it is, and where in it."""
        if not self._segments or not columns.size:
            return np.full(columns.shape, -1, np.int64)
        ids = np.concatenate([some for _, _, some in self._segments])
        starts = np.cumsum([0, *(len(some) for _, _, some in self._segments)])[:-1]
        counts = [len(rows) for rows, _, _ in self._segments]
        rows = np.concatenate([rows for rows, _, _ in self._segments])
        first = np.concatenate([first for _, first, _ in self._segments])
        shift = np.repeat(starts, counts) - first  # from a column of the query to a place in ids
        order = np.lexsort((first, rows))
        width = self._scores.shape[1] + 1
        keys = rows[order] * width + first[order]
        wanted = np.arange(len(columns))[:, None] * width + columns
        at = np.searchsorted(keys, wanted.ravel(), side="right") - 1
        place = columns.ravel() + shift[order][np.maximum(at, 0)]
        # A query that found less than others has columns that belong to nothing.
        found: Ids = ids[np.clip(place, 0, len(ids) - 1)].reshape(columns.shape)
        return found


def _by_list(trained: Trained, rotated: torch.Tensor, nprobe: int) -> list[tuple[int, Ids]]:
    """(list, queries that probe it), lists ascending, and queries in each."""
    if trained.centroids is None:
        return [(0, np.arange(len(rotated)))]
    probed = nearest_lists(trained.centroids, rotated, nprobe)
    order = np.argsort(probed.ravel(), kind="stable")
    flat = probed.ravel()[order]
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    groups = np.split(order // probed.shape[1], starts[1:])
    return list(zip(flat[starts].tolist(), groups, strict=True))


def nearest_lists(centroids: Floats, vectors: torch.Tensor, nprobe: int) -> Ids:
    """The ``nprobe`` nearest centroids of each vector, int64 [q, nprobe], in no order."""
    import torch

    table = torch.from_numpy(centroids).to(vectors.device)
    if nprobe == 1:
        return assign(vectors, table)[1].cpu().numpy().reshape(-1, 1)
    shift = table.mean(0)
    table = table - shift
    products = Table(table, -table.square().sum(1) / 2)
    found = [
        products.scores(rows - shift).topk(min(nprobe, len(table)), sorted=False).indices
        for rows in torch.split(vectors, products.rows)
    ]
    return torch.cat(found).cpu().numpy()


def _mean(shard: Lists) -> torch.Tensor:
    """Roughly the mean of the vectors of a shard without lists, float32 [d]."""
    import torch

    sample = shard.codes(0)[:: max(1, len(shard) // _COLUMNS)]
    return shard.trained.codec.decode(sample).mean(0) if len(sample) else torch.zeros(shard.trained.codec.d)


def rerank(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch, k: int) -> Best:
    """The k nearest among candidates [q, c] (−1: none) by their distances from the vectors themselves, float32."""
    distances = exact_distances(queries, candidates, fetch)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    best = Best(np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
    best.distances[:, : order.shape[1]] = np.take_along_axis(distances, order, 1)
    best.ids[:, : order.shape[1]] = np.take_along_axis(candidates, order, 1)
    return best


def exact_distances(queries: npt.NDArray[np.float32], candidates: Ids, fetch: Fetch) -> npt.NDArray[np.float32]:
    """Squared distances, float32 [q, c], of queries [q, d] to the vectors of candidates [q, c] (−1: +inf)."""
    import torch

    distances = np.full(candidates.size, np.inf, np.float32)
    flat = candidates.ravel()
    found = np.flatnonzero(flat >= 0)
    found = found[np.argsort(flat[found], kind="stable")]  # what lies together is read together
    wanted = torch.from_numpy(queries)
    # In memory that is used again and again: fresh memory of this size costs more than the arithmetic.
    one, other = torch.empty(2, _PAIRS, queries.shape[1])
    for start in range(0, len(found), _PAIRS):
        pairs = found[start : start + _PAIRS]
        n = len(pairs)
        vectors: Any = torch.from_numpy(fetch(flat[pairs]))
        rows = torch.from_numpy(pairs // candidates.shape[1])
        apart = torch.index_select(wanted, 0, rows, out=one[:n]).sub_(other[:n].copy_(vectors))
        distances[pairs] = apart.square_().sum(1).numpy()
    return distances.reshape(candidates.shape)
