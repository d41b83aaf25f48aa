"""An epoch as one worker of one rank reads it: window by window, one ahead.

Workers of a rank take turns of ``unit`` sequences, counted from the place ``first`` of what the rank reads. So what
they give, turn by turn, is the rank's order whatever their number; and each reads all windows of the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.train.order import Order, Share
from retrotool.train.sequences import EMPTY, Layout
from retrotool.train.training_rows import TrainingReader, TrainingRows

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Turns:
    """Which places are worker ``worker``'s, of ``workers``."""

    first: int
    unit: int
    worker: int
    workers: int

    def number(self, places: Ids) -> Ids:
        """Which turn each of some places is in, [n]."""
        return (places - self.first) // self.unit

    def mine(self, places: Ids) -> npt.NDArray[np.bool_]:
        """Which places are this worker's, bool [n]."""
        mine: npt.NDArray[np.bool_] = self.number(places) % self.workers == self.worker
        return mine

    def ends(self, place: int) -> bool:
        """Whether a place is the last of its turn."""
        return (place + 1 - self.first) % self.unit == 0


@dataclass(frozen=True, slots=True)
class Window:
    """Sequences that were read together: their ``places`` [n] in what a rank reads, ascending, and rows in their slots.

    ``slots`` int64 [n, slots] are places in ``rows``, −1: empty.
    """

    places: Ids
    rows: TrainingRows
    slots: Ids


def read_epoch(
    reader: TrainingReader, layout: Layout, order: Order, share: Share, turns: Turns, consumed: int
) -> Iterator[Window]:
    """The windows of one worker, of which it has had what is before the place ``consumed``."""
    coming = _wanted(order, share, turns, consumed)
    with ThreadPoolExecutor(1, "retrotool-dataset") as pool:

        def begin() -> tuple[Ids, Future[tuple[TrainingRows, Ids]]] | None:
            wanted = next(coming, None)
            return None if wanted is None else (wanted[0], pool.submit(reader.read, layout, *wanted[1:]))

        ahead = begin()
        while ahead is not None:
            places, reading = ahead
            rows, slots = reading.result()
            ahead = begin()
            missing = len(places) - len(slots)
            yield Window(places, rows, np.concatenate([slots, np.full((missing, layout.size), EMPTY, np.int64)]))


def _wanted(order: Order, share: Share, turns: Turns, consumed: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Places, blocks and sequences of one worker, by window; last, where that is its, a place without a sequence."""
    for piece in order.pieces(share.own, consumed):
        places = piece.first + np.arange(len(piece.block))
        mine = turns.mine(places)
        if mine.any():
            yield places[mine], piece.block[mine], piece.sequence[mine]
    last = np.array([len(share) - 1])
    if share.is_short and last[0] >= consumed and turns.mine(last)[0]:
        nothing = np.zeros(0, np.int64)
        yield last, nothing, nothing
