"""The true recall of an index.

Measured against exact search, in float64, over all living keys of the parts that are indexed, on random ones of them,
their own documents excluded. Recall@10 is the mean share of a query's true 10 nearest that the index finds. ``tune``
doubles ``nprobe`` until the recall less its 95 % error holds the target. Cost: ``QUERIES`` × n distances for the truth,
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrotool.ann.lists import Ids, InvertedLists
from retrotool.ann.search import Best, Excluded, Queries, search
from retrotool.stages.base import Report
from retrotool.stages.database import (
    document_intervals,
    find_documents,
    may_repeat,
    read_part_vectors,
    read_shards,
    searchable_rows,
)
from retrotool.stages.index import read_searchable, shards
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT, chunk_ids
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

QUERIES = 1000
DEPTH = 10
_SEED = 1
_TIE = 16 * float(np.finfo(np.float32).eps)
"""Distances that differ by less, relatively, are the same: a sum of squares in float32 is no more exact. Not more than
relatively, for vectors may be short."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall@10 at ``nprobe``, with the half-width of its 95 % interval, over ``queries`` queries."""

    nprobe: int
    recall: float
    error: float
    queries: int


def tune(
    store: Store, encoder: str, index: str, target: float, report: Report = lambda _: None
) -> tuple[Recall, list[Recall]]:
    """The least ``nprobe`` (a power of two, or all lists) that holds ``target``, and the curve that was measured."""
    held = sorted(part for about in shards(store.state, index).values() for part in about["parts"])
    queries, truth = _truth(store, encoder, held, report)
    opened = list(read_shards(store, index))
    nlist = max((1 if s.centroids is None else len(s.centroids) for s in opened), default=1)
    banned = read_tombstones(store).contains
    curve: list[Recall] = []
    nprobe = 1
    while True:
        found = Best(len(queries.vectors), DEPTH)
        for shard in opened:
            search(shard, queries, nprobe, banned, found)
        curve.append(_recall(found, truth, nprobe))
        if curve[-1].recall - curve[-1].error >= target or nprobe >= nlist:
            return curve[-1], curve
        nprobe = min(2 * nprobe, nlist)


def _truth(store: Store, encoder: str, numbers: list[int], report: Report) -> tuple[Queries, Best]:
    """Random living keys of the parts ``numbers`` as queries, and their true 10 nearest in these parts."""
    tombstones = read_tombstones(store)
    none = np.zeros(0, np.int64)
    ids = np.concatenate([none, *(chunk_ids(part, searchable_rows(store, part, tombstones)) for part in numbers)])
    drawn = np.sort(np.random.default_rng(_SEED).choice(ids, min(QUERIES, len(ids)), replace=False))
    vectors, intervals, keys = [], [], []
    repeat = may_repeat(store)
    for part in numbers:
        rows = drawn[drawn >> PART_SHIFT == part] - (part << PART_SHIFT)
        if len(rows):
            vectors.append(read_part_vectors(store, encoder, part)[rows].astype(np.float32))
            if repeat:
                keys += _document_keys(store, part, rows)
            else:
                intervals.append([ends[rows] for ends in document_intervals(store, part)])
    if not vectors:
        return Queries.plain(np.zeros((0, 1), np.float32)), Best(0, DEPTH)
    if repeat:
        excluded = find_documents(store, pa.chunked_array(keys), tombstones)
    else:
        excluded = Excluded(*np.concatenate(intervals, axis=1))
    queries = Queries(np.concatenate(vectors), excluded)
    best = Best(len(drawn), DEPTH)
    for part in numbers:
        there, matrix = read_searchable(store, encoder, part, tombstones)
        everything = InvertedLists(None, (there,), (matrix,))
        search(everything, queries, 1, lambda ids: np.zeros(len(ids), np.bool_), best, precise=True)
        report(1)
    return queries, best


def _document_keys(store: Store, part: int, rows: Ids) -> list[pa.Array]:
    """The keys of the documents that some rows of a part belong to, one a row."""
    table = parts.read_documents(store, part, ["key", "first_row"])
    documents = np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1
    return [table["key"].combine_chunks().take(pa.array(documents))]


def _recall(found: Best, truth: Best, nprobe: int) -> Recall:
    """Mean share of the true 10 nearest that was found; of several at the same distance any will do."""
    there = truth.ids >= 0
    farthest = np.where(there, truth.distances, -np.inf).max(axis=1)
    near = found.distances <= (farthest * (1 + _TIE))[:, None]
    possible = there.sum(axis=1)
    hits = np.minimum((near & (found.ids >= 0)).sum(axis=1), possible)
    shares = hits[possible > 0] / possible[possible > 0]
    if not len(shares):
        return Recall(nprobe, 1.0, 0.0, 0)  # nothing to find, and nothing missed
    return Recall(nprobe, float(shares.mean()), float(1.96 * shares.std() / math.sqrt(len(shares))), len(shares))
