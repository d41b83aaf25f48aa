"""Input that breaks more than once, in slices, or under a plan that is still open: every row once, in the end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from chunk_helpers import run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.chunk.chunk_plan import ChunkOptions, commit_plan
from retrotool.chunk.stage import ChunkStage
from retrotool.sources import Fields, find_inputs
from retrotool.store import staging
from retrotool.store.leases import Run
from retrotool.store.store import Store

ROWS = make_rows(400, words=30)
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


def content_of(folder: Path, rows: list[dict[str, object]]) -> str:
    assert run_chunk(folder / "expected", write_rows(folder / "expected.jsonl", rows)).exit_code == 0
    return verified(folder / "expected").content


def frames() -> list[bytes]:
    """The rows as zstd frames that tell their content size, so that the file is cut between them."""
    return [zstandard.compress(b"".join(LINES[start : start + 100])) for start in range(0, 400, 100)]


def check(store: Path, tmp_path: Path) -> None:
    found = api.info(store)
    assert (found.documents, found.unfinished) == (400, 0)
    assert verified(store).content == content_of(tmp_path, ROWS)


@pytest.mark.parametrize("duplicates", ["skip", "keep"])
def test_a_file_that_breaks_off_twice_gives_every_row_once(duplicates, tmp_path):
    store, path = tmp_path / "store", tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(LINES))
    options = ["--duplicates", duplicates]
    path.write_bytes(whole[: len(whole) // 2])
    assert run_chunk(store, path, *options).exit_code == 3
    path.write_bytes(whole[: len(whole) // 3])
    assert run_chunk(store, path, *options).exit_code == 3
    path.write_bytes(whole)
    result = run_chunk(store, path, *options)
    assert result.exit_code == 0, result.output
    check(store, tmp_path)


@pytest.mark.parametrize("duplicates", ["skip", "keep"])
@pytest.mark.parametrize("broken", range(4))
def test_a_file_that_was_read_in_slices_is_gone_on_with_wherever_it_was_damaged(
    broken, duplicates, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 8000)
    store, path = tmp_path / "store", tmp_path / "rows.jsonl.zst"
    pieces = frames()
    half = len(pieces[broken]) // 2
    harmed = [*pieces]
    harmed[broken] = pieces[broken][:half] + b"\xff\xff" + pieces[broken][half + 2 :]
    path.write_bytes(b"".join(harmed))
    result = run_chunk(store, path, "--duplicates", duplicates)
    assert result.exit_code == 3
    (plan,) = Store.open(store).state.with_prefix("plan:").values()
    assert plan["units"] > 2
    path.write_bytes(b"".join(pieces))
    result = run_chunk(store, path, "--duplicates", duplicates)
    assert result.exit_code == 0, result.output
    check(store, tmp_path)


def test_a_file_that_grows_by_repair_while_its_slices_are_open_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 8000)
    store, path = tmp_path / "store", tmp_path / "rows.jsonl.zst"
    pieces = frames()
    harmed = b"".join([pieces[0][:-4], b"\0\0\0\0", *pieces[1:]])
    path.write_bytes(harmed)
    assert "Stopped" in run_chunk(store, path, "--max-bad", 0).stdout
    path.write_bytes(b"".join([pieces[0], zstandard.compress(b""), *pieces[1:]]))
    # The advice that was printed.
    result = run_chunk(store, path, "--max-bad", 0)
    assert result.exit_code == 0, result.output
    check(store, tmp_path)


def test_damage_that_waits_to_be_committed_counts_when_the_run_is_resumed(tmp_path, monkeypatch):
    """Units finish in any order: one that is damaged may be done before those it follows."""
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 1000)
    monkeypatch.setattr(chunk_plan, "SMALL_PLAN", 1 << 40)
    store = tmp_path / "store"
    names = [write_rows(tmp_path / f"{i}.jsonl", ROWS[i * 40 : (i + 1) * 40]) for i in range(9)]
    names.append(tmp_path / "9.jsonl.gz")
    names[-1].write_bytes(gzip.compress(b"".join(LINES[360:]), 0)[:-40])
    run_chunk(store, names[0])
    opened = Store.open(store)
    with Run(opened.storage) as run:
        commit_plan(opened, run, find_inputs(list(map(str, names))), ChunkOptions(Fields(), 1 << 20))
        tasks = ChunkStage().plan(opened)
        assert len(tasks) > 5
        staging.stage(opened.storage, ChunkStage().open(opened)(tasks[-1], run.id, int))
    for _ in range(2):
        found = api.chunk(store, list(map(str, names)), max_bad=0)
        assert found.stopped
        assert (found.damaged, found.rejected) == (1, 1)
        assert [reason.input for reason in found.reasons] == [str(names[-1])]
    names[-1].write_bytes(gzip.compress(b"".join(LINES[360:]), 0))
    result = run_chunk(store, *names)
    assert result.exit_code == 0, result.output
    check(store, tmp_path)


def test_rows_of_another_input_of_the_same_name_are_not_taken_for_known(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    store = tmp_path / "store"
    monkeypatch.chdir(tmp_path / "a")
    run_chunk(store, write_rows(Path("x.jsonl"), ROWS[:3]))
    monkeypatch.chdir(tmp_path / "b")
    run_chunk(store, write_rows(Path("x.jsonl"), [ROWS[10], {"id": "bad"}]))
    write_rows(Path("x.jsonl"), [ROWS[10], ROWS[0]])
    result = run_chunk(store, "x.jsonl")
    assert "2 documents unchanged." in result.stdout, "one by its input, one by its id and text"
    assert result.exit_code == 0
    assert api.info(store).documents == 4


def test_a_larger_limit_adds_what_was_too_long(tmp_path):
    store = tmp_path / "store"
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "short", "text": "a"}, {"id": "long", "text": "word " * 2000}])
    assert run_chunk(store, path, "--max-document", "6KB").exit_code == 3
    assert run_chunk(store, path, "--max-document", "6KB").exit_code == 0
    result = run_chunk(store, path, "--max-document", "1MiB")
    assert (result.exit_code, api.info(store).documents) == (0, 2)
    assert "1 document unchanged" in result.stdout


@pytest.mark.parametrize(
    ("first", "second", "name", "data"),
    [
        (["--format", "u32"], ["--format", "u16"], "x.bin", bytes([100, 0, 200, 0, 102, 0, 44, 1]) * 3),
        (["--separator", "#"], ["--separator", "\\n\\n"], "n.txt", b"one two\n\nthree four"),
        (["--text-field", "body"], [], "r.jsonl", b'{"text": "one two"}\n{"text": "three", "body": "four"}\n'),
        (["--format", "tsv", "--encoding", "latin-1"], ["--format", "tsv"], "t", b"text\none\ntwo\xc3\xa4\n"),
    ],
)
def test_a_wrong_setting_does_not_shut_an_input_out(first, second, name, data, tmp_path):
    store = tmp_path / "store"
    (tmp_path / name).write_bytes(data)
    marked = ["--end-of-document", "102", "--tokenizer", "minilm"] if name.endswith(".bin") else []
    run_chunk(store, tmp_path / name, *first, *marked)
    before = api.info(store).documents
    result = run_chunk(store, tmp_path / name, *second, *marked)
    assert api.info(store).documents > before, result.output
