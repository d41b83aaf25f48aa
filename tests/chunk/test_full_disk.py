"""A full disk: one message, nothing lost, and the same command goes on once there is space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chunk_helpers import run_chunk, verified, write_rows
from conftest import make_rows

CHILD = Path(__file__).with_name("full_disk_child.py")


@pytest.mark.on_disk
@pytest.mark.parametrize("how", ["inject", "mount"])
def test_a_full_disk_stops_chunk_without_harm(how, tmp_path, byte_level_tokenizer):
    prefix = []
    if how == "mount":
        if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("a small file system can't be mounted without the rights of root")
        prefix = ["unshare", "--mount"]
    base, whole = tmp_path / "base", tmp_path / "whole"
    first = write_rows(tmp_path / "first.jsonl", make_rows(3))
    # No text repeats, so that there is nothing between what is committed and what stays.
    rows = [{**row, "text": f"{row['id']} {row['text']}"} for row in make_rows(1500 if how == "mount" else 12, first=3)]
    source = write_rows(tmp_path / "second.jsonl", [*rows, {"id": "empty", "text": ""}])
    run_chunk(base, first, "--tokenizer", byte_level_tokenizer)
    run_chunk(whole, first, source, "--tokenizer", byte_level_tokenizer)
    before, after = verified(base).content, verified(whole).content

    command = [*prefix, sys.executable, CHILD, how, base, source]
    path = os.pathsep.join([*filter(None, sys.path), str(CHILD.parent)])
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    if how == "mount" and not outcomes:
        pytest.skip("this machine does not let root mount a tmpfs")

    for outcome in outcomes:
        full, again = outcome["full"], outcome["after"]
        assert (full["problems"], full["exit_code"], full["stdout"]) == ([], 1, ""), outcome
        assert full["stderr"].startswith("error: "), outcome
        assert "no space left; earlier commits are unchanged\n" in full["stderr"], outcome
        assert full["content"] in (before, after), outcome
        assert (again["problems"], again["content"]) == ([], after), outcome
        assert again["exit_code"] in (0, 3), outcome
    assert len(outcomes) == 1 or len(outcomes) > 20
