"""What all selectors by content share: blocks of text that they look at, what they answer, and the files they get.

A block is whole documents of a part. Its text is that of its chunks one behind the other, so a match may lie across the
border of two chunks of a document, and not across two documents: ``documents`` says where each begins. Erased chunks
have no bytes. Purged ones do, as what is purged may still be erased.

With a lossless tokenizer the text is what went in, byte for byte. Otherwise it is **folded**: what the tokenizer
leaves of it, with a single space between two words, and none beside what is neither a letter nor a digit. So
``John.Doe+x@Example.com`` is ``john.doe+x@example.com`` for a tokenizer that loses case, and ``Hello , world`` is
``hello,world``. Patterns are searched in that.

Cost: decoding, 70 to 150 MB/s a core. Memory: tokens and text of a block, some 10 MB, or of its one document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.purge.selectors.ngrams import pairs_of_ranges
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer
from retrotool.tokenizers.fold import Folder

Offsets = npt.NDArray[np.int64]

BLOCK_ROWS = 1 << 14
"""Chunks that a block has at least, if its part has as many."""


class Decoder:
    """Decodes chunks of a store, folded if its tokenizer is not lossless. Several threads may use it."""

    def __init__(self, store: Store) -> None:
        self._tokenizer = stored_tokenizer(store)
        self.lossless = self._tokenizer.lossless
        self._folder = None if self.lossless else Folder(self._tokenizer)

    def __call__(self, chunks: Chunks) -> tuple[Offsets, memoryview]:
        """Where the text of each chunk begins and the last ends, int64 [n + 1], and the bytes of all."""
        if self._folder is not None:
            starts, data = self._folder(chunks.tokens, chunks.n_tokens, chunks.index == 0)
        else:
            decoded = self._tokenizer.decode(chunks.tokens, chunks.n_tokens)
            _, offsets, data = decoded.buffers()
            starts = np.frombuffer(offsets, np.int64, len(chunks) + 1, 8 * decoded.offset)
        # An array of nothing has no buffer of bytes.
        return starts - starts[0], memoryview(data or b"")[int(starts[0]) : int(starts[-1])]


@dataclass(frozen=True)
class TextBlock:
    """Whole documents of a part: ``chunks``, of which the first is row ``first`` of the part.

    ``documents`` are the rows of the block at which a document begins, and the number of rows, int64 [m + 1].
    """

    chunks: Chunks
    first: int
    documents: Offsets
    decoder: Decoder

    @property
    def part(self) -> int:
        """Number of the part."""
        return self.chunks.part

    def __len__(self) -> int:
        """Chunks, erased ones too."""
        return len(self.chunks)

    @cached_property
    def _decoded(self) -> tuple[Offsets, memoryview]:
        return self.decoder(self.chunks)

    @property
    def starts(self) -> Offsets:
        """Where in ``text`` each chunk begins, and the last ends, int64 [n + 1]."""
        return self._decoded[0]

    @property
    def text(self) -> memoryview:
        """The text of all chunks, one behind the other, in UTF-8."""
        return self._decoded[1]


def text_blocks(store: Store, decoder: Decoder, part: int, rows: int = BLOCK_ROWS) -> Iterator[TextBlock]:
    """A part in blocks of whole documents, of at least so many rows each but the last."""
    total = parts.part_entry(store, "chunks", part).rows
    first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy().astype(np.int64)
    start = 0
    while start < total:
        after = int(np.searchsorted(first, start + rows))
        stop = int(first[after]) if after < len(first) else total
        groups = range(start // parts.ROW_GROUP, -(-stop // parts.ROW_GROUP))
        read = parts.read_chunks(store, part, list(groups))
        chunks = read.between(start - groups[0] * parts.ROW_GROUP, stop - groups[0] * parts.ROW_GROUP)
        bounds = np.append(first[np.searchsorted(first, start) : after], stop)
        yield TextBlock(chunks, start, bounds - start, decoder)
        start = stop


Rows = npt.NDArray[np.int64]
_BOM = b"\xef\xbb\xbf"
"""The byte order mark that editors on Windows write."""


@dataclass(frozen=True, slots=True)
class BlockHits:
    """Rows of a block that a selector means, all arrays [n]; a row may come up several times.

    ``rows`` count from the first row of the block. ``labels`` say by which of the selector's names. ``begin`` and
    ``end`` are where in the bytes of ``TextBlock.text`` the match is, the same for all rows that it touches; −1 where a
    chunk is meant for what it is, not for a place in its text. ``figures`` are how much each is meant, in the
    selector's unit (a distance, a score), NaN where nothing is measured.
    """

    rows: Rows
    labels: npt.NDArray[np.int32]
    begin: Offsets
    end: Offsets
    figures: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)

    @classmethod
    def whole(cls, rows: Rows, figures: npt.NDArray[np.float32] | None = None) -> BlockHits:
        """Return hits of whole chunks; ``figures`` [n] if something was measured."""
        nowhere = np.full(len(rows), -1, np.int64)
        if figures is None:
            figures = np.full(len(rows), np.nan, np.float32)
        return cls(rows, np.zeros(len(rows), np.int32), nowhere, nowhere, figures)

    @classmethod
    def touched(cls, block: TextBlock, begin: Offsets, end: Offsets, label: int = 0) -> BlockHits:
        """Return the rows that matches touch, of spans [begin, end), [h], of bytes in the text of a block.

        An empty span touches the chunk that has the byte behind it.
        """
        low, high = (
            np.minimum(np.searchsorted(block.starts, place, side="right") - 1, len(block) - 1)
            for place in (begin, np.maximum(end - 1, begin))
        )
        span, row = pairs_of_ranges(low, high + 1)
        full = block.chunks.n_tokens[row] > 0  # what is erased has no bytes, and is touched by none
        span, row = span[full], row[full]
        figures = np.full(len(row), np.nan, np.float32)
        return cls(row, np.full(len(row), label, np.int32), begin[span], end[span], figures)

    @classmethod
    def joined(cls, several: Sequence[BlockHits]) -> BlockHits:
        """Return all of several hits, at least one."""
        return cls(*(np.concatenate([getattr(hits, one.name) for hits in several]) for one in fields(cls)))


Matcher = Callable[[TextBlock], BlockHits]
"""Finds the rows of a block that a selector means. Called from several threads at once.

It may have ``block_rows``, the chunks that a block should have, ``BLOCK_ROWS`` otherwise. Small blocks suit a slow
matcher: progress shows, and threads share the work.
"""


class Selector:
    """Says what is looked for. Subclasses are frozen dataclasses, which are sent to worker processes."""

    __slots__ = ()
    kind: ClassVar[str]
    """The name of its option, without the dashes."""
    reads_text: ClassVar[bool] = False
    """Whether it looks at text; if not, none is decoded for it."""

    @property
    def names(self) -> Sequence[str]:
        """What labels stand for. None may contain what is looked for, as they are printed and kept."""
        return (self.kind,)

    def literal(self) -> dict[str, Any]:
        """Return what it was given, as JSON: all fields that compare.

        It can be personal data: it is kept in erasable files only.
        """
        return {one.name: getattr(self, one.name) for one in fields(self) if one.compare}  # type: ignore[arg-type]

    def reads(self, store: Store, part: int) -> list[str]:  # noqa: ARG002
        """Return paths of the files of a part, besides its chunks, that are read; ``UsageError`` if one is missing."""
        return []

    def open(self, store: Store) -> Matcher:
        """Return what finds it; ``UsageError`` if this can't be looked for in this store."""
        raise NotImplementedError


Value = str | int | Path
"""A value to select by; a ``Path`` is a file with one value a line, ``Path("-")`` standard input."""
Values = Value | Sequence[Value]


@dataclass(frozen=True, slots=True)
class GivenValue:
    """A value to select by, and the ``place`` in a file that it was read from ("" if it was given itself)."""

    text: str
    place: str = field(default="", compare=False)

    def error(self, message: str, advice: str = "Nothing was purged.") -> UsageError:
        """Return an error about the value, with its place."""
        return UsageError(f"{self.place}: {message}" if self.place else message, advice)


def read_values(option: str, given: Values, what: str) -> tuple[GivenValue, ...]:
    """Return values, those of files line by line; blank lines are left out.

    ``UsageError`` for a value that is not UTF-8, and a file that can't be read or has no ``what``.
    """
    several: Sequence[Value] = [given] if isinstance(given, Value) else given
    found: list[GivenValue] = []
    for one in several:
        if isinstance(one, Path):
            lines = enumerate(read_selector_lines(option, one, what), 1)
            found += (GivenValue(line, f"{one}, line {number:,}") for number, line in lines if line.strip())
        else:
            check_selector_text(option, str(one))
            found.append(GivenValue(str(one)))
    return tuple(found)


def check_selector_text(option: str, text: str) -> None:
    """Raise ``UsageError`` for text that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!a} is not UTF-8", "Nothing was purged.") from None


def read_selector_file(option: str, path: str | Path) -> str:
    """Return the text of a file, or of standard input ("-"), in UTF-8 with or without a byte order mark.

    ``UsageError`` if it can't be read, with the line that is not UTF-8.
    """
    try:
        data = (sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()).removeprefix(_BOM)
    except OSError as error:
        raise UsageError(f"{option} {path} can't be read: {error.strerror or error}", "Nothing was purged.") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{option} {path} can't be read: line {line:,} is not UTF-8", "Save it as UTF-8.") from error


def read_selector_lines(
    option: str, path: str | Path, what: str, *, says: Callable[[str], object] = str.strip
) -> tuple[str, ...]:
    """Return the lines of a file, without their ends; ``what`` is on each for which ``says`` is true.

    ``UsageError`` if it is on none: a file is given to select by it.
    """
    lines = tuple(line.removesuffix("\r") for line in read_selector_file(option, path).split("\n"))
    if not any(map(says, lines)):
        raise UsageError(f"{option} {path} has no {what}", f"Give a file with one {what} a line.")
    return lines
