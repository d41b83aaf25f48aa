"""Every recipe in docs/format.md gives what retrotool's own reader gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import ROOT, blocks

import retrotool
from retrotool import api
from retrotool.reader import Reader
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
    return {
        "part": part,
        "chunks": str(built_store / files["chunks"]["path"]),
        "documents": str(built_store / files["documents"]["path"]),
        "embeddings": str(built_store / files["embeddings"][encoder]["path"]),
        "shard": str(built_store / shard),
        "chunk_length": info.chunk_length,
        "token_dtype": token_dtype(json.loads((built_store / "store.json").read_bytes())["tokenizer"]["token_bytes"]),
    }


def run(recipe: str, names: dict[str, Any]) -> dict[str, Any]:
    space = dict(names)
    exec(compile(RECIPES[recipe], recipe, "exec"), space)
    return space


def test_no_recipe_is_forgotten() -> None:
    assert sorted(RECIPES) == ["DuckDB", "Polars", "faiss", "materialised", "numpy", "pyarrow and numpy"]


def test_duckdb_counts_the_chunks_of_each_length(names: dict[str, Any], reader: Reader, part: int) -> None:
    expected = Counter(reader.chunk(int(i)).n_tokens for i in reader.chunk_ids(part))
    assert run("DuckDB", names)["lengths"] == sorted(expected.items())


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
    found = run("materialised", {**names, "neighbours": str(store_copy / files["neighbours"]["main"]["path"])})
    reader = retrotool.open(store_copy)
    assert found["near"].shape[1:] == (2, 2, 64)
    for row, chunk in enumerate(reader.chunk_ids(part).tolist()):
        for near, stored in zip(reader.neighbours(chunk), found["near"][row], strict=True):
            assert stored[0, : near.chunk.n_tokens].tolist() == near.chunk.tokens.tolist()
            follows = [] if near.continuation is None else near.continuation.tokens.tolist()
            assert stored[1].tolist() == follows + [0] * (64 - len(follows))
