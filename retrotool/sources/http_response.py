"""HTTP responses in web archives: headers, and the body without its transfer and content codings.

Read are ``chunked``, ``gzip``, ``deflate`` (with zlib's frame, or raw as some servers send it) and ``zstd``; gzip of
several members and zstd of several frames to their end. A body is taken as it is where it is text although a coding is
named: crawlers often leave the header behind. Any other coding makes the record unreadable, and so does a body that is
cut off, damaged or longer than the limit; no more than that is ever decompressed.

zstd frames may ask for a window of 8 MiB, as RFC 9659 demands. Trailers, pushes and ranges are not looked at.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import NamedTuple

from retrotool.sources.records import BadRow
from retrotool.sources.streams import Decompressor, Inflater

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_GZIP = (b"\x1f\x8b",)
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16)))
"""How frames begin, those included that hold no text."""
_LONGEST_BEGIN = 4
_STEP = 64 << 10
"""Compressed bytes a step: what follows a frame is copied, and a body may be of a million frames."""
_LARGEST_WINDOW_LOG = 23
_NOT_CODED = ("", "identity", "none", "utf-8", "utf8")
_NAMES = {"br": "Brotli", "compress": "compress", "x-compress": "compress"}
_LOOKED_AT = 1024
_CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r\x1b")) + b"\x7f"
"""Bytes that text has not; of a hundred compressed bytes about ten are among them."""


class Response(NamedTuple):
    """What of a response is used."""

    content_type: str
    status: str | None
    body: bytes


def response_of(block: bytes, limit: int) -> Response:
    """The response that a record holds; ``BadRow`` if its body can't be had, or has more than ``limit`` bytes."""
    head, _, body = block.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").splitlines() or [""]
    headers = headers_of(lines)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _dechunked(body)
    for coding in reversed(headers.get("content-encoding", "").lower().split(",")):
        body = _decoded(body, coding.strip(), limit)
    words = first.split(None, 2)
    return Response(headers.get("content-type", ""), words[1] if len(words) > 1 else None, body)


def headers_of(lines: list[str]) -> dict[str, str]:
    """Headers by their names in lower case; a line that begins with white space goes on from the one before."""
    headers: dict[str, str] = {}
    name = ""
    for line in lines:
        if line[:1] in (" ", "\t") and name:
            headers[name] += " " + line.strip()
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            headers[name] = value.strip()
    return headers


def _dechunked(body: bytes) -> bytes:
    """The chunks joined (RFC 9112, 7.1); as it is where there are none: crawlers often leave the header behind."""
    chunks: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\r\n", place)
        try:
            size = int(body[place:end].partition(b";")[0], 16) if end > place else -1
        except ValueError:
            size = -1
        if size < 0:
            return b"".join(chunks) if chunks else body
        if size == 0:
            return b"".join(chunks)
        chunks.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2


def _decoded(body: bytes, coding: str, limit: int) -> bytes:
    """The body without a content coding."""
    if coding in _NOT_CODED:
        return body
    if coding in ("gzip", "x-gzip"):
        return _unpacked(body, Inflater, _GZIP, limit) if body.startswith(_GZIP) else _as_it_is(body, "is no gzip")
    if coding == "zstd":
        return _unpacked(body, _zstd, _ZSTD, limit) if body.startswith(_ZSTD) else _as_it_is(body, "is no zstd")
    if coding == "deflate":
        return _inflated(body, limit)
    raise BadRow(f"its content is compressed with {_NAMES.get(coding, 'an unknown coding')}, which is not read")


def _zstd() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG})


def _inflated(body: bytes, limit: int) -> bytes:
    """A body of ``deflate``: the name is zlib's frame, but some servers send what stands in it alone."""
    framed = len(body) >= 2 and body[0] & 0xF == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    try:
        return _unpacked(body, lambda: Inflater(zlib.MAX_WBITS if framed else -zlib.MAX_WBITS), (), limit)
    except BadRow as bad:
        return _as_it_is(body, bad)


def _as_it_is(body: bytes, otherwise: str | BadRow) -> bytes:
    """The body if it is text, whatever its header says."""
    if len(body[:_LOOKED_AT].translate(None, _CONTROL)) == len(body[:_LOOKED_AT]):
        return body
    raise otherwise if isinstance(otherwise, BadRow) else BadRow(f"its content {otherwise}, though its header says so")


def _unpacked(body: bytes, make: Callable[[], Decompressor], begins: tuple[bytes, ...], limit: int) -> bytes:
    """The frames of a body, joined, as long as another begins behind one; what else stands there is no content."""
    pieces: list[bytes] = []
    left, place, data = limit, 0, b""
    while True:
        frame = make()
        while not frame.eof:
            if not data and frame.needs_input:
                data, place = body[place : place + _STEP], place + _STEP
            fed = bool(data)
            try:
                text = frame.decompress(data, left + 1)
            except (zlib.error, zstd.ZstdError) as error:
                raise BadRow(f"its content is damaged: {error}") from error
            data = b""
            left -= len(text)
            if left < 0:
                raise BadRow(f"its content is longer than {limit:,} bytes")
            if not (text or fed or frame.eof) and frame.needs_input:
                raise BadRow("its compressed content is cut off")
            pieces.append(text)
        data = frame.unused_data
        if len(data) < _LONGEST_BEGIN:
            data, place = data + body[place : place + _STEP], place + _STEP
        if not (begins and data.startswith(begins)):
            return b"".join(pieces)
