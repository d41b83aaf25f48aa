"""k-means, inverted lists and list-major search against naive computations and faiss."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrotool.ann import lists, search
from retrotool.ann.kmeans import assign, kmeans
from retrotool.ann.search import Best, Excluded, Queries
from retrotool.errors import CorruptError
from retrotool.stages.index import choose_lists


def random_vectors(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float16)


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(20, d)) * 4
    return (centers[rng.integers(0, 20, n)] + rng.normal(size=(n, d))).astype(np.float16)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
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


def make_index(vectors: np.ndarray, ids: np.ndarray, nlist: int) -> object:
    values = torch.from_numpy(vectors.astype(np.float32))
    if nlist == 0:
        index = lists.empty_flat(vectors.shape[1])
        lists.add(index, ids, vectors, None)
        return index
    index = lists.empty_ivf(kmeans(values, nlist, iterations=4).numpy())
    lists.add(index, ids, vectors, assign(values, torch.from_numpy(lists.centroids_of(index)))[1].numpy())
    return index


def write(index: object, path: Path) -> Path:
    lists.write(index, path)
    return path


@pytest.mark.parametrize("nlist", [0, 16])
def test_codes_in_the_file_are_the_vectors_and_ids_ascend(tmp_path: Path, nlist: int) -> None:
    vectors = clustered(500, 8, 1)
    ids = (np.int64(3) << 32) + np.arange(500) * 2
    found = lists.read(write(make_index(vectors, ids, nlist), tmp_path / "x.faiss"))
    assert len(found) == 500
    for numbers, codes in zip(found.ids, found.vectors, strict=True):
        assert (np.diff(numbers) > 0).all()
        assert np.array_equal(codes, vectors[(numbers - ids[0]) // 2])


@pytest.mark.parametrize("nprobe", [1, 4, 16])
def test_search_gives_what_faiss_gives(tmp_path: Path, nprobe: int) -> None:
    vectors, queries = clustered(2000, 16, 2), clustered(64, 16, 3).astype(np.float32)
    path = write(make_index(vectors, np.arange(2000), 16), tmp_path / "x.faiss")
    reference = faiss.read_index(str(path))
    reference.nprobe = nprobe
    distances, ids = reference.search(queries, 10)
    best = Best(64, 10)
    search.search(lists.read(path), Queries.plain(queries), nprobe, lambda ids: np.zeros(len(ids), bool), best)
    assert np.allclose(best.distances, distances, rtol=1e-3, atol=1e-2)
    assert (best.ids == ids).mean() > 0.99


@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 50), st.sampled_from([0, 4]), st.data())
@settings(max_examples=40, deadline=None)
def test_excluded_intervals_and_banned_ids_are_never_found_and_nothing_else_is_lost(
    n: int, k: int, seed: int, nlist: int, data: st.DataObject
) -> None:
    vectors = random_vectors(n, 6, seed)
    ids = np.cumsum(np.random.default_rng(seed).integers(1, 4, n))
    index = make_index(vectors, ids, nlist if n >= 4 else 0)
    q = data.draw(st.integers(1, 5))
    queries = random_vectors(q, 6, seed + 9).astype(np.float32)
    first = np.array(data.draw(st.lists(st.integers(-2, int(ids[-1]) + 2), min_size=q, max_size=q)), np.int64)
    last = first + np.array(data.draw(st.lists(st.integers(-1, 30), min_size=q, max_size=q)), np.int64)
    banned = np.array(data.draw(st.lists(st.sampled_from(ids.tolist()), max_size=n)), np.int64)
    path = Path(tempfile.gettempdir()) / f"retrotool-test-{os.getpid()}.faiss"
    try:
        lists.write(index, path)
        best = Best(q, k)
        search.search(lists.read(path), Queries(queries, Excluded(first, last)), 4, lambda i: np.isin(i, banned), best)
    finally:
        path.unlink(missing_ok=True)
    exact = ((queries[:, None] - vectors[None].astype(np.float32)) ** 2).sum(-1)
    exact[(ids >= first[:, None]) & (ids <= last[:, None])] = np.inf
    exact[:, np.isin(ids, banned)] = np.inf
    expected = np.sort(exact, axis=1)[:, :k]
    found = best.distances[:, : expected.shape[1]]
    assert np.array_equal(np.isinf(found), np.isinf(expected))
    assert np.allclose(found[np.isfinite(found)], expected[np.isfinite(expected)], atol=1e-3)
    assert np.array_equal(best.ids == -1, np.isinf(best.distances))
    for row, id_row in enumerate(best.ids):
        kept = id_row[id_row >= 0]
        assert not np.isin(kept, banned).any() and not ((kept >= first[row]) & (kept <= last[row])).any()
        assert len(np.unique(kept)) == len(kept)


@pytest.mark.parametrize("nlist", [0, 8])
def test_without_takes_the_banned_out_and_keeps_the_rest(tmp_path: Path, nlist: int) -> None:
    vectors = clustered(300, 8, 5)
    before = lists.read(write(make_index(vectors, np.arange(300), nlist), tmp_path / "a.faiss"))
    after = lists.read(write(lists.without(before, [ids % 3 == 0 for ids in before.ids]), tmp_path / "b.faiss"))
    for old_ids, ids, codes in zip(before.ids, after.ids, after.vectors, strict=True):
        assert np.array_equal(ids, old_ids[old_ids % 3 != 0])
        assert np.array_equal(codes, vectors[ids])


def test_a_file_that_is_no_index_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "x.faiss").write_bytes(b"not an index")
    with pytest.raises(CorruptError, match=r"x\.faiss"):
        lists.read(tmp_path / "x.faiss")
    faiss.write_index(faiss.IndexFlatL2(4), str(tmp_path / "y.faiss"))
    with pytest.raises(CorruptError, match="IndexFlatL2"):
        lists.read(tmp_path / "y.faiss")


@given(st.integers(0, 10**10))
def test_lists_have_enough_vectors(n: int) -> None:
    nlist = choose_lists(n, 65536)
    assert (nlist == 0) == (n <= 65536)
    if nlist:
        assert n / nlist >= 20
        assert nlist & (nlist - 1) == 0
