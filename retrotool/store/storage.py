"""Where a store's files are: the protocol through which all of them are read and written.

Like an object store, a storage holds bytes under relative paths with ``/``: there are no folders, nothing is
renamed, and a file exists completely or not at all. It does not know what a path means. Files are written
once, except leases, which their owner overwrites. All machines use the storage's clock. ``local_storage``
keeps the files in a folder, ``object_storage`` in a bucket, and ``tests/memory_storage.py`` in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from retrotool.errors import StorageError, UsageError
from retrotool.read_ahead import concurrently
from retrotool.sizes import megabytes

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Result = TypeVar("Result")
REQUESTS_AT_ONCE = 16
BLOCK_BYTES = 4 << 20
PART_BYTES = 16 << 20  # of an upload to a bucket; files up to this size are one PUT
RANGE_BYTES = 8 << 20  # of a download from a bucket


class FileStatus(Protocol):
    """What a storage knows about a file without reading it."""

    @property
    def path(self) -> str:
        """The path in the storage."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    @property
    def modified(self) -> float:
        """When it was last written, in seconds; only differences between files are meaningful."""

    @property
    def tag(self) -> str:
        """A text that differs where the bytes do."""


@dataclass(frozen=True, slots=True)
class StoredStatus:
    """A ``FileStatus`` as a server reported it; ``modified`` is in whole seconds on most."""

    path: str
    size: int
    modified: float
    tag: str


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is left of a write that has not ended; ``run`` is the id of its writer.

    ``size``: its bytes so far, 0 for an upload to an object store.
    """

    path: str
    run: str
    size: int


class Sink:
    """The file object for a new file; hashes and counts the bytes, and first passes them to ``taps``."""

    closed = False

    def __init__(self, write: Callable[[bytes | memoryview], object], sync: Callable[[], None]) -> None:
        self._write, self._digest = write, hashlib.sha256()
        self.sync = sync  # begins to make the data durable, so that less is left to do at the end
        self.size = 0
        self.taps: list[Callable[[memoryview], object]] = []

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

    def flush(self) -> None:
        """Ignore the call: ``sync`` makes data durable, and the storage closes the file."""

    close = flush

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.size

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


class Storage(Protocol):
    """Bytes under relative paths; instances can be pickled. ``FileNotFoundError`` for missing files.

    Where a method has a body, that is what holds for object stores.
    """

    place: str
    """Its name in messages and command lines."""

    latent: bool
    """Whether a call is a request over a network, so that several at once are faster than one by one."""

    @property
    def uri(self) -> str:
        """The storage as a process in any folder can find it."""
        return self.place

    def get(self, path: str) -> bytes:
        """Read a whole file."""
        return self.read(path)[0]

    def read(self, path: str) -> tuple[bytes, FileStatus]:
        """Read a whole file and its status at the same moment."""

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Read ``length`` bytes of a file, fewer at its end."""

    def blocks(self, path: str) -> Iterator[bytes]:
        """Yield a file's bytes in blocks of some MiB."""

    def open(self, path: str, size: int) -> pa.NativeFile:
        """Open a file of ``size`` bytes for random access."""

    def local(self, path: str) -> Path | None:  # noqa: ARG002
        """Return the file of this machine that has the bytes, to be mapped; None if they are elsewhere."""
        return None

    def put(self, path: str, run: str, write: Callable[[Sink], Result]) -> tuple[Sink, Result]:
        """Write a new file by ``write(sink)``, durably; return the sink, for size and hash, and its result.

        ``FileExistsError`` if the path is taken. After an error or a kill the file does not exist; the rest
        is ``unfinished``.
        """

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        """Write a small new file durably; False if the path is taken by a file with other bytes."""

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:
        """Write a small file, whether it exists or not."""

    def stat(self, path: str) -> FileStatus | None:
        """Return what is known about a file; None if it does not exist."""

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        """Yield the files whose paths begin with ``prefix`` and come after ``after``, in order."""

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files that exist, durably: none of them reappears."""

    def unfinished(self) -> Iterator[Unfinished]:
        """Yield what is left of writes that have not ended; nothing if the storage can't list them."""

    def drop(self, unfinished: Iterable[Unfinished]) -> None:
        """Remove what is left of writes; those still running fail."""

    def irregular(self) -> Iterator[str]:
        """Yield links, which are never followed or listed, and foreign folders, with a final ``/``."""
        yield from ()

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be written; None if that is unknown or without a limit."""
        return None


class RangeFile(io.RawIOBase):
    """A file of ``size`` bytes elsewhere for random access: its place is a number; subclasses read ranges."""

    def __init__(self, size: int) -> None:
        self._size, self._place = size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place without reading."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place


Place = str | os.PathLike[str] | Storage
SCHEMES: dict[str, Callable[[str], Storage]] = {}  # constructors by URI scheme; the default is a folder
CLOUD_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "http", "https")


def storage_at(place: Place) -> Storage:
    """Return the storage at a path or URI that a person or a record names."""
    from retrotool.store.local_storage import LocalStorage

    if not isinstance(place, str | os.PathLike):
        return place
    scheme, found, _ = os.fspath(place).partition("://")
    if found and scheme in CLOUD_SCHEMES:
        try:
            from retrotool.store.object_storage import ObjectStorage
        except ModuleNotFoundError as error:
            advice = "Install it with: pip install obstore boto3"
            raise UsageError(f"{place}: {error.name} is not installed", advice) from None
        return ObjectStorage(os.fspath(place))
    if found and scheme not in SCHEMES:
        raise UsageError(f"{place}: unknown scheme", f"Known are {', '.join(CLOUD_SCHEMES)}; else give a folder.")
    return SCHEMES.get(scheme if found else "", LocalStorage)(os.fspath(place))


def each(storage: Storage, call: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Yield ``call(item)`` of a storage for each of ``items``, in order."""
    yield from concurrently(call, items, REQUESTS_AT_ONCE if storage.latent else 1)


def get_if_there(storage: Storage, path: str) -> bytes | None:
    """Read a whole file; None if it does not exist."""
    try:
        return storage.get(path)
    except FileNotFoundError:
        return None


def is_same(one: Storage, other: Storage) -> bool:
    """Return whether two storages are the same, even if their folder has two names."""
    if one.uri == other.uri:
        return True
    try:
        return Path(one.place).samefile(other.place)
    except OSError:  # not both are folders
        return False


def where(storage: Storage, path: str) -> str:
    """Return a file's path for messages."""
    return f"{storage.place.rstrip('/')}/{path}"


def check_space(storage: Storage, need: int, what: str) -> None:
    """Raise ``StorageError`` if ``what``, which writes ``need`` bytes, can't have them."""
    free = storage.free_bytes()
    if free is not None and need > free:
        raise StorageError(
            f"{storage.place}: {what} needs about {megabytes(need)} more, and {megabytes(free)} is free",
            "Free some space and run the same command again; none of this work has begun.",
        )
