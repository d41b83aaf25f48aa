"""Runs: who is writing to a store, and whether they are still alive.

A run writes ``staging/run-<id>.json`` when it starts and touches it every 30 seconds; every file it writes carries its
id. Clean-up may take away what a dead run left. A run is dead if its process is gone on the same host, boot and process
namespace; of another machine's run only an hour of silence can be seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import orjson

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
        disk.unlink(self.path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a beat may be missed, the next may not
                os.utime(self.path)


def run_path(root: Path, run: str) -> Path:
    """Where the run with this id would say that it lives."""
    return root / "staging" / f"run-{run}.json"


def living(root: Path) -> list[str]:
    """Ids of the runs that may still be writing."""
    found = [path.stem.removeprefix("run-") for path in (root / "staging").glob("run-*.json")]
    return [run for run in found if is_alive(root, run)]


def beat(root: Path, run: str) -> float:
    """Let a run give a sign of life; return its time by the clock of the file system, which all machines share."""
    try:
        os.utime(run_path(root, run))
        return run_path(root, run).stat().st_mtime
    except OSError as error:
        if error.errno not in GONE:
            raise
        return time.time()


def is_alive(root: Path, run: str, *, silence: float = SILENCE_SECONDS, now: float | None = None) -> bool:
    """Whether a run may still be writing; one of another machine is not after so many seconds of ``silence``.

    ``now`` is by the clock of the file system; without it this machine's clock is taken.
    """
    path = run_path(root, run)
    try:
        fields = orjson.loads(path.read_bytes())
        silent = (time.time() if now is None else now) - path.stat().st_mtime
    except orjson.JSONDecodeError:
        return False
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
    if all(fields.get(key) == value for key, value in _here().items()):
        started = _start_time(int(fields["process"]))
        return started != "" and started == fields["started"] if fields["started"] else _exists(int(fields["process"]))
    return silent < silence


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
