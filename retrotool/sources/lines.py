"""Split streams into lines, and read JSON lines and plain text.

A range of a file (bytes of a plain file, whole zstd frames, or text of a stream) has the lines that begin in
it, so every line belongs to one range: the first range has the file's first line, any other those whose
preceding separator is entirely inside. Overlapping separators (two newlines in three) are one gap, wherever
reading began.

A text file is one document, whose id is the file's name, or several between separators, whose ids are hashes
of their text. White space alone is not a row. A line over the limit is not held in memory. Cost: about 1.2 ms
per MB and 0.5 µs per line.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from retrotool.errors import InputError
from retrotool.sources import streams
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, content_hash, excerpt, maker, with_excerpt
from retrotool.sources.streams import BrokenStream

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1024
_MOST_SLICES = {"zst": 10, "gz": 5, "xz": 3}  # of a stream: what decompressing again costs beside tokenising
JSON_OVERHEAD = 3  # most JSON bytes per byte of ordinary UTF-8 text: ``\u00e9`` has six for two


class Line(NamedTuple):
    """A line without its end; ``data`` is None over the limit, then ``head`` and ``size`` are known."""

    number: int
    offset: int
    data: bytes | None
    head: bytes = b""
    size: int = 0


def line_limit(fields: Fields) -> int:
    """Return the most bytes of a JSON row: the limit is on its text, and other fields may take more."""
    return JSON_OVERHEAD * fields.max_document + (1 << 20)


def read_jsonl(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield documents of the lines that begin in a range; its first line is number 1."""
    limit = line_limit(fields)
    make = maker(fields, file.name)
    for line in read_lines(file, where, limit):
        data = line.data or line.head  # only one over the limit has no data, as blank lines are no rows
        row = parse_row(data) if line.data else f"line of {line.size:,} bytes, longer than {limit:,}"
        if isinstance(row, str):
            yield Rejected(line.number, row, line.offset, excerpt(data))
        else:
            yield with_excerpt(make(row, line.number, line.offset, line.offset), data)


def parse_row(data: bytes) -> dict[str, Any] | str:
    """Return the object of a line, or why it is not one."""
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            data.decode()
        except UnicodeDecodeError as broken:
            return f"invalid UTF-8 at byte {broken.start:,} of the line"
        return f"not JSON: {error.msg} (column {error.colno:,})"
    return row if isinstance(row, dict) else f"not a JSON object but {JSON_TYPES[type(row)]}"


JSON_TYPES: dict[type, str] = {
    list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value", type(None): "null",
}  # fmt: skip


def read_lines(file: InputFile, where: Slice, limit: int, separator: bytes = b"\n") -> Iterator[Line]:
    """Yield non-blank lines that begin in a range; raise ``InputError`` where the file is damaged."""
    number = 0
    try:
        with contextlib.closing(_stream(file, where)) as stream:
            for line in cut_lines(stream, where.first, where.last, limit, separator, skip=where.first > 0):
                number = line.number
                if line.data is None or (line.data and not line.data.isspace()):
                    yield line
    except BrokenStream as error:
        after = "" if where.first else f" after line {number:,}"  # of the file, not of a slice
        raise InputError(f"broken off{after}: {error}", number + 1) from error


def _stream(file: InputFile, where: Slice) -> Generator[bytes]:
    if file.compression and where.first and not where.start:
        yield from _after(file.blocks(), where.first)
        return
    start = where.start
    if where.last is not None and where.end is not None:
        held = 0
        with contextlib.closing(file.blocks(start, where.end)) as stream:
            for block in stream:
                held += len(block)
                yield block
        if file.compression and held != where.last - where.first:
            # Rows at the borders of ranges would be lost or repeated.
            raise BrokenStream(f"frames have {held:,} bytes of text, but declare {where.last - where.first:,}")
        start = where.end
    yield from file.blocks(start)


def _after(stream: Generator[bytes], first: int) -> Generator[bytes]:
    """Yield what comes after ``first`` bytes; damage before that is reported by the slice that has it."""
    seen = 0
    with contextlib.closing(stream):
        try:
            for block in stream:
                seen += len(block)
                if seen > first:
                    yield block[max(first - seen, -len(block)) :]
        except BrokenStream:
            if seen >= first:
                raise


def cut_stream(file: InputFile, slices: int) -> list[Slice]:
    """Return about equal slices of an archive that is read from its beginning, at most ``slices``.

    Each reader decompresses all that comes before its slice, so there are few, and none of a file that each
    would have to download.
    """
    slices = min(slices, _MOST_SLICES.get(file.compression, 1))
    if slices < 2 or file.is_remote:
        return [WHOLE]
    text = file.estimated_text()
    borders = sorted({text * i // slices for i in range(slices)})
    return [Slice(0, None, first, last) for first, last in itertools.zip_longest(borders, borders[1:])]


def cut_byte_ranges(file: InputFile, target: int) -> list[Slice]:
    """Return slices of about ``target`` bytes of text: bytes of a plain file, or whole zstd frames."""
    if file.compression == "zst" and not file.is_remote:  # its headers are all over the file
        return _cut_frames(file, target)
    if file.compression or file.size <= target:
        return [WHOLE]
    ranges = -(-file.size // target)
    cuts = [file.size * i // ranges for i in range(ranges + 1)]
    return [Slice(start, end, start, end) for start, end in itertools.pairwise(cuts)]


def _cut_frames(file: InputFile, target: int) -> list[Slice]:
    found = streams.frames_of(Path(file.path))
    if not found or not all(frame.is_declared for frame in found) or sum(frame.content for frame in found) <= target:
        return [WHOLE]
    slices = []
    start = first = text = 0
    for frame, after in itertools.pairwise([*found, streams.Frame(file.size, 0, 2 * target)]):
        text += frame.content
        # End the slice if the next frame would take it further from the target.
        if text - first + after.content / 2 >= target:
            slices.append(Slice(start, after.offset, first, text))
            start, first = after.offset, text
    return slices if len(slices) > 1 else [WHOLE]


class Held:
    """A line that is read in blocks; over the limit, only its first bytes and its size are held."""

    def __init__(self, limit: int, gap: int) -> None:
        self._limit, self._gap = limit, gap  # up to ``gap`` bytes at the front may belong to a separator
        self._blocks: list[bytes] = []
        self.size = 0
        self.front = b""

    def add(self, block: bytes) -> None:
        """Add a block, in which no separator ends."""
        self.size += len(block)
        self.front += block[: HEAD_BYTES - len(self.front)]
        self._blocks.append(block)
        if self.size > self._limit + self._gap:
            self._blocks = []

    def line(self, number: int, offset: int, gap: int) -> Line:
        """Return the line without ``gap`` bytes at its front."""
        size = self.size - gap
        if size > self._limit:
            return Line(number, offset + gap, None, self.front[gap:], size)
        data = b"".join(self._blocks)[gap:]
        return Line(number, offset + gap, data.removeprefix(BOM) if offset == 0 else data, size=size)


def overlaps(separator: bytes) -> list[bytes]:
    """Return what follows a separator if another one begins inside it, nearest first."""
    return [separator[n:] for n in range(len(separator) - 1, 0, -1) if separator[:n] == separator[-n:]]


def _gap(front: bytes, ends: list[bytes]) -> int:
    """Return how many bytes after a separator belong to separators that overlap it."""
    gap = 0
    while found := next((end for end in ends if front.startswith(end, gap)), b""):
        gap += len(found)
    return gap


def cut_lines(
    stream: Iterator[bytes], offset: int, last: int | None, limit: int, separator: bytes = b"\n", *, skip: bool = False
) -> Iterator[Line]:
    """Yield lines of a stream at ``offset`` that begin up to ``last``; ``skip`` the incomplete first one."""
    width, ends = len(separator), overlaps(separator)
    stop = sys.maxsize if last is None else last + width
    begin, number = offset, 0
    longest_gap = width - 1  # a longer one would contain a separator
    held = Held(limit, longest_gap)
    carry = b""  # last bytes, in which a separator may begin
    for block in stream:
        pieces = (carry + block).split(separator)
        rest = pieces.pop()
        for piece in pieces:
            if not (held.size or ends or skip or begin == 0) and begin < stop and len(piece) <= limit:
                number += 1
                yield Line(number, begin, piece)
                begin += len(piece) + width
                continue
            held.add(piece)
            gap = _gap(held.front + separator, ends) if ends and begin > offset else 0
            if begin + gap >= stop:
                return
            if skip:
                skip = False
            elif gap < held.size or not ends:
                number += 1
                yield held.line(number, begin, gap)
            begin += held.size + width
            held = Held(limit, longest_gap)
        keep = max(0, len(rest) - width + 1)
        if keep:
            held.add(rest[:keep])
        carry = rest[keep:]
        if begin >= stop or (skip and begin + held.size >= stop):
            return
    held.add(carry)
    gap = _gap(held.front, ends) if ends and begin > offset else 0
    if held.size > gap and not skip and begin + gap < stop:
        yield held.line(number + 1, begin, gap)  # the last line needs no separator


def count_lines(file: InputFile, offsets: list[int]) -> list[int]:
    """Return the numbers of the lines at ascending ``offsets``; raise ``InputError`` for a damaged file."""
    numbers: list[int] = []
    seen = line = 0
    with _to_count(file) as stream:
        while len(numbers) < len(offsets) and (block := next(stream, b"")):
            place = 0
            for target in offsets[len(numbers) : bisect.bisect_right(offsets, seen + len(block))]:
                line += block.count(b"\n", place, target - seen)
                place = target - seen
                numbers.append(line + 1)
            line += block.count(b"\n", place)
            seen += len(block)
    return numbers


@contextlib.contextmanager
def _to_count(file: InputFile, where: Slice = WHOLE) -> Iterator[Iterator[bytes]]:
    """Open a file to count lines from the beginning of a range on; ``InputError`` if that can't be done."""
    if file.is_remote:
        raise InputError("lines aren't counted: that would download the file again")
    try:
        with contextlib.closing(_stream(file, Slice(where.start, None, where.first))) as stream:
            yield stream
    except BrokenStream as error:
        raise InputError(f"lines can't be counted: {error}") from error


class LineCounter:
    """Counts the lines before ranges of files. Ranges of one file in ascending order read it once."""

    def __init__(self) -> None:
        self._file: InputFile | None = None
        self._where, self._lines = WHOLE, 0  # the range asked for last, and the lines before it

    def before(self, file: InputFile, where: Slice, fields: Fields) -> int:
        """Return how many lines come before a range; raise ``InputError`` if the file is damaged there."""
        if where.first == 0:
            return 0
        if file.base in ("parquet", "arrow"):  # whose ranges are rows
            return where.first
        if file is not self._file or where.first < self._where.first:
            self._file, self._where, self._lines = file, WHOLE, 0
        known, separator = self._where, (fields.separator or "").encode() if file.base == "txt" else b""
        with _to_count(file, known) as stream:
            if separator:
                lines = cut_lines(stream, known.first, where.first, 0, separator, skip=known.first > 0)
                self._lines += sum(1 for _ in lines)
            else:  # the line that begins the file has no end before it
                self._lines += _count_ends(stream, where.first - known.first) + (known.first == 0)
        self._where = where
        return self._lines


def _count_ends(stream: Iterator[bytes], size: int) -> int:
    """Return the newlines in the first ``size`` bytes of a stream; raise ``InputError`` if it is shorter."""
    ends = 0
    for block in stream:
        ends += block.count(b"\n", 0, size)
        if (size := size - len(block)) <= 0:
            return ends
    raise InputError("lines can't be counted: the file was truncated")


def read_txt(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield the documents of a text file."""
    if not fields.separator:
        found = read_whole(file, fields.max_document)
        yield found if isinstance(found, Rejected) else text_document(found, file, fields)
        return
    for piece in read_lines(file, where, fields.max_document, fields.separator.encode()):
        yield text_document(piece, file, fields)


def read_whole(file: InputFile, limit: int) -> Line | Rejected:
    """Read a file as one line, with number 0."""
    held = Held(limit + len(BOM), 0)
    try:
        with contextlib.closing(file.blocks()) as stream:
            for block in stream:
                held.add(block)
    except BrokenStream as error:
        reason = f"broken off after {held.size:,} bytes: {error}"
        return Rejected(0, reason, 0, excerpt(held.front), damage=True)
    return held.line(0, 0, 0)


def text_document(piece: Line, file: InputFile, fields: Fields) -> Document | Rejected:
    """Make a document of a text; number 0 is the whole file."""
    data = piece.data
    if data is None or len(data) > fields.max_document:
        reason = f"text has {piece.size:,} bytes, more than --max-document {fields.max_document:,}"
        return Rejected(piece.number, reason, piece.offset, excerpt(piece.head or data or b""))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Rejected(piece.number, f"invalid UTF-8 at byte {error.start:,}", piece.offset, excerpt(data))
    folder = file.name.rpartition("/")[0]
    kept = (None,) * len(fields.keep)
    name = content_hash(text).hex() if piece.number else file.name
    return Document(name, text, folder or file.name, piece.offset, piece.number, kept)
