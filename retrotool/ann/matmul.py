"""Products of many rows with one table, for k-means and for choosing lists.

They run in oneDNN on a CPU (2.4 times as fast as torch's library on AMD), otherwise in torch. ``rough`` ones
round to bfloat16 where the processor supports it, or to TF32 on a GPU: enough to choose among centroids.
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
_TABLE_ROWS = 1 << 13
_STEP, _WIDTH = 64, 32
_SMALL, _LARGE = 16, 128
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


class CentroidTable:
    """Centroids, float32 [k, d]. Their ``mean`` [d] is subtracted from both sides, to lose fewer digits."""

    def __init__(self, centroids: torch.Tensor, *, rough: bool = False) -> None:
        self.mean, self._rough, on_cpu = centroids.mean(0), rough, centroids.device.type == "cpu"
        table = centroids - self.mean
        bias = -table.square().sum(1) / 2  # argmax q·c − |c|²/2 is argmin |q − c|²
        dtype = torch.bfloat16 if rough and on_cpu and has_bfloat16() else torch.float32
        self._packed: Any = None
        if on_cpu and has_onednn(dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(table.to(dtype).contiguous(), None)
            self._bias = bias.to(dtype)
        else:
            self._table, self._bias = table, bias
        entries = _CACHED_ENTRIES if on_cpu else _GPU_ENTRIES
        self.rows = max(_LEAST_ROWS, entries // max(len(table), 1))  # best number of rows per product

    def blocks(self, vectors: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of vectors [n, d], float32 or float16, and the input of ``scores`` for each."""
        for start in range(0, len(vectors), self.rows):
            some = slice(start, start + self.rows)
            yield some, vectors[some] - self.mean

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return scores of rows less the mean, [n, k], highest for the nearest, in bfloat16 if rough."""
        if self._packed is None:
            with _tensor_cores() if self._rough else contextlib.nullcontext():
                return torch.addmm(self._bias, rows, self._table.T)
        rows = rows.to(self._bias.dtype).contiguous()
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return found


class Columns:
    """Vectors [n, d] scored by q · x − |x|² / 2: larger is nearer. Shapes vary too much for oneDNN."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self._vectors, self._half_norms = vectors, vectors.square().sum(1).div_(-2)

    @staticmethod
    def table(asked: torch.Tensor, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Convert ``rows`` [r] of queries, float32 [q, d], less ``shift`` [d], to the input of ``scores``."""
        return asked[rows].sub_(shift)

    def scores(self, table: torch.Tensor, rows: torch.Tensor, low: int, high: int, scratch: Scratch) -> torch.Tensor:
        """Return scores [r, high − low] of table rows and vectors [low, high), in ``scratch``."""
        asked = torch.index_select(table, 0, rows, out=scratch.take("rows", table.dtype, len(rows), table.shape[1]))
        out = scratch.take("scores", table.dtype, len(rows), high - low)
        return torch.addmm(self._half_norms[low:high], asked, self._vectors[low:high].T, out=out)


class RoughColumns:
    """Like ``Columns`` in bfloat16: several times as fast, for candidates that are re-ranked.

    Scores are −|q − x|²/2 of the rounded vectors: they are small for near ones, whose distances then keep
    their digits when they are rounded. |x|² and |q|² are passed as two columns each, leading digits and rest,
    so their error is negligible. Shapes are rounded up to a few sizes, as oneDNN builds a kernel for each;
    surplus rows and columns are dropped.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        n, d = vectors.shape
        self._vectors = torch.zeros(n + _STEP, _padded(d), dtype=torch.bfloat16)
        self._vectors[:n, :d] = vectors
        _put_half_norms(self._vectors[:n], d, d)
        self._vectors[:n, d + 2 : d + 4] = 1

    @staticmethod
    def table(asked: torch.Tensor, rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Convert queries to the input of ``scores``, some at a time; see ``Columns.table``."""
        d = asked.shape[1]
        found = torch.zeros(len(rows), _padded(d), dtype=torch.bfloat16)
        for some, of in zip(torch.split(found, _TABLE_ROWS), torch.split(rows, _TABLE_ROWS), strict=True):
            some[:, :d] = asked[of].sub_(shift)
            some[:, d : d + 2] = 1
            _put_half_norms(some, d, d + 2)
        return found

    def scores(self, table: torch.Tensor, rows: torch.Tensor, low: int, high: int, scratch: Scratch) -> torch.Tensor:
        """Return scores, float32 [r, high − low]; see ``Columns.scores``."""
        r, n = len(rows), high - low
        width = table.shape[1]
        asked = scratch.take("rows", table.dtype, _bucket(r), width)
        torch.index_select(table, 0, rows, out=asked[:r])
        some = self._vectors[low : low + -(-n // _STEP) * _STEP]
        out = scratch.take("rough", table.dtype, len(asked), len(some))
        torch.mm(asked, some.T, out=out)
        return scratch.take("scores", torch.float32, r, n).copy_(out[:r, :n])


def _put_half_norms(rows: torch.Tensor, d: int, column: int) -> None:
    """Put −|x|²/2 of the first d numbers of each row into two columns."""
    half = rows[:, :d].float().square().sum(1).div_(-2)
    rows[:, column] = half
    rows[:, column + 1] = half - rows[:, column].float()


def _padded(d: int) -> int:
    return -(-(d + 4) // _WIDTH) * _WIDTH


def _bucket(rows: int) -> int:
    """Round up to a power of two; from 128 on to a multiple of 128 and of a 16th of the next power."""
    if rows <= _LARGE // 2:
        return max(_SMALL, 1 << (rows - 1).bit_length())
    step = max(_LARGE, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


class Scratch:
    """Reusable buffers: allocating memory costs more than the work done in it."""

    def __init__(self) -> None:
        self._kept = dict[str, Any]()

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """Return the uninitialised tensor ``name``, [rows, columns]."""
        size = rows * columns
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=dtype)
        found: torch.Tensor = self._kept[name][:size].view(rows, columns)
        return found


@contextlib.contextmanager
def one_thread_each(n: int) -> Iterator[Callable[[Callable[[T], R], Sequence[T]], list[R]]]:
    """Yield a ``map`` over n threads with one torch thread each: faster for many small products."""
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
    """Run products in the current thread alone; on exit restore torch's thread count ``others``."""
    before = faiss.omp_get_max_threads()
    _use_one_thread()
    try:
        yield
    finally:
        # Setting it in one thread also changes the default of threads started later.
        torch.set_num_threads(others)
        faiss.omp_set_num_threads(before)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@lru_cache(1)
def has_bfloat16() -> bool:
    """Check whether the processor multiplies bfloat16; False if unknown."""
    try:
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in _BFLOAT16)
    except OSError:
        return False


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
