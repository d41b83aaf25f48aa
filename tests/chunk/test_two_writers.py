"""Two writers on one store: neither fails because of the other, and nothing is lost or done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from chunk_helpers import documents, run_chunk, verified, write_rows
from conftest import make_rows
from forked import Forked

from retrotool import api
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.chunk.stage import ChunkStage
from retrotool.engine import local
from retrotool.errors import ErasedError
from retrotool.store import disk, gc, leases
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.storage import storage_at
from retrotool.store.store import Store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "source.jsonl", make_rows(20))


def cleaned(root: Path) -> None:
    """Clean up as another process would."""
    with Run(storage_at(root)) as run:
        gc.clean(Store.open(root), run)


def test_two_processes_at_once_make_one_store_of_both_inputs(tmp_path, byte_level_tokenizer):
    inputs = [write_rows(tmp_path / f"{i}.jsonl", make_rows(100, first=90 * i)) for i in (0, 1)]  # 10 are in both
    options = ["--tokenizer", str(byte_level_tokenizer), "--part-size", "50", "--workers", "1", "--json"]
    run_chunk(tmp_path / "both", *inputs, *options[:2])
    for attempt in range(3):
        store = tmp_path / f"store-{attempt}"
        running = [Forked(["chunk", str(store), str(path), *options]) for path in inputs]
        for process in running:
            _, stderr = process.communicate(timeout=120)
            said = [line for line in stderr.splitlines() if not line.startswith("New store. Its tokenizer, ")]
            assert (said, process.returncode in (0, 3)) == ([], True)
        cleaned(store)  # both may have begun to finish a plan
        assert verified(store).documents == 190
        assert verified(store).content == verified(tmp_path / "both").content


def test_work_that_another_process_finishes_meanwhile_is_no_failure(tmp_path, source, monkeypatch):
    other = write_rows(tmp_path / "other.jsonl", make_rows(5, first=900))
    plan = ChunkStage.plan

    def plan_then_be_overtaken(self, store):
        tasks = plan(self, store)
        monkeypatch.undo()
        api.chunk(tmp_path / "store", [str(other)])
        return tasks

    monkeypatch.setattr(ChunkStage, "plan", plan_then_be_overtaken)
    assert api.chunk(tmp_path / "store", [str(source)]).documents == 20
    assert verified(tmp_path / "store").documents == 25


def test_a_task_whose_input_is_removed_is_planned_again(tmp_path, source, monkeypatch):
    def find_it_erased(*_, **__):
        monkeypatch.undo()
        raise ErasedError("removed by another process")

    monkeypatch.setattr(local, "perform", find_it_erased)
    assert api.chunk(tmp_path / "store", [str(source)]).documents == 20


def test_a_store_that_another_process_makes_first_is_opened(tmp_path, source):
    run_chunk(tmp_path / "store", source)
    store = Store.open(tmp_path / "store")
    again = Store.create(tmp_path / "store", store.identity.tokenizer, store.tokenizer_json(), 64)
    assert again.identity == store.identity


@pytest.mark.on_disk
def test_a_run_begins_although_clean_up_takes_its_temporary_file(tmp_path, source, monkeypatch):
    run_chunk(tmp_path / "store", source)
    storage, rename = storage_at(tmp_path / "store"), disk.rename
    lost: list[Path] = []

    def lose_it(path: Path, target: Path) -> None:
        monkeypatch.undo()
        cleaned(tmp_path / "store")  # this run is not to be seen yet, so what it wrote seems left over
        assert not path.exists()
        lost.append(target)
        rename(path, target)

    monkeypatch.setattr(disk, "rename", lose_it)
    with Run(storage) as run:
        assert lost == [tmp_path / "store" / "leases" / f"run-{run.id}"]
        assert leases.renew(storage, run.id)


def test_clean_up_spares_what_a_run_commits_just_before_it_ends(tmp_path, source, monkeypatch):
    root = tmp_path / "store"
    run_chunk(root, source)
    store, silence = Store.open(root), leases.silence_of
    run = Run(store.storage)
    run.__enter__()
    entry = write_json_file(store, FileName.new(run.id, "inputs", "00000000", "json"), {"fingerprints": []}, 0)

    def commit_and_end(storage, owner, now):
        if owner == run.id:
            monkeypatch.undo()
            store.commit(run, lambda _: Draft("finish", add=(entry,)))
            run.__exit__(None, None, None)
        return silence(storage, owner, now)

    monkeypatch.setattr(leases, "silence_of", commit_and_end)
    cleaned(root)
    assert Store.open(root).state.has(entry.path)
    assert verified(root).documents == 20


@pytest.mark.on_disk
def test_a_commit_whose_answer_is_lost_keeps_its_files(tmp_path, source, monkeypatch):
    """As on Ctrl-C, or an error of the disk, in the moment after the entry of the log was linked."""
    root, fsync_directory = tmp_path / "store", disk.fsync_directory

    def lose_the_answer(path: Path) -> None:
        if path.name == "log" and len(list(path.glob("0*.json"))) == 2:
            raise KeyboardInterrupt
        fsync_directory(path)

    monkeypatch.setattr(disk, "fsync_directory", lose_the_answer)
    assert run_chunk(root, source).exit_code == 130
    monkeypatch.undo()
    assert Store.open(root).state.number == 1
    assert len(documents(root)) == 20
    assert verified(root).documents == 0, "the plan is not finished"
    assert run_chunk(root, source).exit_code == 0
    assert verified(root).documents == 20
