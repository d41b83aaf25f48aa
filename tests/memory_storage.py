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
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.managers import BaseManager, BaseProxy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from retrotool.store import storage
from retrotool.store.disk import announce, storage_errors
from retrotool.store.storage import FileStatus, Result, Sink, Unfinished

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME = "memory://"
_TICK = 0.001
_PAGE = 100
"""Files that a listing gives at once: what is written or deleted concurrently may be in the next page, or not."""


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
        """A page of a listing."""
        with self.lock:
            names = sorted(self.files)
            first = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
            found = []
            for path in names[first:]:
                if not path.startswith(prefix) or len(found) == _PAGE:
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

    def age(self, path: str, seconds: float) -> None:
        """Have a file written so many seconds ago."""
        with self.lock:
            self.files[path] = (self.files[path][0], self.now() - seconds, secrets.token_hex(8))

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


class _Buckets:
    """All storages of a server."""

    def __init__(self) -> None:
        self.buckets: dict[str, _Bucket] = {}

    def forget(self, place: str) -> None:
        """Drop a storage, and all in folders under its name."""
        for name in [name for name in list(self.buckets) if name == place or name.startswith(f"{place}/")]:
            self.buckets.pop(name, None)

    def names(self) -> list[str]:
        return sorted(self.buckets)


_buckets = _Buckets()
_METHODS = "put get stat list delete begin append finish drop unfinished move_clock age".split()
# A process that was forked has its own connections: what it inherits is its parent's, and answers would be mixed up.
os.register_at_fork(after_in_child=BaseProxy._address_to_local.clear)
_Manager.register("bucket", lambda name: _buckets.buckets.setdefault(name, _Bucket()), exposed=_METHODS)
_Manager.register("buckets", lambda: _buckets, exposed=["forget", "names"])
ADDRESS = "RETROTOOL_TEST_MEMORY"
"""Environment variable with the path of the server's socket: child processes use the same storage."""


def _end_with(parent: int) -> None:
    """End this process when its parent has, however it did."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def memory_server(folder: Path) -> Iterator[None]:
    """Hold files in a process of its own for as long as this lasts, or this process does; if there is none yet."""
    if ADDRESS in os.environ:
        yield
        return
    manager = _Manager(str(folder / "memory.socket"), b"memory", ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with, (os.getpid(),))
    os.environ[ADDRESS] = str(folder / "memory.socket")
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        manager.shutdown()


@cache
def _connection(address: str, _process: int) -> Any:
    manager = _Manager(address, b"memory")
    manager.connect()
    return manager


class _Calls:
    """Calls of a bucket; one that is interrupted leaves no answer behind for the next to take for its own."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return getattr(self._proxy, name)(*arguments, **options)
            except BaseException as error:
                if not isinstance(error, Exception):
                    vars(self._proxy._tls).pop("connection", None)
                raise

        return call


@cache
def _bucket(name: str, address: str, process: int) -> Any:
    return _Calls(_connection(address, process).bucket(name))


def forget(place: Path) -> None:
    """Free the memory of all storages in a folder, whose files nobody wants any more."""
    _connection(os.environ[ADDRESS], os.getpid()).buckets().forget(str(place.absolute()))


@cache
def _scratch(_process: int) -> Path:
    """A folder for copies of files that are mapped, of this process."""
    folder = Path(tempfile.mkdtemp(prefix="retrotool-memory-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class MemoryStorage:
    """The ``Storage`` at ``memory://<name>``."""

    latent = False

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

    def read(self, path: str) -> tuple[bytes, FileStatus]:
        if (status := self.stat(path)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.place}/{path}")
        return self.get(path), status

    def get_range(self, path: str, start: int, length: int) -> bytes:
        found: bytes | None = self.bucket.get(path, start, length)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.place}/{path}")
        return found

    def blocks(self, path: str) -> Iterator[bytes]:
        yield self.get(path)

    def open(self, path: str, size: int) -> pa.NativeFile:
        import pyarrow as pa

        return pa.BufferReader(self.get(path))

    def local(self, path: str) -> Path:
        info = self.bucket.stat(path)
        name = hashlib.sha256(f"{self.place}/{path}?{info and info.tag}".encode()).hexdigest()
        copy = _scratch(os.getpid()) / f"{name}{Path(path).suffix}"
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
            with storage_errors(Path(self.place, path)):
                announce("write", Path(self.place, path))
                sink = Sink(append, lambda: None)
                result = write(sink)
                announce("finish", Path(self.place, path))
                finished = self.bucket.finish(upload)
        except BaseException:
            self.bucket.drop(upload)
            raise
        if finished is None:
            raise FileNotFoundError(errno.ENOENT, "the upload was aborted", path)
        if not finished:
            raise FileExistsError(f"{path} exists; a file is never written twice")
        return sink, result

    def free_bytes(self) -> int | None:
        return None

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        with storage_errors(Path(self.place, path)):
            announce("put_if_absent", Path(self.place, path))
        return self.bucket.put(path, data, absent=True) is not None or self.get(path) == data

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:
        with storage_errors(Path(self.place, path)):
            announce("overwrite", Path(self.place, path))
        found: FileStatus = self.bucket.put(path, data, absent=False)
        return found

    def stat(self, path: str) -> FileStatus | None:
        found: FileStatus | None = self.bucket.stat(path)
        return found

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        page = self.bucket.list(prefix, after)
        while page:
            yield from page
            page = self.bucket.list(prefix, page[-1].path) if len(page) == _PAGE else []

    def delete(self, paths: Iterable[str]) -> None:
        listed = list(paths)
        if listed:
            with storage_errors(Path(self.place, listed[0])):
                announce("delete", Path(self.place, listed[0]))
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


@dataclass(frozen=True, order=True, slots=True)
class MemoryFile:
    """A file of a storage in memory, with the methods of ``Path`` by which tests look into a store and damage it."""

    place: str
    path: str

    @property
    def store(self) -> MemoryStorage:
        found = storage.storage_at(self.place)
        assert isinstance(found, MemoryStorage)
        return found

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("/"))

    def with_name(self, name: str) -> MemoryFile:
        return MemoryFile(self.place, self.path.removesuffix(self.name) + name)

    def __fspath__(self) -> str:
        """Return a file of this disk with the same bytes: to be read only."""
        return str(self.store.local(self.path))

    def exists(self) -> bool:
        return self.store.stat(self.path) is not None

    def stat(self) -> SimpleNamespace:
        info = self.store.stat(self.path)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        return SimpleNamespace(st_size=info.size, st_mtime=info.modified)

    def read_bytes(self) -> bytes:
        return self.store.get(self.path)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        self.store.bucket.put(self.path, data, absent=False)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def unlink(self, *, missing_ok: bool = False) -> None:
        if not missing_ok:
            self.stat()
        self.store.bucket.delete([self.path])


EVERYWHERE = "RETROTOOL_TEST_STORAGE"
"""Environment variable; ``memory``: every store of a test is in memory, unless the test is marked ``on_disk``."""
storage.SCHEMES["memory"] = MemoryStorage


def is_everywhere() -> bool:
    """Whether all stores of tests are to be in memory."""
    return os.environ.get(EVERYWHERE) == "memory"


if is_everywhere():
    storage.SCHEMES[""] = MemoryFolder
