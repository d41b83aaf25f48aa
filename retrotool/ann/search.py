"""List-major search: group queries by the lists they probe, with one matrix product per list.

``Search`` selects candidates by codes, or by the vectors themselves, over the joined lists of all shards;
``ranking.rerank`` ranks them. Both sides of a product are shifted by a mean, to lose fewer digits. Excluded
ids are masked before the best are selected. Every core takes a share of large searches. GPUs search in
another way (``resident``).

Cost: 2·d operations per query and vector in its lists, and as much again for choosing lists, gathering and
heaps. Memory: queries twice, candidates, and ``room`` bytes for distances and vectors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from retrotool.ann import kmeans
from retrotool.ann.excluded import Excluded, Ids, Mask, Queries
from retrotool.ann.lists import JoinedLists, Lists, Trained
from retrotool.ann.matmul import CentroidTable, Columns, RoughColumns, Scratch, has_bfloat16, one_thread_each
from retrotool.ann.ranking import Fetch, Heaps, largest
from retrotool.ann.resident import Centroids
from retrotool.lazy import torch
from retrotool.ranges import runs_up_to

ROOM = 1 << 27  # bytes for distances and decoded vectors; more does not help
_COLUMNS = 1 << 11
_FLOAT_BYTES = 4
_ROWS = 1 << 13  # queries at a time: fewer, larger steps, within _CACHED_ENTRIES
_CACHED_ROWS = 1 << 12
_CACHED_ENTRIES = 1 << 19  # scores at a time, few enough for the cache
_LEAST_TILE = 1 << 10  # queries from which several threads pay off
_LEAST_WORK = 1 << 25  # operations per list and thread from which several threads pay off
SPARE = 8  # extra candidates for whole vectors, where products can't separate near ties

Banned = Callable[[Ids], npt.NDArray[np.bool_]]  # flags the ids that must not be returned


def nothing_banned(ids: Ids) -> npt.NDArray[np.bool_]:
    """Return False for every id."""
    return np.zeros(len(ids), np.bool_)


class Search:
    """A search of the shards of one index for ``depth`` candidates per query, in ``room`` bytes of buffers.

    ``rough``: rounded products where they are faster. ``vectors``: used instead of codes. ``beyond``: skip
    this many nearest lists. ``probed`` [q, nprobe]: the lists of each query; by default the nearest.
    """

    def __init__(
        self,
        trained: Trained,
        queries: Queries,
        nprobe: int,
        depth: int,
        banned: Banned,
        *,
        room: int = ROOM,
        vectors: Fetch | None = None,
        rough: bool = False,
        beyond: int = 0,
        probed: Ids | None = None,
    ) -> None:
        self.scanned = 0  # number of codes compared, over all queries
        self._trained, self._banned, self._depth, self._q = trained, banned, depth, len(queries)
        self._vectors = vectors
        self._excluded, self._nprobe, self._room, self._rough = queries.excluded, nprobe, room, rough
        self._beyond, self._probed = beyond, probed
        asked = torch.from_numpy(queries.vectors)
        self._rotated = trained.rotate(asked)
        self._asked = self._rotated if vectors is None else asked
        self._tiles: list[_Tile] = []

    def add(self, *shards: Lists) -> None:
        """Search shards with joined lists; shards without lists are wide already and searched in turn."""
        are_joined = len(shards) > 1 and self._trained.centroids is not None
        for shard in [JoinedLists(shards)] if are_joined else shards:
            self._add(shard)

    def _add(self, shard: Lists) -> None:
        if not self._tiles:
            self._start(shard)
        with one_thread_each(self._threads) as run:
            rows = [torch.from_numpy(tile.rows) for tile in self._tiles]
            tables = run(lambda some: self._columns_as.table(self._asked, some, self._shift), rows)
            jobs = list(zip(self._tiles, tables, strict=True))
            pieces = self._pieces(shard, sorted(set().union(*(tile.lists for tile in self._tiles))))
            while some_pieces := list(itertools.islice(pieces, self._threads)):
                blocks = run(functools.partial(self._decode, shard), some_pieces)
                self.scanned += sum(run(functools.partial(self._scan, blocks), jobs))

    def _start(self, shard: Lists) -> None:
        trained = self._trained
        if self._vectors is not None:
            sample = self._asked
        elif trained.centroids is not None:
            sample = torch.from_numpy(trained.centroids)
        else:
            sample = trained.codec.decode(shard.codes(0)[:: max(1, len(shard) // _COLUMNS)])
        self._shift = sample.mean(0) if len(sample) else torch.zeros(sample.shape[1])  # any would be correct
        most = torch.get_num_threads() if self._q >= _LEAST_TILE else 1
        lists = max(trained.nlist, 1)
        a_list = 2 * trained.d * (self._q * min(self._nprobe, lists) / lists) * (len(shard) / lists)
        # Threads contend for the GIL between products: with small products, one thread is faster than two.
        self._threads = most if a_list >= most * _LEAST_WORK else 1
        rough = self._rough and has_bfloat16() and a_list >= self._threads * _LEAST_WORK
        self._columns_as: type[Columns | RoughColumns] = RoughColumns if rough else Columns
        # Half of the room is for vectors, briefly held twice, half for scores; both should fit the cache.
        entries = max(1, self._room // 4 // _FLOAT_BYTES // self._threads)
        self._most_rows = max(1, min(entries // trained.codec.d, _CACHED_ROWS))
        self._entries = min(entries, _CACHED_ENTRIES)
        self._columns = max(1, min(self._most_rows, self._entries, _COLUMNS))
        if trained.centroids is None:
            probed = np.zeros((self._q, 1), np.int64)
        elif self._probed is not None:
            probed = self._probed
        else:
            probed = nearest_lists(trained, self._rotated, self._nprobe, most)[:, self._beyond :]
        cut = _tiles(probed, self._excluded, self._threads)
        with one_thread_each(self._threads) as run:
            self._tiles = run(lambda some: _Tile(*some, self._excluded, self._depth), cut)

    def _pieces(self, shard: Lists, numbers: list[int]) -> Iterator[list[_Piece]]:
        sizes = ((number, shard.size(number)) for number in numbers)
        pieces = (
            (number, slice(low, min(low + self._columns, n)))
            for number, n in sizes
            for low in range(0, n, self._columns)
        )
        return runs_up_to(self._most_rows, pieces, lambda piece: piece[1].stop - piece[1].start)

    def _decode(self, shard: Lists, pieces: list[_Piece]) -> _Block:
        of_each = [shard.ids(number)[rows] for number, rows in pieces]
        ids, ends = np.concatenate(of_each), np.cumsum([len(some) for some in of_each])
        keep = ~self._banned(ids)
        bounds = np.concatenate([[0], np.cumsum(keep)[ends - 1]])
        ids = ids[keep]
        if self._vectors is not None:
            vectors = _fetched(self._vectors, ids, self._asked.shape[1]).sub_(self._shift)
        else:
            codes = np.concatenate([shard.codes(number)[rows] for number, rows in pieces])
            vectors = self._trained.codec.decode(codes[keep]).sub_(self._shift)
            if self._trained.by_residual:
                assert self._trained.centroids is not None
                for (number, _), (low, high) in zip(pieces, itertools.pairwise(bounds), strict=True):
                    vectors[low:high].add_(torch.from_numpy(self._trained.centroids[number]))
        return pieces, bounds.tolist(), ids, self._columns_as(vectors)

    def _scan(self, blocks: list[_Block], job: tuple[_Tile, torch.Tensor]) -> int:
        tile, table = job
        scanned, scratch = 0, Scratch()
        for pieces, bounds, ids, columns in blocks:
            mask = Mask(tile.excluded, ids)
            for (number, _), (low, high) in zip(pieces, itertools.pairwise(bounds), strict=True):
                rows = tile.probing(number)
                if rows is None or low == high:
                    continue
                scanned += len(rows) * (high - low)
                step = max(1, min(_ROWS, self._entries // (high - low)))
                for start in range(0, len(rows), step):
                    some = rows[start : start + step]
                    scores = columns.scores(table, some, low, high, scratch)
                    mask.apply(scores, some, low, high)
                    tile.nearest.offer(some, scores, ids[low:high])
        return scanned

    @property
    def candidates(self) -> Ids:
        """Ids of the candidates, int64 [q, depth], nearest by their codes first (−1: none)."""
        found = np.full((self._q, self._depth), -1, np.int64)
        for tile in self._tiles:
            found[tile.rows] = tile.nearest.best()[1]
        return found


_Piece = tuple[int, slice]  # a list number and a slice of its rows
_Block = tuple[list[_Piece], list[int], Ids, Columns | RoughColumns]
"""Pieces of lists, bounds, ids and vectors; piece i has entries bounds[i] to bounds[i + 1]."""


def _fetched(fetch: Fetch, ids: Ids, d: int) -> torch.Tensor:
    if not len(ids):
        return torch.empty(0, d)
    order = np.argsort(ids)
    # torch converts float16 in hardware, numpy does not
    fetched = torch.from_numpy(fetch(ids[order])).float()
    return torch.empty_like(fetched).index_copy_(0, torch.from_numpy(order), fetched)


class _Tile:
    """The queries ``rows`` [t], their results, and which of them, by place, probe each of the ``lists``."""

    def __init__(self, rows: Ids, probed: Ids, of_all: Excluded, depth: int) -> None:
        self.rows, self.excluded, self.nearest = rows, of_all.take(rows), Heaps(depth, len(rows))
        least = np.min_scalar_type(int(probed.max(initial=0)))  # 16-bit numbers sort several times as fast
        flat = probed.ravel().astype(least)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat)
        asked, ends = np.flatnonzero(counts), np.cumsum(counts)
        self.lists = dict(zip(asked.tolist(), itertools.pairwise([0, *ends[asked].tolist()]), strict=True))
        self._by_list = torch.from_numpy(order).div_(max(probed.shape[1], 1), rounding_mode="floor")

    def probing(self, number: int) -> torch.Tensor | None:
        bounds = self.lists.get(number)
        return None if bounds is None else self._by_list[bounds[0] : bounds[1]]


def _tiles(probed: Ids, excluded: Excluded, n: int) -> list[tuple[Ids, Ids]]:
    """Split queries into n tiles (rows, probed lists [rows, nprobe]) of similar work: every n-th query each.

    Within a tile, queries are sorted by what they exclude or by nearest list, for locality.
    """
    by_list = probed.shape[1] and not excluded.any
    order = np.lexsort((probed[:, 0],) if by_list else (excluded.last, excluded.first))
    return [(order[first::n], probed[order[first::n]]) for first in range(n)]


@functools.lru_cache(1)
def _in_two_levels(trained: Trained) -> Centroids:
    return Centroids(trained, torch.device("cpu"))


def nearest_lists(trained: Trained, vectors: torch.Tensor, nprobe: int, threads: int = 1) -> Ids:
    """Return the nearest lists of rotated vectors, int64 [q, nprobe], nearest first, by rough products."""
    assert trained.centroids is not None
    if trained.nlist > kmeans.TWO_LEVELS:
        return _in_two_levels(trained).nearest_turned(vectors, nprobe).numpy()
    centroids = torch.from_numpy(trained.centroids)
    if nprobe == 1:
        return kmeans.assign(vectors, centroids)[1].numpy().reshape(-1, 1)
    table = CentroidTable(centroids, rough=True)

    def nearest(rows: torch.Tensor) -> Ids:
        return largest(table.scores(rows - table.mean), min(nprobe, len(centroids)))

    with one_thread_each(threads) as run:
        return np.concatenate(run(nearest, torch.split(vectors, table.rows)))
