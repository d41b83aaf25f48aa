"""List-major search: queries are grouped by the lists they probe, one matrix product a list, top-k, exact distances.

Against searching query by query this turns matrix–vector into matrix–matrix products. It goes in two steps:

1. ``Search`` chooses candidates by what the codes stand for, or by the vectors themselves, over any number of shards.
   The best so far of a query set the limit that others have to beat, so its nearest list comes first. Both sides of a
   product are shifted by a mean, which changes no distance: products lose digits where vectors have much in common.
2. ``rerank`` computes Σ(q − x)² from the vectors themselves, which the caller fetches by id.

What a query must not find is masked before the best are taken. Its own document is an interval of chunk ids, and ids
ascend in a list, so that is an interval of columns, found by binary search (``ann.excluded``).

On a CPU every core takes a share of the queries: a product of some hundred rows is too small to be divided. Blocks of
lists are decoded once for all. Cost: 2·d operations for each vector in the lists that a query probes, at the rate of
the matrix products; what is left of the time goes to gathering queries and to the heaps.

Memory: queries twice, candidates, and ``room`` bytes for distances and the vectors of lists. What it is not enough for
is done in more steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Excluded, Mask, Queries
from retrotool.ann.heaps import Heaps, largest
from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Ids, Lists
from retrotool.ann.nearest import Nearest
from retrotool.ann.products import Columns, Scratch, Table, one_thread_each
from retrotool.ann.trained import Floats, Trained

if TYPE_CHECKING:
    import torch

ROOM = 1 << 27
"""Bytes for distances and decoded vectors: with more it gets no faster."""
_COLUMNS = 1 << 11
_ROWS = 1 << 11
_CACHED_ROWS = 1 << 12
_CACHED_ENTRIES = 1 << 19
"""Scores at a time on a CPU: a megabyte, which stays in its cache."""
_LEAST_TILE = 1 << 10
"""Queries that are worth a thread each."""
_PAIRS, _MANY_PAIRS = 1 << 10, 1 << 15
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

    ``precise``: products in float64, for a truth that others are held against. ``device`` does the products and finds
    the best; lists are decoded on the CPU. ``room``: bytes for scores and decoded vectors. ``vectors``: these take the
    place of codes, so that of the lists only the ids are read.
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
        vectors: Fetch | None = None,
    ) -> None:
        import torch

        self.scanned = 0
        """Codes that were compared with a query, over all queries."""
        self._trained, self._banned, self._depth, self._q = trained, banned, depth, len(queries)
        self._vectors = vectors
        self._device, on_cpu = torch.device(device), device == "cpu"
        self._dtype = torch.float64 if precise else torch.float32
        asked = torch.from_numpy(queries.vectors).to(self._device)
        rotated = trained.rotate(asked)
        self._asked = rotated if vectors is None else asked
        self._shift: Any = None
        if trained.centroids is not None and vectors is None:
            self._shift = torch.from_numpy(trained.centroids).mean(0)
        self._threads = torch.get_num_threads() if on_cpu and self._q >= _LEAST_TILE else 1
        # Half of the room is for vectors, which for a moment are there twice, and half for scores; a CPU wants both
        # in its cache.
        self._most_rows = max(1, room // 2 // (trained.codec.d * (16 if precise else 8)) // self._threads)
        entries = max(1, room // 2 // (16 if precise else 8) // self._threads)
        self._entries = min(entries, _CACHED_ENTRIES) if on_cpu else entries
        self._most_rows = min(self._most_rows, _CACHED_ROWS) if on_cpu else self._most_rows
        self._columns = max(1, min(self._most_rows, self._entries, _COLUMNS if on_cpu else self._most_rows))
        cut = _tiles(trained, rotated, queries.excluded, nprobe, self._threads)
        with one_thread_each(self._threads) as run:
            self._tiles = run(lambda some: _Tile(*some, queries.excluded, depth, self._dtype, self._device), cut)

    def add(self, shard: Lists) -> None:
        """Take in what the queries find in a shard."""
        import torch

        if self._shift is None:
            self._shift = self._mean(shard)
        shift = self._shift.to(self._device)
        rows = [torch.from_numpy(tile.rows).to(self._device) for tile in self._tiles]
        tables = [self._asked.index_select(0, some).sub_(shift).to(self._dtype) for some in rows]
        # First the nearest list of every query: what is found there sets the limit that others have to beat.
        for near in (True, False):
            groups = [tile.near if near else tile.far for tile in self._tiles]
            jobs = list(zip(self._tiles, tables, groups, strict=True))
            all_pieces = self._pieces(shard, sorted(set().union(*groups)))
            with one_thread_each(self._threads) as run:
                while some_pieces := list(itertools.islice(all_pieces, self._threads)):
                    blocks = run(functools.partial(self._decode, shard), some_pieces)
                    self.scanned += sum(run(functools.partial(self._scan, blocks, near), jobs))

    def _pieces(self, shard: Lists, numbers: list[int]) -> Iterator[list[_Piece]]:
        """Pieces of lists, not too wide, as many at a time as may be decoded at a time."""
        pieces: list[_Piece] = []
        rows = 0
        for number in numbers:
            n = shard.size(number)
            for low in range(0, n, self._columns):
                piece = _Piece(number, low, min(low + self._columns, n))
                if pieces and rows + len(piece) > self._most_rows:
                    yield pieces
                    pieces, rows = [], 0
                pieces.append(piece)
                rows += len(piece)
        if pieces:
            yield pieces

    def _decode(self, shard: Lists, pieces: list[_Piece]) -> _Block:
        """The vectors of pieces of lists, less the mean, without those that are banned."""
        import torch

        all_ids = [shard.ids(piece.number)[piece.rows] for piece in pieces]
        kept = [~self._banned(ids) for ids in all_ids]
        bounds = np.cumsum([0, *(int(some.sum()) for some in kept)])
        ids = [some[is_kept] for some, is_kept in zip(all_ids, kept, strict=True)]
        if self._vectors is not None:
            fetched = np.concatenate([self._vectors(some) for some in ids if len(some)] or [self._no_vectors()])
            vectors = torch.from_numpy(fetched.astype(np.float32)).sub_(self._shift)
        else:
            codes = [shard.codes(p.number)[p.rows][is_kept] for p, is_kept in zip(pieces, kept, strict=True)]
            vectors = self._trained.codec.decode(np.concatenate(codes)).sub_(self._shift)
            if self._trained.by_residual:
                assert self._trained.centroids is not None
                for piece, (low, high) in zip(pieces, itertools.pairwise(bounds), strict=True):
                    vectors[low:high].add_(torch.from_numpy(self._trained.centroids[piece.number]))
        columns = Columns(vectors.to(self._device, self._dtype))
        return _Block(pieces, bounds.tolist(), np.concatenate(ids), columns)

    def _mean(self, shard: Lists) -> torch.Tensor:
        """Roughly the mean of the vectors of a shard, float32 [d]; any would do that is the same for all."""
        import torch

        if self._vectors is None:
            sample = shard.codes(0)[:: max(1, len(shard) // _COLUMNS)]
            return self._trained.codec.decode(sample).mean(0) if len(sample) else torch.zeros(self._asked.shape[1])
        return self._asked.mean(0).cpu() if self._q else torch.zeros(self._asked.shape[1])

    def _no_vectors(self) -> npt.NDArray[np.float16]:
        return np.zeros((0, self._asked.shape[1]), np.float16)

    def _scan(self, blocks: list[_Block], near: bool, job: tuple[_Tile, torch.Tensor, dict[int, torch.Tensor]]) -> int:
        """Hold the queries of a tile (a table, and those of each list) against blocks; return how many pairs it was."""
        tile, table, groups = job
        scanned, scratch = 0, Scratch(self._device)
        for block in blocks:
            mask = Mask(tile.excluded, block.ids)
            for piece, (low, high) in zip(block.pieces, itertools.pairwise(block.bounds), strict=True):
                rows = groups.get(piece.number)
                if rows is None or low == high:
                    continue
                scanned += len(rows) * (high - low)
                step = max(1, min(_ROWS, self._entries // (high - low)))
                for start in range(0, len(rows), step):
                    some = rows[start : start + step]
                    scores = block.columns.scores(table, some, low, high, scratch)
                    mask.apply(scores, some, low, high)
                    tile.nearest.offer(some, scores, block.ids[low:high], first=near and piece.low == 0)
        return scanned

    @property
    def candidates(self) -> Ids:
        """Ids of the candidates, int64 [q, depth], nearest by their codes first (−1: none)."""
        found = np.full((self._q, self._depth), -1, np.int64)
        for tile in self._tiles:
            found[tile.rows] = tile.nearest.best()[1].cpu().numpy()
        return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a list."""

    number: int
    low: int
    high: int

    def __len__(self) -> int:
        return self.high - self.low

    @property
    def rows(self) -> slice:
        return slice(self.low, self.high)


@dataclass(frozen=True, slots=True)
class _Block:
    """Vectors of pieces of lists: piece i has those from bounds[i] to bounds[i + 1]."""

    pieces: list[_Piece]
    bounds: list[int]
    ids: Ids
    columns: Columns


class _Tile:
    """Some of the queries, ``rows`` [t] of all, and what they have found.

    ``near`` and ``far`` have, for each list, the queries of the tile whose nearest it is, or that probe it besides.
    """

    def __init__(
        self, rows: Ids, probed: Ids, of_all: Excluded, depth: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.excluded = rows, of_all.take(rows).ascending()
        self.nearest: Heaps | Nearest = Nearest(depth, len(rows), dtype=dtype, device=device)
        if device.type == "cpu" and dtype.itemsize == np.dtype(np.float32).itemsize:
            self.nearest = Heaps(depth, len(rows))
        self.near, self.far = _by_list(probed[:, :1], device), _by_list(probed[:, 1:], device)


def _tiles(trained: Trained, rotated: torch.Tensor, excluded: Excluded, nprobe: int, n: int) -> list[tuple[Ids, Ids]]:
    """(rows, lists that they probe [rows, nprobe], the nearest first) of n tiles, each with every n-th query.

    So all have about the same work at every list. In a tile queries are ordered by what they exclude, or by their
    nearest list: what is read together lies together.
    """
    if trained.centroids is None:
        probed = np.zeros((len(rotated), 1), np.int64)
    else:
        probed = nearest_lists(trained.centroids, rotated, nprobe, n)
    order = np.argsort(excluded.first if excluded.any else probed[:, 0], kind="stable")
    return [(order[first::n], probed[order[first::n]]) for first in range(n)]


def _by_list(probed: Ids, device: torch.device) -> dict[int, torch.Tensor]:
    """For each list the rows of probed [t, p] that name it, ascending."""
    import torch

    least = np.min_scalar_type(int(probed.max(initial=0)))  # numbers of 16 bits are sorted several times as fast
    flat = probed.ravel().astype(least)
    order = np.argsort(flat, kind="stable")
    starts = np.flatnonzero(np.diff(flat[order].astype(np.int64), prepend=-1))
    rows = np.split(order // max(probed.shape[1], 1), starts[1:]) if len(order) else []
    return {int(n): torch.from_numpy(some).to(device) for n, some in zip(flat[order[starts]], rows, strict=True)}


def nearest_lists(centroids: Floats, vectors: torch.Tensor, nprobe: int, threads: int = 1) -> Ids:
    """The ``nprobe`` nearest centroids of each vector, int64 [q, nprobe], nearest first.

    By rough products: which of two lists is the last to be probed is decided by a hair anyway.
    """
    import torch

    table = torch.from_numpy(centroids).to(vectors.device)
    if nprobe == 1:
        return assign(vectors, table)[1].cpu().numpy().reshape(-1, 1)
    shift = table.mean(0)
    table = table - shift
    scored = Table(table, -table.square().sum(1) / 2, rough=True)

    def nearest(rows: torch.Tensor) -> Ids:
        return largest(scored.scores(rows - shift), min(nprobe, len(table)))

    with one_thread_each(threads) as run:
        return np.concatenate(run(nearest, torch.split(vectors, scored.rows)))


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

    def measure(places: Ids) -> None:
        # In memory that is used again and again: fresh memory of this size costs more than the arithmetic.
        one, other = torch.empty(2, min(_PAIRS, len(places)), queries.shape[1])
        for start in range(0, len(places), _PAIRS):
            pairs = places[start : start + _PAIRS]
            n = len(pairs)
            vectors: Any = torch.from_numpy(fetch(flat[pairs]))
            rows = torch.from_numpy(pairs // candidates.shape[1])
            apart = torch.index_select(wanted, 0, rows, out=one[:n]).sub_(other[:n].copy_(vectors))
            distances[pairs] = apart.square_().sum(1).numpy()

    threads = torch.get_num_threads() if len(found) >= _MANY_PAIRS else 1
    with one_thread_each(threads) as run:
        run(measure, np.array_split(found, threads))
    return distances.reshape(candidates.shape)
