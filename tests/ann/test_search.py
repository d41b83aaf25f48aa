"""List-major search against a brute force that knows nothing of lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lists import clustered, filled, trained_as

from retrotool.ann.excluded import Excluded, Queries
from retrotool.ann.lists import InvertedLists, VectorLists
from retrotool.ann.matmul import RoughColumns, Scratch
from retrotool.ann.ranking import exact_distances, rerank
from retrotool.ann.search import ROOM, SPARE, Search, nothing_banned


def random_vectors(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float16)


@pytest.mark.parametrize("spread", [0.3, 0.1, 0.03, 0.01])
def test_near_copies_are_told_apart_by_rounded_products(spread: float) -> None:
    """Their distances are far below the last digit of a rounded |x|² − 2 q·x."""
    rng, d, copies = np.random.default_rng(0), 128, 100
    vectors = rng.normal(size=(40, 1, d)) + spread * rng.normal(size=(40, copies, d))
    vectors = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).reshape(-1, d).astype(np.float32)
    queries, k = vectors[::97], 10
    exact = np.square(queries[:, None] - vectors).sum(axis=2)
    rows = torch.arange(len(queries))
    table = RoughColumns.table(torch.from_numpy(queries), rows, torch.zeros(d))
    scores = RoughColumns(torch.from_numpy(vectors)).scores(table, rows, 0, len(vectors), Scratch()).numpy()
    found = np.argsort(-scores, axis=1)[:, : k + SPARE]
    farthest = np.sort(exact, axis=1)[:, k - 1, None]
    hits = (np.take_along_axis(exact, found, axis=1) <= farthest).sum(axis=1)
    assert hits.mean() > 0.97 * k


@given(
    st.integers(1, 200), st.integers(1, 12), st.integers(0, 50), st.sampled_from(["SQfp16", "IVF4,SQfp16"]), st.data()
)
def test_excluded_intervals_and_banned_ids_are_never_found_and_nothing_else_is_lost(
    n: int, k: int, seed: int, factory: str, data: st.DataObject
) -> None:
    vectors = random_vectors(n, 6, seed)
    ids = np.cumsum(np.random.default_rng(seed).integers(1, 4, n))
    trained = trained_as(factory if n >= 4 else "SQfp16", vectors)
    q = data.draw(st.integers(1, 5))
    queries = random_vectors(q, 6, seed + 9).astype(np.float32)
    # Documents of up to 30 ids from 0 on, with gaps; each query is of one, or (0, −1) of none.
    sizes = np.array(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=40)), np.int64)
    begins = np.cumsum(sizes) - sizes
    ends = begins + np.maximum(sizes - 3, 0)
    documents = np.array(data.draw(st.lists(st.integers(-1, len(sizes) - 1), min_size=q, max_size=q)), np.int64)
    first, last = np.where(documents < 0, 0, begins[documents]), np.where(documents < 0, -1, ends[documents])
    banned = np.array(data.draw(st.lists(st.sampled_from(ids.tolist()), max_size=n)), np.int64)
    cut = data.draw(st.integers(0, n))
    room = data.draw(st.sampled_from([1, 400, 2000, ROOM]))  # several rounds, several blocks of queries
    asked = Queries(queries, Excluded(first, last))
    search = Search(trained, asked, 4, k + SPARE, lambda i: np.isin(i, banned), room=room)
    for some in (slice(0, cut), slice(cut, n)):
        search.add(InvertedLists(filled(trained, vectors[some], ids[some]), trained))
    best = rerank(queries, search.candidates, lambda some: vectors[np.searchsorted(ids, some)], k)
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


@pytest.mark.parametrize("before", [0, 1, 5, 11, 12])
def test_lists_behind_those_that_were_searched_give_the_rest(before: int) -> None:
    vectors, queries = clustered(3000, 1), Queries.plain(clustered(50, 2).astype(np.float32))
    trained = trained_as("IVF12,SQfp16", vectors)
    lists = InvertedLists(filled(trained, vectors, np.arange(3000)), trained)
    found = []
    for nprobe, beyond in ((before, 0), (12, before), (12, 0)):
        search = Search(trained, queries, nprobe, 20, nothing_banned, beyond=beyond)
        if nprobe:
            search.add(lists)
        found.append(rerank(queries.vectors, search.candidates, lambda ids: vectors[ids], 20))
    joined = np.sort(np.concatenate([found[0].distances, found[1].distances], 1), 1)[:, :20]
    assert np.array_equal(joined, found[2].distances)
    first, rest = (some.ids for some in found[:2])
    assert not any(set(a[a >= 0]) & set(b[b >= 0]) for a, b in zip(first, rest, strict=True)), "none is looked at twice"


@pytest.mark.parametrize("factory", ["SQfp16", "IVF12,SQfp16", "OPQ8,IVF12,PQ8"])
@pytest.mark.parametrize("by_vectors", [False, True])
def test_shards_that_are_searched_at_once_give_what_one_index_gives(
    factory: str, by_vectors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrotool.ann.search._COLUMNS", 64)  # lists are wider than what is multiplied at a time
    vectors, queries = clustered(3000, 1), Queries.plain(clustered(50, 2).astype(np.float32))
    trained = trained_as(factory, vectors)
    fetch = (lambda ids: vectors[ids]) if by_vectors else None
    whole, parts = (Search(trained, queries, 4, 30, nothing_banned, vectors=fetch) for _ in range(2))
    whole.add(InvertedLists(filled(trained, vectors, np.arange(3000)), trained))
    of = np.arange(3000) // 7 % 3  # their ids lie between one another
    parts.add(*(InvertedLists(filled(trained, vectors[of == i], np.flatnonzero(of == i)), trained) for i in range(3)))
    assert np.array_equal(np.sort(whole.candidates, 1), np.sort(parts.candidates, 1))


def test_shards_give_what_one_index_gives() -> None:
    vectors, queries = clustered(3000, 1), Queries.plain(clustered(50, 2).astype(np.float32))
    for factory in ("OPQ8,IVF12,PQ8", "IVF12,SQ8"):
        trained = trained_as(factory, vectors)
        whole, parts = (Search(trained, queries, 4, 30, nothing_banned) for _ in range(2))
        whole.add(InvertedLists(filled(trained, vectors, np.arange(3000)), trained))
        for low in range(0, 3000, 700):
            some = slice(low, min(low + 700, 3000))
            parts.add(InvertedLists(filled(trained, vectors[some], np.arange(3000)[some]), trained))
        assert (whole.candidates == parts.candidates).mean() > 0.99
        assert whole.scanned == parts.scanned


def test_nothing_is_found_in_nothing() -> None:
    trained = trained_as("IVF4,SQfp16", clustered(100, 1))
    search = Search(trained, Queries.plain(clustered(3, 2).astype(np.float32)), 2, 5, nothing_banned)
    search.add(InvertedLists(filled(trained, clustered(0, 1), np.zeros(0, np.int64)), trained))
    assert (search.candidates == -1).all()
    best = rerank(np.zeros((3, 16), np.float32), search.candidates, lambda ids: np.zeros((0, 16), np.float16), 5)
    assert (best.ids == -1).all() and np.isinf(best.distances).all()
    empty = VectorLists(np.zeros(0, np.int64), np.zeros((0, 16), np.float16))
    search = Search(empty.trained, Queries.plain(np.zeros((2, 16), np.float32)), 1, 3, nothing_banned)
    search.add(empty)
    assert (search.candidates == -1).all()


def test_distances_are_those_of_the_vectors_and_fetching_is_in_order() -> None:
    vectors, queries = clustered(900, 3), clustered(20, 4).astype(np.float32)
    candidates = np.random.default_rng(0).integers(-1, 900, (20, 70))

    def fetch(ids: np.ndarray) -> np.ndarray:
        assert (np.diff(ids) >= 0).all()
        return vectors[ids]

    found = exact_distances(queries, candidates, fetch)
    exact = ((queries[:, None] - vectors[candidates].astype(np.float32)) ** 2).sum(-1)
    assert np.allclose(found[candidates >= 0], exact[candidates >= 0], rtol=1e-5)
    assert np.isinf(found[candidates < 0]).all()


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(not on_gpu(), reason="there is no GPU")
@pytest.mark.parametrize("factory", ["SQfp16", "IVF12,SQ8", "OPQ8,IVF12,PQ8"])
def test_training_and_codes_on_a_gpu_are_those_of_a_cpu(factory: str) -> None:
    import torch

    from retrotool.ann.codes import train_product, train_rotation
    from retrotool.ann.kmeans import assign, kmeans

    vectors = clustered(3000, 1)
    trained = trained_as(factory, vectors)
    rows = torch.from_numpy(vectors.astype(np.float32))
    numbers, codes, error, _ = trained.encode(rows)
    theirs = trained.encode(rows.cuda())
    assert (numbers == theirs[0].cpu()).float().mean() > 0.999
    assert (codes == theirs[1].cpu()).float().mean() > 0.99 and theirs[2] == pytest.approx(error, rel=1e-3)
    centroids = kmeans(rows.half().cuda(), 40, iterations=4)
    assert assign(rows, centroids.cpu())[0].mean() <= 1.05 * assign(rows, kmeans(rows, 40, iterations=4))[0].mean()
    assert train_product(rows.cuda(), 8).shape == (8, 256, 2)
    rotation = train_rotation(rows.cuda(), 8, 16)
    assert torch.allclose(rotation @ rotation.T, torch.eye(16, device="cuda"), atol=1e-4)
