"""Who runs tasks: this process, or local worker processes.

``execute`` plans, runs, folds, and plans again until nothing is left, so that a task whose input was erased under
it is simply done again. A failed task is tried three times; the others go on. Several runs may do one stage's work at a
time: a task that is to be ``claimed`` is left alone while another is at it. With few tasks the largest are begun first,
so that no worker is left alone with one at the end. On Ctrl-C, what is finished is committed and the rest is dropped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from retrotool import interrupts
from retrotool.engine.progress import Progress
from retrotool.engine.task import GivesUp, OpenError, Stage, Task
from retrotool.errors import AbortError, ErasedError, RetrotoolError, StorageError, TaskError
from retrotool.store import folding, leases, staging
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store, retry_overtaken

ATTEMPTS = 3
FOLD_SECONDS = 30.0
Enough = Callable[[Staged], bool]
"""Called with every finished task; True ends the run after the tasks that have begun."""
_FATAL = (StorageError, AbortError, KeyboardInterrupt)
_NOT_THE_DATA = (RetrotoolError, OSError, MemoryError)
"""Errors that are reported as they are, or may not occur when the command runs again: no task is given up for them."""
_FEW = 8
"""Tasks a worker up to which they are begun by size."""


def count_elsewhere(stage: Stage, store: Store, run: Run) -> int:
    """How many tasks of a stage other running commands are at, by the newest commit."""
    held = leases.claimed_elsewhere(store.storage, run.id)
    return sum(task.key in held for task in plan_tasks(stage, store))


def plan_tasks(stage: Stage, store: Store) -> Sequence[Task]:
    """The tasks of a stage by the newest commit of a store, without those that are staged."""
    staged = staging.staged_keys(store.storage)  # first: what is folded meanwhile is in the state
    store.refresh()
    return [task for task in retry_overtaken(lambda: stage.plan(store), store.renew) if task.key not in staged]


def execute(stage: Stage, store: Store, run: Run, *, workers: int = 1, enough: Enough | None = None) -> None:
    """Do all of a stage's work on a store, and commit it; less if a finished task is ``enough``.

    What other live runs are at is left to them. Raises the error of the first task that failed for good, once all the
    others are done; ``TaskError`` if it was no error of ours.
    """
    _Execution(stage, store, run, workers, enough).work()


@dataclass(slots=True)
class _Execution:
    """A stage at work: ``attempts`` that tasks took and the last error of those that are ``given_up``, by key."""

    stage: Stage
    store: Store
    run: Run
    workers: int
    enough: Enough | None
    known: dict[str, Task] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, BaseException] = field(default_factory=dict)
    ended: bool = False

    def work(self) -> None:
        stage, store, run = self.stage, self.store, self.run
        refused: Counter[str] = Counter()
        try:
            while not self.ended:
                interrupts.check()
                folding.fold(store, run)
                tasks = [task for task in plan_tasks(stage, store) if task.key not in self.given_up]
                if any(task.claimed for task in tasks):
                    held = leases.claimed_elsewhere(store.storage, run.id)
                    tasks = [task for task in tasks if task.key not in held]
                if not tasks:
                    break
                self.known.update((task.key, task) for task in tasks)
                self._run_tasks(tasks)
                for key in self.given_up:
                    leases.release_claim(store.storage, key, run.id)  # a worker that was killed could not
                if isinstance(stage, GivesUp):
                    # What stands for tasks that failed for good is staged.
                    for key, error in list(self.given_up.items()):
                        if not isinstance(error, _NOT_THE_DATA):
                            staged = stage.give_up(store, self.known[key], run.id, error)
                            staging.stage(store.storage, staged)
                            del self.given_up[key]
                            self._check_enough(staged)
                for key, reason in folding.fold(store, run).refused.items():
                    refused[key] += 1
                    if refused[key] >= ATTEMPTS:
                        label = self.known[key].label if key in self.known else key
                        self.given_up[key] = TaskError(f"{stage.name}: {label} can't be committed: {reason}")
        except KeyboardInterrupt:
            folding.fold(store, run)
            raise
        for key, error in self.given_up.items():
            if isinstance(error, RetrotoolError):
                raise error
            raise TaskError(
                f"{stage.name}: {self.known[key].label} failed {ATTEMPTS} times: {type(error).__name__}: {error}",
                "What the other tasks did is committed. Run the same command again to try the rest.",
            ) from error

    def _run_tasks(self, tasks: Sequence[Task]) -> None:
        """Run tasks in their order, and commit now and then; if one is enough, only those that have begun."""
        from retrotool.engine.local import open_pool  # multiprocessing is not needed to read a store

        stage, store, run = self.stage, self.store, self.run
        workers = min(self.workers, len(tasks))
        if workers > 1 and len(tasks) <= _FEW * workers and not tasks[0].claimed:
            tasks = sorted(tasks, key=lambda task: -task.weight)
        waiting = deque(tasks)
        folded = time.monotonic()
        progress = Progress(stage.name, stage.unit, sum(task.weight for task in tasks))
        with progress, open_pool(stage, store, run, workers, progress) as pool:
            while pool.busy or (waiting and not self.ended):
                while waiting and pool.idle and not self.ended:
                    interrupts.check()
                    pool.begin(waiting.popleft())
                for task, future in pool.finished():
                    error = future.exception()
                    if error is None:
                        self._check_enough(future.result())
                    elif self._note_failure(task, error):
                        waiting.appendleft(task)
                interrupts.check()
                if time.monotonic() - folded > FOLD_SECONDS:
                    folding.fold(store, run)
                    folded = time.monotonic()

    def _check_enough(self, staged: Staged | None) -> None:
        if self.enough is not None and staged is not None:
            self.ended |= self.enough(staged)

    def _note_failure(self, task: Task, error: BaseException) -> bool:
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
