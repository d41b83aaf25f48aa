"""Progress on stderr: a bar on a terminal, a line per minute elsewhere. Workers report through pipes."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from retrotool import interrupts

_DELAY_SECONDS = 2.0
_TICK_SECONDS = 1.0
_LOG_SECONDS = 60.0


@contextlib.contextmanager
def counting(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar for ``what`` on a terminal; yield a function that adds units done and checks for Ctrl-C."""
    with tqdm(
        total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=None, delay=_DELAY_SECONDS, file=sys.stderr
    ) as bar:

        def report(done: int) -> None:
            interrupts.check()
            bar.update(done)

        yield report


class Progress:
    """Shows progress through ``total`` units, also while a worker opens; a context manager."""

    def __init__(self, name: str, unit: str, total: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=name,
            delay=_DELAY_SECONDS,
            file=sys.stderr if self._terminal else io.StringIO(),
            mininterval=0.1 if self._terminal else _LOG_SECONDS,
            ncols=None if self._terminal else 0,
        )
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="retrotool-progress")

    def __enter__(self) -> Progress:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._clock.join()
        self._bar.close()

    def _tick(self) -> None:
        """Draw the bar after the delay, even if nothing was reported, and then regularly."""
        if self._terminal and not self._closed.wait(_DELAY_SECONDS + 0.05):
            with self._lock:
                self._bar.update(0)
        while not self._closed.wait(_TICK_SECONDS if self._terminal else _LOG_SECONDS):
            with self._lock:
                if self._terminal:
                    self._bar.refresh()
                else:
                    sys.stderr.write(f"{self._bar}\n")

    def update(self, done: int, elsewhere: int = 0, note: str = "") -> None:
        """Add ``done`` units of work; ``elsewhere`` more were done by others."""
        with self._lock:
            self._bar.total = (self._bar.total or 0) - elsewhere
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done)

    def listen(self, reported: Connection[Any, tuple[int, int, str]]) -> None:
        """Apply what a worker process reports, until it ends."""
        with contextlib.suppress(EOFError, OSError), reported:
            while True:
                self.update(*reported.recv())
