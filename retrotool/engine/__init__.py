"""Who runs tasks: this process, or local worker processes.

``execute`` plans, runs, folds, and plans again until nothing is left, so that a task whose input was erased under
it is simply done again. A failed task is tried three times; the others go on. A stage may say what to stage for one
that fails for good (``GivesUp``): others would wait for it. Workers are spawned, and get the stage, the store's path
and a run id: nothing is shared but the store. On Ctrl-C, what is finished is committed and the rest is dropped.

Several runs may do one stage's work at a time: a task that is to be ``claimed`` is left alone while another is at it.

With few tasks the largest are begun first, so that no worker is left alone with one at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from retrotool import interrupts
from retrotool.engine.processes import run_in_processes
from retrotool.engine.progress import Meter, Progress
from retrotool.engine.stage import GivesUp, Stage, Task
from retrotool.engine.task import ATTEMPTS, Ended, Enough, Failures, Telling, perform
from retrotool.errors import RetrotoolError, TaskError
from retrotool.store import claims, folding, staging
from retrotool.store.runs import Run
from retrotool.store.store import Store

__all__ = ["Meter", "execute", "perform"]

FOLD_SECONDS = 30.0
_NOT_THE_DATA = (RetrotoolError, OSError, MemoryError)
"""Errors that are told as they are, or may be gone when the same command is run again: no task is given up for them."""
_FEW = 8
"""Tasks a worker up to which they are begun by size."""


def execute(
    stage: Stage,
    store: Store,
    run: Run,
    *,
    workers: int = 1,
    enough: Enough | None = None,
    meter: Meter | None = None,
) -> None:
    """Do all of a stage's work on a store, and commit it; less if a finished task is ``enough``.

    What other living runs are at is left to them. ``meter`` sums up what workers measure. Raises the error of the first
    task that failed for good, once all the others are done; ``TaskError`` if it was no error of ours.
    """
    failures = Failures()
    known: dict[str, Task] = {}
    refused: dict[str, int] = {}
    meter = meter or Meter()
    try:
        while True:
            interrupts.check()
            folding.fold(store, run)
            store.refresh()
            tasks = [task for task in stage.plan(store) if task.key not in failures.given_up]
            if any(task.claimed for task in tasks):
                held = claims.held(store.root, run.id)
                tasks = [task for task in tasks if task.key not in held]
            if not tasks:
                break
            known.update((task.key, task) for task in tasks)
            _run_tasks(stage, store, run, tasks, min(workers, len(tasks)), failures, enough, meter)
            for key in failures.given_up:
                claims.release(store.root, key, run.id)  # a worker that was killed could not
            _give_up(stage, store, run, known, failures, enough)
            for key, reason in folding.fold(store, run).refused.items():
                refused[key] = refused.get(key, 0) + 1
                if refused[key] >= ATTEMPTS:
                    label = known[key].label if key in known else key
                    failures.given_up[key] = TaskError(f"{stage.name}: {label} can't be committed: {reason}")
    except Ended:
        _give_up(stage, store, run, known, failures, None)
        folding.fold(store, run)
    except KeyboardInterrupt:
        folding.fold(store, run)
        raise
    for key, error in failures.given_up.items():
        if isinstance(error, RetrotoolError):
            raise error
        raise TaskError(
            f"{stage.name}: {known[key].label} failed {ATTEMPTS} times: {type(error).__name__}: {error}",
            "What the other tasks did is committed. Run the same command again to try the rest.",
        ) from error


def _give_up(
    stage: Stage, store: Store, run: Run, known: dict[str, Task], failures: Failures, enough: Enough | None
) -> None:
    """Have the stage stage what is to stand for tasks that failed for good, if it can."""
    if not isinstance(stage, GivesUp):
        return
    ended = False
    for key, error in list(failures.given_up.items()):
        if isinstance(error, _NOT_THE_DATA):
            continue
        staged = stage.give_up(store, known[key], run.id, error)
        staging.stage(store.root, staged)
        del failures.given_up[key]
        ended |= enough is not None and enough(staged)
    if ended:
        raise Ended


def _run_tasks(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    workers: int,
    failures: Failures,
    enough: Enough | None,
    meter: Meter,
) -> None:
    folds = _Folds(store, run)
    if workers > 1:
        if len(tasks) <= _FEW * workers and not tasks[0].claimed:
            tasks = sorted(tasks, key=lambda task: -task.weight)
        with Progress(stage, sum(task.weight for task in tasks), meter) as progress:
            run_in_processes(stage, store, run, tasks, workers, failures, progress, enough, folds.now_and_then)
    else:
        _run_here(stage, store, run, tasks, failures, enough, meter, folds)


class _Folds:
    """Commits what is staged, from time to time."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store, self._run = store, run
        self._last = time.monotonic()

    def now_and_then(self) -> None:
        """Commit if it is time to."""
        if time.monotonic() - self._last > FOLD_SECONDS:
            folding.fold(self._store, self._run)
            self._last = time.monotonic()


def _run_here(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    failures: Failures,
    enough: Enough | None,
    meter: Meter,
    folds: _Folds,
) -> None:
    with Progress(stage, sum(task.weight for task in tasks), meter) as progress:
        worker = stage.open(store)
        for task in tasks:
            interrupts.check()
            again = True
            while again:
                again = False
                try:
                    report = Telling(worker, task, progress.tell)
                    with report.telling():
                        staged = perform(worker, store.root, task, run.id, report)
                    if staged is None:
                        report.fell_to_others()
                    elif enough is not None and enough(staged):
                        raise Ended
                except Ended:
                    raise
                except Exception as error:
                    again = failures.note(task, error)
            folds.now_and_then()
