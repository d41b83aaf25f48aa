"""Standard input as a file: what can be read once becomes an input that can be cut, and read again after a kill.

The stream is stored as a zstd archive of frames of 64 MiB of text, each with its content size and checksum, so that it
is cut into slices like any such archive. A stream that is compressed already (gzip, zstd, bzip2, xz, by its first
bytes) is decompressed on the way. The file is named by its content: the same stream gives the same file.

Cost: about 5 ms a MB, 200 MB/s a core; 100 MiB of memory; disk space of about a third of the text.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from retrotool.errors import InputError, UsageError
from retrotool.sources import streams
from retrotool.sources.files import input_format
from retrotool.sources.streams import BLOCK_BYTES, BrokenStream
from retrotool.store import disk
from retrotool.store.atomic import temporary_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FRAME_BYTES = 64 << 20
_LEVEL = 1
_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: _LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
}


def spool(stream: BinaryIO, folder: Path, suffix: str = ".jsonl") -> Path:
    """Write a stream to a file in ``folder``; ``suffix`` is that of the format of its text.

    Raises ``UsageError`` for an empty stream or a format that can't be compressed, ``InputError`` for one that breaks
    off, ``StorageError`` if the disk is full; then nothing is left behind.
    """
    if input_format(f"x{suffix}.zst") is None:
        raise UsageError(f"standard input can't be {suffix}", "Save it as a file, and give its path.")
    digest = hashlib.sha256()  # fed in the thread that reads ahead
    with temporary_file(folder / "stdin", "stdin") as temporary:
        try:
            with temporary.open("wb") as file, contextlib.closing(streams.ahead(_text(stream, digest.update))) as text:
                empty = not _write(text, file)
        except BrokenStream as error:
            raise InputError(f"standard input breaks off: {error}; nothing was kept") from error
        if empty:
            raise UsageError("standard input is empty", "Pipe text into the command, or give a file instead of -.")
        disk.fsync(temporary)
        final = folder / f"stdin-{digest.hexdigest()[:16]}{suffix}.zst"
        disk.rename(temporary, final)
        disk.fsync_directory(folder)
    return final


def _text(stream: BinaryIO, seen: Callable[[bytes], object]) -> Generator[bytes]:
    """The stream's blocks, decompressed if its first bytes say that it is compressed."""
    start = b""
    while len(start) < streams.LONGEST_MAGIC and (data := stream.read(streams.LONGEST_MAGIC - len(start))):
        start += data
    blocks = _blocks(start, stream)
    compression = streams.compression_by_magic(start)
    for block in streams.unpacked(blocks, compression) if compression else blocks:
        seen(block)
        yield block


def _blocks(start: bytes, stream: BinaryIO) -> Generator[bytes]:
    if start:
        yield start
    while data := stream.read(BLOCK_BYTES):
        yield data


def _write(text: Iterator[bytes], file: IO[bytes]) -> int:
    """Write frames; returns the bytes of text."""
    total = 0
    held: list[bytes] = []
    left = FRAME_BYTES
    for block in text:
        total += len(block)
        rest = block
        while len(rest) >= left:
            _write_frame([*held, rest[:left]], file)
            rest, held, left = rest[left:], [], FRAME_BYTES
        if rest:
            held.append(rest)
            left -= len(rest)
    if held:
        _write_frame(held, file)
    return total


def _write_frame(blocks: list[bytes], file: IO[bytes]) -> None:
    compressor = zstd.ZstdCompressor(options=_OPTIONS)
    compressor.set_pledged_input_size(sum(map(len, blocks)))  # so that the frame says how much it holds
    for block in blocks:
        file.write(compressor.compress(block))
    file.write(compressor.flush())
