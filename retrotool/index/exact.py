"""Exact search: all vectors of a store, part by part, without an index.

For few vectors it is quicker than making an index, and the truth that others are held against. Cost: a matrix product
of all queries with all vectors. Memory: blocks of distances; vectors are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries
from retrotool.ann.lists import OneList
from retrotool.ann.ranking import Best, rerank
from retrotool.ann.search import ROOM, SPARE, Search, nothing_banned
from retrotool.embed.search_scope import embedded_parts, pick_encoder, read_part_vectors, searchable_rows
from retrotool.index.searching import room_in, rows_in
from retrotool.index.source_filter import AllowedChunks
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

NO_INDEX = ""
"""In place of the name of an index."""
_KEPT_PARTS = 64


class ExactDatabase:
    """A store as a database that is searched exactly, with the same methods as ``searching.Database``."""

    name = NO_INDEX

    def __init__(
        self,
        store: Store,
        encoder: str | None = None,
        *,
        device: str = "cpu",
        memory: int | None = None,
        allows: Callable[[str], bool] | None = None,
    ) -> None:
        self.store = store
        self.encoder = pick_encoder(store, encoder)
        self.tombstones = read_tombstones(store)
        self._device, self.room = device, room_in(memory)
        self._allows = allows
        self._rows = lru_cache(_KEPT_PARTS)(self._read_rows)

    @cached_property
    def _allowed(self) -> AllowedChunks:
        assert self._allows is not None
        return AllowedChunks(self.store, self._allows)

    def _read_rows(self, part: int) -> npt.NDArray[np.int64]:
        rows = searchable_rows(self.store, part, self.tombstones)
        return rows if self._allows is None else rows[self._allowed.rows(part)[rows]]

    @property
    def settings(self) -> list[Any]:
        """What decides which neighbours are found, besides the vectors that there are: nothing."""
        return [NO_INDEX]

    def held(self) -> list[int]:
        """Numbers of the parts that are searched, ascending."""
        return embedded_parts(self.store, self.encoder)

    def reads(self) -> list[str]:
        """Paths of the files that are searched, which an erase replaces."""
        return [parts.part_entry(self.store, "embeddings", part, self.encoder).path for part in self.held()]

    def candidates_for(self, k: int) -> int:
        """Candidates that each query takes for k neighbours."""
        return k + SPARE

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        only: Collection[int] | None = None,
        wider: int = 1,  # noqa: ARG002
        beyond: int = 0,  # noqa: ARG002
    ) -> Best:
        """The k nearest living keys of each query; ``only``: in these parts. There are no lists to search ``wider``."""
        best: Best | None = None
        for part in self.held():
            rows = self._rows(part)
            if len(rows) and (only is None or part in only):
                vectors = read_part_vectors(self.store, self.encoder, part)
                some = OneList(parts.chunk_ids(part, rows), vectors if len(rows) == len(vectors) else vectors[rows])
                best = nearest_of(queries, some, k, best, device=self._device, room=self.room)
        return best or Best(np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64))


def nearest_of(
    queries: Queries,
    some: OneList,
    k: int,
    before: Best | None,
    *,
    precise: bool = False,
    device: str = "cpu",
    room: int = ROOM,
) -> Best:
    """The k nearest among some vectors and those found ``before``; distances are exact, in float32.

    ``precise``: they are also found by products in float64, so that of two as good as equal the nearer is first.
    """
    blocks = []
    for asked in queries.blocks(rows_in(room, k + SPARE, queries.vectors.shape[1])):
        search = Search(some.trained, asked, 1, k + SPARE, nothing_banned, precise=precise, device=device, room=room)
        search.add(some)
        blocks.append(rerank(asked.vectors, search.candidates, some.vectors, k))
    distances = np.concatenate([block.distances for block in blocks])
    found = Best(distances, np.concatenate([block.ids for block in blocks]))
    return found if before is None else merged(before, found, k)


def merged(one: Best, other: Best, k: int) -> Best:
    """The k nearest of two lists a query, [q, ·] each, no id twice."""
    distances = np.concatenate([one.distances, other.distances], 1)
    ids = np.concatenate([one.ids, other.ids], 1)
    repeated = _repeated(ids)
    distances[repeated], ids[repeated] = np.inf, -1
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Best(np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1))


def _repeated(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, 1)
    again = np.zeros(ids.shape, np.bool_)
    again[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    found = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(found, order, again, 1)
    return found
