"""Input that is broken, repaired and read again; input that has changed; and how much of it is too much."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chunk_helpers import documents, pack, quarantine, run_chunk, verified, write_rows
from conftest import make_rows, write_jsonl
from stored import stored_files

import retrotool
from retrotool import api, sources
from retrotool.chunk import chunk_plan
from retrotool.chunk.chunk_plan import ChunkOptions, commit_plan
from retrotool.chunk.deduplicate import DIFFERING
from retrotool.errors import TaskError
from retrotool.sources import Fields, find_inputs
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.store import Store

ROWS = make_rows(300, words=30)
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def content_of(folder: Path, rows: list[dict[str, object]]) -> str:
    assert run_chunk(folder / "expected", write_rows(folder / "expected.jsonl", rows)).exit_code == 0
    return verified(folder / "expected").content


def packed(name: str, lines: bytes = LINES) -> bytes:
    """The rows in several members or frames, of which each is one block."""
    return b"".join(pack(lines[start : start + 4096], name) for start in range(0, len(lines), 4096))


def truncated(path: Path, lines: bytes = LINES) -> Path:
    data = packed(path.name, lines)
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def ids(store: Path) -> list[str]:
    return [row["id"] for row in documents(store)]


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.jsonl.gz"])
def test_a_truncated_file_stops_the_run_after_what_is_good_and_is_read_again_when_repaired(tmp_path, name):
    store, path = tmp_path / "store", truncated(tmp_path / name)
    later = write_rows(tmp_path / "later.jsonl", make_rows(5, first=500))
    result = run_chunk(store, path, later)
    assert result.exit_code == 3
    assert "run the same command again" in result.stdout
    good = len(ids(store))
    assert 20 < good < 300
    path.write_bytes(packed(name))
    result = run_chunk(store, path, later, "--json")
    assert result.exit_code == 0, result.stdout
    reported = json.loads(result.stdout)
    assert (reported["rejected"], reported["damaged"], reported["unchanged"]) == (0, 0, good - 5)
    assert [reason[:10] for _, _, reason in quarantine(store)] == ["broken off"], "what each run rejected stays"
    assert sorted(ids(store)) == sorted([row["id"] for row in ROWS] + [f"doc-{i}" for i in range(500, 505)])
    found = api.info(store)
    assert (found.documents, found.rejected, found.unfinished) == (305, 1, 0)
    assert verified(store).content == content_of(tmp_path, [*ROWS, *make_rows(5, first=500)])


def changed(store: Path, *arguments: object) -> dict[str, object]:
    """What ``chunk`` says as JSON."""
    found: dict[str, object] = json.loads(run_chunk(store, *arguments, "--json").stdout)
    return found


def test_what_was_chunked_before_the_break_is_skipped(tmp_path):
    store, path = tmp_path / "store", truncated(tmp_path / "rows.jsonl.gz")
    run_chunk(store, path)
    good = len(ids(store))
    path.write_bytes(gzip.compress(LINES))
    result = changed(store, path)
    assert (result["documents"], result["unchanged"], result["rejected"]) == (300 - good, good, 0)
    assert ids(store) == [row["id"] for row in ROWS]


def test_what_was_erased_does_not_come_back_with_the_repaired_file(tmp_path):
    lines = json.dumps({"id": "long", "text": " ".join(str(row["text"]) for row in ROWS[:9])}).encode() + b"\n" + LINES
    store, path = tmp_path / "store", truncated(tmp_path / "rows.jsonl.gz", lines)
    run_chunk(store, path)
    good = len(ids(store))
    first, *others = retrotool.open(store).document("long")
    assert others
    selectors = api.Selectors(chunk=(str(first),), where="id = 'doc-5'")
    api.purge(store, selectors, reason="test", erase=True)
    path.write_bytes(gzip.compress(lines))
    result = changed(store, path)
    assert (result["documents"], result["blocked"], result["unchanged"]) == (301 - good, 2, good - 2)
    assert verified(store).problems == []


def test_purged_documents_of_a_changed_input_are_added_again_only_on_request(tmp_path):
    store, path = tmp_path / "store", write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    run_chunk(store, path)
    api.purge(store, api.Selectors(where="id in ('doc-1', 'doc-2')"), reason="test")
    write_rows(path, ROWS[:6])
    result = changed(store, path)
    assert (result["documents"], result["unchanged"], result["blocked"]) == (1, 3, 2)
    write_rows(path, ROWS[:7])
    result = changed(store, path, "--allow-purged")
    assert (result["documents"], result["unchanged"], result["rejected"]) == (3, 4, 0)
    assert api.info(store).documents == 7


def test_a_repaired_file_whose_beginning_is_another_gives_what_is_new_in_it(tmp_path):
    store, path = tmp_path / "store", truncated(tmp_path / "rows.jsonl.gz")
    run_chunk(store, path)
    good = len(ids(store))
    other = [{"id": "first", "text": "A new first row."}, {**ROWS[0], "text": "Another text."}, *ROWS[1:]]
    path.write_bytes(pack(b"".join(json.dumps(row).encode() + b"\n" for row in other), path.name))
    result = changed(store, path)
    assert (result["documents"], result["unchanged"], result["rejected"]) == (1 + 300 - good, good - 1, 0)
    assert (result["differing"], result["differing_examples"]) == (1, ["doc-0"])
    assert (str(path), 2, DIFFERING) in quarantine(store)
    assert {row["id"] for row in documents(store)} == {"first", *(row["id"] for row in ROWS)}


def test_rows_that_were_repaired_are_added_and_the_others_not_again(tmp_path):
    store = tmp_path / "store"
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], b'{"id": "doc-1", "text": 5}', ROWS[2], b"{", ROWS[4]])
    assert run_chunk(store, path).exit_code == 3
    write_rows(path, [ROWS[0], ROWS[1], ROWS[2], b"{", ROWS[4]])
    result = run_chunk(store, path)
    assert result.exit_code == 3
    assert result.stdout.startswith("1 document, ")
    assert "3 documents unchanged.\n1 row rejected:\n  1  not JSON" in result.stdout
    write_rows(path, ROWS[:5])
    assert run_chunk(store, path).exit_code == 0
    assert verified(store).content == content_of(tmp_path, ROWS[:5])


def test_adding_what_did_not_change_changes_nothing(tmp_path):
    store = tmp_path / "store"
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], b"{"])
    run_chunk(store, path)
    before = verified(store)
    result = changed(store, path)
    assert (result["documents"], result["rejected"], result["known_inputs"]) == (0, 0, 1)
    assert verified(store).content == before.content
    assert len(quarantine(store)) == 1


def test_without_inputs_what_was_begun_is_finished(tmp_path):
    store = tmp_path / "store"
    assert "no input was given" in run_chunk(store).stderr
    assert not store.exists() and not stored_files(store)
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], b"{"])
    assert "Stopped" not in run_chunk(store, path).stdout
    assert run_chunk(store).exit_code == 2
    opened = Store.open(store)
    with Run(opened.storage) as run:
        found = find_inputs([str(write_rows(tmp_path / "more.jsonl", ROWS[3:9]))])
        commit_plan(opened, run, found, ChunkOptions(Fields(), 1 << 20))
    assert run_chunk(store).exit_code == 0
    assert (api.info(store).documents, api.info(store).unfinished) == (9, 0)


@pytest.mark.parametrize("allowed", [(), ("--max-bad", 1)])
def test_of_a_damaged_file_the_rest_is_rejected_and_everything_else_is_read(tmp_path, allowed):
    store, path = tmp_path / "store", truncated(tmp_path / "rows.jsonl.zst")
    later = write_rows(tmp_path / "later.jsonl", make_rows(5, first=500))
    found = run_chunk(store, path, later, *allowed, "--json")
    assert found.exit_code == 3
    result = json.loads(found.stdout)
    assert result["reasons"][0]["input"] == str(path)
    assert (result["stopped"], result["damaged"], result["rejected"]) == ("", 1, 1)
    assert "doc-504" in ids(store)
    assert api.info(store).unfinished == 0


def test_a_run_that_stopped_stops_again_until_it_is_reported_otherwise(tmp_path):
    store = tmp_path / "store"
    big = [{"id": f"big-{i}", "text": "word " * 20_000} for i in range(180)]  # 18 MB: units of their own
    path = truncated(tmp_path / "rows.jsonl.zst")
    later = write_rows(tmp_path / "later.jsonl", big)
    for _ in range(2):
        result = json.loads(run_chunk(store, path, later, "--max-bad", 0, "--json").stdout)
        assert "1 row rejected" in result["stopped"]
        assert api.info(store).unfinished == 1
    assert run_chunk(store, path, later, "--max-bad", "1").exit_code == 3
    assert api.info(store).unfinished == 0
    assert "big-179" in ids(store)


def test_too_many_bad_rows_stop_the_run(tmp_path):
    store = tmp_path / "store"
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:10], b"{", b"{", b"{"])
    big = [{"id": f"big-{i}", "text": "word " * 20_000} for i in range(180)]
    later = write_rows(tmp_path / "later.jsonl", big)
    result = run_chunk(store, path, later, "--max-bad", 2)
    assert result.exit_code == 3
    assert "3 rows rejected, more than --max-bad 2" in result.stdout
    assert run_chunk(store, path, later, "--max-bad", 3).exit_code == 3
    assert api.info(store).unfinished == 0


@pytest.mark.parametrize("limit", ["-1", "x", "1%", "1.5"])
def test_a_limit_that_is_none_is_refused(tmp_path, limit):
    result = run_chunk(tmp_path / "store", write_rows(tmp_path / "rows.jsonl", ROWS[:1]), "--max-bad", limit)
    assert (result.exit_code, (tmp_path / "store").exists()) == (2, False)


def test_an_input_that_has_changed_is_read_again(tmp_path):
    store, path = tmp_path / "store", write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    assert run_chunk(store, path).exit_code == 0
    write_rows(path, ROWS[:8])
    found = changed(store, path)
    assert (found["documents"], found["unchanged"], found["rejected"]) == (3, 5, 0)
    assert verified(store).content == content_of(tmp_path, ROWS[:8])
    assert run_chunk(store, path).exit_code == 0


def test_renamed_and_reordered_inputs_are_known(tmp_path):
    store = tmp_path / "store"
    paths = [write_rows(tmp_path / f"{i}.jsonl", ROWS[10 * i : 10 * i + 10]) for i in range(3)]
    run_chunk(store, *paths)
    renamed = paths[0].rename(tmp_path / "other.jsonl")
    result = json.loads(run_chunk(store, paths[2], renamed, paths[1], "--json").stdout)
    assert (result["known_inputs"], result["documents"], result["rejected"]) == (3, 0, 0)


def test_quarantine_has_the_offset_and_the_beginning_of_a_row(tmp_path):
    from retrotool.store import parts
    from retrotool.store.store import Store

    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], b'{"text": "bad \x00 row', ROWS[1]])
    run_chunk(tmp_path / "store", path)
    opened = Store.open(tmp_path / "store")
    group = opened.state.group("quarantine")
    (entry,) = [group.get(slot) for slot in group]
    (row,) = parts.read_parquet(opened, entry).to_pylist()
    assert row["offset"] == len(json.dumps(ROWS[0])) + 1
    assert row["excerpt"] == '{"text": "bad \\x00 row'


def test_rejected_rows_of_a_table_have_their_numbers_in_every_slice(tmp_path, monkeypatch):
    """Ranges of a table are rows, not bytes."""
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", 1)
    rows = [{"id": str(n), "text": f"row {n} of many words"} for n in range(800)]
    rows[650]["text"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=100)
    api.chunk(tmp_path / "store", [str(tmp_path / "rows.parquet")])
    (entry,) = Store.open(tmp_path / "store").state.group("quarantine").entries()
    (row,) = parts.read_parquet(Store.open(tmp_path / "store"), entry).to_pylist()
    assert row["line"] == 651


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(20))
    read = sources.read_input

    def cut_short(*arguments):
        yield from read(*arguments)
        path.write_bytes(path.read_bytes()[:-200])

    monkeypatch.setattr(sources, "read_input", cut_short)
    with pytest.raises(TaskError, match="when it was planned, now"):
        api.chunk(tmp_path / "store", [str(path)])
    assert api.info(tmp_path / "store").documents == 0


def test_an_interrupted_input_is_finished_as_it_was_begun_and_that_is_said(tmp_path, monkeypatch):
    rows = [{"title": f"title {n}", "text": f"text {n}", "year": n} for n in range(3)]
    path, notes = write_jsonl(tmp_path / "rows.jsonl", rows), []
    with monkeypatch.context() as patch:
        patch.setattr("retrotool.chunk.run._work", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            api.chunk(tmp_path / "store", [str(path)])
    result = api.chunk(tmp_path / "store", [str(path)], fields=Fields(keep=("year",)), note=notes.append)
    assert (result.documents, result.known_inputs) == (3, 0), "it was resumed, not skipped"
    assert api.chunk(tmp_path / "store", [str(path)]).known_inputs == 1
    begun = f"Resuming interrupted work: {path} is read to its end with the options that it was begun with, not those"
    assert any(note.startswith(begun) for note in notes), notes
    assert any(note.startswith("--keep year: 1 input already in the store without it") for note in notes), notes
