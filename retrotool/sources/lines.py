"""JSON lines: plain (also by byte ranges), gzip and zstd.

Lines are cut from blocks of 4 MiB. Decompression goes through pyarrow, which raises on a truncated file where
zstandard's ``stream_reader`` ends in silence. A line over ``MAX_ROW_BYTES`` is skipped without being held in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from retrotool.errors import InputError
from retrotool.sources.records import MAX_ROW_BYTES, Document, Fields, SetAside, document_of

BLOCK_BYTES = 4 << 20
_COMPRESSION = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


def read_lines(
    path: Path, kind: str, name: str, fields: Fields, start: int, end: int | None
) -> Iterator[Document | SetAside]:
    """Documents of the lines that begin in [``start``, ``end``); lines are counted from the first of them, as 1."""
    line = 0
    with pa.input_stream(str(path), compression=_COMPRESSION[kind]) as stream:
        try:
            for offset, data in _lines(stream, start, end):
                line += 1
                if data is None:
                    yield SetAside(line, f"line longer than {MAX_ROW_BYTES:,} bytes")
                elif (row := _parse(data, line)) is not None:
                    yield row if isinstance(row, SetAside) else document_of(row, fields, name, line, offset)
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) is not None:
                raise
            reason = str(error).splitlines()[0]
            raise InputError(f"broken off after line {line:,}: {reason}", line + 1) from error


def _parse(data: bytes, line: int) -> dict[str, Any] | SetAside | None:
    """The object of a line; None for a blank one."""
    if not data or data.isspace():
        return None
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            data.decode()
        except UnicodeDecodeError as broken:
            return SetAside(line, f"invalid UTF-8 at byte {broken.start:,} of the line")
        return SetAside(line, f"not JSON: {error.msg} (column {error.colno:,})")
    return row if isinstance(row, dict) else SetAside(line, f"not a JSON object but {_JSON_TYPES[type(row)]}")


_JSON_TYPES: dict[type, str] = {
    list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value", type(None): "null",
}  # fmt: skip


def _lines(stream: Any, start: int, end: int | None) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line without its end) of the lines that begin in [start, end); None for one that is too long."""
    offset = start
    skipping = False
    if start:
        # A line belongs to the range that holds its first byte: the byte before tells whether one begins at start.
        stream.seek(start - 1)
        offset -= 1
        skipping = True
    rest = b""
    too_long = False
    while True:
        block = stream.read(BLOCK_BYTES)
        at_end = not block
        pieces = (rest + block).split(b"\n") if rest else block.split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            begin, offset = offset, offset + len(piece) + 1
            if skipping:
                skipping = too_long = False
                continue
            if end is not None and begin >= end and not too_long:
                return
            data = piece.removeprefix(_BOM) if begin == 0 else piece
            yield (begin, None) if too_long or len(data) > MAX_ROW_BYTES else (begin, data)
            too_long = False
        if len(rest) > MAX_ROW_BYTES:
            offset += len(rest)
            rest = b""
            too_long = True
        if end is not None and offset >= end and not skipping and not too_long:
            return
        if at_end:
            if (rest or too_long) and not skipping:
                yield offset, None if too_long else rest.removeprefix(_BOM if offset == 0 else b"")
            return


def count_lines(path: Path, kind: str, offsets: list[int]) -> list[int]:
    """Line numbers, from 1, of the lines that begin at ``offsets`` (ascending) of the decompressed file."""
    numbers: list[int] = []
    seen = line = 0
    with pa.input_stream(str(path), compression=_COMPRESSION[kind]) as stream:
        waiting = iter(offsets)
        target = next(waiting, None)
        while target is not None and (block := stream.read(BLOCK_BYTES)):
            place = 0
            while target is not None and target <= seen + len(block):
                line += block.count(b"\n", place, target - seen)
                place = target - seen
                numbers.append(line + 1)
                target = next(waiting, None)
            line += block.count(b"\n", place)
            seen += len(block)
    return numbers


def lines_before(path: Path, start: int) -> int:
    """How many lines of a plain file come before the first that begins at or after byte ``start``."""
    if start == 0:
        return 0
    count, left = 1, start - 1
    with path.open("rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
