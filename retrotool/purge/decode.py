"""The same bytes as text, unescaped text, and cells, for who looks for needles in them.

``folded`` is what text is compared by; ``unescaped`` what JSON stands for, also of pieces of it and of JSON in JSON,
near escapes only, so that it costs next to nothing where there are none; ``cells`` what stands between quotes, commas,
tabs and line ends. ``cells_of`` takes an Arrow array apart into the bytes of its values, and their cells. Each costs 1
to 2 ns a byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

LONGEST_CELL = 1024
"""Bytes; longer ones are passed over."""
_KEPT = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LOWER = bytes(range(256)).lower()
_DROPPED = bytes(c for c in range(128) if c not in _KEPT)
_BACKSLASH = ord("\\")
_IS_ESCAPED = np.zeros(256, np.bool_)
_IS_ESCAPED[list(b'"\\/bfnrtux')] = True
_ESCAPED = re.compile(rb"\\(?:u[0-9a-fA-F]{4}(?:\\u[0-9a-fA-F]{4})*|x[0-9a-f]{2}|[^ux])", re.DOTALL)
_MEANT = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"f": b"\f"}
_NEAR = 128
"""Bytes on both sides of an escape: more than a run with it takes, even if it is nothing but escapes."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r\x1b")) + b"\x7f"
"""Bytes that text has not; of a hundred that are numbers or compressed about ten are among them."""
_JOINT = b"\xff"  # neither dropped from text nor the border of a cell
_DEPTH = 2
_IS_BORDER = np.zeros(256, np.bool_)
_IS_BORDER[list(b"\"'\n\r\t,\0")] = True

_IS_LOOSE, _IS_DIGIT = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
_IS_LOOSE[list(b",\t")] = True
_IS_DIGIT[list(b"0123456789")] = True

Places = npt.NDArray[np.int64]
Cells = tuple[bytes, Places, Places]


def folded(data: bytes) -> bytes:
    """ASCII letters in lower case, digits, and all that is not ASCII."""
    return data.translate(_LOWER, _DROPPED)


def unescaped(data: bytes) -> Iterator[bytes]:
    """What is near JSON's escapes, without them; again without those that come out of them. Nothing where none are."""
    for _ in range(_DEPTH):
        every = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(every[:-1] == _BACKSLASH)
        places = places[_IS_ESCAPED[every[places + 1]]]
        if not len(places):
            return
        opens = np.flatnonzero(np.diff(places, prepend=-3 * _NEAR) > 2 * _NEAR)
        closes = [*(opens[1:] - 1).tolist(), len(places) - 1]
        pieces = [
            data[max(0, int(places[a]) - _NEAR) : int(places[b]) + _NEAR]
            for a, b in zip(opens.tolist(), closes, strict=True)
        ]
        data = _JOINT.join(_ESCAPED.sub(_meant, piece) for piece in pieces)
        yield data


def _meant(match: re.Match[bytes]) -> bytes:
    text = match[0]
    if text[1:2] == b"x" and len(text) > 2:  # excerpts in quarantine have these
        return chr(int(text[2:], 16)).encode()
    if text[1:2] != b"u":
        return _MEANT.get(text[1:], text[1:])
    units = bytes.fromhex(text.replace(b"\\u", b"").decode())
    return units.decode("utf-16-be", "replace").encode()


def cells(data: bytes, *, begins: bool, ends: bool) -> Cells:
    """The cells of a text; those at its ends only if these are the ends of all. None in what is not text.

    Numbers between commas, and keys of JSON objects, are none: an id that is ``5`` or ``text`` would be everywhere.
    """
    none = np.zeros(0, np.int64)
    if data.count(0) * 1000 > len(data) or (len(data) - len(data.translate(None, _CONTROL))) * 100 > len(data):
        return data, none, none
    borders = np.flatnonzero(_IS_BORDER[np.frombuffer(data, np.uint8)])
    borders = np.concatenate([[-1] * begins, borders, [len(data)] * ends]).astype(np.int64)
    starts, stops = borders[:-1] + 1, borders[1:]
    fit = (stops > starts) & (stops - starts <= LONGEST_CELL) & ~_meant_otherwise(data, starts, stops)
    return data, starts[fit], stops[fit]


def _meant_otherwise(data: bytes, starts: Places, stops: Places) -> npt.NDArray[np.bool_]:
    """Which cells are keys of a JSON object, or numbers between commas or tabs."""
    padded = np.frombuffer(data + b"\0\0", np.uint8)  # what is beside the ends is no border
    behind, before = padded[stops], padded[starts - 1]
    key = (behind == ord('"')) & (padded[stops + 1] == ord(":"))
    digits = np.concatenate([[0], np.cumsum(_IS_DIGIT[padded[:-2]])])
    number = digits[stops] - digits[starts] == stops - starts
    otherwise: npt.NDArray[np.bool_] = key | (number & (_IS_LOOSE[behind] | _IS_LOOSE[before]))
    return otherwise


def cells_of(array: pa.Array) -> Iterator[Cells]:
    """The bytes of an Arrow array's values, whatever they are nested in, and where texts and binaries begin and end."""
    kind = array.type
    none = np.zeros(0, np.int64)
    if isinstance(array, pa.ExtensionArray):
        yield from cells_of(array.storage)
    elif pa.types.is_dictionary(kind):
        yield from cells_of(array.dictionary)
    elif pa.types.is_struct(kind):
        for field in array.flatten():
            yield from cells_of(field)
    elif pa.types.is_map(kind):
        yield from cells_of(array.keys)
        yield from cells_of(array.items)
    elif pa.types.is_nested(kind):
        yield from cells_of(array.flatten())
    elif not len(array) or array.null_count == len(array):
        return
    elif pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        starts = np.arange(len(array), dtype=np.int64) * width if width <= LONGEST_CELL else none
        yield _values(array, width), starts, starts + width
    elif _is_text(kind):
        texts = array.cast(pa.large_binary())
        _, offsets, values = texts.buffers()
        places = np.frombuffer(offsets, np.int64, count=len(texts) + 1, offset=8 * texts.offset)
        data = b"" if values is None else memoryview(values)[int(places[0]) : int(places[-1])].tobytes()
        starts, stops = places[:-1] - places[0], places[1:] - places[0]
        fit = (stops > starts) & (stops - starts <= LONGEST_CELL)
        yield data, starts[fit], stops[fit]
    elif not pa.types.is_boolean(kind):
        yield _values(array, kind.bit_width // 8), none, none


def _values(array: pa.Array, width: int) -> bytes:
    """The bytes of values of a fixed width."""
    return memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width].tobytes()


def _is_text(kind: pa.DataType) -> bool:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in names
