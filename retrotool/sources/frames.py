"""Where the frames of a zstd archive begin and end: what cuts a large archive into slices.

Walks the headers of frames and blocks (RFC 8878) without decompressing: one read of 3 bytes a block, which holds up to
128 KiB of text, so about 20 ms a GB of text once the headers are in the page cache. An archive with a frame that does
not say its content size, or that is damaged or cut off, is not cut: reading it from the start reports the damage in its
place. ``lines`` checks what a header says when it reads the frame. Seek tables and dictionaries are not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import zstandard

from retrotool.sources.files import WHOLE, InputFile, Slice

_SKIPPABLE = 0x184D2A50
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
    """Return the data frames of an archive; None if one does not say its content size, or the file is damaged."""
    found = []
    with path.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        offset = 0
        try:
            while offset < size:
                head = _read(descriptor, 8, offset)
                if int.from_bytes(head[:4], "little") & ~0xF == _SKIPPABLE:
                    offset += 8 + int.from_bytes(head[4:], "little")
                else:
                    found.append(_frame(descriptor, offset))
                    offset += found[-1].size
        except _NotCut:
            return None
    return found if offset == size else None


def cut_frames(file: InputFile, target: int) -> list[Slice]:
    """Return slices of whole frames with about ``target`` bytes of text each; the whole file if it can't be cut."""
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


def _frame(descriptor: int, offset: int) -> Frame:
    data = os.pread(descriptor, _LARGEST_HEADER, offset)
    try:
        header = zstandard.get_frame_parameters(data)
        place = offset + zstandard.frame_header_size(data)
    except zstandard.ZstdError as error:
        raise _NotCut from error
    if header.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise _NotCut
    last = False
    while not last:
        block = int.from_bytes(_read(descriptor, _HEADER_OF_BLOCK, place), "little")
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == _RESERVED_BLOCK:
            raise _NotCut
        place += _HEADER_OF_BLOCK + (1 if kind == _RUN_BLOCK else length)
    return Frame(offset, place + _CHECKSUM_BYTES * header.has_checksum - offset, header.content_size)
