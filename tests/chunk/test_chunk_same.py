"""``chunk``: what comes out depends on the input alone, and is every token of every document, in order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from chunk_helpers import TABLE_FORMATS, documents, run_chunk, verified, write_rows
from conftest import make_rows
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.chunk import stage as chunk_stage
from retrotool.info.verify import Verification
from retrotool.sources import Fields, find_inputs
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, find_tokenizer

ROWS = make_rows(90) + make_rows(5) + [{"id": "bad"}] + make_rows(30, first=90)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("plain") / "plain.jsonl", ROWS)


@pytest.fixture
def chunked(tmp_path, byte_level_tokenizer):
    """Chunk inputs into a new store and verify it."""

    numbers = itertools.count()

    def run(*inputs: Path, **options) -> Verification:
        store = tmp_path / f"store-{next(numbers)}"
        options = {"tokenizer": str(byte_level_tokenizer), "part_size": 30, **options}
        found = api.chunk(store, [str(path) for path in inputs], **options)
        assert found.documents + found.rejected + found.duplicate_ids == len(ROWS)
        return verified(store)

    return run


def test_the_number_of_workers_and_the_batches_change_nothing(chunked, plain, monkeypatch):
    one = chunked(plain)
    assert chunked(plain, workers=2) == one
    monkeypatch.setattr(chunk_stage, "_BATCH_CHARACTERS", 1)
    few = chunked(plain)
    monkeypatch.setattr(chunk_stage, "_BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(chunk_stage, "_BATCH_DOCUMENTS", 7)
    assert (few.content, few.ids) == (chunked(plain).content, few.ids) == (one.content, one.ids)


def test_the_format_changes_nothing_in_the_content(chunked, tmp_path, plain):
    found = [chunked(write_rows(tmp_path / f"rows.{kind}", ROWS)) for kind in TABLE_FORMATS]
    assert {(each.content, each.ids) for each in found} == {(chunked(plain).content, found[0].ids)}


@pytest.mark.parametrize("workers", [1, 2])
def test_ranges_of_a_file_change_nothing_in_the_content(workers, chunked, plain, monkeypatch):
    whole = chunked(plain)
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 1000)
    units = chunk_plan.cut_units(find_inputs([str(plain)]), Fields(), 30, 64)
    assert len(units) > 10
    cut = chunked(plain, workers=workers)
    assert cut.content == whole.content
    assert cut.ids == chunked(plain).ids


def test_files_and_folders_change_nothing_in_the_content(chunked, tmp_path, plain, monkeypatch):
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i in range(0, len(ROWS), 10):
        write_rows(folder / f"{i:03}.{TABLE_FORMATS[i // 10 % 4]}", ROWS[i : i + 10])
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 10_000)
    assert chunked(folder).content == chunked(plain).content


def chunk_tokens(store: Path) -> dict[str, list[int]]:
    """Token ids of each document, from its chunks."""
    opened = Store.open(store)
    found = {}
    for part in opened.state.parts():
        chunks = parts.read_chunks(opened, part)
        for row in parts.read_documents(opened, part).to_pylist():
            rows = range(row["first_row"], row["first_row"] + row["n_chunks"])
            found[row["id"]] = [int(token) for i in rows for token in chunks.tokens[i][: chunks.n_tokens[i]]]
    return found


AWKWARD = st.text(st.characters(codec="utf-8"), min_size=1) | st.text("a \t\r\n\u00a0\u200d\u0301é🎈𝄞한ß\0", min_size=1)


@given(texts=st.lists(AWKWARD, min_size=1, max_size=8, unique=True), length=st.integers(1, 5))
def test_chunks_give_texts_back_byte_for_byte(texts, length, byte_level_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward")
    path = write_rows(folder / "rows.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    made = api.chunk(folder / "s", [str(path)], tokenizer=str(byte_level_tokenizer), chunk_length=length)
    assert made.documents == len(texts)
    store = Store.open(folder / "s")
    chunks = parts.read_chunks(store, 0)
    pieces = Tokenizer(find_tokenizer(str(byte_level_tokenizer))).decode(chunks.tokens, chunks.n_tokens).to_pylist()
    for doc, text in enumerate(texts):
        assert b"".join(piece for piece, of in zip(pieces, chunks.doc, strict=True) if of == doc).decode() == text
    assert (chunks.n_tokens > 0).all()


@pytest.mark.parametrize("name", ["minilm", "byte_level_tokenizer"])
def test_tokens_are_those_of_the_library_for_the_whole_document(name, tmp_path, plain, request):
    spec = name if name == "minilm" else str(request.getfixturevalue(name))
    api.chunk(tmp_path / "store", [str(plain)], tokenizer=spec)
    library = Library.from_str(find_tokenizer(spec).content.decode())
    library.no_truncation()
    library.no_padding()
    expected = {row["id"]: library.encode(row["text"], add_special_tokens=False).ids for row in make_rows(120)}
    assert chunk_tokens(tmp_path / "store") == {**expected, **{f"doc-{i}": expected[f"doc-{i}"] for i in range(5)}}


@pytest.mark.parametrize("part_size", [5, 30, 10_000])
def test_a_part_closes_at_the_first_document_end_after_its_size(part_size, tmp_path, plain, byte_level_tokenizer):
    api.chunk(tmp_path / "s", [str(plain)], tokenizer=str(byte_level_tokenizer), part_size=part_size)
    store = Store.open(tmp_path / "s")
    for part in store.state.parts():
        counts = parts.read_documents(store, part)["n_chunks"].to_pylist()
        assert sum(counts[:-1]) < part_size
        assert sum(counts) >= part_size or part == store.state.parts()[-1]


def test_the_same_command_again_is_reported_to_be_nothing(tmp_path, plain):
    first = run_chunk(tmp_path / "store", plain)
    assert first.stdout.startswith("120 documents, ")
    before = verified(tmp_path / "store")
    again = run_chunk(tmp_path / "store", plain)
    assert again.exit_code == 0
    assert again.stdout.startswith(
        "1 input skipped: already in the store, but for 1 rejected row.\nRejected rows are listed in"
    )
    assert verified(tmp_path / "store") == before


def test_new_inputs_are_added_and_nothing_else_changes(tmp_path, plain):
    run_chunk(tmp_path / "store", plain)
    before = documents(tmp_path / "store")
    more = write_rows(tmp_path / "more.jsonl", make_rows(3, first=500))
    result = run_chunk(tmp_path / "store", plain, more)
    assert result.stdout.startswith("1 input skipped: already in the store, but for 1 rejected row.\n3 documents, ")
    after = documents(tmp_path / "store")
    assert after[: len(before)] == before
    assert [row["id"] for row in after[len(before) :]] == ["doc-500", "doc-501", "doc-502"]


def test_kept_fields_and_places_are_columns_of_documents(tmp_path, plain, monkeypatch):
    monkeypatch.chdir(plain.parent)
    api.chunk(tmp_path / "store", [plain.name], fields=Fields(keep=("year", "missing")))
    data = plain.read_bytes()
    for row in documents(tmp_path / "store"):
        line = json.loads(data[row["position"] :].partition(b"\n")[0])
        assert (row["id"], row["source"], row["year"]) == (line["id"], line["source"], str(line["year"]))
        assert (row["input"], row["missing"]) == ("plain.jsonl", None)
