"""The contract between a stage and who runs its tasks, and doing one task.

``stage.plan(store)`` lists the tasks that are not committed. A stage is a small frozen dataclass and
a task is plain data, so both can be sent anywhere. Where a task runs, ``stage.open(store)`` gives a worker (a model
may be loaded, once), and ``worker(task, run, report)`` writes new files and returns what to stage. ``staging.stage``
makes that known, and any process may ``folding.fold``. Tasks are independent: any order, any machine, twice if need be.
Resuming is planning again. Local processes, job arrays and clusters differ only in who calls ``perform``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import orjson

from retrotool import interrupts
from retrotool.errors import ErasedError, UsageError
from retrotool.store import leases, staging
from retrotool.store.staging import Staged
from retrotool.store.storage import Storage
from retrotool.store.store import Store

Update = Callable[[int, int, str], object]
"""How progress changes: units done, units that others have done or do, and a note ("": the one before stays)."""


Report = Callable[[int], object]
"""Called with how many units of work (see ``Stage.unit``) were just done."""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: ``key`` names it for ever, ``weight`` is in the stage's unit, ``inputs`` is JSON-like.

    ``claimed``: several runs may be at such tasks, so each claims the one at hand (``retrotool.store.leases``).
    """

    key: str
    label: str
    weight: int
    inputs: Mapping[str, Any]
    claimed: bool = False


class Worker(Protocol):
    """Does tasks, one at a time."""

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Write the task's files under the run's id and return what to stage; None if it is done already."""


class Stage(Protocol):
    """A kind of work."""

    @property
    def name(self) -> str:
        """Name of the command."""

    @property
    def unit(self) -> str:
        """What progress counts: bytes, chunks."""

    def plan(self, store: Store) -> Sequence[Task]:
        """Tasks that are not committed yet, in order. Deterministic from the store's state and the stage's settings."""

    def open(self, store: Store) -> Worker:
        """Get ready to do tasks in this process."""


@runtime_checkable
class Notes(Protocol):
    """A worker that has something to say beside its progress."""

    def note(self) -> str:
        """A few words on the work so far, asked for after each report."""


@runtime_checkable
class GivesUp(Protocol):
    """A stage for which a task that fails for good is no reason to leave what comes after it undone."""

    def give_up(self, store: Store, task: Task, run: str, error: BaseException) -> Staged:
        """What to stage in place of a task that failed every time it was tried: that nothing came of it, and why."""


@runtime_checkable
class PerWorker(Protocol):
    """A stage that is not the same for all worker processes: each has a device of its own, perhaps."""

    def of_worker(self, number: int) -> Stage:
        """What worker ``number``, from 0, is to open."""


def check_there(store: Store, paths: Sequence[str]) -> None:
    """``ErasedError`` if the store's newest state lacks any of the files that a task reads: they were replaced."""
    state = store.refresh()
    for path in paths:
        if not state.has(path):
            raise ErasedError(f"{path} was replaced meanwhile")


def task_key(stage: str, settings: Mapping[str, Any], reads: Sequence[str]) -> str:
    """Name of a task: 32 hexadecimal digits from what it does and what it reads, not from who runs it or when."""
    fields = [stage, dict(settings), list(reads)]
    return hashlib.blake2b(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def check_shard(shard: tuple[int, int] | None) -> None:
    """``UsageError`` unless ``shard`` (i, n) is a job i of n, from 0."""
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"--shard {shard[0]}/{shard[1]}: of n jobs this is one from 0 to n - 1")


def own_first(tasks: Sequence[Task], job: int, jobs: int) -> list[Task]:
    """Tasks in the order in which job ``job`` of ``jobs`` goes at them.

    First its own, which it knows by their keys, whatever else is still to do. Then those of the jobs after it, each
    from the end, for their owners are at the beginning.
    """

    def order(place: int) -> tuple[int, int]:
        owner = int(tasks[place].key, 16) % jobs
        return (owner - job) % jobs, place if owner == job else -place

    return [tasks[place] for place in sorted(range(len(tasks)), key=order)]


class OpenError(Exception):
    """A worker process could not be opened, for the reason in ``args[0]``: no task is to blame, none would be done."""


def perform(worker: Worker, storage: Storage, task: Task, run: str, report: Report) -> Staged | None:
    """Do one task and stage it; None if another process did, or is at it. All that another engine has to call."""
    if staging.is_staged(storage, task.key):
        return None
    if not task.claimed:
        return _do(worker, storage, task, run, report)
    if not leases.take_claim(storage, task.key, run):
        return None
    try:
        # It may have been staged, and the claim for it given back, just now.
        return None if staging.is_staged(storage, task.key) else _do(worker, storage, task, run, report)
    finally:
        leases.release_claim(storage, task.key, run)


def _do(worker: Worker, storage: Storage, task: Task, run: str, report: Report) -> Staged | None:
    try:
        staged = worker(task, run, report)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the panic of a library in Rust, which no other process knows the class of
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return staged if staged is not None and staging.stage(storage, staged) else None


def perform_reporting(worker: Worker, storage: Storage, task: Task, run: str, update: Update) -> Staged | None:
    """As ``perform``; what is done changes the progress, and is subtracted again if it comes to nothing."""
    done = 0

    def report(units: int) -> None:
        nonlocal done
        interrupts.check()
        done += units
        update(units, 0, worker.note() if isinstance(worker, Notes) else "")

    try:
        staged = perform(worker, storage, task, run, report)
    except BaseException:
        update(-done, 0, "")
        raise
    if staged is None:
        update(-done, task.weight, "")
    return staged
