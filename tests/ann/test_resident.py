"""Search of vectors on a device against brute force in float64 in the same lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mock_cuda import mock_cuda
from test_lists import clustered, trained_as

from retrotool.ann import resident
from retrotool.ann.excluded import Excluded, Queries
from retrotool.ann.kmeans import assign
from retrotool.ann.lists import Trained
from retrotool.ann.ranking import Best
from retrotool.ann.resident import STRIP, Centroids, ResidentLists, TorchKernels, k_largest

PART = 1 << 32


def ids_of(n: int) -> np.ndarray:
    """Ids of parts of 700 rows, with gaps."""
    rows = np.arange(n) * 2
    return (rows // 1400) * PART + rows % 1400


def documents(n: int) -> np.ndarray:
    """The document of each vector, some 15 vectors each."""
    ends = np.unique(np.append(np.random.default_rng(3).integers(1, n, n // 15), n))
    return np.searchsorted(ends, np.arange(n), side="right")


def excluded_of(ids: np.ndarray, document: np.ndarray) -> Excluded:
    first = np.searchsorted(document, document)
    return Excluded(ids[first], ids[np.searchsorted(document, document, side="right") - 1])


def probed_lists(trained: Trained, vectors: np.ndarray, nprobe: int) -> np.ndarray:
    turned = trained.rotate(torch.from_numpy(vectors.astype(np.float32))).double()
    assert trained.centroids is not None
    return torch.cdist(turned, torch.from_numpy(trained.centroids).double()).topk(nprobe, largest=False).indices.numpy()


@pytest.mark.parametrize(
    ("n", "d", "factory", "nprobe", "k"),
    [(900, 64, "IVF12,SQfp16", 12, 10), (900, 96, "IVF30,SQ8", 5, 20), (300, 16, "IVF40,SQfp16", 2, 20),
     (700, 48, "OPQ12,IVF20,PQ12", 4, 10)],
)  # fmt: skip
def test_neighbours_are_those_of_brute_force_in_the_probed_lists(
    n: int, d: int, factory: str, nprobe: int, k: int
) -> None:
    vectors, ids, document = clustered(n, 1, d), ids_of(n), documents(n)
    trained = trained_as(factory, vectors)
    turned = trained.rotate(torch.from_numpy(vectors.astype(np.float32)))
    numbers = assign(turned, torch.from_numpy(trained.centroids))[1].numpy()
    lists = ResidentLists(Centroids(trained, torch.device("cpu")), numbers, ids, np.array_split(vectors, 5), "cpu")
    found = lists.search(Queries(vectors.astype(np.float32), excluded_of(ids, document)), k, nprobe)

    exact = ((vectors[:, None].astype(np.float64) - vectors[None].astype(np.float64)) ** 2).sum(2)
    exact[document[:, None] == document] = np.inf
    exact[~(numbers[:, None] == probed_lists(trained, vectors, nprobe)[:, None]).any(2)] = np.inf
    expected = np.sort(exact, 1)[:, :k]
    there = np.isfinite(expected)
    # Rounded to float16, a list that is as near as another may be taken for it.
    same = ((found.ids >= 0) == there).all(1)
    same &= (
        np.abs(np.where(there, found.distances, 0) - np.where(there, expected, 0)) < 1e-3 * (1 + expected.clip(0, 9))
    ).all(1)
    assert same.mean() > 0.99
    for row, (some, apart) in enumerate(zip(found.ids, found.distances, strict=True)):
        kept = some[some >= 0]
        assert len(set(kept.tolist())) == len(kept) and (np.diff(apart[some >= 0]) >= 0).all()
        own = np.searchsorted(ids, kept)
        assert not (document[own] == document[row]).any()
        of = ((vectors[own].astype(np.float64) - vectors[row].astype(np.float64)) ** 2).sum(1)
        assert np.allclose(apart[some >= 0], of, rtol=1e-5)


@given(n=st.integers(1, 9000), k=st.integers(1, 40), q=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_complete_search_finds_the_nearest_of_all(n: int, k: int, q: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = rng.normal(size=(n, 8)).astype(np.float16), rng.normal(size=(q, 8)).astype(np.float32)
    ids = ids_of(n)
    lists = ResidentLists(None, None, ids, np.array_split(vectors, 3), "cpu")
    found = lists.search(Queries.plain(queries), k)
    exact = ((queries[:, None].astype(np.float64) - vectors[None].astype(np.float64)) ** 2).sum(2)
    expected = np.sort(exact, 1)[:, :k]
    assert np.allclose(found.distances[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)
    assert (found.ids[:, expected.shape[1] :] == -1).all() and np.isinf(found.distances[:, expected.shape[1] :]).all()


def test_of_copies_the_one_with_the_least_id_comes_first() -> None:
    vectors, ids = clustered(600, 1, 64), ids_of(600)
    vectors[300:306] = vectors[7]
    lists = ResidentLists(None, None, ids, [vectors], "cpu")
    found = lists.search(Queries.plain(vectors.astype(np.float32)), 4)
    assert found.ids[7].tolist() == ids[[7, 300, 301, 302]].tolist() == found.ids[303].tolist()


def test_blocks_of_queries_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = clustered(800, 2, 24), ids_of(800)
    lists = ResidentLists(None, None, ids, [vectors], "cpu")
    queries = Queries(vectors.astype(np.float32), excluded_of(ids, documents(800)))
    whole = lists.search(queries, 10)
    monkeypatch.setattr(ResidentLists, "_block_size", lambda *_: 77)
    blocks = lists.search(queries, 10)
    assert np.array_equal(whole.ids, blocks.ids) and np.array_equal(whole.distances, blocks.distances)


def test_when_memory_runs_out_blocks_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = clustered(2100, 2, 24), ids_of(2100)
    lists = ResidentLists(None, None, ids, [vectors], "cpu")
    queries = Queries(vectors.astype(np.float32), excluded_of(ids, documents(2100)))
    whole = lists.search(queries, 10)
    search, sizes = ResidentLists._search, list[int]()

    def small(self: ResidentLists, some: Queries, *rest: int) -> torch.Tensor:
        sizes.append(len(some))
        if len(some) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(self, some, *rest)

    monkeypatch.setattr(ResidentLists, "_search", small)
    said = list[str]()
    found = lists.search(queries, 10, say=said.append)
    assert said == [f"cpu is out of memory: continuing with {n} queries at a time" for n in ("1,050", "525")]
    assert np.array_equal(whole.ids, found.ids) and sizes == [2100, 1050, 525, 525, 525, 525]


@pytest.mark.parametrize("before", [1, 5, 11])
def test_lists_behind_those_that_were_searched_give_the_rest(before: int) -> None:
    vectors = clustered(900, 1, 32)
    trained = trained_as("IVF12,SQfp16", vectors)
    numbers = assign(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(trained.centroids))[1].numpy()
    lists, queries = (
        ResidentLists(Centroids(trained, torch.device("cpu")), numbers, ids_of(900), [vectors], "cpu"),
        Queries.plain(vectors.astype(np.float32)),
    )
    whole, near, rest = (
        lists.search(queries, 20, 12),
        lists.search(queries, 20, before),
        lists.search(queries, 20, 12, before),
    )
    assert np.array_equal(np.sort(np.concatenate([near.distances, rest.distances], 1), 1)[:, :20], whole.distances)
    assert (lists.search(queries, 20, 12, 12).ids == -1).all() and (lists.search(queries, 20, 40, 30).ids == -1).all()


@pytest.mark.parametrize(
    ("n", "k"), [(2048 + 7, 1), (9000, 28), (64, 5), (4000, 24), (2000, 29), (1003, 31), (900, 29)]
)
def test_largest_is_topk(n: int, k: int) -> None:
    scores = torch.randn(37, n, generator=torch.Generator().manual_seed(k))
    scores[3, :30] = -torch.inf
    scores[4] = -torch.inf
    scores[5] = scores[5].round()  # ties
    scores[6, 3:] = -torch.inf
    values, columns = k_largest(scores, k)
    assert torch.equal(values, scores.topk(k).values) and torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row.tolist())) == k for row in columns)


@pytest.mark.parametrize("factory", ["SQfp16", "IVF12,SQfp16"])
def test_a_device_is_waited_for_twice_a_block_and_meets_no_tensor_of_the_host(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidentLists, "_block_size", lambda *_: 300)
    vectors, ids = clustered(900, 1, 64), ids_of(900)
    trained, queries = (
        trained_as(factory, vectors),
        Queries(vectors.astype(np.float32), excluded_of(ids, documents(900))),
    )
    numbers = None
    if trained.centroids is not None:
        numbers = assign(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(trained.centroids))[1].numpy()

    def search(device: str, waits: Counter[str]) -> Best:
        centroids = None if numbers is None else Centroids(trained, torch.device(device))
        lists = ResidentLists(centroids, numbers, ids, np.array_split(vectors, 3), device)
        waits.clear()
        return lists.search(queries, 10, 4)

    here = search("cpu", Counter())
    with mock_cuda() as waits:
        monkeypatch.setattr(resident, "pick_kernels", lambda device, d: (TorchKernels(), ""))
        there = search("cuda:0", waits)
    assert np.array_equal(here.ids, there.ids) and np.array_equal(here.distances, there.distances)
    assert +waits == {"tolist": 3, "synchronize an event": 3}, "three blocks of queries"


def test_what_is_uploaded_is_what_was_read() -> None:
    blocks = [np.full((n, 3), n, np.float16) for n in (2, 5, 1, 7, 7, 7, 2, 7, 1)]
    for block in blocks:
        block.flags.writeable = False  # as memory of files is
    with mock_cuda():
        found = [torch.clone(some).cpu().numpy() for some in resident.uploads(iter(blocks), torch.device("cuda:0"))]
    assert [len(one) for one in found] == [len(block) for block in blocks]
    assert np.array_equal(np.concatenate(found), np.concatenate(blocks))


def test_kernels_that_a_gpu_does_not_run_are_not_used() -> None:
    with mock_cuda():  # which no compiler knows
        kernels, why = resident.pick_kernels.__wrapped__(torch.device("cuda:0"), 24)
    assert isinstance(kernels, TorchKernels) and why


def test_queries_in_half_precision_find_what_the_same_in_float32_find() -> None:
    vectors, ids = clustered(500, 2, 24), ids_of(500)
    lists = ResidentLists(None, None, ids, [vectors], "cpu")
    half, whole = (lists.search(Queries.plain(vectors.astype(kind)), 7) for kind in (np.float16, np.float32))
    assert np.array_equal(half.ids, whole.ids) and np.array_equal(half.distances, whole.distances)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("factory", ["SQfp16", "IVF12,SQfp16"])
def test_what_is_found_on_a_gpu_is_what_torch_finds_on_a_cpu(factory: str) -> None:
    vectors, ids = clustered(5000, 1, 96), ids_of(5000)
    trained, queries = (
        trained_as(factory, vectors),
        Queries(vectors.astype(np.float32), excluded_of(ids, documents(5000))),
    )
    numbers = None
    if trained.centroids is not None:
        numbers = assign(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(trained.centroids))[1].numpy()
    found = []
    for device in ("cpu", "cuda:0"):
        centroids = None if numbers is None else Centroids(trained, torch.device(device))
        lists = ResidentLists(centroids, numbers, ids, np.array_split(vectors, 3), device)
        found.append(lists.search(queries, 20, 4))
    assert type(lists._kernels).__name__ == "TritonKernels", lists.why_slow
    assert (found[0].ids == found[1].ids).mean() > 0.99
    assert np.allclose(found[0].distances, found[1].distances, rtol=1e-3)


def test_strips_are_a_power_of_two_within_a_tile() -> None:
    assert STRIP & (STRIP - 1) == 0
