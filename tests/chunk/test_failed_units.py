"""A unit that can't be done is rejected, whatever the reason; what comes after it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chunk_helpers import documents, quarantine, run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api, sources
from retrotool.chunk import chunk_plan


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three inputs, each a unit."""
    paths = [write_rows(tmp_path / f"{i}.jsonl", make_rows(5, first=10 * i)) for i in range(3)]
    monkeypatch.setattr(chunk_plan, "_LEAST_UNIT_BYTES", max(path.stat().st_size for path in paths))
    return paths


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Reading the second input raises."""
    read = sources.read_input

    def wrong(file, *arguments):
        rows = read(file, *arguments)
        yield next(rows)
        if file.path.endswith("1.jsonl"):
            raise error
        yield from rows

    monkeypatch.setattr(sources, "read_input", wrong)


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize("error", [ZeroDivisionError("what?"), Panic("index out of bounds")])
def test_an_unforeseen_error_sets_its_inputs_aside_and_the_others_are_chunked(inputs, tmp_path, monkeypatch, error):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        failing(patch, error)
        result = run_chunk(store, *inputs)
        assert result.exit_code == 3
        assert "The rest of 1 damaged input was not read" in result.stdout
        ((path, line, reason),) = quarantine(store)
        assert (path, line) == (str(inputs[1]), 0)
        assert str(error) in reason
        assert {row["id"] for row in documents(store)} == {f"doc-{10 * i + j}" for i in (0, 2) for j in range(5)}
    # Nothing is wrong with it any more: the same command reads it, though it has not changed.
    result = run_chunk(store, *inputs)
    assert result.exit_code == 0, result.output
    assert verified(store).documents == 15


def test_errors_of_the_system_are_no_reason_to_give_an_input_up(inputs, tmp_path, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        failing(patch, OSError(5, "Input/output error"))
        assert run_chunk(store, *inputs).exit_code == 1
        assert quarantine(store) == []
    assert run_chunk(store, *inputs).exit_code == 0
    assert verified(store).documents == 15


KILLER = """
import os, signal, sys
from retrotool import sources
read = sources.read_input
def wrong(file, *arguments):
    if file.path.endswith("1.jsonl"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file, *arguments)
sources.read_input = wrong
"""


@pytest.mark.spawned
def test_an_input_that_kills_its_worker_each_time_is_set_aside(inputs, tmp_path, monkeypatch):
    """As a library that aborts does, or an input that takes all memory."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    store = tmp_path / "store"
    result = api.chunk(store, list(map(str, inputs)), workers=2)
    assert result.damaged == 1
    ((path, _, reason),) = quarantine(store)
    assert path == str(inputs[1])
    assert "its worker was killed each time" in reason
    assert verified(store).documents == 10


@pytest.mark.parametrize("order", [1, -1])
def test_text_and_pairs_may_be_mixed_in_one_run(order, tmp_path):
    rows = [{"id": str(i), "question": f"why {i}?", "answer": "so " * 90} for i in range(3)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "notes.txt").write_text("some notes")
    (tmp_path / "more.txt").write_text("more notes")
    inputs = [tmp_path / "notes.txt", pairs, tmp_path / "more.txt"][::order]
    store = tmp_path / "store"
    result = run_chunk(store, *inputs, "--key-field", "question", "--value-field", "answer")
    assert result.exit_code == 0, result.output
    found = verified(store)
    assert found.documents == 5
    assert api.info(store).keys == 5
