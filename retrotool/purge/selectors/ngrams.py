"""Find places in text that have a large share of a set of n-grams: copies and evaluation text.

The sets are held in memory and the text is streamed. A hash of the ``n`` tokens at each position of the text
is looked up in a table of hashes that the sets may have. Candidates are looked up among the sets' hashes and
compared token by token, so a hash collision costs a comparison and changes nothing.

Places (pairs of chunks, documents) with enough grams of a set are found as in prefix-filtered set joins: a
place with ``needed`` of a set's ``size`` grams has at least one of any ``size − needed + 1`` of them. The
rarest ones, those that the fewest other sets have, are used as this prefix. Candidates are then counted in
full. Equal sets are merged.

Cost: 3 to 10 ns per token where nothing is found; 0.1 µs per gram found; 3 µs per place and set compared (57
grams). A place is compared with the sets that have one of their rarest grams there, a few at a time, until
the caller closes it. The worst case is many different sets of the same grams: all are compared with each
place that has some of these grams and not enough. Memory: the table, at most 16 MB, and about 100 bytes per
gram of the sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from retrotool.neighbours.token_overlap import HASH_BITS, gram_hashes
from retrotool.ranges import pairs_of_ranges
from retrotool.store.parts import Chunks, fixed_binary

Tokens = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

Number = TypeVar("Number", bound=np.integer[Any])

_TABLE_BITS = (12, 24)
_PLACES_A_GRAM = 32
_FIRST_SETS, _MORE_SETS = 1, 4
"""How many sets of a gram are compared first, and the factor by which that grows each time."""
_AT_ONCE = 1 << 18
_SLICE_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Shared:
    """Places with enough grams of a set: ``place``, set (``owner``), and ``count`` of its grams, [c] each.

    ``entry`` [e]: the given entries that were counted. ``of`` [e]: in which count.
    """

    place: Ints
    owner: Ints
    count: Ints
    entry: Ints
    of: Ints


class GramSets:
    """Sets of grams of ``n`` tokens; finds places with at least a ``share`` of a set.

    ``grams`` [g, n] are tokens and may repeat; ``owner`` [g] is the set of each, any integers.
    """

    def __init__(self, grams: Tokens, owner: Ints, share: float) -> None:
        self.n = grams.shape[1]
        self.share = Fraction(str(share)).as_integer_ratio()  # numerator and denominator
        kept, which = distinct_rows(grams)
        hashes = gram_hashes(np.ascontiguousarray(grams[kept]).reshape(-1), self.n)[:: self.n]
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._grams = hashes[order], _as_bytes(grams[kept[order]])
        self._set_owners(*_distinct_sets(owner, np.argsort(order)[which], max(len(kept), 1)))
        bits = int(np.clip((len(kept) * _PLACES_A_GRAM).bit_length(), *_TABLE_BITS))
        self._shift = np.uint32(HASH_BITS - bits)
        self._first_shift = np.uint32(HASH_BITS - min(bits, len(kept).bit_length() + 1))
        buckets = np.arange(1 << (HASH_BITS - int(self._first_shift)))
        # A bucket after all hashes points to the last one, which does not match.
        first = np.searchsorted(self._hashes >> self._first_shift, buckets)
        self._first = np.minimum(first, len(self._hashes) - 1).astype(np.int32)
        self._table = np.zeros(1 << bits, np.uint8)
        order = np.argsort(-self._any_needed)  # of colliding grams, the one that needs least is written last
        self._table[self._hashes[order] >> self._shift] = np.minimum(self._any_needed[order], 255)

    def _set_owners(self, owner: Ints, gram: Ints) -> None:
        """Set (owner, gram) [m], sorted, owners numbered from 0."""
        self.size = np.bincount(owner)  # how many grams each set has, int64 [o]
        self.needed = np.maximum(-(-self.size * self.share[0] // self.share[1]), 1)
        """How many of them a place must have, int64 [o]."""
        self._owned, self._of_owner = gram, np.append(0, np.cumsum(self.size))
        self._any_needed = np.full(len(self._hashes), np.iinfo(np.int64).max)
        np.minimum.at(self._any_needed, gram, self.needed[owner])
        others = np.bincount(gram, minlength=len(self._hashes))
        order = np.lexsort((gram, others[gram], owner))
        nth = np.arange(len(owner)) - self._of_owner[owner]
        rarest = order[nth < (self.size - self.needed + 1)[owner]]
        rarest = rarest[np.lexsort((owner[rarest], gram[rarest]))]
        self._owners = owner[rarest]
        self._of_gram = np.append(0, np.cumsum(np.bincount(gram[rarest], minlength=len(self._hashes))))
        self._least = np.full(len(self._hashes), np.iinfo(np.int64).max)
        np.minimum.at(self._least, gram[rarest], self.needed[self._owners])

    def __len__(self) -> int:
        return len(self.size)

    def likely(self, tokens: Tokens) -> tuple[Ints, Hashes, npt.NDArray[np.uint8]]:
        """Find where in ``tokens`` [t] grams may begin, int64 [h] ascending, with some false positives.

        Also returns its hash [h], and the least number of such grams [h] that a place needs to match a set
        with it.
        """
        found = []
        for first in range(0, max(len(tokens), 1), _SLICE_TOKENS):  # slices whose hashes fit in the CPU cache
            hashes = gram_hashes(tokens[first : first + _SLICE_TOKENS + self.n - 1], self.n)
            least = self._table.take((hashes >> self._shift).astype(np.intp))
            at = np.flatnonzero(least != 0)
            found.append((at + first, hashes[at], least[at]))
        at, hashes, least = (np.concatenate(column) for column in zip(*found, strict=True))
        return at, hashes, least

    def identify(self, tokens: Tokens, at: Ints, hashes: Hashes) -> tuple[Ints, Ints]:
        """Return those of ``at`` [h] where a gram of a set begins in ``tokens``, and which: int64 [g] each.

        ``hashes`` [h] are from ``likely``.
        """
        if not len(at):
            return at, at
        windows = _as_bytes(np.lib.stride_tricks.sliding_window_view(tokens, self.n))
        place = self._first[hashes >> self._first_shift].astype(np.int64)
        gram = np.full(len(at), -1, np.int64)
        waiting = np.arange(len(at))
        while len(waiting):  # a few times: there are at least two buckets per gram
            other = self._hashes[place[waiting]]
            equal = waiting[other == hashes[waiting]]
            same = windows[at[equal]] == self._grams[place[equal]]
            gram[equal[same]] = place[equal[same]]
            waiting = waiting[(other <= hashes[waiting]) & (gram[waiting] < 0)]
            place[waiting] += 1
            waiting = waiting[place[waiting] < len(self._hashes)]
        found = gram >= 0
        return at[found], gram[found]

    def entries(self, place: Ints, gram: Ints, *flags: Flags) -> tuple[Ints, list[Flags]]:
        """Combine place and gram [h] to distinct entries, int64 [m] ascending; OR their ``flags`` [h]."""
        keys = place * len(self._hashes) + gram
        for flag in flags:  # as low bits: sorting values is much faster than sorting indexes
            keys = keys << 1 | flag
        keys.sort()
        entries = keys >> len(flags)
        first = np.flatnonzero(np.diff(entries, prepend=-1))
        bits = np.bitwise_or.reduceat(keys, first) if len(first) else keys
        return entries[first], [(bits >> low & 1).astype(np.bool_) for low in reversed(range(len(flags)))]

    def shared(self, entries: Ints, closed: Flags) -> Iterator[Shared]:
        """Yield places among ``entries`` with enough grams of a set, a few sets at a time, some repeatedly.

        Places in ``closed``, bool [p], are skipped; the caller may close more between steps.
        """
        place, gram = np.divmod(entries, len(self._hashes))
        there = np.bincount(place, minlength=len(closed))
        alive = there[place] >= self._least[gram]
        place, gram = place[alive], gram[alive]
        done, more = 0, _FIRST_SETS
        while True:
            first, last = self._of_gram[gram] + done, self._of_gram[gram + 1]
            left = (first < last) & ~closed[place]
            if not left.any():
                return
            place, gram, first, last = place[left], gram[left], first[left], last[left]
            last = np.minimum(last, first + more)
            for some in _bounded(last - first):
                of, which = pairs_of_ranges(first[some], last[some])
                pairs = distinct(place[some][of] * len(self.size) + self._owners[which])
                yield from self._count(entries, there, closed, pairs)
            done, more = done + more, more * _MORE_SETS

    def _count(self, entries: Ints, there: Ints, closed: Flags, pairs: Ints) -> Iterator[Shared]:
        place, owner = np.divmod(pairs, len(self.size))
        likely = there[place] >= self.needed[owner]
        place, owner = place[likely], owner[likely]
        for some in _bounded(self.size[owner]):
            open_ = ~closed[place[some]]
            at, whose = place[some][open_], owner[some][open_]
            if not len(at):
                continue
            of, which = pairs_of_ranges(self._of_owner[whose], self._of_owner[whose + 1])
            keys = at[of] * len(self._hashes) + self._owned[which]
            entry = np.minimum(np.searchsorted(entries, keys), len(entries) - 1)
            have = entries[entry] == keys
            count = np.bincount(of[have], minlength=len(at))
            enough = count >= self.needed[whose]
            if enough.any():
                have &= enough[of]
                number = np.cumsum(enough) - 1
                yield Shared(at[enough], whose[enough], count[enough], entry[have], number[of[have]])


def _as_bytes(rows: Tokens) -> npt.NDArray[np.void]:
    """Return each of rows [g, n] as one value, [g], which is three times as fast to take and to compare."""
    return np.asarray(rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0])


def _distinct_sets(owner: Ints, gram: Ints, grams: int) -> tuple[Ints, Ints]:
    """Sort (owner, gram) [m], drop duplicates, merge equal sets, and number the sets from 0."""
    owner, gram = np.divmod(distinct(owner * grams + gram), grams)
    bounds = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(owner)).tolist()
    sets = {gram[low:high].tobytes(): (low, high) for low, high in itertools.pairwise(bounds)}
    kept = sorted(sets.values())
    sizes = np.array([high - low for low, high in kept], np.int64)
    _, which = pairs_of_ranges(*np.array(kept, np.int64).reshape(-1, 2).T)
    return np.repeat(np.arange(len(kept)), sizes), gram[which]


def _bounded(cost: Ints) -> Iterator[slice]:
    """Yield slices of items with ``cost`` [n], of at most ``_AT_ONCE`` or of one item."""
    total = np.cumsum(cost)
    low = 0
    while low < len(cost):
        before = int(total[low - 1]) if low else 0
        high = max(int(np.searchsorted(total, before + _AT_ONCE, side="right")), low + 1)
        yield slice(low, high)
        low = high


def follows(chunks: Chunks, n_tokens: npt.NDArray[np.integer]) -> Flags:
    """Return which rows [n] continue in the next row, both with tokens: bool [n], the last False.

    Keys do not continue in values.
    """
    follow = np.zeros(len(chunks), np.bool_)
    follow[:-1] = (chunks.doc[1:] == chunks.doc[:-1]) & (chunks.key[1:] == chunks.key[:-1])
    follow[:-1] &= (n_tokens[1:] > 0) & (n_tokens[:-1] > 0)
    return follow


def reach(n_tokens: npt.NDArray[np.integer], follow: Flags, length: int) -> Ints:
    """Count the tokens from each chunk's first on, int64 [n]: full chunks continue in the next."""
    total = np.cumsum(n_tokens, dtype=np.int64)
    ends = np.flatnonzero(~(follow & (n_tokens == length)))
    last = ends[np.searchsorted(ends, np.arange(len(n_tokens)))]
    return np.asarray(total[last] - total + n_tokens)


def distinct(numbers: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return the distinct numbers, ascending, several times as fast as ``np.unique``, which hashes."""
    numbers = np.sort(numbers)
    new = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return numbers[new]


def distinct_rows(rows: npt.NDArray[np.unsignedinteger]) -> tuple[Ints, Ints]:
    """Return an index per distinct row of [g, n], int64 [d], and which of these each equals, int64 [g]."""
    which = fixed_binary(rows).dictionary_encode().indices.to_numpy().astype(np.int64)  # numbered as they occur
    return np.flatnonzero(np.diff(np.maximum.accumulate(which), prepend=-1)), which
