"""Queries, and the chunk ids that each must not return: those of its own document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.lazy import torch

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

    Two intervals are equal or disjoint, as those of documents are. If documents repeat, ``repeats`` has their
    further intervals, for the ``document`` [q] of each query.
    """

    first: Ids
    last: Ids
    document: Ids | None = None
    repeats: Intervals | None = None

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
    """The excluded pairs of queries, whose intervals ascend, and ``ids`` [n], which ascend in each list."""

    def __init__(self, excluded: Excluded, ids: Ids) -> None:
        self._excluded, self._ids = excluded, ids
        self._any = excluded.any
        if self._any:
            self._begin = np.searchsorted(excluded.last, ids)
            self._end = np.searchsorted(excluded.first, ids, side="right")
            self._hit = self._begin < self._end

    def apply(self, scores: torch.Tensor, rows: torch.Tensor, low: int, high: int) -> None:
        """Set scores [r, high − low] of excluded ids to −inf, for the queries ``rows`` [r], ascending."""
        if not self._any:
            return
        asked, found = rows.numpy(), scores.numpy()
        hit = np.flatnonzero(self._hit[low:high])
        if len(hit):
            first = np.searchsorted(asked, self._begin[low:high][hit])
            last = np.searchsorted(asked, self._end[low:high][hit])
            own = first < last
            # A slice of each column: quicker than all their places in one array.
            for column, begin, end in zip(hit[own].tolist(), first[own].tolist(), last[own].tolist(), strict=True):
                found[begin:end, column] = -np.inf
        if self._excluded.repeats is not None:
            assert self._excluded.document is not None, "repeats come with documents"
            document = self._excluded.document[asked]
            documents = self._excluded.repeats.documents(self._ids[low:high])
            columns = np.flatnonzero(documents >= 0)
            repeated = np.flatnonzero(np.isin(document, documents[columns]))
            row, column = np.nonzero(document[repeated][:, None] == documents[columns])
            found[repeated[row], columns[column]] = -np.inf
