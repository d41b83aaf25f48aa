"""The text of a block as terms are compared in: NFKC, without case, and every white space a space.

Only what is not ASCII needs Unicode's rules. So ASCII goes through a table of bytes, and **islands** of anything else,
each with the one ASCII character before it, as a mark behind may join it, are put together, normalised in one call
and put back. Where an island lies in both texts is kept, so that places in one can be told in the other; within an
island they are worked out only when asked for, character by character.

Between two documents, and at both ends, is a line feed, which is nowhere else.

Cost: 600 MB/s a core for ASCII, 8 MB/s for text that is all islands, as each of its words is. Memory: three times the
text, up to 30 times if it is all islands.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.purge.selectors.document_text import Offsets, TextBlock
from retrotool.ranges import expand_ranges
from retrotool.tokenizers.fold import WORD, kinds

_SPACES = bytes(number for number in range(128) if chr(number).isspace())
_LOWER = bytes(range(256)).lower().translate(bytes.maketrans(_SPACES, b" " * len(_SPACES)))
_LEFT = (*_SPACES.decode().replace(" ", ""), *"\x85\u1680\u2028\u2029")
"""White space that NFKC leaves."""
_IS_WORD = bytes(number > 127 or chr(number).isalnum() for number in range(256))


def normalised(text: str) -> str:
    """NFKC without case, and every white space a space."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for character in _LEFT:  # many times faster than str.translate
        text = text.replace(character, " ")
    return text


def is_word(text: str) -> npt.NDArray[np.bool_]:
    """Which characters of a text are letters, digits or marks, bool [characters]."""
    words: npt.NDArray[np.bool_] = kinds()[_code_points(text)] == WORD
    return words


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@dataclass(frozen=True)
class Normal:
    """Normalised text of a block, in UTF-8.

    ``is_word`` [bytes]: 1 for every byte of a letter, digit or mark, else 0. ``begin`` and ``end`` are where islands
    and the borders of documents lie in it, ``old_begin`` and ``old_end`` where in ``original``, int64 [i].
    """

    text: bytes
    is_word: npt.NDArray[np.uint8]
    begin: Offsets
    end: Offsets
    old_begin: Offsets
    old_end: Offsets
    original: memoryview

    @classmethod
    def of(cls, block: TextBlock) -> Normal:
        """The text of all documents of a block."""
        lower = bytes(block.text).translate(_LOWER)
        borders = block.starts[block.documents]
        first, last = _islands(lower, borders)
        islands, island_words = _normalise([lower[b:e] for b, e in zip(first.tolist(), last.tolist(), strict=True)])
        # In the order of their places; what a document begins with is behind its border.
        is_island = np.arange(len(first) + len(borders)) < len(first)
        old_begin, old_end = np.concatenate([first, borders]), np.concatenate([last, borders])
        order = np.lexsort((is_island, old_begin))
        old_begin, old_end, is_island = old_begin[order], old_end[order], is_island[order]
        every = [*islands, *[b"\n"] * len(borders)]
        new = [every[number] for number in order.tolist()]
        sizes = np.fromiter(map(len, new), np.int64, len(new))
        begin = old_begin + np.cumsum(sizes - (old_end - old_begin)) - (sizes - (old_end - old_begin))
        between = zip([0, *old_end.tolist()], [*old_begin.tolist(), len(lower)], strict=True)
        pieces = [b""] * (2 * len(new) + 1)
        pieces[::2] = [lower[b:e] for b, e in between]
        pieces[1::2] = new
        text = b"".join(pieces)
        words = np.frombuffer(bytearray(text.translate(_IS_WORD)), np.uint8)
        if len(first):
            count, at = sizes[is_island], begin[is_island]
            words[expand_ranges(at, count)] = island_words
        return cls(text, words, begin, begin + sizes, old_begin, old_end, block.text)

    def places(self, begin: Offsets, end: Offsets) -> tuple[Offsets, Offsets]:
        """Where in the original text spans [h] of the normalised lie, int64 [h] each; none of them may be empty.

        Several characters that become one by being normalised, or one that becomes several, are within a span if any
        part is.
        """
        return self._place(begin, at_end=False), self._place(end - 1, at_end=True)

    def _place(self, byte: Offsets, at_end: bool) -> Offsets:
        """Where in the original text the character begins, or ends, that has a byte of the normalised."""
        # There is a border at 0, so one is always before.
        island = np.searchsorted(self.begin, byte, side="right") - 1
        inside = byte < self.end[island]
        place = byte - self.end[island] + self.old_end[island] + at_end
        for number in np.unique(island[inside]).tolist():
            new_end, old_end = _ends(bytes(self.original[self.old_begin[number] : self.old_end[number]]))
            mine = np.flatnonzero(inside & (island == number))
            cluster = np.searchsorted(new_end, byte[mine] - self.begin[number], side="right")
            place[mine] = self.old_begin[number] + old_end[cluster + at_end]
        return place


def _islands(text: bytes, borders: Offsets) -> tuple[Offsets, Offsets]:
    """Where islands of text that is not ASCII begin and end, none of them across a border."""
    if text.isascii():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data = np.frombuffer(text, np.uint8)
    high = np.zeros(len(data) + 2, np.bool_)
    high[1:-1] = data > 127
    edges = np.flatnonzero(high[1:] != high[:-1])
    at = np.searchsorted(edges, borders)
    inner = np.unique(borders[(at % 2 == 1) & (np.searchsorted(edges, borders, side="right") == at)])
    begin, end = np.sort(np.append(edges[::2], inner)), np.sort(np.append(edges[1::2], inner))
    starts = np.searchsorted(borders, begin) < np.searchsorted(borders, begin, side="right")
    joins = (data[begin - 1] > ord(" ")) & (data[begin - 1] < 128) & ~starts
    return begin - joins, end


def _normalise(islands: list[bytes]) -> tuple[list[bytes], npt.NDArray[np.uint8]]:
    """Normalise texts in which no byte is 0: each, and which bytes of all are of words, uint8 [bytes]."""
    if not islands:
        return [], np.zeros(0, np.uint8)
    text = normalised(b"\0".join(islands).decode("utf-8", "surrogateescape"))
    data = text.encode("utf-8", "surrogateescape")
    words = np.repeat(is_word(text), _sizes(text))[np.frombuffer(data, np.uint8) != 0]
    return data.split(b"\0"), words.astype(np.uint8)


def _sizes(text: str) -> npt.NDArray[np.int64]:
    """Bytes of each character; a byte that is no UTF-8 came as a surrogate."""
    points = _code_points(text)
    return np.select([points < 0x80, points < 0x800, points >> 11 == 0x1B, points < 0x10000], [1, 2, 1, 3], 4)


def _ends(island: bytes) -> tuple[Offsets, Offsets]:
    """Where the pieces of an island end that can be normalised each by itself: in new bytes [p], in old ones [p + 1].

    Before the latter is a 0, where the first piece begins.
    """
    text = island.decode("utf-8", "surrogateescape")
    if normalised(text) == text:
        ends = np.cumsum(_sizes(text))
        return ends, np.concatenate([[0], ends])
    new: list[str] = []
    old: list[str] = []
    for character in text:
        alone = normalised(character)
        if old and (unicodedata.combining(character) or normalised(old[-1] + character) != new[-1] + alone):
            old[-1] += character
            new[-1] = normalised(old[-1])
        else:
            old.append(character)
            new.append(alone)
    lengths = [[len(piece.encode("utf-8", "surrogateescape")) for piece in pieces] for pieces in (new, old)]
    return np.cumsum(lengths[0]), np.cumsum([0, *lengths[1]])
