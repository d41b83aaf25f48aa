"""Fold decoded text of tokenizers that lose case or spacing, so that patterns can match it.

Such a tokenizer decodes to ``john. doe + x @ example. com``, by its own rules. Folded it is
``john.doe+x@example.com``: a single space between two words, and none beside other characters. Case, accents
and unknown characters are not restored.

WordPiece is folded token by token, with an Arrow ``take`` from a table of each token's bytes with and without
a space, 70 to 150 MB/s per core. Others are decoded (SentencePiece by a table, too), then spaces are removed
character by character, 10 to 20 MB/s.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ranges import Int64s
from retrotool.tokenizers.tokenizer import Tokenizer, joined_rows

_CONTINUES = "##"
_SPACE = "▁"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Folder:
    """Folds the decoded text of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table: pa.Array | None = None
        self._pieces: pa.Array | None = None
        tokens = tokenizer.names()
        if not tokenizer.is_wordpiece:
            if any(token.startswith(_SPACE) for token in tokens):
                self._pieces = pa.array(map(_spelled, tokens), pa.large_binary())
            return
        bare = [token.removeprefix(_CONTINUES) if len(token) > len(_CONTINUES) else token for token in tokens]
        continues = np.array([one != token for one, token in zip(bare, tokens, strict=True)])
        self._begins = np.array([token[:1].isalnum() for token in bare]) & ~continues
        self._ends = np.array([token[-1:].isalnum() for token in bare])
        self._table = pa.array([text.encode() for text in (*bare, *(f" {one}" for one in bare))], pa.large_binary())

    def __call__(
        self, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any], is_first: npt.NDArray[np.bool_]
    ) -> tuple[Int64s, pa.Buffer]:
        """Fold rows of ``tokens`` [n, chunk_length]; return their bounds, int64 [n + 1], and the bytes."""
        used = np.arange(tokens.shape[1]) < n_tokens[:, None]
        if self._table is None:
            if self._pieces is None:
                decoded = self._tokenizer.decode(tokens, n_tokens)
                _, offsets, data = decoded.buffers()
                starts = np.frombuffer(offsets, np.int64, count=len(decoded) + 1, offset=8 * decoded.offset)
            else:
                starts, data = joined_rows(self._pieces, tokens[used], n_tokens)
            text = memoryview(data or b"")[int(starts[0]) : int(starts[-1])]
            return folded(text, starts - starts[0], is_first)
        ids = tokens[used]  # not widened: new memory costs more than the sums
        begins = np.cumsum(n_tokens, dtype=np.int64) - n_tokens
        space = np.take(self._begins, ids)
        space[1:] &= np.take(self._ends, ids[:-1])
        firsts = begins[is_first & (n_tokens > 0)]
        space[:1] = False
        space[firsts] = False
        starts, data = joined_rows(self._table, ids + space * np.uint32(len(self._ends)), n_tokens)
        return starts - starts[0], data.slice(int(starts[0]))


def _spelled(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def folded(text: memoryview, starts: Int64s, is_first: npt.NDArray[np.bool_]) -> tuple[Int64s, pa.Buffer]:
    """Remove spaces from rows beginning at ``starts`` [n + 1], but one between two words of a document."""
    characters = code_points(bytes(text).decode("utf-8", "surrogateescape"))
    size = utf8_sizes(characters)
    place = np.cumsum(size) - size
    kind = kinds()[characters]
    solid = np.flatnonzero(kind != SPACE)
    document = np.searchsorted(starts[:-1][is_first], place[solid], side="right")
    joined = (kind[solid[:-1]] == WORD) & (kind[solid[1:]] == WORD) & (np.diff(solid) > 1) & (np.diff(document) == 0)
    spaces = place[solid[:-1][joined] + 1]
    kept = np.repeat(kind != SPACE, size)
    kept[spaces] = True
    data = np.frombuffer(text, np.uint8).copy()
    data[spaces] = ord(" ")
    before = np.concatenate([[0], np.cumsum(kept)])
    return before[starts], pa.py_buffer(data[kept])


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8_sizes(points: npt.NDArray[np.uint32]) -> Int64s:
    """Return the bytes of each character in UTF-8; a surrogate stands for a byte that is not UTF-8."""
    return np.select([points < 0x80, points < 0x800, points >> 11 == 0x1B, points < 0x10000], [1, 2, 1, 3], 4)


SPACE, WORD = 0, 1


@functools.cache
def kinds() -> npt.NDArray[np.uint8]:
    """Return for each code point: white space (0), part of a word (1), or other (2)."""
    found = np.full(0x110000, 2, np.uint8)
    for number, character in enumerate(map(chr, range(len(found)))):
        if character.isspace():
            found[number] = SPACE
        elif character.isalnum() or unicodedata.category(character)[0] == "M":
            found[number] = WORD
    return found
