"""Search only the chunks of some sources: find these chunks, and how many lists to probe for them.

The documents' ``source`` is read at the first search and kept as one bit per chunk: 125 MB for a billion.
Only allowed vectors of a list are decoded. A query's nearest lists may contain hardly any, so it probes until
its lists contain as many allowed vectors as those of the operating point contain in all, and re-ranks twice
as many: recall@10 within one of five sources rises from 0.515–0.956 to 0.967–1.000
(``benchmarks/neighbour_filters.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann.excluded import Ids
from retrotool.ann.lists import SomeLists
from retrotool.ann.search import nearest_lists
from retrotool.ann.trained import Trained
from retrotool.chunk.chunk_plan import documents_within
from retrotool.lazy import torch
from retrotool.store import parts
from retrotool.store.expressions import Where
from retrotool.store.parts import part_of, row_of
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

Allows = Callable[[str], bool]  # checks whether a source may be searched


class AllowedChunks:
    """The ``count`` chunks, some perhaps purged, whose document, or its source, ``allows``."""

    def __init__(self, store: Store, allows: Allows | Where) -> None:
        numbers, self.count = store.state.parts(), 0
        self._first = np.zeros(max(numbers, default=-1) + 1, np.int64)  # first bit of each part
        sizes = [-(-parts.part_entry(store, "chunks", part).rows // 8) for part in numbers]
        self._first[numbers] = 8 * (np.cumsum(sizes) - sizes)
        self._bits = np.zeros(sum(sizes), np.uint8)
        self._rows = {part: parts.part_entry(store, "chunks", part).rows for part in numbers}
        for part in numbers:
            table = parts.read_documents(store, part, ["source", "n_chunks"])
            if isinstance(allows, Where):
                documents = allows.rows(store, part)
            else:  # called once per source and part
                sources = table["source"].combine_chunks().dictionary_encode()
                allowed = np.array([*(allows(name) for name in sources.dictionary.to_pylist()), False])
                # Erased documents have no source: −1 selects the final False.
                documents = allowed[sources.indices.fill_null(-1).to_numpy()]
            self.count += int(table["n_chunks"].to_numpy()[documents].sum())
            packed = np.packbits(np.repeat(documents, table["n_chunks"].to_numpy()))
            start = int(self._first[part]) // 8
            self._bits[start : start + len(packed)] = packed

    def contains(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which chunks are allowed, bool [n]."""
        place = self._first[part_of(ids)] + row_of(ids)
        found: npt.NDArray[np.bool_] = (self._bits[place >> 3] << (place & 7) & 0x80) > 0
        return found

    def rows(self, part: int) -> npt.NDArray[np.bool_]:
        """Return which rows of a part are allowed, bool [n]."""
        start = int(self._first[part]) // 8
        return np.unpackbits(self._bits[start:], count=self._rows[part]).astype(np.bool_)


def source_names(store: Store) -> Iterator[set[str]]:
    """Yield the sources of live documents for each part; parts may share sources."""
    tombstones = read_tombstones(store)
    for part in store.state.parts():
        sources = parts.read_documents(store, part, ["source"])["source"]
        live = np.delete(np.arange(len(sources)), documents_within(store, part, tombstones))
        yield set(pc.unique(sources.take(pa.array(live))).drop_null().to_pylist())


def find_sources(
    databases: Iterable[Store], keyed: Callable[[str], str], hashes: Collection[str], parts_of_each: int | None = None
) -> dict[str, str]:
    """Return source names by their keyed hashes, looking in up to ``parts_of_each`` parts per store."""
    found: dict[str, str] = {}
    for names in chain.from_iterable(islice(source_names(one), parts_of_each) for one in databases if hashes):
        found |= {hashed: name for name in names if (hashed := keyed(name)) in hashes}
        if set(hashes) <= set(found):
            break
    return found


def probes_by_query(
    trained: Trained, vectors: npt.NDArray[np.float32], nprobe: int, some: Sequence[SomeLists]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield (lists to probe, queries): lists with as many wanted vectors as the nearest ``nprobe`` in all."""
    if trained.centroids is None:
        yield nprobe, np.arange(len(vectors))
        return
    none = np.zeros(trained.nlist, np.int64)
    everything, allowed = sum((one.whole for one in some), none), sum((one.sizes for one in some), none)
    left, wanted = np.arange(len(vectors)), np.zeros(0, np.int64)
    while len(left) and nprobe < trained.nlist:
        lists = nearest_lists(trained.centroids, trained.rotate(torch.from_numpy(vectors[left])), nprobe)
        wanted = wanted if len(wanted) else everything[lists].sum(axis=1)
        enough = allowed[lists].sum(axis=1) >= wanted[left]
        if enough.any():
            yield nprobe, left[enough]
        left = left[~enough]
        nprobe *= 2
    if len(left):
        yield trained.nlist, left
