"""The true nearest neighbours of random chunks, by exact search over what an index holds.

Queries are random searchable chunks of the indexed parts; what they may find are all others but those of their own
document. Products are float64, and the distances of the nearest are computed once more from the vectors.

Cost: queries × vectors distances, and reading every vector once. Above a budget of distances only a random share of the
vectors is searched, in blocks of ``_BLOCK`` rows: then of a query's true neighbours those are known that lie in the
sample, and recall is the share of these that is found (see ``index.recall``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ann.excluded import Excluded, Ids, Queries
from retrotool.ann.lists import OneList
from retrotool.ann.ranking import Best
from retrotool.ann.search import ROOM
from retrotool.embed.search_scope import (
    SearchableRows,
    document_intervals,
    find_documents,
    may_repeat,
    read_part_vectors,
)
from retrotool.engine.task import Report
from retrotool.index.exact import nearest_of
from retrotool.index.searching import TUNED_K
from retrotool.machine import give_memory_back
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT, chunk_ids
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

QUERIES = 2000
DEPTH = 100
_SEED = 1
BUDGET, GPU_BUDGET = 1 << 34, 1 << 40
"""Distances that a truth may cost: some minutes on two cores, or on a GPU."""
_BLOCK = 256
_KNOWN = 2000
"""True neighbours, among the 10 nearest of all queries, that a sample of the store is to have, whatever that costs."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Queries, their ``ids`` [q], the ``source`` of their documents [q], and the ``DEPTH`` nearest of each.

    ``share`` is that of the vectors that were searched, of ``vectors`` in all; 1: the nearest are the true ones.
    """

    ids: Ids
    queries: Queries
    sources: npt.NDArray[np.object_]
    best: Best
    vectors: int
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)


def find_truth(
    store: Store,
    encoder: str,
    numbers: list[int],
    report: Report = lambda _: None,
    *,
    queries: int = QUERIES,
    budget: int | None = None,
    device: str = "cpu",
    room: int = ROOM,
) -> Truth:
    """The truth for random chunks of the parts ``numbers``; ``report`` is told of each part that was searched.

    ``room``: bytes for each of distances and candidates.
    """
    tombstones = read_tombstones(store)
    rows = SearchableRows(store, numbers, tombstones)
    n = sum(rows.counts.values())
    drawn = [chunk_ids(part, chosen) for part, chosen in rows.draw(min(queries, n), _SEED)]
    ids = np.concatenate([np.zeros(0, np.int64), *drawn])
    if not len(ids):
        empty = Best(np.zeros((0, DEPTH), np.float32), np.zeros((0, DEPTH), np.int64))
        return Truth(ids, Queries.plain(np.zeros((0, 1), np.float32)), np.zeros(0, object), empty, n)
    asked = _queries(store, encoder, ids, tombstones)
    most = budget_on(device) if budget is None else budget
    share = min(1.0, max(most / (len(ids) * n), _KNOWN / (TUNED_K * len(ids))))
    rng = np.random.default_rng(_SEED)
    best: Best | None = None
    for part, searchable in rows.items():
        chosen = searchable
        if share < 1:
            blocks = rng.random(-(-len(searchable) // _BLOCK)) < share
            chosen = searchable[np.repeat(blocks, _BLOCK)[: len(searchable)]]
        if len(chosen):
            vectors = read_part_vectors(store, encoder, part)
            matrix = vectors if len(chosen) == len(vectors) else vectors[chosen]
            some = OneList(chunk_ids(part, chosen), matrix)
            best = nearest_of(asked, some, DEPTH, best, precise=True, device=device, room=room)
        report(1)
    if best is None:
        best = Best(np.full((len(ids), DEPTH), np.inf, np.float32), np.full((len(ids), DEPTH), -1, np.int64))
    give_memory_back()
    return Truth(ids, asked, _sources(store, ids), best, n, share)


def _queries(store: Store, encoder: str, ids: Ids, tombstones: Tombstones) -> Queries:
    vectors, intervals, keys = [], [], []
    repeat = may_repeat(store)
    for part, rows in _by_part(ids):
        vectors.append(read_part_vectors(store, encoder, part)[rows].astype(np.float32))
        if repeat:
            keys.append(_of_documents(store, part, rows, "key"))
        else:
            intervals.append([ends[rows] for ends in document_intervals(store, part)])
    if repeat:
        excluded = find_documents(store, pa.chunked_array(keys), tombstones)
    else:
        excluded = Excluded(*np.concatenate(intervals, axis=1))
    return Queries(np.concatenate(vectors), excluded)


def _sources(store: Store, ids: Ids) -> npt.NDArray[np.object_]:
    found = [_of_documents(store, part, rows, "source").to_pylist() for part, rows in _by_part(ids)]
    return np.array([source or "" for some in found for source in some], object)


def _by_part(ids: Ids) -> list[tuple[int, Ids]]:
    numbers = ids >> PART_SHIFT
    return [(int(part), ids[numbers == part] - (int(part) << PART_SHIFT)) for part in np.unique(numbers)]


def _of_documents(store: Store, part: int, rows: Ids, column: str) -> pa.Array:
    """A column of the documents that some rows of a part belong to, one value a row."""
    table = parts.read_documents(store, part, [column, "first_row"])
    documents = np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1
    found = table[column].combine_chunks().take(pa.array(documents))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def budget_on(device: str) -> int:
    """Distances that a truth may cost on a device."""
    return BUDGET if device == "cpu" else GPU_BUDGET
