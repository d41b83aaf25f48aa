"""Score saved neighbours by the tokens that they share with their chunk: BM25, to re-rank them.

The score of a neighbour N for a chunk with the distinct tokens *t* is

    Σ idf(t) · f · (k1 + 1) / (f + k1 · (1 − b + b · |N| / mean))
    idf(t) = ln(1 + (n − n_t + ½) / (n_t + ½))

where *t* occurs *f* times in N and in n_t of the n chunks of the database, which have ``mean`` tokens;
k1 = 1.2 and b = 0.75 (Robertson & Zaragoza 2009; the idf is Lucene's, which is never negative). RETRO has a
lower perplexity with neighbours that share more tokens (Doostmohammadi et al. 2023, arXiv 2305.16243).

* Continuations don't count. Tokens are compared, not words.
* n, n_t and ``mean`` are counted in the live chunks of up to 128 row groups (a million chunks), evenly spaced
  in the database: a few seconds. They are not stored, but counted again by each process.
* Nothing is searched: only what was saved is scored. Libraries (``bm25s``, ``rank-bm25``) index all chunks,
  which takes longer than to score 20 of them per row.

Cost: about 0.5 million pairs per second on a core, with chunks of 64 tokens; the time grows with the square
of their length. Pairs are scored in the order of the neighbours' ids, so that the tokens of the database are
read once per 2 to 16 million pairs (``filters.candidates_at_once``). Beyond some 50 million chunks this takes
longer than scoring; there are no shelves for it. Memory: 40 bytes per pair.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.index.searching import AnyDatabase
from retrotool.lazy import torch
from retrotool.neighbours.retrieved import read_pieces
from retrotool.ranges import in_steps, spread
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_SCORE
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.storage import each
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.integer]

K1, B = 1.2, 0.75
_SAMPLED_GROUPS = 128
_NEIGHBOURS_READ = 1 << 18  # distinct neighbours whose tokens are in memory at a time
_TOKENS_COMPARED = 1 << 16  # in the pairs of a thread: these stay in its cache


@dataclass(frozen=True, slots=True)
class TermStatistics:
    """The ``idf`` of each token, float32 [vocabulary + 1], and the mean number of tokens of a chunk."""

    idf: Floats
    mean: float


def count_terms(store: Store, tombstones: Tombstones) -> TermStatistics:
    """Count in how many chunks each token occurs, in evenly spaced row groups of a database."""
    numbers, last = store.state.parts(), store.identity.tokenizer.vocabulary
    groups = np.array([-(-parts.part_entry(store, "chunks", part).rows // ROW_GROUP) for part in numbers], np.int64)
    ends = np.cumsum(groups)
    chosen = spread(int(ends[-1]), _SAMPLED_GROUPS) if len(ends) else ends
    places = np.searchsorted(ends, chosen, side="right")

    def count(place: int, group: int) -> tuple[int, int, npt.NDArray[np.int64]]:
        interrupts.check()
        chunks = parts.read_chunks(store, numbers[place], [group])
        ids = parts.chunk_ids(numbers[place], group * ROW_GROUP + np.arange(len(chunks)))
        live = np.flatnonzero((chunks.n_tokens > 0) & ~tombstones.contains(ids))
        tokens, first = distinct_tokens(chunks.tokens[live], chunks.n_tokens[live])
        counts = np.bincount(np.minimum(tokens[first], last), minlength=last + 1)
        return len(live), int(chunks.n_tokens[live].sum(dtype=np.int64)), counts

    n, total, holding = 0, 0, np.zeros(last + 1, np.int64)
    sampled = zip(places.tolist(), (chosen - (ends - groups)[places]).tolist(), strict=True)
    for n_live, n_tokens, counts in each(store.storage, lambda one: count(*one), sampled):
        n, total, holding = n + n_live, total + n_tokens, holding + counts
    return TermStatistics(np.log1p((n - holding + 0.5) / (holding + 0.5)).astype(np.float32), total / max(n, 1))


def distinct_tokens(tokens: Tokens, n_tokens: npt.NDArray[Any]) -> tuple[Tokens, npt.NDArray[np.bool_]]:
    """Sort the tokens of chunks [n, w], without their padding; return which are the first of equal ones."""
    is_there = np.arange(tokens.shape[1]) < n_tokens[:, None]
    ordered = np.where(is_there, tokens, tokens[:, :1])  # padding repeats a token
    ordered.sort(axis=1)
    first = np.ones(ordered.shape, np.bool_)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    first[n_tokens == 0] = False
    return ordered, first


def score_overlap(
    queries: Store, part: int, rows: Ids, ids: Ids, database: AnyDatabase, terms: TermStatistics, at_once: int
) -> Floats:
    """Score the neighbours ``ids`` [n, saved] of ascending ``rows`` [n] of a part of the queries.

    Returns float32 [n, saved], 0 or more; ``NO_SCORE`` where an id is −1. Purged rows are scored, too; purged
    neighbours get the score 0. ``at_once`` pairs are scored at a time.
    """
    found = np.full(ids.shape, NO_SCORE, np.float32)
    for some in in_steps(np.arange(len(rows)), max(1, at_once // ids.shape[1])):
        _score(queries, part, rows[some], ids[some], database, terms, found[some[0] : some[-1] + 1])
    return found


def _score(
    queries: Store, part: int, rows: Ids, ids: Ids, database: AnyDatabase, terms: TermStatistics, into: Floats
) -> None:
    own = read_pieces(queries, Tombstones(np.zeros(0, np.int64)), parts.chunk_ids(part, rows))  # purged ones, too
    asked, first = distinct_tokens(own.tokens[:, 0], own.n_tokens[:, 0])
    weights = np.where(first, terms.idf[np.minimum(asked, len(terms.idf) - 1)], np.float32(0))
    flat, scores = ids.ravel(), into.reshape(-1)
    order = np.flatnonzero(flat >= 0)
    order = order[np.argsort(flat[order], kind="stable")]
    starts = np.append(np.flatnonzero(np.diff(flat[order], prepend=-1)), len(order))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for low in range(0, len(starts) - 1, _NEIGHBOURS_READ):
            pairs = order[starts[low] : starts[min(low + _NEIGHBOURS_READ, len(starts) - 1)]]
            near, place = np.unique(flat[pairs], return_inverse=True)
            pieces = read_pieces(database.store, database.tombstones, near)

            def score(some: Ids, pairs: Ids = pairs, place: Ids = place, pieces: Any = pieces) -> None:
                interrupts.check()
                of, at = pairs[some] // ids.shape[1], place[some]
                others = pieces.tokens[at, 0], pieces.n_tokens[at, 0]
                scores[pairs[some]] = score_pairs(asked[of], weights[of], *others, terms.mean)

            size = max(1, _TOKENS_COMPARED // asked.shape[1])
            list(threads.map(score, in_steps(np.arange(len(pairs)), size)))


def score_pairs(asked: Tokens, weights: Floats, others: Tokens, n_others: Ids, mean: float) -> Floats:
    """Return the scores of pairs, float32 [n].

    Of each: tokens of the chunk [n, w] with their ``weights``, 0 where one is repeated, and the neighbour's
    tokens [n, m], zero-padded, of which ``n_others`` [n] count.
    """
    longest = int(n_others.max(initial=0))
    columns = np.ascontiguousarray(asked.T)  # one pair after another in memory: numpy compares many at once
    counts = np.zeros(columns.shape, np.uint8 if longest <= np.iinfo(np.uint8).max else np.uint16)
    same = np.empty(columns.shape, np.bool_)
    for token in np.ascontiguousarray(others[:, :longest].T):
        np.equal(columns, token, out=same)
        counts += same.view(np.uint8)
    counts -= (columns == 0) * (longest - n_others).astype(counts.dtype)  # the padding is not tokens
    frequency = counts.astype(np.float32)
    damping = (K1 * (1 - B + B * n_others / max(mean, math.ulp(1.0)))).astype(np.float32)
    return np.asarray((weights.T * frequency * np.float32(K1 + 1) / (frequency + damping)).sum(axis=0))
