"""Leases: which runs are writing to a store, whether they are still alive, and which tasks they work on.

A run writes ``leases/run-<id>`` when it starts, renews it every 30 seconds, and removes it when it ends.
Every file that it writes carries its id. As clocks of machines differ, ages are by the storage's clock,
relative to a lease that was just written. On the same boot of the same machine, the end of a process is
noticed at once.

A claim, ``leases/<task>-<epoch>``, keeps two runs from doing the same task. It is made by put-if-absent and
counts while its run is alive. A run that finds a dead run's claim makes the claim of the next epoch.

Leases save time; safety does not depend on them. A task that two runs do is staged once. Before clean-up
removes files of a run that is only silent, and may wake up, it commits a fence: then that run can't commit,
and what it stages is dropped (``retrotool.store.gc``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from retrotool.errors import CorruptError, LostRunError, StorageError
from retrotool.store import schema, specs
from retrotool.store.storage import Storage

BEAT_SECONDS = 30.0
CLAIM_SILENCE_SECONDS = 300.0  # after this silence a run of another machine has lost its claims
SILENCE_SECONDS = 3600.0  # how long to wait for a silent run of another machine
LAPSED_SECONDS = 12 * 3600.0  # a run whose own lease is this old stops writing
DEAD_SECONDS = 24 * 3600.0  # after this silence clean-up removes what a run of another machine left
_LAPSED = b"\n"  # the end of a lapsed lease
RUN_PATH = re.compile(r"leases/run-(?P<run>[0-9a-f]{8})")
CLAIM_PATH = re.compile(r"leases/(?P<task>[0-9a-f]{32})-(?P<epoch>\d{8})")


def _text_of(read: Callable[[], object]) -> str:
    try:
        return str(read()).strip()
    except OSError:
        return ""


def _start_time(process: int) -> str:
    """Return when a process started, in the kernel's unit; "" if it does not exist or there is no /proc."""
    fields = _text_of(Path(f"/proc/{process}/stat").read_text).rpartition(")")[2].split()
    # A zombie has ended. In containers without an init process it stays in the table.
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _here() -> dict[str, str]:
    return {
        "host": socket.gethostname(),
        "boot": _text_of(Path("/proc/sys/kernel/random/boot_id").read_text),
        "namespace": _text_of(Path("/proc/self/ns/pid").readlink),
    }


@dataclass(slots=True)
class Run:
    """A running command that writes; a context manager that holds its lease."""

    storage: Storage
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    _stop: threading.Event = field(default_factory=threading.Event)
    _heart: threading.Thread | None = None

    def __enter__(self) -> Run:
        process = os.getpid()
        fields = {"run": self.id, **_here(), "process": process, "started": _start_time(process)}
        self.storage.overwrite(run_path(self.id), self.id, orjson.dumps(fields))
        self._heart = threading.Thread(target=self._beat, name="retrotool-heartbeat", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join()  # another beat would write the lease again
        if isinstance(error, FileNotFoundError) and self.storage.stat(run_path(self.id)) is None:
            raise _lost(self.storage) from error  # clean-up removed the file it was writing
        self.storage.delete([run_path(self.id)])

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, StorageError, LostRunError):  # the next beat may succeed
                renew(self.storage, self.id)


def _lost(storage: Storage) -> LostRunError:
    return LostRunError(f"{storage.place}: another process took this run for dead and removed its uncommitted files")


def run_path(run: str) -> str:
    """Return the path of a run's lease."""
    return f"leases/run-{run}"


def with_leases(storage: Storage) -> list[str]:
    """Return the ids of the runs that have a lease."""
    return [match["run"] for info in storage.list("leases/run-") if (match := RUN_PATH.fullmatch(info.path))]


def others(storage: Storage, run: str) -> list[str]:
    """Return the ids of the other runs that may still be writing."""
    now = renew(storage, run)
    return [other for other in with_leases(storage) if other != run and is_alive(storage, other, now=now)]


def renew(storage: Storage, run: str) -> float:
    """Renew the lease of a run; return the time by the storage's clock.

    ``LostRunError`` if it was removed or has lapsed. A lapsed lease is marked for all processes of the run,
    and kept: only after a fence may the run's files be removed.
    """
    path = run_path(run)
    try:
        data, before = storage.read(path)
    except FileNotFoundError:
        raise _lost(storage) from None
    if data.endswith(_LAPSED):
        raise _lost(storage)
    now = storage.overwrite(path, run, data).modified
    if now - before.modified > LAPSED_SECONDS:
        storage.overwrite(path, run, data + _LAPSED)
        raise _lost(storage)
    return now


def is_alive(storage: Storage, run: str, *, now: float, silence: float = SILENCE_SECONDS) -> bool:
    """Return whether a run may still be writing: it is running, or was silent for less than ``silence``."""
    silent = silence_of(storage, run, now)
    return silent is not None and silent < silence


def silence_of(storage: Storage, run: str, now: float) -> float | None:
    """Return a run's silence at ``now`` in seconds; 0 if its process is running, None if it has ended."""
    try:
        lease, info = storage.read(run_path(run))
    except FileNotFoundError:
        return None
    here = is_here(lease)
    if here is not None:
        return 0.0 if here else None
    return now - info.modified


def is_here(lease: bytes) -> bool | None:
    """Return whether the process of a lease is running; None if it is on another machine or unknown."""
    try:
        fields = schema.load(lease, specs.LEASE, "")
    except CorruptError:
        return None
    if any(fields[key] != value for key, value in _here().items()):
        return None
    process, started = fields["process"], fields["started"]
    if started:
        return bool(started == _start_time(process))
    try:
        with contextlib.suppress(PermissionError):
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def take_claim(storage: Storage, task: str, run: str) -> bool:
    """Claim a task for a run; False if a live run has it."""
    while True:
        last, owner = _newest_claim(storage, task)
        if owner == run:  # left by a worker of this run that was killed
            return True
        if owner and is_alive(storage, owner, silence=CLAIM_SILENCE_SECONDS, now=renew(storage, run)):
            return False
        if not storage.put_if_absent(_claim_path(task, last + 1), run, orjson.dumps({"run": run})):
            return False
        # If the owner gave it back before it ended, others begin with the first epoch again.
        if last < 0 or claimer(storage, _claim_path(task, last)) == owner:
            return True
        storage.delete([_claim_path(task, last + 1)])


def release_claim(storage: Storage, task: str, run: str) -> None:
    """Release the run's claim on a task."""
    last, owner = _newest_claim(storage, task)
    if owner == run:
        # Newest last. Else a run that finds an older claim and one that finds none would both claim.
        storage.delete(_claim_path(task, epoch) for epoch in range(last + 1))


def claim_holders(storage: Storage, run: str) -> dict[str, str]:
    """Return the keys of tasks that other live runs have claimed, and which run has each."""
    now = renew(storage, run)
    alive = functools.cache(lambda owner: is_alive(storage, owner, silence=CLAIM_SILENCE_SECONDS, now=now))
    newest = {match["task"]: match[0] for info in storage.list("leases/") if (match := CLAIM_PATH.fullmatch(info.path))}
    owners = ((task, claimer(storage, path)) for task, path in newest.items())
    return {task: owner for task, owner in owners if owner and owner != run and alive(owner)}


def describe_run(storage: Storage, run: str) -> str:
    """Return a run's id, with its process and machine if its lease can be read."""
    try:
        fields = schema.load(storage.get(run_path(run)), specs.LEASE, "")
    except (CorruptError, FileNotFoundError):
        return f"run {run}"
    return f"run {run} (process {fields['process']} on {fields['host']})"


def _newest_claim(storage: Storage, task: str) -> tuple[int, str]:
    """Return epoch and run of a task's newest claim; −1 and "" without one."""
    while True:
        last, path = -1, ""
        for info in storage.list(f"leases/{task}-"):
            if match := CLAIM_PATH.fullmatch(info.path):
                last, path = int(match["epoch"]), info.path
        if not path:
            return -1, ""
        # Otherwise it was just released, and another run may have made a new first claim.
        if (owner := claimer(storage, path)) is not None:
            return last, owner


def claimer(storage: Storage, path: str) -> str | None:
    """Return the run that made a claim; "" if it can't be read, None if it was released."""
    try:
        return str(schema.load(storage.get(path), specs.CLAIM, "")["run"])
    except CorruptError:
        return ""
    except FileNotFoundError:
        return None


def _claim_path(task: str, epoch: int) -> str:
    return f"leases/{task}-{epoch:08d}"
