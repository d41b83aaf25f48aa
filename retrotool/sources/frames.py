"""Where the frames of a zstd archive lie, without decompressing them: what cuts a large archive into slices.

Walks the headers of frames and blocks (RFC 8878): one read of 3 bytes a block, which are up to 128 KiB of text each,
so about 20 ms a GB of text once the headers are in the page cache. If the archive ends with a seek table (the seekable
format of zstd's ``contrib``), only the frames' own headers are read. An archive with a frame that does not tell its
content size, or that is damaged or cut off, is not cut: whoever reads it from the start meets the damage in its place.

What a header says is checked when the frame is read, see ``lines``. Dictionaries and contents are not looked at.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from retrotool.sources.files import WHOLE, InputFile, Slice

_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A50
_SEEK_TABLE = 0x184D2A5E
_SEEK_MAGIC = 0x8F92EAB1
_SEEK_FOOTER_BYTES = 9
_LARGEST_HEADER = 18
_HEADER_OF_BLOCK = 3
_RUN_BLOCK, _RESERVED_BLOCK = 1, 3
_CHECKSUM_BYTES = 4


class Frame(NamedTuple):
    """A data frame: where it begins in the file, its bytes there, and the bytes of text it holds."""

    offset: int
    size: int
    content: int


class _NotCut(Exception):  # noqa: N818 - a verdict about the file, not a failure
    """The frames' places or contents can't be known."""


def frames_of(path: Path) -> list[Frame] | None:
    """The data frames of an archive, in order; None if one does not say its content size, or the file is damaged."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            table = _seek_table(descriptor, size)
            return _walk(descriptor, size) if table is None else table
        except _NotCut:
            return None


def cut(file: InputFile, target: int) -> list[Slice]:
    """Slices of whole frames with about ``target`` bytes of text each; the whole file if it can't be cut."""
    found = frames_of(Path(file.path))
    if not found or sum(frame.content for frame in found) <= target:
        return [WHOLE]
    slices = []
    start = first = text = 0
    for frame, after in zip(found, [*found[1:], None], strict=True):
        text += frame.content
        end = file.size if after is None else after.offset
        # A slice ends where the next frame would take it further from the target than it is without.
        if after is None or text - first + after.content / 2 >= target:
            slices.append(Slice(start, end, first, text))
            start, first = end, text
    return slices if len(slices) > 1 else [WHOLE]


def _read(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise _NotCut
    return data


def _magic(descriptor: int, offset: int) -> int:
    return int.from_bytes(_read(descriptor, 4, offset), "little")


def _walk(descriptor: int, size: int) -> list[Frame]:
    found = []
    offset = 0
    while offset < size:
        magic = _magic(descriptor, offset)
        if magic & ~0xF == _SKIPPABLE:
            offset += 8 + _magic(descriptor, offset + 4)
        elif magic == _MAGIC:
            frame = _frame(descriptor, offset)
            found.append(frame)
            offset += frame.size
        else:
            raise _NotCut
    if offset != size:
        raise _NotCut
    return found


def _frame(descriptor: int, offset: int) -> Frame:
    header, content, checksum = _header(descriptor, offset)
    if content is None:
        raise _NotCut
    place = offset + header
    last = False
    while not last:
        block = int.from_bytes(_read(descriptor, _HEADER_OF_BLOCK, place), "little")
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED_BLOCK:
            raise _NotCut
        place += _HEADER_OF_BLOCK + (1 if kind == _RUN_BLOCK else length)
    return Frame(offset, place + checksum - offset, content)


def _header(descriptor: int, offset: int) -> tuple[int, int | None, int]:
    """Bytes of a frame's header, its content size if it tells, and the bytes of its checksum (RFC 8878, 3.1.1.1)."""
    data = os.pread(descriptor, _LARGEST_HEADER, offset)
    if len(data) < 6 or int.from_bytes(data[:4], "little") != _MAGIC:
        raise _NotCut
    flags = data[4]
    single_segment = flags >> 5 & 1
    place = 5 + (not single_segment) + (0, 1, 2, 4)[flags & 3]
    width = (single_segment, 2, 4, 8)[flags >> 6]
    if len(data) < place + width:
        raise _NotCut
    content = int.from_bytes(data[place : place + width], "little") + (256 if width == 2 else 0) if width else None
    return place + width, content, _CHECKSUM_BYTES if flags >> 2 & 1 else 0


def _seek_table(descriptor: int, size: int) -> list[Frame] | None:
    """The frames by the seek table at the file's end; None if there is none, or it contradicts the file."""
    if size < _SEEK_FOOTER_BYTES + 8:
        return None
    count, flags, magic = struct.unpack("<IBI", _read(descriptor, _SEEK_FOOTER_BYTES, size - _SEEK_FOOTER_BYTES))
    width = 12 if flags >> 7 else 8
    begin = size - _SEEK_FOOTER_BYTES - count * width - 8
    if magic != _SEEK_MAGIC or begin < 0 or _magic(descriptor, begin) != _SEEK_TABLE:
        return None
    if _magic(descriptor, begin + 4) != size - begin - 8:
        return None
    data = _read(descriptor, count * width, begin + 8)
    entries = [struct.unpack_from("<II", data, i * width) for i in range(count)]
    return _confirmed(descriptor, entries, begin)


def _confirmed(descriptor: int, entries: Sequence[tuple[int, ...]], end: int) -> list[Frame] | None:
    found = []
    offset = 0
    for size, content in entries:
        if offset + size > end:
            return None
        if _magic(descriptor, offset) & ~0xF != _SKIPPABLE:
            said = _header(descriptor, offset)[1]
            if said is not None and said != content:
                return None
            found.append(Frame(offset, size, content))
        offset += size
    return found if offset == end else None
