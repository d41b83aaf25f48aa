"""An iterator that runs ahead of who takes from it, in a thread, by a bounded number of items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _End:
    """What comes last: the error that ended it, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def ahead(items: Iterable[T], most: int) -> Iterator[Iterator[T]]:
    """``items``, of which up to ``most`` are made before they are asked for.

    An error in making them is raised where they are taken. On leaving, whatever happens, the thread has ended.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(most)
    stop = threading.Event()

    def put(item: T | _End) -> None:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    break
        except BaseException as caught:
            error = caught
        finally:
            if isinstance(items, Generator):
                items.close()
        put(_End(error))

    def take() -> Iterator[T]:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    # No daemon: one that the interpreter stops in the middle of a library's code takes the process down with it.
    thread = threading.Thread(target=work, name="retrotool-ahead")
    try:
        thread.start()
        yield take()
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
