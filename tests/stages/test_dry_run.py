"""Dry runs: what they show, and the file of ids that purges just what was seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli, make_rows, write_jsonl
from stored import stored_files

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


def test_a_dry_run_shows_what_it_selects_and_purges_nothing(store_copy: Path, tmp_path: Path) -> None:
    before = api.verify(store_copy)
    selectors = api.Selectors(pattern="store", where="source = 'a'", every=True, allow_lossy=True)
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True, out=tmp_path / "ids")
    reader = retrotool.open(store_copy)
    assert planned.review is not None and planned.chunks > 10
    chunks = ids_in(tmp_path / "ids")
    assert len(chunks) == planned.chunks and sorted(chunks) == chunks
    assert [(one.name, one.chunks) for one in planned.review.sources] == [("a", planned.chunks)]
    of = [reader.chunk(chunk).document for chunk in chunks]
    most = sorted(set(of), key=lambda name: (-of.count(name), name))[:10]
    assert [(one.name, one.chunks) for one in planned.review.documents] == [(name, of.count(name)) for name in most]
    assert len(planned.review.examples) == 10
    for example in planned.review.examples:
        assert example.chunk in chunks and example.source == "a"
        assert example.document == reader.chunk(example.chunk).document
        marked = example.text[example.begin : example.end]
        assert marked == "store", "here no match lies across a border"
    after = api.verify(store_copy)
    assert (after.content, after.ids, after.tombstones) == (before.content, before.ids, before.tombstones)
    assert after.ok
    assert stored_files(store_copy, "scans/*"), "the purge that follows has nothing to scan"
    assert api.purge(store_copy, selectors, reason="r").chunks == planned.chunks
    assert not stored_files(store_copy, "scans/*")


def ids_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()]


def test_a_file_of_ids_purges_just_what_a_dry_run_selected(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    selectors = api.Selectors(where="source = 'a'")
    file = tmp_path / "ids"
    planned = api.purge(store_copy, selectors, reason="r", dry_run=True, out=file)
    selected = ids_in(file)
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(6, first=1000))
    api.chunk(store_copy, [str(more)], tokenizer=str(tiny_encoder))  # of source a are some of these, too
    api.purge(store_copy, api.Selectors(chunk=(selected[0],)), reason="another")
    done = api.purge(store_copy, api.Selectors(chunk=Path(file)), reason="selected")
    assert (done.chunks, done.already_purged) == (planned.chunks - 1, 1)
    assert read_tombstones(Store.open(store_copy), done.purge).ids.tolist() == selected
    erased = api.purge(store_copy, api.Selectors(chunk=Path(file)), reason="r", erase=True)
    assert erased.erased == planned.chunks
    again = api.purge(store_copy, api.Selectors(chunk=Path(file)), reason="r", dry_run=True)
    assert (again.chunks, again.already_purged) == (0, planned.chunks)
    assert api.purge(store_copy, selectors, reason="r").chunks > 0, "what came since is still there"
    assert api.verify(store_copy).ok


def test_ids_of_another_store_are_refused(store_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    api.chunk(other, [str(rows)], tokenizer="minilm")
    file = tmp_path / "ids"
    planned = api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="r", dry_run=True, out=file)
    assert max(ids_in(file)) > 1 << 32 and planned.out == str(file)
    with pytest.raises(UsageError, match=r"line \d+: the store has no chunk \d+") as error:
        api.purge(other, api.Selectors(chunk=Path(file)), reason="r")
    assert "Nothing was purged" in error.value.advice


@pytest.mark.on_disk
def test_a_file_of_ids_is_refused_in_a_store(store_copy: Path) -> None:
    with pytest.raises(UsageError, match="in the store"):
        api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="r", dry_run=True, out=store_copy / "ids")


def test_a_file_of_ids_is_refused_where_it_can_not_be(store_copy: Path, tmp_path: Path, cli: Cli) -> None:
    selectors = api.Selectors(where="source = 'a'")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for file, message in ((taken, "exists already"), (tmp_path, "is a folder")):
        with pytest.raises(UsageError, match=message):
            api.purge(store_copy, selectors, reason="r", dry_run=True, out=file)
    with pytest.raises(UsageError, match="--out needs --dry-run"):
        api.purge(store_copy, selectors, reason="r", out=tmp_path / "ids")
    assert taken.read_text() == "mine"
    line = ["purge", store_copy, "--where", "source = 'a'", "--reason", "r", "--out", tmp_path / "ids"]
    assert "--out needs --dry-run" in cli(*line).stderr
    shown = cli(*line, "--dry-run")
    assert (
        f"Purge just these chunks: retrotool purge {store_copy} --chunk @{tmp_path / 'ids'} --reason ..."
        in shown.stdout
    )


def test_a_dry_run_without_a_scan_commits_nothing(store_copy: Path, tmp_path: Path) -> None:
    before = Store.open(store_copy).state.number
    assert api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="r", dry_run=True).chunks
    planned = api.purge(
        store_copy, api.Selectors(where="source = 'missing'"), reason="r", dry_run=True, out=tmp_path / "ids"
    )
    assert (ids_in(tmp_path / "ids"), planned.chunks) == ([], 0)
    assert Store.open(store_copy).state.number == before


def test_a_dry_run_tells_what_an_erase_has_to_rewrite(built_store: Path, store_copy: Path) -> None:
    planned = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", dry_run=True)
    assert planned.review is not None
    touched = planned.review.touched
    done = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", erase=True)
    group = Store.open(built_store).state.group("neighbours", "main")
    tables = [entry for slot in group if (entry := group.get(slot)) is not None]
    assert touched.rows == sum(entry.rows for entry in tables)
    assert touched.tables == len(tables)
    # A part has documents, keys, chunks and embeddings.
    assert done.files_rewritten <= 4 * touched.parts + touched.shards + touched.tables
    assert touched.bytes >= sum(entry.bytes for entry in tables)
    assert 0 < touched.seconds < 60
    nothing = api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="r", dry_run=True)
    assert nothing.review is not None
    assert nothing.review.touched.seconds == 0
