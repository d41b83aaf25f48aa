"""Search vectors that lie in the memory of a GPU, list after list: exact within the lists that are probed.

All queries of a block go through their lists together, in three steps:

1. *Scan.* A list is cut into strips of ``STRIP`` neighbouring vectors. Of a query and a strip only the best
   score is kept, with the query's own document left out. Nothing is selected, so nothing waits for the
   device.
2. *Choose.* The k best vectors of a query lie in the k strips whose best scores are best.
3. *Rank.* Σ(q − x)² in float32 for all vectors of these strips; of equal distances the least id is first.

Products of float16 are exact in float32, so that scores of stored vectors are as good as float32's at the
rate of float16; a few strips more than k are ranked to make up for rounded sums. Steps 1 and 3 are a launch
each in ``resident_kernels``; without Triton, and on a CPU, they are a product per list and a gather. A block
of queries waits for the device twice, whatever its size.

Results are copied to the host while the next block is prepared and computed. Vectors are loaded through
pinned buffers, which a thread fills.

Cost: 2·d operations per query and vector in its lists. Memory: 2·d + 16 bytes per vector, and for each query
of a block 8 bytes per strip and 80 per list that it probes. Vectors that must not be found are not loaded.
Repeated documents (``Excluded.repeats``) are not supported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrotool.ann import kmeans
from retrotool.ann.codes import Whole
from retrotool.ann.excluded import Ids, Queries
from retrotool.ann.lists import Trained
from retrotool.ann.ranking import Best
from retrotool.lazy import torch
from retrotool.read_ahead import ahead

if TYPE_CHECKING:
    from retrotool.ann.resident_kernels import TritonKernels

STRIP = 16
_SPARE = 4  # strips, for the rounding of sums
_EXACT_LIST = 1 << 12  # vectors of a list if all are searched
_MOST_QUERIES = 1 << 17  # of a block: more would not be faster
_LEAST_QUERIES = 1 << 8
_UPPER_PROBED = 32  # lists of centroids
_MOST_SCORES = 1 << 27  # of lists at a time
_WIDTHS = 64  # strips that the widths of tables are multiples of, so that blocks use the same memory again
_COPYING = 4  # threads: one copies 9 GB/s or so
_GATHERED = 1 << 26  # numbers of vectors that are gathered at a time without Triton
_ON_CPU = 1 << 28  # bytes for a block of queries
_RANK = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Probes:
    """The pairs of a query and a list that it probes, [q, p] each, and the same pairs by list.

    ``offset`` and ``end``: columns of a pair's strips in the table of best scores, which has ``width``
    columns. ``pairs`` int64 [q · p] are in the order of their lists; those of list i are ``bounds[i]`` to
    ``bounds[i + 1]``, also on the host (``bounds_here``).
    """

    lists: torch.Tensor
    offset: torch.Tensor
    end: torch.Tensor
    pairs: torch.Tensor
    bounds: torch.Tensor
    bounds_here: list[int]
    width: int


class Centroids:
    """The centroids of a training and its rotation on a device.

    More than ``TWO_LEVELS`` are themselves searched through lists, √n for n centroids, of which each vector
    probes ``_UPPER_PROBED``: for a million, a 30th of the products, and nearly always the same centroids.
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        assert trained.centroids is not None
        table = torch.from_numpy(trained.centroids).to(device)
        self._mean = table.mean(0)
        table = table - self._mean  # to lose fewer digits
        self._table, self._halves = table.half(), table.square().sum(1).div_(2)
        self._rotation = None if trained.rotation is None else torch.from_numpy(trained.rotation).to(device)
        self._upper = _in_lists(table) if len(table) > kmeans.TWO_LEVELS else None

    def __len__(self) -> int:
        return len(self._table)

    def nearest(self, asked: torch.Tensor, nprobe: int) -> torch.Tensor:
        """Return the nearest lists of float32 [q, d], int64 [q, nprobe], nearest first up to rounding."""
        none = torch.empty(0, nprobe, dtype=torch.int64, device=asked.device)
        blocks = torch.split(asked, _MOST_QUERIES if self._upper else max(1, _MOST_SCORES // len(self)))
        turned = (some if self._rotation is None else some @ self._rotation.T for some in blocks)
        return torch.cat([none, *(self.nearest_turned(some, nprobe) for some in turned)])

    def nearest_turned(self, turned: torch.Tensor, nprobe: int) -> torch.Tensor:
        """Return the same of vectors that are rotated already, of one block."""
        centred = turned - self._mean
        if self._upper is None:
            return k_largest(product(centred.half(), self._table).sub_(self._halves), nprobe)[1]
        ids = torch.from_numpy(self._upper.search(Queries.plain(centred.cpu().numpy()), nprobe, _UPPER_PROBED).ids)
        found = ids.to(turned.device)
        if (short := (found < 0).any(1)).any():  # more lists are wanted than the upper ones have
            scores = product(centred[short].half(), self._table).sub_(self._halves)
            found[short] = k_largest(scores, nprobe)[1]
        return found


def _in_lists(table: torch.Tensor) -> ResidentLists:
    """Return centroids, float32 [n, d] around 0, in √n lists on their device; ids are their numbers."""
    upper = kmeans.kmeans(table, math.isqrt(len(table)))
    numbers = kmeans.assign(table, upper)[1].cpu().numpy()
    trained = Trained(table.shape[1], Whole(table.shape[1]), upper.cpu().numpy(), None, len(upper))
    blocks = [table.half().cpu().numpy()]
    lists = Centroids(trained, table.device)
    return ResidentLists(lists, numbers, np.arange(len(table)), blocks, str(table.device))


class ResidentLists:
    """Vectors float16 [n, d] on a device, list after list, ids ascending in each.

    ``halves`` [n]: half of each squared length. ``ranks`` int32 [n]: the place of each vector's id among the
    ascending ``ids`` int64 [n]. ``starts`` int64 [lists + 1]. Without centroids, lists are just steps of a
    complete search. ``why_slow``: why kernels in Triton are not used, on a GPU.
    """

    def __init__(
        self,
        centroids: Centroids | None,
        numbers: npt.NDArray[np.integer] | None,
        ids: Ids,
        blocks: Iterable[npt.NDArray[np.float16]],
        device: str,
        kernels: TorchKernels | TritonKernels | None = None,
    ) -> None:
        """Load vectors of ascending ``ids`` [n] from blocks in that order; ``numbers`` [n]: their lists."""
        self.device, self._centroids = torch.device(device), centroids
        self.ids = upload(ids, self.device)
        n = len(ids)
        if numbers is None:
            order = place = None
            steps = np.append(np.arange(0, n, _EXACT_LIST), n)
            self.starts = torch.from_numpy(steps).to(self.device)
            self.ranks = torch.arange(n, dtype=torch.int32, device=self.device)
        else:
            assert centroids is not None
            listed = torch.from_numpy(numbers).to(self.device)
            ordered, order = torch.sort(listed, stable=True)
            place = torch.empty_like(order)
            place[order] = torch.arange(n, device=self.device)
            self.starts = torch.searchsorted(
                ordered, torch.arange(len(centroids) + 1, dtype=listed.dtype, device=self.device)
            )
            self.ranks = order.int()
            del listed, ordered, order
        self.vectors: torch.Tensor = torch.empty(0, 0, dtype=torch.float16, device=self.device)
        done = 0
        for some in uploads(blocks, self.device):
            if not done:
                self.vectors = torch.empty(n, some.shape[1], dtype=torch.float16, device=self.device)
                self.halves = torch.empty(n, device=self.device)
            at = slice(done, done + len(some)) if place is None else place[done : done + len(some)]
            self.vectors[at], self.halves[at] = some, some.float().square().sum(1).div_(2)
            done += len(some)
        self.d = int(self.vectors.shape[1])
        # Strips of each list; and starts on the host, for products per list.
        self.strips = torch.div(self.starts.diff() + STRIP - 1, STRIP, rounding_mode="floor")
        self.starts_here: list[int] = self.starts.tolist()
        self.n_lists = len(self.starts_here) - 1
        # Of the list of a vector, on average: queries are near many vectors, so they probe long lists.
        sizes = np.diff(self.starts_here) / STRIP + 1
        self._usual_strips = float(np.square(sizes).sum() / sizes.sum()) if len(sizes) else 0.0
        self._kernels, self.why_slow = (kernels, "") if kernels else pick_kernels(self.device, self.d)

    def __len__(self) -> int:
        return len(self.ids)

    def search(
        self,
        queries: Queries,
        k: int,
        nprobe: int = 0,
        beyond: int = 0,
        say: Callable[[str], object] = lambda _: None,
        probed: Ids | None = None,
    ) -> Best:
        """Return the k nearest vectors of each query in its nearest lists, without the nearest ``beyond``.

        ``probed`` [q, nprobe]: the lists of each query; by default the nearest.

        If memory runs out, blocks of queries are halved, and ``say`` gets a message;
        ``torch.OutOfMemoryError`` if that does not help.
        """
        assert queries.excluded.repeats is None, "left to a search on the CPU"
        best = Best.nothing(len(queries), k)
        nprobe = min(nprobe, self.n_lists) if self._centroids is not None else self.n_lists
        if not len(self) or not len(queries) or beyond >= nprobe:
            return best
        start, size = 0, self._block_size(k, nprobe)
        waiting: list[Callable[[], None]] = []  # write results that are still being computed
        while start < len(queries):
            rows = slice(start, min(start + size, len(queries)))
            try:
                waiting.append(self._search(queries.take(rows), rows, k, nprobe, beyond, probed, best))
                start = rows.stop
            except torch.OutOfMemoryError:
                size = (rows.stop - rows.start) // 2
                if size < _LEAST_QUERIES:
                    raise
            if start < rows.stop:  # not above, where the error holds what was allocated
                torch.cuda.empty_cache()
                say(f"{self.device} is out of memory: continuing with {size:,} queries at a time")
            elif len(waiting) > 1:
                waiting.pop(0)()
        for put in waiting:
            put()
        return best

    def _block_size(self, k: int, nprobe: int) -> int:
        """Return the number of queries that are searched at a time."""
        free = free_memory(self.device) // 2 if self.device.type == "cuda" else _ON_CPU
        strips = nprobe * self._usual_strips
        each = 8 * strips + 80 * nprobe + 12 * self.d + (16 * STRIP + 256) * (k + _SPARE)
        # Best scores are fewer than 2^31, so that no operator has to divide them.
        return max(_LEAST_QUERIES, min(_MOST_QUERIES, int(free / each), int(_RANK / strips)))

    def _search(
        self, queries: Queries, rows: slice, k: int, nprobe: int, beyond: int, probed: Ids | None, found: Best
    ) -> Callable[[], None]:
        """Begin a search for ``rows`` of all queries; return what waits for it and writes to ``found``."""
        vectors = upload(queries.vectors, self.device)
        asked, halves = vectors.float(), vectors.half()
        own = self._own_ranks(queries)
        probes = self._probe(asked, nprobe, beyond, None if probed is None else upload(probed[rows], self.device))
        best = torch.full((len(asked), probes.width), -math.inf, device=self.device)
        self._kernels.scan(self, halves, own, probes, best)
        scores, strip = k_largest(best, min(k + _SPARE, probes.width))
        del best
        # Which list each chosen strip is of, and where it begins.
        which = torch.searchsorted(probes.end, strip, right=True).clamp_(max=probes.lists.shape[1] - 1)
        number = probes.lists.gather(1, which)
        first = self.starts[number] + STRIP * (strip - probes.offset.gather(1, which))
        end = torch.where(scores > -math.inf, self.starts[number + 1], 0)
        keys = self._kernels.rank(self, asked, own, first, end)
        near = keys.topk(min(k, keys.shape[1]), largest=False, sorted=True).values  # of [q, ≤ k]
        distances = (near >> 32).int().view(torch.float32)
        ids = torch.where(distances < math.inf, self.ids[near & _RANK], -1)
        here = [some.to("cpu", non_blocking=True) for some in (distances, ids)]  # pinned
        done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def put() -> None:
            if done is not None:
                done.synchronize()
            found.put((rows, slice(here[1].shape[1])), Best(*(some.numpy() for some in here)))

        return put

    def _own_ranks(self, queries: Queries) -> torch.Tensor:
        """Return the least and the highest rank that each query must not find, int32 [2, q]."""
        first, last = (upload(ends, self.device) for ends in (queries.excluded.first, queries.excluded.last))
        low = torch.searchsorted(self.ids, first, out_int32=True)
        return torch.stack([low, torch.searchsorted(self.ids, last, right=True, out_int32=True) - 1])

    def _probe(self, asked: torch.Tensor, nprobe: int, beyond: int, given: torch.Tensor | None) -> Probes:
        """Choose the lists of each query, unless they are ``given``."""
        if given is not None:
            lists = given
        elif self._centroids is None:
            lists = torch.arange(self.n_lists, device=self.device).expand(len(asked), -1)
        else:
            lists = self._centroids.nearest(asked, nprobe)[:, beyond:]
        strips = self.strips[lists]
        end = strips.cumsum(1)
        flat, pairs = torch.sort(lists.flatten().int(), stable=True)
        bounds = torch.searchsorted(flat, torch.arange(self.n_lists + 1, dtype=torch.int32, device=self.device))
        width, *bounds_here = torch.cat([end[:, -1:].amax().view(1), bounds]).tolist()  # waits for the device
        width = max(1, -(-width // _WIDTHS)) * _WIDTHS
        return Probes(lists, end - strips, end, pairs, bounds, bounds_here, width)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, or kept by torch for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Return a copy of an array on a device; the host does not wait for a GPU's."""
    return _pinned(array, device).to(device, non_blocking=True)


def uploads(blocks: Iterable[npt.NDArray[np.float16]], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield copies of blocks on a device; a thread reads ahead, others copy to pinned memory.

    torch uses that memory again once its copy has ended: some three blocks are allocated.
    """
    with (
        ThreadPoolExecutor(_COPYING) as threads,
        contextlib.closing(ahead(blocks, 1)) as read,
        contextlib.closing(ahead((_pinned(block, device, threads.map) for block in read), 1)) as pinned,
    ):
        for block in pinned:
            yield block.to(device, non_blocking=True)


def _pinned(array: npt.NDArray[np.generic], device: torch.device, do: Callable[..., Any] = map) -> torch.Tensor:
    """Return a copy of an array in memory from which a GPU copies by itself; ``do`` maps over pieces."""
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    here = torch.empty(array.shape, dtype=kind, pin_memory=device.type == "cuda")
    list(do(np.copyto, np.array_split(here.numpy(), _COPYING), np.array_split(array, _COPYING)))
    return here


def product(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return rows · tableᵀ, float32 [q, n], of float16 [q, d] and [n, d], summed in float32."""
    if rows.device.type == "cuda":
        return torch.mm(rows, table.T, out_dtype=torch.float32)
    return rows.float() @ table.float().T


def k_largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest scores of each row of [m, n] and their columns, as ``topk``, largest first.

    ``topk`` reads everything several times; this reads it once, as the k largest lie in the k groups of
    columns with the largest maxima. A group is every n-th column.
    """
    n = scores.shape[1]
    width = next((width for width in (32, 16, 8) if n >= 4 * k * width), 0)
    if not width:
        return scores.topk(k)
    step = n // width
    groups = scores[:, : step * width].view(-1, width, step)
    best = groups.amax(1).topk(k, sorted=False).indices
    some = groups.gather(2, best[:, None].expand(-1, width, -1)).flatten(1)
    values, at = torch.cat([some, scores[:, step * width :]], 1).topk(k)
    columns = torch.div(at, k, rounding_mode="floor") * step + best.gather(1, at % k)
    return values, torch.where(at < width * k, columns, at + (step - k) * width)


class TorchKernels:
    """The two steps of a search that touch vectors, in torch: for a CPU and where there is no Triton."""

    def scan(
        self, lists: ResidentLists, asked: torch.Tensor, own: torch.Tensor, probes: Probes, best: torch.Tensor
    ) -> None:
        """Write the best score of each query and strip to ``best``, float32 [q, width], filled with −inf.

        Do a product per list.
        """
        bounds, offsets = probes.bounds_here, probes.offset.flatten()
        for number, (start, stop) in enumerate(pairwise(lists.starts_here)):
            pairs = probes.pairs[bounds[number] : bounds[number + 1]]
            if start == stop or not len(pairs):
                continue
            rows = torch.div(pairs, probes.lists.shape[1], rounding_mode="floor")
            scores = product(asked[rows], lists.vectors[start:stop]).sub_(lists.halves[start:stop])
            low, high = own[:, rows].unsqueeze(2)
            ranks = lists.ranks[start:stop]
            scores.masked_fill_((ranks >= low) & (ranks <= high), -math.inf)
            strips = -(-(stop - start) // STRIP)
            scores = torch.nn.functional.pad(scores, (0, strips * STRIP - (stop - start)), value=-math.inf)
            columns = offsets[pairs, None] + torch.arange(strips, device=best.device)
            best[rows[:, None], columns] = scores.view(len(rows), strips, STRIP).amax(2)

    def rank(
        self, lists: ResidentLists, asked: torch.Tensor, own: torch.Tensor, first: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Return keys, int64 [q, depth · STRIP], that sort the vectors of strips by distance, then by rank.

        Distances are not negative, so their bits are in their order. Strips begin at ``first`` [q, depth] and
        go no further than ``end``; +inf for what is not there or own. Gather some vectors at a time.
        """
        size = max(1, _GATHERED // (first.shape[1] * STRIP * lists.d))
        found = []
        for start in range(0, len(asked), size):
            block = slice(start, start + size)
            some, begin, stop, (low, high) = asked[block], first[block], end[block], own[:, block, None]
            rows = begin[:, :, None] + torch.arange(STRIP, device=begin.device)
            there = (rows < stop[:, :, None]).flatten(1)
            rows = rows.flatten(1).clamp_(0, len(lists) - 1)
            ranks = lists.ranks[rows]
            there &= (ranks < low) | (ranks > high)
            apart = (lists.vectors[rows].float() - some[:, None]).square_().sum(2)
            found.append(torch.where(there, apart, math.inf).view(torch.int32).long() << 32 | ranks.long())
        return torch.cat(found)


@lru_cache
def pick_kernels(device: torch.device, d: int) -> tuple[TorchKernels | TritonKernels, str]:
    """Return the kernels in Triton on a GPU if they work there, else those in torch, and why."""
    if device.type != "cuda":
        return TorchKernels(), ""
    try:
        from retrotool.ann.resident_kernels import TritonKernels

        if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            return TorchKernels(), f"its compute capability, {capability}, is below 8.0"
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(_EXACT_LIST + 200, d)).astype(np.float16)
        queries, ids = Queries.plain(rows[:300].astype(np.float32)), np.arange(len(rows))
        right, found = (
            ResidentLists(None, None, ids, [rows], str(device), kernels).search(queries, 8).distances
            for kernels in (TorchKernels(), TritonKernels())
        )
        if np.allclose(found, right, rtol=1e-3, atol=1e-3):
            return TritonKernels(), ""
        why = "its kernels find other neighbours"
    except Exception as error:  # no Triton, no compiler, or a GPU that it does not know
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    return TorchKernels(), why
