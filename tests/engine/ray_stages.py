"""Stages for tests on Ray, and what runs them in a process of its own: a driver that may be killed."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from retrotool import api, engine
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.errors import UsageError
from retrotool.store import staging
from retrotool.store.folding import writing
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.store import Store

_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class MarkStage:
    """Writes one selector file a task. For every attempt it leaves a mark: a file ``<n>.<node>.<process>.<random>``.

    ``die``: the task that kills its worker, and how often. ``opening``: how many workers die, or "refuse", while they
    open the stage. ``hold``: no task ends before there is a file of this name beside the marks.
    """

    marks: str
    tasks: int = 6
    die: tuple[int, int] = (-1, 0)
    opening: tuple[str, int] = ("die", 0)
    hold: str = ""
    name: str = "mark"
    unit: str = "file"
    worker_cores: int = 1

    def plan(self, store: Store) -> Sequence[Task]:
        done = set(store.state.group("selectors"))
        named = [(n, f"t{n}") for n in range(self.tasks)]
        tasks = [
            Task(task_key("mark", {"n": n}, []), f"task {n}", 1, {"n": n}) for n, slot in named if slot not in done
        ]
        return [task for task in tasks if not staging.is_staged(store.storage, task.key)]

    def open(self, store: Store) -> Worker:
        kind, times = self.opening
        if len(list(Path(self.marks).glob("opening.*"))) < times:
            self.mark("opening")
            if kind == "refuse":
                raise UsageError("the model is not here", "copy it")
            os.kill(os.getpid(), signal.SIGKILL)

        def work(task: Task, run: str, report: Report) -> Staged:
            n = int(task.inputs["n"])
            attempt = len(list(Path(self.marks).glob(f"{n}.*")))
            self.mark(str(n))
            if n == self.die[0] and attempt < self.die[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.hold:
                await_file(lambda: (Path(self.marks) / self.hold).exists())
            entry = write_json_file(store, FileName.new(run, "selectors", f"t{n}", "json"), {"n": n}, 1)
            report(1)
            return Staged("mark", add=(entry,), task=task.key, run=run)

        return work

    def mark(self, what: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        (Path(self.marks) / f"{what}.{node}.{os.getpid()}.{secrets.token_hex(4)}").touch()


def await_file(there: Callable[[], object]) -> None:
    """Wait until something is true; fail after a minute."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def drive(address: str, place: str, stage: MarkStage) -> list[str]:
    """Execute a stage on the cluster; return the slots that it filled."""
    from retrotool.engine import ray as pool

    pool.LOSS_SECONDS = 1.5  # the cluster of tests notices losses sooner
    api.use_engine("ray", address)
    store = Store.open(place)
    with writing(store) as run:
        engine.execute(stage, store, run)
    return list(store.refresh().group("selectors"))
