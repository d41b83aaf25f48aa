"""Inputs made to hurt, through the command as a process: bounded memory, no crash, and every row accounted for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chunk_helpers import quarantine, verified
from conftest import times

import retrotool
from retrotool import api

HUGE = times(640 << 20, 1 << 30)
"""Bytes of what is too large for the memory that is allowed."""
MOST_MEMORY_KB = 600 << 10
WATCHED = """
import atexit, sys
from pathlib import Path
status = Path(sys.argv.pop(1))
atexit.register(lambda: status.write_bytes(Path("/proc/self/status").read_bytes()))
from retrotool.app import main
main()
"""
"""The command line, which leaves behind what the system knows of its memory."""


def packed(*pieces: tuple[bytes, int]) -> bytes:
    """The pieces, each repeated, as one zstd frame."""
    writer = zstandard.ZstdCompressor().compressobj()
    found = []
    for piece, count in pieces:
        block = piece * max(1, (1 << 20) // len(piece))
        found += [writer.compress(block) for _ in range(count * len(piece) // len(block))]
        found.append(writer.compress(piece * (count - count * len(piece) // len(block) * (len(block) // len(piece)))))
    return b"".join([*found, writer.flush()])


GOOD = b'{"id": "good", "text": "A good row at the end."}\n'
ROWS = times(100_000, 1_000_000)
NULLS = times(100_000, 200_000)


def nulls(path: Path) -> None:
    ids, texts = [*map(str, range(NULLS)), "good"], [*[None] * NULLS, "x"]
    pq.write_table(pa.table({"id": ids, "text": texts}), path)


WRITERS: dict[str, tuple[str, Callable[[Path], object], int, str]] = {
    "a huge document": (
        "big.jsonl.zst",
        lambda path: path.write_bytes(
            packed((b'{"id": "big", "text": "', 1), (b"word ", HUGE // 5), (b'"}\n', 1), (GOOD, 1))
        ),
        1,
        "longer than",
    ),
    "a huge text in a CSV": (
        "big.csv.zst",
        lambda path: path.write_bytes(packed((b'id,text\ngood,x\nbig,"', 1), (b"word ", HUGE // 5), (b'"\n', 1))),
        1,
        "a record of more than",
    ),
    "a huge text file": (
        "big.txt.zst",
        lambda path: path.write_bytes(packed((b"word ", HUGE // 5))),
        1,
        "more than --max-document",
    ),
    "a huge line without an end": (
        "line.jsonl.zst",
        lambda path: path.write_bytes(packed((GOOD, 1), (b"x", HUGE))),
        1,
        "longer than",
    ),
    "a bomb": ("bomb.jsonl.zst", lambda path: path.write_bytes(packed((b"\0", HUGE))), 1, "longer than"),
    "bytes of zero": (
        "zeros.jsonl",
        lambda path: path.write_bytes(b"\0" * 5000 + b"\n" + GOOD + b"\0\n"),
        2,
        "not JSON",
    ),
    "lone surrogates": (
        "halves.jsonl",
        lambda path: path.write_text('{"text": "\\ud800"}\n{"text": "a\\udfff\\ud800b"}\n' + GOOD.decode()),
        2,
        "not JSON",
    ),
    "very many empty documents": (
        "empty.jsonl.zst",
        lambda path: path.write_bytes(packed((b'{"id": "e", "text": ""}\n', ROWS), (GOOD, 1))),
        ROWS,
        "'text' is empty",
    ),
    "a table of nulls": ("nulls.parquet", nulls, NULLS, "'text' is null"),
}  # fmt: skip


LONG = ("a huge text in a CSV", "a huge text file", "a bomb", "a table of nulls")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] if name in LONG else []) for name in WRITERS]
)
def test_what_is_made_to_hurt_does_not(name, tmp_path):
    file, write, bad, reason = WRITERS[name]
    path = tmp_path / file
    write(path)
    assert path.stat().st_size < 16 << 20
    store = tmp_path / "store"
    command = [sys.executable, "-c", WATCHED, tmp_path / "status", "chunk", store, path, "--json", "--workers", "1"]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    result = json.loads(process.stdout)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (tmp_path / "status").read_text())
    good = 0 if file in ("big.txt.zst", "bomb.jsonl.zst") else 1
    assert (process.returncode, result["documents"], result["rejected"]) == (3, good, bad)
    assert int(peak) < MOST_MEMORY_KB
    assert reason in result["reasons"][0]["reason"]
    assert len(quarantine(store)) == bad
    assert (verified(store).documents, api.info(store).rejected) == (good, bad)


def test_zeros_inside_a_text_are_part_of_it(tmp_path, byte_level_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "z", "text": "a\\u0000b \\u0000"}\n')
    api.chunk(tmp_path / "store", [str(path)], tokenizer=str(byte_level_tokenizer))

    assert retrotool.open(tmp_path / "store").chunk(0).text == "a\0b \0"
