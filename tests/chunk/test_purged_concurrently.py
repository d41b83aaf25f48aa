"""What is purged while its text is on the way into the store, or was on the way, does not come back."""

from __future__ import annotations

from pathlib import Path

import pytest
from chunk_helpers import run_chunk, run_cli, verified, write_rows
from conftest import make_rows
from stored import stored_files

import retrotool
from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.chunk.chunk_plan import EXACT, ChunkOptions, commit_plan
from retrotool.chunk.stage import ChunkStage
from retrotool.sources import Fields, find_inputs
from retrotool.store import folding, staging
from retrotool.store.leases import Run
from retrotool.store.store import Store
from retrotool.tokenizers import FastTokenizer, TokensDiffer

JANE = {"id": "jane", "text": "Jane Doe lives in a house by the lake."}


def stage_units(store: Path, paths: list[Path], units: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run leaves: some units of a plan staged, each of an input."""
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", max(path.stat().st_size for path in paths))
    opened = Store.open(store)
    with Run(opened.storage) as run:
        commit_plan(opened, run, find_inputs(list(map(str, paths))), ChunkOptions(Fields(), 1 << 20))
        stage = ChunkStage()
        tasks = stage.plan(opened)
        assert len(tasks) == len(paths)
        worker = stage.open(opened)
        for unit in units:
            assert staging.stage(opened.storage, worker(tasks[unit], run.id, int))


def purge(store: Path, folder: Path, *ids: str, erase: bool = False) -> None:
    (folder / "takedown.txt").write_text("".join(f"{name}\n" for name in ids))
    arguments = ["--document", f"@{folder / 'takedown.txt'}", "--reason", "r", "--yes", *(["--erase"] if erase else [])]
    result = run_cli("purge", store, *arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("target", [{"id": "mirror", "text": JANE["text"]}, {"id": "jane", "text": "Another version."}])
def test_a_unit_that_was_staged_before_a_purge_is_read_again_without_the_purged(target, tmp_path, monkeypatch):
    store = tmp_path / "store"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]))
    paths = [
        write_rows(tmp_path / "a.jsonl", make_rows(5)),
        write_rows(tmp_path / "b.jsonl", [target, *make_rows(3, first=9)]),
    ]
    stage_units(store, paths, [1], monkeypatch)
    purge(store, tmp_path, "jane")
    result = run_chunk(store, *paths)
    assert result.exit_code == 0, result.output
    assert "1 document skipped: purged before" in result.stdout
    assert verified(store).documents == 8
    assert not any("Jane Doe" in chunk.text or "Another version" in chunk.text for chunk in everything(store))


def everything(store: Path):
    reader = retrotool.open(store)
    for part in Store.open(store).state.parts():
        for row in range(Store.open(store).state.part_file("chunks", part).rows):
            if reader.is_live([(part << 32) + row]).all():
                yield reader.chunk((part << 32) + row)


def test_a_unit_without_the_purged_is_not_read_again(tmp_path, monkeypatch):
    store = tmp_path / "store"
    run_chunk(store, write_rows(tmp_path / "first.jsonl", [JANE]))
    paths = [write_rows(tmp_path / "a.jsonl", make_rows(5)), write_rows(tmp_path / "b.jsonl", make_rows(3, first=9))]
    stage_units(store, paths, [1], monkeypatch)
    purge(store, tmp_path, "jane")
    opened = Store.open(store)
    with Run(opened.storage) as run:
        assert folding.fold(opened, run).refused == {}


def test_the_log_has_no_text_of_the_document_that_showed_the_difference(tmp_path, monkeypatch, byte_level_tokenizer):
    monkeypatch.setattr(chunk_plan, "SMALL_PLAN", 0)

    def differ(*_):
        raise TokensDiffer("0.1", 3, "'Jane Doe, 12 Elm Street'")

    monkeypatch.setattr(FastTokenizer, "_compare", differ)
    store = tmp_path / "store"
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(5))
    result = run_chunk(store, rows, "--tokenizer", byte_level_tokenizer)
    assert result.exit_code == 1
    assert "Elm Street" in result.stderr, "a person is reported"
    assert EXACT in Store.open(store).state.records
    assert not [file for file in stored_files(store, "log/*") if b"Elm Street" in file.read_bytes()]


def test_allowed_again_a_purged_document_is_chunked_under_its_own_id(tmp_path):
    store = tmp_path / "store"
    rows = make_rows(4)
    run_chunk(store, write_rows(tmp_path / "first.jsonl", rows))
    purge(store, tmp_path, "doc-2")
    again = write_rows(tmp_path / "again.jsonl", [rows[2]])
    assert "purged before" in run_chunk(store, again).stdout
    assert api.info(store).documents == 3
    # The same file once more, which was left out in whole.
    result = run_chunk(store, again, "--allow-purged")
    assert result.exit_code == 0, result.output
    assert api.info(store).documents == 4
    assert retrotool.open(store).document("doc-2")
    assert verified(store).documents == 4
