"""Web archives: the text of pages and of extracts, one row for each, and breaks at their record."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable
from unittest.mock import patch

import pytest
from source_help import PACK, input_of, rows_of, zstd

from retrotool.errors import UsageError
from retrotool.sources import Document, Fields, Rejected, read_input, streams

PAGE = (
    "<html><head><title>T</title><script>var hidden = 1</script></head><body><main><h1>Größe</h1>"
    "<p>One  two<br>three &amp; four</p></main></body></html>"
)
TEXT = "Größe\n\nOne two\nthree & four"


def record(kind: str, block: bytes, content_type: str = "application/http; msgtype=response", **headers: str) -> bytes:
    given = {"WARC-Type": kind, "Content-Type": content_type, "Content-Length": str(len(block)), **headers}
    given = {name.replace("_", "-"): value for name, value in given.items()}
    return b"WARC/1.0\r\n" + "".join(f"{n}: {v}\r\n" for n, v in given.items()).encode() + b"\r\n" + block + b"\r\n\r\n"


def http(body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {content_type}"] if content_type else [])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def response(body: bytes, content_type: str = "text/html; charset=utf-8", uri: str = "http://a.example/", **headers):
    return record("response", http(body, content_type, **headers), WARC_Target_URI=uri, WARC_Record_ID="<urn:uuid:1>")


def raw_deflate(data: bytes) -> bytes:
    """What stands in zlib's frame, which some servers send as ``deflate``."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def halves(pack: Callable[[bytes], bytes], between: bytes = b"") -> bytes:
    """The page in two members."""
    page = PAGE.encode()
    return pack(page[:60]) + between + pack(page[60:])


INFO = record("warcinfo", b"software: x\r\n", "application/warc-fields")
REQUEST = record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request")
METADATA = record("metadata", b"a: b", "application/warc-fields")


def test_responses_give_the_text_of_their_pages_and_other_records_none(tmp_path):
    data = INFO + REQUEST + response(PAGE.encode()) + METADATA + response(b"plain\ntext", "text/plain", "http://b/")
    first, second = rows_of(tmp_path / "a.warc", data, keep=("record_id", "status", "type"))
    assert (first.id, first.text, first.source) == ("http://a.example/", TEXT, "a.warc")
    assert (first.line, first.position) == (3, len(INFO + REQUEST))
    assert first.kept == ("urn:uuid:1", "200", "response")
    assert (second.id, second.text, second.line) == ("http://b/", "plain\ntext", 5)


def test_other_fields_can_be_the_id(tmp_path):
    (row,) = rows_of(tmp_path / "a.warc", response(PAGE.encode()), id="record_id")
    assert row.id == "urn:uuid:1"
    (row,) = rows_of(tmp_path / "b.warc", record("conversion", b"x", "text/plain", WARC_Record_ID="<urn:uuid:2>"))
    assert row.id == "urn:uuid:2"


def test_extracts_give_their_text_as_it_is(tmp_path):
    data = INFO + record("conversion", "líne\n <b>two".encode(), "text/plain", WARC_Target_URI="http://a/")
    (row,) = rows_of(tmp_path / "a.wet", data)
    assert (row.id, row.text) == ("http://a/", "líne\n <b>two")
    assert rows_of(tmp_path / "a.warc.wet.gz", gzip.compress(data)) == [row._replace(source="a.warc.wet.gz")]


@pytest.mark.parametrize("module", ["fastwarc.warc", "resiliparse.extract.html2text"])
def test_without_the_extra_archives_are_refused_with_advice(tmp_path, module):
    with patch.dict(sys.modules, {module: None}), pytest.raises(UsageError) as refused:
        rows_of(tmp_path / "a.warc", response(PAGE.encode()))
    assert refused.value.advice == (
        "Install them with: pip install fastwarc resiliparse\n"
        "Or leave such files out with --exclude '*.warc'. Nothing was changed."
    )


ENCODED = {
    "utf-8 by header": response(PAGE.encode()),
    "latin-1 by header": response(PAGE.encode("latin-1"), "text/html;charset=ISO-8859-1"),
    "by meta": response(PAGE.replace("<title>", '<meta charset="latin1"><title>').encode("latin-1"), "text/html"),
    "unknown charset": response(PAGE.encode(), "text/html; charset=nonsense"),
    "chunked": response(b"5;x=y\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        PAGE.encode()[:5], len(PAGE.encode()) - 5, PAGE.encode()[5:]), Transfer_Encoding="chunked"),
    "chunked by name only": response(PAGE.encode(), Transfer_Encoding="chunked"),
    "gzip": response(gzip.compress(PAGE.encode()), Content_Encoding="gzip"),
    "gzip by name only": response(PAGE.encode(), Content_Encoding="gzip"),
    "gzip in two members": response(halves(gzip.compress), Content_Encoding="gzip"),
    "gzip in tiny members": response(b"".join(gzip.compress(PAGE.encode()[i : i + 1]) for i in range(
        len(PAGE.encode()))), Content_Encoding="x-gzip"),
    "gzip with zeros after it": response(gzip.compress(PAGE.encode()) + b"\0\0", Content_Encoding="gzip"),
    "deflate": response(zlib.compress(PAGE.encode()), Content_Encoding="deflate"),
    "raw deflate": response(raw_deflate(PAGE.encode()), Content_Encoding="deflate"),
    "deflate by name only": response(PAGE.encode(), Content_Encoding="deflate"),
    "zstd": response(zstd(PAGE.encode()), Content_Encoding="zstd"),
    "zstd in two frames": response(halves(zstd, b"\x50\x2a\x4d\x18\3\0\0\0any"), Content_Encoding="zstd"),
    "zstd by name only": response(PAGE.encode(), Content_Encoding="zstd"),
    "zstd in gzip": response(gzip.compress(zstd(PAGE.encode())), Content_Encoding="zstd, gzip"),
    "not encoded by name": response(PAGE.encode(), Content_Encoding="identity"),
    "xhtml": response(PAGE.encode(), "application/xhtml+xml"),
    "resource": record("resource", PAGE.encode(), "text/html", WARC_Target_URI="http://a.example/"),
    "type reported by the crawler": record("response", http(PAGE.encode(), ""), WARC_Target_URI="http://a.example/",
        WARC_Identified_Payload_Type="text/html"),
}  # fmt: skip


@pytest.mark.parametrize("how", ENCODED)
def test_pages_are_decoded(tmp_path, how):
    (row,) = rows_of(tmp_path / "a.warc", ENCODED[how])
    assert (row.id, row.text) == ("http://a.example/", TEXT)


SET_ASIDE = {
    "content of another type is neither HTML nor plain text": response(b"\x89PNG", "image/png"),
    "content of no type is neither HTML nor plain text": response(b"x", ""),
    "no text in it": response(b"<html><script>1</script></html>"),
    "its content is cut off or not gzip: the compressed data end": response(
        gzip.compress(PAGE.encode())[:-9], Content_Encoding="gzip"
    ),
    "its content is cut off or not gzip: damaged": response(b"\x1f\x8b\x08" + b"\xff" * 50, Content_Encoding="gzip"),
    "its content is compressed in a way that is not supported": response(b"x", Content_Encoding="dcz"),
    "its content is cut off or not gzip": response(b"\0\1\2 no gzip", Content_Encoding="gzip"),
    "its content is cut off or not zstd": response(b"\0\1\2 no zstd", Content_Encoding="zstd"),
    "invalid UTF-8 at byte 1": record("conversion", b"a\xff", "text/plain", WARC_Target_URI="http://a.example/"),
    "a record of unknown type": record("page", b"x", "text/plain", WARC_Target_URI="http://a.example/"),
    "a segmented record, which is not supported": record("continuation", b"x", WARC_Target_URI="http://a.example/"),
    "'text' has 2,000 bytes": response(b"x" * 2000, "text/plain"),
    "record of 2,000,000 bytes": record("response", b"x" * 2_000_000, WARC_Target_URI="http://a.example/"),
    "its content is longer than": response(gzip.compress(b"\0" * 3_000_000), Content_Encoding="gzip"),
}
CODED = {"gzip": gzip.compress, "zstd": zstd, "deflate": zlib.compress, "raw deflate": raw_deflate}


@pytest.mark.parametrize("coding", CODED)
def test_bodies_of_any_coding_that_are_cut_off_damaged_or_too_long_are_set_aside(tmp_path, coding):
    page = b"<p>" + bytes(i % 89 + 33 for i in range(2000)) + b"</p>"
    packed, header = CODED[coding](page), {"Content_Encoding": coding.split()[-1]}
    damaged = packed[:40] + bytes(byte ^ 0x5A for byte in packed[40:80]) + packed[80:]
    if coding == "raw deflate":
        damaged = b"\x07" + packed[1:]  # it has no checksum, so only what is no code at all shows
    bomb = CODED[coding](b"\0" * 3_000_000)
    bodies = (packed, packed[:-9], packed[: len(packed) // 2], damaged, bomb)
    data = b"".join(response(body, **header) for body in bodies)
    good, *bad = rows_of(tmp_path / "a.warc", data, max_document=4000)
    assert isinstance(good, Document)
    assert [row.damage for row in bad] == [False] * 4  # of the page, not of the file
    assert [row.reason.split(":")[0] for row in bad[:3]] == [
        f"its content is cut off or not {header['Content_Encoding']}"
    ] * 3
    assert bad[3].reason == f"its content is longer than {4 * 4000 + (1 << 20):,} bytes"


@pytest.mark.parametrize("reason", SET_ASIDE)
def test_records_without_readable_text_are_set_aside_alone(tmp_path, reason):
    good = response(b"good", "text/plain", "http://good/")
    first, bad, last = rows_of(tmp_path / "a.warc", good + SET_ASIDE[reason] + good, max_document=1000)
    assert (first.text, last.text) == ("good", "good")
    assert bad.reason.startswith(reason)
    assert (bad.line, bad.offset, bad.excerpt, bad.damage) == (2, len(good), "http://a.example/", False)


WHOLE = INFO + response(PAGE.encode()) + response(b"second", "text/plain")


@pytest.mark.parametrize("block", [50, 1 << 18])
def test_an_archive_cut_off_at_any_byte_gives_whole_records_and_says_where(tmp_path, block):
    borders = [len(INFO), len(INFO + response(PAGE.encode())), len(WHOLE)]
    with patch.object(streams, "BLOCK_BYTES", block):
        for size in range(1, len(WHOLE)):
            rows = rows_of(tmp_path / "a.warc", WHOLE[:size])
            complete = sum(border - 4 <= size for border in borders)
            inside = not any(border - 4 <= size <= border for border in borders)
            documents = [row for row in rows if isinstance(row, Document)]
            assert [row.text for row in documents] == [TEXT, "second"][: max(0, complete - 1)]
            broken = [row.damage for row in rows[len(documents) :]]
            # What ends a record may lack its own end: nothing is lost.
            assert broken == [True] or (broken == [] and not inside)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_member_cut_off_is_damage(tmp_path, kind):
    members = [PACK[kind](part) for part in (INFO, response(PAGE.encode()), response(b"second", "text/plain"))]
    path = tmp_path / f"a.warc.{kind}"
    assert [row.text for row in rows_of(path, b"".join(members))] == [TEXT, "second"]
    *rows, last = rows_of(path, b"".join(members)[:-3])
    # The last record is whole, its checksum is not.
    assert [row.text for row in rows][:1] == [TEXT]
    assert last.damage


@pytest.mark.parametrize(
    "junk", [b"no archive", b"\0" * 100, b"WARC/1.0\r\nWARC-Type: response\r\n\r\n",
             b"WARC/1.0\r\nContent-Length: -5\r\n\r\n", b"WARC/1.0\r\n" + b"x" * 3_000_000,
             b"WARC/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
             b"WARC/1.0\r\nContent-Length: " + "\u0665".encode() + b"\r\n\r\n"]
)  # fmt: skip
def test_what_is_no_record_breaks_off_the_rest(tmp_path, junk):
    good = response(b"good", "text/plain")
    first, last = rows_of(tmp_path / "a.warc", good + junk + good)
    assert isinstance(first, Document)
    assert (type(last), last.damage, last.line) == (Rejected, True, 2)
    assert last.reason.startswith("broken off after record ")


def test_a_length_may_begin_with_zeros(tmp_path):
    data = response(b"good", "text/plain").replace(b"Content-Length: ", b"Content-Length: " + b"0" * 5000)
    assert [row.text for row in rows_of(tmp_path / "a.warc", data)] == ["good"]


def test_the_same_page_twice_keeps_one_id(tmp_path):
    file = input_of(tmp_path / "a.warc", response(b"then", "text/plain") + response(b"now", "text/plain"))
    assert [row.id for row in read_input(file, Fields())] == ["http://a.example/"] * 2


def test_bytes_changed_anywhere_lose_no_record_in_silence(tmp_path):
    packed = response(gzip.compress(b"two"), "text/plain", Content_Encoding="gzip")
    extract = record("conversion", b"three", "text/plain", WARC_Target_URI="http://c/")
    whole = [INFO, REQUEST, response(b"one", "text/plain"), METADATA, packed, extract]
    data = b"".join(whole)
    for place in range(len(data)):
        for byte in (0, data[place] ^ 0x80) if place % 2 else (10, ord("x")):
            rows = rows_of(tmp_path / "a.warc", data[:place] + bytes([byte]) + data[place + 1 :])
            broken = any(isinstance(row, Rejected) and row.damage for row in rows)
            assert broken or len(rows) >= 3
