"""``log`` and ``verify --log``: what was done is reported, and what was done to the log is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pytest
from memory_storage import MemoryFile
from stored import copy_store, path_in_store, remove_stored, stored_file, write_stored
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.errors import CorruptError, UsageError
from retrotool.store import log
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.paths import new_token
from retrotool.store.staging import COUNTS
from retrotool.store.state import encode_checkpoint
from retrotool.store.storage import storage_at
from retrotool.store.store import CHECKPOINT_EVERY, Store

SECRET = "doc-9"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def audited_store(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``built_store`` after a purge and an erase, and a checkpoint in the middle of its log."""
    copy = copy_store(built_store, tmp_path_factory.mktemp("audited") / "store")
    api.purge(copy, api.Selectors(where=f"id = '{SECRET}'"), reason="request 17\n\x1b[31m")
    api.purge(copy, api.Selectors(where=f"id = '{SECRET}'"), reason="again", erase=True)
    write_checkpoint(copy, 3)
    return copy


def write_checkpoint(root: Path, number: int, **changed: Any) -> Path | MemoryFile:
    """A checkpoint of a commit; ``changed`` are records of it that are not the fold's."""
    folded = Store.open(root).at(number).state
    data = encode_checkpoint(dataclasses.replace(folded, records={**folded.records, **changed}))
    return write_stored(root, f"checkpoints/{number:08d}-{new_token('0123abcd')}.json", data)


@pytest.fixture
def store(audited_store: Path, tmp_path: Path) -> Path:
    return copy_store(audited_store, tmp_path / "store")


def commit_file(root: Path, number: int) -> Path | MemoryFile:
    return stored_file(root, log.commit_path(number))


def forge(root: Path, number: int, **fields: object) -> None:
    """Rewrite a commit as a careful forger would: with a checksum that is right."""
    path = commit_file(root, number)
    entry = {**json.loads(path.read_text()), **fields}
    del entry["sha256"]
    path.write_bytes(log.with_checksum(orjson.dumps(entry)))


def forge_all(root: Path, number: int, **fields: object) -> None:
    """Rewrite a commit and all that follow, so that the chain is whole again."""
    forge(root, number, **fields)
    for later in range(number + 1, log.last_number(storage_at(root)) + 1):
        parent = hashlib.sha256(commit_file(root, later - 1).read_bytes()).hexdigest()
        forge(root, later, parent=parent)


def test_every_commit_is_reported_with_the_hash_that_the_next_names(store: Path) -> None:
    entries = list(api.log_entries(store))
    assert [entry.number for entry in entries] == list(range(Store.open(store).state.number + 1))
    assert [entry.parent for entry in entries[1:]] == [entry.sha256 for entry in entries[:-1]]
    files = [hashlib.sha256(commit_file(store, n).read_bytes()).hexdigest() for n in range(len(entries))]
    assert [entry.sha256 for entry in entries] == files
    reported = json.loads(run("log", store, "--json")[1])
    assert [entry["sha256"] for entry in reported["commits"]] == files
    assert [entry.number for entry in api.log_entries(store, 2)] == [len(entries) - 2, len(entries) - 1]
    assert len(list(api.log_entries(store, 10**6))) == len(entries)


def test_what_was_done_is_reported_in_a_few_words(store: Path) -> None:
    code, out, err = run("log", store)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    (purge,) = (line for line in lines if "  purge " in line)
    chunks = api.info(store).purges
    (name,) = chunks
    assert f"+1 tombstones ({chunks[name]['chunks']})" in purge
    assert purge.endswith(f"; {name} by {chunks[name]['who']}: request 17 \\x1b[31m")
    assert any(line.endswith(f"; erased {name}: request 17 \\x1b[31m") for line in lines if "  erase " in line)
    chunked = next(line for line in lines if "  chunk " in line)
    assert "+1 documents (" in chunked or "documents (120)" in chunked
    rewritten = next(line for line in lines if "  erase " in line)
    assert "±1 chunks (" in rewritten and "-1 chunks" not in rewritten
    assert any("embeddings/tiny" in line for line in lines if "  embed " in line)
    assert len(lines) == 1 + len(list(api.log_entries(store))) and "time (UTC)" in lines[0]


def test_what_was_taken_back_is_reported_with_who_and_why(built_store: Path, tmp_path: Path) -> None:
    copy = copy_store(built_store, tmp_path / "copy")
    name = api.purge(copy, api.Selectors(document=("doc-3",)), reason="wrong", who="one").purge
    api.undo(copy, name, reason="it was right", who="another\n")
    lines = run("log", copy)[1].splitlines()
    assert lines[-2].endswith(f"; {name} by one: wrong")
    assert lines[-1].endswith(f"; undid {name} by another : it was right")


def test_no_purged_text_is_reported(store: Path) -> None:
    for more in ([], ["--json"]):
        assert SECRET not in run("log", store, *more)[1]


def test_a_broken_log_is_reported_as_far_as_it_goes(store: Path) -> None:
    commit_file(store, 3).unlink()
    code, out, err = run("log", store)
    assert (code, len(out.splitlines())) == (12, 1 + 3)
    assert err.startswith("error: ") and "00000003.json is missing" in err and "verify" in err
    code, out, again = run("log", store, "--json")
    reported = json.loads(out)
    assert (code, len(reported["commits"]), reported["exit_code"], again) == (12, 3, 12, err)
    assert set(reported) == {"commits", "error", "advice", "exit_code"}
    with pytest.raises(UsageError, match="--last 0"):
        api.log_entries(store, 0)


def test_a_log_that_nobody_touched_is_whole(store: Path) -> None:
    found = api.verify_log(store)
    assert (found.ok, found.problems, found.checkpoints) == (True, [], 1)
    last = Store.open(store).state
    assert (found.commits, found.head) == (last.number + 1, last.head)
    code, out, _ = run("verify", store, "--log")
    assert code == 0 and ": OK" in out and last.head in out
    assert json.loads(run("verify", store, "--log", "--json")[1])["head"] == last.head


@pytest.mark.parametrize("number", range(5))
def test_each_entry_that_was_edited_is_named(store: Path, number: int) -> None:
    forge(store, number, time="2001-01-01T00:00:00.000Z")
    problems = api.verify_log(store).problems
    assert f"commit {number} was edited" in problems[-1]
    assert len(problems) == 1 or (number == 3 and "the checkpoint of commit 3" in problems[0])
    assert not api.verify(store).ok


def test_a_parent_that_was_edited_is_named(store: Path) -> None:
    forge(store, 3, parent="0" * 64)
    first, second, _ = api.verify_log(store).problems
    assert "00000003.json is not the child" in first and "it or commit 2" in first
    assert "commit 3 was edited" in second


def test_an_entry_that_was_edited_carelessly_torn_or_taken_away_is_named(store: Path) -> None:
    path = commit_file(store, 2)
    path.write_bytes(path.read_bytes().replace(b'"time":"2', b'"time":"1'))
    torn = commit_file(store, 4)
    torn.write_bytes(torn.read_bytes()[:-20])
    commit_file(store, 6).unlink()
    found = api.verify_log(store)
    assert [path.name for path in map(Path, [p.split(":")[0].split(" ")[0] for p in found.problems[:3]])] == [
        "00000002.json", "00000004.json", "00000006.json",
    ]  # fmt: skip
    assert len(found.problems) == 3 and "missing" in found.problems[2]
    code, out, _ = run("verify", store, "--log")
    assert code == 12 and "FAILED: 3 problems" in out and out.count("problem: ") == 3


def test_entries_that_changed_places_or_were_doubled_are_named(store: Path) -> None:
    one, other = (commit_file(store, n) for n in (2, 3))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    problems = api.verify_log(store).problems
    assert "00000002.json contains commit 3" in problems[0]
    assert "00000003.json contains commit 2" in problems[1]
    other.write_bytes(one.read_bytes())
    one.write_bytes(data)
    assert api.verify_log(store).ok
    last = log.last_number(storage_at(store))
    for name in (f"{last + 1:08d}.json", "2.json", "00000002.json.bak"):
        write_stored(store, f"log/{name}", one.read_bytes())
    first, second, third = api.verify_log(store).problems
    assert "00000002.json.bak is not an entry" in first and "2.json is not an entry" in second
    assert f"{last + 1:08d}.json contains commit 2" in third


def test_an_invalid_commit_and_another_identity_are_named(store: Path) -> None:
    state = Store.open(store).state
    gone = "chunks/0123abcd01234567.parquet"
    storage = storage_at(store)
    with Run(storage) as run:
        assert log.append(storage, run.id, state.number + 1, state.head, Draft("erase", remove=(gone,)))
    assert [f"commit {state.number + 1} is invalid" in p for p in api.verify_log(store).problems] == [True]
    stored_file(store, "store.json").write_text("{}")
    assert "store.json: wrong checksum" in api.verify_log(store).problems[0]


def test_only_a_hash_that_was_kept_finds_a_log_that_was_written_again(store: Path) -> None:
    early = [entry.sha256 for entry in api.log_entries(store)]
    kept = early[-1]
    assert api.verify_log(store, kept.upper()).kept == len(early) - 1
    assert api.verify_log(store, early[2]).kept == 2
    code, out, _ = run("verify", store, "--log", "--head", early[2])
    assert code == 0 and "kept  is commit 2" in out
    remove_stored(store, "checkpoints/*")
    forge_all(store, 2, tool="another")
    assert api.verify_log(store).ok, "nothing in the store shows it"
    assert api.verify_log(store, early[1]).kept == 1, "up to there it is the same"
    code, out, _ = run("verify", store, "--log", "--head", kept)
    assert code == 12 and "rewritten or cut off" in out


def test_a_log_that_was_cut_off_is_found_by_a_kept_hash_or_a_checkpoint(store: Path) -> None:
    kept = api.verify_log(store).head
    commit_file(store, log.last_number(storage_at(store))).unlink()
    assert api.verify_log(store).ok
    assert "cut off" in api.verify_log(store, kept).problems[0]
    for number in range(3, log.last_number(storage_at(store)) + 1):
        commit_file(store, number).unlink()
    assert "commit 3 is not in the log" in api.verify_log(store).problems[0]


def test_checkpoints_must_be_the_fold(store: Path) -> None:
    forged = write_checkpoint(store, 4, totals=dict.fromkeys(COUNTS, 0))
    (problem,) = api.verify_log(store).problems
    assert forged.name in problem and "does not match the log" in problem
    moved = forged.with_name(forged.name.replace("00000004", "00000002"))
    moved.write_bytes(forged.read_bytes())
    forged.unlink()
    assert [
        f"{store / path_in_store(store, moved)} is of commit 4, not 2" in p for p in api.verify_log(store).problems
    ] == [True]
    moved.write_text("torn")
    assert api.verify_log(store).ok, "readers pass over it"


def test_a_checkpoint_with_parts_in_each_others_slots_is_found(store: Path) -> None:
    folded = Store.open(store).state
    chunks = folded.group("chunks").copy()
    (first, one), (second, other) = chunks.items()[:2]
    chunks.put(first, dataclasses.replace(other, slot=first))
    chunks.put(second, dataclasses.replace(one, slot=second))
    swapped = dataclasses.replace(folded, groups={**folded.groups, ("chunks", ""): chunks})
    path = f"checkpoints/{folded.number:08d}-{new_token('0123abcd')}.json"
    write_stored(store, path, encode_checkpoint(swapped))
    (problem,) = api.verify_log(store).problems
    assert f"the checkpoint of commit {folded.number} does not match the log" in problem


def test_a_log_rewritten_from_before_a_checkpoint_is_found(store: Path) -> None:
    forge_all(store, 1, tool="another")
    assert any("checkpoint of commit 3" in p for p in api.verify_log(store).problems)


@pytest.mark.parametrize("head", ["", "abc", "g" * 64, "0" * 63])
def test_a_head_is_64_digits(store: Path, head: str) -> None:
    code, _, err = run("verify", store, "--log", "--head", head)
    assert (code, "64 hexadecimal" in err) == (2, True)
    assert run("verify", store, "--head", "0" * 64)[0] == 2


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    opened = Store.create(tmp_path / "store", TokenizerIdentity.of("test", b"{}", 9, False), b"{}", 8)
    with Run(opened.storage) as run:
        for number in range(2 * CHECKPOINT_EVERY):
            opened.commit(run, lambda _: Draft("embed", records={"x": "y" * 1000 + str(number)}))  # noqa: B023
    next(api.log_entries(tmp_path / "store"))

    def peak() -> int:
        tracemalloc.start()
        try:
            assert sum(1 for _ in api.log_entries(tmp_path / "store")) == 2 * CHECKPOINT_EVERY
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The least: a thread that an earlier test has left allocates memory at some time or other.
    assert min(peak() for _ in range(5)) < 100_000, "of 512 kB"
    with pytest.raises(CorruptError):
        commit_file(tmp_path / "store", 1).write_bytes(b"")
        list(api.log_entries(tmp_path / "store"))
