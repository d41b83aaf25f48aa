"""How tasks are run: retries, failures, dead workers, interruption, resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl

from retrotool import commands, engine
from retrotool.commands.writing import writing
from retrotool.errors import CorruptError, StorageError, TaskError
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.chunk_plan import write_json
from retrotool.store import staging
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.store import Store


@dataclass(frozen=True)
class TouchStage:
    """Writes one selector file a task; misbehaves as told, leaving a mark for every attempt."""

    marks: str
    tasks: int = 6
    fail: tuple[tuple[int, str], ...] = ()
    name: str = "touch"
    unit: str = "file"

    def plan(self, store: Store) -> Sequence[Task]:
        done = set(store.state.group("selectors"))
        tasks = [
            Task(task_key("touch", {"n": n}, []), f"task {n}", 1, {"n": n})
            for n in range(self.tasks)
            if f"t{n}" not in done
        ]
        return [task for task in tasks if not staging.is_staged(store.root, task.key)]

    def open(self, store: Store) -> TouchWorker:
        return TouchWorker(store, self)


class TouchWorker:
    def __init__(self, store: Store, stage: TouchStage) -> None:
        self.store, self.stage = store, stage

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        n = int(task.inputs["n"])
        attempt = len(list(Path(self.stage.marks).glob(f"{n}-*")))
        (Path(self.stage.marks) / f"{n}-{attempt}").touch()
        kind = dict(self.stage.fail).get(n)
        if kind == "always":
            raise RuntimeError("boom")
        if kind == "once" and attempt == 0:
            raise OSError("a hiccup")
        if kind == "corrupt":
            raise CorruptError("this file is broken", "mend it")
        if kind == "full":
            raise StorageError("no space left")
        if kind == "die" and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        entry = write_json(self.store.root, FileName.new(run, "selectors", f"t{n}", "json"), {"n": n}, 1)
        report(1)
        return Staged(task.key, "touch", run, add=(entry,))


@pytest.fixture
def store(tmp_path: Path, tiny_encoder: Path) -> Store:
    commands.chunk(
        tmp_path / "store", [str(write_jsonl(tmp_path / "c.jsonl", make_rows(2)))], tokenizer=str(tiny_encoder)
    )
    (tmp_path / "marks").mkdir()
    return Store.open(tmp_path / "store")


def attempts(tmp_path: Path, n: int) -> int:
    return len(list((tmp_path / "marks").glob(f"{n}-*")))


def execute(store: Store, stage: TouchStage, workers: int = 1) -> None:
    with writing(store) as run:
        engine.execute(stage, store, run, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_committed_together(store: Store, tmp_path: Path, workers: int) -> None:
    before = store.state.number
    execute(store, TouchStage(str(tmp_path / "marks")), workers)
    assert list(store.state.group("selectors")) == [f"t{n}" for n in range(6)]
    assert store.state.number == before + 1, "one commit, not one a task"
    assert [attempts(tmp_path, n) for n in range(6)] == [1] * 6
    execute(store, TouchStage(str(tmp_path / "marks")), workers)
    assert store.state.number == before + 1
    assert [attempts(tmp_path, n) for n in range(6)] == [1] * 6


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails_once_is_tried_again(store: Store, tmp_path: Path, workers: int) -> None:
    execute(store, TouchStage(str(tmp_path / "marks"), fail=((2, "once"),)), workers)
    assert len(store.state.group("selectors")) == 6
    assert attempts(tmp_path, 2) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_always_fails_is_named_and_the_others_are_kept(store: Store, tmp_path: Path, workers: int) -> None:
    with pytest.raises(TaskError, match=r"task 3 failed 3 times: RuntimeError: boom") as error:
        execute(store, TouchStage(str(tmp_path / "marks"), fail=((3, "always"),)), workers)
    assert "again" in error.value.advice
    assert list(store.refresh().group("selectors")) == ["t0", "t1", "t2", "t4", "t5"]
    execute(store, TouchStage(str(tmp_path / "marks")))
    assert len(store.state.group("selectors")) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_wrong_with_the_data_is_not_tried_again(store: Store, tmp_path: Path, workers: int) -> None:
    with pytest.raises(CorruptError, match="broken") as error:
        execute(store, TouchStage(str(tmp_path / "marks"), fail=((1, "corrupt"),)), workers)
    assert error.value.advice == "mend it", "the advice crosses processes"
    assert attempts(tmp_path, 1) == 1
    assert len(store.refresh().group("selectors")) == 5


def test_a_full_disk_stops_at_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        execute(store, TouchStage(str(tmp_path / "marks"), fail=((1, "full"),)))
    assert attempts(tmp_path, 2) == 0


def test_a_worker_that_is_killed_is_replaced(store: Store, tmp_path: Path) -> None:
    execute(store, TouchStage(str(tmp_path / "marks"), fail=((4, "die"),)), workers=2)
    assert len(store.state.group("selectors")) == 6


def test_ctrl_c_leaves_a_good_store_and_the_same_command_goes_on(tmp_path: Path, tiny_encoder: Path) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    inputs = [str(write_jsonl(tmp_path / f"{i}.jsonl", make_rows(1500, first=1500 * i))) for i in range(4)]
    command = [
        sys.executable,
        "-m",
        "retrotool",
        "chunk",
        str(store),
        *inputs,
        "--tokenizer",
        str(tiny_encoder),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((store / "staging").glob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert commands.verify(store).ok
    commands.chunk(store, inputs)
    commands.chunk(whole, inputs, tokenizer=str(tiny_encoder))
    assert commands.verify(store).content == commands.verify(whole).content
    assert commands.verify(store).ids == commands.verify(whole).ids
