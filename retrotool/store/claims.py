"""Who is at which task, so that runs that share a store do not do the same one twice.

A claim is an empty file, ``staging/claims/<task key>-<run>``. A run makes its claim first and then looks whether a
living run has another: of two that meet, at least the later one sees the other and steps back. Nothing but time depends
on claims: a task that two runs do is staged once. So a run of another machine is taken for dead after minutes of
silence here, by the clock of the file system, and only after an hour where its files are at stake.

Cost: a file made, a listing of a folder with a few files a run, and a file removed.
"""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

from retrotool.store import disk, paths, runs

SILENCE_SECONDS = 300.0
"""A run of another machine that has not touched its file for so long has lost its claims."""
_TRIES = 5
_STEP_BACK_SECONDS = 0.05


def claims_folder(root: Path) -> Path:
    """Where claims lie."""
    return paths.inside(root, "staging/claims")


def owner(name: str) -> str:
    """The run that made the claim of this name."""
    return name.rpartition("-")[2]


def take(root: Path, task: str, run: str) -> bool:
    """Claim a task for a run; False if a living run has it."""
    own = _path(root, task, run)
    for _ in range(_TRIES):
        if _others(root, task, run):
            return False
        with disk.told(own), contextlib.suppress(FileExistsError):  # a worker of this run that was killed had it
            disk.make_directory(own.parent)
            disk.write(own, b"")
        if not _others(root, task, run):
            return True
        disk.unlink(own)
        time.sleep(random.uniform(0, _STEP_BACK_SECONDS))  # noqa: S311 - both stepped back, perhaps
    return False


def release(root: Path, task: str, run: str) -> None:
    """Give a claim back."""
    disk.unlink(_path(root, task, run))


def held(root: Path, run: str) -> frozenset[str]:
    """Keys of the tasks that other living runs have claimed."""
    alive: dict[str, bool] = {run: False}
    found = set()
    now = runs.beat(root, run)
    for name in _names(root):
        other = owner(name)
        if other not in alive:
            alive[other] = runs.is_alive(root, other, silence=SILENCE_SECONDS, now=now)
        if alive[other]:
            found.add(name.rpartition("-")[0])
    return frozenset(found)


def _path(root: Path, task: str, run: str) -> Path:
    return claims_folder(root) / f"{task}-{run}"


def _names(root: Path) -> list[str]:
    try:
        return [path.name for path in claims_folder(root).iterdir()]
    except OSError as error:
        if error.errno not in runs.GONE:
            raise
        return []


def _others(root: Path, task: str, run: str) -> bool:
    """Whether another living run has claimed a task."""
    rivals = [owner(name) for name in _names(root) if name.startswith(f"{task}-") and owner(name) != run]
    if not rivals:
        return False
    now = runs.beat(root, run)
    return any(runs.is_alive(root, rival, silence=SILENCE_SECONDS, now=now) for rival in rivals)
