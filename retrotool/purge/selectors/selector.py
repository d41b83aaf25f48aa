"""What all selectors by content have in common: what they are asked, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from retrotool.purge.selectors.document_text import Block
from retrotool.store.store import Store

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hits:
    """Rows of a block that a selector means, all arrays [n]; a row may come up several times.

    ``rows`` count from the first row of the block. ``labels`` say by which of the selector's names. ``begin`` and
    ``end`` are where in the bytes of ``Block.text`` the match lies, the same for all rows that it touches; −1 where a
    chunk is meant for what it is, not for a place in its text. ``figures`` are how much each is meant, in the
    selector's own unit (a distance, a score), NaN or None where nothing of the kind is measured.
    """

    rows: Rows
    labels: npt.NDArray[np.int32]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    figures: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """How many."""
        return len(self.rows)

    @property
    def measured(self) -> npt.NDArray[np.float32]:
        """``figures``, NaN where there are none."""
        return np.full(len(self), np.nan, np.float32) if self.figures is None else self.figures

    @classmethod
    def nothing(cls) -> Hits:
        """No row."""
        return cls.of(np.zeros(0, np.int64))

    @classmethod
    def of(cls, rows: Rows, label: int = 0, figures: npt.NDArray[np.float32] | None = None) -> Hits:
        """Whole chunks."""
        nowhere = np.full(len(rows), -1, np.int64)
        return cls(rows, np.full(len(rows), label, np.int32), nowhere, nowhere, figures)

    @classmethod
    def joined(cls, several: Sequence[Hits]) -> Hits:
        """All of several."""
        if not several:
            return cls.nothing()
        arrays = ([getattr(hits, name) for hits in several] for name in ("rows", "labels", "begin", "end", "measured"))
        return cls(*(np.concatenate(some) for some in arrays))


class Matcher(Protocol):
    """Finds the rows of blocks that a selector means. Called from several threads at once."""

    @property
    def names(self) -> Sequence[str]:
        """What labels stand for; none may tell what is looked for, as they are printed and kept."""

    def __call__(self, block: Block) -> Hits:
        """The rows of a block that are meant."""


class Selector(Protocol):
    """Says what is looked for. Plain data, which is sent to worker processes."""

    kind: ClassVar[str]
    """The name of its option, without the dashes."""
    reads_text: ClassVar[bool]
    """Whether it looks at text; if not, none is decoded for it."""

    def literal(self) -> dict[str, Any]:
        """All that it was given, as JSON. It can be personal data: it is kept in erasable files only."""

    def open(self, store: Store) -> Matcher:
        """Get ready; ``UsageError`` if this can't be looked for in this store."""


@runtime_checkable
class ReadsMore(Protocol):
    """A selector that looks at other files of a part than its chunks."""

    def reads(self, store: Store, part: int) -> list[str]:
        """Their paths: of another file what was found in them tells nothing. ``UsageError`` if one is not there yet."""


@runtime_checkable
class TakesFewRows(Protocol):
    """A matcher that is at a row for long: with small blocks progress shows, and threads have about the same to do."""

    block_rows: int
