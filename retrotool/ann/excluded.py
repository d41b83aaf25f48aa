"""Queries, and what each of them must not find: the chunks of its own document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.lazy import torch
from retrotool.ranges import expand_ranges

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
    ascends: bool = False
    """Whether ``first`` and ``last`` both ascend."""

    @classmethod
    def nothing(cls, q: int) -> Excluded:
        """For queries that may find anything."""
        return cls(np.zeros(q, np.int64), np.full(q, -1, np.int64))

    def take(self, rows: Ids) -> Excluded:
        """The same for some of the queries, or for some of them several times."""
        document = None if self.document is None else self.document[rows]
        return Excluded(self.first[rows], self.last[rows], document, self.repeats)

    @property
    def any(self) -> bool:
        """Whether anything is excluded."""
        return self.repeats is not None or bool((self.first <= self.last).any())

    def ascending(self) -> Excluded:
        """The same, having looked whether the intervals ascend."""
        ascends = bool((np.diff(self.first) >= 0).all() and (np.diff(self.last) >= 0).all())
        return replace(self, ascends=ascends)


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
        return len(self.vectors)

    def take(self, rows: Ids) -> Queries:
        """Some of them."""
        return Queries(self.vectors[rows], self.excluded.take(rows))

    def blocks(self, rows: int) -> Iterator[Queries]:
        """The same, at most ``rows`` of them at a time."""
        for start in range(0, len(self), rows):
            yield self.take(np.arange(start, min(start + rows, len(self))))


class Mask:
    """What queries must not find among ``ids`` [n], ascending in each list, worked out for all of them at once.

    Where the queries' intervals ascend, each id is searched among them, and is then known to be nobody's, or whose; as
    a rule it is nobody's. Otherwise each query's interval is searched among the ids when they are masked.
    """

    def __init__(self, excluded: Excluded, ids: Ids) -> None:
        self._excluded, self._ids = excluded, ids
        self._any = excluded.any
        if self._any and excluded.ascends:
            self._begin = np.searchsorted(excluded.last, ids)
            self._end = np.searchsorted(excluded.first, ids, side="right")
            self._hit = self._begin < self._end

    def apply(self, scores: torch.Tensor, rows: torch.Tensor, low: int, high: int) -> None:
        """Set to −inf the scores [r, high − low] of ids that some queries, ``rows`` [r], ascending, must not find."""
        if not self._any:
            return
        if self._excluded.ascends:
            hit = np.flatnonzero(self._hit[low:high])
            if len(hit):
                asked = rows.cpu().numpy()
                first = np.searchsorted(asked, self._begin[low:high][hit])
                place, row = _ranges(first, np.searchsorted(asked, self._end[low:high][hit]) - first)
                _hide(scores, row, hit[place])
        else:
            ids, some = self._ids[low:high], self._excluded.take(rows.cpu().numpy())
            first = np.searchsorted(ids, some.first)
            row, column = _ranges(first, np.maximum(np.searchsorted(ids, some.last, side="right") - first, 0))
            _hide(scores, row, column)
        if self._excluded.repeats is not None:
            assert self._excluded.document is not None, "where there are repeats, it is known whose"
            document = self._excluded.document[rows.cpu().numpy()]
            documents = self._excluded.repeats.documents(self._ids[low:high])
            columns = np.flatnonzero(documents >= 0)
            repeated = np.flatnonzero(np.isin(document, documents[columns]))
            row, column = np.nonzero(document[repeated][:, None] == documents[columns])
            _hide(scores, repeated[row], columns[column])


def _hide(scores: torch.Tensor, rows: Ids, columns: Ids) -> None:
    if len(rows):
        scores[torch.from_numpy(rows), torch.from_numpy(columns)] = -torch.inf


def _ranges(low: Ids, length: Ids) -> tuple[Ids, Ids]:
    """(i, j) of all j in [low[i], low[i] + length[i])."""
    return np.repeat(np.arange(len(low)), length), expand_ranges(low, length)
