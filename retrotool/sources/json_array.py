"""JSON files that are not JSON lines: an array of objects, or objects one after another, printed in any way.

An element is found by its quotes and brackets, in blocks, with NumPy; orjson then parses it alone. So a bad element is
set aside alone where its brackets are balanced; where they are not, the rest is broken off. Values are what orjson
makes of them, as in JSON lines: NaN and infinities, numbers that are none and lone surrogates are errors, whole numbers
beyond 64 bits become floats, the last of equal keys wins. A ``.json`` file whose first line is a JSON object by itself
is read as JSON lines. An object at the top of a file is a document, never a container of documents.

Cost: about 7 ms a MB besides orjson, and memory for one element (``Fields.max_document``) and a block. Files can't be
cut into slices.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from retrotool.errors import InputError
from retrotool.sources import lines, streams
from retrotool.sources.files import InputFile, Slice
from retrotool.sources.lines import BOM, Held, Line, line_limit, row_of
from retrotool.sources.records import Document, Fields, SetAside, excerpt, maker
from retrotool.sources.streams import BrokenStream

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_SPACE = b" \t\r\n"
_SEEN = np.zeros(256, np.bool_)
_SEEN[list(b'{}[],"')] = True
_DEEPER = np.zeros(256, np.int8)
"""How much deeper a byte leads outside strings."""
_DEEPER[list(b"{[")] = 1
_DEEPER[list(b"}]")] = -1


class BrokenSyntax(Exception):  # noqa: N818 - a verdict about the file
    """From ``offset`` on, where ``head`` stands, elements can't be told apart."""

    def __init__(self, message: str, offset: int, head: bytes) -> None:
        super().__init__(message)
        self.offset, self.head = offset, head


def read(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of the elements of a JSON file, counted from 1; positions are byte offsets."""
    limit = line_limit(fields)
    if is_lines(file, limit):
        yield from lines.read_jsonl(file, fields, where)
        return
    make = maker(fields, file.name)
    number = 0
    try:
        with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
            for element in elements(stream, limit):
                number = element.number
                yield row_of(element, make, limit, "element")
    except BrokenStream as error:
        raise InputError(f"broken off after element {number:,}: {error}", number + 1) from error
    except BrokenSyntax as error:
        reason = f"broken off after element {number:,}, at byte {error.offset:,}: {error}"
        yield SetAside(number + 1, reason, error.offset, excerpt(error.head), damage=True)


def is_lines(file: InputFile, limit: int) -> bool:
    """Whether the first line that is not blank is an object by itself."""
    with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
        try:
            first = next((line for line in lines.cut_lines(stream, 0, None, limit) if line.data != b""), None)
        except BrokenStream:
            return False  # it is met again, and reported, when the file is read
    if first is None or first.data is None or not first.data.lstrip().startswith(b"{"):
        return False
    return _is_json(first.data)


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def elements(stream: Iterator[bytes], limit: int) -> Generator[Line]:
    """The elements of an array, or the objects that follow one another, with their offsets, counted from 1.

    Raises ``BrokenSyntax`` after the last one that can be told from the rest.
    """
    begin, first = _first_bytes(stream)
    base = first.startswith(b"[")
    if not base and not first.startswith(b"{"):
        raise BrokenSyntax(
            "neither an array of objects nor objects" if first else "nothing but white space", begin, first
        )
    scanner = _Scanner(int(base))
    begin += base
    held, number = Held(limit), 0
    for block in itertools.chain([first[base:]], stream):
        ends, last = scanner.ends(block)
        start = 0
        for end in ends:
            element = _stripped(held.line(block[start:end], number + 1, begin, 0))
            if element.data != b"" or base:
                number += 1
                yield element
            begin += held.size + end - start + base
            start = end + base
            held = Held(limit)
        if last is not None:
            element = _stripped(held.line(block[start:last], number + 1, begin, 0))
            if base and element.data != b"":
                yield element
            rest = itertools.chain([block[last + base :]], stream)
            _refuse_more(rest, begin + held.size + last - start + base, base)
            return
        held.add(block[start:], keep=True)
    element = _stripped(held.line(b"", number + 1, begin, 0))
    if base and element.data and _is_json(element.data):
        yield element
    if base or element.data != b"":
        raise BrokenSyntax(f"{'the array' if base else 'an object'} is never closed", element.offset, held.front(b""))


def _first_bytes(stream: Iterator[bytes]) -> tuple[int, bytes]:
    """The first block from its first byte that is not white space, and that byte's offset."""
    offset, head = 0, b""
    for block in stream:
        head += block
        if len(head) < len(BOM):
            continue
        body = (head.removeprefix(BOM) if offset == 0 else head).lstrip(_SPACE)
        if body:
            return offset + len(head) - len(body), body
        offset, head = offset + len(head), b""
    body = head.lstrip(_SPACE)
    return offset + len(head) - len(body), body


def _stripped(element: Line) -> Line:
    """Without the white space around it."""
    if element.data is None:
        return element
    data = element.data.lstrip(_SPACE)
    return element._replace(offset=element.offset + len(element.data) - len(data), data=data.rstrip(_SPACE))


def _refuse_more(rest: Iterator[bytes], offset: int, base: bool) -> None:
    """Raise ``BrokenSyntax`` if anything but white space follows."""
    for block in rest:
        if body := block.lstrip(_SPACE):
            message = "more follows the array's end" if base else "a bracket is closed that was not opened"
            raise BrokenSyntax(message, offset + len(block) - len(body), body)
        offset += len(block)


class _Scanner:
    """Follows strings and brackets from block to block; ``base`` is the depth at which elements stand."""

    def __init__(self, base: int) -> None:
        self._base = base
        self.depth = base
        self.in_string = False
        self._escaped = False

    def ends(self, block: bytes) -> tuple[list[int], int | None]:
        """Where elements end in the block (at the comma, or after the bracket), and where all of them do."""
        places, seen = self._outside_strings(block)
        depths = self.depth + np.cumsum(_DEEPER[seen], dtype=np.int64)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        beyond = np.flatnonzero(depths < self._base)
        last = int(places[beyond[0]]) if len(beyond) else None
        ends = (depths == self._base) & (seen == _COMMA if self._base else _DEEPER[seen] < 0)
        if len(beyond):
            ends[beyond[0] :] = False
        return (places[ends] + (not self._base)).tolist(), last

    def _outside_strings(self, block: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Brackets and commas outside strings: their places in the block, and the bytes."""
        # What was left of a run of backslashes stands before the block.
        shift = int(self._escaped)
        data = np.frombuffer(b"\\" + block if shift else block, np.uint8)
        places = np.flatnonzero(_SEEN[data])
        seen = data[places]
        is_quote = seen == _QUOTE
        quotes = self._real_quotes(data, places[is_quote])
        places = places[~is_quote]
        # A place is in a string if an odd number of quotes comes before it.
        outside = (np.searchsorted(quotes, places) + self.in_string) % 2 == 0
        self.in_string ^= bool(len(quotes) % 2)
        places = places[outside]
        return places - shift, data[places]

    def _real_quotes(self, data: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Without those after an odd number of backslashes."""
        slashes = np.flatnonzero(data == _BACKSLASH)
        if not len(slashes):
            self._escaped = False
            return quotes
        begins = np.diff(slashes, prepend=-2) != 1
        run = slashes - np.maximum.accumulate(np.where(begins, slashes, 0)) + 1  # its length up to each backslash
        self._escaped = bool(slashes[-1] == len(data) - 1 and run[-1] % 2)
        before = np.searchsorted(slashes, quotes) - 1
        follows = (before >= 0) & (slashes[before] == quotes - 1)
        real: npt.NDArray[np.int64] = quotes[~(follows & (run[before] % 2 == 1))]
        return real
