"""What all selectors by content have in common: what they are asked, what they answer, and the files they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.purge.selectors.document_text import BLOCK_ROWS, Offsets, TextBlock
from retrotool.store.store import Store

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
        """Return the rows that matches touch, of spans [h] in the text of a block."""
        span, row = block.rows_of(begin, end)
        figures = np.full(len(row), np.nan, np.float32)
        return cls(row, np.full(len(row), label, np.int32), begin[span], end[span], figures)

    @classmethod
    def joined(cls, several: Sequence[BlockHits]) -> BlockHits:
        """Return all of several hits, at least one."""
        return cls(*(np.concatenate([getattr(hits, one.name) for hits in several]) for one in fields(cls)))


class Matcher:
    """Finds the rows of blocks that a selector means. Called from several threads at once."""

    block_rows: int = BLOCK_ROWS
    """Chunks that a block should have. Small blocks suit a slow matcher: progress shows, and threads share the work."""

    def __call__(self, block: TextBlock) -> BlockHits:
        """Return the rows of a block that are meant."""
        raise NotImplementedError


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


def read_selector_file(option: str, path: str | Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    ``UsageError`` if it can't be read, with the line that is not UTF-8.
    """
    try:
        data = Path(path).read_bytes().removeprefix(_BOM)
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
