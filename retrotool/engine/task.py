"""The contract between a stage and an engine that runs its tasks.

``stage.plan(store)`` lists the tasks that are not committed. A stage is a small frozen dataclass and a task
is plain data, so both can be sent anywhere. There, ``stage.open(store)`` returns a worker (it may load a
model, once), and ``worker(task, run, report)`` writes new files and returns what to stage. ``perform`` stages
it, and any process may commit it (``folding.fold``).

Tasks run in any order, on any machine, and twice if need be. To resume is to plan again. Local processes, job
arrays and clusters differ only in what calls ``perform``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import orjson

from retrotool import interrupts
from retrotool.errors import ErasedError
from retrotool.store import leases, staging
from retrotool.store.staging import Staged
from retrotool.store.storage import Storage
from retrotool.store.store import Store

Update = Callable[[int, int], object]  # takes units done, and units done by others
TaskResult = Any  # of ``perform``, or the error that ended it
Report = Callable[[int], object]  # takes how many units of work (``Stage.unit``) were just done


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work; ``weight`` is in the stage's unit. If ``claimed``, a run claims it first.

    ``for_all``: what follows needs its result, so every job of a shard waits for it.
    """

    key: str
    label: str
    weight: int
    inputs: Mapping[str, Any]
    claimed: bool = False
    for_all: bool = False


class Worker(Protocol):
    """Does tasks, one at a time, or as many as its stage has in flight."""

    def __call__(self, task: Task, run: str, report: Report) -> Any:
        """Write the task's files under the run's id; return what to stage, or None if it is done already.

        Without a run, only read, and return anything.
        """


class Stage(Protocol):
    """A kind of work. Of its ``devices``, if it has some, each worker process gets one.

    With an attribute ``in_flight``, the worker of each process is called by so many threads at once. With
    ``worker_cores``, a worker on a Ray cluster gets so many cores of its node, else all; with
    ``worker_bytes``, only as many workers are made as fit half of the node's memory.
    """

    @property
    def name(self) -> str:
        """The name of the command."""

    @property
    def unit(self) -> str:
        """What progress counts: bytes, chunks."""

    def plan(self, store: Store) -> Sequence[Task]:
        """Return the uncommitted tasks in order, determined by the store's state and the stage's settings."""

    def open(self, store: Store) -> Worker:
        """Prepare to do tasks in this process."""


@runtime_checkable
class GivesUp(Protocol):
    """A stage that goes on without the tasks that failed for good."""

    def give_up(self, store: Store, task: Task, run: str, error: BaseException) -> Staged:
        """Return what to stage in place of a task that failed every time: no result, and the reason."""


@runtime_checkable
class Holds(Protocol):
    """A stage with work that only certain other runs can do."""

    def held(self, store: Store) -> dict[str, str]:
        """Return labels of such work, and the live runs that it is left to."""


@runtime_checkable
class Sized(Protocol):
    """A stage that knows what its tasks write."""

    def size_of(self, store: Store, task: Task) -> int:
        """Return about how many bytes a task writes, rather too few than too many."""


def check_there(store: Store, paths: Sequence[str]) -> None:
    """Check that the store's newest state has the files that a task reads, else raise ``ErasedError``."""
    state = store.refresh()
    for path in paths:
        if not state.has(path):
            raise ErasedError(f"{path} was replaced or erased by another process")


def is_taken(store: Store, kind: str, slot: str, name: str, replaces: str | None = None) -> bool:
    """Return whether the file of a task, to be in place of ``replaces``, was committed since it was planned.

    A run that did the task has released its claim by then. The state is that of the last refresh.
    """
    now = store.state.file(kind, slot, name)
    return (None if now is None else now.path) != replaces


def task_key(stage: str, settings: Mapping[str, Any], reads: Sequence[str]) -> str:
    """Return a task's key: 32 hexadecimal digits that depend only on what it does and what it reads."""
    fields = [stage, dict(settings), list(reads)]
    return hashlib.blake2b(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def is_own(task: Task, job: int, jobs: int) -> bool:
    """Return whether a task belongs to the share of job ``job``."""
    return int(task.key, 16) % jobs == job


def own_first(tasks: Sequence[Task], job: int, jobs: int) -> list[Task]:
    """Return the tasks in the order of job ``job``: its own, by key, then those of the next jobs."""

    def order(place: int) -> tuple[int, int]:  # others' tasks from the end: they start at the beginning
        owner = int(tasks[place].key, 16) % jobs
        return (owner - job) % jobs, place if owner == job else -place

    return [tasks[place] for place in sorted(range(len(tasks)), key=order)]


class NodeLostError(Exception):
    """A task ended with its machine, through no fault of its own."""


class OpenError(Exception):
    """A worker process could not open the stage, for the reason in ``args[0]``; no task can be done."""


def perform(worker: Worker, storage: Storage, task: Task, run: str, update: Update) -> Any:
    """Perform a task and stage it; None if another process did or does. Engines need only this function.

    ``update`` gets progress, which is subtracted if the task is not staged. Without a ``run`` ("") nothing
    is staged, and what the worker returns is returned.
    """
    done = 0

    def report(units: int) -> None:
        nonlocal done
        interrupts.check()
        done += units
        update(units, 0)

    try:
        result = worker(task, run, report) if not run else _staged(worker, storage, task, run, report)
    except BaseException as error:
        update(-done, 0)
        if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)):
            raise
        # A panic in a Rust library: other processes can't unpickle its class.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    if result is None:
        update(-done, task.weight)
    return result


def _staged(worker: Worker, storage: Storage, task: Task, run: str, report: Report) -> Staged | None:
    with contextlib.ExitStack() as stack:
        if task.claimed and not staging.is_staged(storage, task.key):
            if not leases.take_claim(storage, task.key, run):
                return None
            stack.callback(leases.release_claim, storage, task.key, run)
        # Another run may have staged it, and released its claim, before this one claimed it.
        staged = None if staging.is_staged(storage, task.key) else worker(task, run, report)
        return staged if staged is not None and staging.stage(storage, staged) else None
