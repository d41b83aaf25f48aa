"""Web archives: WARC files of pages, and WET files of their text.

A response with HTML or plain text gives its text; a conversion record is text already. Requests, metadata and other
records are no rows. A record's fields are ``text``, ``uri``, ``record_id``, ``date``, ``type``, ``content_type`` and
``status``; its ``id`` is the target URI, because what is asked to be taken down is named by it, or the record's own id
if it has none. So of a page that was fetched twice one capture stays and the other is set aside as a duplicate; with
``--id-field record_id`` both stay.

Framing is parsed here, HTTP in ``http_response``: that is little, and a reader that must account for every record and
find every break can't leave either to a library that goes on in silence. The text of HTML is a library's work. Chosen
is Resiliparse (since 2021, Apache-2.0, wheels for Linux, macOS and Windows, used for DCLM, whose authors found it level
with trafilatura at an eighth of the time); trafilatura (2019, Apache-2.0) draws in lxml and a dozen more packages;
warcio (2017, Apache-2.0) reads records, not HTML. What scripts load later is not read. WET files need no extra.

Cost: framing 1 ms a MB, HTML about 40 ms a MB; memory for one record (``Fields.max_document``, four times for HTML).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retrotool.errors import InputError, UsageError
from retrotool.sources import streams
from retrotool.sources.files import InputFile, Slice
from retrotool.sources.http_response import headers_of, response_of
from retrotool.sources.records import BadRow, Document, Fields, SetAside, document_of, excerpt, told
from retrotool.sources.streams import BrokenStream

_HTML = ("text/html", "application/xhtml+xml")
_MEDIA = (
    "application/javascript", "application/json", "application/octet-stream", "application/pdf", "application/xml",
    "application/zip", "image/gif", "image/jpeg", "image/png", "image/svg+xml", "image/webp", "text/css",
    "text/javascript", "text/xml",
)  # fmt: skip
"""Types that reasons name; what else a header says is the input's."""
_ROWS = ("response", "resource", "conversion", "continuation")
_LONGEST_LINE = 1 << 20
_LONGEST_NUMBER = 18
"""Digits of a size: more are none that a file has, and Python refuses to read thousands."""
_HTML_OVERHEAD = 4
Headers = Mapping[str, str]


def read(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of an archive's records; lines are records from 1, positions byte offsets."""
    del where
    limit = _HTML_OVERHEAD * fields.max_document + (1 << 20)
    number = 0
    with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
        reader = _Reader(stream)
        try:
            while (headers := _next_headers(reader)) is not None:
                offset, size = reader.record, _size(headers)
                wanted = headers.get("warc-type", "").lower() in _ROWS
                held = wanted and size <= limit
                block = reader.take(size) if held else reader.skip(size)
                number += 1
                if not wanted:
                    continue
                if held:
                    row = _row(headers, block, fields, limit, file.name, number, offset)
                else:
                    row = SetAside(number, f"record of {size:,} bytes, longer than {limit:,}", offset)
                name = excerpt(headers.get("warc-target-uri", headers.get("warc-record-id", "")))
                yield row._replace(excerpt=name) if isinstance(row, SetAside) else row
        except (BrokenStream, _BrokenRecord) as error:
            place = f"broken off after record {number:,}, at byte {reader.record:,}"
            head = error.head if isinstance(error, _BrokenRecord) else ""
            raise InputError(f"{place}: {error}", number + 1, head) from error


def _row(
    headers: Headers, block: bytes, fields: Fields, limit: int, source: str, number: int, offset: int
) -> Document | SetAside:
    try:
        row = _fields_of(headers, block, limit)
    except BadRow as bad:
        return SetAside(number, str(bad), offset)
    return document_of(row, fields, source, number, offset, offset)


def _fields_of(headers: Headers, block: bytes, limit: int) -> dict[str, Any]:
    uri, record = headers.get("warc-target-uri", "").strip("<>"), headers.get("warc-record-id", "").strip("<>")
    kind = headers["warc-type"].lower()
    content_type, status = headers.get("content-type", ""), None
    if kind == "continuation":
        raise BadRow("a part of a segmented record: they are not put together")
    if kind == "response" and content_type.lower().startswith("application/http"):
        content_type, status, block = response_of(block, limit)
    content_type = content_type or headers.get("warc-identified-payload-type", "")
    text = _utf8(block) if kind == "conversion" else _text(content_type, block)
    if not text.strip():
        raise BadRow("no text in it")
    return {
        "text": text, "id": uri or record or None, "uri": uri or None, "record_id": record or None, "type": kind,
        "date": headers.get("warc-date"), "content_type": content_type, "status": status,
    }  # fmt: skip


def _utf8(block: bytes) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start:,} of the record's text") from error


def _text(content_type: str, body: bytes) -> str:
    """The text of a page."""
    media, _, parameters = content_type.partition(";")
    media = media.strip().lower()
    if media not in _HTML and media != "text/plain":
        what = media if media in _MEDIA else f"content of {'another' if media else 'no'} type"
        raise BadRow(f"{what} is neither HTML nor plain text")
    decode, extract = _extraction()
    charset = parameters.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    text = decode(body, charset)
    if media == "text/plain":
        return text
    return extract(text)


def _extraction() -> tuple[Callable[[bytes, str], str], Callable[[str], str]]:
    """How bytes of a named character set become a string, and HTML its text."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
    except ImportError as error:
        raise UsageError(
            "reading pages from WARC files needs Resiliparse", "Install it with: pip install resiliparse"
        ) from error

    def decode(body: bytes, charset: str) -> str:
        named = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
        encoding = named or detect_encoding(body, from_html_meta=True) or "utf-8"
        return str(bytes_to_str(body, encoding, errors="replace"))

    def extract(text: str) -> str:
        try:
            return str(extract_plain_text(text, preserve_formatting=True, main_content=True))
        except ValueError as error:
            raise BadRow(f"not to be parsed as HTML: {told(error)}") from error

    return decode, extract


class _BrokenRecord(Exception):  # noqa: N818 - a verdict about the file
    """Here no record is, or it is cut off; ``head`` is what stands there instead of what should."""

    def __init__(self, message: str, head: str = "") -> None:
        super().__init__(message)
        self.head = head


def _next_headers(reader: _Reader) -> Headers | None:
    """The next record's headers, None at the end."""
    blank = -1
    first = b"\n"
    while first in (b"\r\n", b"\n"):
        blank += 1
        first = reader.line(begins_record=True)
    if first in (b"", b"\r"):
        # Two line ends follow each record.
        if reader.record and (first or blank < 2):
            raise _BrokenRecord("the file ends just after a record, before its end is marked")
        return None
    if not first.startswith(b"WARC/"):
        raise _BrokenRecord(f"not a WARC record but a line of {len(first):,} bytes", excerpt(first[:40]))
    lines: list[str] = []
    while (line := reader.line()) not in (b"\r\n", b"\n"):
        if not line:
            raise _BrokenRecord("the file ends inside a record's header")
        lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
    return headers_of(lines)


def _size(headers: Headers) -> int:
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length.lstrip("0")) <= _LONGEST_NUMBER):
        problem = f"is no size but {len(length):,} characters" if length else "is missing"
        raise _BrokenRecord(f"a record's Content-Length {problem}", excerpt(length))
    return int(length.lstrip("0") or "0")


class _Reader:
    """Lines and counted bytes of a stream of blocks."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self._block, self._place = b"", 0
        self._before = 0
        self.record = 0

    def line(self, *, begins_record: bool = False) -> bytes:
        """The next line with its end; b"" at the end of the stream."""
        if begins_record:
            self.record = self._before + self._place
        end = self._block.find(b"\n", self._place) + 1
        if end:
            line = self._block[self._place : end]
            self._place = end
            return line
        pieces = [self._block[self._place :]]
        size = len(pieces[0])
        while self._next():
            end = self._block.find(b"\n") + 1
            self._place = end or len(self._block)
            pieces.append(self._block[: self._place])
            size += self._place
            if end:
                break
            if size > _LONGEST_LINE:
                raise _BrokenRecord(f"a header of more than {_LONGEST_LINE:,} bytes")
        return b"".join(pieces)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        pieces = []
        while size:
            if self._place == len(self._block) and not self._next():
                raise _BrokenRecord("the file ends inside a record")
            piece = self._block[self._place : self._place + size]
            pieces.append(piece)
            self._place += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, size: int) -> bytes:
        """Leave out the next ``size`` bytes."""
        while size > len(self._block) - self._place:
            size -= len(self._block) - self._place
            self._place = len(self._block)
            if not self._next():
                raise _BrokenRecord("the file ends inside a record")
        self._place += size
        return b""

    def _next(self) -> bool:
        self._before += len(self._block)
        self._block, self._place = next(self._stream, b""), 0
        return bool(self._block)
