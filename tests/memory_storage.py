"""A storage in the memory of a process, for tests: what a store needs of an object store, and nothing that it lacks.

It has no folders, no rename, no links and no modification in place. Reading sees what was written before, listing too,
as on the clouds' object stores. Its clock is its own, and moves only when somebody moves it or writes. A server process
holds the files, so that several processes can use one storage; each file that must be on a disk to be mapped is copied
to a folder of the process that asks. Nothing here is durable, and nothing is fast.
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import errno
import hashlib
import multiprocessing
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrotool.store import storage
from retrotool.store.disk import announce
from retrotool.store.storage import FileStatus, Result, Sink, Unfinished

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME = "memory://"
_TICK = 0.001


@dataclass(frozen=True, slots=True)
class FileInfo:
    """An ``FileStatus`` that is known."""

    path: str
    size: int
    modified: float
    tag: str


@dataclass(slots=True)
class _Bucket:
    """The files of one storage; each call is atomic."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[str, tuple[bytes, float, str]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bytearray]] = field(default_factory=dict)
    clock: float = 1_000_000.0

    def now(self, seconds: float = _TICK) -> float:
        self.clock += seconds
        return self.clock

    def put(self, path: str, data: bytes, *, absent: bool) -> FileInfo | None:
        with self.lock:
            if absent and path in self.files:
                return None
            self.files[path] = (data, self.now(), secrets.token_hex(8))
            return _info(path, self.files[path])

    def get(self, path: str, start: int, length: int) -> bytes | None:
        with self.lock:
            if path not in self.files:
                return None
            data = self.files[path][0]
            return data[start:] if length < 0 else data[start : start + length]

    def stat(self, path: str) -> FileInfo | None:
        with self.lock:
            return _info(path, self.files[path]) if path in self.files else None

    def list(self, prefix: str, after: str) -> list[FileInfo]:
        with self.lock:
            names = sorted(self.files)
            first = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
            found = []
            for path in names[first:]:
                if not path.startswith(prefix):
                    break
                found.append(_info(path, self.files[path]))
            return found

    def delete(self, paths: list[str]) -> None:
        with self.lock:
            for path in paths:
                self.files.pop(path, None)

    def begin(self, path: str, run: str) -> str:
        with self.lock:
            upload = f"{path}?{run}{secrets.token_hex(4)}"
            self.uploads[upload] = (run, bytearray())
            return upload

    def append(self, upload: str, data: bytes) -> bool:
        with self.lock:
            if upload not in self.uploads:
                return False
            self.uploads[upload][1].extend(data)
            return True

    def finish(self, upload: str) -> bool | None:
        """Make an upload a file; False if the path is taken, None if the upload was dropped."""
        path = upload.rpartition("?")[0]
        with self.lock:
            if upload not in self.uploads:
                return None
            data = bytes(self.uploads.pop(upload)[1])
            if path in self.files:
                return False
            self.files[path] = (data, self.now(), secrets.token_hex(8))
            return True

    def drop(self, upload: str) -> None:
        with self.lock:
            self.uploads.pop(upload, None)

    def move_clock(self, seconds: float) -> float:
        with self.lock:
            return self.now(seconds)

    def unfinished(self) -> list[Unfinished]:
        with self.lock:
            return [Unfinished(name, run, len(data)) for name, (run, data) in sorted(self.uploads.items())]


def _info(path: str, file: tuple[bytes, float, str]) -> FileInfo:
    return FileInfo(path, len(file[0]), file[1], file[2])


class _Manager(BaseManager):
    pass


_buckets: dict[str, _Bucket] = {}
_METHODS = ["put", "get", "stat", "list", "delete", "begin", "append", "finish", "drop", "unfinished", "move_clock"]
_Manager.register("bucket", lambda name: _buckets.setdefault(name, _Bucket()), exposed=_METHODS)
ADDRESS = "RETROTOOL_TEST_MEMORY"
"""Environment variable with the path of the server's socket: child processes use the same storage."""


@contextlib.contextmanager
def memory_server(folder: Path) -> Iterator[None]:
    """Hold files in a process of its own for as long as this lasts."""
    manager = _Manager(str(folder / "memory.socket"), b"memory", ctx=multiprocessing.get_context("fork"))
    manager.start()
    os.environ[ADDRESS] = str(folder / "memory.socket")
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        manager.shutdown()


@cache
def _bucket(name: str, address: str, _process: int) -> Any:
    manager = _Manager(address, b"memory")
    manager.connect()
    return manager.bucket(name)  # type: ignore[attr-defined]


@cache
def _scratch(_process: int) -> Path:
    """A folder for copies of files that are mapped, of this process."""
    folder = Path(tempfile.mkdtemp(prefix="retrotool-memory-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class MemoryStorage:
    """The ``Storage`` at ``memory://<name>``."""

    def __init__(self, place: str) -> None:
        self.place = place

    @property
    def uri(self) -> str:
        return self.place

    @property
    def bucket(self) -> Any:
        return _bucket(self.place.removeprefix(SCHEME), os.environ[ADDRESS], os.getpid())

    def get(self, path: str) -> bytes:
        return self.get_range(path, 0, -1)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        found: bytes | None = self.bucket.get(path, start, length)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.place}/{path}")
        return found

    def open(self, path: str) -> pa.NativeFile:
        import pyarrow as pa

        return pa.BufferReader(self.get(path))

    def local(self, path: str) -> Path:
        info = self.bucket.stat(path)
        copy = _scratch(os.getpid()) / hashlib.sha256(f"{self.place}/{path}?{info and info.tag}".encode()).hexdigest()
        if not copy.exists():
            copy.with_suffix(".new").write_bytes(self.get(path))
            copy.with_suffix(".new").rename(copy)
        return copy

    def put(self, path: str, run: str, write: Callable[[Sink], Result]) -> tuple[Sink, Result]:
        upload = self.bucket.begin(path, run)

        def append(data: bytes | memoryview) -> None:
            if not self.bucket.append(upload, bytes(data)):
                raise FileNotFoundError(errno.ENOENT, "the upload was aborted", path)

        try:
            announce("write", Path(path))
            sink = Sink(append, lambda: None)
            result = write(sink)
            announce("finish", Path(path))
            finished = self.bucket.finish(upload)
        except BaseException:
            self.bucket.drop(upload)
            raise
        if finished is None:
            raise FileNotFoundError(errno.ENOENT, "the upload was aborted", path)
        if not finished:
            raise FileExistsError(f"{path}: a name is never written twice")
        return sink, result

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        announce("put_if_absent", Path(path))
        return self.bucket.put(path, data, absent=True) is not None or self.get(path) == data

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:
        announce("overwrite", Path(path))
        found: FileStatus = self.bucket.put(path, data, absent=False)
        return found

    def stat(self, path: str) -> FileStatus | None:
        found: FileStatus | None = self.bucket.stat(path)
        return found

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        yield from self.bucket.list(prefix, after)

    def delete(self, paths: Iterable[str]) -> None:
        listed = list(paths)
        if listed:
            announce("delete", Path(listed[0]))
            self.bucket.delete(listed)

    def unfinished(self) -> Iterator[Unfinished]:
        yield from self.bucket.unfinished()

    def drop(self, unfinished: Iterable[Unfinished]) -> None:
        for one in unfinished:
            self.bucket.drop(one.path)

    def irregular(self) -> Iterator[str]:
        yield from ()


class MemoryFolder(MemoryStorage):
    """A storage in memory that goes by the path of a folder, as if it was one: for tests of everything on it."""

    @property
    def uri(self) -> str:
        return str(Path(self.place).absolute())

    @property
    def bucket(self) -> Any:
        return _bucket(self.uri, os.environ[ADDRESS], os.getpid())


EVERYWHERE = "RETROTOOL_TEST_STORAGE"
"""Environment variable; ``memory``: every store of a test is in memory, unless the test is marked ``on_disk``."""
storage.SCHEMES["memory"] = MemoryStorage


def is_everywhere() -> bool:
    """Whether all stores of tests are to be in memory."""
    return os.environ.get(EVERYWHERE) == "memory"


def use_everywhere() -> None:
    """Have every store in memory from now on, and copies of folders take along the stores that they seem to hold."""
    storage.SCHEMES[""] = MemoryFolder
    copytree = shutil.copytree

    def copy(source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        Path(source).mkdir(parents=True, exist_ok=True)
        copied = copytree(source, target, *arguments, **options)
        manager_of = _bucket(str(Path(source).absolute()), os.environ[ADDRESS], os.getpid())
        into = _bucket(str(Path(target).absolute()), os.environ[ADDRESS], os.getpid())
        for info in manager_of.list("", ""):
            into.put(info.path, manager_of.get(info.path, 0, -1), absent=True)
        return copied

    shutil.copytree = copy


if is_everywhere():
    use_everywhere()
