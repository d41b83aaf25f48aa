"""A storage in a folder of a file system: a local disk, NFS, Lustre.

A file is written under a temporary name in its target's folder, made durable, and then named: by a rename, or
by a hard link where the name must be free. A kill at any moment leaves either the whole file under its name,
or a ``.tmp-`` file that carries the id of its writer's run. ``retrotool.store.disk`` announces every step.

The storage's folder may be reached through a symbolic link. Below it links are refused, wherever they point:
the file that is removed must be the file itself.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from retrotool.errors import CorruptError, StorageError
from retrotool.store import disk, paths
from retrotool.store.storage import BLOCK_BYTES, FileStatus, Result, Sink, Unfinished

if TYPE_CHECKING:
    import pyarrow as pa

TEMPORARY = ".tmp-"
PUT_ATTEMPTS = 5
_TEMPORARY_PATH = re.compile(rf"(?:.*/)?{re.escape(TEMPORARY)}(?P<run>[0-9a-f]{{8}})[0-9a-f]{{8,16}}")


@dataclass(frozen=True)
class _LocalStatus:
    """A ``FileStatus`` that is read from the file system when needed: listing only names is much faster."""

    path: str
    file: Path

    @cached_property
    def _stat(self) -> os.stat_result:
        return self.file.stat(follow_symlinks=False)

    @property
    def size(self) -> int:
        return self._stat.st_size

    @property
    def modified(self) -> float:
        return self._stat.st_mtime

    @property
    def tag(self) -> str:
        return f"{self._stat.st_mtime_ns}-{self._stat.st_size}-{self._stat.st_ino}"


class LocalStorage:
    """The ``Storage`` in the folder ``place``."""

    latent = False

    def __init__(self, place: str) -> None:
        self.place = place
        self.root = Path(place)

    @property
    def uri(self) -> str:
        """The folder's absolute path, which names a local store to users and in records."""
        return str(self.root.absolute())

    def get(self, path: str) -> bytes:
        return self.local(path).read_bytes()

    def read(self, path: str) -> tuple[bytes, FileStatus]:
        status = _LocalStatus(path, self.local(path))
        _ = status.modified  # before the bytes: a status may be too old, not too new
        return status.file.read_bytes(), status

    def get_range(self, path: str, start: int, length: int) -> bytes:
        with self.local(path).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def blocks(self, path: str) -> Iterator[bytes]:
        # Not mapped: a bad sector then raises an error, not a signal that ends the process.
        with self.local(path).open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def open(self, path: str, size: int) -> pa.NativeFile:  # noqa: ARG002
        import pyarrow as pa

        return pa.memory_map(str(self.local(path)))

    def put(self, path: str, run: str, write: Callable[[Sink], Result]) -> tuple[Sink, Result]:
        target = self.local(path)
        if target.exists():
            raise FileExistsError(f"{target} exists; a file is never written twice")
        with self._temporary(target, run) as temporary:
            disk.announce("write", temporary)
            with temporary.open("xb") as file:
                sink = Sink(file.write, lambda: _sync(file, temporary))
                result = write(sink)
                sink.sync()
            if (size := temporary.stat().st_size) != sink.size:
                raise StorageError(f"{target}: {sink.size:,} bytes were written, but the file system has {size:,}")
            disk.rename(temporary, target)
            disk.fsync_directory(target.parent)
        return sink, result

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        target = self.local(path)
        won = self._write_small(target, run, data, lambda temporary: disk.link(temporary, target))
        with disk.storage_errors(target):
            disk.fsync_directory(target.parent)
        if not won:
            with suppress(FileNotFoundError):  # over NFS a link can succeed and its answer get lost
                won = target.read_bytes() == data
        return won

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:
        target = self.local(path)
        with disk.storage_errors(target), suppress(FileNotFoundError):
            if target.read_bytes() == data:  # renewing a lease changes only its time
                disk.announce("touch", target)
                os.utime(target)
                return _LocalStatus(path, target)

        def replace(temporary: Path) -> FileStatus:
            info = _LocalStatus(path, temporary)
            _ = info.modified  # cached now: the rename does not change it
            disk.rename(temporary, target)
            return info

        return self._write_small(target, run, data, replace)

    def stat(self, path: str) -> FileStatus | None:
        info = _LocalStatus(path, self.local(path))
        try:
            _ = info.size
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        folder = prefix[: prefix.rfind("/") + 1]
        self._not_linked(folder)
        for path, regular in self._walk(folder, after):
            if regular and path.startswith(prefix) and not _TEMPORARY_PATH.fullmatch(path):
                yield _LocalStatus(path, self.root / path)

    def delete(self, paths: Iterable[str]) -> None:
        disk.unlink_all(map(self.local, paths))

    def unfinished(self) -> Iterator[Unfinished]:
        for path, regular in self._walk("", ""):
            if regular and (match := _TEMPORARY_PATH.fullmatch(path)):
                with suppress(FileNotFoundError):
                    yield Unfinished(path, match["run"], _LocalStatus(path, self.root / path).size)

    def drop(self, unfinished: Iterable[Unfinished]) -> None:
        disk.unlink_all(self.root / one.path for one in unfinished)

    def irregular(self) -> Iterator[str]:
        return (path for path, regular in self._walk("", "") if not regular)

    def free_bytes(self) -> int | None:
        """Return what the file system has left for this user; None if it does not say."""
        try:
            found = os.statvfs(self.root)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize if found.f_blocks else None  # without blocks, as over some networks

    def local(self, path: str) -> Path:
        """Return a path's file; ``CorruptError`` if its form or a symbolic link leads out of the store."""
        if not all(map(paths.COMPONENT.fullmatch, path.split("/"))):
            raise CorruptError(f"{path!r} leads out of the store")
        return self._not_linked(path)

    def _not_linked(self, path: str) -> Path:
        place = self.root
        for component in filter(None, path.split("/")):
            place = place / component
            if place.is_symlink():
                raise CorruptError(
                    f"{place} is a symbolic link: the files of a store must be in its own folders",
                    "Replace the link with the file or folder it points to, or remove it.",
                )
        return place

    def _write_small(self, target: Path, run: str, data: bytes, give_name: Callable[[Path], Result]) -> Result:
        """Write a durable temporary file beside ``target`` and return ``give_name(temporary)``."""
        left = PUT_ATTEMPTS
        while True:
            try:
                with self._temporary(target, run) as temporary:
                    disk.write(temporary, data)
                    disk.fsync(temporary)
                    return give_name(temporary)
            except FileNotFoundError:
                # Clean-up by another process removed the temporary file: it could not see this run yet.
                left -= 1
                if not left:
                    raise

    @contextmanager
    def _temporary(self, target: Path, run: str) -> Iterator[Path]:
        """Yield a temporary path beside ``target``; remove it on exit if it still exists."""
        with disk.storage_errors(target):
            disk.make_directory(target.parent)
            temporary = target.parent / f"{TEMPORARY}{run}{secrets.token_hex(4)}"
            try:
                yield temporary
            finally:
                if temporary.exists():
                    disk.unlink(temporary)

    def _walk(self, prefix: str, after: str) -> Iterator[tuple[str, bool]]:
        """Yield everything below a prefix in the order of paths, and whether each is a regular file.

        Links are not followed; files that disappear are left out. Folders are entered, not yielded, except
        foreign ones in the storage's folder, which end in "/".
        """
        names, odd = [], set()  # only names: a log has hundreds of thousands
        try:
            with os.scandir(self.root / prefix) as entries:
                for entry in entries:
                    # The folder "a" sorts after "a-b" and before "a0": whole paths are compared.
                    name = f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                    names.append(name)
                    if not entry.is_file(follow_symlinks=False):
                        odd.add(name)
        except (FileNotFoundError, NotADirectoryError):
            return
        names.sort()
        for name in names:
            path = prefix + name
            if not name.endswith("/"):
                if path > after:
                    yield path, name not in odd
            elif not (prefix or name[:-1] in paths.FOLDERS):
                yield path, False
            elif path > after or after.startswith(path):
                yield from self._walk(path, after)


def _sync(file: IO[bytes], path: Path) -> None:
    file.flush()
    disk.fsync(path)
