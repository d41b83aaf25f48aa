"""Running batches on a device, several in flight: threads on a CPU, streams and pinned memory on a GPU.

On a CPU every core computes batches of its own, one thread each: nothing waits for the slowest thread of a product, it
scales to many cores, and a batch's vectors do not depend on how many cores there are. On a GPU the copy of the next
batch and of the last one's vectors run beside the forward; the host is a few batches ahead.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrotool.encoder.forwards import Arrays, Forward
from retrotool.machine import cores

Vectors = npt.NDArray[np.float16]
_START_SECONDS = 60.0
"""How long a thread may take to start."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A batch's tensors on the host, and what stays there; ``rows`` of its vectors count."""

    tensors: dict[str, torch.Tensor]
    more: dict[str, Any]
    rows: int


Handle = Callable[[], tuple[Vectors, float]]
"""A batch in flight: gives its vectors, float16 [n, d], and the seconds that it took; raises what went wrong."""


class CpuRunner:
    """One thread a core, each with batches of its own.

    ``depth`` batches are to be kept in flight, of which ``lanes`` are computed at a time.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.lanes = cores()
        self.depth = 2 * self.lanes
        self._pool = ThreadPoolExecutor(self.lanes, "retrotool-forward")
        before = torch.get_num_threads()
        started = threading.Barrier(self.lanes)

        def start(_: int) -> None:
            torch.set_num_threads(1)
            started.wait(_START_SECONDS)

        list(self._pool.map(start, range(self.lanes)))
        # The number that a thread sets is its own, and what threads that begin later start with: that is put back.
        torch.set_num_threads(before)

    def ready(self, arrays: Arrays, rows: int) -> Ready:
        """Get a batch ready for ``submit``; may run in another thread."""
        return Ready({name: torch.from_numpy(array) for name, array in arrays[0].items()}, arrays[1], rows)

    def submit(self, ready: Ready) -> Handle:
        """Begin with a batch."""
        future: Future[tuple[Vectors, float]] = self._pool.submit(self._compute, ready)
        return future.result

    def _compute(self, ready: Ready) -> tuple[Vectors, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            vectors = self._forward(ready.tensors, ready.more)[: ready.rows].half().numpy()
        return vectors, time.perf_counter() - start

    def close(self) -> None:
        """Let go of threads and memory."""
        self._pool.shutdown()


class CudaRunner:
    """One GPU: copies on a stream of their own, from and to pinned memory; see ``CpuRunner``."""

    depth = 3
    lanes = 1

    def __init__(self, forward: Forward, device: str) -> None:
        self._forward, self._device = forward, torch.device(device)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def ready(self, arrays: Arrays, rows: int) -> Ready:
        """Get a batch ready for ``submit``; may run in another thread."""
        return Ready({n: torch.from_numpy(a).pin_memory() for n, a in arrays[0].items()}, arrays[1], rows)

    def submit(self, ready: Ready) -> Handle:
        """Begin with a batch."""
        try:
            return self._submit(ready)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # else what ran out of memory would keep what it had
            error.__context__ = error.__cause__ = None
            return _failed(error.with_traceback(None))

    def _submit(self, ready: Ready) -> Handle:
        work = torch.cuda.current_stream(self._device)
        with torch.inference_mode(), torch.cuda.device(self._device):
            with torch.cuda.stream(self._copies):
                tensors = {n: t.to(self._device, non_blocking=True) for n, t in ready.tensors.items()}
            work.wait_stream(self._copies)
            for tensor in tensors.values():
                tensor.record_stream(work)
            begun, ended, arrived = (_event() for _ in range(3))
            begun.record(work)
            vectors = self._forward(tensors, ready.more)[: ready.rows].half()
            ended.record(work)
            host = torch.empty(vectors.shape, dtype=torch.float16, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            arrived.record(work)

        def handle() -> tuple[Vectors, float]:
            arrived.synchronize()
            assert ready.tensors is not None  # pinned memory must live until it is copied
            return host.numpy(), begun.elapsed_time(ended) / 1000

        return handle

    def close(self) -> None:
        """Let go of threads and memory."""
        torch.cuda.synchronize(self._device)


def _failed(error: Exception) -> Handle:
    errors = [error]

    def handle() -> tuple[Vectors, float]:
        raise errors.pop()  # it must not be held by its own traceback

    return handle


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


Runner = CpuRunner | CudaRunner
"""A device at work on batches."""
