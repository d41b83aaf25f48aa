"""``--terms``: words and names of a list, found as whole words, ignoring case, width and spacing.

Text and terms are normalised: NFKC, case-folded, each run of white space as one space. A term may have
several words with any characters between them, and may begin or end with other characters, like ``C++``. The
characters beside a match are not letters, digits or marks. All occurrences count, overlapping ones too.

If the tokenizer loses case, accents or spacing, terms are tokenized like the text. ``Müller`` then also finds
``muller``, and ``.NET`` also ``ASP.NET``.

Not found: inflected forms, misspellings, and words of languages without spaces between words (北京 is found
in 北京大学 in folded text, where each character is a word, but not in other text).

Method: ASCII is normalised with a byte table. **Islands** of other characters are normalised in one call and
put back, each with the ASCII character before it, which a combining mark may join; their positions in both
texts map places from one to the other. The anchor of a term is its word that is rarest in the list. Arrow's
hash table looks up all words of the text among the anchors; for terms of several words the surrounding words
are then compared.

Cost: 60 to 140 MB/s per core for ASCII, 7 to 10 MB/s for other scripts, nearly independent of the number of
terms; and 1 to 3 µs per match. Memory: ten times the text of a block, up to 35 times for other scripts, 16
MB, and 0.5 KB per term.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.errors import UsageError
from retrotool.purge.selectors.selector import BlockHits, Matcher, Offsets, Selector, TextBlock, read_values
from retrotool.ranges import expand_ranges
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, stored_tokenizer
from retrotool.tokenizers.fold import WORD, Folder, code_points, kinds, utf8_sizes

_SPACES = bytes(number for number in range(128) if chr(number).isspace())
_LOWER = bytes(range(256)).lower().translate(bytes.maketrans(_SPACES, b" " * len(_SPACES)))
_LEFT = (*_SPACES.decode().replace(" ", ""), *"\x85\u1680\u2028\u2029")  # white space that NFKC leaves
_IS_WORD = bytes(number > 127 or chr(number).isalnum() for number in range(256))


def normalised(text: str) -> str:
    """Return a text in NFKC, case-folded, with every white space character as a space."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for character in _LEFT:  # many times faster than str.translate
        text = text.replace(character, " ")
    return text


def is_word(text: str) -> npt.NDArray[np.bool_]:
    """Return which characters of a text are letters, digits or marks, bool [characters]."""
    return np.asarray(kinds()[code_points(text)] == WORD)


@dataclass(frozen=True)
class Normal:
    """Normalised text of a block, in UTF-8, with a line break around each document, key and value.

    ``is_word`` [bytes]: 1 for every byte of a letter, digit or mark, else 0. ``begin`` and ``end``, int64
    [i]: the islands in it, the first an empty one at 0; ``old_begin`` and ``old_end``: in ``lower``, the text
    with line breaks, at ``breaks``, and ASCII normalised.
    """

    text: bytes
    is_word: npt.NDArray[np.uint8]
    begin: Offsets
    end: Offsets
    old_begin: Offsets
    old_end: Offsets
    lower: bytes
    breaks: Offsets

    @classmethod
    def of(cls, block: TextBlock) -> Normal:
        """Normalise the text of a block."""
        data, borders = bytes(block.text).translate(_LOWER), block.borders
        pieces = [data[begin:end] for begin, end in itertools.pairwise(borders.tolist())]
        lower = b"\n".join([b"", *pieces, b""])
        old_begin, old_end = _islands(lower)
        edges = [0, *np.stack([old_begin, old_end], 1).reshape(-1).tolist(), len(lower)]
        pieces = [lower[begin:end] for begin, end in itertools.pairwise(edges)]
        pieces[1::2], island_words = _normalise(pieces[1::2])
        sizes = np.fromiter(map(len, pieces[1::2]), np.int64, len(old_begin))
        longer = sizes - (old_end - old_begin)
        begin = old_begin + np.cumsum(longer) - longer
        text = b"".join(pieces)
        words = np.frombuffer(bytearray(text.translate(_IS_WORD)), np.uint8)
        words[expand_ranges(begin, sizes)] = island_words
        return cls(text, words, begin, begin + sizes, old_begin, old_end, lower, borders + np.arange(len(borders)))

    def places(self, spans: Offsets) -> Offsets:
        """Map ``spans`` [h, 2] of the normalised text, none empty, to the text of the block, int64 [h, 2].

        Characters that are normalised together are within a span if any part of them is.
        """
        found = np.stack([self._place(spans[:, 0], at_end=False), self._place(spans[:, 1] - 1, at_end=True)], 1)
        return found - np.searchsorted(self.breaks, found)

    def _place(self, byte: Offsets, at_end: bool) -> Offsets:
        """Return where in ``lower`` the character with a normalised byte begins, or ends."""
        island = np.searchsorted(self.begin, byte, side="right") - 1
        inside = byte < self.end[island]
        place = byte - self.end[island] + self.old_end[island] + at_end
        for number in np.unique(island[inside]).tolist():
            new_end, old_end = _ends(self.lower[self.old_begin[number] : self.old_end[number]])
            mine = np.flatnonzero(inside & (island == number))
            cluster = np.searchsorted(new_end, byte[mine] - self.begin[number], side="right")
            place[mine] = self.old_begin[number] + old_end[cluster + at_end]
        return place


def _islands(text: bytes) -> tuple[Offsets, Offsets]:
    """Return where islands of text that is not ASCII begin and end, after an empty one at 0."""
    data = np.frombuffer(text, np.uint8)
    edges = np.zeros(0, np.int64) if text.isascii() else np.flatnonzero(np.diff(data > 127)) + 1
    begin, end = edges[::2], edges[1::2]
    return np.append(0, begin - (data[begin - 1] > ord(" "))), np.append(0, end)


def _normalise(islands: list[bytes]) -> tuple[list[bytes], npt.NDArray[np.uint8]]:
    """Normalise texts without zero bytes; also return which bytes of all belong to words, uint8 [bytes]."""
    text = normalised(b"\0".join(islands).decode("utf-8", "surrogateescape"))
    data = text.encode("utf-8", "surrogateescape")
    words = np.repeat(is_word(text), utf8_sizes(code_points(text)))[np.frombuffer(data, np.uint8) != 0]
    return data.split(b"\0"), words.astype(np.uint8)


def _ends(island: bytes) -> tuple[Offsets, Offsets]:
    """Split an island into pieces that can be normalised separately; return their ends.

    The ends are in normalised bytes [p], and in original bytes after a 0 [p + 1].
    """
    text = island.decode("utf-8", "surrogateescape")
    if normalised(text) == text:
        ends = np.cumsum(utf8_sizes(code_points(text)))
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


_BATCH = 1000


def read_terms(path: Path) -> tuple[str, ...]:
    """Read terms from a UTF-8 file, one per line; blank lines and lines with ``#`` first are skipped."""
    lines = [line for line in read_values("--terms", path, "term") if not line.text.lstrip().startswith("#")]
    if not lines:
        raise UsageError(f"--terms {path} has no term", "Give a file with one term per line.")
    for line in lines:
        if not any(map(str.isalnum, line.text)):
            raise line.error("a term needs a letter or a digit", "Remove the line, or begin it with #.")
    return tuple(line.text.strip() for line in lines)


@dataclass(frozen=True, slots=True)
class Terms(Selector):
    """Finds the words and names of a list."""

    kind: ClassVar[str] = "terms"
    reads_text: ClassVar[bool] = True
    terms: tuple[str, ...]

    def open(self, store: Store) -> Matcher:
        """Prepare the terms, folded if the text is; ``UsageError`` if the tokenizer can't represent one."""
        tokenizer = stored_tokenizer(store)
        if tokenizer.lossless:
            return TermMatcher(self.terms)
        return TermMatcher(folded_terms(tokenizer, self.terms), folded=True)


def folded_terms(tokenizer: Tokenizer, terms: Sequence[str]) -> list[str]:
    """Tokenize terms and decode them to folded text; ``UsageError`` for a term with unknown tokens."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    unknown = tokenizer.backend.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    folder = Folder(tokenizer)
    folded: list[str] = []
    for start in range(0, len(terms), _BATCH):
        encoded = tokenizer.encode_batch(terms[start : start + _BATCH])
        n_tokens = np.array([len(ids) for ids in encoded], np.int32)
        tokens = np.zeros((len(encoded), int(n_tokens.max())), np.int64)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
            if unknown is not None and unknown in ids:
                raise UsageError(
                    f"the store's tokenizer can't represent term {start + row + 1}, so it can't be found in the store",
                    "Remove it from the list, or search for a part of it.",
                )
        starts, data = folder(tokens, n_tokens, np.ones(len(encoded), np.bool_))
        text = bytes(data)
        folded += [text[starts[row] : starts[row + 1]].decode("utf-8", "replace") for row in range(len(encoded))]
    return folded


@dataclass(frozen=True, slots=True)
class _Term:
    """A term: ``lead`` is before its first word, ``trail`` after the last, ``body`` in between."""

    lead: bytes
    body: bytes
    trail: bytes
    words: tuple[bytes, ...]

    @classmethod
    def of(cls, term: str) -> _Term:
        text = " ".join(normalised(term).split())
        inside = np.concatenate([[False], is_word(text), [False]])
        edges = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
        words = tuple(text[begin:end].encode() for begin, end in zip(edges[::2], edges[1::2], strict=True))
        if not words:
            raise UsageError("a term has no letter and no digit", "Remove it from the list.")
        return cls(text[: edges[0]].encode(), text[edges[0] : edges[-1]].encode(), text[edges[-1] :].encode(), words)


_Around = dict[tuple[int, int], dict[bytes, list[tuple[bytes, bytes]]]]
"""(words before the anchor, words of the term) to body to leads and trails."""


class TermMatcher:
    """Finds terms in blocks; if the text is folded, the terms must be too."""

    def __init__(self, terms: Sequence[str], *, folded: bool = False) -> None:
        self._folded = folded
        every = {_Term.of(term) for term in terms}
        used = Counter(word for term in every for word in set(term.words))
        anchors: dict[bytes, _Around] = {}
        whole = set()
        for term in every:
            if term.words == (term.lead + term.body + term.trail,):
                anchors.setdefault(term.body, {})
                whole.add(term.body)
                continue
            before = min(range(len(term.words)), key=lambda n: (used[term.words[n]], -len(term.words[n])))
            shapes = anchors.setdefault(term.words[before], {})
            bodies = shapes.setdefault((before, len(term.words)), {})
            bodies.setdefault(term.body, []).append((term.lead, term.trail))
        self._anchors = pa.array(list(anchors), pa.large_binary())
        self._shapes = np.zeros(1 << 24, np.bool_)
        self._shapes[[word[0] | word[-1] << 8 | min(len(word), 255) << 16 for word in anchors]] = True
        self._around = list(anchors.values())
        self._whole = np.array([anchor in whole for anchor in anchors], np.bool_)
        self._more = np.array([bool(around) for around in self._around], np.bool_)

    def __call__(self, block: TextBlock) -> BlockHits:
        """Find matching rows of a block."""
        normal = Normal.of(block)
        # The text begins and ends with a line break, which is not a word.
        edges = np.flatnonzero(normal.is_word[1:] != normal.is_word[:-1]) + 1
        begins, ends = np.ascontiguousarray(edges[::2]), np.ascontiguousarray(edges[1::2])
        which, anchor = self._look_up(normal.text, edges)
        whole, more = which[self._whole[anchor]], self._more[anchor]
        longer = [
            span
            for number, around in zip(which[more].tolist(), anchor[more].tolist(), strict=True)
            for span in self._spans(normal, begins, ends, number, self._around[around])
        ]
        found = np.concatenate([np.stack([begins[whole], ends[whole]], 1), np.array(longer, np.int64).reshape(-1, 2)])
        return BlockHits.touched(block, normal.places(found))

    def _look_up(self, text: bytes, edges: Offsets) -> tuple[Offsets, Offsets]:
        """Return which words are anchors, and which anchors; words and gaps alternate at ``edges``.

        Only words with the length and the first and last byte of an anchor are looked up.
        """
        data, begins, ends = np.frombuffer(text, np.uint8), edges[::2], edges[1::2]
        which = np.flatnonzero(
            self._shapes[data[begins] | data[ends - 1].astype(np.int64) << 8 | np.minimum(ends - begins, 255) << 16]
        )
        buffers = [None, pa.py_buffer(edges), pa.py_buffer(text)]
        pieces = pa.LargeBinaryArray.from_buffers(pa.large_binary(), max(len(edges) - 1, 0), buffers)
        anchor = pc.index_in(pieces.take(pa.array(2 * which)), value_set=self._anchors)
        return which[anchor.is_valid()], anchor.drop_null().to_numpy().astype(np.int64)

    def _spans(
        self, normal: Normal, begins: Offsets, ends: Offsets, number: int, around: _Around
    ) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in normalised text of terms whose anchor is word ``number``."""
        text = normal.text
        for (before, count), bodies in around.items():
            first, last = number - before, number - before + count - 1
            if first < 0 or last >= len(begins):
                continue
            begin, end = begins.item(first), ends.item(last)
            for lead, trail in bodies.get(re.sub(rb" +", b" ", text[begin:end]), ()):
                low, high = _beyond(text, begin, lead[::-1], -1), _beyond(text, end, trail, 1)
                if low is None or high is None or (normal.is_word[low - 1] and not (lead and self._folded)):
                    continue
                if not normal.is_word[high] or (trail and self._folded):
                    yield low, high


def _beyond(text: bytes, border: int, expected: bytes, step: int) -> int | None:
    """Return where ``expected`` bytes beside a border end, a space matching any run; None: no match.

    ``step``: 1, or −1 to go backwards.
    """
    place = border - (step < 0)
    for byte in expected:
        if text[place] != byte:
            return None
        place += step
        while byte == ord(" ") and text[place] == byte:
            place += step
    return place + (step < 0)
