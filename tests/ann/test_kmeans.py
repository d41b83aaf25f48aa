"""k-means against naive computations and faiss."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ann.kmeans import _shares, assign, kmeans


def random_vectors(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float16)


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(20, d)) * 4
    return (centers[rng.integers(0, 20, n)] + rng.normal(size=(n, d))).astype(np.float16)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), st.integers(0, 100))
def test_assignment_is_to_the_nearest_centroid(n: int, k: int, d: int, seed: int) -> None:
    vectors = torch.from_numpy(random_vectors(n, d, seed).astype(np.float32))
    centroids = torch.from_numpy(random_vectors(k, d, seed + 1).astype(np.float32))
    distances, index = assign(vectors, centroids)
    exact = torch.cdist(vectors.double(), centroids.double()).square()
    assert torch.allclose(distances.double(), exact.min(1).values, atol=1e-4)
    assert torch.allclose(exact[torch.arange(n), index], exact.min(1).values, atol=1e-4)


def test_kmeans_is_as_good_as_that_of_faiss_and_deterministic() -> None:
    vectors = clustered(4000, 16, 0).astype(np.float32)
    ours = kmeans(torch.from_numpy(vectors), 64, iterations=10)
    theirs = faiss.Kmeans(16, 64, niter=10, seed=1, min_points_per_centroid=1)
    theirs.train(vectors)
    error = assign(torch.from_numpy(vectors), ours)[0].mean()
    reference = assign(torch.from_numpy(vectors), torch.from_numpy(theirs.centroids))[0].mean()
    assert error <= 1.05 * reference
    assert torch.equal(ours, kmeans(torch.from_numpy(vectors), 64, iterations=10))


def test_kmeans_leaves_no_cluster_empty_while_there_are_vectors_to_take() -> None:
    vectors = torch.cat([torch.zeros(100, 4), torch.eye(4) * 10, torch.eye(4) * -7])
    centroids = kmeans(vectors, 8, iterations=10)
    assert len(torch.unique(assign(vectors, centroids)[1])) == 8
    with pytest.raises(ValueError, match="5 vectors into 6"):
        kmeans(torch.zeros(5, 2), 6)


def same_bytes(centroids: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Whether any centroid is a vector to the bit, in float32 or float16."""
    return any(
        not {row.tobytes() for row in centroids.to(kind).numpy()}.isdisjoint(
            row.tobytes() for row in vectors.to(kind).numpy()
        )
        for kind in (torch.float32, torch.float16)
    )


@pytest.mark.parametrize("k", [16, 128, 560, 600])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_no_centroid_is_a_vector(k: int, spread: float) -> None:
    """Neither that of a cluster of one, nor of copies; with many clusters, and where nothing can be split."""
    rng = np.random.default_rng(k)
    one = np.zeros((1, 16)) + rng.normal(size=(1, 16)).round()
    copies = one + spread * np.repeat(rng.normal(size=(6, 16)), 50, axis=0)
    vectors = torch.from_numpy(
        np.concatenate([copies, one + spread * clustered(300, 16, k)]).astype(np.float16)
    ).float()
    centroids = kmeans(vectors, k)
    assert torch.isfinite(centroids).all()
    assert not same_bytes(centroids, vectors)
    assert torch.equal(centroids, kmeans(vectors, k)), "from the seed"
    if spread and k == 600:
        assert (assign(vectors, centroids)[0] <= 0.001 * vectors.square().sum(1)).all(), "it is hardly moved"


def test_kmeans_does_not_spend_clusters_on_copies() -> None:
    """Half of the vectors are copies of five: the clusters that begin on copies go to where vectors differ."""
    vectors = clustered(2000, 16, 0).astype(np.float32)
    some = torch.from_numpy(np.concatenate([vectors, np.repeat(vectors[:5], 400, axis=0)]))
    ours = kmeans(some, 128)
    theirs = faiss.Kmeans(16, 128, niter=10, seed=1, min_points_per_centroid=1)
    theirs.train(some.numpy())
    assert assign(some, ours)[0].mean() <= 1.02 * assign(some, torch.from_numpy(theirs.centroids))[0].mean()


def test_what_vectors_have_in_common_costs_no_digits() -> None:
    vectors = torch.from_numpy(clustered(3000, 16, 4)).float() * 0.02
    far = vectors.clone()
    far[:, 0] = 1000
    plain = assign(vectors, kmeans(vectors, 32))[0].mean()
    distances, index = assign(far, (centroids := kmeans(far, 32)))
    assert distances.mean() <= 1.1 * plain
    exact = torch.cdist(far.double(), centroids.double()).square()
    assert torch.allclose(distances.double(), exact.min(1).values, atol=1e-4)
    assert torch.allclose(exact[torch.arange(len(far)), index], exact.min(1).values, atol=1e-5)


def test_half_the_memory_gives_the_same_clusters() -> None:
    vectors = torch.from_numpy(clustered(3000, 16, 7))
    assert torch.equal(kmeans(vectors, 40), kmeans(vectors.float(), 40))
    distances, index = assign(vectors, kmeans(vectors, 40))
    assert distances.dtype == torch.float32 and index.dtype == torch.int64


def test_two_levels_are_nearly_as_good_as_one_and_give_all_clusters() -> None:
    vectors = torch.from_numpy(clustered(6000, 16, 8).astype(np.float32))
    one, two = kmeans(vectors, 200), kmeans(vectors, 200, two_levels=100)
    assert two.shape == (200, 16) and torch.isfinite(two).all()
    assert assign(vectors, two)[0].mean() <= 1.15 * assign(vectors, one)[0].mean()
    assert torch.equal(two, kmeans(vectors, 200, two_levels=100)), "from the seed"
    reported: list[float] = []
    kmeans(vectors, 200, two_levels=100, report=reported.append)
    assert sum(reported) == pytest.approx(1)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.data())
def test_shares_sum_up_and_no_cluster_is_cut_into_more_than_it_has(counts: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, sum(counts)))
    shares = _shares(torch.tensor(counts), k)
    assert sum(shares) == k
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
