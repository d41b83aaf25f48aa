"""Key-value records: the key is searched, the value is its continuation and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_text, write_jsonl
from key_values import LENGTH, Written, make_store
from oracle import at, brute_force, read_plain, saved_neighbours
from stored import copy_store, stored_file

import retrotool
from retrotool import api
from retrotool.ann import lists
from retrotool.ann.choice import IndexOptions
from retrotool.embed.stage import EmbedStage
from retrotool.engine.task import Task
from retrotool.index.run import Options
from retrotool.info.command import _text
from retrotool.store.leases import Run
from retrotool.store.store import Store


def plain(first: int, n: int) -> list[Written]:
    return [Written(f"plain-{i}", make_text(i, 5 + i * 7 % 60)) for i in range(first, first + n)]


def records(first: int, n: int) -> list[Written]:
    """Keys of up to three times a chunk's length; values of up to four chunks."""
    return [
        Written(f"record-{i}", make_text(1000 + i, 3 + i * 5 % 45), make_text(5000 + i, 1 + i * 11 % 60))
        for i in range(first, first + n)
    ]


def build(root: Path, model: Path, *contents: list[Written]) -> Path:
    store = make_store(root, model, *contents)
    api.embed(store, encoder=str(model))
    api.index(store)
    return store


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Parts of plain documents, of records, and of both. Not to be changed: copy it."""
    contents = [plain(0, 30), records(0, 30), [*plain(30, 10), *records(30, 15), *plain(40, 5)]]
    store = build(tmp_path_factory.mktemp("mixed") / "store", tiny_encoder, *contents)
    api.neighbours(store)
    return store


@pytest.fixture
def mixed_copy(mixed: Path, tmp_path: Path) -> Path:
    return copy_store(mixed, tmp_path / "mixed")


def key_column(store: Path) -> np.ndarray:
    """What the files say, read without retrotool; a file without the column holds keys only."""
    tables = [pq.read_table(stored_file(store, part["chunks"]["path"])) for part in api.info(store).parts]
    return np.concatenate(
        [t["key"].to_numpy() if "key" in t.column_names else np.ones(t.num_rows, np.bool_) for t in tables]
    )


def purge(store: Path, *chunks: int, erase: bool = False) -> None:
    path = store.parent / "ids"
    path.write_text("".join(f"{chunk}\n" for chunk in chunks))
    api.purge(store, api.Selectors(chunk=Path(path)), reason="test", erase=erase)


def assert_neighbours_are_true(store: Path, database: Path, name: str = "main") -> None:
    """The saved tables are those of brute force over the embeddings files; ids may differ where distances tie."""
    queries, theirs = read_plain(store), read_plain(database)
    ids, distances = saved_neighbours(store, name)
    _, truth = brute_force(queries, theirs, ids.shape[1])
    assert np.array_equal(np.isinf(distances), np.isinf(truth))
    assert np.array_equal(ids == -1, np.isinf(truth))
    assert np.allclose(np.where(ids == -1, 0, distances), np.where(ids == -1, 0, truth), atol=1e-3, rtol=1e-4)
    place = {int(chunk): row for row, chunk in enumerate(theirs.ids)}
    for row, found in enumerate(ids):
        for chunk, distance in zip(found[found >= 0], distances[row], strict=False):
            target = place[int(chunk)]
            assert theirs.live[target] and theirs.documents[target] != queries.documents[row]
            apart = ((queries.vectors[row] - theirs.vectors[target]) ** 2).sum()
            assert distance == pytest.approx(apart, abs=1e-3, rel=1e-4)


def test_the_store_is_mixed_and_whole(mixed: Path) -> None:
    assert api.verify(mixed).problems == []
    names = [pq.read_schema(stored_file(mixed, part["chunks"]["path"])).names for part in api.info(mixed).parts]
    assert ["key" in columns for columns in names] == [False, True, True]
    assert 100 < key_column(mixed).sum() < len(key_column(mixed)) - 50


def test_keys_have_vectors_and_values_have_zeros(mixed: Path) -> None:
    assert np.array_equal(read_plain(mixed).vectors.any(axis=1), key_column(mixed))


def test_the_index_holds_the_keys_and_nothing_else(mixed: Path) -> None:
    store = read_plain(mixed)
    shards = api.info(mixed).indexes["main"]["shards"]
    found = np.concatenate([lists.read_lists(at(mixed, path)).ids(0) for path in shards])
    assert np.array_equal(np.sort(found), store.ids[key_column(mixed)])


def test_neighbours_over_a_mixed_store_are_those_of_brute_force(mixed: Path) -> None:
    assert_neighbours_are_true(mixed, mixed)
    ids, distances = saved_neighbours(mixed)
    values = ~key_column(mixed)
    assert (ids[values] == -1).all() and np.isinf(distances[values]).all()
    assert (ids[~values] >= 0).all()


def test_an_inverted_file_is_trained_cut_and_measured_on_keys_only(mixed_copy: Path) -> None:
    keys = int(key_column(mixed_copy).sum())
    largest = max(int(part["chunks"]["rows"]) for part in api.info(mixed_copy).parts)
    options = Options(IndexOptions(nlist=4, code="float16", shard_rows=keys))
    assert keys > largest, "all keys fit one shard, and all chunks do not"
    result = api.index(mixed_copy, name="ivf", target_recall=1.0, options=options)
    assert (result.vectors, result.shards) == (keys, 1)
    assert result.nlist == 4
    assert result.queries == keys
    path = at(mixed_copy, api.info(mixed_copy).indexes["ivf"]["trained"])
    # Centroids of keys are no nearer to zero, where all values lie, than keys are.
    vectors = read_plain(mixed_copy).vectors[key_column(mixed_copy)]
    centroids = lists.read_lists(path).trained.centroids
    assert centroids is not None
    mean = vectors.mean(axis=0)
    assert (((centroids - mean) ** 2).sum(1) <= ((vectors - mean) ** 2).sum(1).max()).all()
    assert (centroids @ mean >= (vectors @ mean).min() - 1e-3).all()
    api.neighbours(mixed_copy, name="ivf", index="ivf")
    assert_neighbours_are_true(mixed_copy, mixed_copy, "ivf")
    assert api.verify(mixed_copy).problems == []


def test_of_keys_alone_an_index_is_chosen_trained_again_and_held_against_what_came_later(
    mixed_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    options = Options(IndexOptions(nlist=4, code="float16"))
    before = api.index(mixed_copy, name="ivf", options=options)
    keys = np.flatnonzero(key_column(mixed_copy))
    read = read_plain(mixed_copy)
    purge(mixed_copy, *read.ids[keys[:10]].tolist(), erase=True)
    rows = [{"id": f"late-{i}", "text": make_text(9000 + i, 20)} for i in range(30)]
    api.chunk(mixed_copy, [str(write_jsonl(tmp_path / "late.jsonl", rows))])
    api.embed(mixed_copy, encoder=str(tiny_encoder))
    grown = api.index(mixed_copy, name="ivf")
    live = api.info(mixed_copy).keys
    assert grown.vectors == live and grown.drift is not None
    assert (grown.drift.new, grown.drift.vectors) == (live - (before.vectors - 10), live)
    again = api.index(mixed_copy, name="ivf", options=Options(retrain=True))
    assert (again.vectors, again.factory, again.retrain_reason) == (live, before.factory, "")
    assert again.drift is not None and again.drift.new == 0


@pytest.mark.parametrize(("queries", "database"), [(plain(100, 20), records(0, 40)), (records(100, 20), plain(0, 40))])
def test_across_stores_of_one_kind_each(
    queries: list[Written], database: list[Written], tmp_path: Path, tiny_encoder: Path
) -> None:
    # A document of either store that is in the other too, by its id, is none of its own neighbours.
    shared = [Written(database[0].id, queries[0].text, queries[0].value)]
    ours = make_store(tmp_path / "ours", tiny_encoder, [*queries, *shared])
    theirs = build(tmp_path / "theirs", tiny_encoder, database)
    api.embed(ours, encoder=str(tiny_encoder))
    result = api.neighbours(theirs, queries=ours, k=2)
    assert result.queries == result.rows == key_column(ours).sum()
    assert_neighbours_are_true(ours, theirs)
    reader, other = retrotool.open(ours), retrotool.open(theirs)
    for chunk in reader.document(queries[3].id):
        found = reader.neighbours(chunk)
        assert len(found) == (2 if reader.chunk(chunk).key else 0)
        for neighbour in found:
            assert neighbour.chunk.key
            following = other.document(neighbour.chunk.document)[neighbour.chunk.index + 1 :][:1]
            assert [neighbour.continuation.id] == following if neighbour.continuation else following == []


def test_a_record_comes_back_as_its_key_and_the_first_chunk_of_its_value(mixed: Path, tiny_encoder: Path) -> None:
    reader = retrotool.open(mixed)
    tokenizer = reader.tokenizer
    for record in records(0, 30):
        key, *values = reader.document(record.id)
        (tokens,), (value,) = tokenizer.encode_batch([record.text]), tokenizer.encode_batch([record.value or ""])
        assert reader.chunk(key).tokens.tolist() == list(tokens)[:LENGTH]
        assert [reader.chunk(key).key, *(reader.chunk(v).key for v in values)] == [True, *[False] * len(values)]
        assert np.concatenate([reader.chunk(v).tokens for v in values]).tolist() == list(value)
        following = reader.continuation(key)
        assert following is not None and following.id == values[0]
        assert reader.tokens([following.id]).shape == (1, LENGTH)
        assert [reader.neighbours(v) for v in values] == [[] for _ in values]
    assert reader.is_searchable(read_plain(mixed).ids).tolist() == key_column(mixed).tolist()


def test_search_finds_a_record_by_its_key_and_not_by_its_value(mixed: Path) -> None:
    reader = retrotool.open(mixed)
    encoder = reader.load_encoder()
    for record in records(0, 10):
        key, *values = reader.document(record.id)
        found = reader.search(reader.chunk(key).text, 1, encoder=encoder)[0]
        assert (found.distance, found.chunk.text) == (pytest.approx(0, abs=1e-3), reader.chunk(key).text)
        everything = reader.search(reader.chunk(values[0]).text, 1000, encoder=encoder)
        assert len(everything) == key_column(mixed).sum()
        assert all(neighbour.chunk.key for neighbour in everything)


@pytest.mark.parametrize("erase", [False, True])
def test_of_a_purged_key_the_values_are_nobodys_continuation(mixed_copy: Path, erase: bool) -> None:
    record = next(r for r in records(0, 30) if len(retrotool.open(mixed_copy).document(r.id)) == 4)
    key, *values = retrotool.open(mixed_copy).document(record.id)
    purge(mixed_copy, key, erase=erase)
    reader = retrotool.open(mixed_copy)
    assert [reader.continuation(chunk) for chunk in (key, *values)] == [None] * 4
    assert reader.document(record.id) == values, "they are in the store until they are purged too"
    assert all(key != found for chunk in reader.chunk_ids(0) for found, _ in reader.neighbour_ids(int(chunk), k=20))
    text = retrotool.open(mixed_copy).search(record.text, 1000)
    assert {key, *values}.isdisjoint({n.id for n in text} | {n.continuation.id for n in text if n.continuation})
    assert api.verify(mixed_copy).problems == []


@pytest.mark.parametrize("erase", [False, True])
def test_of_a_purged_value_the_key_stays_without_continuation(mixed_copy: Path, erase: bool) -> None:
    reader = retrotool.open(mixed_copy)
    record = next(r for r in records(0, 30) if len(reader.document(r.id)) == 4)
    key, *values = reader.document(record.id)
    before = reader.neighbour_ids(key)
    purge(mixed_copy, values[0], erase=erase)
    reader.refresh()
    assert reader.continuation(key) is None
    assert reader.neighbour_ids(key) == before
    following = reader.continuation(values[1])
    assert following is not None and following.id == values[2]
    assert api.verify(mixed_copy).problems == []


def test_an_erase_keeps_which_chunks_are_keys(mixed_copy: Path) -> None:
    before = key_column(mixed_copy)
    reader = retrotool.open(mixed_copy)
    purge(mixed_copy, *reader.document("record-3"), reader.document("record-35")[1], erase=True)
    assert np.array_equal(key_column(mixed_copy), before)
    verified = api.verify(mixed_copy)
    assert verified.problems == []
    api.neighbours(mixed_copy, name="after")
    assert_neighbours_are_true(mixed_copy, mixed_copy, "after")


def test_counts_are_of_keys_where_vectors_are_counted(mixed: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    store = make_store(tmp_path / "store", tiny_encoder, plain(0, 4), records(0, 12))
    keys = int(key_column(store).sum())
    result = api.embed(store, encoder=str(tiny_encoder))
    assert (result.chunks, result.embedded) == (keys, keys)
    made = api.index(store)
    assert (made.vectors, made.recall_at_10) == (keys, 1.0)
    found = api.neighbours(store)
    assert (found.queries, found.rows) == (keys, keys)
    info = api.info(store)
    assert (info.encoders["tiny"]["rows"], info.neighbours["main"]["rows"]) == (keys, keys)


def test_progress_of_embedding_ends_at_the_weight_also_where_chunks_are_erased(
    mixed_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    reader = retrotool.open(mixed_copy)
    purge(mixed_copy, reader.document("record-1")[0], reader.document("record-2")[1], erase=True)
    from conftest import make_encoder

    from retrotool.encoder import find_encoder

    model = make_encoder(tmp_path / "second", seed=3)
    store = Store.open(mixed_copy)
    stage = EmbedStage(str(model), find_encoder(str(model))[1])
    tasks = stage.plan(store)
    worker = stage.open(store)

    def progress(task: Task) -> int:
        reported: list[int] = []
        with Run(store.storage) as run:
            worker(task, run.id, reported.append)
        return sum(reported)

    assert [progress(task) for task in tasks] == [task.weight for task in tasks]
    assert sum(task.weight for task in tasks) == key_column(mixed_copy).sum() - 1, "one of the erased is a key"


def test_info_counts_living_keys_where_they_are_fewer_than_the_chunks(
    mixed_copy: Path, built_store: Path, cli: Callable[..., object]
) -> None:
    assert api.info(built_store).keys == api.info(built_store).chunks
    assert "keys)" not in _text(api.info(built_store))
    reader = retrotool.open(mixed_copy)
    for erase in (False, True):
        purge(mixed_copy, *reader.document("record-5")[: 1 + erase], reader.document("plain-7")[0], erase=erase)
        reader.refresh()
        live = np.concatenate([reader.chunk_ids(part) for part in reader.parts()])
        info = api.info(mixed_copy)
        assert (info.chunks, info.keys) == (len(live), int(reader.is_searchable(live).sum()))
        assert f"({info.keys:,} of them keys)" in _text(info)
    shown = json.loads(cli("info", mixed_copy, "--json").stdout)  # type: ignore[attr-defined]
    assert shown["keys"] == info.keys
