"""Neighbours and search against brute force in numpy on the files, read without retrotool's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_encoder, make_rows, write_jsonl
from oracle import at, brute_force, read_plain, saved_neighbours
from stored import copy_store

import retrotool
from retrotool import api, engine
from retrotool.ann.choice import IndexOptions
from retrotool.errors import UsageError
from retrotool.index.run import Options
from retrotool.index.stage import IndexStage
from retrotool.store.leases import Run
from retrotool.store.store import Store


def assert_same_neighbours(found: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal distances; equal ids but where distances tie."""
    assert np.array_equal(np.isinf(found[1]), np.isinf(truth[1]))
    assert np.array_equal(found[0] == -1, np.isinf(found[1]))
    finite = np.isfinite(truth[1])
    assert np.allclose(found[1][finite], truth[1][finite], atol=1e-3, rtol=1e-4)
    assert (np.diff(np.where(np.isinf(found[1]), 1e30, found[1]), axis=1) >= 0).all()


def recall(found: np.ndarray, truth: np.ndarray, k: int = 10) -> float:
    pairs = [(set(f[:k]) - {-1}, set(t[:k]) - {-1}) for f, t in zip(found, truth, strict=True)]
    return float(np.mean([len(f & t) / len(t) for f, t in pairs if t]))


def test_neighbours_are_those_of_brute_force_and_of_other_documents(built_store: Path) -> None:
    plain = read_plain(built_store)
    truth = brute_force(plain, plain, 20)
    found = saved_neighbours(built_store)
    assert_same_neighbours(found, truth)
    assert recall(found[0], truth[0]) >= 0.99
    place = {int(i): n for n, i in enumerate(plain.ids)}
    for row, ids in enumerate(found[0]):
        assert all(plain.documents[place[int(i)]] != plain.documents[row] for i in ids if i >= 0)


def test_an_inverted_file_reaches_the_target_recall(built_store: Path, tmp_path: Path) -> None:
    store = copy_store(built_store, tmp_path / "store")
    result = api.index(store, name="ivf", options=Options(IndexOptions(nlist=8, code="float16", shard_rows=150)))
    assert result.nlist == 8
    assert result.shards == 4
    api.neighbours(store, name="ivf", index="ivf")
    plain = read_plain(store)
    truth = brute_force(plain, plain, 20)
    found = saved_neighbours(store, "ivf")
    assert recall(found[0], truth[0]) >= 0.95
    # More lists are probed for tables than the index was measured with.
    assert result.recall_at_10 - 0.01 <= recall(found[0], truth[0])
    assert api.verify(store).ok


def test_across_stores_a_document_is_the_same_when_its_id_is(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = [*make_rows(10, first=115), *({**row, "id": "new-" + row["id"]} for row in make_rows(5))]
    queries = tmp_path / "queries"
    api.chunk(queries, [str(write_jsonl(tmp_path / "q.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.embed(queries, encoder=str(tiny_encoder))
    result = api.neighbours(built_store, queries=queries, name="from-built", k=3)
    assert result.queries == api.info(queries).chunks
    ours, theirs = read_plain(queries), read_plain(built_store)
    assert_same_neighbours(saved_neighbours(queries, "from-built"), brute_force(ours, theirs, 20))
    # The same text under another id is a neighbour at distance 0; under the same id it is none.
    reader = retrotool.open(queries)
    copy, same = reader.document("new-doc-1")[0], reader.document("doc-117")[0]
    assert reader.neighbours(copy, "from-built")[0].chunk.document == "doc-1"
    assert reader.neighbours(copy, "from-built")[0].distance == pytest.approx(0, abs=1e-4)
    assert len(reader.neighbours(same, "from-built")) == 3
    assert all(n.chunk.document != "doc-117" for n in reader.neighbours(same, "from-built", k=20))


def test_after_appending_only_what_is_missing_is_computed_and_all_is_as_from_scratch(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    store = copy_store(built_store, tmp_path / "store")
    api.chunk(store, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(20, first=500)))])
    embedded = api.embed(store, encoder=str(tiny_encoder))
    assert embedded.chunks < embedded.embedded
    assert api.index(store).shards == 2
    api.neighbours(store)
    plain = read_plain(store)
    assert_same_neighbours(saved_neighbours(store), brute_force(plain, plain, 20))
    assert api.neighbours(store).queries == 0, "nothing is left to do"
    assert api.verify(store).ok


def test_a_chunks_text_finds_itself_first(built_store: Path) -> None:
    reader = retrotool.open(built_store)
    encoder = reader.load_encoder()
    ids = np.concatenate([reader.chunk_ids(part) for part in reader.parts()])
    for chunk in np.random.default_rng(0).choice(ids, 40, replace=False):
        first = reader.search(reader.chunk(int(chunk)).text, 1, encoder=encoder)[0]
        assert first.distance == pytest.approx(0, abs=1e-3)
        assert first.id == chunk or first.chunk.text == reader.chunk(int(chunk)).text


def test_continuations_are_the_next_chunk_of_the_same_document(built_store: Path) -> None:
    reader = retrotool.open(built_store)
    for name in ("doc-7", "doc-100"):
        chunks = reader.document(name)
        following = [reader.continuation(chunk) for chunk in chunks]
        assert [c.id if c else None for c in following] == [*chunks[1:], None]


def test_one_document_alone_has_no_neighbours_and_that_is_no_error(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "one.jsonl", make_rows(1, first=5)))], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    assert api.index(store).recall_at_10 == 1.0
    api.neighbours(store)
    ids, distances = saved_neighbours(store)
    assert (ids == -1).all() and np.isinf(distances).all()


def test_what_is_missing_is_named_with_the_next_command(built_store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "one.jsonl", make_rows(2)))], tokenizer=str(tiny_encoder))
    with pytest.raises(UsageError, match="has no index") as error:
        api.neighbours(store)
    assert "retrotool index" in error.value.advice
    with pytest.raises(UsageError, match="no embeddings") as error:
        api.index(store)
    assert "retrotool embed" in error.value.advice
    with pytest.raises(UsageError, match="has no embeddings of 'tiny'"):
        api.neighbours(built_store, queries=store)
    other = make_encoder(tmp_path / "other" / "tiny", seed=1)
    api.embed(store, encoder=str(other))
    with pytest.raises(UsageError, match="different encoders"):
        api.neighbours(built_store, queries=store)
    with pytest.raises(UsageError, match="another encoder under the name"):
        api.embed(store, encoder=str(tiny_encoder))


def test_faiss_reads_a_shard_and_agrees_with_brute_force(built_store: Path) -> None:
    import faiss

    plain = read_plain(built_store)
    (shard,) = api.info(built_store).indexes["main"]["shards"]
    index = faiss.read_index(str(at(built_store, shard)))
    distances, ids = index.search(plain.vectors, 1)
    assert np.allclose(distances[:, 0], 0, atol=1e-3)
    assert np.allclose(plain.vectors[np.searchsorted(plain.ids, ids[:, 0])], plain.vectors)


def test_an_interrupted_index_is_measured_when_it_is_run_again(store_copy: Path) -> None:
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        engine.execute(IndexStage("late", "tiny"), store, run)
    assert "index:late" not in store.refresh().records
    assert api.index(store_copy, name="late").recall_at_10 == 1.0
