"""Fields that were asked for and are not there are reported of."""

from __future__ import annotations

import json

import pytest
from chunk_helpers import run_chunk, write_rows

from retrotool.chunk.quarantine import EXCERPTS

ROWS = [{"id": str(i), "text": f"text {i}", "year": 2000 + i} for i in range(3)]


@pytest.fixture
def store(tmp_path, byte_level_tokenizer):
    write_rows(tmp_path / "first.jsonl", [{"id": "first", "text": "what was there before"}])
    run_chunk(tmp_path / "store", tmp_path / "first.jsonl", "--tokenizer", byte_level_tokenizer)
    return tmp_path / "store"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "lines.json"])
def test_a_wrong_text_field_names_those_that_rows_have(name, store, tmp_path):
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps([{"body": "good"}, *ROWS], indent=2))
    else:
        write_rows(path, [{"body": "good"}, *ROWS])
    result = run_chunk(store, path, "--text-field", "body")
    assert (result.exit_code, "3  no field 'body': id, text, year" in result.stdout) == (3, True)


def test_rows_that_break_off_are_no_trouble(store, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS)[:-10])
    result = run_chunk(store, path, "--text-field", "body", "--max-bad", "10")
    assert (result.exit_code, "has 'body'. It has: id, text, year" in result.stderr) == (2, True)


def test_of_many_fields_the_first_are_named(store, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{f"field {i}": i for i in range(20)}])
    assert "has 'text'. It has: field 0, field 1, " in (stderr := run_chunk(store, path).stderr)
    assert "field 11, ..." in stderr


def test_fields_to_keep_that_no_row_has_are_reported_of(store, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"id": "undated", "text": "text of no year"}])
    again = write_rows(tmp_path / "again.jsonl", [{"id": "dated", "text": "text of a year", "year": 1999}])
    empty = "--keep yaer: none of the rows at the beginning of the inputs has this field.\n"
    following = f"Next: retrotool embed {store}\n"
    assert run_chunk(store, path, "--keep", "year", "--keep", "yaer").stderr == empty + following
    assert run_chunk(store, again, "--keep", "year").stderr == following


def test_fields_to_keep_of_inputs_that_the_store_has_are_reported_of(store, tmp_path):
    first = tmp_path / "first.jsonl"
    result = run_chunk(store, first, "--keep", "year")
    assert result.stdout == "1 input skipped: already in the store.\n"
    assert result.stderr.endswith(
        "\n--keep year: 1 input already in the store without it, and not read again. A new store would have it.\n"
    )
    kept = write_rows(tmp_path / "kept.jsonl", ROWS)
    for said in (f"Next: retrotool embed {store}\n", ""):
        assert run_chunk(store, kept, "--keep", "year").stderr == said, "the tutorial does it twice"


def test_a_reason_whose_rows_keep_no_excerpt_ends_without_one(store, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("1\n" * EXCERPTS + '{"id": "a"}\n{"text": "b"}\n')
    assert "1  no field 'text' " in run_chunk(store, path).stdout
