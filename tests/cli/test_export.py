"""What is exported is what ``retrotool.open`` says, in each format, and nothing that was purged."""

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
from retro_files import RetroFiles

import retrotool
from retrotool import api
from retrotool.export import handover, handover_tables
from retrotool.export.handover_retro import Tokens, tokens_of
from retrotool.export.run import FORMATS, ExportResult
from retrotool.neighbours.run import SearchOptions
from retrotool.reader import Chunk, Reader
from retrotool.store import parts, tables
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, part_slot
from retrotool.store.session import writing
from retrotool.store.store import Store
from retrotool.store.tables import NeighbourTable

EXACT = SearchOptions(exact=True)


@dataclass(frozen=True)
class Near:
    """A neighbour as the API tells it: which database, its id and distance, its tokens and those that follow."""

    database: int
    id: int
    distance: float
    tokens: list[int]
    continuation: list[int]


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
        """All living chunks, in the order of their ids."""
        reader = open_once(self.store)
        return {int(i): reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)}

    @functools.cache  # noqa: B019
    def near(self, chunk: int) -> list[Near]:
        """Its neighbours: of a mixture by distance over weight, and then in the order of the tables."""
        reader = open_once(self.store)
        found = []
        for number, (table, weight) in enumerate(self.tables):
            for n in reader.neighbours(chunk, table, k=20):
                following = [] if n.continuation is None else n.continuation.tokens.tolist()
                near = Near(number, n.id, n.distance, n.chunk.tokens.tolist(), following)
                found.append((np.float32(n.distance) / np.float32(weight), number, near))
        found.sort(key=lambda one: one[:2])
        return [near for _, _, near in found][: self.k]


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
    api.purge(store, api.Selectors(ids=str(path)), reason="test", erase=erase)


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
    victims = [
        reader.document("r8")[0],
        reader.document("d112")[3],
        reader.document("d128")[-1],
        *reader.document("d33"),
    ]
    (store.parent / "ids").write_text("".join(f"{i}\n" for i in victims))
    api.purge(store, api.Selectors(ids=str(store.parent / "ids")), reason="test")
    return Case(store, "main", 2, (("main", 1.0),))


@pytest.fixture(params=["own", "other", "both", "records"])
def case(request, stores, records) -> Case:
    return records if request.param == "records" else stores[request.param]


def check_row(case: Case, chunk: Any, row: dict[str, Any]) -> None:
    """A row of the tables against the API."""
    assert (row["document"], row["index"], row["tokens"]) == (chunk.document, chunk.index, chunk.tokens.tolist())
    near = case.near(chunk.id)
    n, length = len(near), case.length
    assert row["neighbours"] == [one.id for one in near] + [-1] * (case.k - n)
    assert row["distances"] == [one.distance for one in near] + [np.inf] * (case.k - n)
    assert row["databases"] == [one.database for one in near] + [-1] * (case.k - n)
    for name, tokens in (
        ("neighbour", [one.tokens for one in near]),
        ("continuation", [one.continuation for one in near]),
    ):
        tokens += [[]] * (case.k - n)
        assert row[f"{name}_lengths"] == [len(some) for some in tokens]
        assert row[f"{name}_tokens"] == [some + [0] * (length - len(some)) for some in tokens]


def check_counts(case: Case, result: ExportResult, output: Path) -> None:
    chunks = case.chunks()
    near = [len(case.near(i)) for i in chunks]
    assert (result.chunks, result.k, result.table) == (len(chunks), case.k, case.name)
    assert result.documents == len({chunk.document for chunk in chunks.values()})
    assert result.tokens == sum(chunk.n_tokens for chunk in chunks.values())
    assert (result.neighbours, result.alone) == (sum(near), near.count(0))
    told = json.loads((output / "export.json").read_text())
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        path.name: path.stat().st_size for path in output.iterdir() if path.name != "export.json"
    }
    assert (told["store"], told["commit"]) == (api.info(case.store).uuid, api.info(case.store).commit)
    for database, (table, weight) in zip(told["databases"], case.tables, strict=True):
        other = Store.open(Store.open(case.store).state.records[f"neighbours:{table}"]["path"])
        assert database == {
            "number": database["number"], "table": table, "weight": weight, "uuid": other.identity.uuid,
            "commit": other.state.number,
        }  # fmt: skip
    assert not any(path.name.startswith(".") for path in (*output.iterdir(), *output.parent.iterdir()))


@pytest.fixture(params=["at once", "by single row groups"])
def small_blocks(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and files are cut everywhere they can be, or nowhere."""
    if request.param != "at once":
        monkeypatch.setattr(handover, "HELD_BYTES", 1)
        monkeypatch.setattr(handover_tables, "SHARD_BYTES", 1)
        monkeypatch.setattr(handover, "GROUPS", 1)
        monkeypatch.setattr(handover_tables, "ROW_GROUP", 5)


def test_parquet_says_what_the_api_says(case: Case, tmp_path: Path, small_blocks: None) -> None:
    result = api.export_neighbours(case.store, tmp_path / "out", format="parquet", name=case.name, k=case.k)
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


def test_a_saved_dataset_says_what_the_api_says(case: Case, tmp_path: Path, small_blocks: None) -> None:
    datasets = pytest.importorskip("datasets")
    result = api.export_neighbours(case.store, tmp_path / "out", format="huggingface", name=case.name, k=case.k)
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    chunks = case.chunks()
    assert dataset["chunk"][:] == list(chunks)
    for row in dataset:
        check_row(case, chunks[row["chunk"]], row)
    check_counts(case, result, tmp_path / "out")
    length = case.length
    tensors = dataset.with_format("numpy")[0]
    assert tensors["neighbour_tokens"].shape == tensors["continuation_tokens"].shape == (case.k, length)
    assert tensors["distances"].shape == (case.k,)


def check_sequences(case: Case, files: RetroFiles, folder: Path) -> None:
    """Sequences are the texts of the query store, each chunk once, cut where the API gives no continuation."""
    reader = open_once(case.store)
    seen = []
    for number, start in enumerate(files.starts.tolist()):
        chain = [int(files.ids[start])]
        while len(chain) < files.rows_of_sequence and (following := reader.continuation(chain[-1])) is not None:
            chain.append(following.id)
        after = reader.continuation(chain[-1])
        tokens: list[int] = []
        for chunk in chain[:-1]:
            tokens += files.as_row(reader.chunk(chunk).tokens.tolist(), ends=False)
        last = [token + files.shift for token in reader.chunk(chain[-1]).tokens.tolist()]
        if after is None:
            tokens += [*last, files.end]
        else:
            tokens += [*(last + [0] * files.length)[: files.length], int(after.tokens[0]) + files.shift]
        assert files.sequence(number) == (tokens + [0] * files.given["seq_len"])[: files.given["seq_len"] + 1]
        seen += chain
        for row, chunk in enumerate(chain, start):
            assert files.ids[row] == chunk
            check_retrieved(case, files, row)
    assert seen == list(case.chunks()), "every living chunk, once, and no other"


def check_retrieved(case: Case, files: RetroFiles, row: int) -> None:
    near = case.near(int(files.ids[row]))
    found = files.retrieved(row)
    assert [r for r, _, _ in found[len(near) :]] == [-1] * (case.k - len(near))
    for one, (place, tokens, continued) in zip(near, found, strict=False):
        assert files.ids[place] == one.id
        assert tokens == files.as_row(one.tokens, ends=not one.continuation)
        plain = files.as_row(one.continuation, ends=False)
        ended = files.as_row(one.continuation, ends=bool(one.continuation))
        assert continued in (plain, ended)
        if not one.continuation:
            assert not any(continued)


@pytest.mark.parametrize("chunks_of_a_sequence", [1, 3, 32])
def test_retro_pytorch_gets_what_the_api_says(
    case: Case, tmp_path: Path, small_blocks: None, chunks_of_a_sequence: int
) -> None:
    result = api.export_neighbours(
        case.store, tmp_path / "out", format="retro-pytorch", name=case.name, k=case.k,
        sequence_length=chunks_of_a_sequence * case.length,
    )  # fmt: skip
    files = RetroFiles(tmp_path / "out")
    check_sequences(case, files, tmp_path / "out")
    check_counts(case, result, tmp_path / "out")
    stats = json.loads((tmp_path / "out" / "processed-stats.json").read_text())
    assert stats == {"chunks": files.total, "docs": len(set(files.documents.tolist())), "seqs": len(files.starts)}
    assert files.chunks.max() < result.details["num_tokens"] and files.chunks.min() == 0
    check_documents(case, files, result.details["query_rows"])


def check_documents(case: Case, files: RetroFiles, query_rows: int) -> None:
    """Rows have the number of their document, and the query store's chunks come first."""
    chunks = case.chunks()
    assert [int(i) for i in files.ids[:query_rows] if i >= 0] == list(chunks)
    names: dict[int, set[str]] = {}
    for chunk, number in zip(files.ids[:query_rows].tolist(), files.documents.tolist(), strict=False):
        if chunk >= 0:
            names.setdefault(number, set()).add(chunks[chunk].document)
    assert [len(of) for of in names.values()] == [1] * len({chunk.document for chunk in chunks.values()})
    assert (files.nearest[query_rows:] == -1).all()
    assert files.documents.tolist() == sorted(files.documents) and set(files.documents.tolist()) == set(
        range(files.documents[-1] + 1)
    )
    ends = files.ids == -1
    assert (files.chunks[: files.total][ends, 0] == files.end).all()
    assert not files.chunks[: files.total][ends, 1:].any() and (files.nearest[: files.total][ends] == -1).all()
    used = files.nearest[files.nearest >= query_rows]
    behind = np.arange(query_rows, files.total)
    assert np.isin(behind, np.concatenate([used, used + 1])).all(), "of databases nothing but what is used"


def test_what_a_purged_chunk_stood_between_does_not_follow(tmp_path: Path, tiny_encoder: Path) -> None:
    """RETRO-pytorch takes the next row for the continuation; behind a gap there must be none, nor in a sequence."""
    words = [[f"{a} {b}" for b in WORDS[:32]] for a in ("store", "chunk")]
    documents = [Written(str(i), " ".join(some)) for i, some in enumerate(words)]
    store = make_store(tmp_path / "store", tiny_encoder, documents)
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(store, search=EXACT, saved=4, k=4)
    (tmp_path / "ids").write_text("1\n6\n")
    api.purge(store, api.Selectors(ids=str(tmp_path / "ids")), reason="test")
    api.export_neighbours(store, tmp_path / "out", format="retro-pytorch", sequence_length=64)
    files = RetroFiles(tmp_path / "out")
    assert files.ids.tolist() == [0, -1, 2, 3, -1, 4, 5, -1, 7, -1]
    assert [files.ids[start] for start in files.starts] == [0, 2, 4, 7]
    assert len(set(files.documents[:5].tolist())) == 1, "it is still one document"
    for row in np.flatnonzero(files.ids >= 0):
        for place, _, continued in files.retrieved(int(row)):
            assert any(continued) == (files.ids[place] in (2, 4))


def test_tokens_are_written_alike_for_all_stores_of_a_tokenizer(stores: dict[str, Case]) -> None:
    """An evaluation set goes with the training set's model, whatever text either has."""
    store = stores["own"].store
    one, other = (tokens_of(Store.open(path)) for path in (store, store.with_name("database")))
    vocabulary = Store.open(store).identity.tokenizer.vocabulary
    shift = 0 if open_once(store).tokenizer.backend.id_to_token(0) == "[PAD]" else 1
    assert one == other == Tokens(shift, vocabulary + shift, vocabulary + shift + 1)


def test_text_that_spells_special_tokens_is_exported_whole(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{"id": str(i), "text": f"store {word} chunk [SEP] token " * 40} for i, word in enumerate(WORDS[:4])]
    store = chunk_and_embed(tmp_path / "store", rows, tiny_encoder, tiny_encoder, 100)
    api.neighbours(store, search=EXACT)
    api.export_neighbours(store, tmp_path / "out", format="retro-pytorch", sequence_length=128)
    case, files = Case(store, "main", 2, (("main", 1.0),)), RetroFiles(tmp_path / "out")
    check_sequences(case, files, tmp_path / "out")
    assert sum(3 in chunk.tokens for chunk in case.chunks().values()) > 4


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
    record = {"database": uuid, "path": str(root), "within": True, "index": "", "encoder": "tiny", "saved": 3, "k": 2}
    about = {"index": "", "encoder": "tiny", "commit": number, "head": store.state.head[:16], "searched": [[0, 0]]}
    with writing(store) as run:
        entry = tables.write_table(
            root, FileName.new(run.id, "neighbours", part_slot(0), "parquet", "main"), NeighbourTable(ids, distances),
            database=uuid, commit=number, path=str(root), about=about,
        )  # fmt: skip
        store.commit(run, lambda _: Draft("neighbours", add=(entry,), records={"neighbours:main": record}))
    victims = {*rng.integers(0, rows, 500).tolist(), 8189, 16384} - {8190, 8191, 8192}
    (root.parent / "ids").write_text("".join(f"{i}\n" for i in victims))
    api.purge(root, api.Selectors(ids=str(root.parent / "ids")), reason="test")
    return Case(root, "main", 2, (("main", 1.0),))


@pytest.mark.parametrize("form", FORMATS)
def test_parts_of_several_row_groups_are_cut_anywhere(
    long_parts: Case, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = api.export_neighbours(long_parts.store, tmp_path / "at once", format=form)
    monkeypatch.setattr(handover, "GROUPS", 1)
    monkeypatch.setattr(handover, "HELD_BYTES", 1)
    by_groups = api.export_neighbours(long_parts.store, tmp_path / "by groups", format=form)
    assert at_once.details == by_groups.details and at_once.chunks == by_groups.chunks > 16_700
    border = [i for edge in (8192, 16384) for i in range(edge - 3, edge + 3) if i in long_parts.chunks()]
    assert len(border) == 10
    for folder in (tmp_path / "at once", tmp_path / "by groups"):
        if form == "retro-pytorch":
            files = RetroFiles(folder)
            for chunk in border:
                check_retrieved(long_parts, files, int(np.flatnonzero(files.ids == chunk)[0]))
            for name in ("chunks.dat", "chunks.knn.dat", "seq.dat", "doc_ids.dat", "chunk_ids.npy"):
                assert (folder / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
            continue
        rows = read_rows(folder, form)
        assert rows == read_rows(tmp_path / "at once", form)
        assert rows["chunk"].to_pylist() == list(long_parts.chunks())
        for row in rows.filter(pc.is_in(rows["chunk"], pa.array(border))).to_pylist():
            check_row(long_parts, long_parts.chunks()[row["chunk"]], row)


def read_rows(folder: Path, form: str) -> pa.Table:
    if form == "parquet":
        return pq.read_table(sorted(folder.glob("*.parquet")))
    return pa.concat_tables(pa.ipc.open_stream(file.read_bytes()).read_all() for file in sorted(folder.glob("*.arrow")))
