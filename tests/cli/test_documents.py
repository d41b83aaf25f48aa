"""``documents`` and ``show``: what they say of documents and chunks is what was put in and what was purged."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, make_rows, write_jsonl
from stored import copy_store
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.errors import UsageError
from retrotool.sources import Fields
from retrotool.store import parts
from retrotool.store.parts import format_id

REPEATED = {"id": "again", "source": "b", "text": "", "year": "2001", "grade": None}
"""A document with the text of doc-3."""


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """40 documents, of which the last 10 have another kept field than the first 30."""
    rows = [{**row, "year": str(row["year"])} for row in make_rows(40)]
    return [
        {**row, "grade": None} if i < 30 else {**row, "year": None, "grade": str(i % 3)} for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], byte_level_tokenizer: Path) -> Path:
    """A store of two runs with several parts: documents of ``rows``, and one that was left out as a repeat."""
    folder = tmp_path_factory.mktemp("documents")
    first = [*rows[:30], {**REPEATED, "text": rows[3]["text"]}]
    for name, some, kept in (("a", first, "year"), ("b", rows[30:], "grade")):
        source = write_jsonl(folder / f"{name}.jsonl", some)
        api.chunk(
            folder / "store",
            [str(source)],
            fields=Fields(keep=(kept,)),
            tokenizer=str(byte_level_tokenizer),
            part_size=60,
        )
    return folder / "store"


@pytest.fixture(scope="module")
def store(fresh: Path) -> Path:
    """Of these, doc-5 and doc-35 are purged, a chunk of doc-8 is, and doc-6 is erased."""
    store = copy_store(fresh, fresh.parent / "purged")
    chunk = str(retrotool.open(store).document("doc-8")[1])
    api.purge(store, api.Selectors(document="doc-6"), reason="gone for good", erase=True)
    api.purge(store, api.Selectors(document=["doc-5", "doc-35"]), reason="request 17")
    api.purge(store, api.Selectors(chunk=chunk), reason="one chunk")
    return store


def listed(store: Path, *options: object) -> list[dict[str, Any]]:
    code, out, err = run("documents", store, *options, "--limit", 0, "--json")
    assert (code, err) == (0, "")
    found: list[dict[str, Any]] = json.loads(out)["documents"]
    return found


ABSENT = {"doc-5", "doc-6", "doc-35"}


@pytest.mark.parametrize(
    ("options", "matches"),
    [
        ([], lambda row: True),
        (["--source", "b"], lambda row: row["source"] == "b"),
        (["--source", "a", "--source", "b"], lambda row: True),
        (["--where", "year >= 2010"], lambda row: row["year"] is not None and int(row["year"]) >= 2010),
        (["--where", "grade = '1' or id = 'doc-2'"], lambda row: row["grade"] == "1" or row["id"] == "doc-2"),
        (
            ["--where", "grade = '1' or id = 'doc-2'", "--source", "a"],
            lambda row: (row["grade"] == "1" or row["id"] == "doc-2") and row["source"] == "a",
        ),
        (["--where", "year is null"], lambda row: row["year"] is None),
    ],
)
def test_the_live_documents_that_match_are_listed_in_order(store, rows, options, matches):
    wanted = [row for row in rows if row["id"] not in ABSENT and matches(row)]
    found = listed(store, *options)
    assert [one["id"] for one in found] == [row["id"] for row in wanted]
    reader = retrotool.open(store)
    for one, row in zip(found, wanted, strict=True):
        assert one["source"] == row["source"]
        assert {name: one["kept"].get(name) for name in ("year", "grade")} == {n: row[n] for n in ("year", "grade")}
        assert one["state"] == ("partly purged" if one["id"] == "doc-8" else "live")
        live = [reader.chunk(chunk) for chunk in reader.document(one["id"])]
        if one["state"] == "live":
            assert (one["first_chunk"], one["n_chunks"]) == (live[0].id, len(live))
            assert one["n_tokens"] == sum(chunk.n_tokens for chunk in live)
            assert "".join(chunk.text for chunk in live) == row["text"]


def test_what_is_purged_is_listed_when_it_is_asked_for(store):
    found = {one["id"]: one["state"] for one in listed(store, "--purged")}
    assert found == {"doc-5": "purged", "doc-35": "purged", "doc-8": "partly purged", "again": "duplicate"}
    assert [one["id"] for one in listed(store, "--purged", "--source", "b", "--where", "n_chunks > 0")] == [
        one for one in found if one in ("doc-5", "doc-35", "again")
    ]


def test_an_unknown_source_is_an_error_that_names_those_that_are_there(store):
    for command in (["documents"], ["documents", "--purged"], ["search", "x"]):
        code, out, err = run(command[0], store, *command[1:], "--source", "a", "--source", "it's")
        assert (code, out) == (2, "")
        assert err.startswith(f'error: {store}: no document has the source "it\'s"\nThe sources are: a, b. List: ')
        assert run(*shlex.split(err.splitlines()[1].partition("List: ")[2])[1:])[0] == 0


def test_states_are_those_of_the_chunks(fresh, tmp_path):
    """Random chunks are purged and some erased: each document is what its chunks are, counted one by one."""
    store = copy_store(fresh, tmp_path / "store")
    drawn = random.Random(7)
    every = list(itertools.chain(retrotool.open(store).documents(), retrotool.open(store).documents(purged=True)))
    ids = [one.first_chunk + i for one in every for i in range(one.n_chunks) if one.state == "live"]
    for erase in (True, False):
        some = drawn.sample(ids, len(ids) // 3)
        api.purge(store, api.Selectors(chunk=list(map(str, some))), reason="r", erase=erase)
    reader = retrotool.open(store)
    live, purged = list(reader.documents()), list(reader.documents(purged=True))
    for one in [*live, *purged]:
        alive = reader.is_live(range(one.first_chunk, one.first_chunk + one.n_chunks)).sum()
        due = {one.n_chunks: "live", 0: "purged"}.get(alive, "partly purged")
        assert one.state in (due, "duplicate" if due == "purged" else due)
    assert {one.id for one in live} == {
        reader.chunk(int(i)).document for part in reader.parts() for i in reader.chunk_ids(part)
    }
    assert {one.state for one in live} == {"live", "partly purged"} and any(one.state == "purged" for one in purged)


def test_a_limit_says_that_there_are_more(store):
    code, out, err = run("documents", store)
    assert (code, len(out.splitlines()), err) == (0, 20, "There are more: --limit 0 lists all.\n")
    assert re.match(r"doc-0  source a  1 chunk  \d tokens?  year 2000\n", out)
    assert run("documents", store, "--limit", 37)[1:] == run("documents", store, "--limit", 0)[1:]
    assert len(json.loads(run("documents", store, "--limit", 3, "--json")[1])["documents"]) == 3
    assert run("documents", store, "--json") == run("documents", store, "--limit", 0, "--json")
    assert run("documents", store, "--where", "n_chunks > 10000") == (0, "", "")


def test_csv_has_the_same_with_a_column_for_each_kept_field(store):
    code, out, err = run("documents", store, "--csv")
    assert (code, err) == (0, "")
    found = list(csv.DictReader(io.StringIO(out)))
    assert list(found[0])[-2:] == ["year", "grade"]
    kept = ("year", "grade")
    wanted = [
        {name: str(value) for name, value in one.items() if name != "kept"}
        | {name: one["kept"].get(name) or "" for name in kept}
        for one in listed(store)
    ]
    assert found == wanted
    assert run("documents", store, "--csv", "--json")[0] == 2


def test_listing_a_few_reads_a_few(store, monkeypatch):
    read, plain = [], parts.read_parquet

    def watched(store: Any, entry: Any, *arguments: Any, **options: Any) -> Any:
        read.append(entry.path)
        return plain(store, entry, *arguments, **options)

    monkeypatch.setattr(parts, "read_parquet", watched)
    reader = retrotool.open(store)
    found = reader.documents()
    read.clear()
    assert next(found).id == "doc-0"
    assert len({path for path in read if path.startswith("documents/")}) == 1 < len(reader.parts())


@pytest.mark.parametrize(
    ("where", "message"),
    [("yeer = 1", "no column 'yeer'; they have: id, source, "), ("year = 1 or", "expected a column at character 12")],
)
@pytest.mark.parametrize("source", [[], ["--source", "a"]])
def test_wrong_expressions_are_refused_with_their_place(store, where, message, source):
    code, out, err = run("documents", store, "--where", where, *source)
    assert (code, out) == (2, "") and message in err


def shown(store: Path, name: object) -> dict[str, Any]:
    code, out, err = run("show", store, name, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_document_is_shown_with_its_text_and_where_it_is_from(store, rows):
    found = shown(store, "doc-9")
    assert found["document"]["kept"] == {"year": rows[9]["year"]}
    assert found["document"]["input"].endswith("a.jsonl") and found["document"]["position"] > 0
    assert "".join(chunk["text"] for chunk in found["chunks"]) == rows[9]["text"]
    assert [chunk["index"] for chunk in found["chunks"]] == list(range(found["document"]["n_chunks"]))
    assert (found["purges"], found["neighbours"]) == ({}, [])
    out = run("show", store, "doc-9")[1]
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    assert f"year  {rows[9]['year']}" in out
    assert "".join(rows[9]["text"].split()) in "".join(
        "".join(line.split()) for line in out.splitlines() if not line.startswith("chunk ")
    )


def test_a_chunk_is_shown_by_its_place_or_its_number(store):
    chunk = retrotool.open(store).document("doc-33")[0]
    by_place, by_number = shown(store, format_id(chunk)), shown(store, chunk)
    assert by_place == by_number
    assert by_place["document"]["id"] == "doc-33" and [one["id"] for one in by_place["chunks"]] == [chunk]


def test_what_is_purged_is_shown_without_text_but_with_the_reason(store):
    purge = {one.reason: one.purge for one in api.list_purges(store).purges}
    found = shown(store, "doc-35")
    assert found["document"]["state"] == "purged" and found["purges"] == {purge["request 17"]: "request 17"}
    assert {chunk["text"] for chunk in found["chunks"]} == {None}
    found = shown(store, "doc-8")
    states = [(chunk["state"], chunk["purges"]) for chunk in found["chunks"]]
    assert states[1] == ("purged", [purge["one chunk"]])
    assert {*map(str, states[:1] + states[2:])} == {str(("live", []))}
    assert [chunk["text"] is None for chunk in found["chunks"]] == [state == "purged" for state, _ in states]
    assert f"purged {purge['one chunk']}" in run("show", store, "doc-8")[1]
    assert shown(store, "again")["document"]["state"] == "duplicate"
    assert {chunk["state"] for chunk in shown(store, "again")["chunks"]} == {"duplicate"}


def test_what_is_erased_is_said_to_be(store):
    code, out, err = run("show", store, "doc-6")
    assert (code, out) == (2, "") and "the document 'doc-6' was erased: nothing is left of it" in err
    erased = next(row for row in range(40) if retrotool.open(store).document_of(row).state == "erased")
    found = shown(store, f"0:{erased}")
    assert found["document"]["id"] == "" and found["chunks"][0]["state"] == "erased"
    assert list(found["purges"].values()) == ["gone for good"] and "(erased)" in run("show", store, f"0:{erased}")[1]


def test_an_unknown_id_is_answered_with_similar_ones(store):
    code, _, err = run("show", store, "dock-31")
    assert code == 2 and "no document 'dock-31'\nDid you mean 'doc-31'" in err
    assert "no document '1234567', nor a chunk 0:1234567" in run("show", store, "1234567")[2]
    assert "Did you mean" not in run("show", store, "\x1b\u202e")[2]
    for purged in ("doc-5", "doc-6"):
        assert f"'{purged}'" not in run("show", store, f"{purged}x")[2], "what is purged is not suggested"
    with pytest.raises(UsageError) as error:
        retrotool.open(store).document("doc-311")
    assert error.value.advice.startswith("Did you mean 'doc-31'")
    code, _, err = run("purge", store, "--document", "dock-31", "--dry-run")
    assert code == 2 and "Did you mean 'doc-31'" in err


def test_a_document_whose_id_is_a_number_comes_before_the_chunk(tmp_path, byte_level_tokenizer):
    rows = [{"id": name, "text": f"This is the text of {name}."} for name in ("5", "1", "0:1")]
    file = write_jsonl(tmp_path / "n.jsonl", rows)
    api.chunk(tmp_path / "store", [str(file)], tokenizer=str(byte_level_tokenizer))
    found = {name: shown(tmp_path / "store", name)["document"]["id"] for name in ("5", "1", "2", "0:1", "0:0")}
    assert found == {"5": "5", "1": "1", "2": "0:1", "0:1": "1", "0:0": "5"}


def test_a_chunk_is_shown_beside_its_neighbours(built_store, tmp_path):
    reader = retrotool.open(built_store)
    chunk = reader.document("doc-7")[0]
    found = shown(built_store, chunk)
    assert [(one["id"], one["document"]) for one in found["neighbours"]] == [
        (near.id, near.chunk.document) for near in reader.neighbours(chunk)
    ]
    out = run("show", built_store, format_id(chunk))[1]
    assert [line[:12] for line in out.splitlines() if ". distance" in line] == ["1. distance ", "2. distance "]


def test_documents_of_a_store_without_any(tmp_path, cli: Cli):
    (tmp_path / "e.jsonl").write_text('{"id": "only", "text": "The only one."}')
    api.chunk(tmp_path / "store", [str(tmp_path / "e.jsonl")])
    api.purge(tmp_path / "store", api.Selectors(document="only"), reason="test")
    assert run("documents", tmp_path / "store") == (0, "", "")
    assert json.loads(run("documents", tmp_path / "store", "--json")[1]) == {"documents": []}
    assert "the store has no document 'x'" in run("show", tmp_path / "store", "x")[2]
