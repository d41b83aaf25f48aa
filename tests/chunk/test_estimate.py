"""``chunk --dry-run`` and standard input."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chunk_helpers import run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api

ROWS = make_rows(2000, words=80)
BAD = [b"{"] * 100


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_dry_run_tells_what_will_come_and_changes_nothing(tmp_path, byte_level_tokenizer, name):
    path = write_rows(tmp_path / name, ROWS)
    arguments = [path, "--tokenizer", byte_level_tokenizer, "--json"]
    said = json.loads(run_chunk(tmp_path / "store", *arguments, "--dry-run").stdout)
    assert not (tmp_path / "store").exists()
    came = json.loads(run_chunk(tmp_path / "store", *arguments).stdout)
    for count in ("documents", "tokens", "chunks", "parts"):
        assert said[count] == pytest.approx(came[count], rel=0.1), count
    sizes = api.info(tmp_path / "store").bytes
    assert said["bytes"] == pytest.approx(sizes["chunks"] + sizes["documents"], rel=0.4)


def test_of_a_large_input_a_sample_is_enough(tmp_path, byte_level_tokenizer):
    rows = [{"id": f"{i}", "text": ROWS[i % 2000]["text"] * 20} for i in range(3000)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *BAD])
    arguments = [path, "--tokenizer", byte_level_tokenizer, "--json", "--duplicates", "keep"]
    said = json.loads(run_chunk(tmp_path / "store", *arguments, "--dry-run").stdout)
    assert said["sampled_bytes"] < 0.3 * path.stat().st_size
    came = json.loads(run_chunk(tmp_path / "store", *arguments).stdout)
    assert said["tokens"] == pytest.approx(came["tokens"], rel=0.25)


def test_inputs_that_the_store_has_are_not_estimated(tmp_path, byte_level_tokenizer):
    paths = [write_rows(tmp_path / f"{i}.jsonl", ROWS[100 * i : 100 * i + 100]) for i in range(2)]
    run_chunk(tmp_path / "store", paths[0], "--tokenizer", byte_level_tokenizer)
    before = verified(tmp_path / "store")
    said = json.loads(run_chunk(tmp_path / "store", *paths, "--dry-run", "--json").stdout)
    assert (said["known_inputs"], said["inputs"], said["documents"]) == (1, 1, 100)
    assert verified(tmp_path / "store") == before


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_is_an_input_like_a_file(tmp_path, byte_level_tokenizer, pack):
    data = pack(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:50]))
    command = [sys.executable, "-m", "retrotool", "chunk", str(tmp_path / "store"), "-", "--json"]
    arguments = [*command, "--tokenizer", str(byte_level_tokenizer), "--workers", "1"]
    result = subprocess.run(arguments, input=data, capture_output=True, check=True)
    assert json.loads(result.stdout)["documents"] == 50
    run_chunk(tmp_path / "file", write_rows(tmp_path / "f.jsonl", ROWS[:50]), "--tokenizer", byte_level_tokenizer)
    assert verified(tmp_path / "store").content == verified(tmp_path / "file").content
    again = subprocess.run(arguments, input=data, capture_output=True, check=True)
    assert json.loads(again.stdout)["known_inputs"] == 1


KILLED = """
import os, signal, sys
from retrotool import api, engine
engine.execute = lambda *given, **options: os.kill(os.getpid(), signal.SIGKILL)
api.chunk(sys.argv[1], ["-"], tokenizer=sys.argv[2])
"""


def test_standard_input_of_a_killed_run_is_rejected_and_can_be_piped_again(tmp_path, byte_level_tokenizer):
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:50])
    arguments = [str(tmp_path / "store"), str(byte_level_tokenizer)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], input=data, check=False)
    assert killed.returncode == -signal.SIGKILL
    other = write_rows(tmp_path / "other.jsonl", ROWS[50:60])
    result = api.chunk(tmp_path / "store", [str(other)])
    assert (result.documents, result.set_aside) == (10, 1)
    (reason,) = result.reasons
    assert reason.reason == "given up: standard input can't be read twice: pipe it again"
    command = [sys.executable, "-m", "retrotool", "chunk", str(tmp_path / "store"), "-", "--json"]
    again = subprocess.run(command, input=data, capture_output=True, check=True)
    assert json.loads(again.stdout)["documents"] == 50


def test_several_workers_read_standard_input(tmp_path, byte_level_tokenizer):
    rows = [{"id": str(n), "text": f"{n} " + "words " * 300} for n in range(3000)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    command = [sys.executable, "-m", "retrotool", "chunk", str(tmp_path / "store"), "-", "--json", "--part-size", "500"]
    options = ["--tokenizer", str(byte_level_tokenizer), "--workers", "2"]
    result = subprocess.run([*command, *options], input=data, capture_output=True, check=True)
    assert json.loads(result.stdout)["documents"] == 3000


def test_empty_standard_input_is_an_error(tmp_path: Path, byte_level_tokenizer: Path):
    command = [sys.executable, "-m", "retrotool", "chunk", str(tmp_path / "store"), "-"]
    result = subprocess.run(
        [*command, "--tokenizer", str(byte_level_tokenizer)], input=b"", capture_output=True, check=False
    )
    assert result.returncode == 2
    assert b"standard input is empty" in result.stderr
