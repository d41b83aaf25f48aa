"""CSV and TSV files: a header row with the columns' names, then a row a document, quoted as in RFC 4180.

Records are found with a regular expression over blocks, so each has its place: the number of its first line (the
header's is 1) and its byte offset. A row with another number of fields than the header, with a quote where none may
be, or with invalid UTF-8 is set aside alone. A record over the limit is skipped without being held; its end is where
its quotes are even. A quote that is never closed breaks off the rest.

An empty field is a missing value, as CSV can't tell them apart; an empty text is set aside as such. A quote inside a
field that does not begin with one is a quote. Other dialects (semicolons, backslash escapes) are not read. Files
can't be cut into slices: a newline may stand inside quotes.

Cost: about 6 ms a MB of text and 3 µs a row; memory for two records (``Fields.max_document``) and a block.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from retrotool.errors import InputError
from retrotool.sources import streams
from retrotool.sources.files import InputFile, Slice
from retrotool.sources.lines import BOM, HEAD_BYTES
from retrotool.sources.records import Document, Fields, SetAside, column_names, document_of, excerpt, no_column
from retrotool.sources.streams import BrokenStream

_DELIMITERS = {"csv": b",", "tsv": b"\t"}


class Record(NamedTuple):
    """A record: its fields, or why it has none; its first line's number, offset and beginning."""

    fields: list[str] | str
    line: int
    offset: int
    head: bytes


def read(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a file's rows; lines are the file's, positions byte offsets."""
    del where
    # Quotes are doubled, and there are other columns.
    limit = fields.max_document * 3 // 2 + (1 << 20)
    number = 0
    try:
        with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
            for row in _rows(records(stream, _DELIMITERS[file.base], limit), file, fields):
                number = row.line
                yield row
    except BrokenStream as error:
        raise InputError(f"broken off after the record in line {number:,}: {error}", number + 1) from error


def _rows(rows: Iterator[Record], file: InputFile, fields: Fields) -> Iterator[Document | SetAside]:
    header = next(rows, None)
    if header is None:
        yield SetAside(0, "no header row", 0)
        return
    if isinstance(header.fields, str):
        yield SetAside(header.line, f"header row: {header.fields}", header.offset, excerpt(header.head), damage=True)
        return
    names = header.fields
    problem = _missing(names, fields)
    used = _used_columns(names, fields)
    required = {fields.text, fields.key, fields.value, fields.tokens}
    head = None
    for line, offset, head, found in ((row.line, row.offset, row.head, row.fields) for row in rows):
        if isinstance(found, str):
            yield SetAside(line, found, offset, excerpt(head))
        elif len(found) != len(names):
            yield SetAside(line, f"{len(found):,} fields, the header has {len(names):,}", offset, excerpt(head))
        elif problem:
            yield SetAside(line, problem, offset, column_names(names))
        else:
            row = {name: found[place] if name in required else found[place] or None for name, place in used}
            result = document_of(row, fields, file.name, line, offset, offset)
            yield result._replace(excerpt=excerpt(head)) if isinstance(result, SetAside) else result
    if problem and head is None:  # a file of something else may look like a header alone
        yield SetAside(header.line, problem, header.offset, column_names(names))


def _missing(names: Sequence[str], fields: Fields) -> str:
    """What is wrong with the header, for every row; "" if nothing."""
    text = (fields.key, fields.value) if fields.key is not None else (fields.tokens or fields.text,)
    for name in text:
        if name not in names:
            return no_column(name, len(names))
    counts = Counter(names)
    twice = next((name for name in (*text, fields.id, "source", *fields.keep) if counts[str(name)] > 1), None)
    return f"column {twice!r} is there {counts[str(twice)]} times" if twice is not None else ""


def _used_columns(names: Sequence[str], fields: Fields) -> list[tuple[str, int]]:
    wanted = {fields.text, fields.key, fields.value, fields.tokens, fields.id, "source", *fields.keep}
    return [(name, place) for place, name in enumerate(names) if name in wanted]


class _Syntax:
    """Regular expressions for a delimiter; possessive, so that none goes back over a long text."""

    def __init__(self, delimiter: bytes) -> None:
        text = rb"[^%s\r\n]" % delimiter
        ends = rb"[^%s\n]*+" % delimiter
        quoted = rb'"(?:[^"]++|"")*+"'
        field = rb'(?:%s%s|[^"%s\n]%s|)' % (quoted, ends, delimiter, ends)
        self.delimiter = delimiter
        self.record = re.compile(rb"(?:%s%s)*+%s\n" % (field, delimiter, field))
        self.field = re.compile(rb'"((?:[^"]++|"")*+)"|((?:(?!")%s%s*+)?)' % (text, text))

    def fields(self, record: bytes) -> list[str] | str:
        """The fields of a record without its line's end, or what is wrong with it."""
        try:
            record.decode()
        except UnicodeDecodeError as error:
            return f"invalid UTF-8 at byte {error.start:,} of the record"
        found: list[str] = []
        place = 0
        while True:
            match = self.field.match(record, place)
            assert match is not None  # it may be empty
            quoted, plain = match.groups()
            found.append((plain if quoted is None else quoted.replace(b'""', b'"')).decode())
            place = match.end()
            if place == len(record):
                return found
            if not record.startswith(self.delimiter, place):
                problem = "a line ends" if record[place : place + 1] == b"\r" else "a field goes on"
                return f"not CSV: {problem} where it may not, at byte {place:,} of the record"
            place += 1


def records(stream: Iterator[bytes], delimiter: bytes, limit: int) -> Iterator[Record]:
    """The records of a file; blank lines are none.

    Raises ``InputError`` for a quote that is never closed, after all records before it.
    """
    syntax = _Syntax(delimiter)
    waiting = _Waiting(stream)
    number, line = 0, 1
    while waiting.more():
        place = 0
        while match := syntax.record.match(waiting.data, place):
            record = match[0]
            fields = syntax.fields(record[: -2 if record.endswith(b"\r\n") else -1]) if record.strip(b"\r\n") else []
            if len(record) > limit:
                fields = _too_long(len(record), limit)
            if fields:
                number += 1
                yield Record(fields, line, waiting.offset + place, record[:HEAD_BYTES])
            line += record.count(b"\n")
            place = match.end()
        waiting.drop(place)
        if waiting.broken is not None:
            raise waiting.broken
        if len(waiting.data) > limit or (waiting.ended and waiting.data):
            offset, head = waiting.offset, waiting.data[:HEAD_BYTES]
            size, newlines = waiting.skip_record() if len(waiting.data) > limit else (0, 0)
            if not size:
                quote = f"a quote in line {line:,}, at byte {offset:,}"
                raise InputError(f"broken off after record {number:,}: {quote}, is never closed", line)
            number += 1
            yield Record(_too_long(size, limit), line, offset, head)
            line += newlines


def _too_long(size: int, limit: int) -> str:
    return f"record of {size:,} bytes, longer than {limit:,}"


class _Waiting:
    """Bytes that wait for the end of their record; ``offset`` is that of the first of them."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self.data = b""
        self.offset = 0
        self.ended = False
        self.broken: BrokenStream | None = None

    def more(self) -> bool:
        """Read at least half as much again as is there, so that what is scanned anew is not scanned often."""
        if self.ended:
            return False
        blocks, size = [self.data], 0
        while size < max(len(self.data) // 2, len(BOM)) and not self.ended:
            try:
                block = next(self._stream, b"")
            except BrokenStream as error:
                self.broken = error
                break
            self.ended = not block
            blocks.append(block)
            size += len(block)
        self.data = b"".join(blocks)
        if self.offset == 0 and self.data.startswith(BOM):
            self.drop(len(BOM))
        if self.ended and self.data and not self.data.endswith(b"\n"):
            self.data += b"\n"  # the last line needs no end
        return True

    def drop(self, size: int) -> None:
        """Forget the first bytes."""
        self.data = self.data[size:]
        self.offset += size

    def skip_record(self) -> tuple[int, int]:
        """Skip to the line's end at which the quotes are even; the record's bytes and newlines, (0, 0) if none is."""
        size = newlines = quotes = 0
        while self.data:
            end = 0
            while end < len(self.data):
                begin, end = end, self.data.find(b"\n", end) + 1 or len(self.data)
                quotes += self.data.count(b'"', begin, end)
                if self.data.endswith(b"\n", begin, end):
                    newlines += 1
                    if quotes % 2 == 0:
                        self.drop(end)
                        return size + end, newlines
            size += end
            self.drop(end)
            if self.broken is not None:
                raise self.broken
            self.more()
        return 0, 0
