"""Vectors made elsewhere: given as files, checked, stored for the right chunks, and searched like all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Cli, Shared, make_rows, write_jsonl
from stored import copy_store

import retrotool
from retrotool import api
from retrotool.embed import foreign_vectors
from retrotool.errors import RetrotoolError, UsageError
from retrotool.store.parts import chunk_ids, format_id

D = 12


@pytest.fixture(scope="session")
def chunked(shared: Shared[Path], tiny_encoder: Path) -> Path:
    """A store of several parts without vectors, with a document that is purged. Copy to change it."""

    def make(folder: Path) -> Path:
        rows = write_jsonl(folder / "a.jsonl", make_rows(24, words=120))
        api.chunk(folder / "store", [str(rows)], tokenizer=str(tiny_encoder), part_size=16)
        api.purge(folder / "store", api.Selectors(document="doc-5"), reason="test")
        return folder / "store"

    return shared("chunked", make)


@pytest.fixture
def store(chunked: Path, tmp_path: Path) -> Path:
    return copy_store(chunked, tmp_path / "store")


def ids_of(store: Path, first: int = 0) -> np.ndarray:
    """Ids of all rows of chunk files, live or not, from a part on."""
    found = [chunk_ids(one["part"], np.arange(one["chunks"]["rows"])) for one in api.info(store).parts[first:]]
    return np.concatenate(found)


def live_of(store: Path) -> np.ndarray:
    reader = retrotool.open(store)
    return np.concatenate([reader.chunk_ids(part) for part in reader.parts()])


def vector_of(ids: np.ndarray) -> np.ndarray:
    """A vector for each id that no other id has."""
    return np.stack([np.random.default_rng(int(i)).normal(size=D) for i in ids])


def add(store: Path, first: int, n: int = 3) -> None:
    api.chunk(store, [str(write_jsonl(store.parent / f"{first}.jsonl", make_rows(n, first=first, words=60)))])


def check_stored(store: Path, encoder: str = "model") -> None:
    """Every live chunk has its own vector, and the store is sound."""
    reader = retrotool.open(store)
    for part in reader.parts():
        ids, vectors = reader.chunk_ids(part), reader.embeddings(part, encoder)
        np.testing.assert_allclose(vectors[ids & 0xFFFFFFFF], vector_of(ids), rtol=1e-3, atol=1e-3)
        others = np.setdiff1d(np.arange(len(vectors)), ids & 0xFFFFFFFF)
        assert not vectors[others].any(), "purged ones are not read"
    assert api.verify(store).ok


def as_parquet(path: Path, ids: np.ndarray, chunk: Any = None, column: str = "vector", vectors: Any = None) -> Path:
    vectors = vector_of(ids) if vectors is None else vectors
    lists = vectors if isinstance(vectors, pa.Array) else pa.array(list(vectors))
    pq.write_table(pa.table({"chunk": ids if chunk is None else chunk, column: lists}), path, row_group_size=20)
    return path


def test_npy_files_in_the_order_of_their_names(store: Path, tmp_path: Path, cli: Cli) -> None:
    vectors = vector_of(ids_of(store)).astype(np.float32)
    (tmp_path / "vectors").mkdir()
    for i, some in enumerate(np.array_split(vectors, [7, 8, 31])):
        np.save(tmp_path / "vectors" / f"{i}.npy", some)
    given = cli("embed", store, "--from", tmp_path / "vectors", "--encoder", "their/model", "--name", "model")
    assert given.stdout.startswith(f"{api.info(store).chunks} chunks given vectors (encoder model, 12 dimensions, made")
    check_stored(store)
    assert "12 dimensions, " in (shown := cli("info", store).stdout) and "made elsewhere by their/model" in shown
    record = json.loads(cli("info", store, "--json").stdout)["encoders"]["model"]
    assert (record["foreign"], record["origin"], record["pooling"]) == (True, "their/model", "")
    assert api.embed(store, encoder="their/model", vectors=tmp_path / "vectors").chunks == 0


def test_index_neighbours_and_search_by_a_vector(store: Path, tmp_path: Path, cli: Cli) -> None:
    np.save(tmp_path / "v.npy", vector_of(ids_of(store)))
    api.embed(store, encoder="model", vectors=tmp_path / "v.npy")
    api.index(store)
    api.neighbours(store)
    live = live_of(store)
    query = vector_of(live[3:4])[0]
    distances = ((vector_of(live) - query) ** 2).sum(1)
    found = retrotool.open(store).search(query, 4)
    assert [one.id for one in found] == live[np.argsort(distances)[:4]].tolist()
    assert found[0].distance < 0.01
    refused = cli("search", store, "text")
    assert refused.returncode == 2
    assert "computed elsewhere, by model" in refused.stderr and "retrotool.open(STORE).search(vector)" in refused.stderr
    add(store, 100)
    after = json.loads(cli("neighbours", store, "--json").stdout)["next"][0]
    assert after.endswith("--from VECTORS --encoder model")


@pytest.mark.parametrize("chunk", ["int64", "uint64", "string", "large_string"])
def test_parquet_files_name_chunks_in_any_order(
    store: Path, tmp_path: Path, chunk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_vectors, "_BLOCK_BYTES", 2 * D * 5)  # parts have several blocks
    live = live_of(store)
    assert len(live) < len(ids_of(store)), "the purged need no vector"
    mixed = np.random.default_rng(0).permutation(np.append(live, chunk_ids(99, np.arange(4))))
    for i, some in enumerate(np.array_split(mixed, 3)):
        named = [int(one) if "int" in chunk else format_id(int(one)) for one in some]
        ids = pa.array(named, getattr(pa, chunk)())
        kind = pa.large_list(pa.float16()) if "large" in chunk else pa.list_(pa.float64(), D)
        as_parquet(tmp_path / f"{i}.parquet", some, ids, "embedding", pa.array(list(vector_of(some)), kind))
    api.embed(store, encoder="model", vectors=str(tmp_path / "*.parquet"))
    check_stored(store)


def test_a_purge_whose_chunks_were_given_no_vectors_is_not_undone(store: Path, tmp_path: Path, cli: Cli) -> None:
    api.embed(store, encoder="model", vectors=as_parquet(tmp_path / "v.parquet", live_of(store)))
    own = api.purge(store, api.Selectors(document="doc-6"), reason="test").purge
    before = api.info(store)
    first = api.list_purges(store).purges[0]
    refused = cli("undo", store, first.purge, "--reason", "a mistake")
    assert refused.returncode == 2
    assert f"{first.chunks} chunks of it had no vectors in the files that were given for model" in refused.stderr
    assert api.info(store) == before
    api.undo(store, own, reason="its chunks had vectors")
    again = write_jsonl(tmp_path / "again.jsonl", make_rows(1, first=5, words=120))
    assert api.chunk(store, [str(again)], allow_purged=True).documents == 1
    api.embed(store, encoder="model", vectors=as_parquet(tmp_path / "w.parquet", live_of(store)))
    check_stored(store)


def test_an_undo_while_vectors_are_stored_without_its_chunks(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = as_parquet(tmp_path / "v.parquet", live_of(store))
    write, undone = foreign_vectors.write_vector_blocks, list[str]()

    def slow(there: Any, name: Any, rows: int, *others: Any) -> Any:
        written = write(there, name, rows, *others)
        if not undone:
            undone.append(api.list_purges(store).purges[0].purge)
            api.undo(store, undone[0], reason="a mistake")
        return written

    monkeypatch.setattr(foreign_vectors, "write_vector_blocks", slow)
    with pytest.raises(UsageError, match="have none or several vectors of these chunks"):
        api.embed(store, encoder="model", vectors=files)
    assert undone
    api.embed(store, encoder="model", vectors=as_parquet(tmp_path / "w.parquet", live_of(store)))
    check_stored(store)


def test_later_chunks_are_given_by_files_of_these_or_of_all(store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", vector_of(ids_of(store)))
    api.embed(store, encoder="model", vectors=tmp_path / "0.npy")
    parts = len(api.info(store).parts)
    add(store, 100)
    with pytest.raises(UsageError, match=r"the files have \d+ vectors, .*of which \d+ have no vectors yet"):
        api.embed(store, encoder="model", vectors=tmp_path / "0.npy")
    np.save(tmp_path / "1.npy", vector_of(ids_of(store, parts)))
    api.embed(store, encoder="model", vectors=tmp_path / "1.npy")
    add(store, 200)
    np.save(tmp_path / "all.npy", vector_of(ids_of(store)))
    api.embed(store, encoder="model", vectors=tmp_path / "all.npy")
    check_stored(store)
    add(store, 300)
    as_parquet(tmp_path / "all.parquet", ids_of(store))
    api.embed(store, encoder="model", vectors=tmp_path / "all.parquet")
    check_stored(store)


def test_a_run_that_was_killed_is_resumed_by_the_same_files_also_after_more_was_chunked(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "v.npy", vector_of(ids_of(store)))

    def stop(worker: foreign_vectors.ForeignWorker, task: Any, *rest: Any) -> Any:
        if task.inputs["part"] == 2:
            raise KeyboardInterrupt
        return begun(worker, task, *rest)

    begun = foreign_vectors.ForeignWorker.__call__
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(foreign_vectors.ForeignWorker, "__call__", stop)
        api.embed(store, encoder="model", vectors=tmp_path / "v.npy")
    done = api.info(store).encoders["model"]["parts"]
    assert 0 < done < len(api.info(store).parts)
    add(store, 100)
    made = api.embed(store, encoder="model", vectors=tmp_path / "v.npy")
    assert made.parts == len(api.info(store).parts) - done - 1
    left = ids_of(store, len(api.info(store).parts) - 1)
    as_parquet(tmp_path / "left.parquet", left)
    api.embed(store, encoder="model", vectors=tmp_path / "left.parquet")
    check_stored(store)


def test_a_wrong_vector_in_the_last_part_leaves_the_store_as_it_was(store: Path, tmp_path: Path, cli: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    np.save(tmp_path / "v.npy", put(vector_of(ids_of(store)), -1, np.nan))
    failed = cli("embed", store, "--from", tmp_path / "v.npy", "--encoder", "model")
    assert failed.returncode == 2
    assert failed.stderr.endswith("Nothing was stored. Correct the files and run the same command again.\n")
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before
    np.save(tmp_path / "w.npy", np.ones((len(ids_of(store)), D + 1)))
    assert cli("embed", store, "--from", tmp_path / "w.npy", "--encoder", "model").returncode == 0, "another dimension"


def test_a_wrong_number_of_rows_is_refused_with_the_numbers_and_the_likely_reason(store: Path, tmp_path: Path) -> None:
    rows, live = len(ids_of(store)), api.info(store).chunks
    for n, reason in ((live, f"{live} chunks are live"), (rows - 1, "were added since"), (rows + 1, "another store")):
        np.save(tmp_path / "v.npy", np.ones((n, D)))
        with pytest.raises(UsageError) as raised:
            api.embed(store, encoder="model", vectors=tmp_path / "v.npy")
        assert f"have {n} vectors, but the store has {rows} chunks, purged ones included" in str(raised.value)
        assert reason in raised.value.advice and f"one row for each of these {rows}, by part" in raised.value.advice


def matrix(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, np.ndarray], None]:
    return lambda folder, ids: np.save(folder / "v.npy", change(vector_of(ids)))


def table(change: Callable[[np.ndarray], dict[str, Any]]) -> Callable[[Path, np.ndarray], None]:
    def write(folder: Path, ids: np.ndarray) -> None:
        as_parquet(folder / "v.parquet", **{"ids": ids, **change(ids)})

    return write


def put(values: Any, place: Any, value: Any) -> Any:
    values = values.copy() if isinstance(values, np.ndarray) else list(values)
    values[place] = value
    return values


def cut(folder: Path, ids: np.ndarray) -> None:
    np.save(folder / "v.npy", vector_of(ids))
    (folder / "v.npy").write_bytes((folder / "v.npy").read_bytes()[:-9])


def pair(folder: Path, ids: np.ndarray) -> None:
    np.save(folder / "v.npy", vector_of(ids))
    np.save(folder / "w.npy", vector_of(ids)[:, :5])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (matrix(lambda v: v[:-1]), r"the files have \d+ vectors, but the store has \d+ chunks"),
        (matrix(lambda v: v.astype(np.int8)), r"v.npy: int8 \[\d+, 12\], not float"),
        (matrix(lambda v: v[0]), r"v.npy: float64 \[12\], not float \[rows, dimension\]"),
        (matrix(lambda v: v.astype(object)), "v.npy: not a whole .npy file: Array can't be memory-mapped"),
        (matrix(lambda v: put(v, (3, 4), np.inf)), r"v.npy: the vector of chunk 0:3 \(row 3\) has NaN, inf"),
        (matrix(lambda v: put(v, (50, 4), 1e6)), r"\(row 50\) has .* more than float16 holds"),
        (cut, "v.npy: not a whole .npy file"),
        (pair, "w.npy has 5 dimensions, but .*v.npy has 12"),
        (table(lambda ids: {"ids": ids[ids != ids[2]]}), r"none or several vectors of these chunks: 0:2$"),
        (table(lambda ids: {"ids": put(ids, 2, 3)}), r"none or several vectors of these chunks: 0:2, 0:3$"),
        (table(lambda ids: {"ids": ids[40:]}), r"these chunks: 0:0, 0:1, 0:2 and \d+ more$"),
        (table(lambda ids: {"column": "other"}), r"v.parquet has the columns chunk \(int64\), other \(list"),
        (table(lambda ids: {"vectors": np.ones((len(ids), 2), np.int64)}), "has the columns chunk"),
        (table(lambda ids: {"vectors": put(vector_of(ids), (2, 1), np.nan)}), "the vector of chunk 0:2 has NaN"),
        (
            table(lambda ids: {"vectors": pa.array(put(list(vector_of(ids)), 2, [0.0]))}),
            "chunk 0:2 has 1 numbers, others have 12",
        ),
        (table(lambda ids: {"vectors": pa.array(put(list(vector_of(ids)), 2, None))}), "chunk 0:2 has 0 numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_by_file_and_row(
    write: Callable[[Path, np.ndarray], None], message: str, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "v").mkdir()
    write(tmp_path / "v", ids_of(store))
    with pytest.raises(UsageError, match=message):
        api.embed(store, encoder="model", vectors=tmp_path / "v")


def test_arguments_that_contradict_each_other(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    np.save(tmp_path / "v.npy", vector_of(ids_of(store)))
    for wrong in ({"check": True}, {"dimension": 4}, {"pooling": "cls"}, {"encoder": "minilm"}):
        with pytest.raises(UsageError, match=r"--from (takes vectors as they are|needs the name of the model)"):
            api.embed(store, vectors=tmp_path / "v.npy", **{"encoder": "model", **wrong})
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "empty", tmp_path / "nowhere.npy", write_jsonl(tmp_path / "x.jsonl", make_rows(1))):
        with pytest.raises(RetrotoolError):
            api.embed(store, vectors=given, encoder="model")
    api.embed(store, vectors=tmp_path / "v.npy", encoder="model")
    add(store, 100)
    np.save(tmp_path / "v.npy", np.ones((len(ids_of(store)), 5)))
    with pytest.raises(UsageError, match="another encoder under the name 'model', of 12 dimensions"):
        api.embed(store, vectors=tmp_path / "v.npy", encoder="model")
    with pytest.raises(UsageError, match="another encoder under the name 'model'"):
        api.embed(store, encoder=str(tiny_encoder), name="model")
