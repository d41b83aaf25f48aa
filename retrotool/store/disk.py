"""The file operations that durability rests on, each announced before it happens.

Every call raises the audit event ``retrotool.disk`` (``sys.audit``) with its name and path. Tests listen with
``sys.addaudithook`` to kill the process, or to fail, at any chosen call; without a hook it costs nothing.
Nothing here knows what a store is.
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
    """Tell audit hooks that ``operation`` is about to happen to ``path``."""
    sys.audit(EVENT, operation, os.fspath(path))


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn the errors that a person can act on (disk full, read-only, no rights) into ``StorageError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: no space left; what was committed before is untouched",
                "Free some space and run the same command again: it goes on where it stopped.",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(f"{path}: {os.strerror(error.errno)}", "Check the rights on the store.") from error
        raise


def fsync(path: Path) -> None:
    """Make the file's content durable."""
    announce("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    announce("fsync_directory", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """Write a new file; it must not exist."""
    announce("write", path)
    with path.open("xb") as file:
        file.write(data)


def touch(path: Path) -> None:
    """Set the time at which a file was written to now."""
    announce("touch", path)
    os.utime(path)


def rename(source: Path, target: Path) -> None:
    """Rename within a directory, atomically."""
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
                f"{target.parent}: this file system has no hard links, so commits can't be made safe on it",
                "Put the store on a local disk, NFS, Lustre or GPFS; not on FAT or an object store mounted as a disk.",
            ) from error
        raise
    return True


def unlink(path: Path) -> None:
    """Remove a name; it may be gone already."""
    with told(path):
        announce("unlink", path)
        path.unlink(missing_ok=True)


def unlink_all(paths: Iterable[Path]) -> None:
    """Remove names, durably: after a power cut none of them is there again."""
    folders: dict[Path, None] = {}
    for path in paths:
        unlink(path)
        folders[path.parent] = None
    for folder in folders:
        if folder.is_dir():
            with told(folder):
                fsync_directory(folder)


def make_directory(path: Path) -> None:
    """Make a directory and its parents durable; it may exist."""
    if path.is_dir():
        return
    make_directory(path.parent)
    announce("mkdir", path)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)
