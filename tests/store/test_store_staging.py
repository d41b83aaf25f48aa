"""Folding: finished tasks become commits, once each and in order, whichever process folds."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from staging_help import (
    IN_ORDER,
    PARTS,
    TOTALS,
    embedding,
    encoder,
    numbered,
    planned_store,
    staged_store,
    task_key,
    unit,
)
from store_help import (
    assert_whole,
    commit,
    contents,
    files_in,
    live_files,
)
from stored import stored_file

from retrotool.store import folding, staging
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store

RUN = "0123abcd"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return planned_store(tmp_path / "store")


@pytest.fixture
def staged(tmp_path: Path) -> Store:
    return staged_store(tmp_path / "store")


@given(st.permutations(sorted(PARTS)), st.sets(st.integers(0, 3)))
def test_parts_are_numbered_in_the_order_of_the_plans(
    tmp_path_factory: pytest.TempPathFactory, order: list[tuple[str, int]], folds: set[int]
) -> None:
    store = planned_store(tmp_path_factory.mktemp("order") / "store")
    with Run(store.storage) as run:
        for place, (name, index) in enumerate(order):
            staging.stage(store.storage, unit(Path(store.place), run.id, name, index))
            if place in folds:
                folding.fold(store, run)
                arrived = set(order[: place + 1])
                ready = list(itertools.takewhile(arrived.__contains__, PARTS))
                assert len(store.state.all_parts()) == sum(PARTS[unit] for unit in ready)
        folding.fold(store, run)
        assert numbered(store.state, Path(store.place)) == IN_ORDER
        assert (store.state.records["parts"], store.state.records["pending"]) == (4, 4)
        assert store.state.records["totals"] == TOTALS
        progress = {name: store.state.records[f"plan:{name}"] for name in "ab"}
        assert [(p["done"], p["parts"], p["chunks"]) for p in progress.values()] == [(3, 3, 33), (1, 1, 10)]
    assert files_in(Path(store.place)) == live_files(store.state)
    assert_whole(store)


def test_units_wait_for_those_before_them(store: Store) -> None:
    with Run(store.storage) as run:
        for name, index in (("b", 0), ("a", 2), ("a", 1)):
            staging.stage(store.storage, unit(Path(store.place), run.id, name, index))
            assert folding.fold(store, run).committed == frozenset()
        assert store.state.all_parts() == []
        assert len(staging.read_staged(store.storage)) == 3
        staging.stage(store.storage, unit(Path(store.place), run.id, "a", 0))
        assert folding.fold(store, run).committed == {task_key(name) for name in ("a0", "a1", "a2", "b0")}
    assert numbered(store.state, Path(store.place)) == IN_ORDER


def test_a_task_is_staged_once(store: Store) -> None:
    with Run(store.storage) as run:
        first, second = (unit(Path(store.place), run.id, "a", 0) for _ in range(2))
        assert not staging.is_staged(store.storage, first.task)
        assert staging.stage(store.storage, first)
        assert staging.is_staged(store.storage, first.task)
        assert not staging.stage(store.storage, second)
        assert staging.read_staged(store.storage) == {first.task: first}
        kept = {path for path in files_in(Path(store.place)) if not path.startswith(("staging/", "leases/"))}
        assert kept == set(first.files()), "what the second one wrote is removed"


def test_a_task_staged_over_nfs_keeps_its_files_when_the_answer_is_lost(
    staged: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Path.hardlink_to

    def lost_answer(target: Path, source: Path) -> None:
        link(target, source)
        raise FileExistsError(17, "File exists")

    with Run(staged.storage) as run:
        folding.fold(staged, run)
        read = staged.state.part_file("chunks", 1).path
        task = embedding(Path(staged.place), run.id, 1, (read,))
        monkeypatch.setattr(Path, "hardlink_to", lost_answer)
        staging.stage(staged.storage, task)
        monkeypatch.undo()
        assert folding.fold(staged, run).committed == {task.task}
    assert_whole(staged)


def refuse(store: Store, *tasks: Staged) -> dict[str, str]:
    """Fold tasks, some of which are refused; what these wrote, and no more, must be gone."""
    with Run(store.storage, RUN) as run:
        for task in tasks:
            assert staging.stage(store.storage, task)
        folded = folding.fold(store, run)
    assert folded.committed.isdisjoint(folded.refused)
    assert folded.committed | folded.refused.keys() == {task.task for task in tasks}
    assert files_in(Path(store.place)) == live_files(store.state)
    assert_whole(store)
    return dict(folded.refused)


@pytest.fixture
def chunked(staged: Store) -> tuple[Store, str]:
    """A store with four parts, of which only part 0 is embedded; and the path of the chunks of part 1."""
    with Run(staged.storage) as run:
        folding.fold(staged, run)
    return staged, staged.state.part_file("chunks", 1).path


def test_a_task_whose_input_has_left_is_refused_and_its_files_are_removed(chunked: tuple[Store, str]) -> None:
    store, read = chunked
    good = embedding(Path(store.place), RUN, 1, (read,))
    late = embedding(Path(store.place), RUN, 2, ("chunks/0123456789abcdef.bin",))
    assert refuse(store, good, late) == {late.task: "chunks/0123456789abcdef.bin was replaced or removed"}
    assert sorted(store.state.group("embeddings", "tiny")) == ["000000", "000001"]


def test_a_task_whose_place_is_taken_is_refused_and_its_files_are_removed(chunked: tuple[Store, str]) -> None:
    store, _ = chunked
    late = embedding(Path(store.place), RUN, 0, ())
    before = contents(store.state)
    assert "is taken" in refuse(store, late)[late.task]
    assert contents(store.state) == before


def piece(store: Store, run: str, read: str, first: int, last: int) -> Staged:
    """Rows of part 1, of which the embeddings are not whole yet."""
    whole = embedding(Path(store.place), run, 1, (read,))
    return dataclasses.replace(whole, task=task_key(f"rows {first} to {last}"), piece=(first, last))


def test_a_piece_of_a_task_is_kept_until_the_task_is_done(chunked: tuple[Store, str]) -> None:
    store, read = chunked
    with Run(store.storage) as run:
        pieces = [piece(store, run.id, read, 0, 4), piece(store, run.id, read, 5, 9)]
        for one in pieces:
            assert staging.stage(store.storage, one)
        assert folding.fold(store, run) == folding.Folded(frozenset(), {})
        assert staging.read_staged(store.storage) == {one.task: one for one in pieces}
    assert sorted(store.state.group("embeddings", "tiny")) == ["000000"], "no reader sees a part that is not whole"
    with folding.writing(store) as run:
        assert set(staging.read_staged(store.storage)) == {one.task for one in pieces}, "kept when their run has ended"
        whole = embedding(Path(store.place), run.id, 1, (read,))
        staging.stage(store.storage, whole)
        folding.fold(store, run)
        folding.fold(store, run)
    assert store.state.file("embeddings", "000001", "tiny") == whole.add[0]
    assert files_in(Path(store.place)) == live_files(store.state)


def test_a_piece_of_a_task_whose_input_was_erased_is_dropped(chunked: tuple[Store, str]) -> None:
    store, _ = chunked
    late = piece(store, RUN, "chunks/0123456789abcdef.bin", 0, 4)
    assert refuse(store, late) == {late.task: "chunks/0123456789abcdef.bin was replaced or removed"}


def test_of_two_tasks_for_one_place_one_is_refused(chunked: tuple[Store, str]) -> None:
    store, read = chunked
    one, other = embedding(Path(store.place), RUN, 1, (read,)), embedding(Path(store.place), RUN, 1, (read,))
    (reason,) = refuse(store, one, dataclasses.replace(other, task=task_key("again"))).values()
    assert "is taken" in reason


def test_a_task_made_with_other_settings_than_those_committed_is_refused(chunked: tuple[Store, str]) -> None:
    store, read = chunked
    other = embedding(Path(store.place), RUN, 1, (read,), about="another encoder")
    assert refuse(store, other) == {other.task: "another process committed encoder:tiny with other settings"}
    assert store.state.records["encoder:tiny"] == encoder("one")


def test_of_two_tasks_made_with_different_settings_one_is_refused(store: Store) -> None:
    one, other = (embedding(Path(store.place), RUN, part, (), about=f"encoder {part}") for part in range(2))
    first, second = sorted((one, other), key=lambda task: task.task)
    refused = refuse(store, one, other)
    assert refused == {second.task: "another process committed encoder:tiny with other settings"}
    assert list(store.state.group("embeddings", "tiny")) == [first.add[0].slot]


def test_a_unit_whose_plan_is_gone_is_refused_and_its_files_are_removed(store: Store) -> None:
    with Run(store.storage) as run:
        commit(store, run, records={"plan:b": None})
    task = unit(Path(store.place), RUN, "b", 0)
    assert refuse(store, task) == {task.task: "its plan was removed"}


def test_a_unit_that_was_done_again_is_not_committed_again(chunked: tuple[Store, str]) -> None:
    store, _ = chunked
    before = contents(store.state)
    assert refuse(store, unit(Path(store.place), RUN, "a", 1)) == {}
    assert contents(store.state) == before


def test_a_task_whose_files_are_gone_is_refused_and_can_be_done_again(store: Store) -> None:
    with Run(store.storage) as run:
        task = unit(Path(store.place), run.id, "a", 0)
        staging.stage(store.storage, task)
        stored_file(store, task.files()[0]).unlink()
        assert folding.fold(store, run).refused == {task.task: "its files are missing"}
        assert not staging.is_staged(store.storage, task.task)
    assert Store.open(store.place).state.all_parts() == []
