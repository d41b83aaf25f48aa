"""Queries, and what each of them must not find: the chunks of its own document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Intervals:
    """Intervals of chunk ids [first, last], ascending and apart, each of a document: ``document`` says of which."""

    first: Ids
    last: Ids
    document: Ids

    def documents(self, ids: Ids) -> Ids:
        """The document of each id; −1: of none."""
        place = np.searchsorted(self.first, ids, side="right") - 1
        within = (place >= 0) & (ids <= self.last[place])
        return np.where(within, self.document[place], -1)


@dataclass(frozen=True, slots=True)
class Excluded:
    """What each of q queries must not find: the interval of chunk ids [first, last], empty if first > last.

    Where a document is there more than once, ``repeats`` has its further intervals, and ``document`` [q] says whose
    they are.
    """

    first: Ids
    last: Ids
    document: Ids | None = None
    repeats: Intervals | None = None

    @classmethod
    def nothing(cls, q: int) -> Excluded:
        """For queries that may find anything."""
        return cls(np.zeros(q, np.int64), np.full(q, -1, np.int64))

    def take(self, rows: Ids) -> Excluded:
        """The same for some of the queries, or for some of them several times."""
        document = None if self.document is None else self.document[rows]
        return Excluded(self.first[rows], self.last[rows], document, self.repeats)


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries float32 [q, d], and what they must not find."""

    vectors: npt.NDArray[np.float32]
    excluded: Excluded

    @classmethod
    def plain(cls, vectors: npt.NDArray[np.float32]) -> Queries:
        """Queries that may find anything."""
        return cls(vectors, Excluded.nothing(len(vectors)))

    def __len__(self) -> int:
        """Queries."""
        return len(self.vectors)

    def take(self, rows: Ids) -> Queries:
        """Some of them."""
        return Queries(self.vectors[rows], self.excluded.take(rows))

    def blocks(self, rows: int) -> Iterator[Queries]:
        """The same, at most ``rows`` of them at a time."""
        for start in range(0, len(self), rows):
            yield self.take(np.arange(start, min(start + rows, len(self))))


def mask(scores: torch.Tensor, ids: Ids, excluded: Excluded) -> None:
    """Set to +inf the scores [r, c] of ids (ascending, [c]) that each row must not find."""
    import torch

    low = np.searchsorted(ids, excluded.first)
    width = np.maximum(np.searchsorted(ids, excluded.last, side="right") - low, 0)
    rows = np.repeat(np.arange(len(width)), width)
    if len(rows):
        within = np.arange(len(rows)) - np.repeat(np.cumsum(width) - width, width)
        scores[torch.from_numpy(rows), torch.from_numpy(np.repeat(low, width) + within)] = torch.inf
    if excluded.repeats is None or excluded.document is None:
        return
    documents = excluded.repeats.documents(ids)
    columns = np.flatnonzero(documents >= 0)
    rows = np.flatnonzero(np.isin(excluded.document, documents[columns]))
    row, column = np.nonzero(excluded.document[rows][:, None] == documents[columns])
    if len(row):
        scores[torch.from_numpy(rows[row]), torch.from_numpy(columns[column])] = torch.inf
