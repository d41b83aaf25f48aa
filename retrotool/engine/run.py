"""Runs the tasks of a stage in this process, in local worker processes, or on a Ray cluster.

``execute`` plans, runs, folds, and plans again until nothing is left, so a task whose input was erased is
simply done again. A failed task is tried three times while the others go on. Tasks that another live run
holds are left to it. In the end ``execute`` waits for them: it looks at leases and the log every few seconds,
and does what is dropped. Of few tasks the largest begin first, so that no worker is left alone with one at
the end. On Ctrl-C finished tasks are committed and the others are dropped.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrotool import interrupts
from retrotool.engine.engines import engine_in_use
from retrotool.engine.progress import Progress
from retrotool.engine.task import GivesUp, Holds, NodeLostError, OpenError, Sized, Stage, Task, is_own, own_first
from retrotool.errors import AbortError, ErasedError, HeldError, RetrotoolError, StorageError, TaskError
from retrotool.store import folding, leases, staging
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
from retrotool.store.storage import check_space
from retrotool.store.store import Store, retry_overtaken

ATTEMPTS = 3
FOLD_SECONDS = 30.0
_PLANNING_SHARE = 20  # of the time, at most one part goes into planning again what other runs have not done
POLL_SECONDS = (0.5, 8.0)  # between two looks at what other runs hold: at first, and at most
Enough = Callable[[Staged], bool]  # takes every finished task; True ends the run after the tasks that have begun
More = Callable[[], bool]
_MOST_ERASED = 10  # times that the input of a task may have been removed; then something else is wrong
_FATAL = (StorageError, AbortError, KeyboardInterrupt)
_NOT_THE_DATA = (RetrotoolError, OSError, MemoryError)  # no task is given up for these: the data may be good
_FEW = 8  # up to this number of tasks per worker, the largest begin first


def plan_tasks(stage: Stage, store: Store) -> Sequence[Task]:
    """Plan a stage's tasks on the newest commit, without those that are staged."""
    staged = staging.staged_keys(store.storage)  # first: what is folded after this is in the state
    store.refresh()
    tasks = [task for task in retry_overtaken(lambda: stage.plan(store), store.renew) if task.key not in staged]
    shard = engine_in_use().shard
    return tasks if shard is None else own_first(tasks, *shard)


def execute(
    stage: Stage,
    store: Store,
    run: Run,
    *,
    workers: int = 1,
    enough: Enough | None = None,
    wait: bool = True,
    more: More | None = None,
) -> int:
    """Run a stage's tasks on a store and commit them; stop early once a finished task is ``enough``.

    Return how many tasks other commands have claimed. While there may be ``more`` tasks soon, wait for them.

    Wait for tasks that other runs hold, those of its own share if it is a job of a shard; ``HeldError``
    without ``wait``. When all are done, raise the first failed task's error (``TaskError`` unless a
    ``RetrotoolError``).
    """
    execution = _Execution(stage, store, run, workers, enough, wait, more)
    with execution.pools, Progress(stage.name, stage.unit, doing="planning") as progress:
        return execution.work(run, progress)


Gather = Callable[[Sequence[Task]], list[Any]]
"""Does tasks of a stage that only reads; returns what its worker returned for each.

Raises the first ``RetrotoolError`` of a task. A task that fails otherwise is tried three times.
"""


@contextlib.contextmanager
def gathering(stage: Stage, store: Store) -> Iterator[Gather]:
    """Yield a function that does tasks of a stage that only reads; its workers stay open between calls."""
    execution = _Execution(stage, store, None)
    with execution.pools, Progress(stage.name, stage.unit, doing="planning") as progress:

        def gather(tasks: Sequence[Task]) -> list[Any]:
            found: dict[str, Any] = {}
            if tasks:
                execution.run_tasks(tasks, progress, lambda task, result: found.update({task.key: result}))
                execution.raise_failure()
            return [found[task.key] for task in tasks]

        yield gather


@dataclass(slots=True)
class _Execution:
    """A stage at work; ``attempts`` and the last errors of tasks ``given_up`` are by key.

    Without a ``run``, tasks only read: nothing is committed, and errors of data end it.
    """

    stage: Stage
    store: Store
    run: Run | None
    workers: int = 1
    enough: Enough | None = None
    wait: bool = True
    more: More | None = None
    known: dict[str, Task] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, BaseException] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)  # how often a task could not be committed
    erased: Counter[str] = field(default_factory=Counter)  # how often the input of a task had been removed
    ended: bool = False
    pools: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closes the pool that is kept
    kept: Any = None

    def work(self, run: Run, progress: Progress) -> int:
        stage, store, elsewhere = self.stage, self.store, 0
        try:
            while not self.ended:
                interrupts.check()
                more_to_come = self.more is not None and self.more()
                before = self._elsewhere(run.id)  # first: what is released from here on is not missed
                self._fold(run)
                tasks = [task for task in plan_tasks(stage, store) if task.key not in self.given_up]
                held = leases.claim_holders(store.storage, run.id) if any(task.claimed for task in tasks) else {}
                shard = engine_in_use().shard if engine_in_use().share_only else None
                waited = [task for task in tasks if shard is None or task.for_all or is_own(task, *shard)]
                left = {task.label: held[task.key] for task in waited if task.key in held}
                if isinstance(stage, Holds):
                    left |= stage.held(store)
                elsewhere = sum(task.key in held for task in tasks)
                tasks = [task for task in tasks if task.key not in held]
                if not tasks:
                    if more_to_come and not self.given_up:
                        time.sleep(POLL_SECONDS[0])
                        continue
                    if not left or self.given_up:
                        break
                    self._await(left, run.id, before, progress)
                    continue
                if isinstance(stage, Sized):  # with shards, other jobs need the space for their shares
                    check_space(store.storage, sum(stage.size_of(store, task) for task in tasks), stage.name)
                self.run_tasks(tasks, progress, lambda _, staged: self._check_enough(staged))
                for key in self.given_up:
                    leases.release_claim(store.storage, key, run.id)  # a killed worker could not
                if isinstance(stage, GivesUp):
                    for key, error in list(self.given_up.items()):
                        if not isinstance(error, _NOT_THE_DATA):
                            staged = stage.give_up(store, self.known[key], run.id, error)
                            staging.stage(store.storage, staged)
                            del self.given_up[key]
                            self._check_enough(staged)
                self._fold(run)
        except KeyboardInterrupt:
            folding.fold(store, run)
            raise
        self.raise_failure()
        return elsewhere

    def _fold(self, run: Run) -> None:
        """Commit what is staged; give up tasks of this stage that are refused again and again."""
        for key, reason in folding.fold(self.store, run).refused.items():
            self.refused[key] += 1
            if self.refused[key] >= ATTEMPTS and key in self.known:
                what = f"{self.stage.name}: {self.known[key].label} can't be committed: {reason}"
                self.given_up[key] = TaskError(what)

    def raise_failure(self) -> None:
        """Raise the first error of the tasks that failed for good."""
        for key, error in self.given_up.items():
            if isinstance(error, RetrotoolError):
                raise error
            raise TaskError(
                f"{self.stage.name}: {self.known[key].label} failed {ATTEMPTS} times: {type(error).__name__}: {error}",
                "Run the same command again to retry it. The results of other tasks are kept.",
            ) from error

    def _await(self, left: Mapping[str, str], run: str, before: object, progress: Progress) -> None:
        """Wait until something changes about the tasks ``left``, by label, which are held by these runs."""
        storage, (label, owner) = self.store.storage, next(iter(left.items()))
        more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
        held = f"{label}{more}, held by {leases.describe_run(storage, owner)}"
        if not self.wait:
            raise HeldError(
                f"{self.stage.name}: what is left is being done by other runs: {held}",
                "Run the same command again once they have ended; or without --no-wait, to wait for them.",
            )
        progress.plan(0, f"waiting for {held}")
        pause = POLL_SECONDS[0]
        while self._elsewhere(run) == before:
            interrupts.check()
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS[1])

    def _elsewhere(self, run: str) -> object:
        """Return what changes when another run commits, drops or takes a task, or ends."""
        storage = self.store.storage
        return self.store.refresh().number, leases.claim_holders(storage, run), leases.others(storage, run)

    def run_tasks(self, tasks: Sequence[Task], progress: Progress, take: Callable[[Task, Any], object]) -> None:
        """Run tasks in order and commit now and then; once one is enough, begin no more."""
        self.known.update((task.key, task) for task in tasks)
        workers = min(self.workers, len(tasks))
        if workers > 1 and len(tasks) <= _FEW * workers and not tasks[0].claimed:
            tasks = sorted(tasks, key=lambda task: -task.weight)
        waiting = deque(tasks)
        folded = planned = time.monotonic()
        pause = FOLD_SECONDS
        progress.plan(sum(task.weight for task in tasks), "loading")
        with self._pool(workers, progress, len(tasks)) as pool:
            while pool.busy or (waiting and not self.ended):
                while waiting and pool.idle and not self.ended:
                    interrupts.check()
                    pool.begin(waiting.popleft())
                for task, result in pool.finished():
                    if not isinstance(result, BaseException):
                        take(task, result)
                    elif self._note_failure(task, result):
                        waiting.appendleft(task)
                interrupts.check()
                if self.run is not None and time.monotonic() - folded > FOLD_SECONDS:
                    self._fold(self.run)
                    folded = time.monotonic()
                    if waiting and folded - planned > pause and leases.others(self.store.storage, self.run.id):
                        left = {task.key for task in plan_tasks(self.stage, self.store)}
                        planned = time.monotonic()
                        pause = max(FOLD_SECONDS, _PLANNING_SHARE * (planned - folded))
                        progress.update(0, sum(task.weight for task in waiting if task.key not in left))
                        waiting = deque(task for task in waiting if task.key in left)

    def _pool(self, workers: int, progress: Progress, tasks: int) -> Any:
        """Return a pool of the engine in use, opened; importing it takes time that readers need not spend.

        It is kept for further rounds if it takes long to open: on Ray, and where it holds what was read.
        """
        run, engine = "" if self.run is None else self.run.id, engine_in_use()
        if engine.name == "ray":
            from retrotool.engine.ray import RayPool

            if self.kept is None:
                self.kept = self.pools.enter_context(RayPool(engine, self.stage, self.store, run, progress))
            self.kept.most = tasks
            return contextlib.nullcontext(self.kept)
        from retrotool.engine.local import open_pool

        if self.run is not None:
            return open_pool(self.stage, self.store, run, workers, progress, tasks)
        if self.kept is None:
            self.kept = self.pools.enter_context(open_pool(self.stage, self.store, run, workers, progress, tasks))
        return contextlib.nullcontext(self.kept)

    def _check_enough(self, staged: Staged | None) -> None:
        if self.enough is not None and staged is not None:
            self.ended |= self.enough(staged)

    def _note_failure(self, task: Task, error: BaseException) -> bool:
        """Count a failure; return whether to try the task again."""
        if isinstance(error, OpenError):
            raise error.args[0] from None
        if isinstance(error, _FATAL) or (self.run is None and isinstance(error, RetrotoolError)):
            raise error
        if isinstance(error, NodeLostError):
            return True
        if isinstance(error, ErasedError):  # another process removed its input: it is planned again if still needed
            self.erased[task.key] += 1
            if self.erased[task.key] >= _MOST_ERASED:
                self.given_up[task.key] = error
            return False
        self.attempts[task.key] = self.attempts.get(task.key, 0) + 1
        if self.attempts[task.key] < ATTEMPTS and not isinstance(error, RetrotoolError):
            return True  # a RetrotoolError (wrong data or settings) would recur
        self.given_up[task.key] = error
        return False
