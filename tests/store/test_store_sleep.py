"""A run that sleeps, and is taken for dead, commits nothing of what was removed, whenever it falls asleep.

On a local disk and in memory: there the names of unfinished writes can't be taken away from under a writer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from conftest import make_rows, write_jsonl
from memory_storage import MemoryStorage, memory_server
from staging_help import embedding, planned_store, unit
from store_help import (
    Action,
    announced,
    assert_whole,
    at_step,
    clean,
    clean_after_a_sleep,
    commit,
    listening,
    live_files,
    make_store,
    move_elsewhere,
    write,
)
from stored import copy_store
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.errors import LostRunError
from retrotool.store import folding, gc, leases, log, staging
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.storage import Storage
from retrotool.store.store import FENCE, Store
from retrotool.store.sums import with_sums
from retrotool.store.vectors import write_vectors

Fresh = Callable[[object], str]
Wakes = Callable[[Store, Run], object]
FAR = "0123abcd"
A_DAY = leases.DEAD_SECONDS + 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with memory_server(tmp_path_factory.mktemp("memory")):
        yield


@pytest.fixture(params=["local", "memory"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path, server: None) -> Fresh:
    """Names places for new stores."""
    if request.param == "memory":
        return lambda name: f"memory://{tmp_path}/{name}"
    return lambda name: str(tmp_path / f"store-{name}")


def sleep(storage: Storage, seconds: float = A_DAY) -> None:
    """Let all runs sleep for some time, while another machine cleans up."""
    if not isinstance(storage, MemoryStorage):
        clean_after_a_sleep(Path(storage.place), seconds)
        return
    for lease in list(storage.list("leases/run-")):
        run = lease.path.removeprefix("leases/run-")
        storage.overwrite(lease.path, run, json.dumps({**json.loads(storage.get(lease.path)), "host": "far"}).encode())
    storage.bucket.move_clock(seconds)
    clean(Store.open(storage))


@contextmanager
def falling_asleep(number: int, steps: list[str], strike: Action) -> Iterator[None]:
    """Strike just before a step of some, or after the last one."""
    if number < len(steps):
        with at_step(number, strike):
            yield
    else:
        yield
        strike()


def left(store: Store) -> set[str]:
    """Files that are neither live, nor the log or a checkpoint, and unfinished ones."""
    kept = {info.path for info in store.storage.list("") if not info.path.startswith(("log/", "checkpoints/"))}
    live = {path for entry in live_files(store.state) for path in with_sums(entry)}
    named = {"store.json", store.identity.tokenizer.file, *live}
    return (kept | {one.path for one in store.storage.unfinished()}) - named


def add_both(store: Store, run: Run) -> None:
    """Write two files and commit them: one has its slot in its name, and sums; of the other only the commit says it."""
    name = FileName.new(run.id, "embeddings", "000000", "npy", "tiny")
    vectors = write_vectors(store, name, np.ones((3, 4), np.float16))
    chunks = write(store.storage, run.id, "chunks", "000000", b"chunks")
    commit(store, run, vectors, chunks)


def commits(store: Store, kind: str) -> list[int]:
    found = (log.read(store.storage, number) for number in range(store.state.number + 1))
    return [commit.number for commit in found if commit is not None and commit.kind == kind]


def test_a_commit_is_made_whole_or_not_at_all_wherever_its_run_falls_asleep(fresh: Fresh) -> None:
    with Run(make_store(fresh("steps")).storage) as run:
        steps = announced(lambda: add_both(Store.open(run.storage), run))
    made = []
    for number, step in enumerate([*steps, "end"]):
        store = make_store(fresh(number))
        try:
            with Run(store.storage) as run, falling_asleep(number, steps, lambda store=store: sleep(store.storage)):
                add_both(store, run)
        except LostRunError as error:
            assert "Run the same command again" in error.advice
            assert commits(Store.open(store.place), "test") == []
        seen = Store.open(store.place)
        assert_whole(seen)
        assert FENCE + run.id in seen.state.records, f"step {number}: {step}"
        made.append(len(commits(seen, "test")))
        assert len(list(seen.state.files())) == 2 * made[-1]
        sleep(store.storage)
        assert left(Store.open(store.place)) == set(), f"step {number}: {step}"
    assert made == sorted(made) and {0, 1} == set(made), "up to the entry of the log none is made"


def test_a_task_is_staged_whole_or_not_at_all_wherever_its_run_falls_asleep(fresh: Fresh) -> None:
    """What is staged after the fence is dropped, whether or not its files were removed by then."""

    def stage(store: Store, run: Run) -> None:
        staging.stage(store.storage, unit(store.storage, run.id, "a", 0))

    with Run(planned_store(fresh("steps")).storage) as run:
        steps = announced(lambda: stage(Store.open(run.storage), run))
    done, late = [], 0
    for number, step in enumerate([*steps, "end"]):
        store = planned_store(fresh(number))
        lost = False
        try:
            with Run(store.storage) as run, falling_asleep(number, steps, lambda store=store: sleep(store.storage)):
                stage(store, run)
        except LostRunError:
            lost = True
        staged = staging.read_staged(store.storage)
        assert not (lost and staged)
        fence = store.refresh().records[FENCE + run.id]
        with Run(store.storage) as run:
            folded = folding.fold(store, run)
            assert folded.committed == set(fence["staged"]), f"step {number}: {step}"
            assert folded.committed | folded.refused.keys() == staged.keys()
            assert set(folded.refused.values()) <= {"its files are missing"}
            late += len(folded.refused)
            done.append(bool(folded.committed))
            if not folded.committed:
                stage(store, run)
                assert folding.fold(store, run).committed, "it can be done again"
        sleep(store.storage)
        assert left(Store.open(store.place)) == set()
        assert_whole(store)
    assert done == sorted(done) and {False, True} == set(done)
    assert late, "one had renewed its lease, and fell asleep before it staged the task"


def far_run(storage: Storage) -> None:
    """Let ``FAR`` be a run of another machine that was last heard of more than a day ago."""
    storage.overwrite(leases.run_path(FAR), FAR, b'{"host":"far"}')
    if isinstance(storage, MemoryStorage):
        storage.bucket.move_clock(A_DAY)
    else:
        move_elsewhere(Path(storage.place), FAR, A_DAY)


def each_step_of_cleaning(fresh: Fresh, prepare: Callable[[Store], Wakes]) -> Iterator[tuple[Store, str]]:
    """Clean up after ``FAR``, which wakes at one step of that after another; yield what came of it."""

    def prepared(number: object) -> tuple[Store, Wakes]:
        store = planned_store(fresh(number))
        wakes = prepare(store)
        far_run(store.storage)
        return store, wakes

    store, _ = prepared("steps")
    with Run(store.storage) as run:
        steps = announced(lambda: gc.clean(store, run))
    for number, step in enumerate([*steps, "end"]):
        store, wakes = prepared(number)
        with (
            Run(store.storage) as run,
            Run(store.storage) as rival,
            falling_asleep(number, steps, lambda store=store, wakes=wakes, rival=rival: wakes(store, rival)),
        ):
            gc.clean(Store.open(store.storage), run)
        store.refresh()
        assert FENCE + FAR in store.state.records
        yield store, f"step {number}: {step}"


def test_what_is_staged_and_folded_while_another_cleans_up_is_whole(fresh: Fresh) -> None:
    """The run had looked after its lease, fell asleep, and stages its task at any step of a clean-up."""

    def prepare(store: Store) -> Wakes:
        task = embedding(store.storage, FAR, 0, ())
        path = staging.staged_path(task.task)
        with Run(store.storage, FAR):
            staging.stage(store.storage, task)
        entry = store.storage.get(path)
        store.storage.delete([path])

        def wakes(store: Store, rival: Run) -> None:
            store.storage.put_if_absent(path, FAR, entry)
            folding.fold(Store.open(store.storage), rival)

        return wakes

    made = []
    for store, where in each_step_of_cleaning(fresh, prepare):
        assert_whole(store)
        with Run(store.storage) as run:
            folding.fold(store, run)
        assert_whole(store)
        made.append(len(commits(store, "embed")))
        sleep(store.storage)
        assert left(store) == set(), where
    assert made == sorted(made, reverse=True) and {0, 1} == set(made), "what comes before the fence"


def test_what_is_committed_while_another_cleans_up_is_whole(fresh: Fresh) -> None:
    """The run had looked after its lease, fell asleep, and appends to the log at any step of a clean-up."""

    def prepare(store: Store) -> Wakes:
        entry = write(store.storage, FAR, "chunks", "000000")
        number, head = store.state.number, store.state.head

        def wakes(store: Store, _: Run) -> None:
            log.append(store.storage, FAR, number + 1, head, Draft("late", add=(entry,)))

        return wakes

    made = []
    for store, where in each_step_of_cleaning(fresh, prepare):
        assert_whole(store)
        made.append(len(commits(store, "late")))
        sleep(store.storage)
        assert left(store) == set(), where
    assert made == sorted(made, reverse=True) and {0, 1} == set(made), "what comes before the fence"


@pytest.mark.parametrize("seconds", [leases.LAPSED_SECONDS + 60, leases.DEAD_SECONDS - 60])
def test_of_a_run_that_sleeps_for_less_than_a_day_nothing_is_removed_at_any_step(fresh: Fresh, seconds: float) -> None:
    """After half a day it writes nothing more, unless it fell asleep so late that its lease was renewed before."""
    with Run(make_store(fresh("steps")).storage) as run:
        steps = announced(lambda: add_both(Store.open(run.storage), run))
    made = []
    for number, step in enumerate([*steps, "end"]):
        store = make_store(fresh(number))
        kept: list[set[str]] = []

        def doze(store: Store = store, kept: list[set[str]] = kept) -> None:
            before = left(Store.open(store.place))
            sleep(store.storage, seconds)
            kept.append(before - left(Store.open(store.place)))

        try:
            with Run(store.storage) as run, falling_asleep(number, steps, doze):
                add_both(store, run)
        except LostRunError:
            pass
        seen = Store.open(store.place)
        made.append(seen.state.number + 1)
        assert kept == [set()], f"step {number}: {step}"
        assert commits(seen, "clean") == []
        assert_whole(seen)
    assert made == sorted(made) and {0, 1} == set(made)


def test_a_run_that_begins_while_another_cleans_up_is_not_taken_for_dead(fresh: Fresh) -> None:
    """Its lease is being written, and is not there yet: so it seems dead for a moment."""
    with Run(make_store(fresh("steps")).storage) as run:
        steps = announced(lambda: Run(run.storage).__enter__().__exit__(None, None, None))
    for number in range(len(steps) - 1):
        store = make_store(fresh(number))
        with at_step(number, lambda store=store: clean(store)), Run(store.storage) as run:
            entry = write(store.storage, run.id, "chunks", "000000")
            clean(store)
            commit(store, run, entry)
        assert_whole(store)


def damaged(store: Store, path: str, damage: str) -> None:
    data = store.storage.get(path)
    store.storage.delete([path])
    if damage == "cut short":
        assert store.storage.put_if_absent(path, "0123abcd", data[:-1])


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_file_that_is_missing_or_cut_short_is_not_committed(fresh: Fresh, damage: str) -> None:
    store = make_store(fresh("one"))
    with Run(store.storage) as run:
        entry, other = (write(store.storage, run.id, "chunks", f"{part:06d}") for part in range(2))
        damaged(store, entry.path, damage)
        with pytest.raises(LostRunError, match=entry.path):
            commit(store, run, other, entry)
    assert Store.open(store.place).state.number == -1


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_task_whose_file_is_missing_or_cut_short_is_not_staged(fresh: Fresh, damage: str) -> None:
    store = planned_store(fresh("one"))
    with Run(store.storage) as run:
        for task in (embedding(store.storage, run.id, 0, ()), unit(store.storage, run.id, "a", 1)):
            damaged(store, task.files()[-1], damage)
            with pytest.raises(LostRunError, match="files of a finished"):
                staging.stage(store.storage, task)
    assert staging.read_staged(store.storage) == {}


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_staged_task_whose_file_is_missing_or_cut_short_is_done_again(fresh: Fresh, damage: str) -> None:
    store = planned_store(fresh("one"))
    with Run(store.storage) as run:
        task = embedding(store.storage, run.id, 0, ())
        staging.stage(store.storage, task)
        damaged(store, task.add[0].path, damage)
        assert folding.fold(store, run).refused == {task.task: "its files are missing"}
        assert not staging.is_staged(store.storage, task.task)
        assert staging.stage(store.storage, embedding(store.storage, run.id, 0, ()))
        assert folding.fold(store, run).committed == {task.task}
    assert_whole(store)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store with a document that repeats another one's id, and one that repeats another one's text."""
    folder = tmp_path_factory.mktemp("sleep")
    rows = make_rows(12, words=60)
    source = write_jsonl(folder / "rows.jsonl", [*rows, rows[3], {**rows[7], "id": "again-7"}])
    write_jsonl(folder / "more.jsonl", make_rows(5, first=50, words=60))
    api.chunk(folder / "store", [str(source)], tokenizer=str(tiny_encoder), workers=1)
    return folder / "store"


@pytest.fixture(scope="module")
def purged(chunked: Path) -> Path:
    """The same with a purge of both, and of a third."""
    store = copy_store(chunked, chunked.with_name("purged"))
    chosen = api.Selectors(document=("doc-3", "doc-7", "doc-9"))
    api.purge(store, chosen, reason="test")
    return store


def run_at(command: str, store: Path, more: Path) -> Result:
    purges = api.info(store).purges
    arguments = {
        "chunk": ["chunk", store, more],
        "purge": ["purge", store, "--document", "doc-3", "--reason", "test", "--yes"],
        "undo": ["undo", store, *purges, "--reason", "test"],
        "erase": ["erase", store, *purges, "--yes"],
    }
    return CliRunner().invoke(app, [str(argument) for argument in arguments[command]])


@pytest.mark.parametrize(("command", "commits"), [("chunk", 3), ("purge", 1), ("undo", 1), ("erase", 3)])
def test_a_command_that_slept_says_so_and_leaves_a_whole_store(
    tmp_path: Path, chunked: Path, purged: Path, command: str, commits: int
) -> None:
    before = purged if command in ("undo", "erase") else chunked
    results = []
    more = chunked.with_name("more.jsonl")
    for number in itertools.count():
        store = copy_store(before, tmp_path / f"store-{number}")
        begun: list[str] = []

        def fall_asleep(
            operation: str, path: str, store: Path = store, begun: list[str] = begun, n: int = number
        ) -> None:
            if operation in ("link", "put_if_absent") and Path(path).parent == store / "log":
                begun.append(path)
                if len(begun) == n + 1:
                    clean_after_a_sleep(store)

        with listening(fall_asleep):
            result = run_at(command, store, more)
        found = api.verify(store)
        assert found.problems == []
        results.append((found.content, found.tombstones, found.chunks))
        if len(begun) <= number:
            assert result.exit_code == 0, result.output
            break
        assert result.exit_code == LostRunError.exit_code, result.output
        assert "took this run for dead" in result.stderr
        assert "Run the same command again" in result.stderr
        assert run_at(command, store, more).exit_code == 0
        found = api.verify(store)
        assert found.problems == []
        results[-1] = (found.content, found.tombstones, found.chunks)
    assert number >= commits
    assert set(results) == {results[-1]}, "what another try makes of it is what one makes"
