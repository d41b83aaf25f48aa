"""Clean-up takes what dead runs left, and nothing that is anybody's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from store_help import assert_whole, clean, commit, files_in, live_files, make_store, write

from retrotool.store import atomic, folding, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import DATA_KINDS, NAMED_KINDS, FileName
from retrotool.store.runs import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store

DEAD = "dead0123"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def leave_everywhere(root: Path, run: str) -> set[str]:
    """Files of a run in every folder: whole ones that no commit names, and temporary ones."""
    left = set()
    for kind in (*DATA_KINDS, "staging"):
        entry = write(root, run, kind, "000000", name="name" if kind in NAMED_KINDS else "")
        temporary = (root / entry.path).parent / f"{atomic.TEMPORARY}{run}00001234"
        temporary.write_bytes(b"half")
        left |= {entry.path, temporary.relative_to(root).as_posix()}
    for folder in ("log", "checkpoints", "."):
        (root / folder).mkdir(exist_ok=True)
        temporary = root / folder / f"{atomic.TEMPORARY}{run}00001234"
        temporary.write_bytes(b"half")
        left.add(temporary.relative_to(root).as_posix())
    return left


def test_what_a_dead_run_left_is_removed_everywhere(store: Store) -> None:
    left = leave_everywhere(store.root, DEAD)
    assert files_in(store.root) == left
    assert clean(store) == len(left)
    assert files_in(store.root) == set()


def test_what_a_living_run_writes_is_kept(store: Store) -> None:
    with Run(store.root) as run:
        mine = leave_everywhere(store.root, run.id)
        leave_everywhere(store.root, DEAD)
        clean(store)
        assert files_in(store.root) == {*mine, f"staging/run-{run.id}.json"}
    clean(store)
    assert files_in(store.root) == set()


A_RUN_THAT_IS_KILLED = """
import os, signal, sys
from pathlib import Path
from retrotool.store import atomic
from retrotool.store.paths import FileName
from retrotool.store.runs import Run

def write(path):
    path.write_bytes(b"whole")
    return 1

def die(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
with Run(root) as run:
    atomic.write_file(root, FileName.new(run.id, "chunks", "000000", "parquet"), write)
    atomic.write_file(root, FileName.new(run.id, "chunks", "000001", "parquet"), die)
"""


def test_what_a_killed_process_left_is_removed_with_its_run(store: Store) -> None:
    ended = subprocess.run([sys.executable, "-c", A_RUN_THAT_IS_KILLED, str(store.root)])
    assert ended.returncode < 0
    assert len(files_in(store.root)) == 3, "a file, a temporary one and the run"
    assert clean(store) == 3
    assert files_in(store.root) == set()


def test_committed_files_are_kept_when_their_run_is_dead(store: Store) -> None:
    with Run(store.root) as run:
        commit(store, run, *(write(store.root, DEAD, "chunks", f"{part:06d}") for part in range(3)))
    assert clean(store) == 0
    assert files_in(store.root) == live_files(store.state)
    assert_whole(store)


def test_a_commit_that_the_store_object_has_not_seen_counts(store: Store) -> None:
    other = Store.open(store.root)
    with Run(store.root) as run:
        commit(other, run, write(store.root, DEAD, "chunks", "000000"))
    clean(store)
    assert_whole(other)


def test_staged_files_are_kept_when_their_run_is_dead(store: Store) -> None:
    entry = write(store.root, DEAD, "embeddings", "000000", name="tiny")
    with Run(store.root, DEAD):
        staging.stage(store.root, Staged("task", "embed", DEAD, add=(entry,)))
    assert clean(store) == 0
    assert files_in(store.root) == {entry.path, "staging/task.json"}
    with Run(store.root) as run:
        assert folding.fold(store, run).committed == {"task"}
    assert_whole(store)


def removed_but_not_unlinked(store: Store, run: Run) -> str:
    """A file that a commit added and another removed, as if that one had been killed before it unlinked it."""
    entry = write(store.root, run.id, "chunks", "000000", b"to be erased")
    commit(store, run, entry)
    commit(store, run, write(store.root, run.id, "chunks", "000000", b"erased"), remove=(entry.path,))
    path = store.root / entry.path
    assert not path.exists()
    path.write_bytes(b"to be erased")
    return entry.path


def test_a_removed_file_that_was_not_unlinked_is_removed_while_its_writer_lives(store: Store) -> None:
    with Run(store.root) as run:
        gone = removed_but_not_unlinked(store, run)
        fresh = write(store.root, run.id, "chunks", "000001")
        assert clean(store, thorough=True) == 1
        assert files_in(store.root) == {*live_files(store.state), fresh.path, f"staging/run-{run.id}.json"}
        assert gone not in files_in(store.root)
    assert_whole(store)


def test_a_removed_file_that_was_not_unlinked_is_removed_when_its_writer_is_dead(store: Store) -> None:
    with Run(store.root) as run:
        removed_but_not_unlinked(store, run)
    assert clean(store) == 1
    assert files_in(store.root) == live_files(store.state)


def test_what_is_not_the_stores_is_kept(store: Store) -> None:
    strange = [
        "notes.txt",
        "chunks/notes.txt",
        "chunks/.hidden",
        "staging/README",
        "elsewhere/000000-dead012300000000.bin",
    ]
    for path in strange:
        (store.root / path).parent.mkdir(exist_ok=True)
        (store.root / path).write_bytes(b"a person's")
    assert clean(store) == 0
    assert files_in(store.root) == set(strange)


def test_checkpoints_and_the_log_are_kept(store: Store) -> None:
    with Run(store.root, DEAD) as run:
        for number in range(3):
            commit(store, run, records={"n": number})
    before = sorted(store.root.rglob("*"))
    assert clean(store) == 0
    assert sorted(store.root.rglob("*")) == before


def test_cleaning_twice_finds_nothing_the_second_time(store: Store) -> None:
    leave_everywhere(store.root, DEAD)
    assert clean(store) > 0
    assert clean(store) == 0


def test_links_of_a_fold_that_died_go_and_the_staged_files_stay(store: Store) -> None:
    staged = write(store.root, DEAD, "staging", "task.0000.chunks", b"tokens")
    unit = staging.Unit("plan", 0, ((staged,) * 3,), None, dict.fromkeys(staging.COUNTS, 0))
    with Run(store.root, DEAD):
        staging.stage(store.root, Staged("task", "chunk", DEAD, unit=unit))
    final = FileEntry(FileName.new(DEAD, "chunks", "000000", "bin").path, 1, 6, staged.sha256)
    (store.root / "chunks").mkdir()
    (store.root / final.path).hardlink_to(store.root / staged.path)
    assert clean(store) == 1
    assert files_in(store.root) == {staged.path, "staging/task.json"}
    assert (store.root / staged.path).read_bytes() == b"tokens"
