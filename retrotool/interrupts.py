"""Ctrl-C that is not lost.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be. If that is a finaliser, or code of a library
that catches everything, it is swallowed, and a run of hours goes on. So the command line keeps in mind that it was
asked, and whoever does work in steps calls ``check`` between them. And if that is at the end of an ``__enter__``, what
was taken there is never given back: a thread that waits for such a lock waits for ever. So there it is raised a moment
later. Without ``install``, as in a script, Python's own way stays.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_asked = threading.Event()
_LATER_SECONDS = 0.001


def install() -> None:
    """Keep Ctrl-C in mind from now on; not where it is ignored, as in jobs of a shell's background."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    told = sys.unraisablehook

    def without_interrupts(error: sys.UnraisableHookArgs) -> None:
        if error.exc_type is not KeyboardInterrupt:  # it is in mind: a traceback of some finaliser tells nothing
            told(error)

    sys.unraisablehook = without_interrupts


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked.set()
    if frame is not None and frame.f_code.co_name in ("__enter__", "acquire"):
        signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)
    elif number == signal.SIGALRM:
        signal.raise_signal(signal.SIGINT)  # which may be blocked by now, as a process is started
    else:
        raise KeyboardInterrupt


def check() -> None:
    """Raise ``KeyboardInterrupt`` if there was a Ctrl-C; in any thread."""
    if _asked.is_set():
        raise KeyboardInterrupt
