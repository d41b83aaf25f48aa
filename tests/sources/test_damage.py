"""Damage of any kind is one row that says what is wrong; it never stops a command, before the work or during it."""

from __future__ import annotations

import errno
import io
import random
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_help import PACK, input_of
from test_warc import response
from token_help import write_megatron

from retrotool.errors import UsageError
from retrotool.sources import (
    WHOLE,
    Document,
    Fields,
    Rejected,
    check_input,
    cut_input,
    read_input,
    reason_of,
)
from retrotool.sources.read import CUTTERS, READERS

TABLE = pa.table({"text": [f"text {i} " * (i % 5) for i in range(60)], "ids": [[i, 1] for i in range(60)]})


def arrow(new) -> bytes:
    out = io.BytesIO()
    with new(out, TABLE.schema) as writer:
        writer.write_table(TABLE, 10)
    return out.getvalue()


def parquet(table: pa.Table = TABLE) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=20)
    return out.getvalue()


def numpy(dtype: object = "u2") -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(60).astype(dtype))
    return out.getvalue()


LINES = b'{"text": "a line"}\n' * 9
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.zst": PACK["zst"](LINES),
    "a.jsonl.gz": PACK["gz"](LINES),
    "a.json": b"[" + b",".join(LINES.split(b"\n")[:-1]) + b"]",
    "a.csv": b'id,text\n1,"a\n""b"""\n' * 9,
    "a.arrow": arrow(pa.ipc.new_file),
    "b.arrow": arrow(pa.ipc.new_stream),
    "a.parquet": parquet(),
    "a.npy": numpy(),
    "a.warc": response(b"<p>one</p>") + response(PACK["gz"](b"<p>two</p>"), Content_Encoding="gzip"),
}


def plan_and_read(path: Path, data: bytes, fields: Fields) -> list[Document | Rejected]:
    """The rows of a file read whole, after all that is done with one before the work."""
    file = input_of(path, data)
    check_input(file, fields)
    for where in cut_input(file, fields, max(1, len(data) // 3)):
        for row in read_input(file, fields, where):
            assert isinstance(row, Document | Rejected)
    return list(read_input(file, fields))


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_anywhere_raise_nothing(tmp_path, name):
    generator = random.Random(0)
    good = FILES[name]
    fields = Fields(end_of_document=7)
    assert any(isinstance(row, Document) for row in plan_and_read(tmp_path / name, good, fields))
    outcomes = set()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(generator.choice((1, 2))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.2:
            del data[generator.randrange(1, len(data)) :]
        rows = plan_and_read(tmp_path / name, bytes(data), fields)
        outcomes.add(any(isinstance(row, Rejected) for row in rows))
    assert True in outcomes


ODD = [
    ValueError("it says\nthis"),
    KeyError("x"),
    SyntaxError("no"),
    EOFError(),
    OverflowError("big"),
    TypeError("odd"),
]


@pytest.mark.parametrize("error", ODD, ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_of_a_file_is_damage_of_it(tmp_path, error):
    def fail(*given):
        raise error
        yield

    file = input_of(tmp_path / "a.jsonl", LINES)
    with patch.dict(READERS, {"jsonl": fail}), patch.dict(CUTTERS, {"jsonl": fail}):
        (row,) = read_input(file, Fields())
    with patch.dict(CUTTERS, {"jsonl": lambda *given: list(fail())}):
        assert cut_input(file, Fields(), 1) == [WHOLE]
    assert (row.line, row.damage) == (0, True)
    first = "…" if isinstance(error, KeyError) else str(error).partition("\n")[0]  # what it quotes may be the file's
    assert row.reason == f"can't be read: {type(error).__name__}" + (f": {first}" if first else "")


NAMED = {
    "a.warc": b"target said so\r\n",
    "length.warc": b"WARC/1.0\r\nContent-Length: target\r\n\r\n",
    "type.warc": response(b"x", "target/x"),
    "coding.warc": response(b"x", Content_Encoding="target"),
    "header.csv": b"target,1\nother,2\n",
    "columns.parquet": parquet(TABLE.rename_columns(["target", "ids"])),
    "header.npy": b"\x93NUMPY\1\0\x26\0{'descr': '<u2', 'target': 'target' }   \n",
    "array.npy": numpy([("target", "<u2")]),
    "text.npy": b"target 'descr': ",
}
"""Files in whose place of a name or a number stands what nobody should read in a reason."""


@pytest.mark.parametrize("name", NAMED)
def test_reasons_say_nothing_of_what_the_input_says(tmp_path, name):
    rows = plan_and_read(tmp_path / name, NAMED[name], Fields(end_of_document=7))
    assert rows
    assert all(isinstance(row, Rejected) for row in rows)
    assert not any("vict" in row.reason for row in rows), rows


@pytest.mark.parametrize("text", ["it's 'target' here", 'of "vic\'tim"', "b'target", "name: `target`, `target`"])
def test_what_a_library_quotes_is_left_out(text):
    assert "vic" not in reason_of(ValueError(text))
    assert "tim" not in reason_of(ValueError(text))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError("no more"), UsageError("not so")], ids=repr
)
def test_what_is_not_the_fault_of_a_file_is_raised_as_it_is(tmp_path, error):
    def fail(*given):
        raise error

    file = input_of(tmp_path / "a.jsonl", LINES)
    with patch.dict(READERS, {"jsonl": fail}), patch.dict(CUTTERS, {"jsonl": fail}):
        for use in (lambda: list(read_input(file, Fields())), lambda: cut_input(file, Fields(), 1)):
            with pytest.raises(type(error)) as raised:
                use()
            assert raised.value is error


HEADERS = {
    "a quote that is not closed": lambda data: data.replace(b"'descr'", b"'descr "),
    "a bracket that is not closed": lambda data: data.replace(b")", b" "),
    "no text": lambda data: data.replace(b"descr", b"\xff\xfe\0\0\0"),
    "another type": lambda data: data.replace(b"<u2", b"<Q9"),
    "a name": lambda data: data.replace(b"False", b"Falsy"),
    "a version that is not known": lambda data: data[:6] + b"\x09" + data[7:],
    "cut off": lambda data: data[:40],
    "a length beyond the file": lambda data: data[:8] + b"\xff\xff" + data[10:],
    "brackets without end": lambda data: data.replace(b"{'descr': ", b"((((((((((").replace(b"}", b" "),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header_of_numpy_sets_the_file_aside_by_name(tmp_path, damage):
    data = HEADERS[damage](numpy())
    assert data != numpy()
    (row,) = plan_and_read(tmp_path / "a.npy", data, Fields(end_of_document=7))
    assert row.damage
    assert "a.npy is" in row.reason


def test_a_damaged_index_sets_its_file_aside_by_name(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2]], [[3]]], "<u2")
    (tmp_path / "c.idx").write_bytes((tmp_path / "c.idx").read_bytes()[:-1])
    (row,) = plan_and_read(tmp_path / "c.bin", b"\1\0\2\0\3\0", Fields(end_of_document=7))
    assert row.damage
    assert "c.idx is damaged" in row.reason


def test_a_token_file_that_becomes_shorter_while_it_is_read_is_damage(tmp_path):
    write_megatron(tmp_path / "a", [[[i % 1000] * 20] for i in range(60_000)], "<u2")
    rows = read_input(input_of(tmp_path / "a.bin"), Fields())
    first = [next(rows) for _ in range(1000)]
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(4000)
    *_, last = rows
    assert all(isinstance(row, Document) for row in first)
    assert last.damage
    assert "the file was truncated while it was read" in last.reason
