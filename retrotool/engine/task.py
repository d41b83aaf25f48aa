"""One task: doing and staging it, and what becomes of it when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retrotool import interrupts
from retrotool.engine.progress import Told
from retrotool.engine.stage import Metered, Report, Task, Worker
from retrotool.errors import AbortError, ErasedError, RetrotoolError, StorageError
from retrotool.store import claims, staging
from retrotool.store.staging import Staged

ATTEMPTS = 3
_FATAL = (StorageError, AbortError, KeyboardInterrupt)

Enough = Callable[[Staged], bool]
"""Told of every finished task; True ends the run after the tasks that have begun."""


class Ended(Exception):  # noqa: N818 - no error: it is what the caller asked for
    """A finished task was enough."""


class OpenError(Exception):
    """A worker process could not be opened, for the reason in ``args[0]``: no task is to blame, none would be done."""


@dataclass(slots=True)
class Failures:
    """Attempts a task took, and the last error of those that are given up."""

    attempts: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, BaseException] = field(default_factory=dict)

    def note(self, task: Task, error: BaseException) -> bool:
        """Count a failure; True if the task should be tried again."""
        if isinstance(error, OpenError):
            raise error.args[0] from None
        if isinstance(error, _FATAL):
            raise error
        if isinstance(error, ErasedError):
            return False  # what it read was removed by another process: it is planned again, if it is still to be done
        self.attempts[task.key] = self.attempts.get(task.key, 0) + 1
        # What is wrong with the data or the settings will be wrong again.
        if self.attempts[task.key] < ATTEMPTS and not isinstance(error, RetrotoolError):
            return True
        self.given_up[task.key] = error
        return False


def perform(worker: Worker, root: Path, task: Task, run: str, report: Report) -> Staged | None:
    """Do one task and stage it; None if another process did, or is at it. All that another engine has to call."""
    if staging.is_staged(root, task.key):
        return None
    with _claimed(root, task.key, run) if task.claimed else contextlib.nullcontext(True) as mine:
        # It may have been staged, and the claim for it given back, just now.
        if not mine or (task.claimed and staging.is_staged(root, task.key)):
            return None
        try:
            staged = worker(task, run, report)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the panic of a library in Rust, which no other process knows the class of
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return staged if staged is not None and staging.stage(root, staged) else None


@contextlib.contextmanager
def _claimed(root: Path, task: str, run: str) -> Iterator[bool]:
    """Whether the task was to be had; what was had is given back."""
    if not claims.take(root, task, run):
        yield False
        return
    try:
        yield True
    finally:
        claims.release(root, task, run)


class Telling:
    """What a worker reports to: what is done is told with what was measured, and taken back if it came to nothing."""

    def __init__(self, worker: Worker, task: Task, tell: Callable[[Told], object]) -> None:
        self._metered = worker if isinstance(worker, Metered) else None
        self._task, self._tell = task, tell
        self._done = 0

    def __call__(self, done: int) -> None:
        """Tell of some units of work."""
        interrupts.check()
        self._done += done
        self._tell(Told(done, measured=self._metered.measured() if self._metered else ()))

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Take back what was told if there is an error."""
        try:
            yield
        except BaseException:
            self._tell(Told(-self._done))
            raise

    def fell_to_others(self) -> None:
        """Take back what was told, and that there was something to do."""
        self._tell(Told(-self._done, left=self._task.weight))
