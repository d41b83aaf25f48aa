"""``--near-duplicates-of``: the copies of some chunks, so that a takedown takes them too.

A **place** is a chunk and the one that follows it in its document, or a chunk that none follows. The rule, exactly:

1. Of each given chunk (a victim) the different runs of 8 tokens are taken. A place is a copy if it has half of them or
   more, in any order. Such a run may begin in the place's first chunk and end in its second if the first is full. It
   lies across no other border: not of documents, of key and value, and not beside what is erased.
2. Of the place's two chunks those are selected that hold at least 4 of the 8 tokens of one of these runs.
3. Of a victim with fewer than 8 different runs (as it has fewer than 15 tokens, or repeats itself) a copy is a chunk of
   the same tokens, no more and no fewer.

So all of these are found, of a victim of 23 tokens or more whose runs all differ: a copy verbatim, wherever it begins
in its first chunk; one with any one token exchanged, left out or put in; and one of which a half is there; and the
victims themselves. Text that was changed in every line, or put into other words, is not found.

Cost: reading, and 0.2 to 1 µs a chunk, 2 to 4 µs where every tenth chunk is found; see ``ngrams`` for why. Memory:
``ngrams``, some 12 kB a victim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.purge.selectors.ngrams import Flags, GramSets, Hashes, Ints, Tokens, distinct, distinct_rows, follows
from retrotool.purge.selectors.selector import BlockHits, Selector, TextBlock
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store

GRAM = 8
"""Tokens of the runs by which a copy is told."""
COPIED = 0.5
"""The share of a chunk's different runs that a copy has."""
FEWEST = 8
"""Different runs that a chunk must have for less than an equal chunk to be a copy of it."""

_HELD = GRAM // 2


@dataclass(frozen=True, slots=True)
class NearDuplicates(Selector):
    """Copies of the chunks with these ids, as the module says."""

    kind: ClassVar[str] = "near-duplicates-of"
    chunks: tuple[int, ...]

    def open(self, store: Store) -> CopyMatcher:
        """Read the chunks; ``UsageError`` if none has tokens any more."""
        ids, own = np.unique(np.array(self.chunks, np.int64)), store.identity
        tokens = np.zeros((len(ids), own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes))
        n_tokens = np.zeros(len(ids), np.int64)
        for places, read, rows in parts.read_groups_of(store, ids):
            tokens[places], n_tokens[places] = read.tokens[rows], read.n_tokens[rows]
        if not n_tokens.any():  # erased chunks have none
            raise UsageError("none of the chunks has any tokens left: nothing tells what a copy of them is")
        return CopyMatcher(tokens, n_tokens, COPIED, FEWEST)


class CopyMatcher:
    """Finds the copies of ``tokens`` [v, chunk_length], of the store's type, of which ``n_tokens`` [v] count."""

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
            told = runs[row] >= fewest
            self._sets = GramSets(grams[told], row[told], share) if told.any() else None
        whole = (n_tokens > 0) & (runs < max(fewest, 1))
        self._whole = set(_keys(tokens[whole], n_tokens[whole]))
        self._lengths, self._firsts = np.unique(n_tokens[whole]), np.unique(tokens[whole, 0])

    def __call__(self, block: TextBlock) -> BlockHits:
        """The chunks of copies."""
        chunks = block.chunks
        selected = np.zeros(len(block), np.bool_)
        if self._sets is not None:
            _select(self._sets, selected, *_find_grams(self._sets, chunks))
        if self._whole:
            rows = np.flatnonzero(np.isin(chunks.n_tokens, self._lengths) & np.isin(chunks.tokens[:, 0], self._firsts))
            keys = _keys(chunks.tokens[rows], chunks.n_tokens[rows])
            selected[rows[[key in self._whole for key in keys]]] = True
        return BlockHits.whole(np.flatnonzero(selected))


def _find_grams(sets: GramSets, chunks: Chunks) -> tuple[Ints, Ints, Flags, Flags]:
    """The grams of a block: place (its first row), gram, and whether the first or the second row holds it, [e]."""
    length = chunks.tokens.shape[1]
    n_tokens = chunks.n_tokens.astype(np.int64)
    follow = follows(chunks, n_tokens)
    beyond = np.where(follow & (n_tokens == length), np.append(n_tokens[1:], 0), 0)
    flat = np.ascontiguousarray(chunks.tokens).reshape(-1)
    at, gram = sets.identify(flat, *_enough(*sets.likely(flat), length))
    row, start = np.divmod(at, length)
    whole = start + GRAM <= n_tokens[row]
    begins = whole | (start + GRAM <= n_tokens[row] + beyond[row])
    follows_on = whole & (row > 0)
    follows_on[follows_on] = follow[row[follows_on] - 1]
    place = np.concatenate([row[begins], row[follows_on] - 1])
    gram, start = (np.concatenate([some[begins], some[follows_on]]) for some in (gram, start))
    second = np.arange(len(place)) >= int(begins.sum())
    return place, gram, ~second & (length - start >= _HELD), second | (start + GRAM - length >= _HELD)


def _enough(at: Ints, hashes: Hashes, least: npt.NDArray[np.uint8], length: int) -> tuple[Ints, Hashes]:
    """Of grams that may be at ``at`` [h] those that have enough others in their chunk and one beside it."""
    row = at // length
    there = np.bincount(row, minlength=int(row[-1]) + 2 if len(at) else 1)
    beside = np.append(there[1:], 0)
    np.maximum(beside[1:], there[:-1], out=beside[1:])
    enough = (there + beside)[row] >= least
    return at[enough], hashes[enough]


def _select(sets: GramSets, selected: Flags, place: Ints, gram: Ints, first: Flags, second: Flags) -> None:
    """Mark the rows of copies in ``selected`` [n]; the rest [e] is of ``_find_grams``."""
    if not len(place):
        return
    low = int(place.min())
    entries, held = sets.entries(place - low, gram, first, second)
    places = int(place.max()) - low + 1
    wanted = [np.bincount(place[flags] - low, minlength=places) > 0 for flags in (first, second)]
    rows = low + np.arange(places)
    following = np.minimum(rows + 1, len(selected) - 1)
    closed = np.zeros(places, np.bool_)
    for shared in sets.shared(entries, closed):
        selected[low + shared.place[shared.any_of(held[0])]] = True
        selected[low + shared.place[shared.any_of(held[1])] + 1] = True
        # Nothing is left to find where every chunk that holds a gram is selected.
        closed[:] = (selected[rows] | ~wanted[0]) & (selected[following] | ~wanted[1])


def _keys(tokens: Tokens, n_tokens: npt.NDArray[np.integer]) -> list[tuple[int, bytes]]:
    """What is equal of chunks [r, chunk_length] that are."""
    data, width = tokens.tobytes(), tokens.shape[1] * tokens.itemsize
    return [(n, data[i * width : (i + 1) * width]) for i, n in enumerate(n_tokens.tolist())]
