"""How tasks are run: retries, failures, dead workers, interruption, resuming."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl
from stored import age_stored, stored_files, write_stored

from retrotool import api, engine
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.engine.progress import Progress
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.errors import CorruptError, ErasedError, HeldError, StorageError, TaskError, UsageError
from retrotool.store import leases, staging
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.storage import Storage
from retrotool.store.store import Store


@dataclass(frozen=True)
class TouchStage:
    """Writes one selector file a task; misbehaves as reported, leaving a mark for every attempt."""

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
        return [task for task in tasks if not staging.is_staged(store.storage, task.key)]

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
            raise CorruptError("this file is broken", "repair it")
        if kind == "erased":
            raise ErasedError("its input was erased by another process")
        if kind == "full":
            raise StorageError("no space left")
        if kind == "kill" or (kind == "die" and attempt == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        entry = write_json_file(self.store, FileName.new(run, "selectors", f"t{n}", "json"), {"n": n}, 1)
        report(1)
        return Staged("touch", add=(entry,), task=task.key, run=run)


@pytest.fixture
def store(tmp_path: Path, tiny_encoder: Path) -> Store:
    api.chunk(tmp_path / "store", [str(write_jsonl(tmp_path / "c.jsonl", make_rows(2)))], tokenizer=str(tiny_encoder))
    (tmp_path / "marks").mkdir()
    return Store.open(tmp_path / "store")


def attempts(tmp_path: Path, n: int) -> int:
    return len(list((tmp_path / "marks").glob(f"{n}-*")))


def execute(store: Store, stage: TouchStage, workers: int = 1) -> None:
    with writing(store) as run:
        engine.execute(stage, store, run, workers=workers)


@pytest.mark.spawned
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
    assert error.value.advice == "repair it", "the advice crosses processes"
    assert attempts(tmp_path, 1) == 1
    assert len(store.refresh().group("selectors")) == 5


def test_a_task_whose_input_is_always_gone_ends_the_run(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ErasedError, match="its input was erased"):
        execute(store, TouchStage(str(tmp_path / "marks"), fail=((1, "erased"),)))
    assert attempts(tmp_path, 1) == 10
    assert len(store.refresh().group("selectors")) == 5


def test_a_full_disk_stops_at_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        execute(store, TouchStage(str(tmp_path / "marks"), fail=((1, "full"),)))
    assert attempts(tmp_path, 2) == 0


def test_a_worker_that_is_killed_is_replaced(store: Store, tmp_path: Path) -> None:
    execute(store, TouchStage(str(tmp_path / "marks"), fail=((4, "die"),)), workers=2)
    assert len(store.state.group("selectors")) == 6


@dataclass(frozen=True)
class NoStage(TouchStage):
    """One of whose workers can't be opened."""

    broken: int = 0
    devices: tuple[int, ...] = (0, 1)

    def open(self, store: Store) -> TouchWorker:
        (Path(self.marks) / f"open-{self.devices[0]}-{os.getpid()}").touch()
        if self.devices[0] == self.broken:
            raise UsageError("no such device", "name another")
        return super().open(store)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_can_not_be_opened_ends_the_run_and_says_why(store: Store, tmp_path: Path, broken: int) -> None:
    with pytest.raises(UsageError, match="no such device") as error:
        execute(store, NoStage(str(tmp_path / "marks"), broken=broken), workers=2)
    assert error.value.advice == "name another"
    assert len(list((tmp_path / "marks").glob("open-*"))) <= 2, "none is opened again and again"


def test_a_worker_that_is_killed_fails_its_own_task_alone_and_keeps_its_number(store: Store, tmp_path: Path) -> None:
    stage = NoStage(str(tmp_path / "marks"), tasks=9, fail=((4, "die"), (7, "die")), broken=-1, devices=(0, 1, 2))
    execute(store, stage, workers=3)
    assert len(store.state.group("selectors")) == 9
    assert [attempts(tmp_path, n) for n in range(9)] == [2 if n in (4, 7) else 1 for n in range(9)]
    opened = [path.name.split("-")[1] for path in (tmp_path / "marks").glob("open-*")]
    assert set(opened) == {"0", "1", "2"}
    assert len(opened) == 5, "three workers, and one in place of each that was killed"


def test_a_task_that_kills_its_worker_every_time_is_given_up_and_its_claim_with_it(
    store: Store, tmp_path: Path
) -> None:
    stage = ClaimingStage(str(tmp_path / "marks"), fail=((2, "kill"),))
    with writing(store) as run:
        with pytest.raises(TaskError, match=r"task 2 failed 3 times: BrokenProcessPool"):
            engine.execute(stage, store, run, workers=2)
        assert attempts(tmp_path, 2) == 3
        with Run(store.storage) as other:
            assert leases.claim_holders(store.storage, other.id).keys() == frozenset()
    assert len(store.refresh().group("selectors")) == 5


@dataclass(frozen=True)
class ClaimingStage(TouchStage):
    """Whose tasks are claimed."""

    def plan(self, store: Store) -> Sequence[Task]:
        return [replace(task, claimed=True) for task in super().plan(store)]


def test_a_claimed_task_is_left_to_the_run_that_is_at_it(store: Store, tmp_path: Path) -> None:
    stage = ClaimingStage(str(tmp_path / "marks"))
    task = stage.plan(store)[3]
    with Run(store.storage) as other, Run(store.storage) as run:
        assert leases.take_claim(store.storage, task.key, other.id)
        assert engine.perform(stage.open(store), store.storage, task, run.id, lambda *_: None) is None
        with pytest.raises(HeldError, match=rf"task 3, held by run {other.id} \(process {os.getpid()} on ") as error:
            engine.execute(stage, store, run, wait=False)
        assert error.value.exit_code == 14
        assert [attempts(tmp_path, n) for n in range(6)] == [1, 1, 1, 0, 1, 1]
        leases.release_claim(store.storage, task.key, other.id)
        engine.execute(stage, store, run)
    assert len(store.state.group("selectors")) == 6


@pytest.mark.parametrize("how", ["drops", "does", "falls silent"])
def test_a_run_waits_for_what_another_holds_and_does_what_is_dropped(
    how: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, naps = ClaimingStage(str(tmp_path / "marks")), list[float]()
    task = stage.plan(store)[3]
    with Run(store.storage) as other, Run(store.storage) as run:
        assert leases.take_claim(store.storage, task.key, other.id)

        def nap(seconds: float) -> None:
            naps.append(seconds)
            assert [attempts(tmp_path, n) for n in range(6)] == [1, 1, 1, 0, 1, 1], "first all that is free"
            if len(naps) == 3 and how == "falls silent":
                path = leases.run_path(other.id)
                lease = store.storage.get(path).replace(b'"host":"', b'"host":"not-')
                age_stored(write_stored(store.place, path, lease), leases.CLAIM_SILENCE_SECONDS + 1)
            elif len(naps) == 3:
                if how == "does":
                    assert engine.perform(stage.open(store), store.storage, task, other.id, lambda *_: None)
                leases.release_claim(store.storage, task.key, other.id)

        monkeypatch.setattr(time, "sleep", nap)
        engine.execute(stage, store, run)
    assert len(store.state.group("selectors")) == 6
    assert [attempts(tmp_path, n) for n in range(6)] == [1] * 6
    assert naps == [0.5, 1.0, 2.0]


def test_a_job_waits_only_for_its_own_share_and_for_what_all_need(store: Store, tmp_path: Path) -> None:
    stage = ClaimingStage(str(tmp_path / "marks"))
    task = stage.plan(store)[3]
    owner = int(task.key, 16) % 2
    with Run(store.storage) as other, Run(store.storage) as run:
        assert leases.take_claim(store.storage, task.key, other.id)
        engine.use_engine(shard=(1 - owner, 2))
        engine.execute(stage, store, run, wait=False)
        with pytest.raises(HeldError), engine.doing_everything():
            engine.execute(stage, store, run, wait=False)
        engine.use_engine(shard=(owner, 2))
        with pytest.raises(HeldError):
            engine.execute(stage, store, run, wait=False)
        leases.release_claim(store.storage, task.key, other.id)
        engine.use_engine(shard=(1 - owner, 2))
        engine.execute(stage, store, run, wait=False)
    assert len(store.state.group("selectors")) == 6


def test_a_task_that_was_staged_between_two_looks_is_not_done_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ClaimingStage(str(tmp_path / "marks"))
    task = stage.plan(store)[0]
    take = leases.take_claim

    def late(storage: Storage, key: str, run: str) -> bool:
        monkeypatch.undo()
        with Run(storage) as other:  # does it all while the first one is about to claim it
            assert engine.perform(stage.open(store), storage, task, other.id, lambda *_: None)
        return take(storage, key, run)

    monkeypatch.setattr(leases, "take_claim", late)
    with Run(store.storage) as run:
        assert engine.perform(stage.open(store), store.storage, task, run.id, lambda *_: None) is None
    assert attempts(tmp_path, 0) == 1


@pytest.mark.parametrize("others", [False, True])
def test_progress_subtracts_what_came_to_nothing(store: Store, tmp_path: Path, others: bool) -> None:
    updates: list[tuple[int, int]] = []
    task = Task("k", "task", 10, {"n": 0})

    class Half(TouchWorker):
        def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
            report(4)
            report(3)
            if others:
                return None
            raise OSError("a hiccup")

    worker = Half(store, TouchStage(str(tmp_path)))
    expected = contextlib.nullcontext() if others else pytest.raises(OSError, match="a hiccup")
    with Run(store.storage) as run, expected:
        engine.perform(worker, store.storage, task, run.id, lambda *update: updates.append(update))
    assert updates == [(4, 0), (3, 0), (-7, 10 if others else 0)]


def test_ctrl_c_leaves_a_good_store_and_the_same_command_goes_on(tmp_path: Path, tiny_encoder: Path) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    text = " ".join(row["text"] for row in make_rows(200))[:5000]
    rows = [{"id": str(i), "text": f"{i} {text}"} for i in range(800)]
    inputs = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows[i::4])) for i in range(4)]
    # The slow tokenizer is at work for a second after the first part is there.
    options = ["--tokenizer", str(tiny_encoder), "--workers", "2", "--part-size", "250", "--exact-tokenizer"]
    command = [sys.executable, "-m", "retrotool", "chunk", str(store), *inputs, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not stored_files(store, "documents/*.parquet") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert api.verify(store).ok
    api.chunk(store, inputs)
    api.chunk(whole, inputs, tokenizer=str(tiny_encoder), part_size=250)
    assert api.verify(store).content == api.verify(whole).content
    assert api.verify(store).ids == api.verify(whole).ids


class Terminal(io.StringIO):
    def isatty(self):
        return True


@dataclass
class Clock:
    """A clock that stands still."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def shown_by(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, **given: object) -> tuple[Progress, Clock]:
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.delenv("TQDM_DISABLE")
    clock = Clock()
    return Progress("embed", "chunk", clock=clock, **given), clock


def test_in_a_log_there_is_a_line_at_the_start_one_a_minute_and_one_at_the_end(monkeypatch):
    file = io.StringIO()
    progress, clock = shown_by(monkeypatch, file, doing="planning")
    clock.now += 3
    progress.show()
    progress.plan(40_000_000, "loading")
    clock.now += 7
    progress.update(10_000)  # what came before the first report was no work
    for _ in range(1200):
        clock.now += 0.1
        progress.update(3_100)
    clock.now += 1200
    progress.update(40_000_000 - 10_000 - 1200 * 3_100)
    progress.close()
    assert file.getvalue().splitlines() == [
        "embed: planning",
        "embed: 1.66M of 40.0M chunks, 31,000/s, 21 min left",
        "embed: 3.52M of 40.0M chunks, 31,000/s, 20 min left",
        "embed: 40.0M of 40.0M chunks, 30,000/s",
        "embed: 40.0M of 40.0M chunks in 22 min",
    ]


def test_in_a_log_there_is_nothing_of_what_takes_less_than_two_seconds(monkeypatch):
    file = io.StringIO()
    progress, clock = shown_by(monkeypatch, file, total=14)
    progress.update(14)
    clock.now += 1.9
    progress.show()
    progress.close()
    assert file.getvalue() == ""


def test_a_wait_is_reported_each_minute_until_work_goes_on(monkeypatch):
    file = io.StringIO()
    progress, clock = shown_by(monkeypatch, file)
    progress.plan(300, "loading")
    progress.update(100)
    progress.plan(0, "waiting for part 3, held by run 01234567")
    for _ in range(100):
        clock.now += 1
        progress.show()
    progress.plan(1, "loading")
    progress.update(201)
    progress.close()
    waiting = "embed: 100 of 300 chunks, waiting for part 3, held by run 01234567"
    assert file.getvalue().splitlines() == [waiting, waiting, "embed: 301 of 301 chunks in 2 min"]


def test_on_a_terminal_there_is_one_bar_from_the_start_whose_time_left_does_not_jump(monkeypatch):
    file = Terminal()
    progress, clock = shown_by(monkeypatch, file, doing="reading the encoder")
    assert file.getvalue().split("\r")[-1].strip() == "embed: reading the encoder"
    progress.plan(240, "loading")
    clock.now += 8
    progress.show()
    assert file.getvalue().split("\r")[-1].strip() == "embed: 0 of 240 chunks, loading"
    progress.update(0, 40)
    left = []
    for n in range(190):
        clock.now += 0.2 if n % 10 else 2.0  # now and then something is slow
        progress.update(1)
        bar = file.getvalue().split("\r")[-1]
        assert re.match(rf"embed: +({(n + 1) // 2}|{(n + 2) // 2})%\|.*\| {n + 1} of 200 chunks", bar), bar
        if n > 20:
            left.append(float(re.search(r"(\d+) (?:s|min) left", bar)[1]))
    assert all(abs(one - other) <= 2 + one / 4 for one, other in itertools.pairwise(left)), left
    progress.close()
    assert re.search(r"95%\|.*\| 190 of 200 chunks in \d+ s *\n", file.getvalue()), "it stays, as long as a log's line"


@pytest.mark.parametrize("file", [Terminal(), io.StringIO()])
def test_a_run_that_stops_before_a_task_is_finished_says_so(monkeypatch, file):
    progress, clock = shown_by(monkeypatch, file, total=300)
    clock.now += 3
    progress.update(70)
    progress.update(-70)  # the task was interrupted
    clock.now += 9
    progress.close()
    last = re.split(r"[\r\n]", file.getvalue().strip())[-1].split("| ")[-1].removeprefix("embed: ")
    assert last == "no task was finished, stopped after 12 s"


def test_nothing_is_shown_where_it_is_turned_off(monkeypatch):
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", file)
        clock = Clock()
        progress = Progress("embed", "chunk", 10, clock=clock)
        clock.now += 100
        progress.update(5)
        progress.close()
        assert file.getvalue() == ""


def test_ctrl_c_as_progress_begins_leaves_no_thread_for_which_the_process_waits(monkeypatch):
    begun: list[threading.Thread] = []

    def start(thread: threading.Thread, start=threading.Thread.start) -> None:
        start(thread)
        begun.append(thread)
        raise KeyboardInterrupt  # it waits until the thread has begun, and Ctrl-C ends the wait

    progress = Progress("chunk")
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt), progress:
        pytest.fail("the context must not be entered")
    assert [thread.name for thread in begun] == ["retrotool-progress"]
    begun[0].join(30)
    assert not begun[0].is_alive() and begun[0].daemon


def test_a_claim_that_is_released_just_after_it_was_seen_is_not_waited_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, look = ClaimingStage(str(tmp_path / "marks")), leases.claim_holders
    task = stage.plan(store)[3]
    with Run(store.storage) as other, Run(store.storage) as run:
        assert leases.take_claim(store.storage, task.key, other.id)

        def look_before_release(storage: Storage, who: str) -> dict[str, str]:
            found = look(storage, who)
            if sys._getframe(1).f_code.co_name == "work" and len(stage.plan(store.refresh() and store)) == 1:
                leases.release_claim(storage, task.key, other.id)
            return found

        monkeypatch.setattr(leases, "claim_holders", look_before_release)
        engine.execute(stage, store, run)
    assert [attempts(tmp_path, n) for n in range(6)] == [1] * 6


@dataclass(frozen=True)
class InFlightStage(TouchStage):
    """Three tasks of which are in flight at a time."""

    in_flight: int = 3


@dataclass(frozen=True)
class AbreastStage(InFlightStage):
    """Whose tasks wait until three of them have begun."""

    def open(self, store: Store) -> Worker:
        worker, meet = super().open(store), threading.Barrier(3)

        def perform(task: Task, run: str, report: Report) -> Staged:
            meet.wait(60)
            return worker(task, run, report)

        return perform


def test_a_stage_may_have_several_tasks_in_flight_in_one_process(store: Store, tmp_path: Path) -> None:
    execute(store, AbreastStage(str(tmp_path / "marks")))
    assert [attempts(tmp_path, n) for n in range(6)] == [1] * 6
    assert len(store.state.group("selectors")) == 6


def test_what_fails_in_flight_is_named_and_the_others_are_kept(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task 4 failed 3 times: RuntimeError: boom"):
        execute(store, InFlightStage(str(tmp_path / "marks"), fail=((4, "always"),)))
    assert len(store.state.group("selectors")) == 5


@dataclass(frozen=True)
class PairsStage(NoStage, ClaimingStage):
    """Has two tasks in flight in each process; a task waits until another has begun in its process, if it can."""

    in_flight: int = 2
    broken: int = -1
    devices: tuple[int, ...] = (0, 1)

    def open(self, store: Store) -> Worker:  # type: ignore[override]
        worker, meet = super().open(store), threading.Barrier(2)

        def perform(task: Task, run: str, report: Report) -> Staged:
            with contextlib.suppress(threading.BrokenBarrierError):
                meet.wait(1)
                (Path(self.marks) / f"pair-{task.label}").touch()
            return worker(task, run, report)

        return perform


def test_each_process_may_have_several_tasks_in_flight(store: Store, tmp_path: Path) -> None:
    execute(store, PairsStage(str(tmp_path / "marks"), tasks=8), workers=2)
    assert [attempts(tmp_path, n) for n in range(8)] == [1] * 8
    assert len(store.state.group("selectors")) == 8
    assert len(list((tmp_path / "marks").glob("pair-*"))) >= 2
    assert len(list((tmp_path / "marks").glob("open-*"))) == 2


def test_what_fails_in_flight_in_a_process_is_named_with_its_advice(store: Store, tmp_path: Path) -> None:
    stage = PairsStage(str(tmp_path / "marks"), fail=((1, "corrupt"), (4, "once")))
    with pytest.raises(CorruptError, match="broken") as error:
        execute(store, stage, workers=2)
    assert error.value.advice == "repair it"
    assert (attempts(tmp_path, 1), attempts(tmp_path, 4)) == (1, 2)
    assert len(store.refresh().group("selectors")) == 5


def test_a_killed_process_loses_its_tasks_in_flight_and_the_task_that_kills_is_then_alone(
    store: Store, tmp_path: Path
) -> None:
    stage = PairsStage(str(tmp_path / "marks"), fail=((2, "kill"),))
    with writing(store) as run:
        with pytest.raises(TaskError, match=r"task 2 failed 3 times: BrokenProcessPool"):
            engine.execute(stage, store, run, workers=2)
        with Run(store.storage) as other:
            assert leases.claim_holders(store.storage, other.id).keys() == frozenset()
    assert attempts(tmp_path, 2) == 3 and sum(attempts(tmp_path, n) for n in range(6)) <= 5 + 3 + 1
    assert len(store.refresh().group("selectors")) == 5
