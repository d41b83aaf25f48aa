"""What the footer of a Parquet file says of its column chunks: how many bytes of which column each row group has.

pyarrow tells the same, but of a damaged footer its accessor of column chunks ends the process instead of raising. So
the footer is read here, by its few fields that are needed: ``FileMetaData`` to ``ColumnMetaData`` of
``parquet.thrift``, in Thrift's compact protocol. Nothing is believed: a length or a count is held against the bytes
that are left, and what can't be read raises ``ValueError``.

Cost: about 15 µs a column chunk, and the footer in memory. Statistics, indexes and schemas are skipped; of encrypted
columns nothing is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"PAR1"
_TAIL_BYTES = 8
_BOOLEANS, _BYTE, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT, _UUID = (1, 2), 3, 7, 8, (9, 10), 11, 12, 13
_INTEGERS = (4, 5, 6)
_DEEPEST = 24
_ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _UNCOMPRESSED = 4, 1, 3, 3, 6
"""Numbers of the fields on the way to a column chunk's size."""

ColumnSizes = list[tuple[str, int]]
"""The dotted path of each column chunk of a row group, and its bytes before compression."""


def column_sizes(path: Path) -> list[ColumnSizes]:
    """The column chunks of each row group."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read(_TAIL_BYTES)
        length = int.from_bytes(tail[:4], "little")
        if len(tail) < _TAIL_BYTES or tail[4:] != _MAGIC or length > size - _TAIL_BYTES:
            raise ValueError("the file does not end with a footer")
        file.seek(size - _TAIL_BYTES - length)
        thrift = _Thrift(file.read(length))
    groups: list[ColumnSizes] = []
    try:
        for number, kind in thrift.fields():
            if number == _ROW_GROUPS and kind in _LISTS:
                groups = [_row_group(thrift) for _ in thrift.structs()]
            else:
                thrift.skip(kind)
    except IndexError as error:
        raise ValueError("the footer ends inside a value") from error
    return groups


def _row_group(thrift: _Thrift) -> ColumnSizes:
    chunks: ColumnSizes = []
    for number, kind in thrift.fields():
        if number == _COLUMNS and kind in _LISTS:
            chunks = [_column_chunk(thrift) for _ in thrift.structs()]
        else:
            thrift.skip(kind)
    return chunks


def _column_chunk(thrift: _Thrift) -> tuple[str, int]:
    found = ("", 0)
    for number, kind in thrift.fields():
        if number == _META_DATA and kind == _STRUCT:
            found = _meta_data(thrift)
        else:
            thrift.skip(kind)
    return found


def _meta_data(thrift: _Thrift) -> tuple[str, int]:
    path, size = "", 0
    for number, kind in thrift.fields():
        if number == _PATH and kind in _LISTS:
            path = ".".join(thrift.strings())
        elif number == _UNCOMPRESSED and kind in _INTEGERS:
            size = thrift.integer()
        else:
            thrift.skip(kind)
    if size < 0:
        raise ValueError(f"the column {path!r} has {size:,} bytes")
    return path, size


class _Thrift:
    """Reads values of the compact protocol one after another; ``IndexError`` where the data end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number in the footer has more than 64 bits")

    def integer(self) -> int:
        """A number of 16 to 64 bits."""
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct, whose value must be read or skipped before the next."""
        number = 0
        while header := self._data[self._at]:
            self._at += 1
            number = number + (header >> 4) if header >> 4 else self.integer()
            yield number, header & 0xF
        self._at += 1

    def structs(self) -> range:
        """The places of a list of structs, which must be read one by one."""
        kind, count = self._list()
        if kind != _STRUCT:
            raise ValueError("a list in the footer does not hold what it should")
        return range(count)

    def strings(self) -> list[str]:
        """A list of strings."""
        kind, count = self._list()
        if kind != _BINARY:
            raise ValueError("a list in the footer does not hold what it should")
        found = []
        for _ in range(count):
            end = self._unsigned() + self._at
            found.append(self._data[self._at : end].decode("utf-8", "replace"))
            self._pass(end)
        return found

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over a value."""
        if kind in _BOOLEANS:
            return
        if depth > _DEEPEST:
            raise ValueError("the footer is nested too deeply")
        if kind in _INTEGERS:
            self._unsigned()
        elif kind == _BINARY:
            self._pass(self._unsigned() + self._at)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind in _LISTS:
            inner, count = self._list()
            self._skip_items((inner,), count, depth)
        elif kind == _MAP:
            if count := self._checked(self._unsigned()):
                types = self._data[self._at]
                self._at += 1
                self._skip_items((types >> 4, types & 0xF), count, depth)
        elif kind in _WIDTHS:
            self._pass(self._at + _WIDTHS[kind])
        else:
            raise ValueError(f"the footer has a value of type {kind}, which there is not")

    def _skip_items(self, kinds: tuple[int, ...], count: int, depth: int) -> None:
        for _ in range(count):
            for kind in kinds:
                # Alone a truth value is told by its type; in a list it takes a byte.
                self.skip(_BYTE if kind in _BOOLEANS else kind, depth + 1)

    def _list(self) -> tuple[int, int]:
        header = self._data[self._at]
        self._at += 1
        count = header >> 4
        return header & 0xF, self._checked(self._unsigned() if count == 0xF else count)

    def _checked(self, count: int) -> int:
        """A number of items, each of which takes a byte at least."""
        if count > len(self._data) - self._at:
            raise ValueError(f"the footer tells of {count:,} items where {len(self._data) - self._at:,} bytes are left")
        return count

    def _pass(self, end: int) -> None:
        if end > len(self._data):
            raise IndexError
        self._at = end


_WIDTHS = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
"""Bytes of the types of fixed width."""
