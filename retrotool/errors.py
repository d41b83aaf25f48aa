"""Every exception that retrotool raises on purpose, with its exit code and the advice that a person needs.

The command line prints ``error: <message>`` and ``<advice>`` and exits with ``exit_code``; nothing else in the package
chooses an exit code. So does what the system says of a file (an ``OSError`` with its name: exit code 1). Anything else
is a bug, and shows its traceback.

    0 done   1 failed   2 usage   3 finished with input rejected   10 no store   11 a commit race lost, or the run
    taken for dead   12 corrupt, or erased under a reader   130 interrupted
"""

from __future__ import annotations

import copyreg
from typing import Any

EXIT_REJECTED = 3
EXIT_INTERRUPTED = 130


class RetrotoolError(Exception):
    """Base of all; ``advice`` names the next command or change, in a sentence."""

    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; the default would call the constructor, which takes other arguments.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class UsageError(RetrotoolError):
    """What was asked for contradicts itself, the store or the machine."""

    exit_code = 2


class StoreNotFoundError(RetrotoolError):
    """There is no store at the path given."""

    exit_code = 10


class ConflictError(RetrotoolError):
    """Another process committed something that this work does not go with."""

    exit_code = 11


class CorruptError(RetrotoolError):
    """A file of the store is not what the log says it is."""

    exit_code = 12


class ErasedError(RetrotoolError):
    """A file of the reader's view was erased; the view is gone."""

    exit_code = 12


class StorageError(RetrotoolError):
    """The disk is full, read-only, or its file system can't carry a store."""


class AbortError(RetrotoolError):
    """What a task met concerns all others too: the run ends at once, and its caller may begin another."""


class LostRunError(AbortError):
    """The run can't commit any more: another process took it for dead, or a file that it is to commit is not there.

    Nothing of the commit was made.
    """

    exit_code = 11

    def __init__(self, message: str, advice: str = "Run the same command again: what was committed is kept.") -> None:
        super().__init__(message, advice)


class TaskError(RetrotoolError):
    """A task failed every time it was tried."""


class DuplicatesError(RetrotoolError):
    """Documents repeat others, and were not to."""


class InputError(RetrotoolError):
    """An input file can't be read from ``position`` on; what came before it is good.

    The message is kept, so it must have nothing of the file's content; that stands in ``excerpt``.
    """

    def __init__(self, message: str, position: int = 0, excerpt: str = "") -> None:
        super().__init__(message)
        self.position, self.excerpt = position, excerpt


class NotFiniteError(RetrotoolError):
    """An encoder gave NaN, infinity, or a number that float16 can't hold, for the row ``row`` of those it was given."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message, "Try --dtype float32; if it stays, the model's weights are broken.")
        self.row = row
