"""Footers of Parquet files: what is read of them is what their writers wrote, and damage is an error, never a crash."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_help import input_of

from retrotool.sources import WHOLE, Document, Fields, InputFile, SetAside, check, cut, read
from retrotool.sources.footer import column_sizes

ROWS = [
    {"id": f"d{i}", "text": f"text é {i} " * (i % 5 + 1), "ids": [1, 2, i], "m": {"a": i, "b.c": None}, "x": i % 2 == 0}
    for i in range(200)
]
TABLE = pa.Table.from_pylist(ROWS)
WRITERS = {
    "pyarrow": lambda path: pq.write_table(TABLE, path, row_group_size=30),
    "checksums": lambda path: pq.write_table(
        TABLE, path, row_group_size=50, write_page_checksum=True, compression="zstd"
    ),
    "indexes": lambda path: pq.write_table(TABLE, path, write_page_index=True, write_statistics=True, version="1.0"),
    "bare": lambda path: pq.write_table(TABLE, path, write_statistics=False, store_schema=False, use_dictionary=False),
    "polars": lambda path: polars.from_arrow(TABLE).write_parquet(path, row_group_size=64),
    "duckdb": lambda path: duckdb.from_arrow(TABLE).write_parquet(str(path), row_group_size=2048),
    "wide": lambda path: pq.write_table(pa.table({f"c{i}": ["x"] * 3 for i in range(300)}), path, row_group_size=1),
    "no rows": lambda path: pq.write_table(TABLE.slice(0, 0), path),
    "no columns": lambda path: pq.write_table(pa.table({}), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_sizes_are_those_that_pyarrow_reads(tmp_path, writer):
    path = tmp_path / "a.parquet"
    WRITERS[writer](path)
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    expected = [[(chunk.path_in_schema, chunk.total_uncompressed_size) for chunk in group] for group in chunks]
    assert column_sizes(path) == expected


@pytest.mark.parametrize("writer", ["pyarrow", "polars"])
def test_a_changed_footer_is_read_or_refused(tmp_path, writer):
    path = tmp_path / "a.parquet"
    WRITERS[writer](path)
    good = path.read_bytes()
    begin = len(good) - int.from_bytes(good[-8:-4], "little") - 8
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        for _ in range(generator.choice((1, 1, 4))):
            data[generator.randrange(begin, len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            groups = column_sizes(path)
        except ValueError:
            refused += 1
        else:
            assert all(size >= 0 for group in groups for _, size in group)
    assert 0 < refused < 500


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", b"PAR1\0\0\0\0PAR1", b"\xff\xff\xff\xffPAR1", b"\x19" * 500 + b"\xf4\1\0\0PAR1",
     b"\x49\xfc" + b"\xff" * 8 + b"\x7f" + b"\x0b\0\0\0PAR1", b"\x1c" * 500 + b"\xf4\1\0\0PAR1"],
)  # fmt: skip
def test_what_is_no_footer_is_refused(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="footer"):
        column_sizes(tmp_path / "a.parquet")


# Damage to footers could end the process: it is done to another one.


def fuzz(folder: Path, seed: int, changes: int) -> None:
    """Change single bytes of footers, and plan and read what comes of it; any exception ends this process."""
    generator = random.Random(seed)
    files = {name: (folder / name).read_bytes() for name in ("a.parquet", "b.parquet", "c.parquet")}
    for _ in range(changes):
        name = generator.choice(sorted(files))
        data = bytearray(files[name])
        footer = int.from_bytes(data[-8:-4], "little") + 8
        data[-1 - generator.randrange(footer)] = generator.randrange(256)
        path = folder / "changed.parquet"
        path.write_bytes(data)
        file = InputFile(str(path), path.name, len(data), "parquet")
        fields = generator.choice((Fields(keep=("m", "x")), Fields(tokens="ids"), Fields(text="nothing")))
        check(file, fields)
        for where in (WHOLE, *cut(file, fields, 500)):
            for row in read(file, fields, where):
                assert isinstance(row, Document | SetAside)


def test_no_changed_byte_of_a_footer_raises_or_ends_the_process(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=50)
    pq.write_table(TABLE.slice(0, 30), tmp_path / "b.parquet", write_page_checksum=True, store_schema=False)
    pq.write_table(TABLE.select(["text"]), tmp_path / "c.parquet", write_page_index=True, store_schema=False)
    ended = subprocess.run([sys.executable, __file__, tmp_path, "0", "800"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_column_names_that_are_no_text_are_damage(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, store_schema=False, row_group_size=50)
    path.write_bytes(path.read_bytes().replace(b"\x04text", b"\x04t\xffxt"))
    file = input_of(path)
    assert cut(file, Fields(), 1) == [WHOLE]
    (row,) = read(file, Fields())
    assert row.damage
    assert row.reason.startswith("can't be read: UnicodeDecodeError: ")


def test_a_damaged_count_of_rows_sets_no_rows_aside_without_end(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.select(["x"]), path, store_schema=False)
    data = path.read_bytes()
    place = data.rindex(b"\x16\x90\x03")  # 200, the number of the row group's rows
    path.write_bytes(data[:place] + b"\x16\x90\x7f" + data[place + 3 :])
    (row,) = read(input_of(path), Fields(text="nothing"))
    assert row.damage
    assert row.reason.startswith("the footer is damaged: it tells 200 rows, its row groups ")


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
