"""What is exported is what ``retrotool.open`` says, and nothing that was purged."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, make_rows, write_jsonl
from key_values import Written, make_store
from tokenizers import Tokenizer

import retrotool
from retrotool import api
from retrotool.export import run as exported
from retrotool.export.run import ExportResult
from retrotool.info.run import Info
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.reader import Chunk, Reader
from retrotool.store import neighbour_tables, parts
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.neighbour_tables import NeighbourTable
from retrotool.store.paths import FileName, part_slot
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)


@dataclass(frozen=True)
class Near:
    """A neighbour as the API gives it: which database, its distance, the chunk and the one that follows."""

    database: int
    distance: float
    chunk: Chunk
    continuation: Chunk | None

    @property
    def id(self) -> int:
        return self.chunk.id


@dataclass(frozen=True)
class Case:
    """A query store with tables ``name``, and how to find what it should say of a chunk."""

    store: Path
    name: str
    k: int
    tables: tuple[tuple[str, float], ...]

    @property
    def length(self) -> int:
        """Tokens a chunk."""
        return open_once(self.store).chunk_length

    @functools.cache  # noqa: B019 (a case is frozen, and there are four)
    def chunks(self) -> dict[int, Chunk]:
        """All live chunks, in the order of their ids."""
        reader = open_once(self.store)
        return {int(i): reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)}

    @functools.cache  # noqa: B019
    def near(self, chunk: int) -> list[Near]:
        """Its neighbours: of a mixture by distance over weight, and then in the order of the tables."""
        reader = open_once(self.store)
        found, about = [], facts_of(self.store).neighbours
        for number, (table, weight) in enumerate(self.tables):
            for n in reader.neighbours(chunk, table, k=about[table]["saved"]):
                near = Near(number, n.distance, n.chunk, n.continuation)
                found.append((np.float32(n.distance) / np.float32(weight), number, near))
        found.sort(key=lambda one: one[:2])
        return [near for _, _, near in found][: self.k]


@functools.cache
def facts_of(store: Path) -> Info:
    return api.info(store)


@functools.cache
def open_once(store: Path) -> Reader:
    """A reader of a store that doesn't change any more."""
    return retrotool.open(store)


def chunk_and_embed(store: Path, rows: list[dict[str, Any]], tokenizer: Path, encoder: Path, part_size: int) -> Path:
    source = write_jsonl(store.with_suffix(".jsonl"), rows)
    api.chunk(store, [str(source)], tokenizer=str(tokenizer), part_size=part_size)
    api.embed(store, encoder=str(encoder))
    return store


def purge_some(store: Path, seed: int, *, erase: bool) -> None:
    """Take random chunks out, also from the middle of documents."""
    reader = retrotool.open(store)
    ids = [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]
    path = store.with_suffix(".ids")
    path.write_text("".join(f"{i}\n" for i in random.Random(seed).sample(ids, len(ids) // 7)))
    api.purge(store, api.Selectors(chunk=Path(path)), reason="test", erase=erase)


@pytest.fixture(scope="module", params=["wordpiece", "bytes"])
def stores(request, tmp_path_factory, tiny_encoder, byte_level_tokenizer) -> dict[str, Case]:
    """A query store, purged in part, with neighbours in itself, in another that was purged in part, and in both."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = tiny_encoder if request.param == "wordpiece" else byte_level_tokenizer
    database = chunk_and_embed(root / "database", make_rows(40), tokenizer, tiny_encoder, 70)
    queries = chunk_and_embed(root / "queries", make_rows(24, first=300), tokenizer, tiny_encoder, 50)
    api.neighbours(queries, name="own", saved=5, search=EXACT)
    api.neighbours(database, queries=queries, name="other", saved=6, k=3, search=EXACT)
    for seed, store in enumerate((database, queries)):
        purge_some(store, seed, erase=True)
        purge_some(store, seed + 10, erase=False)
    opened = Store.open(queries)
    mix = [{"table": "own", "weight": 1.0}, {"table": "other", "weight": 1.5}]
    with writing(opened) as run:
        opened.commit(run, lambda _: Draft("neighbours", records={"neighbours:both": {"mix": mix}}))
    return {
        "own": Case(queries, "own", 2, (("own", 1.0),)),
        "other": Case(queries, "other", 3, (("other", 1.0),)),
        "both": Case(queries, "both", 4, (("own", 1.0), ("other", 1.5))),
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory, tiny_encoder) -> Case:
    """Key-value records and documents, of chunks of 16 tokens: of every length around a chunk's, some purged."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    documents = [Written(f"d{n}", text(n)) for n in (1, 15, 16, 17, 31, 32, 33, 48, 64, 80, 112, 128)]
    pairs = [Written(f"r{n}", text(3 + n), text(7 * n)) for n in range(1, 9)]
    store = make_store(tmp_path_factory.mktemp("records") / "store", tiny_encoder, documents[:5] + pairs, documents[5:])
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(store, search=EXACT, saved=4)
    reader = retrotool.open(store)
    targets = [
        reader.document("r8")[0],
        reader.document("d112")[3],
        reader.document("d128")[-1],
        *reader.document("d33"),
    ]
    (store.parent / "ids").write_text("".join(f"{i}\n" for i in targets))
    api.purge(store, api.Selectors(chunk=store.parent / "ids"), reason="test")
    return Case(store, "main", 2, (("main", 1.0),))


@pytest.fixture(params=["own", "other", "both", "records"])
def case(request, stores, records) -> Case:
    return records if request.param == "records" else stores[request.param]


def check_row(case: Case, chunk: Any, row: dict[str, Any]) -> None:
    """A row of the tables against the API."""
    assert (row["document"], row["index"], row["text"]) == (chunk.document, chunk.index, chunk.text)
    assert row["tokens"] == chunk.tokens.tolist()
    near = case.near(chunk.id)
    n, length = len(near), case.length
    assert row["neighbours"] == [one.id for one in near] + [-1] * (case.k - n)
    assert row["distances"] == [one.distance for one in near] + [np.inf] * (case.k - n)
    assert row["databases"] == [one.database for one in near] + [-1] * (case.k - n)
    assert row["neighbour_documents"] == [one.chunk.document for one in near] + [None] * (case.k - n)
    for name, chunks in (
        ("neighbour", [one.chunk for one in near]),
        ("continuation", [one.continuation for one in near]),
    ):
        chunks += [None] * (case.k - n)
        assert row[f"{name}_text"] == [None if one is None else one.text for one in chunks]
        tokens = [[] if one is None else one.tokens.tolist() for one in chunks]
        assert row[f"{name}_lengths"] == [len(some) for some in tokens]
        assert row[f"{name}_tokens"] == [some + [0] * (length - len(some)) for some in tokens]


def check_counts(case: Case, result: ExportResult, output: Path) -> None:
    chunks = case.chunks()
    near = [len(case.near(i)) for i in chunks]
    assert (result.chunks, result.k, result.table) == (len(chunks), case.k, case.name)
    assert result.documents == len({chunk.document for chunk in chunks.values()})
    assert result.tokens == sum(chunk.n_tokens for chunk in chunks.values())
    assert (result.neighbours, result.without_neighbours) == (sum(near), near.count(0))
    reported = json.loads((output / "export.json").read_text())
    assert {file["name"]: file["bytes"] for file in reported["files"]} == {
        path.name: path.stat().st_size for path in output.iterdir() if path.name != "export.json"
    }
    assert (reported["store"], reported["commit"]) == (api.info(case.store).uuid, api.info(case.store).commit)
    for database, (table, weight) in zip(reported["databases"], case.tables, strict=True):
        other = Store.open(Store.open(case.store).state.records[f"neighbours:{table}"]["uri"])
        assert database == {
            "number": database["number"], "table": table, "weight": weight, "uuid": other.identity.uuid,
            "commit": other.state.number,
        }  # fmt: skip
    assert not any(path.name.startswith(".") for path in (*output.iterdir(), *output.parent.iterdir()))


@pytest.fixture(params=["at once", "by single row groups"])
def small_blocks(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and files are cut everywhere they can be, or nowhere."""
    if request.param != "at once":
        monkeypatch.setattr(exported, "HELD_BYTES", 1)
        monkeypatch.setattr(exported, "TEXTS", 50)


def test_parquet_says_what_the_api_says(case: Case, tmp_path: Path, small_blocks: None) -> None:
    result = api.export(case.store, tmp_path / "out", table=case.name, k=case.k)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, page_checksum_verification=True).to_pylist()]
    chunks = case.chunks()
    assert [row["chunk"] for row in rows] == list(chunks)
    for row in rows:
        check_row(case, chunks[row["chunk"]], row)
    assert {file.name for file in files} == {f"part-{part:06d}.parquet" for part in {i >> 32 for i in chunks}}
    check_counts(case, result, tmp_path / "out")
    column = pq.ParquetFile(files[0]).metadata.row_group(0).column(4)
    assert column.compression == "ZSTD"
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.to_str() == open_once(case.store).tokenizer.backend.to_str()


def test_small_parts_are_looked_up_together(built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up, pieces = [], NeighbourReader.pieces
    monkeypatch.setattr(NeighbourReader, "pieces", lambda self, found: looked_up.append(found) or pieces(self, found))
    store = Store.open(built_store)
    row_bytes = 2 * store.identity.chunk_length * store.identity.tokenizer.token_bytes
    monkeypatch.setattr(exported, "HELD_BYTES", parts.ROW_GROUP * row_bytes * 3 // 2)
    assert api.export(built_store, tmp_path / "out", k=1).chunks == sum(len(found.ids) for found in looked_up)
    assert len(looked_up) == 1 < len(store.state.parts())


@pytest.fixture(scope="module")
def long_parts(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Case:
    """A part of three row groups, whose borders fall into documents, with neighbours anywhere; some are purged."""
    rng = np.random.default_rng(0)
    words = np.array([word for word in WORDS if len(word) > 1])
    documents = [Written(str(i), " ".join(rng.choice(words, 6410))) for i in range(43)]
    root = make_store(tmp_path_factory.mktemp("long") / "store", tiny_encoder, documents)
    store = Store.open(root)
    rows = parts.part_entry(store, "chunks", 0).rows
    assert rows == 17_243
    ids, distances = rng.integers(0, rows, (rows, 3)), np.sort(rng.random((rows, 3), np.float32), axis=1)
    uuid, number = store.identity.uuid, store.state.number
    record = {"database": uuid, "uri": str(root), "within": True, "index": "", "encoder": "tiny", "saved": 3, "k": 2}
    about = {
        "version": "0" * 16,
        "purges": "",
        "index": "",
        "encoder": "tiny",
        "commit": number,
        "head": store.state.head[:16],
        "searched": [[0, 0]],
    }
    with writing(store) as run:
        entry = neighbour_tables.write_table(
            store, FileName.new(run.id, "neighbours", part_slot(0), "parquet", "main"), NeighbourTable(ids, distances),
            database=uuid, commit=number, uri=str(root), about=about,
        )  # fmt: skip
        store.commit(run, lambda _: Draft("neighbours", add=(entry,), records={"neighbours:main": record}))
    targets = {*rng.integers(0, rows, 500).tolist(), 8189, 16384} - {8190, 8191, 8192}
    (root.parent / "ids").write_text("".join(f"{i}\n" for i in targets))
    api.purge(root, api.Selectors(chunk=root.parent / "ids"), reason="test")
    return Case(root, "main", 2, (("main", 1.0),))


def test_parts_of_several_row_groups_are_cut_anywhere(
    long_parts: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = api.export(long_parts.store, tmp_path / "at once")
    monkeypatch.setattr(exported, "HELD_BYTES", 1)
    monkeypatch.setattr(exported, "TEXTS", 10_000)
    by_groups = api.export(long_parts.store, tmp_path / "by groups")
    assert at_once.chunks == by_groups.chunks > 16_700
    border = [i for edge in (8192, 16384) for i in range(edge - 3, edge + 3) if i in long_parts.chunks()]
    assert len(border) == 10
    for folder in (tmp_path / "at once", tmp_path / "by groups"):
        rows = pq.read_table(sorted(folder.glob("*.parquet")))
        assert rows == pq.read_table(sorted((tmp_path / "at once").glob("*.parquet")))
        assert rows["chunk"].to_pylist() == list(long_parts.chunks())
        for row in rows.filter(pc.is_in(rows["chunk"], pa.array(border))).to_pylist():
            check_row(long_parts, long_parts.chunks()[row["chunk"]], row)
