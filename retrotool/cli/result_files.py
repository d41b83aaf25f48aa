"""Files and folders that commands write outside of stores: checked before work begins, written atomically.

They are written beside their destination under a hidden name, and renamed once complete. A folder's hidden
name has the id of a run, so that the next run for the same destination removes what killed runs left. Runs
hold leases as in a store (``store.leases``), so concurrent runs don't disturb each other.
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
from retrotool.store import disk, leases
from retrotool.store.identity import FILE as IDENTITY
from retrotool.store.leases import Run
from retrotool.store.local_storage import LocalStorage

_RUN = re.compile("[0-9a-f]{8}")
_SETTLED_SECONDS = 60.0  # the longest that a folder is without a run while it is created or finished


def check_file(option: str, file: str | Path, *, new: bool = False) -> None:
    """Raise ``UsageError`` unless ``file`` can be written: its folder exists, and it is not in a store.

    ``new``: it must not exist. In a store it could replace one of its files, and an erase would not reach its
    text.
    """
    path = Path(file)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {file}: the folder {folder} does not exist", "Create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{option} {file}: {folder} is not writable", "Name a file in another folder.")
    if path.is_dir():
        raise UsageError(f"{option} {file} is a folder", "Name a file in it.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {file} is a device or a pipe, not a file", "Name a file.")
    if new and path.exists():
        raise UsageError(f"{option} {file} exists already", "Name a new file.")
    check_outside(option, file, "file")


def check_outside(option: str, path: str | Path, kind: str) -> None:
    """Raise ``UsageError`` if ``path``, a file or folder (``kind``), is in a store."""
    for above in Path(path).resolve().parents:
        if (above / IDENTITY).exists():
            raise UsageError(f"{option} {path} is in the store {above}", f"Name a {kind} outside of it.")


@contextmanager
def written(file: str | Path) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; it replaces ``file`` at the end, unless there is an error.

    ``StorageError`` if the file can't be written, for example because the disk is full.
    """
    path = Path(file)
    scratch, folder = path.with_name(f".{path.name}.{os.getpid()}"), path.absolute().parent
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        # Errors about the scratch file or its folder are reported for ``file``.
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if error.filename is not None and (named is None or named.absolute() not in (scratch.absolute(), folder)):
            raise
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def check_place(option: str, path: str | Path) -> Path:
    """Return the absolute path of a new folder.

    ``UsageError`` if it exists and is not an empty folder, its parent is missing, or it is in a store.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {target.parent} does not exist", "Create it first.")
    check_outside(option, path, "folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise UsageError(f"{option} {path} is a file", "Name a new folder.")
    if any(target.iterdir()):
        raise UsageError(f"{option} {path} is not empty", "Name a new folder, or remove this one.")
    if target.is_mount() or target == Path.cwd():
        raise UsageError(f"{option} {path} can't be replaced", "Name a folder in it.")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``target`` at the end, unless there is an error."""
    with tempfile.TemporaryFile(dir=target.parent) as file:
        now = os.fstat(file.fileno()).st_mtime  # the file system's clock
    prefix = f".{target.name}.export-"
    for left in target.parent.iterdir():
        run = left.name.removeprefix(prefix)
        if run != left.name and _RUN.fullmatch(run) and left.is_dir() and _is_dead(left, run, now):
            shutil.rmtree(left, ignore_errors=True)
    run = secrets.token_hex(4)
    scratch = target.with_name(f"{prefix}{run}")
    try:
        with Run(LocalStorage(str(scratch)), run):
            yield scratch
            for path in sorted(scratch.iterdir()):
                if path.is_file():
                    disk.fsync(path)
        (scratch / "leases").rmdir()
        disk.fsync_directory(scratch)
        disk.rename(scratch, target)
        disk.fsync_directory(target.parent)
    except OSError as error:
        renamed = error.filename2 is not None
        if renamed and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            advice = "Remove it, or name another folder, and run the command again."
            raise UsageError(f"{target} was made by another process", advice) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space and run the same command again."
            raise StorageError(f"{target}: no space left; nothing of it was kept", advice) from error
        if error.filename is None and error.errno is not None:  # a write
            why = os.strerror(error.errno)
            raise StorageError(f"{target} can't be written: {why}; nothing of it was kept") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_dead(left: Path, run: str, now: float) -> bool:
    storage = LocalStorage(str(left))
    file = left / leases.run_path(run)
    # A run that ends removes its file first: if that is missing after the check, the run may have been alive.
    if file.exists() and not leases.is_alive(storage, run, now=now) and file.exists():
        return True
    return not file.exists() and now - left.stat().st_mtime > _SETTLED_SECONDS
