"""A folder that is there with all its files, or not at all.

It is written beside its place, under a hidden name with the id of the run, and renamed when it is whole: a kill leaves
nothing under its name. The next run for the same place removes what killed runs left; whether a run is alive is decided
as in a store (``store.runs``), so two runs at once don't disturb one another.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrotool.errors import StorageError, UsageError
from retrotool.store import disk, runs
from retrotool.store.runs import Run

_RUN = re.compile("[0-9a-f]{8}")
_SETTLED_SECONDS = 60.0
"""For how long at most a folder is without a run while it is created, or finished."""


def check_place(option: str, path: str | Path) -> Path:
    """Return the absolute path of a new folder; ``UsageError`` if something is there, or its parent is missing."""
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {target.parent}", "Make it first.")
    if not target.exists():
        return target
    if not target.is_dir():
        raise UsageError(f"{option} {path} is a file", "Name a folder that is not there yet.")
    if any(target.iterdir()):
        raise UsageError(f"{option} {path} is not empty", "Name a folder that is not there yet, or remove this one.")
    if target.is_mount() or target == Path.cwd():
        raise UsageError(f"{option} {path} can't be replaced", "Name a folder in it.")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``target`` at the end, unless there is an error."""
    _clean(target)
    run = secrets.token_hex(4)
    scratch = target.with_name(f"{_prefix(target)}{run}")
    try:
        with Run(scratch, run, links=False):
            yield scratch
            for path in sorted(scratch.iterdir()):
                if path.is_file():
                    disk.fsync(path)
        (scratch / "staging").rmdir()
        disk.fsync_directory(scratch)
        _put(scratch, target)
        disk.fsync_directory(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{target}: no space left; nothing of it was kept", "Free some space and run the same command again."
            ) from error
        if error.filename is None and error.errno is not None:  # a write; else it names what it is of
            raise StorageError(
                f"{target} can't be written: {os.strerror(error.errno)}; nothing of it was kept"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(scratch: Path, target: Path) -> None:
    try:
        disk.rename(scratch, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(
                f"{target} was made by another process",
                "Remove it, or name another folder, and run the command again.",
            ) from error
        raise


def _prefix(target: Path) -> str:
    return f".{target.name}.export-"


def _clean(target: Path) -> None:
    """Remove what dead runs left."""
    with tempfile.TemporaryFile(dir=target.parent) as file:
        now = os.fstat(file.fileno()).st_mtime  # the time by the clock of the file system
    for left in target.parent.iterdir():
        run = left.name.removeprefix(_prefix(target))
        if run != left.name and _RUN.fullmatch(run) and left.is_dir() and _is_dead(left, run, now):
            shutil.rmtree(left, ignore_errors=True)


def _is_dead(left: Path, run: str, now: float) -> bool:
    file = runs.run_path(left, run)
    # A run that ends removes its file first: where that is missing after the check, it may have been alive.
    if file.exists() and not runs.is_alive(left, run, now=now) and file.exists():
        return True
    return not file.exists() and now - left.stat().st_mtime > _SETTLED_SECONDS
