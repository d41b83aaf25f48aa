"""Bytes of an input: plain, or out of gzip, zstd, bzip2 and xz, with every byte before a break.

``blocks`` gives blocks of at most ``BLOCK_BYTES``, read and decompressed ahead in a thread, so that parsing overlaps
with both. A stream that ends inside a frame, or is damaged there, raises ``BrokenStream`` after all that could be
decompressed was given; a decompression bomb costs no more than a block a step. Archives of several members or
frames, with zeros between or after them, are read to the end; anything else there is a break. A checksum stands at the
end of what it covers, so text that is damaged without breaking the compression is given before its damage is told.

Cost: zstd about 500 MB/s, gzip 250, xz 100, bzip2 30, of decompressed text and a core; memory of a few blocks, and the
window that a frame asks for (zstd up to 2 GiB, as archives made with ``--long=31`` do). A damaged frame is decompressed
twice. No random access.
"""

from __future__ import annotations

import bz2
import contextlib
import itertools
import lzma
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK_BYTES = 256 << 10
_AHEAD = 16
_PATIENCE_SECONDS = 2.0
"""How long a thread is waited for that nobody reads from any more; it may stand in a read that never ends."""
_PACKED_BYTES = 64 << 10
"""Compressed bytes a step: what follows a frame is copied, and there may be a million frames."""
_LARGEST_WINDOW_LOG = 31
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b\x08": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
LONGEST_MAGIC = max(map(len, _MAGIC))


class BrokenStream(Exception):  # noqa: N818 - what it says of the stream is its name
    """The stream ends where it must not, or its content is damaged; what came before is whole."""


class Decompressor(Protocol):
    """What the standard library's decompressors share."""

    @property
    def eof(self) -> bool:
        """Whether the frame is complete."""

    @property
    def unused_data(self) -> bytes:
        """What was fed after the frame's end."""

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed for more output."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Feed ``data``; at most ``max_length`` bytes come back, the rest later."""


class Inflater:
    """``zlib`` in the manner of ``bz2`` and ``lzma``; ``wbits`` as there: 31 is gzip."""

    def __init__(self, wbits: int = 31) -> None:
        self._inner = zlib.decompressobj(wbits)

    @property
    def eof(self) -> bool:
        """Whether the frame is complete."""
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        """What was fed after the frame's end."""
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed for more output."""
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Feed ``data``; at most ``max_length`` bytes come back, the rest later."""
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _zstd() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG})


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {"gz": Inflater, "zst": _zstd, "bz2": bz2.BZ2Decompressor, "xz": _xz}
_ERRORS = (zlib.error, zstd.ZstdError, lzma.LZMAError, OSError, ValueError, EOFError)


def compression_of(name: str) -> str:
    """The compression that a file's name stands for: "gz", "zst", "bz2", "xz", or "" for none."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if name.lower().endswith(suffix)), "")


def compression_by_magic(start: bytes) -> str:
    """The compression that the first ``LONGEST_MAGIC`` bytes of a file speak of, or ""."""
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def blocks(path: Path, compression: str, start: int = 0, end: int | None = None) -> Generator[bytes]:
    """Decompressed blocks of the file's bytes [``start``, ``end``), read ahead in a thread.

    Raises ``BrokenStream`` after the last good byte, ``OSError`` if the system refuses to read.
    """
    return ahead(_decompressed(path, compression, start, end))


def decompressed(file: IO[bytes], compression: str, start: int = 0, end: int | None = None) -> Generator[bytes]:
    """What ``blocks`` gives, of an open file that can seek, without a thread."""
    if not compression:
        yield from _raw_blocks(file, start, end, BLOCK_BYTES)
        return
    frames = _Frames(_DECOMPRESSORS[compression], _raw_blocks(file, start, end, min(_PACKED_BYTES, BLOCK_BYTES)))
    try:
        yield from _gathered(frames.blocks())
    except _DamagedFrame as damage:
        yield from frames.rest_of_damaged(file, start)
        raise BrokenStream(f"damaged compression: {damage}") from damage


def unpacked(raw: Iterator[bytes], compression: str) -> Generator[bytes]:
    """Decompress blocks that can be read only once; of a damaged frame its last ``BLOCK_BYTES`` may be missing.

    Raises ``BrokenStream`` after the last good byte.
    """
    try:
        yield from _gathered(_Frames(_DECOMPRESSORS[compression], raw).blocks())
    except _DamagedFrame as damage:
        raise BrokenStream(f"damaged compression: {damage}") from damage


def _decompressed(path: Path, compression: str, start: int, end: int | None) -> Generator[bytes]:
    with path.open("rb") as file:
        yield from decompressed(file, compression, start, end)


def _raw_blocks(file: IO[bytes], start: int, end: int | None, size: int) -> Iterator[bytes]:
    file.seek(start)
    while end is None or start < end:
        data = file.read(size if end is None else min(size, end - start))
        if not data:
            return
        start += len(data)
        yield data


def _gathered(source: Iterator[bytes]) -> Generator[bytes]:
    """The same bytes in blocks that are worth handing from thread to thread: members can be tiny."""
    held: list[bytes] = []
    size = 0
    try:
        for block in source:
            held.append(block)
            size += len(block)
            if 2 * size >= BLOCK_BYTES:
                yield held[0] if len(held) == 1 else b"".join(held)
                held, size = [], 0
    except (BrokenStream, _DamagedFrame):
        if held:
            yield b"".join(held)
        raise
    if held:
        yield b"".join(held)


class _DamagedFrame(Exception):  # noqa: N818 - caught where the frame's last good bytes are looked for
    """The decompressor refuses the frame."""


class _Frames:
    """Decompresses frame after frame; knows where the frame at hand begins, and how much of it was given."""

    def __init__(self, make: Callable[[], Decompressor], raw: Iterator[bytes]) -> None:
        self._make, self._raw = make, raw
        self._read = self._begin = self._given = self._last = 0

    def blocks(self) -> Iterator[bytes]:
        """Decompressed blocks; raises ``_DamagedFrame``, or ``BrokenStream`` where the input ends inside a frame."""
        data = self._next()
        while data:
            frame = self._make()
            self._begin, self._given = self._read - len(data), 0
            yield from self._frame(frame, data)
            data = self._after_padding(frame.unused_data)

    def _next(self) -> bytes:
        data = next(self._raw, b"")
        self._read += len(data)
        self._last = len(data)
        return data

    def _after_padding(self, data: bytes) -> bytes:
        """What follows a frame; zeros fill archives up to a tape's or a disk's block."""
        while not (data := data.lstrip(b"\0")):
            if not (data := self._next()):
                return b""
        return data

    def _frame(self, frame: Decompressor, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                text = frame.decompress(data, BLOCK_BYTES)
            except _ERRORS as error:
                raise _DamagedFrame(str(error)) from error
            if text:
                self._given += len(text)
                yield text
            if frame.eof:
                return
            data = self._next() if frame.needs_input else b""
            # Decompressors may hold back output although they ask for input.
            if not (data or text) and frame.needs_input:
                raise BrokenStream("the file ends inside a compressed frame")

    def rest_of_damaged(self, file: IO[bytes], start: int) -> Iterator[bytes]:
        """What the damaged frame still has before the damage; ``start`` is where in ``file`` the stream began.

        A decompressor that fails keeps what it had just decompressed, so the block it failed in is fed byte by byte.
        """
        failed = max(self._begin, self._read - self._last)
        good = _raw_blocks(file, start + self._begin, start + failed, _PACKED_BYTES)
        bad = _raw_blocks(file, start + failed, start + self._read, 1)
        frame = self._make()
        skip = self._given
        for fed in itertools.chain(good, bad):
            data, text = fed, b""
            while data or text or not frame.needs_input:
                try:
                    text = frame.decompress(data, BLOCK_BYTES)
                except _ERRORS:
                    return
                if len(text) > skip:
                    yield text[skip:]
                skip = max(0, skip - len(text))
                data = b""


def ahead(source: Generator[bytes]) -> Generator[bytes]:
    """The same blocks, produced by a thread that is at most a few blocks ahead.

    A thread that stands in a read when it is no longer needed is left behind after a while, and ends with the process.
    """
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            with contextlib.closing(source):
                for block in source:
                    if not put(block):
                        return
            put(None)
        except BaseException as error:  # raised again in the thread that reads
            put(error)

    thread = threading.Thread(target=produce, name="retrotool-read", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(_PATIENCE_SECONDS)
