"""Trained indexes and inverted lists: faiss reads, searches and would have made what is written."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from retrotool.ann import lists
from retrotool.ann.choice import IndexChoice, parse_factory
from retrotool.ann.codes import Product, Scalar, Whole, train_product, train_rotation
from retrotool.ann.excluded import Queries
from retrotool.ann.kmeans import kmeans
from retrotool.ann.lists import Trained, of_faiss, same_training, to_faiss
from retrotool.ann.ranking import rerank
from retrotool.ann.search import Search, nothing_banned
from retrotool.errors import CorruptError

D = 16
KINDS = (
    "SQfp16",
    "Flat",
    "IVF12,Flat",
    "IVF12,SQfp16",
    "IVF12,SQ8",
    "IVF12,PQ8",
    "OPQ8,IVF12,PQ8",
    "OPQ4_12,IVF12,PQ4",
)


def clustered(n: int, seed: int, d: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(20, d)) * 4
    return (centers[rng.integers(0, 20, n)] + rng.normal(size=(n, d))).astype(np.float16)


def trained_as(factory: str, vectors: np.ndarray) -> Trained:
    """Trained step by step, as ``stages.training`` does for a store."""
    choice: IndexChoice = parse_factory(factory, vectors.shape[1])
    rows = torch.from_numpy(vectors.astype(np.float32))
    if not choice.nlist:
        return Trained(choice.d, Whole(choice.d, choice.code))
    centroids = kmeans(rows, choice.nlist, iterations=4)
    residuals = rows - centroids[torch.cdist(rows, centroids).argmin(1)]
    rotation = None
    if choice.rotated:
        rotation = train_rotation(residuals, choice.pieces, choice.rotated)
        residuals, centroids = residuals @ rotation.T, centroids @ rotation.T
    codec = Whole(choice.coded, choice.code) if choice.code.startswith("float") else Scalar.train(residuals)
    if choice.pieces:
        codec = Product(train_product(residuals, choice.pieces).numpy())
    turned = None if rotation is None else rotation.numpy()
    return Trained(choice.d, codec, centroids.numpy(), turned, choice.nlist)


def filled(trained: Trained, vectors: np.ndarray, ids: np.ndarray, *, quantizer: bool = True) -> object:
    index = to_faiss(trained, quantizer=quantizer)
    numbers, codes, _, _ = trained.encode(torch.from_numpy(vectors.astype(np.float32)))
    lists.fill(index, numbers.numpy(), ids, codes.numpy())
    return index


def write_file(index: object, path: Path) -> int:
    with path.open("xb") as file:
        return lists.write_lists(index, file.write)


def inner_of(index: object) -> object:
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


@pytest.mark.parametrize("factory", KINDS)
def test_faiss_would_have_given_the_same_codes_for_the_same_lists(factory: str) -> None:
    vectors = clustered(3000, 1)
    trained = trained_as(factory, vectors)
    values = vectors.astype(np.float32)
    numbers, codes, error, code_error = trained.encode(torch.from_numpy(values))
    index = to_faiss(trained)
    if trained.centroids is None:
        reference = faiss.downcast_index(index.index).sa_encode(values)
    else:
        inner = inner_of(index)
        rotated = np.ascontiguousarray(trained.rotate(torch.from_numpy(values)).numpy())
        assert np.array_equal(inner.quantizer.search(rotated, 1)[1][:, 0], numbers.numpy())
        reference = np.zeros((len(values), inner.code_size), np.uint8)
        assigned = numbers.numpy().copy()
        inner.encode_vectors(len(values), *(faiss.swig_ptr(a) for a in (rotated, assigned, reference)))
        assert error > 0
    off = codes.numpy() != reference.reshape(codes.shape)
    if isinstance(trained.codec, Product):
        # Where two centroids of a piece are equally near, up to float32, either will do.
        assert off.mean() < 1e-3
        wanted = (trained.rotate(torch.from_numpy(values)) - torch.from_numpy(trained.centroids)[numbers]).numpy()
        ours, theirs = (((trained.codec.decode(c).numpy() - wanted) ** 2).sum(1) for c in (codes.numpy(), reference))
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert code_error == pytest.approx(float(ours[::6].mean()) * len(ours), rel=1e-3)
    else:
        assert not off.any()


@pytest.mark.parametrize("factory", KINDS)
def test_what_is_written_is_what_faiss_writes_and_reads(tmp_path: Path, factory: str) -> None:
    vectors, ids = clustered(2000, 2), (np.int64(3) << 32) + np.arange(2000) * 2
    trained = trained_as(factory, vectors)
    index = filled(trained, vectors, ids)
    assert write_file(index, tmp_path / "ours") == 2000
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = lists.read_lists(tmp_path / "ours")
    assert same_training(found.trained, trained) and len(found) == 2000 and found.is_whole()
    assert sorted(i for number in found.numbers for i in found.ids(number).tolist()) == ids.tolist()
    numbers, codes, _, _ = trained.encode(torch.from_numpy(vectors.astype(np.float32)))
    for number in found.numbers:
        there = found.ids(number)
        assert (np.diff(there) > 0).all(), "ids ascend in a list"
        rows = (there - ids[0]) // 2
        assert np.array_equal(found.codes(number), codes.numpy()[rows]) and (numbers.numpy()[rows] == number).all()
        some = np.arange(min(3, len(rows)))
        assert found.may_stand_for(number, some, vectors[rows[some]])
        if len(rows):
            far = vectors[rows[some]]
            far[-1] += np.float16(20)
            assert not found.may_stand_for(number, some, far)


@pytest.mark.parametrize("factory", KINDS)
def test_search_gives_what_faiss_gives(tmp_path: Path, factory: str) -> None:
    """Candidates by codes, in the order of faiss's own distances."""
    vectors, queries = clustered(2000, 2), clustered(64, 3).astype(np.float32)
    trained = trained_as(factory, vectors)
    path = tmp_path / "x.faiss"
    write_file(filled(trained, vectors, np.arange(2000)), path)
    for nprobe in (1, 4, 12):
        reference = faiss.read_index(str(path))
        if trained.centroids is not None:
            faiss.extract_index_ivf(reference).nprobe = nprobe
        _, ids = reference.search(queries, 10)
        search = Search(trained, Queries.plain(queries), nprobe, 10, nothing_banned)
        search.add(lists.read_lists(path))
        assert (search.candidates == ids).mean() > 0.98
        assert search.scanned > 0


@pytest.mark.parametrize("factory", KINDS)
def test_candidates_are_ranked_by_their_own_vectors(tmp_path: Path, factory: str) -> None:
    vectors, queries = clustered(1500, 4), clustered(40, 5).astype(np.float32)
    trained = trained_as(factory, vectors)
    path = tmp_path / "x.faiss"
    write_file(filled(trained, vectors, np.arange(1500)), path)
    search = Search(trained, Queries.plain(queries), 12, 400, nothing_banned)
    search.add(lists.read_lists(path))
    best = rerank(queries, search.candidates, lambda ids: vectors[ids], 10)
    exact = ((queries[:, None] - vectors[None].astype(np.float32)) ** 2).sum(-1)
    order = np.argsort(exact, axis=1)[:, :10]
    assert (best.ids == order).mean() > 0.97
    assert np.allclose(best.distances, np.take_along_axis(exact, best.ids, 1), rtol=1e-5)


@pytest.mark.parametrize("factory", KINDS[2:])
def test_a_shard_without_its_quantizer_is_searched_with_that_of_the_training(tmp_path: Path, factory: str) -> None:
    vectors, queries = clustered(1500, 6), clustered(30, 7).astype(np.float32)
    trained = trained_as(factory, vectors)
    for name, quantizer in (("with", True), ("without", False)):
        write_file(filled(trained, vectors, np.arange(1500), quantizer=quantizer), tmp_path / name)
    assert (tmp_path / "without").stat().st_size < (tmp_path / "with").stat().st_size
    found = lists.read_lists(tmp_path / "without")
    assert not found.holds_quantizer and found.trained.nlist == 12
    candidates = []
    for name in ("with", "without"):
        search = Search(trained, Queries.plain(queries), 3, 20, nothing_banned)
        search.add(lists.read_lists(tmp_path / name, trained))
        candidates.append(search.candidates)
    assert np.array_equal(*candidates)
    other = trained_as(factory, clustered(1500, 99))
    with pytest.raises(CorruptError, match="does not match the training"):
        lists.read_lists(tmp_path / "with", other)


@pytest.mark.parametrize("factory", KINDS)
def test_without_takes_the_banned_out_and_keeps_the_rest(tmp_path: Path, factory: str) -> None:
    vectors = clustered(600, 8)
    trained = trained_as(factory, vectors)
    for quantizer in (True, False):
        path = tmp_path / f"{quantizer}"
        write_file(filled(trained, vectors, np.arange(600), quantizer=quantizer), path)
        before = lists.read_lists(path)
        write_file(lists.without(before, lambda ids: ids % 3 == 0), tmp_path / f"{quantizer}-after")
        after = lists.read_lists(tmp_path / f"{quantizer}-after")
        assert len(after) == 400 and after.holds_quantizer == before.holds_quantizer
        for number in before.numbers:
            kept = before.ids(number) % 3 != 0
            assert np.array_equal(after.ids(number), before.ids(number)[kept])
            assert np.array_equal(after.codes(number), before.codes(number)[kept])


def test_a_file_that_is_no_index_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "x.faiss").write_bytes(b"not an index")
    with pytest.raises(CorruptError, match=r"x\.faiss"):
        lists.read_lists(tmp_path / "x.faiss")
    for name, factory in (("y", "HNSW4"), ("z", "IVF4,PQ4x4"), ("w", "PCA8,IVF4,Flat"), ("v", "IVF4_HNSW4,Flat")):
        index = faiss.index_factory(D, factory)
        index.train(clustered(400, 1).astype(np.float32))
        faiss.write_index(index, str(tmp_path / name))
        if name == "w":  # a rotation with a mean taken off is no rotation
            with pytest.raises(CorruptError, match="not a kind of index that retrotool writes"):
                lists.read_lists(tmp_path / name)
            continue
        with pytest.raises(CorruptError, match="not a kind of index that retrotool writes"):
            lists.read_lists(tmp_path / name)


def test_indexes_that_faiss_trained_are_understood() -> None:
    """The kinds are faiss's own: what its factory trains is read as if it were ours."""
    vectors = clustered(3000, 9)
    for factory in ("IVF12,PQ8", "IVF12,SQ8", "IVF12,SQfp16", "IVF12,Flat", "OPQ8,IVF12,PQ8"):
        index = faiss.index_factory(D, factory)
        inner = inner_of(index)
        if hasattr(inner, "do_polysemous_training"):
            inner.do_polysemous_training = False  # an order of the codes that nobody reads, for 15 s
        if isinstance(index, faiss.IndexPreTransform):
            faiss.downcast_VectorTransform(index.chain.at(0)).niter = 2  # any rotation will do
        index.train(vectors.astype(np.float32))
        if factory.endswith("SQfp16"):
            assert of_faiss(index) is None, "of residuals, where ours has the vectors themselves"
            continue
        trained = of_faiss(index)
        assert trained is not None and trained.nlist == 12
        back = of_faiss(to_faiss(trained))
        assert back is not None and same_training(trained, back)
        assert inner.code_size == trained.codec.size


def error_of(rows: torch.Tensor, table: torch.Tensor) -> float:
    codec = Product(table.numpy())
    return float((codec.decode(codec.encode(rows).numpy()) - rows).square().sum(1).mean())


def test_product_codes_are_as_good_as_those_of_faiss() -> None:
    rows = torch.from_numpy(clustered(8000, 10, 32).astype(np.float32))
    ours = train_product(rows, 8)
    theirs = faiss.ProductQuantizer(32, 8, 8)
    theirs.train(rows.numpy())
    reference = torch.from_numpy(faiss.vector_to_array(theirs.centroids).reshape(8, 256, 4))
    assert error_of(rows, ours) <= 1.05 * error_of(rows, reference)
    assert torch.equal(ours, train_product(rows, 8)), "from the seed"


@pytest.mark.parametrize("n", [40, 6000])
def test_a_rotation_keeps_distances_and_helps_codes(n: int) -> None:
    rng = np.random.default_rng(0)
    uneven = rng.normal(size=(n, 32)) * np.geomspace(4, 0.05, 32) @ np.linalg.qr(rng.normal(size=(32, 32)))[0]
    rows = torch.from_numpy(uneven.astype(np.float32))
    rotation = train_rotation(rows, 8, 32)
    assert torch.allclose(rotation @ rotation.T, torch.eye(32), atol=1e-4)
    if n > 100:
        plain, turned = train_product(rows, 8), train_product(rows @ rotation.T, 8)
        assert error_of(rows @ rotation.T, turned) < 0.8 * error_of(rows, plain)
    narrow = train_rotation(rows, 4, 12)
    assert narrow.shape == (12, 32) and torch.allclose(narrow @ narrow.T, torch.eye(12), atol=1e-4)


def test_codes_of_constant_dimensions_and_of_copies() -> None:
    """Zero variance: nothing divides by zero, and what comes back is what went in."""
    rows = torch.ones(300, D)
    rows[:, 3] = 7
    scalar = Scalar.train(rows)
    assert torch.allclose(scalar.decode(scalar.encode(rows).numpy()), rows)
    product = Product(train_product(rows, 4).numpy())
    assert torch.allclose(product.decode(product.encode(rows).numpy()), rows)
    assert torch.isfinite(train_rotation(rows, 4, D)).all()


@pytest.mark.parametrize("code", ["pq", "sq8"])
def test_no_vector_can_be_made_of_what_a_training_keeps(code: str) -> None:
    """Training outlasts an erase: centroid and codes, put together in any way, are no vector that was trained on."""
    rng = np.random.default_rng(3)
    lone = rng.normal(size=(20, 8), scale=8)
    near = np.repeat(rng.normal(size=(5, 8)), 2000, axis=0) + rng.normal(size=(10_000, 8), scale=0.1)
    vectors = torch.from_numpy(np.concatenate([lone, near]).astype(np.float16)).float()
    centroids = kmeans(vectors, 40)
    residuals = vectors - centroids[torch.cdist(vectors, centroids).argmin(1)]
    if code == "pq":
        one, other = train_product(residuals, 2)
        steps = torch.cat([one[:, None].expand(-1, 256, -1), other[None].expand(256, -1, -1)], 2).reshape(-1, 8)
    else:
        codec = Scalar.train(residuals)
        ends = torch.from_numpy(np.stack([codec.least, codec.least + codec.extent]))
        steps = torch.cartesian_prod(*ends.T)
    made = (centroids[:, None] + steps[None]).reshape(-1, 8).half().numpy().view("V16")
    assert not np.isin(made, vectors.half().numpy().view("V16")).any()


@pytest.mark.parametrize("factory", KINDS)
def test_of_some_lists_only_what_is_wanted_is_seen_and_found(factory: str, tmp_path: Path) -> None:
    vectors, ids = clustered(2000, 5), np.arange(2000) * 3 + 7
    trained = trained_as(factory, vectors)
    write_file(filled(trained, vectors, ids), tmp_path / "index.faiss")
    whole = lists.read_lists(tmp_path / "index.faiss")
    some = lists.SomeLists(whole, lambda asked: asked % 2 == 0)
    assert len(some) == (ids % 2 == 0).sum() and some.whole.sum() == 2000
    for number in whole.numbers:
        keep = whole.ids(number) % 2 == 0
        assert np.array_equal(some.ids(number), whole.ids(number)[keep])
        assert np.array_equal(some.codes(number), whole.codes(number)[keep])
        assert (some.size(number), some.whole[number]) == (keep.sum(), len(keep))
    asked = Queries.plain(vectors[:50].astype(np.float32))
    found = []
    for shard, banned in ((some, nothing_banned), (whole, lambda asked: asked % 2 == 1)):
        search = Search(trained, asked, 12, 30, banned)
        search.add(shard)
        found.append(np.sort(search.candidates, axis=1))
    assert (found[0][found[0] >= 0] % 2 == 0).all()
    assert (found[0] == found[1]).mean() > 0.99, "as if the others were banned"
