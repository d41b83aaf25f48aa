"""The layout of chunks in training sequences, the order of sequences, and the share of each rank.

A sequence is a number of slots, each for one chunk. Blocks of 8,192 rows (the row groups of ``chunks/``) are
laid out independently, so that reading a block gives whole sequences:

* packed: the live chunks of a block fill the slots in order, across documents;
* not packed: every document begins a sequence, and is cut at the end of a block.

Live rows have no tombstone at a given commit. Rows never move, so the layout of a commit can be reproduced.

The order depends on the layout, the seed and the epoch only: blocks are shuffled, ``mixed`` consecutive ones
make a window, and the sequences of a window are shuffled. Ranks get consecutive spans of equal length, which
share at most two windows. An epoch resumes from the spans that are left, with any number of ranks.

Cost: tombstones, and if not packed two columns of all documents. Memory: 48 bytes per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ranges import positions_within
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

Slots = npt.NDArray[np.int32]
Span = tuple[int, int]  # [start, stop) of places in the order
EMPTY = -1  # stands for the row or id of an empty slot


def slots_of(live: npt.NDArray[np.bool_], doc: npt.NDArray[Any], size: int, *, packed: bool) -> Slots:
    """Arrange the rows of a block in sequences, int32 [sequences, size] (−1: empty slot).

    ``live`` and ``doc`` (the document of each row, ascending) are [n].
    """
    rows = np.flatnonzero(live).astype(np.int32)
    if packed:
        place = np.arange(len(rows))
    else:
        starts = np.flatnonzero(np.diff(doc[rows], prepend=-1))  # indexes of rows that begin documents
        inside = positions_within(np.diff(starts, append=len(rows)))
        begins = inside % size == 0
        place = (np.cumsum(begins) - 1) * size + inside % size
    slots = np.full((-(-(int(place[-1]) + 1) // size) if len(rows) else 0, size), EMPTY, np.int32)
    slots.reshape(-1)[place] = rows
    return slots


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The sequences of a store at one commit, in blocks by ascending ids."""

    commit: int
    head: str
    size: int  # slots per sequence
    packed: bool
    part: npt.NDArray[np.int32]  # of each block
    group: npt.NDArray[np.int32]  # number of each block in its part
    counts: npt.NDArray[np.int64]  # sequences of each block
    tombstones: Tombstones
    tokens: int  # tokens of all live chunks

    @classmethod
    def of(cls, store: Store, commit: int, size: int, *, packed: bool) -> SequenceLayout:
        """Compute the layout of a store as it was after ``commit``."""
        then = store.at(commit)
        tombstones = read_tombstones(then)
        part, group, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for number in then.state.parts():
            purged, rows = tombstones.rows(number), parts.part_entry(then, "chunks", number).rows
            of_part = _packed(rows, purged, size) if packed else _unpacked(store, number, rows, purged, size)
            part.append(np.full(len(of_part), number, np.int32))
            group.append(np.arange(len(of_part), dtype=np.int32))
            counts.append(of_part)
        tokens = int(then.state.records.get("totals", {}).get("tokens", 0))
        return cls(
            then.state.number, then.state.head, size, packed,
            np.concatenate(part), np.concatenate(group), np.concatenate(counts), tombstones, tokens,
        )  # fmt: skip

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.counts.sum())

    def slots(self, block: int, doc: npt.NDArray[Any]) -> Slots:
        """Arrange a block, whose rows have the documents ``doc``; row numbers are relative to the block."""
        live = np.ones(len(doc), np.bool_)
        purged = self.tombstones.rows(int(self.part[block]))
        first = int(self.group[block]) * ROW_GROUP
        low, high = np.searchsorted(purged, [first, first + len(doc)])
        live[purged[low:high] - first] = False
        return slots_of(live, doc, self.size, packed=self.packed)


def _packed(rows: int, purged: Ids, size: int) -> Ids:
    """Return the number of sequences of each block of a part with ``rows`` rows."""
    blocks = -(-rows // ROW_GROUP)
    live = np.minimum(ROW_GROUP, rows - np.arange(blocks) * ROW_GROUP)
    return -(-(live - np.bincount(purged // ROW_GROUP, minlength=blocks)) // size)


def _unpacked(store: Store, part: int, rows: int, purged: Ids, size: int) -> Ids:
    """Return the same if every document begins a sequence. Erases do not move documents."""
    documents = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first = documents["first_row"].to_numpy()[documents["n_chunks"].to_numpy() > 0]
    blocks = -(-rows // ROW_GROUP)
    # First rows of documents, and of their continuations in another block.
    starts = np.union1d(first, np.arange(blocks) * ROW_GROUP)
    ends = np.append(starts[1:], rows)
    live = ends - starts - (np.searchsorted(purged, ends) - np.searchsorted(purged, starts))
    return np.bincount(starts // ROW_GROUP, -(-live // size), blocks).astype(np.int64)


def permutation(n: int, *seed: int) -> Ids:
    """Shuffle 0 to n − 1 with NumPy's PCG64, which unlike its ``Generator`` is stable across versions."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


class Order:
    """The order of an epoch's sequences. ``counts``: sequences per block; ``seed`` None: as stored."""

    def __init__(self, counts: Ids, seed: int | None, epoch: int, mixed: int) -> None:
        self._seed, self._epoch, self._mixed = seed, epoch, mixed
        self._blocks = np.arange(len(counts)) if seed is None else permutation(len(counts), seed, epoch)
        self._counts = counts[self._blocks]
        sizes = np.add.reduceat(self._counts, np.arange(0, len(counts), mixed)) if len(counts) else counts
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def pieces(self, spans: Sequence[Span], skip: int = 0) -> Iterator[tuple[int, Ids, Ids]]:
        """Yield the sequences in ``spans``, without the first ``skip``, window by window.

        Of a window: the place of its first one in the rank, the block [n] of each, its number in it [n].
        """
        done = 0
        for start, stop in spans:
            place = start + min(max(skip - done, 0), stop - start)
            while place < stop:
                window = int(np.searchsorted(self._ends, place, side="right"))
                end = min(stop, int(self._ends[window]))
                block, sequence = self._window(window)
                offset = int(self._ends[window]) - len(block)
                some = slice(place - offset, end - offset)
                yield done + place - start, block[some], sequence[some]
                place = end
            done += stop - start

    def _window(self, window: int) -> tuple[Ids, Ids]:
        some = slice(window * self._mixed, (window + 1) * self._mixed)
        counts = self._counts[some]
        block = np.repeat(self._blocks[some], counts)
        sequence = positions_within(counts)
        if self._seed is None:
            return block, sequence
        # From 1, as NumPy ignores a last seed of 0, and blocks are shuffled without it.
        order = permutation(len(block), self._seed, self._epoch, window + 1)
        return block[order], sequence[order]


def length(spans: Sequence[Span]) -> int:
    """Return the number of places in some spans."""
    return sum(stop - start for start, stop in spans)


def cut_spans(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """Return the spans of the places ``low`` to ``high`` − 1 of the concatenated ``spans``."""
    found, done = [], 0
    for start, stop in spans:
        some = (start + max(low - done, 0), min(stop, start + high - done))
        if some[0] < some[1]:
            found.append(some)
        done += stop - start
    return found


@dataclass(frozen=True, slots=True)
class Share:
    """The sequences in ``spans`` that a rank reads, equally many for all ranks.

    ``whole`` 0: a rank with one sequence less than another reads an empty sequence at the end. Otherwise each
    rank reads whole batches of ``whole`` sequences, and the last sequences of the order are dropped.
    """

    spans: tuple[Span, ...]
    rank: int
    world_size: int
    whole: int

    def __len__(self) -> int:
        total = length(self.spans)
        if self.whole:
            return total // (self.world_size * self.whole) * self.whole
        return -(-total // self.world_size)

    def of(self, rank: int) -> list[Span]:
        """Return the spans of a rank."""
        total = len(self) * self.world_size if self.whole else length(self.spans)
        return cut_spans(self.spans, rank * total // self.world_size, (rank + 1) * total // self.world_size)

    @property
    def is_short(self) -> bool:
        """Whether this rank reads an empty sequence at its end."""
        return length(self.of(self.rank)) < len(self)

    def left(self, consumed: int) -> list[Span]:
        """Return the spans that are left once each rank has read ``consumed``, with those to be dropped."""
        each = [cut_spans(self.of(rank), consumed, len(self)) for rank in range(self.world_size)]
        tail = cut_spans(self.spans, len(self) * self.world_size, length(self.spans)) if self.whole else []
        return [span for spans in (*each, tail) for span in spans]
