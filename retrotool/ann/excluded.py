"""Queries, and the chunk ids that each must not return: those of its own document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.lazy import torch
from retrotool.ranges import pairs_of_ranges

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Intervals:
    """Disjoint ascending intervals of chunk ids [first, last]; ``document`` is the document of each."""

    first: Ids
    last: Ids
    document: Ids

    def documents(self, ids: Ids) -> Ids:
        """Return the document of each id, or −1."""
        place = np.searchsorted(self.first, ids, side="right") - 1
        within = (place >= 0) & (ids <= self.last[place])
        return np.where(within, self.document[place], -1)


@dataclass(frozen=True, slots=True)
class Excluded:
    """The ids that each of q queries must not return: the interval [first, last], empty if first > last.

    If documents repeat, ``repeats`` has their further intervals, for the ``document`` [q] of each query.
    """

    first: Ids
    last: Ids
    document: Ids | None = None
    repeats: Intervals | None = None
    ascends: bool = False  # whether ``first`` and ``last`` both ascend

    @classmethod
    def nothing(cls, q: int) -> Excluded:
        """Return an exclusion of nothing for q queries."""
        return cls(np.zeros(q, np.int64), np.full(q, -1, np.int64))

    def take(self, rows: Ids | slice) -> Excluded:
        """Return the entries of the queries ``rows``, which may repeat."""
        document = None if self.document is None else self.document[rows]
        return Excluded(self.first[rows], self.last[rows], document, self.repeats)

    @property
    def any(self) -> bool:
        """Whether anything is excluded."""
        return self.repeats is not None or bool((self.first <= self.last).any())

    def ascending(self) -> Excluded:
        """Return a copy with ``ascends`` computed."""
        ascends = bool((np.diff(self.first) >= 0).all() and (np.diff(self.last) >= 0).all())
        return replace(self, ascends=ascends)


@dataclass(frozen=True, slots=True)
class Queries:
    """Query vectors [q, d], float32, or float16 for search on a GPU, and what they must not return."""

    vectors: npt.NDArray[np.floating]
    excluded: Excluded

    @classmethod
    def plain(cls, vectors: npt.NDArray[np.float32]) -> Queries:
        """Return queries without exclusions."""
        return cls(vectors, Excluded.nothing(len(vectors)))

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, rows: Ids | slice) -> Queries:
        """Return the queries ``rows``."""
        return Queries(self.vectors[rows], self.excluded.take(rows))

    def widened(self) -> Queries:
        """Return the queries in float32."""
        return self if self.vectors.dtype == np.float32 else replace(self, vectors=self.vectors.astype(np.float32))

    def blocks(self, rows: int) -> Iterator[Queries]:
        """Yield the queries in blocks of at most ``rows``."""
        for start in range(0, len(self), rows):
            yield self.take(slice(start, start + rows))


class Mask:
    """The excluded pairs of queries and ``ids`` [n], ascending in each list.

    If the queries' intervals ascend, ids are located in them once, on construction; otherwise in every call.
    """

    def __init__(self, excluded: Excluded, ids: Ids) -> None:
        self._excluded, self._ids = excluded, ids
        self._any = excluded.any
        if self._any and excluded.ascends:
            self._begin = np.searchsorted(excluded.last, ids)
            self._end = np.searchsorted(excluded.first, ids, side="right")
            self._hit = self._begin < self._end

    def apply(self, scores: torch.Tensor, rows: torch.Tensor, low: int, high: int) -> None:
        """Set scores [r, high − low] of excluded ids to −inf, for the queries ``rows`` [r], ascending."""
        if not self._any:
            return
        if self._excluded.ascends:
            hit = np.flatnonzero(self._hit[low:high])
            if len(hit):
                asked, found = rows.numpy(), scores.numpy()
                first = np.searchsorted(asked, self._begin[low:high][hit])
                last = np.searchsorted(asked, self._end[low:high][hit])
                own = first < last
                # A slice of each column: quicker than all their places in one array.
                for column, begin, end in zip(hit[own].tolist(), first[own].tolist(), last[own].tolist(), strict=True):
                    found[begin:end, column] = -np.inf
        else:
            ids, some = self._ids[low:high], self._excluded.take(rows.numpy())
            first = np.searchsorted(ids, some.first)
            last = np.maximum(np.searchsorted(ids, some.last, side="right"), first)
            row, column = pairs_of_ranges(first, last)
            _hide(scores, row, column)
        if self._excluded.repeats is not None:
            assert self._excluded.document is not None, "repeats come with documents"
            document = self._excluded.document[rows.numpy()]
            documents = self._excluded.repeats.documents(self._ids[low:high])
            columns = np.flatnonzero(documents >= 0)
            repeated = np.flatnonzero(np.isin(document, documents[columns]))
            row, column = np.nonzero(document[repeated][:, None] == documents[columns])
            _hide(scores, repeated[row], columns[column])


def _hide(scores: torch.Tensor, rows: Ids, columns: Ids) -> None:
    if len(rows):
        scores.numpy().reshape(-1)[rows * scores.shape[1] + columns] = -np.inf  # several times as fast as torch
