"""Files in object stores, in datasets of the Hugging Face Hub and on web servers, by URI: reading by ranges.

* ``s3://BUCKET/KEY``, ``gs://``, ``az://`` and ``https://HOST/PATH`` are read through ``ObjectStorage``,
  ``hf://datasets/ORG/NAME[@REVISION]/PATH`` through ``HubDataset``. A process makes one client for a bucket.
* A reader fetches blocks, which grow while it is read in order. From the second on, the next block is fetched
  in a thread, concurrently. No block crosses the ``end`` up to which its caller will surely read, so a file
  that is read in slices is fetched once, but for the rest of the line at which a slice ends.

Memory: three blocks of ``BLOCK_BYTES``.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote

from retrotool.errors import UsageError
from retrotool.store.storage import CLOUD_SCHEMES, FileStatus, RangeFile, Storage, storage_at

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from retrotool.sources.hub import HubDataset

    Objects: TypeAlias = Storage | HubDataset  # what reads an input

FIRST_BYTES = 256 << 10  # of a reader; as much is read of an input to look at its first rows
BLOCK_BYTES = 8 << 20
_GROWTH = 4
_HUB = r"hf://datasets/[^/@]+/[^/@]+(?:@(?:refs/(?:convert|pr)/[^/]+|[^/]+))?"
_PLACE = re.compile(rf"({_HUB}|(?:{'|'.join(CLOUD_SCHEMES)})://[^/]+)(?:/(.*))?", re.DOTALL)


def is_remote(place: str) -> bool:
    """Return whether an input's path is a URI."""
    scheme, found, _ = place.partition("://")
    return bool(found) and scheme in (*CLOUD_SCHEMES, "hf")


def split_uri(uri: str) -> tuple[str, str]:
    """Return the URI of a file's storage, and its path there; raise ``UsageError`` if it is malformed."""
    found, is_web = _PLACE.fullmatch(uri), uri.startswith("http")
    key = "" if found is None else (found[2] or "").strip("/")
    is_odd = key and not {"", ".", ".."}.isdisjoint(key.split("/"))
    if found is None or is_odd or (is_web and re.search("[?#]", key)):
        raise UsageError(
            f"{uri}: not a place of inputs",
            "Give s3://BUCKET/KEY, gs://BUCKET/KEY, az://CONTAINER/KEY, https://HOST/PATH without a query, or "
            "hf://datasets/ORG/NAME/PATH.",
        )
    return found[1], unquote(key) if is_web else key


@functools.lru_cache
def objects_at(root: str) -> Objects:
    """Return the storage at a URI that ``split_uri`` gave."""
    if root.startswith("hf://"):
        from retrotool.sources.hub import HubDataset

        return HubDataset(root)
    return storage_at(root)


def locate(uri: str) -> tuple[Objects, str]:
    """Return the storage of a file, and its path there."""
    root, key = split_uri(uri)
    return objects_at(root), key


def tag_of(status: FileStatus) -> str:
    """Return a text that changes with the file, the same for a file that is listed or asked for alone."""
    return status.tag.removeprefix("W/").strip('"')


class RemoteReader(RangeFile):
    """Random access to a file of ``size`` bytes; if it is ``exact``, each read is one request."""

    def __init__(self, uri: str, size: int, end: int | None = None, *, exact: bool = False) -> None:
        super().__init__(size)
        self._objects, self._key = locate(uri)
        self._exact = exact
        self._end = size if end is None else min(end, size)
        self._blocks: deque[tuple[int, bytes]] = deque(maxlen=2)  # the last ones, with their places
        self._after = -1  # the place after the last one
        self._length = FIRST_BYTES
        self._next: Future[bytes] | None = None  # the block at that place
        self._thread = ThreadPoolExecutor(1, "retrotool-range")

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read some bytes, or all if they are to be exact; 0 at the end."""
        view = memoryview(buffer).cast("B")
        start, block = self._block(len(view))
        found = memoryview(block)[self._place - start :][: len(view)]
        view[: len(found)] = found
        self._place += len(found)
        return len(found)

    def close(self) -> None:
        """Stop reading in advance."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, wanted: int) -> tuple[int, bytes]:
        """Return a block with the next byte, and where it begins; it is empty at the end of the file."""
        place = self._place
        least = min(wanted, self._size - place) if self._exact else 1
        for start, block in self._blocks:
            if start <= place and place + least <= start + len(block):
                return start, block
        is_jump = place != self._after
        if is_jump or place == self._end:
            self._length, self._next = FIRST_BYTES, None
        block = self._next.result() if self._next else self._fetch(place, wanted if self._exact else self._length)
        self._blocks.append((place, block))
        self._after, self._next = place + len(block), None
        self._length = min(_GROWTH * self._length, BLOCK_BYTES)
        if not (is_jump or self._exact) and self._after < self._end:
            self._next = self._thread.submit(self._fetch, self._after, self._length)
        return place, block

    def _fetch(self, place: int, length: int) -> bytes:
        """Read up to ``length`` bytes that do not cross the end that was named."""
        end = self._end if place < self._end else self._size
        length = min(length, end - place)
        return self._objects.get_range(self._key, place, length) if length > 0 else b""
