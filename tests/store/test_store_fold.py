"""Faults at every announced step of a fold, and other folds beside it: nothing is lost, nothing committed twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_storage import is_everywhere
from staging_help import IN_ORDER, TOTALS, embedding, numbered, planned_store, staged_store, task_key, unit
from store_help import (
    announced,
    assert_whole,
    at_step,
    clean,
    contents,
    exit_code,
    files_in,
    fork,
    full_disk,
    kill_at_step,
    live_files,
    make_store,
)
from stored import copy_store

from retrotool.errors import CorruptError, ErasedError, StorageError
from retrotool.store import folding, staging
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.staging import Staged
from retrotool.store.storage import Storage
from retrotool.store.store import Store


@pytest.fixture
def staged(tmp_path: Path) -> Store:
    return staged_store(tmp_path / "store")


FOLDED_FILES = [("chunks", 4), ("documents", 4), ("embeddings", 1), ("quarantine", 1)]


def assert_folded_once(store: Store) -> None:
    """Plans, the first part, the other parts, embeddings: five commits whose files are all there, and nothing else."""
    assert store.state.number == 4
    assert numbered(store.state, Path(store.place)) == IN_ORDER
    files, records = contents(store.state)
    kinds = sorted(kind for kind, _, _ in files)
    assert [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)] == FOLDED_FILES
    assert (records["totals"], records["parts"], records["pending"]) == (TOTALS, 4, 4)
    assert files_in(Path(store.place)) == live_files(store.state)
    assert_whole(store)


def each_step(store: Store) -> Iterator[tuple[int, Store]]:
    """The disk operations that a fold of ``store`` takes, by number, and a copy of the store for each."""
    copies = (Store.open(copy_store(store, Path(store.place).with_name(f"copy-{n}"))) for n in itertools.count())
    with Run(store.storage) as run:
        steps = announced(lambda: folding.fold(next(copies), run))
    on_disk = {"link", "write", "fsync", "fsync_directory", "unlink", "touch"}
    assert set(steps) == ({"put_if_absent", "overwrite", "delete"} if is_everywhere() else on_disk)
    for number, step in enumerate(steps):
        print(f"step {number}: {step}")  # pytest shows it if a test fails
        yield number, next(copies)


def test_a_fold_commits_everything_and_a_second_one_nothing(staged: Store) -> None:
    with Run(staged.storage) as run:
        assert len(folding.fold(staged, run).committed) == 4
        again = folding.fold(staged, run)
        assert (again.committed, again.refused) == (frozenset(), {})
    assert_folded_once(staged)


def test_a_fold_killed_at_any_step_is_finished_by_the_next(staged: Store) -> None:
    for step, store in each_step(staged):
        kill_at_step(step, Path(store.place), lambda run, root=Path(store.place): folding.fold(Store.open(root), run))
        with Run(store.storage) as run:
            clean(store)
            assert folding.fold(store, run).refused == {}
        assert_folded_once(store)


def test_a_fold_that_fails_at_any_step_is_finished_by_the_next(staged: Store) -> None:
    for step, store in each_step(staged):
        with Run(store.storage) as run, at_step(step, full_disk), pytest.raises(StorageError):
            folding.fold(store, run)
        with Run(store.storage) as run:
            clean(store)
            assert folding.fold(store, run).refused == {}
        assert_folded_once(store)


def test_another_process_may_fold_at_any_step(staged: Store) -> None:
    for step, store in each_step(staged):
        other = Store.open(store.place)
        with (
            Run(store.storage) as run,
            Run(store.storage) as rival,
            at_step(step, lambda other=other, rival=rival: folding.fold(other, rival)),
        ):
            assert folding.fold(store, run).refused == {}
        clean(store)
        assert contents(store.refresh()) == contents(other.refresh())
        assert_folded_once(store)


def test_many_processes_fold_at_once(staged: Store) -> None:
    def work() -> None:
        own = Store.open(staged.place)
        with Run(staged.storage) as run:
            assert folding.fold(own, run).refused == {}

    children = [fork(work) for _ in range(8)]
    assert [exit_code(child) for child in children] == [0] * 8
    staged.refresh()
    clean(staged)
    assert_folded_once(staged)


def test_a_unit_whose_files_another_process_takes_away_meanwhile_is_left_to_the_next_fold(
    staged: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the other has folded it, and an erase took it: its files go between being looked up and being read."""

    def taken_away(*_: object) -> bool:
        raise ErasedError("a file was replaced or erased after this reader opened the store")

    with Run(staged.storage) as run:
        with monkeypatch.context() as patch:
            patch.setattr(folding, "_brings_back", taken_away)
            refused = folding.fold(staged, run).refused
            assert not {task_key(name) for name in ("a1", "a2", "b0")} & refused.keys()
        folding.fold(staged, run)
    staged.refresh()
    assert numbered(staged.state, Path(staged.place)) == IN_ORDER
    assert_whole(staged)


def test_a_fold_that_another_has_overtaken_removes_no_live_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the entry of a task, and finds a file missing that a later commit of the other has removed."""
    store = planned_store(tmp_path / "store")
    other, is_whole, acted = Store.open(store.place), folding.is_whole, list[None]()

    def overtaken(storage: Storage, task: Staged) -> bool:
        if not acted and task.task == task_key("a1"):
            acted.append(None)
            with Run(other.storage) as run:
                folding.fold(other, run)
                (entry,) = other.state.group("quarantine").entries()
                other.commit(run, lambda _: Draft("test", remove=(entry.path,)))
        return is_whole(storage, task)

    with Run(store.storage) as run:
        for index in (0, 1):
            staging.stage(store.storage, unit(tmp_path / "store", run.id, "a", index))
            if index:
                monkeypatch.setattr(folding, "is_whole", overtaken)
            folding.fold(store, run)
    assert acted
    assert numbered(store.refresh(), tmp_path / "store") == IN_ORDER[:3]
    assert_whole(store)


def test_a_unit_with_a_damaged_file_is_done_again(staged: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> bool:
        raise CorruptError("a page of its documents is damaged")

    with Run(staged.storage) as run:
        monkeypatch.setattr(folding, "_brings_back", damaged)
        refused = folding.fold(staged, run).refused
    assert refused == {task_key("a1"): "a page of its documents is damaged"}


def test_what_waits_for_its_turn_is_not_looked_at(staged: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, is_whole = list[str](), folding.is_whole
    monkeypatch.setattr(folding, "is_whole", lambda _, task: asked.append(task.task) or is_whole(_, task))
    staged.storage.delete([staging.staged_path(task_key("a1"))])
    with Run(staged.storage) as run:
        folding.fold(staged, run)
    units = {task_key(name) for name in ("a1", "a2", "b0")}
    assert not units.intersection(asked)


def test_what_a_task_costs_does_not_depend_on_how_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands may wait, if the process that commits was killed."""
    store, count = make_store(tmp_path / "store"), 40
    asked = list[FileEntry]()
    place = vars(FileEntry)["place"].fget

    def counted(entry: FileEntry) -> tuple[str, str, str]:
        asked.append(entry)
        return place(entry)

    with Run(store.storage) as run:
        for number in range(count):
            staging.stage(store.storage, embedding(store.storage, run.id, number, ()))
        with monkeypatch.context() as patch:
            patch.setattr(FileEntry, "place", property(counted))
            assert len(folding.fold(store, run).committed) == count
    assert count <= len(asked) < 10 * count
