"""k-means (Lloyd's iterations) in torch: blocked assignment by one matrix product, empty clusters re-seeded.

No centroid equals a vector to the bit, as centroids stay in a store when a chunk is erased (``_blur``).
Vectors, float32 or float16, are shifted by a mean before float32 sums and rough products (``ann.matmul``). An
iteration costs 2·n·k·d multiply-adds. Above ``TWO_LEVELS`` clusters, √k clusters are split in proportion to
their vectors: √k times cheaper, slightly worse. Deterministic for a seed and device up to rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from retrotool.ann.matmul import CentroidTable
from retrotool.lazy import torch

ReportShare = Callable[[float], object]  # takes the share of the work just done
TWO_LEVELS = 250_000
_BLOCK_ROWS = 1 << 12
_SPLIT = 1 / 1024  # relative distance between the halves of a split cluster, as in faiss
_BLUR = 1 / 256  # relative distance by which a centroid is moved off a vector: bfloat16 resolution
_ATTEMPTS = 100
_NO_ERROR = 1e-6  # relative squared distance to a centroid that is due to rounding of copies
_SEED = 5  # of the words that hash rows
_AWAY = 4.0  # how far an empty cluster is moved, in multiples of the largest centroid value


def assign(vectors: torch.Tensor, centroids: torch.Tensor, *, rough: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each vector's nearest centroid: squared distances, float32 [n], and indices, int64 [n]."""
    table = CentroidTable(centroids, rough=rough)
    distances = torch.empty(len(vectors), device=vectors.device)
    indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for part, shifted in table.blocks(vectors):
        score, indices[part] = table.scores(shifted).max(1)
        distances[part] = shifted.square().sum(1).sub_(score.float(), alpha=2)
    return distances.clamp_min_(0), indices


def kmeans(
    vectors: torch.Tensor,
    k: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    two_levels: int = TWO_LEVELS,
    report: ReportShare = lambda _: None,
) -> torch.Tensor:
    """Return centroids, float32 [k, d], of ``vectors`` [n, d], n ≥ k, starting from random vectors."""
    n = len(vectors)
    if not 1 <= k <= n:
        raise ValueError(f"k-means of {n} vectors into {k} clusters")
    if k > two_levels:
        return _two_levels(vectors, k, iterations, seed, report)
    generator = torch.Generator().manual_seed(seed)
    centroids = vectors[torch.randperm(n, generator=generator)[:k].to(vectors.device)].float()
    for _ in range(iterations):
        centroids, index, counts = _step(vectors, centroids)
        if not counts.all():  # a vector as centroid would attract only itself
            _fill_empty(centroids, counts, _errors(vectors, centroids, index), generator)
        report(1 / iterations)
    _blur(centroids, vectors, generator)
    return centroids


def _two_levels(vectors: torch.Tensor, k: int, iterations: int, seed: int, report: ReportShare) -> torch.Tensor:
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
    """Divide k clusters in proportion to ``counts``, giving no cluster more than its count."""
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
    """Return means, float32 [k, d] (of empty clusters the overall mean), vectors' clusters and sizes [k]."""
    table, sums = CentroidTable(centroids, rough=True), torch.zeros_like(centroids)
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for part, shifted in table.blocks(vectors):
        index[part] = table.scores(shifted).max(1).indices
        sums.index_add_(0, index[part], shifted)
    counts = torch.bincount(index, minlength=len(centroids))
    return sums / counts.clamp_min(1).unsqueeze(1) + table.mean, index, counts


def _errors(vectors: torch.Tensor, centroids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    errors = torch.zeros(len(centroids), device=vectors.device)
    for rows, to in zip(torch.split(vectors, _BLOCK_ROWS), torch.split(index, _BLOCK_ROWS), strict=True):
        errors.index_add_(0, to, (rows.float() - centroids[to]).square().sum(1))
    return errors


def _fill_empty(centroids: torch.Tensor, counts: torch.Tensor, errors: torch.Tensor, rng: torch.Generator) -> None:
    """Move centroids of empty clusters, in place: they split the clusters with the largest ``errors`` [k].

    If only copies of vectors are left, which can't be split, they move far away, so that none is probed.
    """
    empty = torch.nonzero(counts == 0).flatten()
    least = (_NO_ERROR * counts * centroids.square().sum(1)).tolist()
    heap = [(-e, i) for i, (e, n, low) in enumerate(zip(errors.tolist(), counts.tolist(), least, strict=True))
            if n > 1 and e > low]  # fmt: skip
    heapq.heapify(heap)
    donors: list[int] = []
    while heap and len(donors) < len(empty):
        error, cluster = heapq.heappop(heap)
        donors.append(cluster)
        if -error / 2 > least[cluster]:
            heapq.heappush(heap, (error / 2, cluster))
    to, donor = empty[: len(donors)], torch.tensor(donors, dtype=torch.int64, device=centroids.device)
    centroids[to] = centroids[donor] + _SPLIT * _signs(centroids[donor], rng)
    away = empty[len(donors) :]
    if len(away):
        full = centroids[counts > 0]
        radius = full.new_full((len(away), full.shape[1]), float(full.abs().max()) or 1.0)
        centroids[away] = full.mean(0) + _AWAY * _signs(radius, rng)


def _blur(centroids: torch.Tensor, vectors: torch.Tensor, rng: torch.Generator) -> None:
    """Move centroids that equal a vector as float16 (single vectors, or copies), in place.

    The move keeps the nearest centroids, and is rounded, so that the seed does not suffice to revert it.
    """
    for attempt in range(1, _ATTEMPTS):
        same = _same_rows(centroids, vectors)
        if not len(same):
            return
        moved = centroids[same] + attempt * _BLUR * _signs(centroids[same], rng)
        centroids[same] = moved.to(torch.bfloat16).float()
    raise ValueError(f"{len(same)} centroids can't be distinguished from vectors")


def _signs(rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return random signs times the size of each number, or times the row's RMS if that is larger."""
    usual = rows.square().mean(1, keepdim=True).sqrt()
    usual[usual == 0] = 1
    signs = 2 * torch.randint(0, 2, rows.shape, generator=rng).to(rows.device) - 1
    return torch.maximum(rows.abs(), usual) * signs


def _same_rows(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the indices, int64, of ``rows`` [k, d] that occur in ``others`` [n, d], compared as float16.

    Rows are compared by a sum of their numbers' bits times random odd words; a false hit moves a centroid.
    """
    words = torch.randint(-(1 << 62), 1 << 62, (rows.shape[1],), generator=torch.Generator().manual_seed(_SEED)) | 1
    words = words.to(rows.device)

    def hashed(some: torch.Tensor) -> torch.Tensor:
        half = some.to(torch.float16) + 0  # −0 is 0
        return (half.view(torch.int16).long() * words).sum(1)

    known = torch.cat([hashed(some) for some in torch.split(others, _BLOCK_ROWS)])
    return torch.isin(hashed(rows), known).nonzero().flatten()
