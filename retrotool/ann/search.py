"""List-major search: queries are grouped by the lists they probe, one matrix product a list, top-k, merge.

Against searching query by query this turns matrix–vector into matrix–matrix products. Distances by products lose
digits where vectors have much in common, so they only choose: both sides are shifted by a mean first (which changes no
distance), ``_SPARE`` candidates more than asked for are kept, and their distances are computed again as Σ(q − c)² from
the stored float16 vectors. What a query must not find is masked before the top-k. Its own document is an interval of
chunk ids, and ids ascend in a list, so that is an interval of columns, found by binary search. Memory: the queries
twice, their candidates, and one block of ``BLOCK_ENTRIES`` distances.

Not done here: compressed codes and re-ranking of them; vectors are the stored float16 embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Ids, InvertedLists

if TYPE_CHECKING:
    import torch

BLOCK_ENTRIES = 1 << 24
_BLOCK_COLUMNS = 1 << 14
_BLOCK_PAIRS = 1 << 9
_FEW = 8
_SPARE = 8
"""Candidates kept beyond k: of distances that products can't tell apart, the true ones decide."""

Banned = Callable[[Ids], npt.NDArray[np.bool_]]
"""Tells which ids must not be found."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Intervals of chunk ids [first, last], ascending and apart, each of a document: ``document`` says of which."""

    first: Ids
    last: Ids
    document: Ids

    def documents(self, ids: Ids) -> Ids:
        """The document of each id; −1: of none."""
        place = np.searchsorted(self.first, ids, side="right") - 1
        within = (place >= 0) & (ids <= self.last[place])
        return np.where(within, self.document[place], -1)


@dataclass(frozen=True, slots=True)
class Excluded:
    """What each of q queries must not find: the interval of chunk ids [first, last], empty if first > last.

    Where a document is there more than once, ``repeats`` has its further intervals, and ``document`` [q] says whose
    they are.
    """

    first: Ids
    last: Ids
    document: Ids | None = None
    repeats: Intervals | None = None

    @classmethod
    def nothing(cls, q: int) -> Excluded:
        """For queries that may find anything."""
        return cls(np.zeros(q, np.int64), np.full(q, -1, np.int64))

    def take(self, rows: Ids) -> Excluded:
        """The same for some of the queries, or for some of them several times."""
        document = None if self.document is None else self.document[rows]
        return Excluded(self.first[rows], self.last[rows], document, self.repeats)


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries float32 [q, d], and what they must not find."""

    vectors: npt.NDArray[np.float32]
    excluded: Excluded

    @classmethod
    def plain(cls, vectors: npt.NDArray[np.float32]) -> Queries:
        """Queries that may find anything."""
        return cls(vectors, Excluded.nothing(len(vectors)))


class Best:
    """The k nearest found so far, both [q, k].

    ``distances`` are float32 and ascend (+inf: none); ``ids`` are int64 (−1: none).
    """

    def __init__(self, q: int, k: int) -> None:
        self.distances = np.full((q, k), np.inf, np.float32)
        self.ids = np.full((q, k), -1, np.int64)

    def merge(self, distances: npt.NDArray[np.float32], ids: Ids) -> None:
        """Take in candidates [q, c] of all queries."""
        k = self.ids.shape[1]
        all_distances = np.concatenate([self.distances, distances], axis=1)
        all_ids = np.concatenate([self.ids, ids], axis=1)
        order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
        self.distances = np.take_along_axis(all_distances, order, 1)
        self.ids = np.take_along_axis(all_ids, order, 1)


def search(
    lists: InvertedLists, queries: Queries, nprobe: int, banned: Banned, best: Best, *, precise: bool = False
) -> None:
    """Merge into ``best`` what ``queries`` find in ``lists``, probing ``nprobe`` lists each.

    ``precise``: products in float64, twice the time, for a truth that others are held against.
    """
    near = _Near(lists, queries, best.ids.shape[1] + _SPARE, precise)
    for number, rows in _by_list(lists, queries.vectors, nprobe):
        ids = lists.ids[number]
        for start in range(0, len(ids), _BLOCK_COLUMNS):
            part = slice(start, start + _BLOCK_COLUMNS)
            keep = np.flatnonzero(~banned(ids[part]))
            if len(keep):
                near.search(number, start + keep, rows)
    best.merge(*near.measured())


def _by_list(lists: InvertedLists, vectors: npt.NDArray[np.float32], nprobe: int) -> list[tuple[int, Ids]]:
    """(list, queries that probe it), lists ascending, and queries in each."""
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
    shift = table.mean(0)
    table = table - shift
    half_norms = table.square().sum(1) / 2
    block = max(1, BLOCK_ENTRIES // len(table))
    found = [
        torch.addmm(-half_norms, rows - shift, table.T).topk(min(nprobe, len(table)), sorted=False).indices
        for rows in torch.split(torch.from_numpy(vectors), block)
    ]
    return torch.cat(found).numpy()


class _Near:
    """The candidates of one search through one shard, chosen by products of shifted vectors.

    ``scores`` [q, c] are squared distances less |q|² (+inf: none), ``places`` [q, c] positions in the shard's lists, as
    if these were one.
    """

    def __init__(self, lists: InvertedLists, queries: Queries, candidates: int, precise: bool) -> None:
        import torch

        self._lists, self._queries = lists, queries
        self._starts = np.cumsum([0, *map(len, lists.ids)])
        self._dtype = torch.float64 if precise else torch.float32
        self._shift = _mean(lists)
        self._wanted = (torch.from_numpy(queries.vectors) - self._shift).to(self._dtype)
        self._scores = torch.full((len(queries.vectors), candidates), torch.inf, dtype=self._dtype)
        self._places = torch.full((len(queries.vectors), candidates), -1, dtype=torch.int64)

    def search(self, number: int, chosen: Ids, rows: Ids) -> None:
        """Search the vectors ``chosen`` of a list for the queries ``rows``, all ascending."""
        import torch

        ids = self._lists.ids[number][chosen]
        columns = torch.from_numpy(self._lists.vectors[number].take(chosen, 0)).float().sub_(self._shift)
        columns = columns.to(self._dtype)
        norms = columns.square().sum(1)
        places = torch.from_numpy(int(self._starts[number]) + chosen)
        c = self._scores.shape[1]
        for some in np.array_split(rows, 1 + len(rows) * len(ids) // BLOCK_ENTRIES):
            at = torch.from_numpy(some)
            scores = torch.addmm(norms, self._wanted.index_select(0, at), columns.T, alpha=-2)
            _mask(scores, ids, self._queries.excluded.take(some))
            there = places.expand(len(at), -1)
            if len(ids) > _FEW * c:
                scores, order = scores.topk(c, largest=False, sorted=False)
                there = there.gather(1, order)
            # What is masked has a score of +inf, which is nearer than nothing: ``measured`` leaves it out.
            scores = torch.cat([self._scores.index_select(0, at), scores], 1)
            there = torch.cat([self._places.index_select(0, at), there], 1)
            self._scores[at], order = scores.topk(c, largest=False, sorted=False)
            self._places[at] = there.gather(1, order)

    def measured(self) -> tuple[npt.NDArray[np.float32], Ids]:
        """Distances, float32, of all candidates from the vectors themselves, and ids, both [q, c] and in no order."""
        import torch

        shape = self._scores.shape
        found = np.flatnonzero(np.isfinite(self._scores.numpy()))
        ids, distances = np.full(shape.numel(), -1, np.int64), np.full(shape.numel(), np.inf, np.float32)
        places = self._places.numpy().ravel()[found]
        if len(self._starts) > 2:  # list by list: each is one run of memory
            order = np.argsort(places, kind="stable")
            found, places = found[order], places[order]
        rows = torch.from_numpy(found // shape[1])
        queries = torch.from_numpy(self._queries.vectors)
        # In memory that is used again and again: fresh memory of this size costs more than the arithmetic.
        one, other = torch.empty(2, _BLOCK_PAIRS, queries.shape[1])
        for start in range(0, len(found), _BLOCK_PAIRS):
            pairs = slice(start, start + _BLOCK_PAIRS)
            numbers, vectors = self._read(places[pairs])
            n = len(numbers)
            apart = torch.index_select(queries, 0, rows[pairs], out=one[:n]).sub_(other[:n].copy_(vectors))
            ids[found[pairs]] = numbers
            distances[found[pairs]] = apart.square_().sum(1).numpy()
        return distances.reshape(shape), ids.reshape(shape)

    def _read(self, places: Ids) -> tuple[Ids, torch.Tensor]:
        """Ids and vectors, float16, at some places, which ascend if there is more than one list."""
        import torch

        if len(self._starts) == 2:
            return self._lists.ids[0][places], torch.from_numpy(self._lists.vectors[0][places])
        number = np.searchsorted(self._starts, places, side="right") - 1
        column = places - self._starts[number]
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(places)]
        ids = np.empty(len(places), np.int64)
        vectors = np.empty((len(places), self._queries.vectors.shape[1]), np.float16)
        for low, high in itertools.pairwise(cuts):
            at = column[low:high]
            ids[low:high] = self._lists.ids[number[low]][at]
            vectors[low:high] = self._lists.vectors[number[low]][at]
        return ids, torch.from_numpy(vectors)


def _mean(lists: InvertedLists) -> torch.Tensor:
    """Roughly the mean of a shard's vectors, float32 [d]."""
    import torch

    if lists.centroids is not None:
        return torch.from_numpy(lists.centroids).mean(0)
    sample = lists.vectors[0][:: max(1, len(lists) // _BLOCK_COLUMNS)]
    return torch.from_numpy(np.asarray(sample, np.float32)).mean(0)


def _mask(scores: torch.Tensor, ids: Ids, excluded: Excluded) -> None:
    """Set to +inf the scores [r, c] of ids (ascending, [c]) that each row must not find."""
    import torch

    low = np.searchsorted(ids, excluded.first)
    width = np.maximum(np.searchsorted(ids, excluded.last, side="right") - low, 0)
    rows = np.repeat(np.arange(len(width)), width)
    if len(rows):
        within = np.arange(len(rows)) - np.repeat(np.cumsum(width) - width, width)
        scores[torch.from_numpy(rows), torch.from_numpy(np.repeat(low, width) + within)] = torch.inf
    if excluded.repeats is None or excluded.document is None:
        return
    documents = excluded.repeats.documents(ids)
    columns = np.flatnonzero(documents >= 0)
    rows = np.flatnonzero(np.isin(excluded.document, documents[columns]))
    row, column = np.nonzero(excluded.document[rows][:, None] == documents[columns])
    if len(row):
        scores[torch.from_numpy(rows[row]), torch.from_numpy(columns[column])] = torch.inf
