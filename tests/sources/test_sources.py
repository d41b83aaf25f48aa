"""Sources: what is an input, what it is called, and that every format gives the same documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_help import BOM, PACK, input_of, rows_of, zstd

from retrotool.sources import Document, Fields, Rejected, find_inputs, read_input
from retrotool.sources.lines import count_lines
from retrotool.sources.records import content_hash, find

ROWS = [
    {"id": "a", "text": "one\ntwo", "source": "s", "year": 2001, "tags": ["x", "y"], "note": None},
    {"id": "7", "text": "ünïcödé 🎈 \u2028", "source": None, "year": 2002, "tags": [], "note": "n"},
    {"id": None, "text": "no id", "source": "s", "year": None, "tags": None, "note": "m"},
]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CUT = PLAIN.index(b"\n") + 5  # members and frames end inside a line


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ROWS[0].keys(), delimiter=delimiter)
    writer.writeheader()
    for row in ROWS:
        tags = None if row["tags"] is None else json.dumps(row["tags"], separators=(",", ":"))
        writer.writerow({**row, "tags": tags})
    return out.getvalue().encode()


WRITERS: dict[str, Callable[[Path], object]] = {
    "plain.jsonl": lambda path: path.write_bytes(PLAIN),
    "plain.ndjson": lambda path: path.write_bytes(PLAIN.rstrip(b"\n")),
    "UPPER.JSONL": lambda path: path.write_bytes(BOM + PLAIN.replace(b"\n", b"\r\n")),
    "members.jsonl.gz": lambda path: path.write_bytes(b"".join(map(gzip.compress, (PLAIN[:CUT], PLAIN[CUT:])))),
    "frames.jsonl.zst": lambda path: path.write_bytes(b"".join(map(zstd, (PLAIN[:CUT], PLAIN[CUT:])))),
    "table.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "objects.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "lines.json": lambda path: path.write_bytes(PLAIN),
    "rows.csv": lambda path: path.write_bytes(as_csv(",")),
    "bom.csv": lambda path: path.write_bytes(BOM + as_csv(",")),
    "rows.tsv": lambda path: path.write_bytes(as_csv("\t")),
} | {
    f"one.{base}.{kind}": lambda path, data=data, pack=pack: path.write_bytes(pack(data))
    for base, data in {"jsonl": PLAIN, "json": json.dumps(ROWS).encode(), "csv": as_csv(",")}.items()
    for kind, pack in PACK.items()
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_formats_give_equal_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = rows_of(tmp_path / name, keep=("year", "tags", "note", "missing"))
    assert [(d.id, d.text, d.source, d.kept) for d in found] == [
        ("a", "one\ntwo", "s", ("2001", '["x","y"]', None, None)),
        ("7", "ünïcödé 🎈 \u2028", name, ("2002", "[]", "n", None)),
        (content_hash("no id").hex(), "no id", "s", (None, None, "m", None)),
    ]


@pytest.mark.parametrize("name", ["members.jsonl.gz", "frames.jsonl.zst", *(f"one.jsonl.{kind}" for kind in PACK)])
def test_offsets_in_compressed_files_are_those_of_what_they_hold(tmp_path, name):
    WRITERS[name](tmp_path / name)
    file = input_of(tmp_path / name)
    found = list(read_input(file, Fields()))
    assert [PLAIN[row.position :].split(b"\n")[0] for row in found] == [json.dumps(row).encode() for row in ROWS]
    assert [row.line for row in found] == count_lines(file, [row.position for row in found]) == [1, 2, 3]


def test_a_text_file_is_one_document_named_by_its_path(tmp_path):
    inner = tmp_path / "books" / "a" / "one.txt"
    inner.parent.mkdir(parents=True)
    inner.write_bytes(BOM + "línea\r\n".encode())
    (file,) = find_inputs([str(tmp_path / "books")])
    assert list(read_input(file, Fields(keep=("k",)))) == [
        Document("books/a/one.txt", "línea\r\n", "books/a", 0, 0, (None,))
    ]
    (document,) = rows_of(inner)
    assert (document.id, document.source) == ("one.txt", "one.txt")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("x", "x"), (5, "5"), (-5, "-5"), (0, "0"), (2**63, str(2**63)), (None, content_hash("t").hex())],
)
def test_ids_are_strings_whole_numbers_or_made_of_the_text(tmp_path, given, expected):
    found = rows_of(tmp_path / "ids.jsonl", json.dumps({"id": given, "text": "t"}).encode())
    assert [row.id for row in found] == [expected]


@pytest.mark.parametrize("given", [1.5, True, [], {}, ""])
def test_other_ids_are_set_aside(tmp_path, given):
    line = json.dumps({"id": given, "text": "t"})
    (row,) = rows_of(tmp_path / "ids.jsonl", line.encode())
    assert row == Rejected(1, "'id' is neither a string nor a whole number", 0, line)


def test_fields_are_found_by_the_names_given(tmp_path):
    row = {"doi": "10/x", "body": "b", "text": "not this", "id": "not this", "source": "s"}
    found = rows_of(tmp_path / "fields.jsonl", json.dumps(row).encode(), text="body", id="doi", keep=("text",))
    assert found == [Document("10/x", "b", "s", 0, 1, ("not this",))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", {"b": {"c": 1}, "d": "x"}),
        ("a.d", "x"),
        ("a.b.c", 1),
        ("a.b.c.d", None),
        ("a.x", None),
        ("x.y", None),
        ("p.q", "whole"),  # a field of the whole name goes before a way into an object
        ("l.0", None),
        (".", None),
        ("", None),
    ],
)
def test_dotted_names_lead_into_objects(name, expected):
    row = {"a": {"b": {"c": 1}, "d": "x"}, "p.q": "whole", "p": {"q": "inner"}, "l": ["x"]}
    assert find(row, name) == expected


def test_dotted_fields_are_read(tmp_path):
    row = {"doc": {"body": "b", "meta": {"id": 5, "lang": "en"}}}
    found = rows_of(
        tmp_path / "f.jsonl", json.dumps(row).encode(), text="doc.body", id="doc.meta.id", keep=("doc.meta.lang",)
    )
    assert found == [Document("5", "b", "f.jsonl", 0, 1, ("en",))]


def test_fingerprints_tell_content_from_names(tmp_path):
    one, copy, other = (input_of(tmp_path / f"{n}.jsonl", data) for n, data in enumerate([b"x1", b"x1", b"x2"]))
    assert one.fingerprint() == copy.fingerprint() != other.fingerprint()


def test_of_a_text_the_name_counts_where_it_is_the_id(tmp_path):
    one, other = (input_of(tmp_path / name, b"same") for name in ("a.txt", "b.txt"))
    whole, separated = Fields(), Fields(separator="\n")
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint(whole) != other.fingerprint(whole)
    assert one.fingerprint(separated) == other.fingerprint(separated)


READ_OTHERWISE = {
    "jsonl": [{"text": "body"}, {"id": "doi"}, {"tokens": "text"}, {"key": "text", "value": "id"}],
    "parquet": [{"text": "body"}, {"id": "doi"}, {"tokens": "text"}, {"key": "text", "value": "id"}],
    "txt": [{"separator": "\n"}, {"separator": "\n\n"}],
    "tokens": [{"token_dtype": "uint16"}, {"token_dtype": "uint32"}, {"end_of_document": 0}, {"end_of_document": 1}],
}
"""Settings by which an input of a format is another."""
READ_ALIKE = {
    "jsonl": [{"keep": ("a",)}, {"max_document": 1}, {"separator": "\n"}, {"token_dtype": "uint16"}],
    "txt": [{"text": "body"}, {"id": "doi"}, {"max_document": 1}, {"end_of_document": 1}, {"separator": ""}],
    "tokens": [{"text": "body"}, {"separator": "x"}, {"max_document": 1}],
}


@pytest.mark.parametrize("base", READ_OTHERWISE)
def test_settings_that_make_other_documents_of_rows_are_reported_apart(base):
    readings = [Fields(**settings).reading(base) for settings in ({}, *READ_OTHERWISE[base])]
    assert len(set(readings)) == len(readings)


@pytest.mark.parametrize("base", READ_ALIKE)
def test_settings_that_leave_the_documents_as_they_are_make_no_difference(base):
    assert {Fields(**settings).reading(base) for settings in READ_ALIKE[base]} == {Fields().reading(base)}
