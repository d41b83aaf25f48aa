"""k-means in torch (Lloyd's iterations): blocked assignment by one matrix product, empty clusters re-seeded.

No centroid is one of the vectors, to the bit: centroids stay in a store when a chunk is erased, so its vector must not
be among them (``_blur``); that of a cluster of one vector is close to it. Vectors may be float16; they are shifted by a
mean before products and sums, which are float32, but products that only choose a cluster are rough (``ann.matmul``).

Cost of an iteration: 2·n·k·d multiply-adds. Above ``TWO_LEVELS`` clusters there are √k, each of which is cut into as
many as its share of the vectors: √k in place of k, for centroids that are somewhat worse. Deterministic from the seed
on one device up to the order of float sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from retrotool.ann.matmul import Table
from retrotool.lazy import torch

TWO_LEVELS = 250_000
_BLOCK_ROWS = 1 << 12
_SPLIT = 1 / 1024
"""By how much, relatively, the halves of a cluster that is split are moved apart; as faiss does."""
_BLUR = 1 / 256
"""By how much, relatively, a centroid is moved that is one of the vectors: a unit in the last place of bfloat16."""
_ATTEMPTS = 100
_NO_ERROR = 1e-6
"""Squared distance to a centroid, relative to its own length, that is the rounding of copies."""
_AWAY = 4.0
"""How far an empty cluster is moved, in the largest number of a centroid: nothing is nearest to it there."""


def assign(vectors: torch.Tensor, centroids: torch.Tensor, *, rough: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each vector, float32 or float16: squared distances float32 [n] and indices int64 [n].

    ``rough``: of centroids that are nearly as near, another one may be named.
    """
    shift = centroids.mean(0)
    table = centroids - shift
    # argmax of q·c − |c|²/2 is argmin of |q − c|²
    products = Table(table, -table.square().sum(1) / 2, rough=rough)
    distances = torch.empty(len(vectors), device=vectors.device)
    indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), products.rows):
        part = slice(start, start + products.rows)
        shifted = vectors[part].float().sub_(shift) if vectors.dtype != torch.float32 else vectors[part] - shift
        score, indices[part] = products.scores(shifted).max(1)
        distances[part] = shifted.square().sum(1).sub_(score.float(), alpha=2)
    return distances.clamp_min_(0), indices


def kmeans(
    vectors: torch.Tensor,
    k: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    two_levels: int = TWO_LEVELS,
    report: Callable[[float], object] = lambda _: None,
) -> torch.Tensor:
    """Centroids, float32 [k, d], of ``vectors`` [n, d], float32 or float16, n ≥ k; none is a vector, in either type.

    Starts from k vectors drawn at random. A cluster that loses all its vectors takes half of the one whose vectors lie
    farthest from their centroid, in sum: moved to one of the vectors it would keep that one to itself. ``report`` is
    told the share of the work that was just done.
    """
    n = len(vectors)
    if not 1 <= k <= n:
        raise ValueError(f"k-means of {n} vectors into {k} clusters")
    if k > two_levels:
        return _two_levels(vectors, k, iterations, seed, report)
    generator = torch.Generator().manual_seed(seed)
    centroids = vectors[torch.randperm(n, generator=generator)[:k].to(vectors.device)].float()
    for _ in range(iterations):
        centroids, index, counts = _step(vectors, centroids)
        if not counts.all():
            _fill_empty(centroids, counts, _errors(vectors, centroids, index), generator)
        report(1 / iterations)
    _blur(centroids, vectors, generator)
    return centroids


def _two_levels(
    vectors: torch.Tensor, k: int, iterations: int, seed: int, report: Callable[[float], object]
) -> torch.Tensor:
    upper = kmeans(vectors, round(k**0.5), iterations=iterations, seed=seed, report=lambda share: report(share / 2))
    index = assign(vectors, upper)[1]
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=len(upper))
    found = []
    for number, (rows, share) in enumerate(zip(torch.split(order, counts.tolist()), _shares(counts, k), strict=True)):
        if share:
            found.append(kmeans(vectors[rows], share, iterations=iterations, seed=seed + 1 + number, two_levels=k))
        report(0.5 / len(upper))
    return torch.cat(found)


def _shares(counts: torch.Tensor, k: int) -> list[int]:
    """How many of k clusters each of some clusters is cut into: in proportion to its vectors, not more than these."""
    n = int(counts.sum())
    exact = [k * count / n for count in counts.tolist()]
    shares = [min(int(share), count) for share, count in zip(exact, counts.tolist(), strict=True)]
    by_rest = sorted(range(len(shares)), key=lambda i: shares[i] - exact[i])
    while sum(shares) < k:
        for i in by_rest:
            if sum(shares) < k and shares[i] < counts[i]:
                shares[i] += 1
    return shares


def _step(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of the clusters, float32 [k, d], of an empty one that of the centroids; the vectors' clusters; sizes [k].

    Block by block, so that vectors are read once, and added up while they are in the cache.
    """
    k = len(centroids)
    shift = centroids.mean(0)
    table = centroids - shift
    products = Table(table, -table.square().sum(1) / 2, rough=True)
    sums = torch.zeros_like(centroids)
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), products.rows):
        part = slice(start, start + products.rows)
        shifted = vectors[part].float() - shift
        index[part] = products.scores(shifted).max(1).indices
        sums.index_add_(0, index[part], shifted)
    counts = torch.bincount(index, minlength=k)
    return sums / counts.clamp_min(1).unsqueeze(1) + shift, index, counts


def _errors(vectors: torch.Tensor, centroids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Summed squared distances of each cluster's vectors to its centroid, float32 [k]."""
    errors = torch.zeros(len(centroids), device=vectors.device)
    for rows, to in zip(torch.split(vectors, _BLOCK_ROWS), torch.split(index, _BLOCK_ROWS), strict=True):
        errors.index_add_(0, to, (rows.float() - centroids[to]).square().sum(1))
    return errors


def _fill_empty(
    centroids: torch.Tensor, counts: torch.Tensor, errors: torch.Tensor, generator: torch.Generator
) -> None:
    """Move the centroids of empty clusters beside those of clusters with the largest ``errors`` [k], in place.

    A cluster is split again once half of its error is the largest. Copies of one vector have no error: they can't be
    split. What is still empty then goes far away, for a second centroid at copies would be probed in place of theirs.
    """
    empty = torch.nonzero(counts == 0).flatten()
    least = (_NO_ERROR * counts * centroids.square().sum(1)).tolist()
    heap = [(-e, i) for i, (e, n, low) in enumerate(zip(errors.tolist(), counts.tolist(), least, strict=True))
            if n > 1 and e > low]  # fmt: skip
    heapq.heapify(heap)
    donors: list[int] = []
    while heap and len(donors) < len(empty):
        error, cluster = heap[0]
        donors.append(cluster)
        if -error / 2 > least[cluster]:
            heapq.heapreplace(heap, (error / 2, cluster))
        else:
            heapq.heappop(heap)
    to, donor = empty[: len(donors)], torch.tensor(donors, dtype=torch.int64, device=centroids.device)
    centroids[to] = centroids[donor] + _SPLIT * _signs(centroids[donor], generator)
    away = empty[len(donors) :]
    if len(away):
        full = centroids[counts > 0]
        radius = full.abs().max()
        radius = torch.where(radius > 0, radius, torch.ones_like(radius))
        centroids[away] = full.mean(0) + _AWAY * _signs(radius.expand(len(away), full.shape[1]), generator)


def _blur(centroids: torch.Tensor, vectors: torch.Tensor, generator: torch.Generator) -> None:
    """Move every centroid that is one of ``vectors``, as float16 has them, off it, in place.

    That is the mean of a cluster of one vector, or of copies of one: what many documents begin with, say. The move is
    too small to change which centroid is nearest. It is rounded, so that who knows the seed can't take it back exactly.
    """
    for attempt in range(1, _ATTEMPTS):
        same = torch.from_numpy(_same_rows(centroids, vectors)).to(centroids.device)
        if not len(same):
            return
        moved = centroids[same] + attempt * _BLUR * _signs(centroids[same], generator)
        centroids[same] = moved.to(torch.bfloat16).float()
    raise ValueError(f"{len(same)} centroids can't be told from vectors")


def _signs(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random signs times the size of each number of ``rows``, or times the usual size in its row if that is larger."""
    usual = rows.square().mean(1, keepdim=True).sqrt()
    usual[usual == 0] = 1
    signs = 2 * torch.randint(0, 2, rows.shape, generator=generator).to(rows.device) - 1
    return torch.maximum(rows.abs(), usual) * signs


def _same_rows(rows: torch.Tensor, others: torch.Tensor) -> npt.NDArray[np.int64]:
    """Which of ``rows`` [k, d] are among ``others`` [n, d] as float16 has both, int64."""

    def halves(some: torch.Tensor) -> list[bytes]:
        half: npt.NDArray[np.float16] = (some.to(torch.float16) + 0).cpu().numpy()  # −0 is 0
        return [row.tobytes() for row in half]

    own = halves(rows)
    known = set(own)
    found = {key for some in torch.split(others, _BLOCK_ROWS) for key in halves(some) if key in known}
    return np.flatnonzero([key in found for key in own])
