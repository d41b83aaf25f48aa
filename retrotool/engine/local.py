"""Pools that run tasks on this machine: in this process, or in spawned worker processes.

Each worker is a pool of one process that gets one task at a time, or as many as the stage has in flight, in
threads. If it is killed (for example, out of memory), only its tasks fail, and a new process starts. From
then on all workers get one task at a time, so that a task that kills its worker fails alone. A worker uses
its share of the cores, and reports through its own pipe, so a kill during a write leaves no lock behind.
Workers end on Ctrl-C, and with their parent.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from retrotool.engine.progress import Progress
from retrotool.engine.task import OpenError, Stage, Task, TaskResult, perform
from retrotool.lazy import leave_pandas_out
from retrotool.machine import use_cores
from retrotool.store.storage import Storage
from retrotool.store.store import Store

WAIT_SECONDS = 30.0  # for a task to end, before the caller gets its turn
_LISTEN_SECONDS = 5.0
_perform: Callable[[Task], Any] | Exception | None = None  # what this worker process does, or why it can't
_threads: ThreadPoolExecutor | None = None  # of this worker process, if several tasks are in flight
_running: dict[Future[Any], str] = {}  # the keys of these tasks

UpdatePipe: TypeAlias = "Connection[tuple[int, int], Any]"
Ended = list[tuple[str, TaskResult]]  # keys of tasks that have ended


def _open_worker(
    stage: Stage, storage: Storage, run: str, most: int, pipe: UpdatePipe, number: int, threads: int
) -> None:
    global _perform, _threads
    leave_pandas_out()
    use_cores(threads, number)  # otherwise each would start one thread per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_follow_parent, daemon=True).start()
    own: Any = stage
    in_flight = getattr(stage, "in_flight", 1)
    if devices := getattr(stage, "devices", ()):
        device = (devices[number % len(devices)],)
        in_flight = getattr(dataclasses.replace(own, devices=device * len(devices)), "in_flight", 1)
        own = dataclasses.replace(own, devices=device)
    lock = threading.Lock()

    def update(done: int, elsewhere: int) -> None:
        with lock:
            pipe.send((done, elsewhere))

    try:
        _perform = partial(perform, own.open(Store.open(storage)), storage, run=run, update=update)
    except Exception as error:  # a pool would report only a broken process, not the reason
        _perform = error
    if (in_flight := min(in_flight, most)) > 1:
        _threads = ThreadPoolExecutor(in_flight, "retrotool-task")


def _follow_parent() -> None:
    """End this process with its parent: other runs then take the run for dead and clean up after it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: Task | None, alone: bool) -> Ended:
    """Begin a task, if any; return what has ended once another may begin, or something has ended."""
    assert _perform is not None
    if isinstance(_perform, Exception):
        raise OpenError(_perform)
    if _threads is None:
        assert task is not None
        return [(task.key, _perform(task))]
    if task is not None:
        _running[_threads.submit(_perform, task)] = task.key
    if task is None or alone or len(_running) == _threads._max_workers:
        concurrent.futures.wait(_running, return_when=concurrent.futures.FIRST_COMPLETED)
    ended = [(future, _running.pop(future)) for future in list(_running) if future.done()]
    return [(key, future.exception() or future.result()) for future, key in ended]


class _Here:
    """A pool of this process alone: ``begin`` does the task, or a thread where several are in flight."""

    def __init__(self, stage: Stage, store: Store, run: str, progress: Progress) -> None:
        update = progress.update
        self._perform = partial(perform, stage.open(store), store.storage, run=run, update=update)
        self.idle = list(range(getattr(stage, "in_flight", 1)))
        self.busy: dict[Future[Any], Task] = {}
        self._threads = ThreadPoolExecutor(len(self.idle), "retrotool-task") if len(self.idle) > 1 else None

    def begin(self, task: Task) -> None:
        self.idle.pop()
        if self._threads is not None:
            self.busy[self._threads.submit(self._perform, task)] = task
            return
        future: Future[Any] = Future()
        try:
            future.set_result(self._perform(task))
        except Exception as error:
            future.set_exception(error)
        self.busy[future] = task

    def finished(self) -> Iterator[tuple[Task, TaskResult]]:
        """Wait up to ``WAIT_SECONDS`` for tasks to end; yield those that have."""
        done, _ = concurrent.futures.wait(self.busy, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            self.idle.append(len(self.idle))
            yield self.busy.pop(future), future.exception() or future.result()

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for tasks that have begun; after a Ctrl-C they stop at their next ``interrupts.check``."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


class _Processes:
    """Worker processes; a context manager that kills running tasks if it exits with an error.

    None has more tasks in flight than its share of ``tasks``, so that all have some.
    """

    def __init__(self, stage: Stage, store: Store, run: str, workers: int, progress: Progress, tasks: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        # Starting it unblocks Ctrl-C. Started with the first worker, it would expose that worker to Ctrl-C.
        resource_tracker.ensure_running()
        self._arguments = (stage, store.storage, run, -(-tasks // workers))
        self._progress = progress
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self.idle = list(reversed(range(workers)))  # workers that may get a task; the last begins next
        self.busy: dict[str, tuple[int, Task]] = {}  # workers and tasks that ``finished`` has not yielded, by key
        self._calls: dict[Future[Ended], int] = {}  # calls of workers that have not returned
        self._alone = False  # since a worker was killed
        self._listening: list[threading.Thread] = []

    def begin(self, task: Task) -> None:
        """Give a task to an idle worker; start the worker if needed."""
        number = self.idle.pop()
        self.busy[task.key] = (number, task)
        self._call(number, task)

    def _call(self, number: int, task: Task | None) -> None:
        with _interrupts_deferred():
            if number in self._pools:
                try:
                    call = self._pools[number].submit(_do, task, self._alone)
                except BrokenProcessPool as error:  # it was killed between two calls
                    call = Future()
                    call.set_exception(error)
                self._calls[call] = number
                return
            reported, pipe = self._context.Pipe(duplex=False)
            arguments = (*self._arguments, pipe, number, self._threads)
            pool = self._pools[number] = ProcessPoolExecutor(1, self._context, _open_worker, arguments)
            self._calls[pool.submit(_do, task, self._alone)] = number
            pipe.close()  # the process has its own end by now; when it closes that, ``listen`` ends
            self._listening.append(threading.Thread(target=self._progress.listen, args=(reported,), daemon=True))
            self._listening[-1].start()

    def finished(self) -> Iterator[tuple[Task, TaskResult]]:
        """Wait up to ``WAIT_SECONDS`` for tasks to end; yield those that have. Killed workers start again."""
        for number in {number for number, _ in self.busy.values()}.difference(self._calls.values()):
            self.idle = [other for other in self.idle if other != number]
            self._call(number, None)  # there is nothing to begin
        done, _ = concurrent.futures.wait(self._calls, WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)
        for call in done:
            number = self._calls.pop(call)
            error = call.exception()
            if isinstance(error, BrokenProcessPool):
                self._pools.pop(number).shutdown(wait=False)
                self._alone = True
            mine = {key: error for key, (owner, _) in self.busy.items() if owner == number}
            ended = mine.items() if error is not None else call.result()
            if not self._alone or len(ended) == len(mine):
                self.idle.append(number)
            for key, result in ended:
                if key in self.busy:
                    yield self.busy.pop(key)[1], result

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Shut down; after an error kill running tasks instead of waiting for them."""
        killed = kind is not None
        processes = [process for pool in self._pools.values() for process in (pool._processes or {}).values()]
        # The pools' threads must end before this process: its exit wakes them by a pipe that may be closing.
        threads: list[Any] = [pool._executor_manager_thread for pool in self._pools.values()]
        for pool in self._pools.values():
            pool.shutdown(wait=not killed, cancel_futures=True)
        if killed:
            for process in processes:
                process.terminate()
        for thread in filter(None, (*threads, *self._listening)):
            thread.join(_LISTEN_SECONDS)


def open_pool(
    stage: Stage, store: Store, run: str, workers: int, progress: Progress, tasks: int
) -> contextlib.AbstractContextManager[_Here | _Processes]:
    """Return a pool of ``workers`` processes, or of this process for one, for so many ``tasks``."""
    if workers == 1:
        return _Here(stage, store, run, progress)
    return _Processes(stage, store, run, workers, progress, tasks)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Start processes with Ctrl-C blocked from their first instruction on; handle it here afterwards.

    Blocking the signal in this thread is not enough: another thread gets it then, Python raises it in the
    main thread, and a process that does not have its arguments yet fails with a traceback.
    """
    handler = signal.getsignal(signal.SIGINT)
    deferred = callable(handler) and threading.current_thread() is threading.main_thread()
    interrupted = threading.Event()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if deferred:
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield
    finally:
        if deferred:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if interrupted.is_set():
            signal.raise_signal(signal.SIGINT)
