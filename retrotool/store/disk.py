"""The file operations that durability rests on. Each is announced before it happens.

Every call raises the audit event ``retrotool.disk`` (``sys.audit``) with its name and path. Tests listen with
``sys.addaudithook`` to kill the process, or to fail, at a chosen call. Without a hook this costs nothing.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrotool.errors import StorageError

EVENT = "retrotool.disk"


def announce(operation: str, path: Path) -> None:
    """Raise the audit event of an ``operation`` that is about to happen to ``path``."""
    sys.audit(EVENT, operation, os.fspath(path))


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors that a person can act on (disk full, read-only, no permission) into ``StorageError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space and run the same command again: it resumes where it stopped."
            raise StorageError(f"{path}: no space left; earlier commits are unchanged", advice) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"{path}: {os.strerror(error.errno)}", "Check the store's permissions.") from error
        raise


def fsync(path: Path) -> None:
    """Make the file's content durable."""
    announce("fsync", path)
    _sync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    announce("fsync_directory", path)
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """Write a new file; it must not exist."""
    announce("write", path)
    with path.open("xb") as file:
        file.write(data)


def rename(source: Path, target: Path) -> None:
    """Rename a file within its directory, atomically."""
    announce("rename", target)
    source.rename(target)


def link(source: Path, target: Path) -> bool:
    """Give ``source`` a second name; False if the name is taken (a put-if-absent)."""
    announce("link", target)
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise StorageError(
                f"{target.parent}: this file system has no hard links, which safe commits require",
                "Put the store on a local disk, NFS, Lustre or GPFS; not on FAT or a mounted object store.",
            ) from error
        raise
    return True


def unlink(path: Path) -> None:
    """Remove a name, if it exists."""
    with storage_errors(path):
        announce("unlink", path)
        path.unlink(missing_ok=True)


def unlink_all(paths: Iterable[Path]) -> None:
    """Remove names durably: after a power cut none of them reappears."""
    folders: dict[Path, None] = {}  # in order, without repeats
    for path in paths:
        unlink(path)
        folders[path.parent] = None
    for folder in folders:
        if folder.is_dir():
            with storage_errors(folder):
                fsync_directory(folder)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably, if they do not exist."""
    if path.is_dir():
        return
    make_directory(path.parent)
    announce("mkdir", path)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)
