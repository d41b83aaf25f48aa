"""``--near-duplicates-of``: copies of given chunks, so that a takedown includes them.

A **place** is a chunk and the next one of its document, if any. The rule:

1. A place is a copy of a given chunk if it has at least half of its distinct 8-grams of tokens, in any order.
   An 8-gram may cross from the first chunk of a place to the second if the first is full. It crosses no other
   border: of documents, of key and value, or to an erased chunk.
2. A chunk of such a place is selected if it holds at least 4 of the 8 tokens of one of these 8-grams.
3. For a given chunk with fewer than 8 distinct 8-grams (it has fewer than 15 tokens, or is repetitive), only
   chunks with exactly the same tokens are copies.

For a given chunk of 23 tokens or more with distinct 8-grams this finds: verbatim copies, wherever they begin
in a chunk; copies with one token replaced, removed or inserted; half copies; and the chunk itself. Text
changed in every line, or paraphrased, is not found.

Cost: reading, and 0.2 to 1 µs per chunk, 2 to 4 µs where every tenth chunk is found; see ``ngrams``. Memory:
see ``ngrams``, about 12 kB per given chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retrotool.neighbours.token_overlap import COPIED, GRAM
from retrotool.purge.selectors.ngrams import Flags, GramSets, Ints, Tokens, distinct, distinct_rows, follows, reach
from retrotool.purge.selectors.selector import BlockHits, Selector, TextBlock
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store

FEWEST = 8  # chunks with fewer distinct n-grams are compared for equality

_HELD = GRAM // 2


@dataclass(frozen=True, slots=True)
class NearDuplicates(Selector):
    """Copies of the chunks with these ids, as defined by the module."""

    kind: ClassVar[str] = "near-duplicates-of"
    chunks: tuple[int, ...]

    def open(self, store: Store) -> CopyMatcher:
        """Read the chunks. If all are erased, nothing is a copy: an erase that was killed goes on without."""
        ids, own = np.array(self.chunks, np.int64), store.identity
        tokens = np.zeros((len(ids), own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes))
        n_tokens = np.zeros(len(ids), np.int64)
        for places, read, rows in parts.read_groups_of(store, ids):
            tokens[places], n_tokens[places] = read.tokens[rows], read.n_tokens[rows]
        return CopyMatcher(tokens, n_tokens, COPIED, FEWEST)


class CopyMatcher:
    """Finds copies of chunks: ``tokens`` [v, chunk_length] in the store's dtype, and ``n_tokens`` [v]."""

    def __init__(self, tokens: Tokens, n_tokens: Ints, share: float, fewest: int) -> None:
        self._sets = None
        runs = np.zeros(len(tokens), np.int64)
        if tokens.shape[1] >= GRAM:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, GRAM, axis=1)
            row, start = np.nonzero(np.arange(windows.shape[1]) <= n_tokens[:, None] - GRAM)
            grams = windows[row, start]
            kept, which = distinct_rows(grams)
            different = distinct(row * max(len(kept), 1) + which) // max(len(kept), 1)
            runs = np.bincount(different, minlength=len(tokens))
            enough = runs[row] >= fewest
            self._sets = GramSets(grams[enough], row[enough], share) if enough.any() else None
        whole = (n_tokens > 0) & (runs < max(fewest, 1))
        self._whole = {row[:n].tobytes() for row, n in zip(tokens[whole], n_tokens[whole], strict=True)}
        self._lengths, self._firsts = np.unique(n_tokens[whole]), np.unique(tokens[whole, 0])

    def __call__(self, block: TextBlock) -> BlockHits:
        """Find matching rows of a block."""
        chunks = block.chunks
        selected = np.zeros(len(block), np.bool_)
        if self._sets is not None:
            _select(self._sets, selected, *_find_grams(self._sets, chunks))
        if self._whole:
            rows = np.flatnonzero(np.isin(chunks.n_tokens, self._lengths) & np.isin(chunks.tokens[:, 0], self._firsts))
            cut = (row[:n] for row, n in zip(chunks.tokens[rows], chunks.n_tokens[rows], strict=True))
            selected[rows[[own.tobytes() in self._whole for own in cut]]] = True
        return BlockHits.whole(np.flatnonzero(selected))


def _find_grams(sets: GramSets, chunks: Chunks) -> tuple[Ints, Ints, Flags, Flags]:
    """Return the n-grams of a block, [e]: place (first row), n-gram, and which of its rows hold it."""
    length = chunks.tokens.shape[1]
    n_tokens = chunks.n_tokens.astype(np.int64)
    follow = follows(chunks, n_tokens)
    flat = np.ascontiguousarray(chunks.tokens).reshape(-1)
    at, hashes, least = sets.likely(flat)
    there = np.bincount(at // length + 1, minlength=len(chunks) + 2)
    # The places with an n-gram have all others in its chunk and the chunks beside it.
    enough = (there[:-2] + there[1:-1] + there[2:])[at // length] >= least
    at, gram = sets.identify(flat, at[enough], hashes[enough])
    row, start = np.divmod(at, length)
    whole = start + GRAM <= n_tokens[row]
    begins = start + GRAM <= reach(n_tokens, follow, length)[row]
    follows_on = whole & (row > 0)
    follows_on[follows_on] = follow[row[follows_on] - 1]
    place = np.concatenate([row[begins], row[follows_on] - 1])
    gram, start = (np.concatenate([some[begins], some[follows_on]]) for some in (gram, start))
    second = np.arange(len(place)) >= int(begins.sum())
    return place, gram, ~second & (length - start >= _HELD), second | (start + GRAM - length >= _HELD)


def _select(sets: GramSets, selected: Flags, place: Ints, gram: Ints, first: Flags, second: Flags) -> None:
    """Mark the rows of copies in ``selected`` [n]; the other arguments [e] are from ``_find_grams``."""
    entries, held = sets.entries(place, gram, first, second)
    wanted = [np.bincount(place[flags], minlength=len(selected)) > 0 for flags in (first, second)]
    closed = np.zeros(len(selected), np.bool_)
    for shared in sets.shared(entries, closed):
        for row, flags in enumerate(held):
            hit = np.bincount(shared.of[flags[shared.entry]], minlength=len(shared.place)) > 0
            selected[shared.place[hit] + row] = True
        # Places are done when all their chunks that hold an n-gram are selected.
        closed[:] = (selected | ~wanted[0]) & (np.append(selected[1:], True) | ~wanted[1])
