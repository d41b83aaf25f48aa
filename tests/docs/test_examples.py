"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pages import ROOT

import retrotool
from retrotool import commands

SCRIPT = ROOT / "examples" / "read_store.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_read_store_prints_a_chunk_and_its_neighbours(built_store: Path) -> None:
    done = run(built_store)
    assert done.returncode == 0, done.stderr
    reader = retrotool.open(built_store)
    first = int(reader.chunk_ids(reader.parts()[0])[0])
    assert f"chunk {first} of document {reader.chunk(first).document}" in done.stdout
    for neighbour in reader.neighbours(first):
        assert f"neighbour {neighbour.id} of document {neighbour.chunk.document}" in done.stdout
    assert done.stdout.count("\ncontinuation") == len(reader.neighbours(first)) == 2


def test_read_store_leaves_out_what_is_purged(store_copy: Path, tmp_path: Path) -> None:
    reader = retrotool.open(store_copy)
    first = int(reader.chunk_ids(reader.parts()[0])[0])
    victim = reader.neighbours(first)[0].chunk.document
    takedown = tmp_path / "takedown.txt"
    takedown.write_text(f"{victim}\n{reader.chunk(first).document}\n")
    commands.purge(store_copy, commands.Selectors(documents=str(takedown)), reason="test")
    done = run(store_copy)
    assert done.returncode == 0, done.stderr
    assert f"document {victim}," not in done.stdout
    assert f"chunk {first} of" not in done.stdout


def test_read_store_says_what_is_wrong(tmp_path: Path) -> None:
    assert run().returncode == 1
    missing = run(tmp_path / "nothing")
    assert missing.returncode == 10
    assert "is no store" in missing.stderr
    assert "Traceback" not in missing.stderr
