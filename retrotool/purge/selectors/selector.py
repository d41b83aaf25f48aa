"""The interface of selectors that scan: blocks of text, hits, and reading their files of values.

A block is whole documents of a part. Its text is that of its chunks, concatenated, so a match may cross from
one chunk to the next; matches that would cross from one document to the next are excluded by ``documents``.
Erased chunks have no bytes. Purged chunks have their text, because they may still be erased.

With a lossless tokenizer the text equals the input, byte for byte. Otherwise it is **folded**: what the
tokenizer keeps, with one space between two words, and none beside a character that is not a letter or digit.
With a tokenizer that loses case, ``John.Doe+x@Example.com`` is ``john.doe+x@example.com``, and ``Hello ,
world`` is ``hello,world``.

Cost: decoding, 70 to 150 MB/s per core. Memory: tokens and text of a block, about 10 MB, or of its only
document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from retrotool.cli.options import check_utf8, read_given_lines
from retrotool.errors import UsageError
from retrotool.ranges import pairs_of_ranges
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer
from retrotool.tokenizers.fold import Folder

Offsets = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 14  # the least number of chunks in a block, if its part has as many


class Decoder:
    """Decodes chunks of a store, folded if its tokenizer is not lossless. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._tokenizer = stored_tokenizer(store)
        self._folder = None if self._tokenizer.lossless else Folder(self._tokenizer)

    def __call__(self, chunks: Chunks) -> tuple[Offsets, memoryview]:
        """Return where each chunk's text begins and the last one ends, int64 [n + 1], and all bytes."""
        if self._folder is not None:
            starts, data = self._folder(chunks.tokens, chunks.n_tokens, chunks.index == 0)
        else:
            decoded = self._tokenizer.decode(chunks.tokens, chunks.n_tokens)
            _, offsets, data = decoded.buffers()
            starts = np.frombuffer(offsets, np.int64, len(chunks) + 1, 8 * decoded.offset)
        # An empty array has no data buffer.
        return starts - starts[0], memoryview(data or b"")[int(starts[0]) : int(starts[-1])]


@dataclass(frozen=True)
class TextBlock:
    """Whole documents of a part: ``chunks``, the first of which is row ``first`` of the part.

    ``documents``: the first row of each document in the block, and the number of rows, int64 [m + 1].
    """

    chunks: Chunks
    first: int
    documents: Offsets
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.chunks)

    @cached_property
    def _decoded(self) -> tuple[Offsets, memoryview]:
        return self.decoder(self.chunks)

    @cached_property
    def borders(self) -> Offsets:
        """Where in ``text`` documents and values of key-value records begin, and where the last one ends.

        Keys and values are tokenised apart, so no word or match goes on from one into the other.
        """
        key = self.chunks.key
        return self.starts[np.union1d(self.documents, np.flatnonzero(key[:-1] & ~key[1:]) + 1)]

    @property
    def starts(self) -> Offsets:
        """Where in ``text`` each chunk begins and the last one ends, int64 [n + 1]."""
        return self._decoded[0]

    @property
    def text(self) -> memoryview:
        """The concatenated text of all chunks, in UTF-8."""
        return self._decoded[1]


def text_blocks(store: Store, decoder: Decoder, part: int, rows: int = BLOCK_ROWS) -> Iterator[TextBlock]:
    """Yield a part in blocks of whole documents, each of at least ``rows`` rows except the last."""
    total = parts.part_entry(store, "chunks", part).rows
    first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy().astype(np.int64)
    start = 0
    while start < total:
        after = int(np.searchsorted(first, start + rows))
        stop = int(first[after]) if after < len(first) else total
        bounds = np.append(first[np.searchsorted(first, start) : after], stop)
        yield TextBlock(read_rows(store, part, start, stop), start, bounds - start, decoder)
        start = stop


def read_rows(store: Store, part: int, start: int, stop: int) -> Chunks:
    """Read the chunks in rows [start, stop) of a part."""
    groups = range(start // parts.ROW_GROUP, -(-stop // parts.ROW_GROUP))
    first = groups[0] * parts.ROW_GROUP
    return parts.read_chunks(store, part, groups).between(start - first, stop - first)


@dataclass(frozen=True, slots=True)
class BlockHits:
    """Rows of a block that a selector selects; all arrays are [n], and rows may repeat.

    * ``rows``: counted from the first row of the block.
    * ``labels``: indexes into the selector's ``names``.
    * ``begin``, ``end``: bytes of ``TextBlock.text`` that match, the same for all rows that the match
      touches; −1 if a chunk is selected as a whole.
    * ``figures``: a distance or score, NaN if the selector measures none.
    """

    rows: Offsets
    labels: npt.NDArray[np.int32]
    begin: Offsets
    end: Offsets
    figures: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def whole(cls, rows: Offsets, figures: npt.NDArray[np.float32] | None = None) -> BlockHits:
        """Return hits of whole chunks, with ``figures`` [n] if given."""
        nowhere, nothing = np.full(len(rows), -1, np.int64), np.full(len(rows), np.nan, np.float32)
        return cls(rows, np.zeros(len(rows), np.int32), nowhere, nowhere, nothing if figures is None else figures)

    @classmethod
    def touched(cls, block: TextBlock, matches: npt.ArrayLike, label: int = 0) -> BlockHits:
        """Return the rows that matches touch: spans [begin, end) of bytes in the text of a block, [h, 2].

        An empty span touches the chunk with the byte after it.
        """
        begin, end = np.asarray(matches, np.int64).reshape(-1, 2).T
        low, high = (
            np.minimum(np.searchsorted(block.starts, place, side="right") - 1, len(block) - 1)
            for place in (begin, np.maximum(end - 1, begin))
        )
        span, row = pairs_of_ranges(low, high + 1)
        full = block.chunks.n_tokens[row] > 0  # not erased
        span, found = span[full], cls.whole(row[full])
        return replace(found, labels=found.labels + np.int32(label), begin=begin[span], end=end[span])

    @classmethod
    def joined(cls, several: Sequence[BlockHits]) -> BlockHits:
        """Concatenate hits."""
        several = (cls.whole(np.zeros(0, np.int64)), *several)
        return cls(*(np.concatenate([getattr(hits, one.name) for hits in several]) for one in fields(cls)))


Matcher = Callable[[TextBlock], BlockHits]
"""Finds the rows of a block that a selector selects. Called from several threads concurrently.

It may have ``block_rows``, the number of chunks that blocks should have (default: ``BLOCK_ROWS``). A slow
matcher uses small blocks, to show progress and to share the work among threads.
"""


class Selector:
    """What to search for. Subclasses are frozen dataclasses, which are sent to worker processes."""

    __slots__ = ()
    kind: ClassVar[str]  # the name of its option, without dashes
    reads_text: ClassVar[bool] = False  # whether it reads text; otherwise none is decoded for it

    @property
    def names(self) -> Sequence[str]:
        """The meaning of labels. They are printed and stored, so they must not quote what is searched for."""
        return (self.kind,)

    def literal(self) -> dict[str, Any]:
        """Return its compared fields as JSON. They can be personal data: only erasable files store them."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.compare}  # type: ignore[arg-type]

    def reads(self, store: Store, part: int) -> list[str]:  # noqa: ARG002
        """Return the paths of the files to read besides chunks; ``UsageError`` if one is missing."""
        return []

    def open(self, store: Store) -> Matcher:
        """Return the matcher; ``UsageError`` if the selector can't be used with this store."""
        raise NotImplementedError


Value = str | int | Path
"""A value to select by; a ``Path`` is a file with one value per line, ``Path("-")`` standard input."""
Values = Value | Sequence[Value]


@dataclass(frozen=True, slots=True)
class GivenValue:
    """A value to select by, and the ``place`` in a file that it was read from ("": no file)."""

    text: str
    place: str = field(default="", compare=False)

    def error(self, message: str, advice: str = "Nothing was purged.") -> UsageError:
        """Return an error about the value, with its place."""
        return UsageError(f"{self.place}: {message}" if self.place else message, advice)


def read_values(option: str, given: Values, what: str) -> tuple[GivenValue, ...]:
    """Read values, those of files line by line; blank lines are skipped.

    ``UsageError`` for a value that is not UTF-8, and for a file that can't be read or has no ``what``.
    """
    several: Sequence[Value] = [given] if isinstance(given, Value) else given
    found: list[GivenValue] = []
    for one in several:
        if isinstance(one, Path):
            place = "standard input" if str(one) == "-" else one
            lines = enumerate(read_given_lines(option, one, what), 1)
            found += (GivenValue(line, f"{place}, line {number:,}") for number, line in lines if line.strip())
        else:
            check_utf8(option, str(one))
            found.append(GivenValue(str(one)))
    return tuple(found)
