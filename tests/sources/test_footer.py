"""Footers of Parquet files: damage to them is a row that says so; it never ends the process."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from source_help import input_of

from retrotool.sources import WHOLE, Document, Fields, InputFile, Rejected, check_input, cut_input, read_input

ROWS = [
    {"id": f"d{i}", "text": f"text é {i} " * (i % 5 + 1), "ids": [1, 2, i], "m": {"a": i, "b.c": None}, "x": i % 2 == 0}
    for i in range(200)
]
TABLE = pa.Table.from_pylist(ROWS)

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
        check_input(file, fields)
        for where in (WHOLE, *cut_input(file, fields, 500)):
            for row in read_input(file, fields, where):
                assert isinstance(row, Document | Rejected)


def test_no_changed_byte_of_a_footer_raises_or_ends_the_process(tmp_path):
    from conftest import times  # which the other process does not have

    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=50)
    pq.write_table(TABLE.slice(0, 30), tmp_path / "b.parquet", write_page_checksum=True, store_schema=False)
    pq.write_table(TABLE.select(["text"]), tmp_path / "c.parquet", write_page_index=True, store_schema=False)
    ended = subprocess.run(
        [sys.executable, __file__, tmp_path, "0", str(times(400, 1500))], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_column_names_that_are_no_text_are_damage(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, store_schema=False, row_group_size=50)
    path.write_bytes(path.read_bytes().replace(b"\x04text", b"\x04t\xffxt"))
    file = input_of(path)
    assert cut_input(file, Fields(), 1) == [WHOLE]
    (row,) = read_input(file, Fields())
    assert row.damage
    assert row.reason.startswith("can't be read: UnicodeDecodeError: ")


def test_a_damaged_count_of_rows_sets_no_rows_aside_without_end(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.select(["x"]), path, store_schema=False)
    data = path.read_bytes()
    place = data.rindex(b"\x16\x90\x03")  # 200, the number of the row group's rows
    path.write_bytes(data[:place] + b"\x16\x90\x7f" + data[place + 3 :])
    (row,) = read_input(input_of(path), Fields(text="nothing"))
    assert row.damage
    assert row.reason.startswith("the footer is damaged: 200 rows, but ")


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
