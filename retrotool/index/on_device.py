"""The searchable vectors of a database in the memory of a GPU.

What does not fit is loaded in portions of parts, one after the other; a search goes through all of them and
merges what it finds. The latest portion is kept for the next search. Vectors are read ahead of their
transfer. Chunks that must not be found are not loaded, so another commit or filter needs another object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Ids, Queries
from retrotool.ann.lists import Trained
from retrotool.ann.ranking import Best, Fetch
from retrotool.ann.resident import Centroids, ResidentLists, free_memory
from retrotool.encoder.encoder import say
from retrotool.lazy import torch
from retrotool.read_ahead import ahead
from retrotool.store.parts import part_of

_BLOCK = 1 << 16  # vectors that are read at a time
_AHEAD = 2
_SHARE = 0.7  # of the free memory for vectors; the rest is for queries
_BYTES_BESIDE = 32  # of a vector, while lists are sorted

Merge = Callable[[Best, Best, int], Best]


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
        # Before anything is loaded.
        free = free_memory(on_device) if on_device.type == "cuda" else None
        self._most = len(ids) if free is None else max(_BLOCK, int(free * _SHARE) // (2 * d + _BYTES_BESIDE))
        numbered = part_of(ids)
        starts = [*np.flatnonzero(np.diff(numbered, prepend=-1)).tolist(), len(ids)]
        self._parts = {int(numbered[a]): slice(a, b) for a, b in pairwise(starts)}
        self._loaded: tuple[tuple[int, ...], ResidentLists] | None = None

    def search(
        self,
        queries: Queries,
        k: int,
        nprobe: int,
        merge: Merge,
        *,
        only: Collection[int] | None = None,
        beyond: int = 0,
    ) -> Best:
        """Return the k nearest in the ``nprobe`` nearest lists of each query, ``only`` in some parts."""
        best: Best | None = None
        for portion in self._portions(only):
            found = self._load(portion).search(queries, k, nprobe, beyond, say)
            best = found if best is None else merge(best, found, k)
        return best or Best.nothing(len(queries), k)

    def nearest_lists(self, vectors: npt.NDArray[np.float32], nprobe: int) -> Ids:
        """Return the nearest lists of vectors, int64 [q, nprobe], nearest first."""
        assert self._centroids is not None
        found: Ids = self._centroids.nearest(torch.from_numpy(vectors).to(self._device), nprobe).cpu().numpy()
        return found

    def _portions(self, only: Collection[int] | None) -> Iterator[tuple[int, ...]]:
        portion, held = list[int](), 0
        for part, rows in self._parts.items():
            if only is not None and part not in only:
                continue
            n = rows.stop - rows.start
            if portion and held + n > self._most:
                yield tuple(portion)
                portion, held = [], 0
            portion.append(part)
            held += n
        if portion:
            yield tuple(portion)

    def _load(self, portion: tuple[int, ...]) -> ResidentLists:
        if self._loaded is not None and self._loaded[0] == portion:
            return self._loaded[1]
        self._loaded = None  # first: there is no room for both
        some = np.concatenate([np.arange(len(self._ids))[self._parts[part]] for part in portion])
        ids = self._ids[some]

        def blocks() -> Iterator[npt.NDArray[np.float16]]:
            for start in range(0, len(ids), _BLOCK):
                yield self._fetch(ids[start : start + _BLOCK])

        numbers = None if self._numbers is None else self._numbers[some]
        with contextlib.closing(ahead(blocks(), _AHEAD)) as read:
            lists = ResidentLists(self._centroids, numbers, ids, read, self._device)
        self._loaded = (portion, lists)
        return lists
