"""Products of many rows with one table: the arithmetic of k-means and of finding lists.

On a CPU by oneDNN, whose kernels use what the processor has also where the library that torch multiplies by does not
(on AMD that is 2.4 times as fast); otherwise by torch. ``rough`` products round what goes in to bfloat16, where a
processor has instructions for it, or to TF32 on a GPU: for choosing the nearest of some centroids that is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from retrotool.lazy import faiss, torch
from retrotool.machine import has_onednn

T = TypeVar("T")
R = TypeVar("R")

_CACHED_ENTRIES = 1 << 20
_GPU_ENTRIES = 1 << 28
_LEAST_ROWS = 256
_STEP, _WIDTH = 64, 32
_SMALL, _LARGE = 16, 128
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


class Table:
    """A table float32 [k, d] that rows are multiplied by: ``scores(rows)`` is rows · tableᵀ + bias, [n, k]."""

    def __init__(self, table: torch.Tensor, bias: torch.Tensor, *, rough: bool = False) -> None:
        self._rough = rough
        on_cpu = table.device.type == "cpu"
        self._dtype = torch.bfloat16 if rough and on_cpu and has_bfloat16() else torch.float32
        self._packed: Any = None
        if on_cpu and has_onednn(self._dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(table.to(self._dtype).contiguous(), None)
            self._bias = bias.to(self._dtype)
        else:
            self._dtype = torch.float32
            self._table, self._bias = table, bias
        entries = _CACHED_ENTRIES if on_cpu else _GPU_ENTRIES
        self.rows = max(_LEAST_ROWS, entries // max(len(table), 1))
        """Rows that are best multiplied at a time."""

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """The products, [n, k]; of type bfloat16 if they are rough ones."""
        if self._packed is None:
            with _tensor_cores() if self._rough else contextlib.nullcontext():
                return torch.addmm(self._bias, rows, self._table.T)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.to(self._dtype).contiguous(), self._packed, self._bias, "none", [], ""
        )
        return found


class Columns:
    """Vectors, float32 or float64 [n, d], that queries are compared with, some of these against some of those.

    The score of q and x is q · x − |x|² / 2, the larger the nearer. Products are torch's: oneDNN makes a kernel for
    every shape that it meets, and here nearly every one is new.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        self._vectors, self._half_norms = vectors, vectors.square().sum(1).div_(-2)

    @staticmethod
    def table(asked: torch.Tensor) -> torch.Tensor:
        """Queries [q, d] as ``scores`` takes them."""
        return asked

    def scores(self, table: torch.Tensor, rows: torch.Tensor, low: int, high: int, scratch: Scratch) -> torch.Tensor:
        """Scores [r, high − low] of some ``rows`` [r] of a table of queries [q, d] and some of the vectors.

        They lie in ``scratch``, until it is used again.
        """
        asked = torch.index_select(table, 0, rows, out=scratch.take("rows", table.dtype, len(rows), table.shape[1]))
        out = scratch.take("scores", table.dtype, len(rows), high - low)
        return torch.addmm(self._half_norms[low:high], asked, self._vectors[low:high].T, out=out)


class RoughColumns:
    """As ``Columns``, with what goes in and what comes out rounded to bfloat16.

    On processors that multiply it this is several times as fast, and good for candidates that are ranked then.

    |x|² goes in as two further columns, its leading digits and the rest, so its error is none to speak of. oneDNN makes
    a kernel for every shape, so products are as large as the next of a few sizes: what is too much is of rows and
    vectors that happen to lie behind, and is left out.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        n, d = vectors.shape
        self._vectors = torch.zeros(n + _STEP, _padded(d), dtype=torch.bfloat16)
        self._vectors[:n, :d] = vectors
        half_norms = vectors.square().sum(1).div_(-2)
        self._vectors[:n, d] = half_norms
        self._vectors[:n, d + 1] = half_norms - self._vectors[:n, d].float()

    @staticmethod
    def table(asked: torch.Tensor) -> torch.Tensor:
        """Queries, float32 [q, d], as ``scores`` takes them."""
        q, d = asked.shape
        found = torch.zeros(q, _padded(d), dtype=torch.bfloat16)
        found[:, :d] = asked
        found[:, d : d + 2] = 1
        return found

    def scores(self, table: torch.Tensor, rows: torch.Tensor, low: int, high: int, scratch: Scratch) -> torch.Tensor:
        """Scores, float32 [r, high − low], see ``Columns.scores``."""
        r, n = len(rows), high - low
        width = table.shape[1]
        asked = scratch.take("rows", table.dtype, _bucket(r), width)
        torch.index_select(table, 0, rows, out=asked[:r])
        some = self._vectors[low : low + -(-n // _STEP) * _STEP]
        out = scratch.take("rough", table.dtype, len(asked), len(some))
        torch.mm(asked, some.T, out=out)
        return scratch.take("scores", torch.float32, r, n).copy_(out[:r, :n])


def _padded(d: int) -> int:
    return -(-(d + 2) // _WIDTH) * _WIDTH


def _bucket(rows: int) -> int:
    """The next of the numbers of rows that products have: powers of two, and from 128 on its multiples."""
    return -(-rows // _LARGE) * _LARGE if rows > _LARGE // 2 else max(_SMALL, 1 << (rows - 1).bit_length())


class Scratch:
    """Memory that is used again and again: fresh memory costs more than what is done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._kept = device, dict[str, Any]()

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """The tensor ``name``, [rows, columns], with anything in it."""
        size = rows * columns
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=dtype, device=self._device)
        found: torch.Tensor = self._kept[name][:size].view(rows, columns)
        return found


@contextlib.contextmanager
def one_thread_each(n: int) -> Iterator[Callable[[Callable[[T], R], Sequence[T]], list[R]]]:
    """A ``map`` whose calls run side by side in n threads, with one thread of torch's each; as it is for n = 1.

    Of many small products that is faster than to divide each among the threads.
    """
    if n <= 1:
        yield lambda do, items: [do(item) for item in items]
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n, initializer=_use_one_thread) as pool:
            yield lambda do, items: list(pool.map(do, items))
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread(others: int) -> Iterator[None]:
    """In one of several threads of a caller's own: products here have one thread each.

    ``others``: threads that products of other callers have, as torch told before any of these began.
    """
    before = faiss.omp_get_max_threads()
    _use_one_thread()
    try:
        yield
    finally:
        # The number that a thread sets is its own, and what threads that begin later start with: that is put back.
        torch.set_num_threads(others)
        faiss.omp_set_num_threads(before)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@lru_cache(1)
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself; where that can't be told, it does not."""
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in _BFLOAT16)
    except OSError:
        return False


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let a GPU round what goes into products to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
