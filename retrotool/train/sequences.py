"""Which chunks stand in which training sequence: the layout of a store at one commit.

A sequence is a number of slots, each for one chunk. Blocks of 8,192 rows (the row groups of ``chunks/``) are laid out
each on its own, so that reading a block gives whole sequences:

* packed: the living chunks of a block fill the slots one after the other, whatever document they are of;
* not packed: every document begins a new sequence, and one that goes on in the next block is cut there.

What is left of a block's last sequence, or not packed of every document's, stays empty. Living are the rows that are no
tombstones at that commit. Rows never move, so a layout can be made again at any time after: what was purged since keeps
its slot, and is masked by whoever reads it.

Cost: tombstones, and where documents are not packed two columns of all documents. Memory: 16 bytes a block, that is
2 bytes for every 1,000 chunks, and the tombstones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

Slots = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
EMPTY = -1


def slots_of(living: npt.NDArray[np.bool_], doc: npt.NDArray[Any], size: int, *, packed: bool) -> Slots:
    """Rows of a block in the slots of its sequences, int32 [sequences, size], −1 where a slot is empty.

    ``living`` and ``doc`` (the document of each row, ascending) are [n].
    """
    rows = np.flatnonzero(living).astype(np.int32)
    if packed:
        place = np.arange(len(rows))
    else:
        first = _firsts(doc[rows])  # place, among the rows, of the first of the same document
        inside = np.arange(len(rows)) - first
        begins = inside % size == 0
        place = (np.cumsum(begins) - 1) * size + inside % size
    slots = np.full((-(-(int(place[-1]) + 1) // size) if len(rows) else 0, size), EMPTY, np.int32)
    slots.reshape(-1)[place] = rows
    return slots


def _firsts(doc: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For each of n ascending numbers the place of the first that is equal to it."""
    starts = np.flatnonzero(np.diff(doc, prepend=-1))
    return np.repeat(starts, np.diff(starts, append=len(doc)))


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The sequences of a store as of one commit, in blocks; ``size`` is in slots.

    Of each block, in the order of ids: ``part``, ``group`` (its number in the part) and ``counts``, how many sequences
    it has; int32, int32, int64, all [blocks].
    """

    commit: int
    head: str
    size: int
    packed: bool
    part: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    tombstones: Tombstones
    tokens: int
    """Tokens of all living chunks."""

    @classmethod
    def of(cls, store: Store, commit: int, size: int, *, packed: bool) -> SequenceLayout:
        """The layout of a store as it was after ``commit``; ``UsageError`` if that can't be told any more."""
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
        """How many sequences there are."""
        return int(self.counts.sum())

    def slots(self, block: int, doc: npt.NDArray[Any]) -> Slots:
        """Rows, counted from the block's first, in the slots of a block's sequences; ``doc`` is that of its rows."""
        living = np.ones(len(doc), np.bool_)
        purged = self.tombstones.rows(int(self.part[block]))
        first = int(self.group[block]) * ROW_GROUP
        low, high = np.searchsorted(purged, [first, first + len(doc)])
        living[purged[low:high] - first] = False
        return slots_of(living, doc, self.size, packed=self.packed)

    def parts(self) -> Iterator[int]:
        """Numbers of the parts that have sequences, ascending."""
        yield from np.unique(self.part[self.counts > 0]).tolist()


def _packed(rows: int, purged: Rows, size: int) -> Rows:
    """How many sequences each block of a part of so many rows has, some of them ``purged``."""
    blocks = -(-rows // ROW_GROUP)
    living = np.minimum(ROW_GROUP, rows - np.arange(blocks) * ROW_GROUP)
    return -(-(living - np.bincount(purged // ROW_GROUP, minlength=blocks)) // size)


def _unpacked(store: Store, part: int, rows: int, purged: Rows, size: int) -> Rows:
    """As ``_packed``, where every document begins a sequence. An erase leaves where documents are as it was."""
    if store.state.part_file("documents", part) is None:
        raise UsageError(f"part {part} was taken back since, and with it where its documents were", "Begin anew.")
    documents = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first = documents["first_row"].to_numpy()[documents["n_chunks"].to_numpy() > 0]
    blocks = -(-rows // ROW_GROUP)
    # Documents, and what is cut off of them at the border of a block, begin at these rows.
    starts = np.union1d(first, np.arange(blocks) * ROW_GROUP)
    ends = np.append(starts[1:], rows)
    living = ends - starts - (np.searchsorted(purged, ends) - np.searchsorted(purged, starts))
    return np.bincount(starts // ROW_GROUP, -(-living // size), blocks).astype(np.int64)
