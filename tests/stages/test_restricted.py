"""Which chunks are of which sources, and how far queries probe for them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import read_plain

import retrotool
from retrotool import api
from retrotool.ann import lists
from retrotool.ann.codes import Whole
from retrotool.ann.lists import Trained, to_faiss
from retrotool.ann.search import nearest_lists
from retrotool.index.searching import AllowedChunks, find_sources, probes_by_query, source_names
from retrotool.neighbours.filters import Filters
from retrotool.neighbours.stage import NeighboursStage
from retrotool.store.store import Store


@pytest.mark.parametrize("allowed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("erased", [False, True])
def test_chunks_are_allowed_by_the_source_of_their_document(store_copy: Path, allowed: str, erased: bool) -> None:
    if erased:
        (store_copy.parent / "names").write_text("doc-3\ndoc-6\ndoc-7\n")
        api.purge(store_copy, api.Selectors(document=store_copy.parent / "names"), reason="test", erase=True)
    found = AllowedChunks(Store.open(store_copy), lambda name: name in allowed)
    plain = read_plain(store_copy)
    source = {row["id"]: row["source"] for row in make_rows(120)}  # None: erased
    true = np.array([source.get(document, "-") in allowed for document in plain.documents])
    draw = np.random.default_rng(0).permutation(len(true))
    assert np.array_equal(found.contains(plain.ids[draw]), true[draw])
    for part in retrotool.open(store_copy).parts():
        assert np.array_equal(found.rows(part), true[plain.ids >> 32 == part])


def test_sources_are_those_of_living_documents(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{**row, "source": f"s{i // 3}"} for i, row in enumerate(make_rows(12, words=40))]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(tiny_encoder), part_size=10)
    (tmp_path / "names").write_text("".join(f"doc-{i}\n" for i in (0, 1, 2, 3)))
    api.purge(store, api.Selectors(document=tmp_path / "names"), reason="test")
    opened = Store.open(store)
    assert set().union(*source_names(opened)) == {"s1", "s2", "s3"}
    keyed = opened.identity.keyed_hash
    wanted = {keyed("s3"), keyed("s1"), keyed("s9")}
    assert find_sources([opened], keyed, wanted) == {keyed("s1"): "s1", keyed("s3"): "s3"}
    assert find_sources([opened], keyed, wanted, 0) == {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> lists.InvertedLists:
    vectors = np.random.default_rng(5).normal(size=(2000, 8)).astype(np.float32)
    trained = Trained(8, Whole(8, "float16"), vectors[:12] / 2, nlist=12)
    numbers, codes, _, _ = trained.encode(torch.from_numpy(vectors))
    index = to_faiss(trained)
    lists.fill(index, numbers.numpy(), np.arange(2000), codes.numpy())
    path = tmp_path_factory.mktemp("lists") / "index.faiss"
    with path.open("xb") as file:
        lists.write_lists(index, file.write)
    return lists.read_lists(path)


@given(arrays(np.bool_, 2000, elements=st.booleans()), st.integers(1, 12), st.integers(0, 2000))
def test_lists_are_probed_until_they_hold_as_much(
    whole: lists.InvertedLists, wanted: np.ndarray, nprobe: int, first: int
) -> None:
    wanted = wanted & (np.arange(2000) >= first)
    some = [lists.SomeLists(whole, lambda ids: wanted[ids] & (ids % 2 == parity)) for parity in (0, 1)]  # noqa: B023
    queries = np.random.default_rng(6).normal(size=(40, 8)).astype(np.float32)
    order = nearest_lists(whole.trained, torch.from_numpy(queries), 12)
    seen = np.zeros(40, np.int64)

    def nearest(vectors: np.ndarray, nprobe: int) -> np.ndarray:
        return nearest_lists(whole.trained, torch.from_numpy(vectors), nprobe)

    everything, allowed = sum(one.whole for one in some), sum(one.sizes for one in some)
    for probed, rows in probes_by_query(nearest, queries, nprobe, everything, allowed):
        seen[rows] += 1
        for row in rows.tolist():
            held = sum(int(one.sizes[order[row, :probed]].sum()) for one in some)
            less = sum(int(one.sizes[order[row, : probed // 2]].sum()) for one in some)
            due = 2 * sum(whole.size(int(number)) for number in order[row, :nprobe])
            assert held >= due or probed == 12
            assert probed == nprobe or less < due
    assert (seen == 1).all()


def test_a_stage_with_filters_can_be_sent_anywhere() -> None:
    stage = NeighboursStage("store", "main", "t", 20, 2, filters=Filters(0.5, True, ("1f",), ("2e",)))
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert Filters.of({"filters": stage.filters.as_record()}) == stage.filters
    assert Filters.of(None) == Filters.of({}) == Filters() and Filters().as_record() == {}
