"""A set of a store's chunks as bits, and the number of its members before any chunk: dense numbers for sparse ids.

Chunk ids leave gaps between parts, and where chunks were purged; a file that is addressed by row can't. Numbering a
million ids takes some 0.1 s. Memory: a bit a row of the store, and another half once it is sealed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from retrotool.errors import CorruptError
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BITS = 64
_ROW_MASK = (1 << PART_SHIFT) - 1
_BLOCK = 1 << 20
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)
"""How many bits a byte has."""


class ChunkSet:
    """Some chunks of a store's view, empty at first; ``rank`` counts members once ``seal`` was called."""

    def __init__(self, store: Store) -> None:
        self._root = store.root
        numbers = store.state.parts()
        self._rows = np.zeros(max(numbers, default=-1) + 2, np.int64)
        """Rows of each part, 0 for numbers that no part has; and one more."""
        for part in numbers:
            self._rows[part] = parts.part_entry(store, "chunks", part).rows
        words = -(-self._rows // _BITS)
        self._first = np.cumsum(words) - words
        self._words = np.zeros(int(words.sum()), np.uint64)
        self._before = np.zeros(0, np.uint32)

    def _places(self, ids: Ids) -> Ids:
        """The bit of each chunk id [n]; ``CorruptError`` for one that is no row of the store."""
        part = np.clip(ids >> PART_SHIFT, 0, len(self._rows) - 1)
        row = ids & _ROW_MASK
        wrong = (ids < 0) | (row >= self._rows[part])
        if wrong.any():
            raise CorruptError(
                f"a table names the chunk {int(ids[wrong][0])}, which {self._root} has not",
                f"See what is wrong: retrotool verify {self._root}",
            )
        places: Ids = self._first[part] * _BITS + row
        return places

    def add(self, ids: Ids) -> None:
        """Take chunk ids [n] in, in any order, repeated or not."""
        places = self._places(ids)
        np.bitwise_or.at(self._words, places // _BITS, _bit(places))

    def put(self, part: int, members: Mask) -> None:
        """Say of every row of a part whether it is a member, bool [n]."""
        words = np.zeros(-(-len(members) // _BITS), "<u8")
        packed = np.packbits(members, bitorder="little")
        words.view(np.uint8)[: len(packed)] = packed
        self._words[self._first[part] : self._first[part] + len(words)] = words

    def of_part(self, part: int) -> Mask:
        """Which rows of a part are members, bool [n]."""
        words = self._words[self._first[part] : self._first[part + 1]].astype("<u8")
        return np.unpackbits(words.view(np.uint8), count=int(self._rows[part]), bitorder="little").astype(np.bool_)

    def contains(self, ids: Ids) -> Mask:
        """Which chunk ids [n] are members."""
        places = self._places(ids)
        found: Mask = (self._words[places // _BITS] & _bit(places)) != 0
        return found

    def seal(self) -> int:
        """Count the members; there must be less than 2³². Nothing is to be added after."""
        counts = np.zeros(len(self._words), np.uint32)
        for start in range(0, len(counts), _BLOCK):
            counts[start : start + _BLOCK] = _count(self._words[start : start + _BLOCK])
        total = int(counts.sum(dtype=np.int64))
        self._before = np.cumsum(counts, dtype=np.uint32) - counts
        return total

    def rank(self, ids: Ids) -> Ids:
        """How many members have a lower id than each of these chunks [n], int64 [n]."""
        places = self._places(ids)
        words = places // _BITS
        below = self._words[words] & (_bit(places) - np.uint64(1))
        ranks: Ids = self._before[words].astype(np.int64) + _count(below)
        return ranks


def _bit(places: Ids) -> npt.NDArray[np.uint64]:
    bits: npt.NDArray[np.uint64] = np.uint64(1) << (places % _BITS).astype(np.uint64)
    return bits


def _count(words: npt.NDArray[np.uint64]) -> Ids:
    """How many bits are set in each of the words [n], int64 [n]."""
    ones: Ids = _ONES[words.view(np.uint8)].reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return ones
