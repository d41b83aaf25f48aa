"""Running tasks on this machine: one after another in this process, or in spawned worker processes.

Processes share nothing with their parent but the store. Each worker is a pool of one process, which is given one task
at a time. So if a process is killed (out of memory, perhaps), it is known which task it was at, that task alone has
failed, and the other workers go on while a new process takes its place. Each worker keeps to its share of the cores,
and reports through a separate pipe: one that is killed while it writes holds no lock. With Ctrl-C, or when the parent
dies, they end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from retrotool.engine.progress import Progress
from retrotool.engine.task import OpenError, PerWorker, Stage, Task, Update, Worker, perform_reporting
from retrotool.lazy import leave_pandas_out
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
from retrotool.store.storage import Storage
from retrotool.store.store import Store

WAIT_SECONDS = 30.0
"""How long to wait for a task to end before the caller is given its turn."""
_LISTEN_SECONDS = 5.0

_worker: tuple[Worker | Exception, Storage, str, Update] | None = None
"""What a worker process was opened with; a process pool has no other place for it."""


def _open_worker(
    stage: Stage, storage: Storage, run: str, pipe: Connection[tuple[int, int, str], Any], number: int, threads: int
) -> None:
    global _worker
    leave_pandas_out()
    if hasattr(os, "sched_setaffinity"):
        # Some libraries heed nothing else: tokie starts a thread for every core it may run on at each call, which costs
        # a third of its rate when each worker does.
        cores = sorted(os.sched_getaffinity(0))
        first = number * threads % len(cores)
        os.sched_setaffinity(0, (cores + cores)[first : first + threads])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, daemon=True).start()
    # Each worker gets its share of the cores: the libraries would otherwise all start one thread a core.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    own = stage.of_worker(number) if isinstance(stage, PerWorker) else stage
    opened: Worker | Exception
    try:
        opened = own.open(Store.open(storage))
    except Exception as error:  # a pool would tell of a broken process, and not why
        opened = error
    _worker = (opened, storage, run, lambda *update: pipe.send(update))


def _follow_parent() -> None:
    """End this worker with its parent: others take the run for dead then, and clean up after it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: Task) -> Staged | None:
    assert _worker is not None
    worker, storage, run, update = _worker
    if isinstance(worker, Exception):
        raise OpenError(worker)
    return perform_reporting(worker, storage, task, run, update)


class _Here:
    """A pool of this process alone, as ``_Processes`` is of several: a task is done when it is begun."""

    def __init__(self, stage: Stage, store: Store, run: Run, progress: Progress) -> None:
        self._worker, self._arguments, self._progress = stage.open(store), (store.storage, run.id), progress
        self.idle = [0]
        self.busy: list[tuple[Task, Future[Staged | None]]] = []

    def begin(self, task: Task) -> None:
        self.idle.pop()
        storage, run = self._arguments
        future: Future[Staged | None] = Future()
        try:
            future.set_result(perform_reporting(self._worker, storage, task, run, self._progress.update))
        except Exception as error:
            future.set_exception(error)
        self.busy.append((task, future))

    def finished(self) -> Iterator[tuple[Task, Future[Staged | None]]]:
        done, self.busy = self.busy, []
        self.idle = [0]
        yield from done


class _Processes:
    """Worker processes, each a pool of one; a context manager, which kills begun tasks if it is left by an error."""

    def __init__(self, stage: Stage, store: Store, run: Run, workers: int, progress: Progress) -> None:
        self._context = multiprocessing.get_context("spawn")
        # Starting it lets Ctrl-C through again: left to the first worker's start, that one would get it.
        resource_tracker.ensure_running()
        self._arguments = (stage, store.storage, run.id)
        self._progress = progress
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self.idle = list(reversed(range(workers)))
        """Workers without a task, the first one last."""
        self.busy: dict[Future[Staged | None], tuple[int, Task]] = {}
        """Tasks that were begun and that ``finished`` has not given."""
        self._listening: list[threading.Thread] = []

    def begin(self, task: Task) -> None:
        """Give a task to an idle worker, started if it is not running."""
        number = self.idle.pop()
        with _interrupts_put_off():
            if number in self._pools:
                self.busy[self._pools[number].submit(_do, task)] = (number, task)
                return
            reported, pipe = self._context.Pipe(duplex=False)
            arguments = (*self._arguments, pipe, number, self._threads)
            pool = self._pools[number] = ProcessPoolExecutor(1, self._context, _open_worker, arguments)
            self.busy[pool.submit(_do, task)] = (number, task)
            pipe.close()  # the process has its own end of it by now; when that is closed, there is nothing to hear
            self._listening.append(threading.Thread(target=self._progress.listen, args=(reported,), daemon=True))
            self._listening[-1].start()

    def finished(self) -> Iterator[tuple[Task, Future[Staged | None]]]:
        """Wait for tasks to end, ``WAIT_SECONDS`` at most, and give those that have.

        A worker that was killed will be started again.
        """
        done, _ = concurrent.futures.wait(self.busy, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            number, task = self.busy.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                self._pools.pop(number).shutdown(wait=False)
            self.idle.append(number)
            yield task, future

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Shut down; on an error without waiting for tasks that have begun, which are killed."""
        killed = kind is not None
        processes = [process for pool in self._pools.values() for process in (pool._processes or {}).values()]
        # A pool's own thread must end before this process does, which wakes it by a pipe that it may be closing.
        threads: list[Any] = [pool._executor_manager_thread for pool in self._pools.values()]
        for pool in self._pools.values():
            pool.shutdown(wait=not killed, cancel_futures=True)
        if killed:
            for process in processes:
                process.terminate()
        for thread in filter(None, (*threads, *self._listening)):
            thread.join(_LISTEN_SECONDS)


def open_pool(
    stage: Stage, store: Store, run: Run, workers: int, progress: Progress
) -> contextlib.AbstractContextManager[_Here | _Processes]:
    """So many worker processes, or this process if it is one."""
    if workers == 1:
        return contextlib.nullcontext(_Here(stage, store, run, progress))
    return _Processes(stage, store, run, workers, progress)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Processes started meanwhile have Ctrl-C blocked from their first instruction on: it is the parent's to handle.

    Blocking it in this thread is not enough: another one gets it then, and Python raises it in the main thread, perhaps
    between the start of a process and what it is told, of which it dies with a traceback.
    """
    handler = signal.getsignal(signal.SIGINT)
    deferred = callable(handler) and threading.current_thread() is threading.main_thread()
    asked = threading.Event()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if deferred:
        signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield
    finally:
        if deferred:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if asked.is_set():
            signal.raise_signal(signal.SIGINT)
