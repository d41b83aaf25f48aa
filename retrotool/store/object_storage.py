"""A storage in an object store: ``s3://``, ``gs://``, ``az://``, and ``https://`` for reading, by obstore.

A small new file is one PUT on the condition that there is none. A large one is an upload in parts, which are
sent while the file is written, and become visible together at the end. Commits rely on the condition:

* An answer may be lost, so that a write that succeeded looks like an error or, repeated, like a lost race.
* A 409 is "busy", not "exists".
* Some servers ignore the condition, so a process tries it before it relies on it.

After any failure of such a PUT the key is read and compared: our bytes are success, other bytes a lost race,
and without bytes the PUT is repeated. Requests that change nothing, or always to the same, are repeated for a
minute while the server is busy or unreachable; what then fails is a ``StorageError``.

A process must not be forked after a request, since obstore's threads do not survive that; it is reported.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

from retrotool.errors import CorruptError, StorageError
from retrotool.read_ahead import concurrently
from retrotool.store import disk
from retrotool.store.bucket_copies import abort_uploads, list_uploads
from retrotool.store.cloud_client import open_client
from retrotool.store.paths import PROBE, FileName
from retrotool.store.storage import (
    PART_BYTES,
    RANGE_BYTES,
    FileStatus,
    RangeFile,
    Sink,
    Storage,
    StoredStatus,
    Unfinished,
    each,
    get_if_there,
    where,
)

if TYPE_CHECKING:
    import pyarrow as pa

PATIENCE_SECONDS = 60.0  # how long to repeat what fails
_FIRST_PATIENCE_SECONDS = 10.0  # with a server that has never answered
TRAFFIC_VARIABLE = "RETROTOOL_TRAFFIC"
_RANGES_AT_ONCE = 8
_PARTS_AT_ONCE = 4
_PAGE = 1000  # files that a listing returns at once
_TAIL_BYTES = 64 << 10  # read at the end of a file that is opened: the footer of most Parquet files
_TAILS = 256
_DENIED = (PermissionDeniedError, UnauthenticatedError)
_METADATA_SERVER = "169.254.169.254"  # asked for the credentials of a machine if there are no others
_STATUS_CODE = re.compile(r"status code: (\d{3})")
_T = TypeVar("_T")
_process = 0  # the one that sends requests


class ObjectStorage(Storage):
    """The ``Storage`` at ``place``, such as ``s3://bucket/path``."""

    latent = True

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self.has_answered = False
        self._is_conditional = False  # whether the server is known to honour conditions

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_tail")}

    @cached_property
    def _client(self) -> Any:
        return open_client(self.place)

    @cached_property
    def _tail(self) -> Callable[[str, int], bytes]:
        """The end of a file of some size, read once: files never change."""
        return functools.lru_cache(_TAILS)(
            lambda path, size: self.get_range(path, max(0, size - _TAIL_BYTES), min(size, _TAIL_BYTES))
        )

    def read(self, path: str) -> tuple[bytes, FileStatus]:
        def read() -> tuple[bytes, FileStatus]:
            found = obstore.get(self._client, path)
            return bytes(found.bytes()), _status(found.meta)

        return self._again("get", path, read)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        def read() -> bytes:
            try:
                return bytes(obstore.get_range(self._client, path, start=start, length=length))
            except BaseError as error:
                if _code_of(error) == 416 or obstore.head(self._client, path)["size"] <= start:
                    return b""  # the range begins at the end of the file
                raise

        return self._again("get", path, read) if length > 0 else b""

    def blocks(self, path: str) -> Iterator[bytes]:
        if (status := self.stat(path)) is None:
            raise self._missing(path)
        starts = range(0, status.size, RANGE_BYTES)
        yield from concurrently(lambda start: self.get_range(path, start, RANGE_BYTES), starts, _RANGES_AT_ONCE)

    def open(self, path: str, size: int) -> pa.NativeFile:
        import pyarrow as pa

        return pa.PythonFile(_ObjectFile(self, path, size, self._tail(path, size)), "r")

    def put(self, path: str, run: str, write: Callable[[Sink], _T]) -> tuple[Sink, _T]:  # noqa: ARG002
        upload = _Upload(self, path)
        try:
            sink = Sink(upload.write, lambda: None)
            result = write(sink)
            upload.finish()
        except BaseException as error:
            upload.abort(error)
            raise
        return sink, result

    def put_if_absent(self, path: str, run: str, data: bytes) -> bool:
        if not self._is_conditional:
            self._check_conditions(run)
        return self.create(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file of at most ``PART_BYTES`` by a conditional PUT; False if the path has other bytes."""

        def put() -> bool:
            obstore.put(self._client, path, data, mode="create")
            return True

        def is_ours() -> bool | None:
            found = get_if_there(self, path)
            return None if found is None else found == data

        return self._again("put", path, put, len(data), is_ours)

    def _check_conditions(self, run: str) -> None:
        """Check that of two conditional PUTs of a path the second fails; else raise ``StorageError``."""
        path = FileName.new(run, "plans", PROBE, "bin").path
        self.create(path, b"first")
        is_ignored = self.create(path, b"second")
        self.delete([path])
        if is_ignored:
            raise StorageError(
                f"{self.place}: the server ignores the condition of a PUT (If-None-Match), so commits of two "
                "commands could overwrite each other",
                "Put the store on a server with conditional writes, such as AWS S3, Google Cloud Storage or Azure.",
            )
        self._is_conditional = True

    def overwrite(self, path: str, run: str, data: bytes) -> FileStatus:  # noqa: ARG002
        self._again("put", path, lambda: obstore.put(self._client, path, data, use_multipart=False), len(data))
        if (found := self.stat(path)) is None:
            raise self._missing(path)
        return found

    def stat(self, path: str) -> FileStatus | None:
        try:
            return _status(self._again("head", path, lambda: obstore.head(self._client, path)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str, after: str = "") -> Iterator[FileStatus]:
        folder = prefix.rpartition("/")[0]  # obstore's prefixes are whole folders
        last = max(after, prefix[:-1])
        listing: Any = None

        def next_page() -> Any:
            nonlocal listing
            if (pages := listing) is None:
                pages = obstore.list(self._client, folder or None, offset=last or None, chunk_size=_PAGE)
            listing = None  # if it fails, the next one begins after the last file of the page before
            page = next(pages, None)
            listing = pages
            return page

        while True:
            page = self._again("list", prefix, next_page)
            for meta in page or ():
                last = meta["path"]
                if last > after and last.startswith(prefix):
                    yield _status(meta)
                elif last > prefix and not last.startswith(prefix):
                    return
            if page is None or len(page) < _PAGE:
                return

    def delete(self, paths: Iterable[str]) -> None:
        def one(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._again("delete", path, lambda: obstore.delete(self._client, path))

        for _ in each(self, one, paths):
            pass

    def unfinished(self) -> Iterator[Unfinished]:
        yield from self._request("uploads", "", lambda: list_uploads(self.place))

    def drop(self, unfinished: Iterable[Unfinished]) -> None:
        if paths := [one.path for one in unfinished]:
            self._request("abort", paths[0], lambda: abort_uploads(self.place, paths))

    def _again(
        self,
        operation: str,
        path: str,
        call: Callable[[], _T],
        sent: int = 0,
        look: Callable[[], _T | None] | None = None,
    ) -> _T:
        """Return the answer to a request that may be repeated, unless ``look`` finds it after a failure."""
        until = time.monotonic() + (PATIENCE_SECONDS if self.has_answered else _FIRST_PATIENCE_SECONDS)
        tries = itertools.count()
        while True:
            try:
                return self._request(operation, path, call, sent)
            except FileNotFoundError:
                raise (self._no_bucket() if operation == "put" else self._missing(path)) from None
            except BaseError as error:
                if operation == "list" and _code_of(error) == 404:
                    raise self._no_bucket() from None
                if look is not None and (found := look()) is not None:
                    return found
                if not _is_temporary(error) or time.monotonic() > until:
                    raise _failed(where(self, path), error) from error
            time.sleep(random.uniform(0.5, 1) * min(0.1 * 2 ** next(tries), 8.0))  # noqa: S311

    def _request(self, operation: str, path: str, call: Callable[[], _T], sent: int = 0) -> _T:
        """Send a request, announced and counted; raise what obstore raises."""
        global _process
        _process = _process or os.getpid()
        if _process != os.getpid():
            raise StorageError(
                f"{self.place}: it was used before this process was forked, which obstore does not support",
                'Start worker processes by "spawn" or "forkserver": DataLoader(multiprocessing_context="forkserver").',
            )
        disk.announce(operation, Path(where(self, path)))
        answer = call()
        self.has_answered = True
        content = answer[0] if isinstance(answer, tuple) else answer
        _count(operation, path, sent, len(content) if isinstance(content, bytes) else 0)
        return answer

    def _missing(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where(self, path))

    def _no_bucket(self) -> StorageError:
        bucket = "/".join(self.place.split("/")[:3])
        return StorageError(f"{bucket} does not exist", "Create the bucket with your cloud's tools, or check its name.")


def _is_temporary(error: BaseError) -> bool:
    if isinstance(error, (*_DENIED, NotSupportedError)) or "Header missing" in str(error):
        return False
    code = _code_of(error)
    return code is None or (code >= 500 and code != 501) or code in (408, 409, 412, 429)


def _failed(place: str, error: BaseError) -> StorageError:
    """Return what a request ended with, and what may help."""
    what = str(error).splitlines()[0][:500]
    if isinstance(error, _DENIED) or _METADATA_SERVER in what or _code_of(error) in (401, 403):
        found = "no credentials" if _METADATA_SERVER in what else "access denied"
        return StorageError(
            f"{place}: {found}: {what}",
            "Set the cloud's environment variables, such as AWS_ACCESS_KEY_ID, or a profile (docs/how-to/"
            "store-in-a-bucket.md), and check what they may do.",
        )
    return StorageError(
        f"{place}: {what}",
        "Check the network and the endpoint, and run the same command again: what was committed is kept.",
    )


class _Upload:
    """A file that is being written: one PUT at its end, or parts as they fill."""

    def __init__(self, storage: ObjectStorage, path: str) -> None:
        self._storage, self._path = storage, path
        self._held = bytearray()
        self._writer: Any = None
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._size += len(data)
        if self._writer is None:
            self._held += data
            if len(self._held) <= PART_BYTES:
                return
            if self._storage.stat(self._path) is not None:
                raise self._exists()
            open_writer = functools.partial(obstore.open_writer, buffer_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
            self._writer = self._call(lambda: open_writer(self._storage._client, self._path))
            data, self._held = bytes(self._held), bytearray()
        self._call(lambda: self._writer.write(data), len(data))

    def finish(self) -> None:
        if self._writer is None:
            if not self._storage.create(self._path, bytes(self._held)):
                raise self._exists()
            return
        try:
            self._call(self._writer.close)
        except (StorageError, FileNotFoundError):
            # The answer may be lost; then the upload is not found when obstore asks again. Only this upload
            # writes to this name, and it becomes visible whole.
            found = self._storage.stat(self._path)
            if found is None or found.size != self._size:
                raise
        self._writer = None

    def abort(self, error: BaseException) -> None:
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.__exit__(type(error), error, None)

    def _exists(self) -> FileExistsError:
        return FileExistsError(f"{where(self._storage, self._path)} exists; a file is never written twice")

    def _call(self, call: Callable[[], _T], sent: int = 0) -> _T:
        try:
            return self._storage._request("upload", self._path, call, sent)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "the upload was aborted", where(self._storage, self._path)) from error
        except BaseError as error:
            raise _failed(where(self._storage, self._path), error) from error


class _ObjectFile(RangeFile):
    """Random access to an object: each read is one request, except in its tail."""

    def __init__(self, storage: ObjectStorage, path: str, size: int, tail: bytes) -> None:
        super().__init__(size)
        self._storage, self._path, self._tail = storage, path, tail

    def read(self, size: int | None = -1) -> bytes:
        start = self._place
        length = max(0, self._size - start if size is None or size < 0 else min(size, self._size - start))
        in_tail = start - (self._size - len(self._tail))
        if in_tail >= 0:
            found = self._tail[in_tail : in_tail + length]
        else:
            found = self._storage.get_range(self._path, start, length)
        if len(found) != length:
            raise CorruptError(f"{where(self._storage, self._path)}: {len(found):,} bytes read, not {length:,}")
        self._place += length
        return found


def _status(meta: Any) -> StoredStatus:
    modified = meta["last_modified"]
    return StoredStatus(meta["path"], meta["size"], modified.timestamp(), meta["e_tag"] or modified.isoformat())


def _code_of(error: BaseError) -> int | None:
    """Return the status code of the answer that an error is about; None if there was none."""
    found = _STATUS_CODE.search(str(error))
    return int(found[1]) if found else None


def _count(operation: str, path: str, sent: int, received: int) -> None:
    """Append to the file that ``RETROTOOL_TRAFFIC`` names: operation, path, bytes sent, bytes received."""
    if name := os.environ.get(TRAFFIC_VARIABLE):
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(f"{operation} {path} {sent} {received}\n")
