"""Every recipe in docs/format.md gives what retrotool's own reader gives."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, write_jsonl
from pages import ROOT, blocks
from stored import stored_file

import retrotool
from retrotool import api
from retrotool.errors import DuplicatesError
from retrotool.reader import Reader
from retrotool.sources import Fields
from retrotool.store.parts import token_dtype

RECIPES = {
    block.lines[0].removeprefix("# ").partition(":")[0]: block.text
    for block in blocks(ROOT / "docs" / "format.md")
    if block.language == "python"
}


@pytest.fixture(scope="module")
def reader(built_store: Path) -> Reader:
    return retrotool.open(built_store)


@pytest.fixture(scope="module")
def part(reader: Reader) -> int:
    """Not the first part, so that part numbers count."""
    assert len(reader.parts()) > 2
    return reader.parts()[1]


@pytest.fixture(scope="module")
def names(built_store: Path, reader: Reader, part: int) -> dict[str, Any]:
    """What the recipes take as given, for one part."""
    info = api.info(built_store)
    files = next(entry for entry in info.parts if entry["part"] == part)
    (encoder,) = files["embeddings"]
    (shard,) = info.indexes["main"]["shards"]
    identity = json.loads(stored_file(built_store, "store.json").read_bytes())
    return {
        "part": part,
        "chunks": os.fspath(stored_file(built_store, files["chunks"]["path"])),
        "documents": os.fspath(stored_file(built_store, files["documents"]["path"])),
        "embeddings": os.fspath(stored_file(built_store, files["embeddings"][encoder]["path"])),
        "shard": os.fspath(stored_file(built_store, shard)),
        "chunk_length": info.chunk_length,
        "token_dtype": token_dtype(identity["tokenizer"]["token_bytes"]),
    }


def run(recipe: str, names: dict[str, Any]) -> dict[str, Any]:
    space = dict(names)
    exec(compile(RECIPES[recipe], recipe, "exec"), space)
    return space


def test_no_recipe_is_forgotten() -> None:
    assert sorted(RECIPES) == [
        "DuckDB",
        "DuckDB, all parts",
        "Polars",
        "faiss",
        "materialised",
        "numpy",
        "pyarrow and numpy",
    ]


def test_duckdb_counts_the_chunks_of_each_length(names: dict[str, Any], reader: Reader, part: int) -> None:
    expected = Counter(reader.chunk(int(i)).n_tokens for i in reader.chunk_ids(part))
    assert run("DuckDB", names)["lengths"] == sorted(expected.items())


@pytest.fixture
def grown_store(store_copy: Path, tmp_path: Path) -> Path:
    """A store whose runs kept different columns: two are finished, one is not; a document is erased."""
    for field in ("year", "licence"):
        rows = [{"id": f"{field}-{i}", "text": f"{field} {i} " * 60, field: str(i)} for i in range(5)]
        source = write_jsonl(tmp_path / f"{field}.jsonl", rows)
        api.chunk(store_copy, [str(source)], fields=Fields(keep=(field,)), part_size=4)
    record = {"id": "record", "question": "what is kept?", "answer": "a value " * 100}
    source = write_jsonl(tmp_path / "records.jsonl", [record])
    api.chunk(store_copy, [str(source)], fields=Fields(key="question", value="answer"))
    api.purge(store_copy, api.Selectors(document=("doc-3", "year-1")), reason="test", erase=True)
    again = write_jsonl(tmp_path / "again.jsonl", [{"id": "doc-4", "text": "again"}])
    with pytest.raises(DuplicatesError):
        api.chunk(store_copy, [str(again)], existing="fail")
    return store_copy


def all_parts(store: Path, tmp_path: Path, cli: Cli) -> dict[str, Any]:
    """What the recipe for all parts finds, and its connection as ``duckdb``."""
    listing = tmp_path / "files.csv"
    listing.write_text(cli("info", store, "--files", "--csv").stdout)
    return run("DuckDB, all parts", {"store": store, "listing": listing})


@pytest.mark.on_disk
def test_duckdb_joins_all_parts_by_the_list_of_files(grown_store: Path, tmp_path: Path, cli: Cli) -> None:
    reader = retrotool.open(grown_store)
    # What a kill may leave: a whole file that no commit names.
    for kind in ("chunks", "documents"):
        some = next((grown_store / kind).glob("*.parquet"))
        shutil.copy(some, some.with_name("0123abcd01234567.parquet"))
    found = all_parts(grown_store, tmp_path, cli)
    due = [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]
    assert len(due) > 300
    live = {chunk: document for chunk, document in found["ids"] if document is not None}
    assert [(chunk, reader.chunk(chunk).document) for chunk in due] == sorted(live.items())
    tokens = found["duckdb"].sql("SELECT chunk, n_tokens FROM chunks WHERE n_tokens > 0 ORDER BY chunk").fetchall()
    assert tokens == [(chunk, reader.chunk(chunk).n_tokens) for chunk in due]


@pytest.mark.on_disk
def test_duckdb_reads_columns_that_some_parts_have(grown_store: Path, tmp_path: Path, cli: Cli) -> None:
    found = all_parts(grown_store, tmp_path, cli)["duckdb"]
    kept = found.sql("SELECT id, year, licence FROM documents WHERE year IS NOT NULL OR licence IS NOT NULL").fetchall()
    years = [(f"year-{i}", str(i), None) for i in range(5) if i != 1]
    assert sorted(kept) == sorted([*years, *((f"licence-{i}", None, str(i)) for i in range(5))])
    values = found.sql("SELECT count(*) FROM chunks JOIN documents USING (part, doc) WHERE NOT chunks.key").fetchall()
    assert values == [(len(retrotool.open(grown_store).document("record")) - 1,)]


@pytest.mark.on_disk
def test_duckdb_is_reported_of_a_file_that_was_erased_since(grown_store: Path, tmp_path: Path, cli: Cli) -> None:
    found = all_parts(grown_store, tmp_path, cli)["duckdb"]
    api.purge(grown_store, api.Selectors(document=("doc-5",)), reason="test", erase=True)
    with pytest.raises(found.IOException, match="No files found"):
        found.sql("SELECT count(*) FROM chunks").fetchall()


def test_polars_finds_the_longest_documents(names: dict[str, Any], reader: Reader, part: int) -> None:
    ids = [int(i) for i in reader.chunk_ids(part)]
    tokens: Counter[str] = Counter()
    for i in ids:
        chunk = reader.chunk(i)
        tokens[chunk.document] += chunk.n_tokens
    longest = run("Polars", names)["longest"]
    assert longest["n_tokens"].to_list() == sorted(tokens.values(), reverse=True)[:3]
    assert all(tokens[row["id"]] == row["n_tokens"] for row in longest.to_dicts())


def test_pyarrow_and_numpy_read_the_tokens(names: dict[str, Any], reader: Reader, part: int) -> None:
    tokens = run("pyarrow and numpy", names)["tokens"]
    ids = reader.chunk_ids(part)
    assert len(ids) == len(tokens) >= 100
    assert tokens.dtype == reader.tokens(ids).dtype
    assert np.array_equal(tokens, reader.tokens(ids))
    # Padding is zero, and what counts is what a chunk says it has.
    first = reader.chunk(int(ids[0]))
    assert tokens[0, : first.n_tokens].tolist() == first.tokens.tolist()
    assert not tokens[0, first.n_tokens :].any()


def test_numpy_maps_the_vectors_under_their_ids(names: dict[str, Any], reader: Reader, part: int) -> None:
    found = run("numpy", names)
    assert np.array_equal(found["vectors"], reader.embeddings(part))
    assert found["vectors"].dtype == np.float16
    assert np.array_equal(found["ids"], reader.chunk_ids(part))


def test_faiss_searches_a_shard_by_chunk_ids(names: dict[str, Any], reader: Reader, part: int) -> None:
    vectors = reader.embeddings(part)
    found = run("faiss", {**names, "vectors": vectors})
    everything = np.concatenate([reader.embeddings(p) for p in reader.parts()]).astype(np.float32)
    ids = np.concatenate([reader.chunk_ids(p) for p in reader.parts()])
    exact = ((everything[None] - vectors[:3, None].astype(np.float32)) ** 2).sum(2)
    order = np.sort(exact, axis=1)[:, :5]
    assert np.allclose(found["distances"], order, rtol=1e-3, atol=1e-3)
    place = np.searchsorted(ids, found["neighbours"])
    assert np.array_equal(ids[place], found["neighbours"])
    assert np.allclose(np.take_along_axis(exact, place, 1), found["distances"], rtol=1e-3, atol=1e-3)


def test_faiss_and_the_neighbour_table_agree(names: dict[str, Any], reader: Reader, part: int) -> None:
    """The table leaves the own document out, and nothing else."""
    vectors = reader.embeddings(part)
    index = run("faiss", {**names, "vectors": vectors})["index"]
    distances, neighbours = index.search(vectors[:20].astype(np.float32), 60)
    for row, (near, ids) in enumerate(zip(distances, neighbours, strict=True)):
        own = set(reader.document(reader.chunk(int(reader.chunk_ids(part)[row])).document))
        others = [float(d) for d, i in zip(near, ids, strict=True) if int(i) not in own][:5]
        table = [d for _, d in reader.neighbour_ids(int(reader.chunk_ids(part)[row]), k=5)]
        assert np.allclose(table, others, rtol=1e-3, atol=1e-3)


def test_materialised_neighbours_are_the_chunks_that_the_table_names(
    names: dict[str, Any], store_copy: Path, part: int
) -> None:
    api.neighbours(store_copy, k=2, materialise=True)
    files = next(entry for entry in api.info(store_copy).parts if entry["part"] == part)
    found = run(
        "materialised", {**names, "neighbours": os.fspath(stored_file(store_copy, files["neighbours"]["main"]["path"]))}
    )
    reader = retrotool.open(store_copy)
    assert found["near"].shape[1:] == (2, 2, 64)
    for row, chunk in enumerate(reader.chunk_ids(part).tolist()):
        for near, stored in zip(reader.neighbours(chunk), found["near"][row], strict=True):
            assert stored[0, : near.chunk.n_tokens].tolist() == near.chunk.tokens.tolist()
            follows = [] if near.continuation is None else near.continuation.tokens.tolist()
            assert stored[1].tolist() == follows + [0] * (64 - len(follows))
