"""``info --files``: the live files and nothing else, each with the part that its rows are of."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_blank, write_jsonl
from stored import leave_unfinished, stored_file, stored_files, write_stored
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.errors import DuplicatesError

COLUMNS = ["path", "kind", "name", "slot", "part", "rows", "bytes", "pending"]
IN_PARTS = {"documents", "chunks", "embeddings", "neighbours", "scans"}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def listed(store: Path) -> list[dict[str, Any]]:
    """What the command lists, as JSON."""
    code, out, err = run("info", store, "--files", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    reported = json.loads(out)
    assert set(reported) == {"path", "commit", "files"}
    assert (reported["path"], reported["commit"]) == (str(store), retrotool.open(store).commit)
    files: list[dict[str, Any]] = reported["files"]
    return files


def live(store: Path) -> dict[str, dict[str, Any]]:
    """The live files, by their paths, by nothing but the entries of the log."""
    found: dict[str, dict[str, Any]] = {}
    for path in stored_files(store, "log/*"):
        commit = json.loads(path.read_bytes())
        for gone in commit["remove"]:
            del found[gone]
        found |= {entry["path"]: entry for entry in commit["add"]}
    return found


def test_the_live_files_are_listed_as_the_log_has_them(built_store: Path) -> None:
    files = listed(built_store)
    due = live(built_store)
    assert [list(file) for file in files] == [COLUMNS] * len(files)
    assert sorted(file["path"] for file in files) == sorted(due)
    for file in files:
        entry, pieces = due[file["path"]], file["path"].split("/")
        assert [file[name] for name in ("slot", "rows", "bytes")] == [entry[name] for name in ("slot", "rows", "bytes")]
        assert (file["kind"], file["name"]) == (pieces[0], pieces[1] if len(pieces) == 3 else "")
        assert file["part"] == (int(entry["slot"]) if file["kind"] in IN_PARTS else None)
        assert stored_file(built_store, file["path"]).stat().st_size == file["bytes"]
        assert file["pending"] is False
    assert {"documents", "chunks", "embeddings", "index", "neighbours", "inputs"} <= {file["kind"] for file in files}
    assert [asdict(file) for file in api.list_files(built_store).files] == files


def test_the_rows_of_a_file_are_those_of_its_part(built_store: Path) -> None:
    reader = retrotool.open(built_store)
    assert len(reader.parts()) > 2
    files = listed(built_store)
    for kind in ("documents", "chunks", "embeddings", "neighbours"):
        assert [file["part"] for file in files if file["kind"] == kind] == reader.parts(), "in their order"
    for file in files:
        if file["kind"] == "chunks":
            ids = reader.chunk_ids(file["part"])
            table = pq.read_table(stored_file(built_store, file["path"]))
            assert len(ids) == file["rows"] == table.num_rows
            assert table["n_tokens"].to_pylist() == [reader.chunk(int(i)).n_tokens for i in ids]
        if file["kind"] == "documents":
            first = pq.read_table(stored_file(built_store, file["path"]))["id"][0].as_py()
            assert reader.chunk(file["part"] << 32).document == first
        if file["kind"] == "embeddings":
            assert np.array_equal(np.load(stored_file(built_store, file["path"])), reader.embeddings(file["part"]))


def test_csv_is_the_same_list(built_store: Path) -> None:
    code, out, err = run("info", built_store, "--files", "--csv")
    assert (code, err) == (0, "")
    assert out.startswith(",".join(COLUMNS) + "\n") and "\r" not in out
    rows = list(csv.DictReader(out.splitlines()))
    shown = {None: "", False: "false", True: "true"}
    assert rows == [
        {name: shown[value] if value is None or isinstance(value, bool) else str(value) for name, value in file.items()}
        for file in listed(built_store)
    ]


def test_a_table_is_the_same_list(built_store: Path) -> None:
    code, out, err = run("info", built_store, "--files")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == COLUMNS
    for line, file in zip(lines, listed(built_store), strict=True):
        cells = {name: f"{value:,}" if type(value) is int else value for name, value in file.items()}
        assert line.split() == [*(cell for cell in cells.values() if cell), "no"]


def test_what_no_commit_names_is_not_listed(store_copy: Path) -> None:
    before = listed(store_copy)
    write_stored(store_copy, "chunks/0123abcd01234567.parquet", b"left by a kill")
    leave_unfinished(store_copy, "chunks/", "0123abcd")
    write_stored(store_copy, "documents/notes.txt", b"put there by a person")
    assert listed(store_copy) == before


def test_what_an_erase_replaces_keeps_its_part(store_copy: Path) -> None:
    before = listed(store_copy)
    api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="test", erase=True)
    after = listed(store_copy)
    gone = {file["path"] for file in before} - {file["path"] for file in after}
    assert any(path.startswith("chunks/") for path in gone)
    assert not any(stored_file(store_copy, path).exists() for path in gone)

    def places(files: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
        return [(file["kind"], file["name"], file["part"]) for file in files if file["kind"] in IN_PARTS]

    assert places(after) == places(before)
    (tombstones,) = (file for file in after if file["kind"] == "tombstones")
    assert (tombstones["part"], tombstones["rows"] > 0) == (None, True)


def test_parts_of_a_chunk_that_is_not_finished_are_pending(store_copy: Path, tmp_path: Path) -> None:
    before = retrotool.open(store_copy).parts()
    rows = [*make_rows(3), {"id": "twice", "text": "one"}, {"id": "twice", "text": "another"}]
    more = [str(write_jsonl(tmp_path / "more.jsonl", rows))]
    with pytest.raises(DuplicatesError):
        api.chunk(store_copy, more, duplicates="fail")
    assert retrotool.open(store_copy).parts() == before
    waiting = [file for file in listed(store_copy) if file["pending"]]
    assert [(file["kind"], file["part"]) for file in waiting] == [("documents", len(before)), ("chunks", len(before))]
    _, out, _ = run("info", store_copy, "--files", "--csv")
    assert [row["part"] for row in csv.DictReader(out.splitlines()) if row["pending"] == "true"] == [
        str(len(before))
    ] * 2
    api.chunk(store_copy, more)
    assert not any(file["pending"] for file in listed(store_copy))
    assert {file["path"] for file in waiting} < {file["path"] for file in listed(store_copy)}


def test_a_store_without_files_has_an_empty_list(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    nothing = write_blank(tmp_path / "none.jsonl")
    api.chunk(store, [str(nothing)], tokenizer=str(tiny_encoder))
    assert [file for file in listed(store) if file["kind"] in IN_PARTS] == []
    api.chunk(store, [str(write_jsonl(tmp_path / "some.jsonl", make_rows(3)))])
    assert [file["part"] for file in listed(store) if file["kind"] == "chunks"] == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--csv"], "--csv needs --files or --sources"),
        (["--files", "--csv", "--json"], "Give one of them."),
        (["--files", "--sources"], "Give one of them."),
        (["--files", "--sources"], "Give one of them."),
    ],
)
def test_forms_that_do_not_go_together_are_refused(built_store: Path, options: list[str], said: str) -> None:
    code, out, err = run("info", built_store, *options)
    assert (code, err.endswith(f"{said}\n")) == (2, True)
    assert (json.loads(out)["exit_code"] if "--json" in options else out) == (2 if "--json" in options else "")


def test_without_a_store_nothing_is_listed(tmp_path: Path) -> None:
    for form in ("--csv", "--json"):
        code, out, err = run("info", tmp_path / "nothing", "--files", form)
        assert (code, "does not exist" in err) == (10, True)
        assert (form == "--csv") == (out == "")
