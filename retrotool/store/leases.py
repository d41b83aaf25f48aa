"""Leases: who is writing to a store, whether they are still alive, and which tasks they are at.

A run writes ``leases/run-<id>`` when it starts, writes it again every 30 seconds, and removes it when it ends; every
file that it writes carries its id. Age is measured by the storage's clock, against a lease that was written just now:
clocks of machines differ. On the same boot of the same machine a process that has ended is known to be dead at once.

A claim, ``leases/<task>-<epoch>``, keeps two runs from the same task: it is made by put-if-absent, and counts as long
as its run is alive. Who finds that a claim's run is not makes the claim of the next epoch.

Nothing but time depends on any of this. A task that two runs do is staged once; and before clean-up removes anything
of a run that is only silent, and may wake, it has a commit made which says so: that run can't commit any more, nor is
what it stages (``retrotool.store.gc``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import orjson

from retrotool.errors import CorruptError, LostRunError
from retrotool.store import schema, specs
from retrotool.store.storage import Storage

BEAT_SECONDS = 30.0
SILENCE_SECONDS = 3600.0
"""A run of another machine that was silent for so long is not waited for."""
CLAIM_SILENCE_SECONDS = 300.0
"""A run of another machine that was silent for so long has lost its claims."""
LAPSED_SECONDS = 12 * 3600.0
"""A run that finds its own lease so old writes nothing any more."""
DEAD_SECONDS = 24 * 3600.0
"""What a run of another machine left is removed after such a silence."""
_LAPSED = b"\n"
"""Behind a lease that has lapsed."""
RUN_PATH = re.compile(r"leases/run-(?P<run>[0-9a-f]{8})")
CLAIM_PATH = re.compile(r"leases/(?P<task>[0-9a-f]{32})-(?P<epoch>\d{8})")


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_time(process: int) -> str:
    """When a process started, in the kernel's own unit; empty if it is not there (or there is no /proc)."""
    fields = _read_text(f"/proc/{process}/stat").rpartition(")")[2].split()
    # A zombie has ended; where nobody waits for it (containers without an init) it stays in the table.
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _here() -> dict[str, str]:
    return {
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
    }


@dataclass(slots=True)
class Run:
    """A writing command at work; a context manager that says so for as long as it lasts."""

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join()  # a last beat would write the lease again
        if isinstance(error, FileNotFoundError) and self.storage.stat(run_path(self.id)) is None:
            raise _lost(self.storage) from error  # what it was writing was removed
        self.storage.delete([run_path(self.id)])

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, LostRunError):  # a beat may be missed, the next may not
                renew(self.storage, self.id)


def _lost(storage: Storage) -> LostRunError:
    return LostRunError(
        f"{storage.place}: another process took this run for dead, and removed what it had not committed"
    )


def run_path(run: str) -> str:
    """Where the lease of a run lies."""
    return f"leases/run-{run}"


def others(storage: Storage, run: str) -> list[str]:
    """Ids of the other runs that may still be writing."""
    now = renew(storage, run)
    found = [match["run"] for info in storage.list("leases/run-") if (match := RUN_PATH.fullmatch(info.path))]
    return [other for other in found if other != run and is_alive(storage, other, now=now)]


def renew(storage: Storage, run: str) -> float:
    """Renew the lease of a run; return the time by the storage's clock.

    ``LostRunError`` if the lease was removed, or has lapsed. A lapsed one is marked, so that all processes of the run
    see it; it stays, as the run's files may only be removed after a fence.
    """
    path = run_path(run)
    before = storage.stat(path)
    try:
        data = storage.get(path)
    except FileNotFoundError:
        before = None
    if before is None or data.endswith(_LAPSED):
        raise _lost(storage)
    now = storage.overwrite(path, run, data).modified
    if now - before.modified > LAPSED_SECONDS:
        storage.overwrite(path, run, data + _LAPSED)
        raise _lost(storage)
    return now


def is_alive(storage: Storage, run: str, *, now: float, silence: float = SILENCE_SECONDS) -> bool:
    """Whether a run may still be writing.

    A run of another machine, and one whose lease can't be read, is not after so many seconds of ``silence``. ``now`` is
    by the storage's clock (``renew``).
    """
    silent = silence_of(storage, run, now)
    return silent is not None and silent < silence


def silence_of(storage: Storage, run: str, now: float) -> float | None:
    """For how many seconds a run has been silent, 0 if its process is there; None if it has ended."""
    info = storage.stat(run_path(run))
    try:
        here = is_here(storage.get(run_path(run)))
    except FileNotFoundError:
        return None
    if here is not None:
        return 0.0 if here else None
    return now - info.modified if info is not None else 0.0  # None: it begins just now


def is_here(lease: bytes) -> bool | None:
    """Whether the process of a lease is there; None if it is of another machine, or nobody can say."""
    try:
        fields = schema.load(lease, specs.LEASE, "")
    except CorruptError:
        return None
    if any(fields[key] != value for key, value in _here().items()):
        return None
    process, started = fields["process"], fields["started"]
    return started == _start_time(process) if started else _exists(process)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def take_claim(storage: Storage, task: str, run: str) -> bool:
    """Claim a task for a run; False if a live run has it."""
    last, owner = _newest_claim(storage, task)
    if owner == run:  # of a worker of this run that was killed
        return True
    if owner and is_alive(storage, owner, silence=CLAIM_SILENCE_SECONDS, now=renew(storage, run)):
        return False
    return storage.put_if_absent(_claim_path(task, last + 1), run, orjson.dumps({"run": run}))


def release_claim(storage: Storage, task: str, run: str) -> None:
    """Give a claim back."""
    last, owner = _newest_claim(storage, task)
    if owner == run:
        # The newest last: who finds an older one would make this epoch's claim beside the first of another.
        storage.delete(_claim_path(task, epoch) for epoch in range(last + 1))


def claimed_elsewhere(storage: Storage, run: str) -> frozenset[str]:
    """Keys of the tasks that other live runs have claimed."""
    now = renew(storage, run)
    alive = functools.cache(lambda owner: is_alive(storage, owner, silence=CLAIM_SILENCE_SECONDS, now=now))
    newest = {match["task"]: match[0] for info in storage.list("leases/") if (match := CLAIM_PATH.fullmatch(info.path))}
    owners = ((task, claimer(storage, path)) for task, path in newest.items())
    return frozenset(task for task, owner in owners if owner and owner != run and alive(owner))


def _newest_claim(storage: Storage, task: str) -> tuple[int, str]:
    """Epoch and run of the newest claim of a task; −1 and "" if there is none."""
    while True:
        last, path = -1, ""
        for info in storage.list(f"leases/{task}-"):
            if match := CLAIM_PATH.fullmatch(info.path):
                last, path = int(match["epoch"]), info.path
        if not path:
            return -1, ""
        # Else it was given back just now: another may have made the first one again.
        if (owner := claimer(storage, path)) is not None:
            return last, owner


def claimer(storage: Storage, path: str) -> str | None:
    """The run that a claim is of; "" if it can't be read, None if it was given back."""
    try:
        return str(schema.load(storage.get(path), specs.CLAIM, "")["run"])
    except CorruptError:
        return ""
    except FileNotFoundError:
        return None


def _claim_path(task: str, epoch: int) -> str:
    return f"leases/{task}-{epoch:08d}"
