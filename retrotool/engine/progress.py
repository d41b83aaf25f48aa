"""What a run tells while it works: a bar with what is done, the rate and the time left, and what workers measure.

Worker processes tell theirs through a pipe each; threads listen to them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from retrotool.engine.stage import Measured, Shows, Stage


@dataclass(frozen=True, slots=True)
class Told:
    """``done`` units of work, ``left`` that fell to others, and what a worker has measured since it last told."""

    done: int = 0
    left: int = 0
    measured: Measured = ()


@dataclass(slots=True)
class Meter:
    """Sums of what the workers of a run measured, in the order of ``Metered.measured``, and when it was."""

    sums: list[float] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0

    @property
    def seconds(self) -> float:
        """From when the first began to measure until the last told."""
        return self.last - self.first

    def add(self, measured: Measured) -> None:
        """Take in what one worker measured; the last of it is the seconds that it took."""
        if not measured:
            return
        self.last = time.monotonic()
        self.first = min(self.first or self.last, self.last - measured[-1])
        self.sums += [0.0] * (len(measured) - len(self.sums))
        for i, value in enumerate(measured):
            self.sums[i] += value


_DELAY_SECONDS = 2.0
_TICK_SECONDS = 1.0


class Progress:
    """A bar on stderr, after two seconds and where there is a terminal.

    It is there, and its clock runs, also while a worker gets ready and nothing is done yet.
    """

    def __init__(self, stage: Stage, total: int, meter: Meter) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            unit=stage.unit,
            unit_scale=True,
            desc=stage.name,
            disable=None,
            delay=_DELAY_SECONDS,
            file=sys.stderr,
        )
        self._stage = stage
        self._meter = meter
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="retrotool-progress")

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._clock.ident is not None:
            self._clock.join()
        self._bar.close()

    def _tick(self) -> None:
        """Draw the bar when its time has come, whether anything was told or not, and every second after that."""
        if self._closed.wait(_DELAY_SECONDS + 0.05):
            return
        with self._lock:
            self._bar.update(0)
        while not self._closed.wait(_TICK_SECONDS):
            with self._lock:
                self._bar.refresh()

    def tell(self, told: Told) -> None:
        """Take in what a worker told."""
        with self._lock:
            if told.measured and not self._meter.sums and not self._bar.disable:
                # The rate is that of the work, without what a worker took to get ready.
                self._bar.last_print_t = max(self._bar.start_t, time.time() - told.measured[-1])
            self._meter.add(told.measured)
            if told.left and not self._bar.disable:
                self._bar.total = (self._bar.total or 0) - told.left
            if told.measured and isinstance(self._stage, Shows):
                self._bar.set_postfix_str(self._stage.shown(self._meter.sums, self._meter.seconds), refresh=False)
            self._bar.update(told.done)

    def listen(self, told: Connection[Any, Told]) -> None:
        """Take in what a worker process tells, until it has ended."""
        with contextlib.suppress(EOFError, OSError), told:
            while True:
                self.tell(told.recv())
