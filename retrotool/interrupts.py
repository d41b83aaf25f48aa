"""Ctrl-C that is not lost.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be. In a finaliser, or in a library
that catches everything, it is swallowed, and a run of hours goes on. So the command line remembers it, and
code that works in steps calls ``check``. At the end of an ``__enter__``, what was acquired would never be
released, and a thread may wait for that lock forever. So there it is raised a moment later.

Without ``install``, as in scripts, Python's own behaviour stays. Work that must end in order, with a
checkpoint, is ``deferred``.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_interrupted = threading.Event()
_LATER_SECONDS = 0.001
_REPEATED_SECONDS = 2.0  # torchrun passes on a Ctrl-C that its processes have got from the terminal already


def install() -> None:
    """Remember Ctrl-C from now on, unless it is ignored, as in background jobs of a shell."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    report = sys.unraisablehook
    # A finaliser's traceback says nothing about an interrupt, which is remembered anyway.
    sys.unraisablehook = lambda error: None if error.exc_type is KeyboardInterrupt else report(error)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    if frame is not None and frame.f_code.co_name in ("__enter__", "acquire"):
        signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)
    elif number == signal.SIGALRM:
        signal.raise_signal(signal.SIGINT)  # may be blocked by now, while a process starts
    else:
        raise KeyboardInterrupt


def check() -> None:
    """Raise ``KeyboardInterrupt`` after a Ctrl-C, in any thread."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Remember SIGTERM and Ctrl-C instead of ending; yield a function that returns whether one came.

    A later Ctrl-C acts as before. Outside of the main thread nothing changes.
    """
    came, before = list[float](), dict[int, Any]()

    def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        came.append(time.monotonic())
        if number == signal.SIGINT and came[-1] - came[0] > _REPEATED_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, remember)
    try:
        yield lambda: bool(came)
    finally:
        restore()
