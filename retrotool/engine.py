"""Who runs tasks: this process, or local worker processes.

``execute`` plans, runs, folds, and plans again until nothing is left, so that a task whose input was erased under
it is simply done again. A failed task is tried three times; the others go on. A stage may say what to stage for one
that fails for good (``GivesUp``): others would wait for it. Workers are spawned, and get the stage, the store's path
and a run id: nothing is shared but the store. On Ctrl-C, what is finished is committed and the rest is dropped.

With few tasks the largest are begun first, so that no worker is left alone with one at the end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from tqdm import tqdm

from retrotool.errors import AbortError, ErasedError, RetrotoolError, StorageError, TaskError
from retrotool.stages.base import GivesUp, Report, Stage, Task, Worker
from retrotool.store import staging
from retrotool.store.runs import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store

FOLD_SECONDS = 30.0
ATTEMPTS = 3
_FATAL = (StorageError, AbortError, KeyboardInterrupt)
_NOT_THE_DATA = (RetrotoolError, OSError, MemoryError)
"""Errors that are told as they are, or may be gone when the same command is run again: no task is given up for them."""
_FEW = 8
"""Tasks a worker up to which they are begun by size."""

Enough = Callable[[Staged], bool]
"""Told of every finished task; True ends the run after the tasks that have begun."""


@dataclass(slots=True)
class _Failures:
    """Attempts a task took, and the last error of those that are given up."""

    attempts: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, BaseException] = field(default_factory=dict)

    def note(self, task: Task, error: BaseException) -> bool:
        """Count a failure; True if the task should be tried again."""
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


class _Ended(Exception):  # noqa: N818 - no error: it is what the caller asked for
    """A finished task was enough."""


def execute(stage: Stage, store: Store, run: Run, *, workers: int = 1, enough: Enough | None = None) -> None:
    """Do all of a stage's work on a store, and commit it; less if a finished task is ``enough``.

    Raises the error of the first task that failed for good, once all the others are done; ``TaskError`` if it was no
    error of ours.
    """
    failures = _Failures()
    known: dict[str, Task] = {}
    refused: dict[str, int] = {}
    try:
        while True:
            staging.fold(store, run)
            store.refresh()
            tasks = [task for task in stage.plan(store) if task.key not in failures.given_up]
            if not tasks:
                break
            known.update((task.key, task) for task in tasks)
            _run_tasks(stage, store, run, tasks, min(workers, len(tasks)), failures, enough)
            _give_up(stage, store, run, known, failures, enough)
            for key, reason in staging.fold(store, run).refused.items():
                refused[key] = refused.get(key, 0) + 1
                if refused[key] >= ATTEMPTS:
                    label = known[key].label if key in known else key
                    failures.given_up[key] = TaskError(f"{stage.name}: {label} can't be committed: {reason}")
    except _Ended:
        _give_up(stage, store, run, known, failures, None)
        staging.fold(store, run)
    except KeyboardInterrupt:
        staging.fold(store, run)
        raise
    for key, error in failures.given_up.items():
        if isinstance(error, RetrotoolError):
            raise error
        raise TaskError(
            f"{stage.name}: {known[key].label} failed {ATTEMPTS} times: {type(error).__name__}: {error}",
            "What the other tasks did is committed. Run the same command again to try the rest.",
        ) from error


def _give_up(
    stage: Stage, store: Store, run: Run, known: dict[str, Task], failures: _Failures, enough: Enough | None
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
        raise _Ended


def _run_tasks(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    workers: int,
    failures: _Failures,
    enough: Enough | None,
) -> None:
    total = sum(task.weight for task in tasks)
    with tqdm(
        total=total, unit=stage.unit, unit_scale=True, desc=stage.name, disable=None, delay=2, file=sys.stderr
    ) as bar:
        if workers > 1:
            if len(tasks) <= _FEW * workers:
                tasks = sorted(tasks, key=lambda task: -task.weight)
            _run_in_processes(stage, store, run, tasks, workers, failures, bar.update, enough)
        else:
            _run_here(stage, store, run, tasks, failures, bar.update, enough)


def _run_here(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    failures: _Failures,
    report: Report,
    enough: Enough | None,
) -> None:
    worker = stage.open(store)
    folded = time.monotonic()
    for task in tasks:
        again = True
        while again:
            again = False
            try:
                staged = perform(worker, store.root, task, run.id, report)
                if staged is not None and enough is not None and enough(staged):
                    raise _Ended
            except _Ended:
                raise
            except Exception as error:
                again = failures.note(task, error)
        if time.monotonic() - folded > FOLD_SECONDS:
            staging.fold(store, run)
            folded = time.monotonic()


def perform(worker: Worker, root: Path, task: Task, run: str, report: Report) -> Staged | None:
    """Do one task and stage it, unless that was done meanwhile. This is all that another engine has to call."""
    if staging.is_staged(root, task.key):
        return None
    try:
        staged = worker(task, run, report)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the panic of a library in Rust, which no other process knows the class of
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    staging.stage(root, staged)
    return staged


_worker: tuple[Worker, Path, str, SimpleQueue[int]] | None = None
"""What a worker process was opened with; a process pool has no other place for it."""


def _open_worker(
    stage: Stage, root: Path, run: str, progress: SimpleQueue[int], threads: int, opened: Synchronized[int]
) -> None:
    global _worker
    with opened.get_lock():
        number, opened.value = opened.value, opened.value + 1
    _keep_to_share(number, threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, daemon=True).start()
    # Each worker gets its share of the cores: the libraries would otherwise all start one thread a core.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    _worker = (stage.open(Store.open(root)), root, run, progress)


def _keep_to_share(number: int, threads: int) -> None:
    """Keep worker ``number`` to its own cores, where the system can: some libraries heed nothing else.

    tokie starts a thread for every core it may run on at each call, which costs a third of its rate when each worker
    does.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = number * threads % len(cores)
        os.sched_setaffinity(0, (cores + cores)[first : first + threads])


def _follow_parent() -> None:
    """End this worker with its parent: others take the run for dead then, and clean up after it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: Task) -> Staged | None:
    assert _worker is not None
    worker, root, run, progress = _worker
    return perform(worker, root, task, run, progress.put)


def _run_in_processes(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    workers: int,
    failures: _Failures,
    report: Report,
    enough: Enough | None,
) -> None:
    """Run tasks in a pool, and in a new one whenever a worker was killed (out of memory, perhaps).

    A broken pool does not tell which task broke it: those that may have are then run one at a time, so that only the
    one that breaks its worker again is counted as failed.
    """
    waiting, suspects = list(tasks), 0
    while waiting:
        batch = waiting[:1] if suspects else waiting
        again, broken = _run_pool(stage, store, run, batch, 1 if suspects else workers, failures, report, enough)
        waiting = again + waiting[len(batch) :]
        # Tasks are begun in their order, one ahead a worker.
        suspects = 2 * workers if broken and not suspects else max(0, suspects - 1)


def _run_pool(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    workers: int,
    failures: _Failures,
    report: Report,
    enough: Enough | None,
) -> tuple[list[Task], bool]:
    """Run tasks in one pool; return those to be done again, in their order, and whether a worker was killed."""
    context = multiprocessing.get_context("spawn")
    progress: SimpleQueue[int] = context.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    opened: Synchronized[int] = context.Value("i", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, _open_worker, (stage, store.root, run.id, progress, threads, opened)
    )
    again: set[str] = set()
    broken = ended = False
    folded = time.monotonic()
    with _reporting(progress, report), _stopping(pool):
        with _interrupts_put_off():
            futures = {pool.submit(_do, task): task for task in tasks}
        while futures:
            done, _ = concurrent.futures.wait(futures, FOLD_SECONDS, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                task = futures.pop(future)
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None and enough is not None and (staged := future.result()) is not None and enough(staged):
                    ended = True
                    for other in futures:
                        other.cancel()
                killed = isinstance(error, BrokenProcessPool)
                broken |= killed
                if (killed and len(tasks) > 1) or (error is not None and failures.note(task, error)):
                    again.add(task.key)
            if time.monotonic() - folded > FOLD_SECONDS:
                staging.fold(store, run)
                folded = time.monotonic()
    if ended:
        raise _Ended
    return [task for task in tasks if task.key in again], broken


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Processes started meanwhile have Ctrl-C blocked from their first instruction on: it is the parent's to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _stopping(pool: concurrent.futures.ProcessPoolExecutor) -> Iterator[None]:
    """Shut a pool down; on an error without waiting for tasks that have not begun, killing those that have."""
    try:
        yield
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


@contextlib.contextmanager
def _reporting(progress: SimpleQueue[int], report: Report) -> Iterator[None]:
    """Pass on what workers report, from a thread."""
    end = -1

    def pump() -> None:
        while (done := progress.get()) != end:
            report(done)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError, queue.Full):
            progress.put(end)
        thread.join(timeout=5)
