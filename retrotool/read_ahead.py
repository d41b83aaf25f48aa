"""An iterator that runs ahead of its reader, in a thread, by a bounded number of items."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


def ahead(items: Iterable[T], most: int, *, patience: float | None = None) -> Generator[T]:
    """Give ``items``, of which up to ``most`` are made before they are asked for.

    An error in making them is raised where they are taken. Closing the generator stops the thread and, if ``items`` is
    a generator, closes that. ``patience``: seconds to wait for a thread that blocks in a read, which then ends with the
    process; by default the thread has ended when the generator is closed.
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
        except BaseException as error:  # raised again in the thread that reads
            end = _End(error)
        put(end)

    # No daemon without need: one that the interpreter stops in a library's code takes the process down with it.
    thread = threading.Thread(target=produce, name="retrotool-ahead", daemon=patience is not None)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join(patience)
