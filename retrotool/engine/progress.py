"""Progress on stderr: a bar on a terminal, a line a minute elsewhere. Workers report through pipes.

The rate is that of the whole time since the first report, so the time left does not jump. Without a terminal
there is a line after two seconds, one a minute and one at the end; what takes less time prints nothing. The
last line has the whole time, with loading, and no rate. TQDM_DISABLE=1 turns all of it off.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from retrotool import interrupts

SHORT_SECONDS = 2.0  # what takes less leaves nothing on a terminal, and prints nothing elsewhere
_LOG_SECONDS = 60.0
_DRAW_SECONDS, _TICK_SECONDS = 0.1, 1.0
_LEAST_SECONDS = 1.0  # since the first report, for a rate
_EXACT = 100_000  # numbers below are printed with all digits


@contextlib.contextmanager
def counting(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show progress of ``what``; yield a function that adds units done and checks for Ctrl-C."""
    with Progress(what, unit, total) as progress:

        def report(done: int) -> None:
            interrupts.check()
            progress.update(done)

        yield report


class Progress:
    """Shows progress through ``total`` units (None: unknown), or what it is ``doing`` until one is reported.

    A context manager: in it, a thread shows progress that nothing reports. ``clock`` returns seconds.
    """

    def __init__(
        self,
        name: str,
        unit: str = "",
        total: int | None = None,
        doing: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._unit, self._total, self._doing, self._clock = name, unit, total, doing, clock
        self._done = 0
        self._first: tuple[float, int] | None = None  # when the first report came, and the units done by then
        self._terminal = sys.stderr.isatty()
        hidden = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        off = hidden or not self._terminal
        self._bar: tqdm[Any] = tqdm(total=1, bar_format=name, file=sys.stderr, leave=False, disable=off)
        self._begun = clock()
        self._due = float("inf") if hidden else self._begun if self._terminal else self._begun + SHORT_SECONDS
        self._lines = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ticks = threading.Thread(target=self._tick, name="retrotool-progress", daemon=True)
        self.show()

    def __enter__(self) -> Progress:
        try:
            self._ticks.start()
        except BaseException:  # Ctrl-C while it waits for the thread, which has begun
            self._closed.set()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._ticks.join()
        self.close()

    def _tick(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            self.show()

    def plan(self, more: int, doing: str) -> None:
        """Add units that are to be done, and say what happens until the first of them is reported."""
        with self._lock:
            if more and self._done >= (self._total or 0):  # a new round
                self._done, self._total, self._first = 0, 0, None
            self._total = (self._total or 0) + more
            self._doing = doing
        self.show()

    def update(self, done: int, elsewhere: int = 0) -> None:
        """Add ``done`` units of work; ``elsewhere`` more were done by others."""
        with self._lock:
            self._done += done
            if self._total is not None:
                self._total -= elsewhere
            if done > 0:
                self._doing = ""
                self._first = self._first or (self._clock(), self._done)
        self.show()

    def show(self) -> None:
        """Draw the bar or print a line, if one is due."""
        with self._lock:
            now = self._clock()
            if now < self._due:
                return
            self._due = now + (_DRAW_SECONDS if self._terminal else _LOG_SECONDS)
            self._put(self._now())

    def close(self) -> None:
        """Print the last line, or leave it as the bar; remove that of something short."""
        lasted = self._clock() - self._begun
        if self._first is not None and (lasted > SHORT_SECONDS if self._terminal else self._lines):
            self._bar.leave = True
            ended = f"{self._counts()} in" if self._done else "no task was finished, stopped after"
            self._put(f"{ended} {duration(lasted)}")
        self._bar.close()

    def _put(self, line: str) -> None:
        if self._terminal:
            share = "{percentage:3.0f}%|{bar}| " if self._first and self._total else ""
            self._bar.bar_format = f"{self._name}: {share}{{desc}}"
            self._bar.n = min(self._done / self._total, 1.0) if self._total else 0
            self._bar.set_description_str(line)
        else:
            self._lines += 1
            sys.stderr.write(f"{self._name}: {line}\n")
            sys.stderr.flush()

    def _now(self) -> str:
        if self._doing or self._first is None:
            return ", ".join([*([self._counts()] if self._total else []), self._doing or "starting"])
        return ", ".join([self._counts(), *self._rate()])

    def _counts(self) -> str:
        of = "" if self._total is None else f" of {self._number(self._total)}"
        one = (self._done if self._total is None else self._total) == 1 or self._unit == "B"
        return f"{self._number(self._done)}{of}{'' if self._unit == 'B' else f' {self._unit}'}{'' if one else 's'}"

    def _number(self, n: int) -> str:
        """Return a number as text: below a hundred thousand units with all digits, otherwise three: 1.20M."""
        scaled = str(tqdm.format_sizeof(n))
        return f"{scaled}B" if self._unit == "B" else f"{n:,}" if abs(n) < _EXACT else scaled

    def _rate(self) -> list[str]:
        """Return the rate and the time left, as far as they are known."""
        since, done = self._first or (0.0, 0)
        seconds = self._clock() - since
        if seconds < _LEAST_SECONDS or self._done <= done:
            return []
        rate, left = (self._done - done) / seconds, (self._total or 0) - self._done
        per_second = f"{float(f'{rate:.2g}'):,.0f}" if rate >= 10 else f"{rate:.2g}"
        per_second = self._number(round(rate)) if self._unit == "B" else per_second
        return [f"{per_second}/s", *([f"{duration(left / rate)} left"] if left > 0 else [])]

    def listen(self, reported: Connection[Any, tuple[int, int]]) -> None:
        """Apply what a worker process reports, until it ends."""
        with contextlib.suppress(EOFError, OSError), reported:
            while True:
                self.update(*reported.recv())


def duration(seconds: float) -> str:
    """Return a time as text: ``40 s``, ``21 min``, ``3 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 100 else f"{minutes} min"
