"""Every exception that retrotool raises on purpose, with its exit code and its advice; lists in messages.

The command line prints ``error: <message>`` and ``<advice>`` and exits with ``exit_code``; no other module
chooses exit codes. An ``OSError`` with a file name is reported likewise, with exit code 1. Any other
exception is a bug and shows its traceback.

    0 done   1 failed   2 usage   3 finished with input rejected   10 no store   11 commit race lost, or run
    taken for dead   12 corrupt, or erased under a reader   14 left to other runs   130 interrupted
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from typing import Any

EXIT_REJECTED = 3
EXIT_INTERRUPTED = 130


class RetrotoolError(Exception):
    """Base class; ``advice`` is a sentence that names the next command or change."""

    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled; by default that calls the constructor, whose arguments differ.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(RetrotoolError):
    """The arguments contradict each other, the store or the machine."""

    exit_code = 2


class StoreNotFoundError(RetrotoolError):
    """The given path is not a store."""

    exit_code = 10


class ConflictError(RetrotoolError):
    """Another process committed something that this work is incompatible with."""

    exit_code = 11


class CorruptError(RetrotoolError):
    """A file of the store does not match the log."""

    exit_code = 12


class ErasedError(RetrotoolError):
    """A file of the reader's view was replaced or erased; the view can't be read any more."""

    exit_code = 12


class StorageError(RetrotoolError):
    """The disk is full or read-only, or its file system can't hold a store."""


class AbortError(RetrotoolError):
    """A task met a problem that concerns all others: the run ends at once; its caller may start another."""


class LostRunError(AbortError):
    """The run was taken for dead, or one of its files is missing; nothing was committed."""

    exit_code = 11

    def __init__(self, message: str, advice: str = "Run the same command again: what was committed is kept.") -> None:
        super().__init__(message, advice)


class HeldError(RetrotoolError):
    """What is left to do is held by other live runs, and the caller did not want to wait."""

    exit_code = 14


class TaskError(RetrotoolError):
    """A task failed every time it was tried."""


class DuplicatesError(RetrotoolError):
    """Documents repeat others, which was to be refused."""


class InputError(RetrotoolError):
    """An input file can't be read from ``position`` on. Messages are stored; only ``excerpt`` quotes it."""

    def __init__(self, message: str, position: int = 0, excerpt: str = "") -> None:
        super().__init__(message)
        self.position, self.excerpt = position, excerpt


class NotFiniteError(RetrotoolError):
    """An encoder returned NaN, infinity, or a number too large for float16, for row ``row`` of its input."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message, "Try --dtype float32. If that fails too, the model's weights are broken.")
        self.row = row


def listed(names: Iterable[object], total: int) -> str:
    """Return names separated by commas, and how many more of ``total`` there are."""
    shown = list(map(str, names))
    return ", ".join(shown) + (f" and {total - len(shown):,} more" if total > len(shown) else "")
