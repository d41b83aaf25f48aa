"""Copies on this machine of files of stores in buckets: embeddings and index files, which are mapped.

A store has a folder in ``cache_folder()/files``, named by its uuid, and each of its files at most one copy,
named by the SHA-256 in the log, which is compared while the copy is written. All processes share the copies.
One of them copies a file, under a temporary name and an exclusive lock, and others wait. If it dies, another
one begins again; temporary files without a lock are removed. A mapped copy has a shared lock, which lasts as
long as the mapping, so such a copy is never evicted.

Before a file is copied, those used least recently are evicted, until all of this machine's copies fit in the
budget (``usage``). If too little can be evicted, that is a ``StorageError``. Copies of files that a commit
removed are removed when a process sees that commit; processes that have mapped one can still read it.

Cost: the download, hashing (about 1 GB/s) and writing, once; for a copy that is there, three system calls.
Parquet files are read by ranges, and copied only for work that reads them in any order or again
(``Store.reads_copies``). The folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.sizes import megabytes, parse_size
from retrotool.store import disk
from retrotool.store.log import FileEntry
from retrotool.store.storage import Storage, where

FOLDER_VARIABLE, SIZE_VARIABLE = "RETROTOOL_CACHE", "RETROTOOL_CACHE_SIZE"
_PARTIAL = ".part"
_ATTEMPTS = 2  # at bytes with the right hash
_POLL_SECONDS = 0.05
_copying = threading.BoundedSemaphore(2)  # a file is read by several requests at once, which take memory
_RECENT_SECONDS = 60.0  # since the last use of a copy that is not evicted for one that is not needed yet
_MORE = f"Give more with --cache-size ({SIZE_VARIABLE}), or name another folder with --cache-dir."


def cache_folder() -> Path:
    """Return the folder of everything that is kept for later runs on this machine and can be deleted."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrotool"


def use_cache(cache_dir: str | None = None, cache_size: str | None = None) -> None:
    """Use a folder and a budget, also in worker processes; None: no change."""
    if cache_dir is not None:
        os.environ[FOLDER_VARIABLE] = str(Path(cache_dir).absolute())
    if cache_size is not None:
        os.environ[SIZE_VARIABLE] = str(parse_size("--cache-size", cache_size))


def usage() -> tuple[int, int]:
    """Return the bytes of all copies, and how many there may be: by default half of that and what is free."""
    root = _root()
    held = sum(size for _, size, _ in _copies(root))
    return held, _budget(root, held)


def _budget(root: Path, held: int) -> int:
    if named := os.environ.get(SIZE_VARIABLE):
        return parse_size(SIZE_VARIABLE, named)
    there = next((folder for folder in (root, *root.parents) if folder.exists()), "/")
    return (shutil.disk_usage(there).free + held) // 2


def _root() -> Path:
    return cache_folder() / "files"


def _copies(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield last use, size and path of copies; remove temporary files whose process has died."""
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if path.suffix != _PARTIAL or not _remove(path):
                yield found.st_mtime, found.st_size, path


def _remove(path: Path) -> bool:
    """Remove a file that no process has locked; return whether it was deleted, by anyone."""
    try:
        with path.open("r+b") as file, _exclusive(file) as locked:  # NFS locks no file that is open for reading
            if locked:
                path.unlink()
            return locked
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False


@contextlib.contextmanager
def _exclusive(file: IO[bytes], *, waits: bool = False) -> Iterator[bool]:
    """Lock a file; yield whether it could be locked at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock it while a forked process has it open


def pin(file: IO[bytes]) -> None:
    """Keep an open copy from being evicted for as long as it is open or mapped."""
    fcntl.flock(file, fcntl.LOCK_SH)


def _has_name(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class FileCache:
    """The copies of the files of one store; ``uuid`` is the store's."""

    def __init__(self, storage: Storage, uuid: str) -> None:
        self._storage = storage
        self.folder = _root() / uuid

    @contextlib.contextmanager
    def file(self, entry: FileEntry, *, needed: bool = True) -> Iterator[Path]:
        """Yield the copy of a file, which is made if there is none; it is pinned until the end of the block.

        Not ``needed`` yet: spare recently used copies. ``CorruptError`` if the bytes do not match the log,
        ``StorageError`` without space.
        """
        path = self.folder / self._name(entry)
        try:
            while (file := self._open(path)) is None:
                if not self._copy(path, entry, needed):
                    time.sleep(_POLL_SECONDS)
        except FileNotFoundError:
            raise  # the file is missing in the bucket
        except OSError as error:
            raise StorageError(f"{error.filename or path}: {error.strerror} (cache)", _MORE) from error
        with file:
            yield path

    def _name(self, entry: FileEntry) -> str:
        return f"{entry.sha256}{Path(entry.path).suffix}"

    def _open(self, path: Path) -> IO[bytes] | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        pin(file)
        if not _has_name(file, path):  # evicted
            file.close()
            return None
        with contextlib.suppress(PermissionError, FileNotFoundError):  # another user's; or just removed
            os.utime(path, ns=(time.time_ns(),) * 2)  # the kernel's own clock is some milliseconds coarse
        return file

    def _copy(self, path: Path, entry: FileEntry, needed: bool) -> bool:
        """Make a copy; False if another process does, or may have done so by now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(_PARTIAL)
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file, _exclusive(file) as locked:
            if not locked or not _has_name(file, partial):
                return False
            if path.exists():  # another process has just made it
                partial.unlink(missing_ok=True)
                return True
            try:
                file.truncate(0)
                self._reserve(file, entry, needed)
                self._write(file, entry)
                with contextlib.suppress(FileNotFoundError), self._locked():  # or the whole cache was deleted
                    partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return True

    def _write(self, file: IO[bytes], entry: FileEntry) -> None:
        for _ in range(_ATTEMPTS):
            digest = hashlib.sha256()
            file.seek(0)
            with _copying:
                for block in self._storage.blocks(entry.path):
                    disk.announce("write", self.folder)
                    digest.update(block)
                    file.write(block)
            file.truncate()  # what was read before may have been longer
            if digest.hexdigest() == entry.sha256:
                disk.announce("fsync", self.folder)
                return os.fsync(file.fileno())
        verify = shlex.join(["retrotool", "verify", self._storage.place])
        raise CorruptError(
            f"{where(self._storage, entry.path)}: its SHA-256 is not what the log says, also when read again",
            f"See what else is damaged, and what repairs it: {verify}",
        )

    def _reserve(self, file: IO[bytes], entry: FileEntry, needed: bool) -> None:
        """Reserve space for a file, whose size others count from then on; evict copies until it fits."""
        root = self.folder.parent
        with self._locked():
            copies = sorted(_copies(root))
            held = sum(size for _, size, _ in copies)
            limit = _budget(root, held)
            for used, size, path in copies:
                if held + entry.bytes <= limit or not (needed or time.time() - used > _RECENT_SECONDS):
                    break
                held -= size if _remove(path) else 0
            if held + entry.bytes > limit:
                raise StorageError(
                    f"{root}: no room for {megabytes(entry.bytes)} of {where(self._storage, entry.path)}: copies may "
                    f"take {megabytes(limit)}, and {megabytes(held)} are in use by running commands",
                    _MORE,
                )
            file.truncate(entry.bytes)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from counting copies while one is renamed, evicted or given its size."""
        with (self.folder.parent / "lock").open("ab") as lock, _exclusive(lock, waits=True):
            yield

    def check_room(self, entries: Iterable[FileEntry], what: str) -> None:
        """Raise ``UsageError`` if files that ``what`` maps at the same time exceed the budget."""
        if not self._storage.latent:
            return
        need, limit = sum({entry.sha256: entry.bytes for entry in entries}.values()), usage()[1]
        if need > limit:
            room = f"{megabytes(need)} in the cache {self.folder.parent}, which may have {megabytes(limit)}"
            raise UsageError(f"{what} needs {room}", _MORE)

    def remove(self, entry: FileEntry) -> None:
        """Remove the copy of a file, if there is one."""
        self.remove_others([self._name(entry)], ())

    def names(self) -> list[str]:
        """Return the names of the copies of this store's files."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return [path.name for path in self.folder.iterdir()] if self._storage.latent else []
        return []

    def remove_others(self, names: Iterable[str], live: Collection[str]) -> None:
        """Remove durably those copies of ``names`` whose SHA-256 is not ``live``, even if they are mapped."""
        gone = [self.folder / name for name in names if name.partition(".")[0] not in live]
        disk.unlink_all(path for path in gone if path.suffix != _PARTIAL or _remove(path))
