"""Every format, every bad input: the rows read are the documents and the rows rejected, each with its reason."""

from __future__ import annotations

import tracemalloc

import pytest
from source_help import PACK, input_of, rows_of
from test_warc import record, response

from retrotool.sources import Document, Fields, Rejected, read_input

LIMIT = 1000
GOOD = 'good text, with "quotes" and\ttabs'
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "invalid UTF-8": b"abc\xff\xfe",
    "cut off UTF-8": "é".encode()[:1],
    "surrogate in UTF-8": b"a\xed\xa0\x80b",
    "overlong UTF-8": b"\xc0\xaf",
    "too long": b"x" * (LIMIT + 1),
    "far too long": b"y" * 3_000_000,
}
"""Texts that no format may make a document of."""
_NOT_UTF8 = ("invalid UTF-8", "cut off UTF-8", "surrogate in UTF-8", "overlong UTF-8")
ENDS = {"json": (*_NOT_UTF8, "far too long"), "csv": ("far too long",), "tsv": ("far too long",)}
"""After which of them the rest of the file is rejected."""


def quoted(text: bytes) -> bytes:
    return b'"' + text.replace(b'"', b'""') + b'"'


def in_json(text: bytes) -> bytes:
    escaped = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\t", b"\\t")
    return b'{"id": 7, "text": "' + escaped + b'"}'


def in_array(rows: list[bytes]) -> bytes:
    return b"[" + b",".join(map(in_json, rows)) + b"]"


WRITERS = {
    "jsonl": lambda rows: b"".join(in_json(row) + b"\n" for row in rows),
    "json": in_array,
    "csv": lambda rows: b"id,text\n" + b"".join(b"7," + quoted(row) + b"\n" for row in rows),
    "tsv": lambda rows: b"id\ttext\r\n" + b"".join(b"7\t" + quoted(row) + b"\r\n" for row in rows),
    "wet": lambda rows: b"".join(record("conversion", row, WARC_Target_URI="http://a/") for row in rows),
    "txt": lambda rows: b"<|>".join(rows),
}
ROW_LEVEL = {
    "jsonl": [
        '{"id": 1}', '{"text": null}', '{"text": 5}', '{"text": ["x"]}', '{"text": {"a": "x"}}', "[]", "5", "null",
        '{"text": "x"', "{text: 1}", '{"text": "\\ud800"}', '{"text": NaN}', "\0", '{"text": "x", "id": 1.5}',
    ],
    "csv": ["7", "7,x,y", "7,", ",", '"",""'],
    "tsv": ["7", "7\tx\ty", "7\t", "\t"],
}  # fmt: skip


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("base", WRITERS)
def test_rows_are_documents_or_set_aside_with_a_reason(tmp_path, base, packed):
    good = GOOD.encode()
    texts = [text for what, text in TEXTS.items() if what not in ENDS.get(base, ())]
    rows = [good, *(text for bad in texts for text in (bad, good))]
    data = WRITERS[base](rows)
    path = tmp_path / f"rows.{base}{'.' if packed else ''}{packed}"
    separator = "<|>" if base == "txt" else None
    found = rows_of(path, PACK[packed](data) if packed else data, max_document=LIMIT, separator=separator)
    skipped = base == "txt"  # an empty text between separators is no row
    assert len(found) == len(rows) - skipped
    documents = [row for row in found if isinstance(row, Document)]
    aside = [row for row in found if isinstance(row, Rejected)]
    assert [row.text for row in documents] == [GOOD] * (len(texts) + 1)
    assert len(aside) == len(texts) - skipped
    for row in aside:
        assert row.reason
        assert not row.damage
        assert row.line > 0
        assert row.offset > 0 or base == "json"
        assert row.excerpt.isprintable()
    lines = [row.line for row in found]
    assert lines == sorted(set(lines))
    places = [row.position if isinstance(row, Document) else row.offset for row in found]
    assert places == sorted(set(places)) or base == "json"


@pytest.mark.parametrize(("base", "what"), [(base, what) for base, ends in ENDS.items() for what in ends])
def test_what_hides_where_a_row_ends_rejects_the_rest(tmp_path, base, what):
    good = GOOD.encode()
    *rows, last = rows_of(tmp_path / f"a.{base}", WRITERS[base]([good, good, TEXTS[what], good]), max_document=LIMIT)
    assert [row.text for row in rows] == [GOOD] * 2
    assert (last.damage, last.line) == (True, rows[-1].line + 1)


@pytest.mark.parametrize(("base", "bad"), [(base, bad) for base, rows in ROW_LEVEL.items() for bad in rows])
def test_rows_that_are_wrong_by_their_format_are_set_aside_alone(tmp_path, base, bad):
    good = WRITERS[base]([GOOD.encode()])
    header, row = (good.split(b"\n", 1)[0] + b"\n", good.split(b"\n", 1)[1]) if base != "jsonl" else (b"", good)
    first, second, third = rows_of(tmp_path / f"a.{base}", header + row + bad.encode() + b"\n" + row)
    assert [first.text, third.text] == [GOOD, GOOD]
    assert isinstance(second, Rejected)
    assert second.reason
    assert (second.offset, second.damage) == (len(header + row), False)


@pytest.mark.parametrize("base", WRITERS)
@pytest.mark.parametrize("kind", PACK)
def test_a_file_cut_off_in_the_middle_ends_with_damage(tmp_path, base, kind):
    texts = [f"text number {n} {n * n * 7919:x}".encode() for n in range(60)]
    packed = PACK[kind](WRITERS[base](texts))
    for size in (len(packed) // 3, len(packed) // 2, len(packed) - 1):
        path = tmp_path / f"a.{base}.{kind}"
        *rows, last = rows_of(path, packed[:size], separator="<|>" if base == "txt" else None)
        assert [row.text.encode() for row in rows] == texts[: len(rows)]
        assert (type(last), last.damage) == (Rejected, True)
        assert "broken off" in last.reason


@pytest.mark.parametrize("base", [*WRITERS, "warc"])
@pytest.mark.parametrize(
    "data", [b"\0" * 5000, b"\xff" * 5000, b"\n" * 5000, b'"' * 4999, b"{" * 5000, b"\x1f\x8b\x08" * 99]
)
def test_files_of_something_else_are_never_documents_and_never_crash(tmp_path, base, data):
    rows = rows_of(tmp_path / f"a.{base}", data, separator="<|>" if base == "txt" else None)
    if base == "txt" and data[:1] in b'\0"{':
        assert [type(row) for row in rows] == [Document]
    else:
        assert all(isinstance(row, Rejected) and row.reason for row in rows)
        assert rows or not data.strip()


def test_empty_files_say_so(tmp_path):
    for base in [*WRITERS, "warc"]:
        assert rows_of(tmp_path / f"a.{base}", b"") == [Rejected(0, "the file is empty")]


def test_pages_are_rows_like_any(tmp_path):
    data = b"".join(response(text, "text/plain") for text in (b"x", b"", b"y" * (LIMIT + 1), b"z"))
    found = rows_of(tmp_path / "a.warc", data, max_document=LIMIT)
    assert [type(row) for row in found] == [Document, Rejected, Rejected, Document]
    assert [row.line for row in found] == [1, 2, 3, 4]


@pytest.mark.parametrize("base", WRITERS)
def test_memory_does_not_grow_with_the_file(tmp_path, base):
    path = tmp_path / f"a.{base}"
    separator = "<|>" if base == "txt" else None

    def peak(rows: int) -> int:
        data = WRITERS[base]([f"{n} ".encode() + b"words " * 200 for n in range(rows)])
        file = input_of(path, data)
        del data
        tracemalloc.start()
        found = sum(isinstance(row, Document) for row in read_input(file, Fields(separator=separator)))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == rows
        return most

    small = peak(3_000)  # 3.5 MB
    assert peak(9_000) < small + (4 << 20)
