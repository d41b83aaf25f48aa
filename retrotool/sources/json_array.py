r"""JSON files that are not JSON lines: an array of objects, or objects in sequence, in any layout.

ijson (yajl) parses events, from which elements are built one at a time. An element that is not an object, or
has no text, is rejected alone; a syntax error rejects the rest of the file, with the element's number. A lone
surrogate (``\ud800``), which yajl would replace by a question mark, is a syntax error. A ``.json`` file whose
first line is a JSON object is read as JSON lines.

Cost: about 5 ms per MB of text, 40 ms per MB of token ids, and memory for one element
(``Fields.max_document``) and a block. Files can't be cut into slices.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Generator, Iterator
from typing import Any

import ijson
import orjson
from ijson.common import ObjectBuilder

from retrotool.errors import InputError
from retrotool.sources import lines
from retrotool.sources.inputs import InputFile, Slice
from retrotool.sources.lines import BOM, line_limit
from retrotool.sources.records import Document, Fields, Rejected, maker, with_excerpt
from retrotool.sources.streams import BrokenStream

_SPACE = b" \t\r\n"
_DEEPEST = 1000
_NESTING = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_PIECE_BYTES = 64 << 10
_LONE_SURROGATE = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


def read_json(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield documents of the elements of a JSON file; lines and positions are elements, from 1."""
    limit = line_limit(fields)
    if is_lines(file, limit):
        for row in lines.read_jsonl(file, fields, where):
            yield row._replace(position=row.line) if isinstance(row, Document) else row
        return
    make = maker(fields, file.name)
    number = 0
    try:
        with contextlib.closing(file.blocks()) as stream:
            for number, value in enumerate(elements(stream, limit), 1):
                found: Document | Rejected
                if isinstance(value, dict):
                    found = make(value, number, number, -1)
                else:
                    found = Rejected(number, f"not a JSON object but {lines.JSON_TYPES[type(value)]}")
                yield found if isinstance(found, Document) else with_excerpt(found, _dumped(value))
    except BrokenStream as error:
        raise InputError(f"broken off after element {number:,}: {error}", number + 1) from error


def _dumped(value: Any) -> bytes:
    """Return an element as JSON, to be quoted; nothing if it is nested too deep for that."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b""


def is_lines(file: InputFile, limit: int) -> bool:
    """Return whether the first line that is not blank is a complete object."""
    with contextlib.closing(file.blocks()) as stream:
        try:
            begin = _first_bytes(stream)
            if not begin.startswith(b"{"):
                return False
            first = next(lines.cut_lines(itertools.chain([begin], stream), 0, None, limit))
            orjson.loads(first.data or b"")
        except (BrokenStream, orjson.JSONDecodeError):
            return False  # a broken stream is reported when the file is read
    return True


def elements(stream: Iterator[bytes], limit: int) -> Generator[Any]:
    """Yield array elements, or objects in sequence; raise ``BrokenStream`` after the last good one."""
    first = _first_bytes(stream)
    if not first.startswith((b"[", b"{")):
        raise BrokenStream("neither an array of objects nor objects" if first else "nothing but white space")
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
            # yajl quotes the input after the first line.
            message = str(error).removeprefix("b'").partition("\n")[0].partition("\\n")[0]
            broken = "a lone surrogate" if isinstance(error, UnicodeDecodeError) else message
        size += len(piece)
        for event, value in events:
            before, depth = depth, depth + _NESTING.get(event, 0)
            if depth > _DEEPEST + 1:
                raise BrokenStream(f"nested more than {_DEEPEST:,} deep")
            if min(before, depth) < base:
                continue  # the array around the elements
            element.event(event, value)
            if depth == base:
                size = len(piece)
                yield element.value
                element = ObjectBuilder()
        events.clear()
        if broken or size > limit:
            raise BrokenStream(broken or f"element of more than {limit:,} bytes")


def _first_bytes(stream: Iterator[bytes]) -> bytes:
    """Return the first bytes, without byte order mark and leading white space."""
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
    """Yield the same bytes in small pieces; raise ``BrokenStream`` at a lone surrogate.

    It is looked for in text that ends after a quote or a space, never inside an escape.
    """
    held: list[bytes] = []
    size = 0
    for block in itertools.chain(stream, [b""]):
        cut = max(block.rfind(b'"'), block.rfind(b" ")) + 1
        held.append(block[:cut])
        if cut or size > limit or not block:
            text = b"".join(held)
            lone = _LONE_SURROGATE.search(text) if rb"\ud" in text or rb"\uD" in text else None
            end = lone.start() if lone else len(text)
            for place in range(0, end, _PIECE_BYTES):
                yield text[place : min(place + _PIECE_BYTES, end)]
            if lone:
                raise BrokenStream("a lone surrogate")
            held, size = [], 0
        held.append(block[cut:])
        size += len(block) - cut
