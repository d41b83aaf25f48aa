"""A run that sleeps, and is taken for dead, commits nothing of what was removed, whenever it falls asleep."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import make_rows, write_jsonl
from staging_help import embedding, planned_store, unit
from store_help import (
    announced,
    assert_whole,
    at_step,
    clean_after_a_sleep,
    commit,
    files_in,
    listening,
    live_files,
    make_store,
    temporary_files,
    write,
)  # fmt: skip
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.errors import LostRunError
from retrotool.store import atomic, folding, log, runs, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.clean import clean
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import Store


def add_both(store: Store, run: Run) -> None:
    """Commit a file that the run wrote, and one under another name."""
    own = write(store.root, run.id, "tombstones", "p", b"own")
    staged = write(store.root, run.id, "staging", "task", b"staged")
    name = FileName.new(run.id, "chunks", "000000", "bin").path
    linked = FileEntry(name, 1, staged.bytes, staged.sha256)
    commit(store, run, own, linked, links=((staged.path, name),))


def test_a_commit_is_made_whole_or_not_at_all_wherever_its_run_falls_asleep(tmp_path: Path) -> None:
    def fresh(name: object) -> Store:
        return make_store(tmp_path / f"store-{name}")

    with Run(fresh("steps").root) as run:
        steps = announced(lambda: add_both(Store.open(run.root), run))
    made = []
    for number, step in enumerate(steps):
        store = fresh(number)
        try:
            with Run(store.root) as run, at_step(number, lambda root=store.root: clean_after_a_sleep(root)):
                add_both(store, run)
        except LostRunError as error:
            assert "Run the same command again" in error.advice
            assert store.state.number == -1
        seen = Store.open(store.root)
        assert_whole(seen)
        made.append(seen.state.number == 0)
        assert live_files(seen.state) <= files_in(store.root)
        clean_after_a_sleep(store.root)
        assert files_in(store.root) == live_files(seen.state), f"step {number}: {step}"
    assert made == sorted(made) and {False, True} == set(made), "up to the link of the entry none is made"


def test_a_task_is_staged_whole_or_not_at_all_wherever_its_run_falls_asleep(tmp_path: Path) -> None:
    def stage(store: Store, run: Run) -> None:
        staging.stage(store.root, unit(store.root, run.id, "a", 0))

    with Run(planned_store(tmp_path / "steps").root) as run:
        steps = announced(lambda: stage(Store.open(run.root), run))
    done = []
    for number in range(len(steps)):
        store = planned_store(tmp_path / f"store-{number}")
        try:
            with Run(store.root) as run, at_step(number, lambda root=store.root: clean_after_a_sleep(root)):
                stage(store, run)
        except LostRunError:
            assert staging.read_staged(store.root) == {}
        with Run(store.root) as run:
            folded = folding.fold(store, run)
        assert folded.refused == {}, "what is staged is there"
        done.append(bool(folded.committed))
        assert_whole(store)
    assert done == sorted(done) and {False, True} == set(done)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_file_that_is_missing_or_cut_short_is_not_committed(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    store = make_store(tmp_path / "store")
    with Run(store.root) as run:
        entry = write(store.root, run.id, "chunks", "000000")
        staged = write(store.root, run.id, "staging", "task")
        name = FileName.new(run.id, "chunks", "000001", "bin").path
        damage(store.root / entry.path)
        with pytest.raises(LostRunError, match=entry.path):
            commit(store, run, entry, FileEntry(name, 1, 4, staged.sha256), links=((staged.path, name),))
        assert not (store.root / name).exists()
    assert Store.open(store.root).state.number == -1


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_staged_task_whose_file_is_missing_or_cut_short_is_done_again(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    store = planned_store(tmp_path / "store")
    with Run(store.root) as run:
        task = embedding(store.root, run.id, 0, ())
        staging.stage(store.root, task)
        damage(store.root / task.add[0].path)
        assert folding.fold(store, run).refused == {task.task: "its files are gone"}
        assert not staging.is_staged(store.root, task.task)
        assert staging.stage(store.root, embedding(store.root, run.id, 0, ()))
        assert folding.fold(store, run).committed == {task.task}
    assert_whole(store)


def test_the_temporary_file_of_a_dead_run_is_removed_before_the_log_is_read(tmp_path: Path) -> None:
    """What is written after clean-up has listed files, and before it reads the log, can't become a commit."""
    store = make_store(tmp_path / "store")
    with Run(store.root) as run:
        write(store.root, run.id, "chunks", "000000")
        late = log.commit_path(store.root, 0).with_name(f"{atomic.TEMPORARY}{run.id}00001234")
        late.parent.mkdir(exist_ok=True)

        def fall_asleep(operation: str, path: str) -> None:
            if operation == "unlink" and path == str(run.path) and run.path.exists():
                late.write_bytes(b"an entry of the log")

        with listening(fall_asleep):
            clean_after_a_sleep(store.root)
        assert temporary_files(store.root) == []


def test_a_run_that_begins_while_another_cleans_up_keeps_its_file(tmp_path: Path) -> None:
    """Its temporary file is seen, and its run file is not there yet: so it seems dead for a moment."""
    store = make_store(tmp_path / "store")
    run = Run(store.root, "0123abcd")
    temporary = run.path.with_name(f"{atomic.TEMPORARY}{run.id}00001234")
    with Run(store.root) as other:
        temporary.write_bytes(b"")

        def begin(operation: str, _: str) -> None:
            if operation == "unlink" and not run.path.exists():
                run.path.write_bytes(b"{}")

        with listening(begin):
            clean(store, other)
        assert run.path.exists()


def test_a_cleaner_whose_clock_is_ahead_removes_nothing_of_a_run_that_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = make_store(tmp_path / "store"), time.time
    with Run(store.root) as run:
        entry = write(store.root, run.id, "chunks", "000000")
        run.path.write_text(run.path.read_text().replace('"host":"', '"host":"not-'))
        with Run(store.root) as other:
            monkeypatch.setattr(time, "time", lambda: clock() + 2 * runs.SILENCE_SECONDS)
            assert clean(store, other) == 0
        commit(store, run, entry)
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
    store = Path(shutil.copytree(chunked, chunked.with_name("purged")))
    chosen = api.Selectors(document=("doc-3", "doc-7", "doc-9"))
    api.purge(store, chosen, reason="test")
    return store


def run_at(command: str, store: Path, more: Path) -> Result:
    purges = api.info(store).purges
    arguments = {
        "chunk": ["chunk", store, more],
        "purge": ["purge", store, "--document", "doc-3", "--reason", "test", "--yes"],
        "undo": ["purge", store, "--restore", *purges, "--reason", "test", "--yes"],
        "erase": ["purge", store, "--erase", *purges, "--yes"],
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
        store = Path(shutil.copytree(before, tmp_path / f"store-{number}"))
        begun: list[str] = []

        def fall_asleep(
            operation: str, path: str, store: Path = store, begun: list[str] = begun, n: int = number
        ) -> None:
            if operation == "link" and Path(path).parent == store / "log":
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
