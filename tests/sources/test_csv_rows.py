"""CSV and TSV: rows at their places, one bad row alone, and nothing held of what is too long."""

from __future__ import annotations

import csv
import io
import itertools
from unittest.mock import patch

import duckdb
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_help import PACK, input_of, rows_of

from retrotool.errors import InputError
from retrotool.sources import Document, Fields, Rejected, read_input, streams
from retrotool.sources.csv_rows import csv_records
from retrotool.sources.records import content_hash

values = st.text(st.sampled_from('ab",\t\n\r é🎈'), max_size=10)
tables = st.lists(st.tuples(values, values, values), max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


def written(rows, delimiter: str, end: str, quoting: int) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows(rows)
    return out.getvalue().encode()


@given(
    tables, st.sampled_from(",\t"), st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.integers(1, 40),
)  # fmt: skip
def test_what_the_csv_module_writes_comes_back_at_its_place(table, delimiter, layout, block):
    end, quoting = layout
    header = [("id", "text", "more")]
    data = written([*header, *table], delimiter, end, quoting)
    stream = (data[i : i + block] for i in range(0, len(data), block))
    found = list(csv_records(stream, delimiter, 1 << 20))
    assert [tuple(record.fields) for record in found] == header + table
    offsets = [len(written([*header, *table][:n], delimiter, end, quoting)) for n in range(len(table) + 1)]
    assert [record.offset for record in found] == offsets
    assert [record.line for record in found] == [data[:offset].count(b"\n") + 1 for offset in offsets]


@given(st.lists(st.sampled_from([b"a", b",", b'"', b"\n", b"\r\n", b"\xff", b"\0", b'""', b"id,text\n"]), max_size=30))
def test_anything_is_read_to_its_end_without_a_crash(folder, pieces):
    data = b"text,id\n" + b"".join(pieces)
    rows = rows_of(folder / "any.csv", data)
    assert all(row.reason if isinstance(row, Rejected) else row.text for row in rows)
    lines = [row.line for row in rows]
    assert lines == sorted(set(lines))
    # A line that is not blank begins a row or belongs to the row before it.
    first = next((n for n, line in enumerate(data.split(b"\n")[1:], 2) if line.strip(b"\r")), None)
    assert lines[:1] == ([] if first is None else [first])
    assert not any(row.damage for row in rows[:-1] if isinstance(row, Rejected))


@settings(deadline=None, max_examples=150)
@given(tables)
def test_the_texts_are_those_that_pandas_and_duckdb_read(folder, table):
    rows = [(f"{n}", text or "x", more) for n, (_, text, more) in enumerate(table)]
    data = written([("id", "text", "more"), *rows], ",", "\n", csv.QUOTE_ALL)
    path = folder / "oracle.csv"
    found = [row.text for row in rows_of(path, data)]
    assert found == [text for _, text, _ in rows]
    if rows:
        assert found == pandas.read_csv(path, dtype=str, keep_default_na=False)["text"].tolist()


def test_a_file_of_many_rows_is_read_as_duckdb_reads_it(tmp_path):
    rows = [(str(n), f'line {n}\n"quoted", and more ' * (n % 9 + 1)) for n in range(3000)]
    path = tmp_path / "a.csv"
    found = rows_of(path, written([("id", "text"), *rows], ",", "\n", csv.QUOTE_MINIMAL))
    assert [(row.id, row.text) for row in found] == rows
    query = f"SELECT id, text FROM read_csv('{path}', header=true, all_varchar=true, quote='\"', escape='\"')"
    assert duckdb.sql(query).fetchall() == rows


BAD_ROWS = {
    "x": "1 fields, the header has 2",
    "x,1,2": "3 fields, the header has 2",
    ",1": "'text' is empty",
    "x\xff,1": "invalid UTF-8 at byte 1 of the record",
    '"x\n\xff",1': "invalid UTF-8 at byte 3 of the record",
    "y" * 300 + ",1": "'text' has 300 bytes, more than --max-document 200",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_row_is_set_aside_alone(tmp_path, bad, end):
    data = b"text,id" + end + b"one,1" + end + bad.encode("latin-1") + end + b"three,3" + end
    first, second, third = rows_of(tmp_path / "a.csv", data, max_document=200)
    assert [first.text, third.text] == ["one", "three"]
    assert second.reason.startswith(BAD_ROWS[bad])
    assert (second.line, second.offset, second.damage) == (3, data.index(b"one,1" + end) + 5 + len(end), False)
    assert second.excerpt.isprintable()


def test_every_row_is_set_aside_if_the_column_is_missing(tmp_path):
    rows = rows_of(tmp_path / "a.csv", b"body,id\none,1\ntwo,2\n")
    assert [(row.reason, row.excerpt) for row in rows] == [("no column 'text' among 2", "body, id")] * 2
    assert [row.line for row in rows] == [2, 3]
    (row,) = rows_of(tmp_path / "b.csv", b"question,id\nq,1\n", key="question", value="answer")
    assert (row.reason, row.excerpt) == ("no column 'answer' among 2", "question, id")
    (row,) = rows_of(tmp_path / "c.csv", b"text,id,text\nx,1,y\n")
    assert row.reason == "column 'text' occurs 2 times"


def test_empty_fields_are_missing_values(tmp_path):
    (row,) = rows_of(tmp_path / "a.csv", b"text,id,source,k\nx,,,\n", keep=("k",))
    assert row == Document(content_hash("x").hex(), "x", "a.csv", 17, 2, (None,))


def test_key_value_records_are_read(tmp_path):
    (row,) = rows_of(tmp_path / "a.csv", b"q,a,id\nwhy,because,1\n", key="q", value="a")
    assert (row.id, row.text, row.value) == ("1", "why", "because")


@pytest.mark.parametrize("bad", [b'"x"y,1', b"x\ry,1", b'"x\n"y', b'"two\nthree', b'"', b'"two""', b'x"y,"two'])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_what_is_not_csv_rejects_the_rest_at_its_place(tmp_path, bad, end):
    data = b"text,id\none,1\n" + bad + end
    one, last = rows_of(tmp_path / "a.csv", data)
    assert one.text == "one"
    assert (last.damage, last.line) == (True, 3)
    assert last.reason.startswith("broken off after record 2, in line 3, at byte 14: not CSV: ")
    assert last.excerpt == bad.partition(b"\n")[0].decode().replace("\r", "\\r")


def test_a_quote_inside_a_field_is_a_quote(tmp_path):
    rows = rows_of(tmp_path / "a.csv", b'text,id\n5" pipe,1\nan "odd" "one,2\n"x",3\n')
    assert [(row.text, row.id) for row in rows] == [('5" pipe', "1"), ('an "odd" "one', "2"), ("x", "3")]


@pytest.mark.parametrize("kind", PACK)
def test_all_rows_before_a_break_come_out(tmp_path, kind):
    data = b"text,id\n" + b"".join(b'"text\n%d",%d\n' % (n, n) for n in range(50))
    *rows, last = rows_of(tmp_path / f"a.csv.{kind}", PACK[kind](data) + b"junk")
    assert [row.id for row in rows] == [str(n) for n in range(50)]
    assert last.damage


@pytest.mark.parametrize("data", [b"\n\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_header_says_so(tmp_path, data):
    (row,) = rows_of(tmp_path / "a.csv", data)
    assert row.reason == "no header row"
    (row,) = rows_of(tmp_path / "b.csv", b'te"xt,"i"d\nx,1\n')
    assert row.reason.startswith("broken off after record 0, in line 1, at byte 0: not CSV")


@pytest.mark.parametrize("long", [b"x" * 5000, b'"' + b"x\n" * 2500 + b'"', b'"' + b'x""\n' * 2000 + b'",1,"\n"'])
@pytest.mark.parametrize("block", [10, 1 << 18])
def test_a_record_over_the_limit_rejects_the_rest_at_its_place(long, block):
    data = b"text\none\n" + long + b"\nthree\n"
    found = csv_records((data[i : i + block] for i in range(0, len(data), block)), ",", 1000)
    assert [next(found).fields, next(found).fields] == [["text"], ["one"]]
    with pytest.raises(InputError, match="in line 3, at byte 9: a record of more than 1,000 bytes") as refused:
        next(found)
    assert refused.value.position == 3


def test_a_record_of_the_limit_is_read():
    data = b"text\n" + b"x" * 99 + b"\n" + b"y" * 100 + b"\n"
    assert [record.fields for record in csv_records(iter([data]), ",", 100)] == [["text"], ["x" * 99], ["y" * 100]]


def test_a_quote_that_is_never_closed_in_a_large_file_is_not_held(tmp_path):
    import tracemalloc

    file = input_of(tmp_path / "a.csv", b'text\n"' + b"x" * 99 + b"\n" * 1 + (b"y" * 99 + b"\n") * 300_000)
    tracemalloc.start()
    (row,) = read_input(file, Fields(max_document=1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.damage
    assert peak < 20 << 20


def test_rows_do_not_depend_on_blocks(folder):
    data = b"".join(b'"text %d, ""quoted""\nand more",%d\n' % (n, n) for n in range(50))
    file = input_of(folder / "blocks.csv", b"text,id\n" + data)
    whole = list(read_input(file, Fields()))
    assert len(whole) == 50
    for block in itertools.chain(range(1, 20), [100]):
        with patch.object(streams, "BLOCK_BYTES", block):
            assert list(read_input(file, Fields())) == whole
