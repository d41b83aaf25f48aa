"""Sets of n-grams of tokens, and where much of one of them occurs: what finds near copies and evaluation text.

The sets are few and held in memory; the text goes by. A hash of the ``n`` tokens at each place of the text, made by
multiplying and adding, is looked up in a table that says which hashes the sets may have; what passes is looked up among
the sets' own, and compared token by token. So a hash that two grams share costs a comparison, and changes nothing.

Which places (pairs of chunks, documents) have enough of which sets is counted as in joins of sets by prefix: a place
that has ``needed`` of a set's ``size`` grams has at least one of any ``size − needed + 1`` of them, and of those that
few other sets have these are taken. Sets that are equal are one. What is left is counted in full.

Cost: 3 to 10 ns a token where nothing is found; 0.1 µs a gram found; 3 µs a place and set compared (57 grams). A place
is compared with the sets that have one of their rarest grams there, a few at a time, until the caller closes it; at
worst, with many sets that are made of the same grams and differ, all are compared with the places that have some of
these and enough of none. Memory: the table, at most 16 MB, and some 100 bytes a gram of the sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from retrotool.ranges import expand_ranges
from retrotool.store.parts import Chunks

Tokens = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

Number = TypeVar("Number", bound=np.integer[Any])

HASH_BITS = 32
_ODD = np.array([0x9E3779B1, 0xD6E8FEB7, 0xA0761D65, 0xE7037ED1, 0x8EBC6AF1, 0x589965CD, 0x1D8E4E27, 0xEB44ACCB], "<u4")
"""Random odd numbers to multiply by."""
_TABLE_BITS = (12, 24)
_PLACES_A_GRAM = 32
_FIRST_SETS, _MORE_SETS = 1, 4
"""Of the sets that have a gram so many are compared first, and then so many times more each time."""
_AT_ONCE = 1 << 18
_SLICE_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Shared:
    """Places that have enough grams of a set: ``place`` and ``owner`` [c]; the set has ``count`` [c] grams there.

    ``entry`` [e] are the entries (of those given) that make up the counts, ``of`` [e] says of which.
    """

    place: Ints
    owner: Ints
    count: Ints
    entry: Ints
    of: Ints

    def any_of(self, flags: Flags) -> Flags:
        """Which places have, among the grams they share, one whose entry is flagged: bool [c]."""
        found: Flags = np.bincount(self.of[flags[self.entry]], minlength=len(self.place)) > 0
        return found


class GramSets:
    """Sets of grams of ``n`` tokens, of which places are to have a ``share``.

    ``grams`` [g, n] are tokens, repeated or not, and ``owner`` [g] says to which set each belongs: any numbers.
    """

    def __init__(self, grams: Tokens, owner: Ints, share: float) -> None:
        self.n = grams.shape[1]
        self._up, self._down = Fraction(str(share)).as_integer_ratio()
        kept, which = distinct_rows(grams)
        hashes = gram_hashes(np.ascontiguousarray(grams[kept]).reshape(-1), self.n)[:: self.n]
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._grams = hashes[order], _as_bytes(grams[kept[order]])
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        self._set_owners(*_distinct_sets(owner, rank[which], max(len(kept), 1)))
        low, high = _TABLE_BITS
        bits = min(max((len(kept) * _PLACES_A_GRAM).bit_length(), low), high)
        self._shift = np.uint32(HASH_BITS - bits)
        self._first_shift = np.uint32(HASH_BITS - min(bits, len(kept).bit_length() + 1))
        buckets = np.arange(1 << (HASH_BITS - int(self._first_shift)))
        # A bucket behind all hashes begins with the last one, which is looked at in vain.
        first = np.searchsorted(self._hashes >> self._first_shift, buckets)
        self._first = np.minimum(first, len(self._hashes) - 1).astype(np.int32)
        self._table = np.zeros(1 << bits, np.uint8)
        order = np.argsort(-self._any_needed)  # of grams of one place the one that needs least is written last
        self._table[self._hashes[order] >> self._shift] = np.minimum(self._any_needed[order], 255)

    def _set_owners(self, owner: Ints, gram: Ints) -> None:
        """Take (owner, gram) [m], sorted, owners numbered from 0."""
        self.size = np.bincount(owner)
        """How many grams each set has, int64 [o]."""
        self.needed = np.maximum(-(-self.size * self._up // self._down), 1)
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
        """How many sets differ."""
        return len(self.size)

    def likely(self, tokens: Tokens) -> tuple[Ints, Hashes, npt.NDArray[np.uint8]]:
        """Where in ``tokens`` [t] a gram of any set may begin, int64 [h] ascending: all places, and some others.

        With each comes its hash, and how many of these, at least, a place must have to have enough of a set with it.
        """
        found = []
        for first in range(0, max(len(tokens), 1), _SLICE_TOKENS):  # whose hashes stay in the cache
            hashes = gram_hashes(tokens[first : first + _SLICE_TOKENS + self.n - 1], self.n)
            least = self._table.take((hashes >> self._shift).astype(np.intp))
            at = np.flatnonzero(least != 0)
            found.append((at + first, hashes[at], least[at]))
        at, hashes, least = (np.concatenate(column) for column in zip(*found, strict=True))
        return at, hashes, least

    def identify(self, tokens: Tokens, at: Ints, hashes: Hashes) -> tuple[Ints, Ints]:
        """Of the places ``at`` [h] in ``tokens`` those where a gram of any set begins, and which: int64 [g] both.

        ``hashes`` [h] are those of ``likely``.
        """
        if not len(at):
            return at, at
        windows = _as_bytes(np.lib.stride_tricks.sliding_window_view(tokens, self.n))
        place = self._first[hashes >> self._first_shift].astype(np.int64)
        gram = np.full(len(at), -1, np.int64)
        waiting = np.arange(len(at))
        while len(waiting):  # a few times: there are two places for each gram
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
        """Which grams are at which places, [h]: the different ones as entries, int64 [m] ascending.

        Of ``flags``, [h] each, those of an entry that are set anywhere.
        """
        keys = place * len(self._hashes) + gram
        for flag in flags:  # as bits below: numbers are sorted much faster than places
            keys = keys << 1 | flag
        keys.sort()
        entries = keys >> len(flags)
        first = np.flatnonzero(np.diff(entries, prepend=-1))
        bits = np.bitwise_or.reduceat(keys, first) if len(first) else keys
        return entries[first], [(bits >> low & 1).astype(np.bool_) for low in reversed(range(len(flags)))]

    def shared(self, entries: Ints, closed: Flags) -> Iterator[Shared]:
        """The places among ``entries`` that have enough of a set, a few sets at a time; some may come up again.

        Places in ``closed``, bool [p], which the caller may fill in meanwhile, are not looked at any more.
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
        """Those of ``pairs`` (place × sets + set) that have enough."""
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
    """Each of rows [g, n] as one thing of so many bytes, [g], which is three times as fast to take and to compare."""
    things: npt.NDArray[np.void] = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    return things


def _distinct_sets(owner: Ints, gram: Ints, grams: int) -> tuple[Ints, Ints]:
    """(owner, gram) [m], sorted, each once: of sets that are equal one is left, and they are numbered from 0."""
    owner, gram = np.divmod(distinct(owner * grams + gram), grams)
    bounds = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(owner)).tolist()
    sets = {gram[low:high].tobytes(): (low, high) for low, high in itertools.pairwise(bounds)}
    kept = sorted(sets.values())
    sizes = np.array([high - low for low, high in kept], np.int64)
    _, which = pairs_of_ranges(*np.array(kept, np.int64).reshape(-1, 2).T)
    return np.repeat(np.arange(len(kept)), sizes), gram[which]


def _bounded(cost: Ints) -> Iterator[slice]:
    """Cut what costs so much each, [n], into slices of some ``_AT_ONCE``, of one at least."""
    total = np.cumsum(cost)
    low = 0
    while low < len(cost):
        before = int(total[low - 1]) if low else 0
        high = max(int(np.searchsorted(total, before + _AT_ONCE, side="right")), low + 1)
        yield slice(low, high)
        low = high


def gram_hashes(tokens: Tokens, n: int) -> Hashes:
    """A hash of the ``n`` tokens from each place on, uint32 [t − n + 1] (none if there are fewer)."""
    if len(tokens) < n:
        return np.zeros(0, np.uint32)
    power: Hashes = tokens.astype(np.uint32) * _ODD[0]  # of ``size`` tokens, a power of two
    joined: Hashes | None = None
    have, size = 0, 1
    while True:
        if n & size:
            # Multiplied by another number than in the powers: else a gram of two halves would hash as these swapped.
            joined = power if joined is None else _followed(joined, power[have:], _ODD[7])
            have += size
        if 2 * size > n:
            assert joined is not None
            hashes: Hashes = joined[: len(tokens) - n + 1]
            return hashes
        power = _followed(power, power[size:], _ODD[1 + (size.bit_length() - 1) % 6])
        size *= 2


def _followed(one: Hashes, other: Hashes, factor: np.uint32) -> Hashes:
    hashes: Hashes = one[: len(other)] * factor
    hashes += other
    return hashes


def follows(chunks: Chunks, n_tokens: npt.NDArray[np.integer]) -> Flags:
    """Which rows [n] are followed by more of the same text, both with tokens: bool [n], the last False.

    A value is not the same text as its key.
    """
    follow = np.zeros(len(chunks), np.bool_)
    follow[:-1] = (chunks.doc[1:] == chunks.doc[:-1]) & (chunks.key[1:] == chunks.key[:-1])
    follow[:-1] &= (n_tokens[1:] > 0) & (n_tokens[:-1] > 0)
    return follow


def reach(n_tokens: npt.NDArray[np.integer], follow: Flags, length: int) -> Ints:
    """How many tokens stand in a row from the first of each chunk on, int64 [n]: full chunks go on in the next one."""
    total = np.cumsum(n_tokens, dtype=np.int64)
    ends = np.flatnonzero(~(follow & (n_tokens == length)))
    last = ends[np.searchsorted(ends, np.arange(len(n_tokens)))]
    tokens: Ints = total[last] - total + n_tokens
    return tokens


def distinct(numbers: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Each number once, ascending: by sorting, which is several times as fast as ``np.unique``, which hashes."""
    numbers = np.sort(numbers)
    new = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return numbers[new]


def distinct_rows(rows: npt.NDArray[np.unsignedinteger]) -> tuple[Ints, Ints]:
    """Of rows [g, n] one of each that differs, and which of these each row equals: places int64 [d] and [g]."""
    padded = np.zeros((len(rows), -(-rows.shape[1] * rows.itemsize // 8) * 8), np.uint8)
    padded[:, : rows.shape[1] * rows.itemsize] = np.ascontiguousarray(rows).view(np.uint8)
    words = padded.view(np.uint64)
    order = np.lexsort(words.T)
    new = np.ones(len(rows), np.bool_)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    which = np.empty(len(rows), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


def pairs_of_ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Return the numbers in all of [first, last), [r], one range after another: (range, number), int64 each."""
    count = last - first
    return np.repeat(np.arange(len(count)), count), expand_ranges(first, count)
