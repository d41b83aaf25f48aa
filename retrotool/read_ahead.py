"""Iterators that run ahead of their readers, in threads, by a limited number of items."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def concurrently(call: Callable[[T], R], items: Iterable[T], most: int) -> Generator[R]:
    """Yield ``call(item)`` for each of ``items``, in order, by ``most`` calls at once, in threads."""
    if most == 1:
        yield from map(call, items)
        return
    pool = ThreadPoolExecutor(most, "retrotool-calls")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


def ahead(items: Iterable[T], most: int, *, patience: float | None = None) -> Generator[T]:
    """Yield ``items``, up to ``most`` of which are made in advance; their errors are raised here.

    Closing the generator stops the thread and closes ``items`` if that is a generator. It waits for the
    thread; ``patience`` limits that to some seconds, after which a blocking read ends with the process.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(most)
    stopped = threading.Event()

    def put(item: T | _End) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        end = _End(None)
        try:
            with contextlib.closing(items) if isinstance(items, Generator) else contextlib.nullcontext():
                for item in items:
                    if not put(item):
                        return
        except BaseException as error:  # raised in the reader's thread
            end = _End(error)
        put(end)

    # A daemon only if needed: a daemon thread stopped inside a library at exit can crash the process.
    thread = threading.Thread(target=produce, name="retrotool-ahead", daemon=patience is not None)
    try:
        thread.start()
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        if thread.is_alive():  # else Ctrl-C came before it began
            thread.join(patience)
