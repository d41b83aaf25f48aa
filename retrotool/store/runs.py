"""Runs: who is writing to a store, whether they are still alive, and which tasks they are at.

A run writes ``staging/run-<id>.json`` when it starts and touches it every 30 seconds; every file it writes carries its
id. Clean-up may remove what a dead run left. A run is dead if its process has ended on the same host, boot and process
namespace; of another machine's run only an hour of silence can be seen, and so of a run whose file can't be read.
Silence is measured by the clock of the file system: clocks of machines differ.

A run that only slept may be taken for dead. It finds its file removed, and must not commit or stage anything then
(``beat``); ``store.clean`` says why that is enough.

A claim, the empty file ``staging/claims/<task key>-<run>``, keeps two runs from the same task. A run makes its claim
first and then looks whether a live run has another: of two that meet, at least the later one sees the other and steps
back. Nothing but time depends on claims: a task that two runs do is staged once. So minutes of silence of another
machine's run are enough here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import orjson

from retrotool.errors import LostRunError
from retrotool.store import atomic, disk, paths

HEARTBEAT_SECONDS = 30.0
SILENCE_SECONDS = 3600.0
GONE = (errno.ENOENT, errno.ESTALE)
"""What the system says of a file that another process, or machine, has removed."""


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
    """A writing command at work on ``root``; a context manager that says so for as long as it lasts.

    ``links``: whether the file system has hard links. That of a store has; where else a run is at work, it need not.
    """

    root: Path
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    _stop: threading.Event = field(default_factory=threading.Event)
    links: bool = True

    @property
    def path(self) -> Path:
        """The file by which others see this run."""
        return run_path(self.root, self.id)

    def __enter__(self) -> Run:
        process = os.getpid()
        fields = {**_here(), "process": process, "started": _start_time(process)}
        data = orjson.dumps(fields)
        if self.links:
            atomic.put_if_absent(self.path, paths.new_token(self.id), data)
        else:
            with atomic.temporary_file(self.path, paths.new_token(self.id)) as temporary:
                disk.write(temporary, data)
                disk.rename(temporary, self.path)
        threading.Thread(target=self._beat, name="retrotool-heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if isinstance(error, FileNotFoundError) and not self.path.exists():
            raise _lost(self.root) from error  # what it was writing was removed
        disk.unlink(self.path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a beat may be missed, the next may not
                os.utime(self.path)


def _lost(root: Path) -> LostRunError:
    return LostRunError(f"{root}: another process took this run for dead, and removed what it had not committed")


def run_path(root: Path, run: str) -> Path:
    """Where the run with this id would say that it lives."""
    return paths.inside(root, f"staging/run-{run}.json")


def others(root: Path, run: str) -> list[str]:
    """Ids of the other runs that may still be writing."""
    now = beat(root, run)
    found = [path.stem.removeprefix("run-") for path in (root / "staging").glob("run-*.json")]
    return [other for other in found if other != run and is_alive(root, other, now=now)]


def beat(root: Path, run: str) -> float:
    """Let a run give a sign of life; return its time by the clock of the file system, which all machines share.

    ``LostRunError`` if the run's file was removed. Over NFS, too, the server answers this, and no cache.
    """
    try:
        os.utime(run_path(root, run))
        return run_path(root, run).stat().st_mtime
    except OSError as error:
        if error.errno not in GONE:
            raise
        raise _lost(root) from error


def is_alive(root: Path, run: str, *, now: float, silence: float = SILENCE_SECONDS) -> bool:
    """Whether a run may still be writing.

    A run of another machine, and one whose file can't be read, is not after so many seconds of ``silence``. ``now`` is
    by the clock of the file system (``beat``).
    """
    path = run_path(root, run)
    try:
        silent = now - path.stat().st_mtime
        data = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
    try:
        fields = orjson.loads(data)
        here = all(fields[key] == value for key, value in _here().items())
        process, started = int(fields["process"]), str(fields["started"])
    except (KeyError, TypeError, ValueError):
        here = False
    if not here:
        return silent < silence
    return started == _start_time(process) if started else _exists(process)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


CLAIM_SILENCE_SECONDS = 300.0
"""A run of another machine that has not touched its file for so long has lost its claims."""
_CLAIM_TRIES = 5
_STEP_BACK_SECONDS = 0.05


def take_claim(root: Path, task: str, run: str) -> bool:
    """Claim a task for a run; False if a living run has it."""
    own = _claim_path(root, task, run)
    for _ in range(_CLAIM_TRIES):
        if task in claimed_elsewhere(root, run):
            return False
        with disk.told(own), contextlib.suppress(FileExistsError):  # a worker of this run that was killed had it
            disk.make_directory(own.parent)
            disk.write(own, b"")
        if task not in claimed_elsewhere(root, run):
            return True
        disk.unlink(own)
        time.sleep(random.uniform(0, _STEP_BACK_SECONDS))  # noqa: S311 - both stepped back, perhaps
    return False


def release_claim(root: Path, task: str, run: str) -> None:
    """Give a claim back."""
    disk.unlink(_claim_path(root, task, run))


def claimed_elsewhere(root: Path, run: str) -> frozenset[str]:
    """Keys of the tasks that other live runs have claimed."""
    alive: dict[str, bool] = {run: False}
    found = set()
    now = beat(root, run)
    try:
        names = [path.name for path in paths.inside(root, "staging/claims").iterdir()]
    except OSError as error:
        if error.errno not in GONE:
            raise
        return frozenset()
    for name in names:
        task, _, other = name.rpartition("-")
        if other not in alive:
            alive[other] = is_alive(root, other, silence=CLAIM_SILENCE_SECONDS, now=now)
        if alive[other]:
            found.add(task)
    return frozenset(found)


def _claim_path(root: Path, task: str, run: str) -> Path:
    return paths.inside(root, f"staging/claims/{task}-{run}")
