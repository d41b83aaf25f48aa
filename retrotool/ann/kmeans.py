"""k-means in torch (Lloyd's iterations): blocked assignment by one matrix product, empty clusters re-seeded.

Cost of an iteration: 2·n·k·d multiply-adds. Deterministic from the seed on one device up to the order of float sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCK_ENTRIES = 1 << 25


def assign(vectors: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each vector: squared distances float32 [n] and indices int64 [n]."""
    import torch

    half_norms = centroids.square().sum(1) / 2
    block = max(1, _BLOCK_ENTRIES // len(centroids))
    found = []
    for rows in torch.split(vectors, block):
        # argmax of q·c − |c|²/2 is argmin of |q − c|²
        score, index = torch.addmm(-half_norms, rows, centroids.T).max(1)
        found.append((rows.square().sum(1) - 2 * score, index))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances).clamp_min(0), torch.cat(indices)


def kmeans(vectors: torch.Tensor, k: int, *, iterations: int = 10, seed: int = 0) -> torch.Tensor:
    """Centroids, float32 [k, d], of ``vectors``, float32 [n, d], n ≥ k.

    Starts from k vectors drawn at random. A cluster that loses all its vectors is moved to one of the vectors
    that lie farthest from their centroids.
    """
    import torch

    n, d = vectors.shape
    if not 1 <= k <= n:
        raise ValueError(f"k-means of {n} vectors into {k} clusters")
    generator = torch.Generator().manual_seed(seed)
    centroids = vectors[torch.randperm(n, generator=generator)[:k].to(vectors.device)].clone()
    for _ in range(iterations):
        distances, index = assign(vectors, centroids)
        counts = torch.bincount(index, minlength=k)
        sums = torch.zeros(k, d, device=vectors.device).index_add_(0, index, vectors)
        centroids = sums / counts.clamp_min(1).unsqueeze(1)
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            centroids[empty] = vectors[distances.topk(len(empty)).indices]
    return centroids
