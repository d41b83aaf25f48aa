"""Running tasks in local worker processes, spawned: they share nothing with their parent but the store.

A worker that is killed (out of memory, perhaps) costs its task an attempt and no more. Each worker keeps to its share
of the cores. With Ctrl-C, or when the parent dies, they end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from retrotool.engine.progress import Progress, Told, passing_on
from retrotool.engine.task import Ended, Enough, Failures, perform, telling
from retrotool.stages.base import PerWorker, Shared, Stage, Task, Worker
from retrotool.store.runs import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store

WAIT_SECONDS = 30.0
"""How long to wait for a task to end before the caller is given its turn."""

_worker: tuple[Worker, Path, str, bool, SimpleQueue[Told | None]] | None = None
"""What a worker process was opened with; a process pool has no other place for it."""


def _open_worker(
    stage: Stage, root: Path, run: str, told: SimpleQueue[Told | None], threads: int, opened: Synchronized[int]
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
    if isinstance(stage, PerWorker):
        stage = stage.of_worker(number)
    _worker = (stage.open(Store.open(root)), root, run, isinstance(stage, Shared), told)


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
    worker, root, run, shared, told = _worker
    staged = perform(worker, root, task, run, telling(worker, told.put), shared=shared)
    if staged is None:
        told.put(Told(left=task.weight))
    return staged


def run_in_processes(
    stage: Stage,
    store: Store,
    run: Run,
    tasks: Sequence[Task],
    workers: int,
    failures: Failures,
    progress: Progress,
    enough: Enough | None,
    now_and_then: Callable[[], None],
) -> None:
    """Run tasks in a pool, and in a new one whenever a worker was killed (out of memory, perhaps).

    A broken pool does not tell which task broke it: those that may have are then run one at a time, so that only the
    one that breaks its worker again is counted as failed. ``now_and_then`` is called between tasks.
    """
    waiting, suspects = list(tasks), 0
    while waiting:
        batch = waiting[:1] if suspects else waiting
        pool = _Pool(stage, store, run, 1 if suspects else workers)
        again, broken = pool.work(batch, failures, progress, enough, now_and_then)
        waiting = again + waiting[len(batch) :]
        # Tasks are begun in their order, one ahead a worker.
        suspects = 2 * workers if broken and not suspects else max(0, suspects - 1)


class _Pool:
    """A process pool for one batch of tasks."""

    def __init__(self, stage: Stage, store: Store, run: Run, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._told: SimpleQueue[Told | None] = context.SimpleQueue()
        threads = max(1, (os.cpu_count() or 1) // workers)
        opened: Synchronized[int] = context.Value("i", 0)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, context, _open_worker, (stage, store.root, run.id, self._told, threads, opened)
        )

    def work(
        self,
        tasks: Sequence[Task],
        failures: Failures,
        progress: Progress,
        enough: Enough | None,
        now_and_then: Callable[[], None],
    ) -> tuple[list[Task], bool]:
        """Run tasks; return those to be done again, in their order, and whether a worker was killed."""
        again: set[str] = set()
        broken = ended = False
        with passing_on(self._told, progress), _stopping(self._pool):
            with _interrupts_put_off():
                futures = {self._pool.submit(_do, task): task for task in tasks}
            while futures:
                done, _ = concurrent.futures.wait(futures, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    task = futures.pop(future)
                    if future.cancelled():
                        continue
                    error = future.exception()
                    if error is None:
                        staged = future.result()
                        if enough is not None and staged is not None and enough(staged):
                            ended = True
                            for other in futures:
                                other.cancel()
                    killed = isinstance(error, BrokenProcessPool)
                    broken |= killed
                    if (killed and len(tasks) > 1) or (error is not None and failures.note(task, error)):
                        again.add(task.key)
                now_and_then()
        if ended:
            raise Ended
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
