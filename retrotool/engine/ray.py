"""A pool that runs tasks on a Ray cluster.

On every node there is an actor per GPU, or for work on CPUs one per node, or per group of cores if the stage
wants fewer (``worker_cores``). An actor opens the stage once and gets one task at a time, or as many as the
stage has in flight. Only tasks and short answers pass through Ray: results are staged in the store, so that
nothing is lost with an actor, a node or the driver.

Ray restarts nothing. The pool looks at the nodes every few seconds, makes actors on those that join, and
replaces those that died. Tasks of a dead actor go back to the list. They count as failed only if their node
is still alive: a lost node is no fault of its tasks. A node on which the stage can't be opened three times in
a row is left alone; when no other is left, the reason is raised.

GPU work uses the nodes with GPUs, if the cluster has any. Other work then prefers the nodes without, so that
both can run at once.

What it does not do: nodes must see the store, and the inputs and models that a command names, at the same
places, and have the same version of retrotool and the credentials. ``RETROTOOL_...`` variables of the driver
are passed on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from retrotool.encoder.devices import find_devices
from retrotool.engine.engines import Engine, no_cluster
from retrotool.engine.progress import Progress
from retrotool.engine.task import NodeLostError, Stage, Task, TaskResult, perform
from retrotool.errors import TaskError
from retrotool.lazy import leave_pandas_out
from retrotool.machine import use_cores
from retrotool.store.storage import Storage
from retrotool.store.store import Store

WAIT_SECONDS = 5.0  # for a task to end, before nodes and progress are looked at
_LOOK_SECONDS = 2.0  # between two looks at the nodes
_OPENINGS = 3  # failures in a row after which a node is left alone
_MOST_IN_FLIGHT = 8
LOSS_SECONDS = 10.0  # after which a dead actor's node is taken for alive: Ray has noticed by then that it is not


@dataclass(frozen=True, slots=True)
class _Share:
    """What each actor on a node gets, and how many actors the node has room for."""

    actors: int
    cores: int
    gpus: int


class RayWorker:
    """The process of an actor: opens a stage, and does tasks in threads of its own.

    ``folder`` and ``variables`` are the driver's working directory and its settings.
    """

    def __init__(
        self, stage: Stage, storage: Storage, run: str, folder: str, variables: Mapping[str, str], number: int,
        share: _Share,
    ) -> None:  # fmt: skip
        self._reported, self._lock = [0, 0], threading.Lock()
        leave_pandas_out()
        with contextlib.suppress(OSError):  # relative paths are those of the driver
            os.chdir(folder)
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        place = partial(use_cores, share.cores, number if share.actors > 1 else None)
        place()
        try:
            own: Any = stage
            devices = getattr(stage, "devices", ())
            if devices and "devices" in {one.name for one in dataclasses.fields(own)}:
                own = dataclasses.replace(own, devices=(find_devices(devices[0])[0],))
            opened = own.open(Store.open(storage))
            self._perform = partial(perform, opened, storage, run=run, update=self._update)
            self._opened: int | BaseException = min(getattr(own, "in_flight", 1), _MOST_IN_FLIGHT)
            self._threads = ThreadPoolExecutor(self._opened, "retrotool-task", place)
        except Exception as error:
            self._opened = _portable(error)

    def opened(self) -> int | BaseException:
        """Return how many tasks to give at a time, or why the stage can't be opened."""
        return self._opened

    def do(self, task: Task) -> tuple[TaskResult, tuple[int, int]]:
        """Do a task; return its result, or the error, and the progress since it was last asked for."""
        try:
            result = self._threads.submit(self._perform, task).result()
        except Exception as error:
            result = _portable(error)
        return result, self.reported()

    def _update(self, done: int, elsewhere: int) -> None:
        with self._lock:
            self._reported[0] += done
            self._reported[1] += elsewhere

    def reported(self) -> tuple[int, int]:
        """Return the units done since the last call, by this worker and by others."""
        with self._lock:
            done, elsewhere = self._reported
            self._reported = [0, 0]
        return done, elsewhere


def _portable(error: BaseException) -> BaseException:
    """Return the error, or one that says the same, if other processes can't unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  its own
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass(eq=False, slots=True)
class _Actor:
    """An actor: on ``node`` it is the ``number``-th. ``asked``: when its progress was asked for last."""

    handle: Any
    node: str
    number: int
    tasks: int = 0  # in flight
    asked: float = 0.0
    is_lost: bool = False


class RayPool:
    """The actors of a stage; a context manager that connects to the cluster, and ends them."""

    def __init__(self, engine: Engine, stage: Stage, store: Store, run: str, progress: Progress) -> None:
        self._engine, self._open = engine, contextlib.ExitStack()
        self._stage, self._progress = stage, progress
        self.most = 0  # actors to make: as many as there are tasks
        here = {name: value for name, value in os.environ.items() if name.startswith("RETROTOOL_")}
        self._arguments = (stage, store.storage, run, str(Path.cwd()), here)
        self._nodes: dict[str, Mapping[str, float]] = {}  # resources of the live nodes
        self._looked = float("-inf")
        self._actors: dict[tuple[str, int], _Actor] = {}  # those that may be alive, by node and number
        self._failures, self._why = Counter[str](), dict[str, BaseException]()  # openings that failed in a row, by node
        self._opening: dict[Any, _Actor] = {}  # references to answers
        self._asked: dict[Any, _Actor] = {}
        self._calls: dict[Any, tuple[_Actor, Task]] = {}
        # Dead actors, until it is known whether their node is dead, too; without a task they were opening.
        self._unclear: list[tuple[float, _Actor, Task | None, RayError]] = []
        self.idle: deque[_Actor] = deque()  # an entry for each task that may begin

    @property
    def busy(self) -> bool:
        """Whether there are tasks that ``finished`` has not yielded."""
        return bool(self._calls or any(task is not None for _, _, task, _ in self._unclear))

    def begin(self, task: Task) -> None:
        """Give a task to the actor that has waited longest."""
        actor = self.idle.popleft()
        actor.tasks += 1
        self._calls[actor.handle.do.remote(task)] = actor, task

    def finished(self) -> Iterator[tuple[Task, TaskResult]]:
        """Wait up to ``WAIT_SECONDS`` for something to happen; yield the tasks that have ended."""
        self._look_at_nodes()
        self._ask_for_progress()
        wanted = [*self._opening, *self._asked, *self._calls]
        if not wanted:
            self._progress.plan(0, "waiting for a node of the Ray cluster")
            time.sleep(_LOOK_SECONDS)
        elif ray.wait(wanted, timeout=min(WAIT_SECONDS, _LOOK_SECONDS if self._unclear else WAIT_SECONDS))[0]:
            for answer in ray.wait(wanted, num_returns=len(wanted), timeout=0)[0]:
                yield from self._take(answer)
        yield from self._clarified()

    def _take(self, answer: Any) -> Iterator[tuple[Task, TaskResult]]:
        """Take note of an answer of an actor; yield the task that it ends, if any."""
        actor, task = self._calls.pop(answer, (None, None))
        actor = actor or self._opening.pop(answer, None) or self._asked.pop(answer)
        is_opening = task is None and actor.asked == 0
        try:
            found = ray.get(answer)
        except RayError as error:
            self._lose(actor)
            if task is not None or is_opening:
                self._unclear.append((time.monotonic() + LOSS_SECONDS, actor, task, error))
            return
        if task is not None:
            actor.tasks -= 1
            self.idle.append(actor)
            self._progress.update(*found[1])
            yield task, found[0]
        elif not is_opening:
            self._progress.update(*found)
        elif isinstance(found, BaseException):
            self._lose(actor)
            self._note_opening(actor, found)
        else:
            self._failures[actor.node] = 0
            actor.asked = time.monotonic()
            self.idle.extend([actor] * found)

    def _note_opening(self, actor: _Actor, error: BaseException) -> None:
        """Count a failure to open the stage on a node; raise the reason if it fails on all that there are."""
        self._failures[actor.node] += 1
        self._why[actor.node] = error
        usable = self._shares()
        if usable and not self._actors and all(self._failures[node] >= _OPENINGS for node in usable):
            if isinstance(error, RayError):
                why = str(error).strip().splitlines()[-1]
                raise TaskError(f"{self._stage.name}: the workers on Ray end when they start: {why}") from error
            raise error

    def _lose(self, actor: _Actor) -> None:
        """Stop using an actor; another one is made in its place if its node is alive."""
        if not actor.is_lost:
            actor.is_lost = True
            self.idle = deque(other for other in self.idle if other is not actor)
            self._actors.pop((actor.node, actor.number))
            ray.kill(actor.handle)

    def _clarified(self) -> Iterator[tuple[Task, TaskResult]]:
        """Yield the tasks of dead actors, once it is known whether their nodes are dead, too."""
        unclear, self._unclear = self._unclear, []
        for until, actor, task, error in unclear:
            is_node_lost = actor.node not in self._nodes
            if not is_node_lost and time.monotonic() <= until:
                self._unclear.append((until, actor, task, error))
            elif task is not None:
                yield task, NodeLostError() if is_node_lost else BrokenExecutor("its worker was killed")
            elif not is_node_lost:
                self._note_opening(actor, error)

    def _look_at_nodes(self) -> None:
        """Make the actors that are missing on live nodes: first one on each, then the second of each."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        self._nodes = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
        shares = {node: share for node, share in self._shares().items() if self._failures[node] < _OPENINGS}
        for number in range(max((share.actors for share in shares.values()), default=0)):
            for node, share in shares.items():
                if number < share.actors and len(self._actors) < self.most and (node, number) not in self._actors:
                    self._make(node, number, share)

    def _shares(self) -> dict[str, _Share]:
        """Return what actors get on the nodes that this stage uses."""
        with_gpus = {node: int(found["GPU"]) for node, found in self._nodes.items() if found.get("GPU", 0) >= 1}
        cores = {node: int(found["CPU"]) for node, found in self._nodes.items() if found.get("CPU", 0) >= 1}
        device = next(iter(getattr(self._stage, "devices", ())), "cpu")
        if device == "cuda" or (device != "cpu" and with_gpus):
            return {node: _Share(n, max(1, cores.get(node, 1) // n), 1) for node, n in with_gpus.items()}
        each = getattr(self._stage, "worker_cores", 0)
        needed = getattr(self._stage, "worker_bytes", 0)
        shares = {}
        for node, n in ({node: n for node, n in cores.items() if node not in with_gpus} or cores).items():
            room = int(self._nodes[node].get("memory", 0)) // 2 // needed if needed else n
            shares[node] = _Share(max(1, min(n // each, room)) if each else 1, each or n, 0)
        return shares

    def _make(self, node: str, number: int, share: _Share) -> None:
        options = {
            "num_cpus": 0 if share.gpus else share.cores, "num_gpus": share.gpus, "max_restarts": 0,
            "max_task_retries": 0, "max_concurrency": _MOST_IN_FLIGHT + 1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }  # fmt: skip
        made: Any = ray.remote(RayWorker)
        handle = made.options(**options).remote(*self._arguments, number, share)
        self._actors[node, number] = actor = _Actor(handle, node, number)
        self._opening[handle.opened.remote()] = actor

    def _ask_for_progress(self) -> None:
        due = time.monotonic() - WAIT_SECONDS
        waited = set(self._asked.values())
        for actor in self._actors.values():
            if actor.tasks and actor.asked < due and actor not in waited:
                actor.asked = time.monotonic()
                self._asked[actor.handle.reported.remote()] = actor

    def __enter__(self) -> RayPool:
        self._open.enter_context(connected(self._engine))
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            for actor in self._actors.values():
                ray.kill(actor.handle)


_pools, _connecting = 0, threading.Lock()  # pools that are open
_connection = contextlib.ExitStack()  # what to undo after the last of them


@contextlib.contextmanager
def connected(engine: Engine) -> Iterator[None]:
    """Connect to the cluster, if this process is not connected yet; ``UsageError`` if there is none.

    Ray prints on stdout what it has to say. It goes to stderr, as stdout is for results.
    """
    global _pools
    with _connecting:
        if not _pools:
            if not ray.is_initialized():
                address = engine.address or "auto"
                try:
                    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
                except (OSError, RuntimeError, ValueError) as error:
                    raise no_cluster(address, error) from error
                _connection.callback(ray.shutdown)
            _connection.enter_context(contextlib.redirect_stdout(sys.stderr))
        _pools += 1
    try:
        yield
    finally:
        with _connecting:
            _pools -= 1
            if not _pools:
                _connection.close()
