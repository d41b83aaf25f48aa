"""In which order the sequences of an epoch are read, and which rank reads which of them.

The order is a function of the layout, the seed and the epoch alone, not of ranks, workers or batches: blocks are drawn
at random, ``mixed`` of them at a time make a window, and all sequences of a window are mixed. So a store is read block
by block, two sequences that follow one another in the text end up at random places of a window of 8,192 · ``mixed``
chunks, and what a window holds is from ``mixed`` random places of the store. Memory: 32 bytes a block.

Ranks get consecutive spans of that order, equally long. So each reads its own blocks, and shares at most two windows
with others. What has not been read yet is a list of spans again: that is how an epoch goes on with another number of
ranks.

Random numbers are those of NumPy's PCG64 itself, which stay the same over its versions; permutations of its
``Generator`` need not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.ranges import positions_within

Ids = npt.NDArray[np.int64]
Span = tuple[int, int]
"""[start, stop) of places in the order."""


def permutation(n: int, *seed: int) -> Ids:
    """The numbers 0 to n − 1 in an order that ``seed`` decides."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


@dataclass(frozen=True, slots=True)
class WindowPart:
    """Some sequences that are read together: ``block`` and ``sequence`` (its number in the block), both [n].

    ``first`` is the place of the first of them in what a rank reads.
    """

    first: int
    block: Ids
    sequence: Ids


class Order:
    """The order of an epoch's sequences; ``counts`` says how many each block has. ``seed`` None: as they are stored."""

    def __init__(self, counts: Ids, seed: int | None, epoch: int, mixed: int) -> None:
        self._seed, self._epoch, self._mixed = seed, epoch, mixed
        self._blocks = np.arange(len(counts)) if seed is None else permutation(len(counts), seed, epoch)
        self._counts = counts[self._blocks]
        sizes = np.add.reduceat(self._counts, np.arange(0, len(counts), mixed)) if len(counts) else counts
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def pieces(self, spans: Sequence[Span], skip: int = 0) -> Iterator[WindowPart]:
        """The sequences in ``spans``, in this order, without the first ``skip`` of them; window by window."""
        done = 0
        for start, stop in spans:
            place = start + min(max(skip - done, 0), stop - start)
            while place < stop:
                window = int(np.searchsorted(self._ends, place, side="right"))
                end = min(stop, int(self._ends[window]))
                block, sequence = self._window(window)
                offset = int(self._ends[window]) - len(block)
                some = slice(place - offset, end - offset)
                yield WindowPart(done + place - start, block[some], sequence[some])
                place = end
            done += stop - start

    def _window(self, window: int) -> tuple[Ids, Ids]:
        some = slice(window * self._mixed, (window + 1) * self._mixed)
        counts = self._counts[some]
        block = np.repeat(self._blocks[some], counts)
        sequence = positions_within(counts)
        if self._seed is None:
            return block, sequence
        # From 1: NumPy takes a last seed of 0 for none at all, and blocks are drawn without it.
        order = permutation(len(block), self._seed, self._epoch, window + 1)
        return block[order], sequence[order]


def length(spans: Sequence[Span]) -> int:
    """How many places some spans have."""
    return sum(stop - start for start, stop in spans)


def cut_spans(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    """The places ``low`` to ``high`` − 1 of what ``spans`` have, one span after the other."""
    found, done = [], 0
    for start, stop in spans:
        some = (start + max(low - done, 0), min(stop, start + high - done))
        if some[0] < some[1]:
            found.append(some)
        done += stop - start
    return found


@dataclass(frozen=True, slots=True)
class Share:
    """What rank ``rank`` of ``world_size`` reads of ``spans``.

    All ranks read equally many. ``whole`` 0: as many as there are, and a rank that has one less than another reads an
    empty sequence at its end. Otherwise only as many as give each rank whole batches of so many; the last ones of the
    order are left out.
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
        """The spans of a rank."""
        total = len(self) * self.world_size if self.whole else length(self.spans)
        return cut_spans(self.spans, rank * total // self.world_size, (rank + 1) * total // self.world_size)

    @property
    def own(self) -> list[Span]:
        """The spans of this rank."""
        return self.of(self.rank)

    @property
    def is_short(self) -> bool:
        """Whether this rank reads an empty sequence at its end."""
        return length(self.own) < len(self)

    def left(self, consumed: int) -> list[Span]:
        """What is left for all ranks, once each has read ``consumed`` sequences; what was to be left out, too."""
        each = [cut_spans(self.of(rank), consumed, len(self)) for rank in range(self.world_size)]
        tail = cut_spans(self.spans, len(self) * self.world_size, length(self.spans)) if self.whole else []
        return [span for spans in (*each, tail) for span in spans]
