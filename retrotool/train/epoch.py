"""An epoch as one worker of one rank reads it: window by window, one ahead; and which rank this process is.

The workers of a rank take turns of ``unit`` sequences, counted from the place ``first`` of what the rank reads. So the
sequences of all workers, turn by turn, are in the rank's order for any number of workers. Each worker reads all windows
of its rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrotool.errors import UsageError
from retrotool.train.order import Order, Share
from retrotool.train.sequences import EMPTY, SequenceLayout
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
    reader: TrainingReader, layout: SequenceLayout, order: Order, share: Share, turns: Turns, consumed: int
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


def is_distributed() -> bool:
    """Whether ranks are those of ``torch.distributed``."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def own_rank() -> tuple[int, int]:
    """Rank and number of ranks: of ``torch.distributed``, or the environment, or one."""
    if is_distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _number("RANK"), _number("WORLD_SIZE")
    return 0, 1


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UsageError(
            f"the environment has {variable}={os.environ[variable]!r}, which is no number",
            "Set it to one, or give rank= and world_size=.",
        ) from None
