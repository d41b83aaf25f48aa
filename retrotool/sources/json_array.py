r"""JSON files that are not JSON lines: an array of objects, or objects one after another, printed in any way.

ijson (yajl) reads events, which are put together to one element at a time. An element that is not an object, or that
has no text, is rejected alone; where the syntax is broken, the rest of the file is rejected, with the number of the
element. A lone surrogate (``\ud800``), which yajl would replace by a question mark, is broken syntax. A ``.json`` file
whose first line is a JSON object by itself is read as JSON lines. An object at the top of a file is a document.

Cost: about 5 ms a MB of text, 40 ms a MB of token ids, and memory for one element (``Fields.max_document``) and a
block. Files can't be cut into slices.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import ijson
import orjson
from ijson.common import ObjectBuilder

from retrotool.errors import InputError
from retrotool.sources import lines, streams
from retrotool.sources.inputs import InputFile, Slice
from retrotool.sources.lines import BOM, line_limit
from retrotool.sources.records import Document, Fields, Rejected, maker, with_excerpt
from retrotool.sources.streams import BrokenStream

_SPACE = b" \t\r\n"
_DEEPEST = 1000
_NESTING = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_PIECE_BYTES = 64 << 10
_LONE_SURROGATE = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


class BrokenSyntax(Exception):  # noqa: N818 - a verdict about the file
    """From here on, elements can't be told apart."""


def read_json(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Return documents of the elements of a JSON file; lines and positions are elements, from 1."""
    limit = line_limit(fields)
    if is_lines(file, limit):
        for row in lines.read_jsonl(file, fields, where):
            yield row._replace(position=row.line) if isinstance(row, Document) else row
        return
    make = maker(fields, file.name)
    number = 0
    try:
        with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
            for number, value in enumerate(elements(stream, limit), 1):
                found: Document | Rejected
                if isinstance(value, dict):
                    found = make(value, number, number, -1)
                else:
                    found = Rejected(number, f"not a JSON object but {lines.JSON_TYPES[type(value)]}")
                yield found if isinstance(found, Document) else with_excerpt(found, orjson.dumps(value))
    except (BrokenStream, BrokenSyntax) as error:
        raise InputError(f"broken off after element {number:,}: {error}", number + 1) from error


def is_lines(file: InputFile, limit: int) -> bool:
    """Return whether the first line that is not blank is an object by itself."""
    with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
        try:
            begin = _first_bytes(stream)
            if not begin.startswith(b"{"):
                return False
            first = next(lines.cut_lines(itertools.chain([begin], stream), 0, None, limit))
            orjson.loads(first.data or b"")
        except (BrokenStream, orjson.JSONDecodeError):
            return False  # a broken stream is met again, and reported, when the file is read
    return True


def elements(stream: Iterator[bytes], limit: int) -> Generator[Any]:
    """Return the elements of an array, or the objects that follow one another.

    Raises ``BrokenSyntax`` after the last one that can be told from the rest, or if one has more than ``limit`` bytes.
    """
    first = _first_bytes(stream)
    if not first.startswith((b"[", b"{")):
        raise BrokenSyntax("neither an array of objects nor objects" if first else "nothing but white space")
    base = int(first.startswith(b"["))
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events, use_float=True, multiple_values=not base)
    element, depth, size = ObjectBuilder(), 0, 0
    for piece in itertools.chain(_pieces(itertools.chain([first], stream), limit), [b""]):
        broken = ""
        try:
            if piece:
                parser.send(piece)
            else:
                parser.close()
        except (ijson.JSONError, ValueError) as error:
            # Without what yajl quotes of the input in the lines after the first.
            said = str(error).removeprefix("b'").partition("\n")[0].partition("\\n")[0]
            broken = "a lone surrogate" if isinstance(error, UnicodeDecodeError) else said
        size += len(piece)
        for event, value in events:
            before, depth = depth, depth + _NESTING.get(event, 0)
            if depth > _DEEPEST + 1:
                raise BrokenSyntax(f"more than {_DEEPEST:,} brackets inside one another")
            if min(before, depth) < base:
                continue  # it begins or ends the array around the elements
            element.event(event, value)
            if depth == base:
                size = len(piece)
                yield element.value
                element = ObjectBuilder()
        events.clear()
        if not broken and size > limit:
            broken = f"element of more than {limit:,} bytes"
        if broken:
            raise BrokenSyntax(broken)


def _first_bytes(stream: Iterator[bytes]) -> bytes:
    """Return what is read first, from its first byte that is not white space."""
    head = b""
    for block in stream:
        head += block
        if len(head) < len(BOM):
            continue
        head = head.removeprefix(BOM).lstrip(_SPACE)
        if head:
            break
    return head.removeprefix(BOM).lstrip(_SPACE)


def _pieces(stream: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Return the same bytes in small pieces; ``BrokenSyntax`` at a lone surrogate."""
    for text in _whole_escapes(stream, limit):
        lone = _LONE_SURROGATE.search(text) if rb"\ud" in text or rb"\uD" in text else None
        end = lone.start() if lone else len(text)
        for place in range(0, end, _PIECE_BYTES):
            yield text[place : min(place + _PIECE_BYTES, end)]
        if lone:
            raise BrokenSyntax("a lone surrogate")


def _whole_escapes(stream: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Return the same bytes, cut after a quote or a space, where no escape of a string is cut."""
    held: list[bytes] = []
    size = 0
    for block in stream:
        cut = max(block.rfind(b'"'), block.rfind(b" ")) + 1
        if cut or size > limit:
            yield b"".join([*held, block[:cut]])
            held, size = [], 0
        held.append(block[cut:])
        size += len(block) - cut
    if size:
        yield b"".join(held)
