"""A table of words, in which all words of a text are looked up at once.

A word is hashed by its length and its first and last eight bytes. A table of bits, sixteen a word, drops nearly all
that are not there; the others are looked up by bisection and compared by the same three, which is exact for words of
up to sixteen bytes. Longer ones are compared byte by byte, one by one.

Cost: 250 MB/s a core for ASCII prose, hardly less for tables of 100,000 words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retrotool.purge.selectors.document_text import Offsets

_AT_ONCE = 1 << 14
_SEEN = 8
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xFF51AFD7ED558CCD], np.uint64)

Eights = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]


class WordTable:
    """Finds words that are given in texts whose words are known."""

    def __init__(self, words: Sequence[bytes]) -> None:
        self._numbers = {word: number for number, word in enumerate(words)}
        ends = np.cumsum([len(word) + 1 for word in words], dtype=np.int64) - 1
        begins = ends - np.fromiter(map(len, words), np.int64, len(words))
        seen = _look(_eights(b" ".join(words)), begins, ends)
        # Of words that look alike, which are longer than sixteen bytes, one stands for all.
        _, alike = np.unique(np.stack(seen), axis=1, return_index=True)
        keys = _hash(*(part[alike] for part in seen))
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._at = alike[order]
        self._first, self._last, self._length = (part[self._at] for part in seen)
        self._shift = np.uint64(64 - max(16, (16 * len(words)).bit_length()))
        self._may = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        self._may[keys >> self._shift] = True

    def find(self, text: bytes, begins: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
        """Look up the words of a text, which lie at [begins, ends), int64 [w] each and none of them empty.

        Returns which of them are in the table, ascending, and their numbers there, int64 [h] each.
        """
        eights = _eights(text)
        found = [np.zeros((2, 0), np.int64)]
        for start in range(0, len(begins) if self._numbers else 0, _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            found.append(self._find(text, eights, begins[some], ends[some]) + np.array([[start], [0]]))
        which, number = np.concatenate(found, axis=1)
        return which, number

    def _find(self, text: bytes, eights: Eights, begins: Offsets, ends: Offsets) -> npt.NDArray[np.int64]:
        first, last, length = _look(eights, begins, ends)
        keys = _hash(first, last, length)
        which = np.flatnonzero(self._may[keys >> self._shift])
        keys = keys[which]
        at = np.searchsorted(self._keys, keys)
        number = np.full(len(which), -1, np.int64)
        left = np.arange(len(which))
        while True:  # once more for each two words of the table whose hashes are the same
            left = left[at[left] < len(self._keys)]
            left = left[self._keys[at[left]] == keys[left]]
            if not len(left):
                break
            here, word = at[left], which[left]
            same = (self._first[here] == first[word]) & (self._last[here] == last[word])
            same &= self._length[here] == length[word]
            number[left[same]] = self._at[here[same]]
            at[left] += 1
        for place in np.flatnonzero((number >= 0) & (length[which] > 2 * _SEEN)).tolist():
            word = which[place]
            number[place] = self._numbers.get(text[begins[word] : ends[word]], -1)
        return np.stack([which, number])[:, number >= 0]


def _eights(text: bytes) -> Eights:
    """The eight bytes from each on, uint8 [bytes, 8]; behind the text are zeros."""
    return np.lib.stride_tricks.sliding_window_view(np.frombuffer(text + bytes(_SEEN), np.uint8), _SEEN)


def _look(eights: Eights, begins: Offsets, ends: Offsets) -> tuple[Keys, Keys, Keys]:
    """The first and the last eight bytes of words, and how many they have, uint64 [w] each; the last of long ones."""
    length = ends - begins
    first = eights[begins].view("<u8")[:, 0]
    first <<= (8 * (_SEEN - np.minimum(length, _SEEN))).astype(np.uint64)
    last = np.zeros_like(first)
    long = np.flatnonzero(length > _SEEN)
    last[long] = eights[ends[long] - _SEEN].view("<u8")[:, 0]
    return first, last, length.astype(np.uint64)


def _hash(first: Keys, last: Keys, length: Keys) -> Keys:
    mixed: Keys = (first ^ length) * _ODD[0]
    mixed ^= mixed >> np.uint64(32)
    mixed += last * _ODD[1]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD[2]
    return mixed
