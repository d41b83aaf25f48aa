"""The scan and the ranking of ``resident`` in Triton, one launch each.

``_scan``: a program takes a tile of ``_ROWS`` pairs of one list through all vectors of the list, ``_COLUMNS``
at a time, on tensor cores. It finds its list by binary search among the tiles of all lists, so that the
number of programs, an upper bound, is known without waiting for the device. ``_rank``: a program takes one
strip. Both are compiled once: sizes that differ between blocks of queries are not specialised.

``TRITON_INTERPRET=1`` runs both on a CPU. No atomics: results do not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from retrotool.ann.resident import STRIP, Probes, ResidentLists

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
_RANK_DEPTH = 256
OPTIONS = {
    "_scan": {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True},
    "_rank": {"num_warps": 4, "enable_fp_fusion": True},
}
CONSTANTS = {
    "_scan": {"M": _ROWS, "N": _COLUMNS, "K": _DEPTH, "S": STRIP},
    "_rank": {"K": _RANK_DEPTH, "S": STRIP},
}


@triton.jit(do_not_specialize=["lists", "width", "queries", "per_query"])
def _scan(
    q, x, halves, ranks, own, pairs, offset, bounds,
    starts, tiles, best, lists, width, queries, per_query, d,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < tl.load(tiles + lists):
        # The list of this tile is the last one that begins at or before it.
        a, b = 0, lists
        while b - a > 1:
            middle = (a + b) // 2
            if tl.load(tiles + middle) <= tile:
                a = middle
            else:
                b = middle
        place = tl.load(bounds + a) + (tile - tl.load(tiles + a)) * M + tl.arange(0, M)
        there = place < tl.load(bounds + a + 1)
        pair = tl.load(pairs + place, mask=there, other=0)
        row = pair // per_query
        least, most = tl.load(own + row), tl.load(own + queries + row)
        out = best + row.to(tl.int64) * width + tl.load(offset + pair, mask=there, other=0)
        first, last = tl.load(starts + a), tl.load(starts + a + 1)
        for n in range(first, last, N):
            column = n + tl.arange(0, N)
            inside = column < last
            scores = tl.zeros((M, N), tl.float32)
            for k in range(0, d, K):
                depth = k + tl.arange(0, K)
                asked = tl.load(
                    q + row.to(tl.int64)[:, None] * d + depth[None, :], mask=(depth < d)[None, :], other=0.0
                )
                held = tl.load(
                    x + column.to(tl.int64)[:, None] * d + depth[None, :],
                    mask=inside[:, None] & (depth < d)[None, :],
                    other=0.0,
                )
                scores = tl.dot(asked, tl.trans(held), scores)
            scores -= tl.load(halves + column, mask=inside, other=float("inf"))[None, :]
            rank = tl.load(ranks + column, mask=inside, other=-1)
            hidden = (rank[None, :] >= least[:, None]) & (rank[None, :] <= most[:, None])
            scores = tl.where(hidden, float("-inf"), scores)
            strip = (n - first) // S + tl.arange(0, N // S)
            kept = there[:, None] & (first + strip * S < last)[None, :]
            tl.store(out[:, None] + strip[None, :], tl.max(tl.reshape(scores, (M, N // S, S)), 2), mask=kept)


@triton.jit(do_not_specialize=["queries", "depth"])
def _rank(q, x, ranks, own, first, end, keys, queries, depth, d, K: tl.constexpr, S: tl.constexpr):
    strip = tl.program_id(0)
    row = strip // depth
    place = tl.load(first + strip) + tl.arange(0, S)
    there = place < tl.load(end + strip)
    rank = tl.load(ranks + place, mask=there, other=0)
    apart = tl.zeros((S,), tl.float32)
    for k in range(0, d, K):
        inner = k + tl.arange(0, K)
        asked = tl.load(q + row.to(tl.int64) * d + inner, mask=inner < d, other=0.0)
        held = tl.load(
            x + place.to(tl.int64)[:, None] * d + inner[None, :], mask=there[:, None] & (inner < d)[None, :], other=0.0
        )
        step = held.to(tl.float32) - asked[None, :]
        apart += tl.sum(step * step, 1)
    there &= (rank < tl.load(own + row)) | (rank > tl.load(own + queries + row))
    bits = tl.where(there, apart, float("inf")).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(keys + strip.to(tl.int64) * S + tl.arange(0, S), (bits << 32) | rank.to(tl.int64))


class TritonKernels:
    """``resident.TorchKernels`` in Triton."""

    def scan(
        self, lists: ResidentLists, asked: torch.Tensor, own: torch.Tensor, probes: Probes, best: torch.Tensor
    ) -> None:
        """Launch ``_scan``."""
        bounds = probes.bounds
        tiles = torch.nn.functional.pad(((bounds.diff() + _ROWS - 1) // _ROWS).cumsum(0), (1, 0))
        most = triton.cdiv(probes.pairs.numel(), _ROWS) + lists.n_lists
        with torch.cuda.device_of(best):
            _scan[(most,)](
                asked, lists.vectors, lists.halves, lists.ranks, own, probes.pairs, probes.offset, bounds,
                lists.starts, tiles, best, lists.n_lists, best.shape[1], len(asked), probes.lists.shape[1], lists.d,
                **CONSTANTS["_scan"], **OPTIONS["_scan"],
            )  # fmt: skip

    def rank(
        self, lists: ResidentLists, asked: torch.Tensor, own: torch.Tensor, first: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """Launch ``_rank``."""
        keys = torch.empty(len(asked), first.shape[1] * STRIP, dtype=torch.int64, device=asked.device)
        with torch.cuda.device_of(keys):
            _rank[(first.numel(),)](
                asked, lists.vectors, lists.ranks, own, first, end, keys, len(asked), first.shape[1], lists.d,
                **CONSTANTS["_rank"], **OPTIONS["_rank"],
            )  # fmt: skip
        return keys
