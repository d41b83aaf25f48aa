"""Clean-up takes what dead runs left, and nothing that is anybody's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from staging_help import IN_ORDER, embedding, numbered, planned_store, unit
from store_help import (
    assert_whole,
    clean,
    commit,
    files_in,
    lease_file,
    live_files,
    make_store,
    move_elsewhere,
    write,
)
from stored import age_stored, contents_of, leave_unfinished, stored_file, write_stored

from retrotool.errors import LostRunError
from retrotool.store import folding, gc, leases, log, staging
from retrotool.store.leases import DEAD_SECONDS, Run
from retrotool.store.local_storage import TEMPORARY
from retrotool.store.log import FileEntry
from retrotool.store.paths import DATA_KINDS, NAMED_KINDS, FileName
from retrotool.store.staging import Staged
from retrotool.store.store import FENCE, Store
from retrotool.store.vectors import write_vectors

DEAD = "dead0123"
TASK = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def leave_everywhere(root: Path, run: str) -> tuple[set[str], set[str]]:
    """Files of a run in every folder: whole ones that no commit names, and unfinished ones."""
    whole, unfinished = set(), set()
    for kind in DATA_KINDS:
        entry = write(root, run, kind, "000000", name="name" if kind in NAMED_KINDS else "")
        whole.add(entry.path)
        unfinished.add(leave_unfinished(root, entry.path.rpartition("/")[0] + "/", run))
    for number, folder in enumerate(("staging/", "leases/", "log/", "checkpoints/", "")):
        unfinished.add(leave_unfinished(root, folder, run, number))
    claim = f"leases/{'0' * 32}-00000000"
    write_stored(root, claim, json.dumps({"run": run}).encode())
    whole.add(claim)
    return whole, unfinished


def test_what_a_dead_run_left_is_removed_everywhere(store: Store) -> None:
    whole, unfinished = leave_everywhere(Path(store.place), DEAD)
    assert files_in(Path(store.place)) == whole | unfinished
    assert clean(store) == len(whole)
    assert files_in(Path(store.place)) == set()
    assert store.state.number == -1, "it was over: nothing has to be said of it"


def test_what_a_living_run_writes_is_kept(store: Store) -> None:
    with Run(store.storage) as run:
        leave_everywhere(Path(store.place), DEAD)
        whole, unfinished = leave_everywhere(Path(store.place), run.id)
        clean(store)
        assert files_in(Path(store.place)) == {*whole, *unfinished, leases.run_path(run.id)}
    clean(store)
    assert files_in(Path(store.place)) == set()


A_RUN_THAT_IS_KILLED = """
import os, signal, sys
from retrotool.store.leases import Run
from retrotool.store.paths import FileName
from retrotool.store.store import Store

def write(sink):
    sink.write(b"whole")
    return 1

def die(sink):
    sink.write(b"half")
    sink.sync()
    os.kill(os.getpid(), signal.SIGKILL)

store = Store.open(sys.argv[1])
with Run(store.storage) as run:
    store.write(FileName.new(run.id, "chunks", "000000", "parquet"), write)
    store.write(FileName.new(run.id, "chunks", "000001", "parquet"), die)
"""


def test_what_a_killed_process_left_is_removed_with_its_run(store: Store) -> None:
    ended = subprocess.run([sys.executable, "-c", A_RUN_THAT_IS_KILLED, store.place])
    assert ended.returncode < 0
    assert len(files_in(Path(store.place))) == 3, "a file, an unfinished one and the lease"
    assert [one.size for one in store.storage.unfinished()] == [4]
    assert clean(store) == 2
    assert files_in(Path(store.place)) == set()


def test_committed_files_are_kept_when_their_run_is_dead(store: Store) -> None:
    with Run(store.storage) as run:
        commit(store, run, *(write(Path(store.place), DEAD, "chunks", f"{part:06d}") for part in range(3)))
    assert clean(store) == 0
    assert files_in(Path(store.place)) == live_files(store.state)
    assert_whole(store)


def test_a_commit_that_the_store_object_has_not_seen_counts(store: Store) -> None:
    other = Store.open(store.place)
    with Run(store.storage) as run:
        commit(other, run, write(Path(store.place), DEAD, "chunks", "000000"))
    clean(store)
    assert_whole(other)


def test_staged_files_are_kept_when_their_run_is_dead(store: Store) -> None:
    entry = write(Path(store.place), DEAD, "embeddings", "000000", name="tiny")
    with Run(store.storage, DEAD):
        staging.stage(store.storage, Staged("embed", add=(entry,), task=TASK, run=DEAD))
    assert clean(store) == 0
    assert files_in(Path(store.place)) == {entry.path, f"staging/{TASK}.json"}
    with Run(store.storage) as run:
        assert folding.fold(store, run).committed == {TASK}
    assert_whole(store)


def test_sums_stay_and_go_with_their_files(store: Store) -> None:
    def vectors(part: int) -> FileEntry:
        name = FileName.new(DEAD, "embeddings", f"{part:06d}", "npy", "tiny")
        return write_vectors(store, name, np.ones((3, 4), np.float16))

    with Run(store.storage, DEAD) as run:
        committed, staged, lost, erased = map(vectors, range(4))
        commit(store, run, committed, erased)
        staging.stage(store.storage, Staged("embed", add=(staged,), task=TASK, run=DEAD))
        sums = stored_file(store, f"{erased.path}.xxh3").read_bytes()
        commit(store, run, remove=(erased.path,))
        assert not stored_file(store, f"{erased.path}.xxh3").exists()
        stored_file(store, f"{erased.path}.xxh3").write_bytes(sums)
        assert clean(store, thorough=True) == 1
        assert not stored_file(store, f"{erased.path}.xxh3").exists()
    assert clean(store) == 2
    kept = {path for one in (committed, staged) for path in (one.path, f"{one.path}.xxh3")}
    assert files_in(Path(store.place)) == {*kept, f"staging/{TASK}.json"}
    assert not stored_file(store, lost.path).exists()


def removed_but_not_unlinked(store: Store, run: Run) -> str:
    """A file that a commit added and another removed, as if that one had been killed before it unlinked it."""
    entry = write(Path(store.place), run.id, "chunks", "000000", b"to be erased")
    commit(store, run, entry)
    commit(store, run, write(Path(store.place), run.id, "chunks", "000000", b"erased"), remove=(entry.path,))
    path = stored_file(store, entry.path)
    assert not path.exists()
    path.write_bytes(b"to be erased")
    return entry.path


def test_a_removed_file_that_was_not_unlinked_is_removed_while_its_writer_lives(store: Store) -> None:
    with Run(store.storage) as run:
        gone = removed_but_not_unlinked(store, run)
        fresh = write(Path(store.place), run.id, "chunks", "000001")
        assert clean(store, thorough=True) == 1
        assert files_in(Path(store.place)) == {*live_files(store.state), fresh.path, leases.run_path(run.id)}
        assert gone not in files_in(Path(store.place))
    assert_whole(store)


def test_a_removed_file_that_was_not_unlinked_is_removed_when_its_writer_is_dead(store: Store) -> None:
    with Run(store.storage) as run:
        removed_but_not_unlinked(store, run)
    assert clean(store) == 1
    assert files_in(Path(store.place)) == live_files(store.state)


def test_what_is_not_the_stores_is_kept(store: Store) -> None:
    strange = [
        "notes.txt",
        "chunks/notes.txt",
        "chunks/.hidden",
        "staging/README",
        "leases/README",
        "leases/run-1",
        "elsewhere/000000-dead012300000000.bin",
    ]
    for path in strange:
        write_stored(store, path, b"a person's")
    assert clean(store) == 0
    assert files_in(Path(store.place)) == set(strange)


def test_checkpoints_and_the_log_are_kept(store: Store) -> None:
    with Run(store.storage, DEAD) as run:
        for number in range(3):
            commit(store, run, records={"n": number})
    before = contents_of(store)
    assert clean(store) == 0
    assert contents_of(store) == before


def test_cleaning_twice_finds_nothing_the_second_time(store: Store) -> None:
    leave_everywhere(Path(store.place), DEAD)
    assert clean(store) > 0
    assert clean(store) == 0


def fences(store: Store) -> dict[str, list[str]]:
    """The runs that are fenced, and the tasks that each had staged by then."""
    return {run: fence["staged"] for run, fence in store.refresh().with_prefix(FENCE).items()}


@pytest.mark.parametrize("silent", [0.0, leases.SILENCE_SECONDS + 60, DEAD_SECONDS - 60])
def test_of_a_run_of_another_machine_nothing_is_removed_for_a_day(store: Store, silent: float) -> None:
    whole, unfinished = leave_everywhere(Path(store.place), DEAD)
    move_elsewhere(Path(store.place), DEAD, silent)
    for thorough in (False, True):
        assert clean(store, thorough=thorough) == 0
    assert files_in(Path(store.place)) == {*whole, *unfinished, leases.run_path(DEAD)}
    assert fences(store) == {} and store.state.number == -1


def test_a_run_of_another_machine_that_was_silent_for_a_day_is_fenced_and_cleaned_away(store: Store) -> None:
    whole, _ = leave_everywhere(Path(store.place), DEAD)
    move_elsewhere(Path(store.place), DEAD, DEAD_SECONDS + 60)
    assert clean(store) == len(whole) + 1
    assert files_in(Path(store.place)) == set()
    assert fences(store) == {DEAD: []}
    fence = log.read(store.storage, 0)
    assert (fence.kind, fence.settings, fence.records[FENCE + DEAD]["commit"]) == ("clean", {"runs": [DEAD]}, 0)
    assert (fence.add, fence.remove) == ((), ())
    assert clean(store) == 0
    assert store.refresh().number == 0


def test_what_a_run_left_whose_lease_has_lapsed_is_removed_after_a_fence_only(store: Store) -> None:
    """It knows that it is lost; but one of its processes may not have looked yet."""
    with Run(store.storage, DEAD):
        entry = write(Path(store.place), DEAD, "chunks", "000000")
        move_elsewhere(Path(store.place), DEAD, leases.LAPSED_SECONDS + 60)
        with pytest.raises(LostRunError):
            leases.renew(store.storage, DEAD)
        assert clean(store) == 0
        assert stored_file(store, entry.path).exists()
        age_stored(lease_file(Path(store.place), DEAD), DEAD_SECONDS + 60)
        assert clean(store) == 2
        assert fences(store) == {DEAD: []}
        assert not stored_file(store, entry.path).exists()


def test_the_day_is_measured_by_the_clock_of_the_storage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time
    leave_everywhere(Path(store.place), DEAD)
    move_elsewhere(Path(store.place), DEAD)
    monkeypatch.setattr(time, "time", lambda: clock() + 2 * DEAD_SECONDS)
    assert clean(store) == 0
    assert fences(store) == {}


def test_a_lease_that_can_not_be_read_counts_for_a_day(store: Store) -> None:
    entry = write(Path(store.place), DEAD, "chunks", "000000")
    lease = write_stored(store, leases.run_path(DEAD), b"{")
    assert clean(store) == 0
    age_stored(lease, DEAD_SECONDS + 60)
    assert clean(store) == 2
    assert not stored_file(store, entry.path).exists()
    assert fences(store) == {DEAD: []}


def test_several_runs_are_fenced_by_one_commit_and_each_once(store: Store) -> None:
    runs = [f"dead000{n}" for n in range(3)]
    for run in runs[:2]:
        move_elsewhere(Path(store.place), run, DEAD_SECONDS + 60)
    clean(store)
    assert (fences(store), store.state.number) == ({run: [] for run in runs[:2]}, 0)
    for run in runs:  # two of them have risen: their leases are there again
        move_elsewhere(Path(store.place), run, DEAD_SECONDS + 60)
    assert clean(store) == 3
    assert (fences(store), store.state.number) == ({run: [] for run in runs}, 1)
    assert log.read(store.storage, 1).settings == {"runs": runs[2:]}


def test_the_oldest_fences_are_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "_FENCES", 3)
    for n in (5, 1, 3, 2, 4):
        move_elsewhere(Path(store.place), f"dead000{n}", DEAD_SECONDS + 60)
        clean(store)
    assert sorted(fences(store)) == ["dead0002", "dead0003", "dead0004"]


def test_a_fenced_run_that_wakes_commits_nothing(store: Store) -> None:
    with pytest.raises(LostRunError, match="took this run for dead"), Run(store.storage, DEAD) as run:
        entry = write(Path(store.place), DEAD, "chunks", "000000")
        move_elsewhere(Path(store.place), DEAD, DEAD_SECONDS + 60)
        clean(Store.open(store.place))
        # As if its heart had begun to beat again in the middle of that.
        move_elsewhere(Path(store.place), DEAD)
        built: list[int] = []
        stored_file(store, entry.path).write_bytes(b"data")
        store.commit(run, lambda state: built.append(state.number))
    assert built == []
    assert list(store.refresh().files()) == []


def test_what_a_fenced_run_stages_is_dropped_and_what_it_had_staged_is_folded(tmp_path: Path) -> None:
    """However late its tasks come: its files may have been removed before, or may be at any moment."""
    store = planned_store(tmp_path / "store")
    root = Path(store.place)
    with Run(store.storage, DEAD):
        before = [unit(root, DEAD, "a", 0), embedding(root, DEAD, 7, ())]
        for task in before:
            assert staging.stage(store.storage, task)
        unstaged = unit(root, DEAD, "a", 1)
        move_elsewhere(root, DEAD, DEAD_SECONDS + 60)
        assert clean(Store.open(root)) == len(unstaged.files()) + 1
        assert fences(store) == {DEAD: sorted(task.task for task in before)}
        move_elsewhere(root, DEAD)
        late = [unit(root, DEAD, "a", 1), embedding(root, DEAD, 8, ())]
        for task in late:
            assert staging.stage(store.storage, task), "its lease is there again"
        with Run(store.storage) as run:
            folded = folding.fold(store, run)
            assert folded.committed == {task.task for task in before}
            assert folded.refused == {task.task: "its files are missing" for task in late}
            assert files_in(root) == {*live_files(store.state), leases.run_path(DEAD), leases.run_path(run.id)}
            for name, index in (("a", 1), ("a", 2), ("b", 0)):
                assert staging.stage(store.storage, unit(root, run.id, name, index)), "it can be done again"
            folding.fold(store, run)
    assert numbered(store.state, root) == IN_ORDER
    assert_whole(store)


def test_what_was_committed_is_not_dropped_with_the_tasks_of_a_fenced_run(tmp_path: Path) -> None:
    """A fold that is killed before it takes the entries away leaves tasks that are committed."""
    store = planned_store(tmp_path / "store")
    root = Path(store.place)
    with Run(store.storage, DEAD), Run(store.storage) as run:
        task = embedding(root, DEAD, 0, ())
        staging.stage(store.storage, task)
        entry = stored_file(root, f"staging/{task.task}.json").read_bytes()
        folding.fold(store, run)
        move_elsewhere(root, DEAD, DEAD_SECONDS + 60)
        clean(Store.open(root))
        stored_file(root, f"staging/{task.task}.json").write_bytes(entry)
        assert folding.fold(store, run).committed == {task.task}
    assert_whole(store)


def test_a_run_that_is_fenced_while_its_commit_is_being_built_builds_no_other(store: Store) -> None:
    """The fence takes the number of the log that the commit was to have; on the next one it is refused."""
    built: list[int] = []
    with pytest.raises(LostRunError, match="took this run for dead"), Run(store.storage, DEAD) as run:
        entry = write(Path(store.place), DEAD, "chunks", "000000")

        def build(state: object) -> log.Draft:
            built.append(store.state.number)
            move_elsewhere(Path(store.place), DEAD, DEAD_SECONDS + 60)
            clean(Store.open(store.place))
            move_elsewhere(Path(store.place), DEAD)
            stored_file(store, entry.path).write_bytes(b"data")
            return log.Draft("test", add=(dataclasses.replace(entry, slot="000000"),))

        store.commit(run, build)
    assert built == [-1]
    assert list(store.refresh().files()) == []


def test_clean_up_says_nothing_and_removes_nothing_if_its_own_run_is_lost(store: Store) -> None:
    whole, unfinished = leave_everywhere(Path(store.place), DEAD)
    with pytest.raises(LostRunError), Run(store.storage) as run:
        lease_file(Path(store.place), run.id).unlink()
        gc.clean(store, run)
    assert files_in(Path(store.place)) == whole | unfinished


def test_the_files_of_a_dead_fold_that_are_staged_stay(store: Store) -> None:
    """What units wrote has its final names before a commit numbers it."""
    staged = tuple(write(Path(store.place), DEAD, kind, "", b"tokens") for kind in ("documents", "chunks"))
    lost = write(Path(store.place), DEAD, "chunks", "", b"tokens")
    counts = dict.fromkeys(staging.COUNTS, 0)
    task = Staged("chunk", unit=staging.Unit("plan", 0, (staged,), None, counts), task=TASK, run=DEAD)
    with Run(store.storage, DEAD):
        staging.stage(store.storage, task)
    assert clean(store) == 1
    assert files_in(Path(store.place)) == {*(one.path for one in staged), f"staging/{TASK}.json"}
    assert not stored_file(store, lost.path).exists()
    assert all(stored_file(store, one.path).read_bytes() == b"tokens" for one in staged)


def test_a_staged_task_that_can_not_be_read_is_removed_and_its_files_of_a_dead_run(store: Store) -> None:
    entry = write(Path(store.place), DEAD, "embeddings", "000000", name="tiny")
    write_stored(store, f"staging/{TASK}.json", b'{"kind":')
    assert clean(store) == 1
    assert files_in(Path(store.place)) == set()
    assert not stored_file(store, entry.path).exists()


@pytest.mark.on_disk
def test_a_symbolic_link_is_neither_followed_nor_removed(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"a person's")
    name = FileName.new(DEAD, "chunks", "", "parquet").path
    links = [name, f"chunks/{TEMPORARY}{DEAD}00001234", "scans"]
    (Path(store.place) / "chunks").mkdir()
    for link in links:
        (Path(store.place) / link).symlink_to(outside if link == "scans" else outside / "file")
    assert clean(store, thorough=True) == 0
    assert all((Path(store.place) / link).is_symlink() for link in links)
    assert (outside / "file").read_bytes() == b"a person's"
