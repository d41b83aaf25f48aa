"""Where the files of a store are: the one protocol through which all of them are read and written.

A storage holds bytes under relative paths with ``/``, as an object store does: there are no folders, nothing is
renamed, and a file is there as a whole or not at all. What a path means is no business of it.
``retrotool.store.local_storage`` keeps the files in a folder; ``tests/memory_storage.py`` in a process, for tests.

Files are written once. The exception are leases, which are overwritten by their owner and by nobody else. Time is
that of the storage, for all machines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

Result = TypeVar("Result")
SUM_BLOCK = 4 << 20


class FileStatus(Protocol):
    """What a storage says of a file, without reading it: ``modified`` in seconds by its own clock."""

    @property
    def path(self) -> str:
        """The path in the storage."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def modified(self) -> float:
        """When it was last written, in seconds; only a difference of two files' times means anything."""

    @property
    def tag(self) -> str:
        """Another text after the file was overwritten."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What was left of a write that has not ended, or never will; ``run`` is the id of its writer."""

    path: str
    run: str
    size: int


class Sink:
    """What the writer of a new file writes to; counts and hashes what passes.

    A file object for pyarrow, numpy and ``faiss.PyCallbackIOWriter``. What goes wrong in ``write`` is raised there.
    """

    closed = False

    def __init__(self, write: Callable[[bytes | memoryview], object], sync: Callable[[], None]) -> None:
        self._write, self._sync = write, sync
        self._digest = hashlib.sha256()
        self.size = 0
        self.taps: list[Callable[[memoryview], object]] = []
        """Called with all that is written, before it is."""

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        self._digest.update(view)
        for tap in self.taps:
            tap(view)
        self._write(view)
        self.size += len(view)
        return len(view)

    def sync(self) -> None:
        """Begin to make durable what was written so far, so that less is left to do in the end."""
        self._sync()

    def flush(self) -> None:
        """For writers that want it; ``sync`` makes durable."""

    def close(self) -> None:
        """For writers that want it; the storage ends the file."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


class Storage(Protocol):
    """Bytes under relative paths. ``FileNotFoundError`` from whatever reads a file that is not there.

    Instances can be pickled: what comes out is the same storage in another process.
    """

    place: str
    """The storage as messages and command lines name it."""

    @property
    def uri(self) -> str:
        """The storage as any process of any folder can find it."""

    def get(self, path: str) -> bytes:
        """Read a whole file."""

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Read some bytes of a file; fewer if it ends before."""

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for random access."""

    def local(self, path: str) -> Path:
        """A file of this machine with the same bytes, to be mapped; nobody writes to it."""

    def put(self, path: str, run: str, write: Callable[[Sink], Result]) -> tuple[Sink, Result]:
        """Write a new file by ``write(sink)``; durable on return. Return the sink, for size and sum, and its result.

        ``FileExistsError`` if the path is taken. After any error, or a kill, there is no such file; what is left is
        ``unfinished``, of the run ``run``.
        """

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        """Write a small new file; False if there is one with other bytes. Durable on return.

        True also if the file is there with the same bytes: the answer to an earlier attempt may have been lost.
        """

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:
        """Write a small file in the place of what is there."""

    def stat(self, path: str) -> FileStatus | None:
        """What is known of a file; None if it is not there."""

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        """The files whose paths begin with ``prefix``, in their order.

        ``after``: those behind that path only.
        """

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files, if they are there; durable on return, so that none of them is there again."""

    def unfinished(self) -> Iterator[Unfinished]:
        """What is left of writes that have not ended."""

    def drop(self, unfinished: Iterable[Unfinished]) -> None:
        """Remove what is left of writes; if one has not ended, it fails."""

    def irregular(self) -> Iterator[str]:
        """What is there and was not made by a storage, such as symbolic links: never followed, nor listed otherwise.

        Folders beside those of stores come with a ``/`` at the end.
        """


SCHEMES: dict[str, Callable[[str], Storage]] = {}
"""What makes a storage of a place, by what stands before its ``://``; without that it is a folder."""


def storage_at(place: str | os.PathLike[str] | Storage) -> Storage:
    """The storage at a place that a person, or a record of a store, names: a path, or a URI."""
    from retrotool.store.local_storage import LocalStorage

    if not isinstance(place, str | os.PathLike):
        return place
    scheme, found, _ = os.fspath(place).partition("://")
    return SCHEMES.get(scheme if found else "", LocalStorage)(os.fspath(place))


def is_same(one: Storage, other: Storage) -> bool:
    """Whether two storages are one: of folders also under two names."""
    if one.uri == other.uri:
        return True
    try:
        return Path(one.place).samefile(other.place)
    except OSError:  # one of them is no folder
        return False


def where(storage: Storage, path: str) -> str:
    """A file of a storage, for a person."""
    return f"{storage.place.rstrip('/')}/{path}"


def file_sha256(storage: Storage, path: str, tap: Callable[[memoryview], object] | None = None) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits; ``tap`` is called with all of them."""
    digest, start = hashlib.sha256(), 0
    # Not mapped: of a bad sector an error comes, and not a signal that ends the process.
    while block := storage.get_range(path, start, SUM_BLOCK):
        digest.update(block)
        if tap is not None:
            tap(memoryview(block))
        start += len(block)
    return digest.hexdigest()
