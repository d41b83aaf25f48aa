"""A purge also takes the copies in a plan that is not finished: they would be repeats of what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunk_helpers import run_chunk, run_cli, verified, write_rows
from conftest import make_rows

import retrotool
from retrotool import api
from retrotool.purge import run as purge_run
from retrotool.store import parts
from retrotool.store.blocked import read_blocked
from retrotool.store.parts import join_id
from retrotool.store.store import Store

TEXT = "Jane Doe lives in a house by the lake, and has seen nobody who lives there with her, nor for how long she will."
X, Y = {"id": "x", "text": TEXT}, {"id": "y", "text": TEXT}
OTHERS = make_rows(4, words=30)


def names(store: Path) -> list[str]:
    """Ids of the documents that are live."""
    reader = retrotool.open(store)
    chunks = [reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)]
    return list(dict.fromkeys(chunk.document for chunk in chunks))


def left_open(folder: Path, *rows: dict[str, str]) -> tuple[Path, Path]:
    """A store with an open plan, of which all units are committed, and its input."""
    store, path = folder / "store", write_rows(folder / "rows.jsonl", rows)
    result = run_chunk(store, path, "--duplicates", "fail", "--part-size", 3)
    assert " by text only; the first: " in result.stderr
    assert names(store) == [], "its parts are pending"
    return store, path


def all_chunks(store: Path, name: str) -> list[int]:
    """Chunks of all documents with an id, pending ones too, ascending."""
    opened = Store.open(store)
    return [
        join_id(part, row["first_row"] + i)
        for part in opened.state.all_parts()
        for row in parts.read_documents(opened, part).to_pylist()
        if row["id"] == name
        for i in range(row["n_chunks"])
    ]


def purge(store: Path, *arguments: object) -> str:
    result = run_cli("purge", store, *arguments, "--reason", "request 17", "--yes", "--json")
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["purge"])


def text_on_disk(store: Path) -> bool:
    opened = Store.open(store)
    return any("y" in parts.read_documents(opened, part, ["id"])["id"].to_pylist() for part in opened.state.all_parts())


@pytest.mark.parametrize(("duplicates", "erase"), [("skip", ["--erase"]), ("keep", []), ("fail", ["--erase"])])
def test_a_copy_in_a_plan_that_is_not_finished_is_purged_with_its_original(duplicates, erase, tmp_path):
    store, path = left_open(tmp_path, X, *OTHERS, Y, {"id": "z", "text": "Nobody's but z's."})
    first = purge(store, "--document", "x", *erase)
    assert text_on_disk(store) == (not erase)
    result = run_chunk(store, path, "--duplicates", duplicates)
    assert result.exit_code == 0, result.output
    assert names(store) == [*(row["id"] for row in OTHERS), "z"]
    found = api.info(store)
    assert (found.documents, found.unfinished, found.rejected) == (5, 0, 0)
    assert verified(store).documents == 5
    assert set(found.purges) == {first}
    assert (found.purges[first]["documents"], found.purges[first]["erased"]) == (2, bool(erase))
    assert run_cli("erase", store, first, "--yes").exit_code == 0
    assert not text_on_disk(store)
    assert all(record["erased"] for record in api.info(store).purges.values())
    assert api.verify_purge(store, first, out=tmp_path).receipt.ok
    assert verified(store).documents == 5


def test_a_document_that_was_purged_in_part_stays_and_its_copy_goes(tmp_path):
    long = " ".join([TEXT] * 6)
    rows = [{"id": "x", "text": long}, *OTHERS, {"id": "y", "text": long}]
    store, path = left_open(tmp_path, *rows)
    chunks = all_chunks(store, "x")
    assert len(chunks) > 1
    purge(store, "--chunk", chunks[0])
    assert run_chunk(store, path, "--duplicates", "keep").exit_code == 0
    assert retrotool.open(store).document("x") == chunks[1:]
    assert "y" not in names(store)
    assert verified(store).documents == 5


def test_by_id_and_for_each_purge_and_taken_back(tmp_path):
    version = {"id": "x", "text": "Another version of what x says."}
    alike = [{"id": name, "text": "Said by two."} for name in ("a", "b")]
    store, path = left_open(tmp_path, X, *OTHERS, version, *alike)
    of_x = purge(store, "--chunk", 0)
    of_a = purge(store, "--document", "a")
    assert run_chunk(store, path, "--duplicates", "keep").exit_code == 0
    assert names(store) == [row["id"] for row in OTHERS]
    assert {purge: record["documents"] for purge, record in api.info(store).purges.items()} == {of_x: 2, of_a: 2}
    assert len(read_blocked(Store.open(store))) == 3 + 3, "of what was selected"
    undone = run_cli("undo", store, of_a, "--reason", "kept after all")
    assert undone.exit_code == 0 and "2 whole documents" in undone.stdout
    assert names(store) == [*(row["id"] for row in OTHERS), "a", "b"]
    undone = run_cli("undo", store, of_x, "--reason", "kept after all")
    assert undone.exit_code == 0 and "1 document has the id of another that was added since" in undone.stdout
    assert names(store) == ["x", *(row["id"] for row in OTHERS), "a", "b"]
    assert verified(store).documents == 8


def test_what_several_purges_keep_back_stays_until_the_last_is_undone(tmp_path):
    store, path = left_open(tmp_path, X, *OTHERS, Y)
    several = [purge(store, "--document", "x"), purge(store, "--document", "x", "--document", "doc-1")]
    assert run_chunk(store, path).exit_code == 0
    assert "y" not in names(store)
    for one, live in zip(several, (False, True), strict=True):
        assert run_cli("undo", store, one, "--reason", "kept after all").exit_code == 0
        assert ("x" in names(store)) == live
        assert "y" not in names(store), "it repeats x"
        assert verified(store)


@pytest.mark.parametrize("selected", ["x", "y"])
def test_an_undo_leaves_one_live_copy_of_a_text(selected, tmp_path):
    store, path = tmp_path / "store", write_rows(tmp_path / "first.jsonl", [X])
    assert run_chunk(store, path).exit_code == 0
    path = write_rows(tmp_path / "rows.jsonl", [*OTHERS, Y, OTHERS[0], {"id": "z", "text": "Nobody's but z's."}])
    assert run_chunk(store, path, "--duplicates", "fail").exit_code == 1
    purged = purge(store, "--document", selected)
    assert run_chunk(store, path).exit_code == 0
    assert run_cli("undo", store, purged, "--reason", "kept after all").exit_code == 0
    assert names(store) == ["x", *(row["id"] for row in OTHERS), "z"]
    found = api.info(store)
    assert (found.documents, found.rejected) == (6, 1)
    assert verified(store).documents == 6


def test_an_undo_leaves_no_part_of_a_document_that_repeats(tmp_path):
    version = {"id": "x", "text": " ".join([TEXT] * 6)}
    store, path = left_open(tmp_path, X, *OTHERS, version)
    chunk = all_chunks(store, "x")[-1]
    assert chunk >= join_id(1, 0), "of the other version"
    purged = purge(store, "--chunk", chunk)
    assert run_chunk(store, path).exit_code == 0
    assert run_cli("undo", store, purged, "--reason", "kept after all").exit_code == 0
    assert retrotool.open(store).document("x") == [0]
    assert names(store) == ["x", *(row["id"] for row in OTHERS)]
    assert verified(store).documents == 5


@pytest.mark.parametrize("copied", [True, False])
def test_a_copy_that_is_committed_while_a_purge_selects_is_taken(copied, tmp_path, monkeypatch):
    store, _ = left_open(tmp_path, X, *OTHERS, OTHERS[0])
    more = write_rows(tmp_path / "more.jsonl", [Y if copied else {"id": "w", "text": "Nothing to see."}])
    commit_purge, selected = purge_run.commit_purge, []

    def overtaken(opened, run, selection, *arguments):
        selected.append(selection)
        if len(selected) == 1:
            run_chunk(store, more, "--duplicates", "fail")
        return commit_purge(opened, run, selection, *arguments)

    monkeypatch.setattr(purge_run, "commit_purge", overtaken)
    result = api.purge(store, api.Selectors(document=("x",)), reason="request 17", confirm=lambda _: True)
    assert len(selected) == (2 if copied else 1), "it selects again if there are copies"
    assert result.documents == (2 if copied else 1)
    assert run_chunk(store).exit_code == 0
    assert [name for name in names(store) if name in "xyw"] == ([] if copied else ["w"])
    assert verified(store).documents == len(OTHERS) + (not copied)


def test_a_plan_that_lets_purged_documents_in_keeps_them_and_one_begun_after_has_none(tmp_path):
    store, path = tmp_path / "store", write_rows(tmp_path / "rows.jsonl", [X, *OTHERS, Y])
    assert run_chunk(store, path, "--duplicates", "fail", "--allow-purged").exit_code == 1
    purge(store, "--document", "x")
    assert run_chunk(store, path).exit_code == 0
    assert "y" in names(store)
    # A later plan's units have the block list from their beginning.
    later = write_rows(tmp_path / "later.jsonl", [{"id": "late", "text": "Nothing to see."}, {"id": "w", "text": TEXT}])
    result = run_chunk(store, later)
    assert result.exit_code == 0, result.output
    assert "w" not in names(store)
    assert verified(store).documents == 6
