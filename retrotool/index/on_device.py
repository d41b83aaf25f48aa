"""The searchable vectors of a database in the memory of a GPU.

What does not fit is loaded in portions of equal size, one after the other; a search goes through all of them
and merges what it finds. Searches of several threads share what is loaded: none of it is replaced before all
that are waiting have gone through it. So n threads load each portion once per n searches. The latest portions
that fit are kept. Chunks that must not be found are not loaded, so another commit or filter needs another
object.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.ann.excluded import Ids, Queries
from retrotool.ann.lists import Trained
from retrotool.ann.ranking import Best, Fetch, merged
from retrotool.ann.resident import Centroids, ResidentLists, free_memory, upload
from retrotool.encoder.encoder import say
from retrotool.lazy import torch
from retrotool.store.parts import part_of

_BLOCK_BYTES = 1 << 26  # of vectors that are read at a time
_SHARE = 0.7  # of the free memory for vectors; the rest is for queries
_BYTES_BESIDE = 40  # of a vector, while lists are sorted
_LEAST = 1 << 16  # vectors of a portion, if memory is full
_WAIT_SECONDS = 1.0  # for a turn, before Ctrl-C is looked for

Portion = tuple[range, ...]  # rows of all searchable vectors


class OnDevice:
    """Vectors ``ids`` [n], ascending, in lists ``numbers`` [n] of a training (None: all are searched)."""

    def __init__(
        self,
        device: str,
        trained: Trained | None,
        ids: Ids,
        numbers: npt.NDArray[np.int32] | None,
        fetch: Fetch,
        d: int,
    ) -> None:
        self._device, self._ids, self._numbers, self._fetch = device, ids, numbers, fetch
        on_device = torch.device(device)
        self._centroids = None if numbers is None or trained is None else Centroids(trained, on_device)
        gc.collect()  # what another database has left there
        # Before anything is loaded.
        free = free_memory(on_device) if on_device.type == "cuda" else None
        self._most = len(ids) if free is None else max(_LEAST, int(free * _SHARE) // (2 * d + _BYTES_BESIDE))
        self._block_rows = max(1, _BLOCK_BYTES // (2 * d))
        numbered = part_of(ids)
        starts = [*np.flatnonzero(np.diff(numbered, prepend=-1)).tolist(), len(ids)]
        self._parts = {int(numbered[a]): range(a, b) for a, b in pairwise(starts)}
        self._loaded: dict[Portion, ResidentLists] = {}  # the latest last
        self._turn = threading.Condition()
        self._is_busy = False
        self._left: list[list[Portion]] = []  # what each search that is under way has yet to go through

    def search(
        self,
        queries: Queries,
        nprobe: int,
        k: int,
        *,
        only: Collection[int] | None = None,
        beyond: int = 0,
        probed: Ids | None = None,
    ) -> Best:
        """Return the k nearest in the ``nprobe`` nearest lists of each query, ``only`` in some parts.

        ``probed`` [q, nprobe]: the lists of each query, instead of the nearest.
        """
        best, left = None, self._portions(only)
        with self._turn:
            self._left.append(left)
        try:
            while left:
                portion = self._await_turn(left)
                try:
                    found = self._load(portion).search(queries, k, nprobe, beyond, say, probed)
                finally:
                    with self._turn:
                        self._is_busy = False
                        left.remove(portion)
                        self._turn.notify_all()
                best = found if best is None else merged(best, found, k)
        finally:
            with self._turn:
                self._left = [other for other in self._left if other is not left]
                self._turn.notify_all()
        return best or Best.nothing(len(queries), k)

    def _await_turn(self, left: list[Portion]) -> Portion:
        """Wait until this search may go through one of the portions that it has ``left``."""
        while True:
            interrupts.check()
            with self._turn:
                if not self._is_busy and (portion := self._choose(left)) is not None:
                    self._is_busy = True
                    return portion
                self._turn.wait(_WAIT_SECONDS)

    def _choose(self, left: list[Portion]) -> Portion | None:
        """Return a portion that is loaded or may be; None while others want what it would replace."""
        for portion in left:
            if portion in self._loaded:
                return portion
        wanted = any(portion in other for other in self._left for portion in self._loaded)
        return left[0] if self._fits(left[0]) or not wanted else None

    def _fits(self, portion: Portion) -> bool:
        return sum(map(len, portion)) + sum(map(len, self._loaded.values())) <= self._most

    def nearest_lists(self, vectors: npt.NDArray[np.float32], nprobe: int) -> Ids:
        """Return the nearest lists of vectors, int64 [q, nprobe], nearest first."""
        assert self._centroids is not None
        found: Ids = self._centroids.nearest(upload(vectors, torch.device(self._device)).float(), nprobe).cpu().numpy()
        return found

    def _portions(self, only: Collection[int] | None) -> list[Portion]:
        allowed = list[range]()
        for part, rows in self._parts.items():
            if only is None or part in only:
                follows = bool(allowed) and allowed[-1].stop == rows.start
                allowed.append(range(allowed.pop().start if follows else rows.start, rows.stop))
        n = sum(map(len, allowed))
        size = -(-n // max(1, -(-n // self._most)))
        portions, room = list[Portion](), 0
        for rows in allowed:
            while rows:
                if not room:
                    portions, room = [*portions, ()], size
                portions[-1] = (*portions[-1], rows[:room])
                rows, room = rows[room:], max(room - len(rows), 0)
        return portions

    def _load(self, portion: Portion) -> ResidentLists:
        lists = self._loaded.pop(portion, None)
        if lists is None:
            while self._loaded and not self._fits(portion):
                self._loaded.pop(next(iter(self._loaded)))
            some = np.concatenate([np.arange(rows.start, rows.stop) for rows in portion])
            ids, numbers = self._ids[some], None if self._numbers is None else self._numbers[some]
            blocks = in_blocks(ids, self._fetch, self._block_rows)
            lists = ResidentLists(self._centroids, numbers, ids, blocks, self._device)
            if lists.why_slow:
                _say_once(f"{self._device}: search without Triton, several times as slow: {lists.why_slow}")
        self._loaded[portion] = lists
        return lists


_say_once = lru_cache(say)


def in_blocks(ids: Ids, fetch: Fetch, rows: int) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the vectors of ascending ids, so many rows at a time."""
    for start in range(0, len(ids), rows):
        yield fetch(ids[start : start + rows])
