"""Web pages: WARC archives, WET files of their text, and HTML files, each one document with its name as id.

* HTML is reduced to its main content. The encoding of an HTML file is the given one, else as it declares.
* A response with HTML or plain text gives its text; a conversion record is text. Other records are not rows.
* ``id`` is the target URI, by which takedown requests name pages, or else the record's id; with ``--id-field
  record_id`` all captures of a page stay.
* FastWARC accepts truncated records, those without a readable Content-Length, and truncated HTTP bodies. The
  first two are checked here and reject the rest of the file; bodies are decoded here.
* A body that is text despite its declared coding is used unchanged, as crawlers often keep that header. An
  unknown coding, or a body that is truncated, damaged or over the limit, rejects the record.

Cost: framing 1 ms per MB, HTML about 40 ms per MB; memory for one record, four times for HTML.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrotool.errors import InputError, UsageError
from retrotool.sources import streams
from retrotool.sources.inputs import InputFile, Slice
from retrotool.sources.lines import read_whole, text_document
from retrotool.sources.records import BadRow, Document, Fields, Rejected, document_of, excerpt, reason_of, with_excerpt
from retrotool.sources.streams import BrokenStream

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

_HTML = ("text/html", "application/xhtml+xml")
_NOT_ROWS = ("warcinfo", "request", "metadata", "revisit")
FIELDS = ("text", "type", "date", "content_type", "status", "id", "uri", "record_id")
_ROWS = ("response", "resource", "conversion", "continuation")
_HTML_OVERHEAD = 4
_SIZE = re.compile("0*[0-9]{1,18}")
_END_OF_RECORD = (b"\r\n\r\n", b"\n\n")
_CODINGS = {"gzip": ("gz",), "x-gzip": ("gz",), "zstd": ("zst",), "deflate": ("zlib", "deflate")}
_NOT_CODED = ("", "identity", "none", "utf-8", "utf8")
_LOOKED_AT = 1024
_CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r\x1b")) + b"\x7f"  # text does not have these


def read_warc(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:  # noqa: ARG001
    """Yield documents of an archive's records; lines are records from 1, positions byte offsets."""
    check_extra(file)
    from fastwarc.warc import ArchiveIterator

    limit = _HTML_OVERHEAD * fields.max_document + (1 << 20)
    number = offset = 0
    with contextlib.closing(file.blocks()) as blocks:
        stream = _Stream(blocks)
        try:
            # FastWARC only uses the two methods of ``_Stream``.
            for record in ArchiveIterator(stream, parse_http=False, stream_detect=False):  # type: ignore[arg-type]
                offset = record.stream_pos
                length = record.headers.get("Content-Length") or ""
                if not _SIZE.fullmatch(length):  # FastWARC would treat the record as empty
                    problem = "a record's Content-Length is not a size" if length else "a record has no Content-Length"
                    raise BrokenStream(problem)
                number += 1
                if (record.headers.get("WARC-Type") or "").lower() in _NOT_ROWS:
                    _skip(record)
                else:
                    yield _row(record, fields, limit, file.name, number)
            if not stream.tail.endswith(_END_OF_RECORD):
                raise BrokenStream("the file ends before the end mark of a record")
        except (BrokenStream, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise InputError(
                f"broken off after record {number:,}, at byte {offset:,}: {reason_of(error)}", number + 1
            ) from error


class _Stream:
    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block = memoryview(b"")
        self._place = 0
        self.tail = b""

    def read(self, size: int) -> bytes:
        if not self._block:
            self._block = memoryview(next(self._blocks, b""))
        data, self._block = bytes(self._block[:size]), self._block[size:]
        self._place += len(data)
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self._place


def check_extra(file: InputFile) -> None:
    """Raise ``UsageError`` if the packages that read web pages are not installed."""
    try:
        import fastwarc.warc  # noqa: F401
        import resiliparse.extract.html2text  # noqa: F401
    except ImportError as error:
        ending = "".join(Path(file.name).suffixes[-1 - bool(file.compression) :])
        raise UsageError(
            f"{file.name}: reading HTML and WARC files needs FastWARC and Resiliparse",
            "Install them with: pip install fastwarc resiliparse\n"
            f"Or leave such files out with --exclude {shlex.quote('*' + ending)}. Nothing was changed.",
        ) from error


def _row(record: WarcRecord, fields: Fields, limit: int, source: str, number: int) -> Document | Rejected:
    offset = record.stream_pos
    uri = (record.headers.get("WARC-Target-URI") or "").strip("<>")
    identifier = (record.headers.get("WARC-Record-ID") or "").strip("<>")
    try:
        row = _page(record, limit)
    except BadRow as bad:
        found: Document | Rejected = Rejected(number, str(bad), offset)
    else:
        row |= {"id": uri or identifier or None, "uri": uri or None, "record_id": identifier or None}
        found = document_of(row, fields, source, number, offset, offset)
    return with_excerpt(found, (uri or identifier).encode())


def _skip(record: WarcRecord) -> None:
    size = record.content_length
    if record.consume() < size:
        raise BrokenStream("the file ends inside a record")


def _content(record: WarcRecord) -> bytes:
    content: bytes = record.reader.read(record.content_length)
    if len(content) < record.content_length:
        raise BrokenStream("the file ends inside a record")
    return content


def _page(record: WarcRecord, limit: int) -> dict[str, Any]:
    kind, size = (record.headers.get("WARC-Type") or "").lower(), record.content_length
    problem = f"record of {size:,} bytes, longer than {limit:,}" if size > limit else ""
    if kind == "continuation":
        problem = "a segmented record, which is not supported"
    elif kind not in _ROWS:
        problem = "a record of unknown type"
    if problem:
        _skip(record)
        raise BadRow(problem)
    content_type, status = record.headers.get("Content-Type") or "", None
    if kind == "response" and content_type.lower().startswith("application/http"):
        try:
            record.parse_http()
        except OSError as error:
            raise BadRow("it has no readable HTTP header") from error
        headers = record.http_headers
        content_type, status = headers.get("Content-Type") or "", headers.status_code
        body = _content(record)
        if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
            body = _dechunked(body)
        for coding in reversed((headers.get("Content-Encoding") or "").lower().split(",")):
            body = _decoded(body, coding.strip(), limit)
    else:
        body = _content(record)
    content_type = content_type or record.headers.get("WARC-Identified-Payload-Type") or ""
    try:
        text = body.decode() if kind == "conversion" else _text(content_type, body)
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start:,} of the record's text") from error
    if not text.strip():
        raise BadRow("no text in it")
    return {
        "text": text, "type": kind, "date": record.headers.get("WARC-Date"), "content_type": content_type,
        "status": None if status is None else str(status),
    }  # fmt: skip


def read_html(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:  # noqa: ARG001
    """Yield the document of an HTML file."""
    check_extra(file)
    found = read_whole(file, _HTML_OVERHEAD * fields.max_document)
    if isinstance(found, Rejected) or found.data is None:
        yield found if isinstance(found, Rejected) else text_document(found, file, fields)
        return
    try:
        text = _text("text/html; charset=utf-8" if file.encoding else "text/html", found.data)
        if not text.strip():
            raise BadRow("no text in it")
    except BadRow as bad:
        yield Rejected(0, str(bad), 0, excerpt(found.data))
    else:
        data = text.encode()
        yield text_document(found._replace(data=data, size=len(data)), file, fields)


def _text(content_type: str, body: bytes) -> str:
    media, _, parameters = content_type.partition(";")
    media = media.strip().lower()
    if media not in _HTML and media != "text/plain":
        raise BadRow(f"content of {'another' if media else 'no'} type is neither HTML nor plain text")
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    charset = parameters.lower().partition("charset=")[2].partition(";")[0].strip(" \"'")
    named = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = named or detect_encoding(body, from_html_meta=True) or "utf-8"
    text = str(bytes_to_str(body, encoding, errors="replace"))
    if media == "text/plain":
        return text
    try:
        return str(extract_plain_text(text, preserve_formatting=True, main_content=True))
    except ValueError as error:
        raise BadRow(f"it can't be parsed as HTML: {reason_of(error)}") from error


def _dechunked(body: bytes) -> bytes:
    """Join the chunks (RFC 9112, 7.1); return a body without chunks unchanged."""
    chunks: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\r\n", place)
        try:
            size = int(body[place:end].partition(b";")[0], 16) if end > place else -1
        except ValueError:
            size = -1
        if size <= 0:
            return b"".join(chunks) if chunks or size == 0 else body
        chunks.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2


def _decoded(body: bytes, coding: str, limit: int) -> bytes:
    if coding in _NOT_CODED:
        return body
    if coding not in _CODINGS:
        raise BadRow("its content is compressed in a way that is not supported")
    problem = ""
    for compression in _CODINGS[coding]:
        pieces, size = [], 0
        try:
            for block in streams.unpacked([body], compression):
                pieces.append(block)
                size += len(block)
                if size > limit:
                    raise BadRow(f"its content is longer than {limit:,} bytes")
            return b"".join(pieces)
        except BrokenStream as error:
            problem = problem or str(error)
    head = body[:_LOOKED_AT]
    if head.translate(None, _CONTROL) == head:
        return body  # it is text despite its header
    raise BadRow(f"its content is cut off or not {coding}: {problem}")
