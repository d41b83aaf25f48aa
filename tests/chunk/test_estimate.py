"""``chunk --dry-run`` and standard input."""

from __future__ import annotations

import gzip
import json
import os
import signal

import pytest
from chunk_helpers import run_chunk, verified, write_rows
from conftest import make_rows

from retrotool import api, engine

ROWS = make_rows(1000, words=80)
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
    rows = [{"id": f"{i}", "text": ROWS[i % 1000]["text"] * 20} for i in range(1500)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *BAD])
    arguments = [path, "--tokenizer", byte_level_tokenizer, "--json", "--duplicates", "keep"]
    said = json.loads(run_chunk(tmp_path / "store", *arguments, "--dry-run").stdout)
    assert said["sampled_bytes"] < 0.3 * path.stat().st_size
    came = json.loads(run_chunk(tmp_path / "store", *arguments).stdout)
    assert said["tokens"] == pytest.approx(came["tokens"], rel=0.25)


def test_an_estimate_from_all_rows_counts_repeats_as_the_run_does(tmp_path, byte_level_tokenizer):
    other = [{**ROWS[7], "id": "copy"}, {**ROWS[8], "text": "another text"}, {**ROWS[9], "id": 1000}]
    paths = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((ROWS[:50], [*other, *BAD]))]
    arguments = [*paths, "--tokenizer", byte_level_tokenizer, "--json"]
    for duplicates, expected in (("skip", 50), ("keep", 53)):
        given = [*arguments, "--duplicates", duplicates]
        said = json.loads(run_chunk(tmp_path / duplicates, *given, "--dry-run").stdout)
        came = json.loads(run_chunk(tmp_path / duplicates, *given).stdout)
        counts = ("documents", "tokens", "chunks", "parts", "rejected")
        assert [said[name] for name in counts] == [came[name] for name in counts]
        assert said["documents"] == expected


def test_inputs_that_the_store_has_are_not_estimated(tmp_path, byte_level_tokenizer):
    paths = [write_rows(tmp_path / f"{i}.jsonl", ROWS[100 * i : 100 * i + 100]) for i in range(2)]
    run_chunk(tmp_path / "store", paths[0], "--tokenizer", byte_level_tokenizer)
    before = verified(tmp_path / "store")
    said = json.loads(run_chunk(tmp_path / "store", *paths, "--dry-run", "--json").stdout)
    assert (said["known_inputs"], said["inputs"], said["documents"]) == (1, 1, 100)
    assert verified(tmp_path / "store") == before


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_is_an_input_like_a_file(tmp_path, byte_level_tokenizer, cli, pack):
    data = pack(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:50]))
    arguments = ["chunk", tmp_path / "store", "-", "--json", "--tokenizer", byte_level_tokenizer, "--workers", "1"]
    result = cli(*arguments, data=data)
    assert json.loads(result.stdout)["documents"] == 50
    run_chunk(tmp_path / "file", write_rows(tmp_path / "f.jsonl", ROWS[:50]), "--tokenizer", byte_level_tokenizer)
    assert verified(tmp_path / "store").content == verified(tmp_path / "file").content
    again = cli(*arguments, data=data)
    assert json.loads(again.stdout)["known_inputs"] == 1


def test_standard_input_of_a_killed_run_is_rejected_and_can_be_piped_again(tmp_path, byte_level_tokenizer, cli):
    data = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:50])

    def kill_it_at_work() -> None:
        engine.execute = lambda *given, **options: os.kill(os.getpid(), signal.SIGKILL)

    arguments = ["chunk", tmp_path / "store", "-", "--json"]
    killed = cli(*arguments, "--tokenizer", byte_level_tokenizer, data=data, preexec_fn=kill_it_at_work)
    assert killed.returncode == -signal.SIGKILL
    other = write_rows(tmp_path / "other.jsonl", ROWS[50:60])
    result = api.chunk(tmp_path / "store", [str(other)])
    assert (result.documents, result.rejected) == (10, 1)
    (reason,) = result.reasons
    assert reason.reason == "given up: standard input can't be read twice: pipe it again"
    again = cli(*arguments, data=data)
    assert json.loads(again.stdout)["documents"] == 50


def test_several_workers_read_standard_input(tmp_path, byte_level_tokenizer, cli):
    rows = [{"id": str(n), "text": f"{n} " + "words " * 300} for n in range(3000)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    options = ["--json", "--part-size", "500", "--tokenizer", byte_level_tokenizer, "--workers", "2"]
    result = cli("chunk", tmp_path / "store", "-", *options, data=data)
    assert json.loads(result.stdout)["documents"] == 3000


def test_empty_standard_input_is_an_error(tmp_path, byte_level_tokenizer, cli):
    result = cli("chunk", tmp_path / "store", "-", "--tokenizer", byte_level_tokenizer)
    assert result.returncode == 2
    assert "standard input is empty" in result.stderr
