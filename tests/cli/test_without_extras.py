"""Without the packages of the extras ``cloud`` and ``ray``, what needs none of them works, and nothing imports them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import make_rows, write_jsonl

PROGRAM = """
import sys
missing = ("obstore", "boto3", "botocore", "google.auth", "azure.storage.blob", "ray")
sys.modules.update(dict.fromkeys(missing))
from typer.testing import CliRunner
from retrotool import api
from retrotool.app import app
store, source, encoder, out = sys.argv[1:]
for line in (
    f"chunk {store} {source} --tokenizer {encoder} --workers 1",
    f"purge {store} --document doc-1 --reason r --erase --yes",
    f"receipt {store} last --out {out}",
    f"verify {store}",
    "plan --tokens 1B --bucket",
):
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, (line, done.output)
done = CliRunner().invoke(app, f"verify {store} --engine ray".split())
assert api.plan("1B", bucket=True).stages[0].puts
assert done.exit_code == 2 and "pip install ray" in done.stderr, done.stderr
assert not any(sys.modules[name] for name in missing)
"""


def test_stores_on_a_disk_need_none_of_its_packages(tmp_path: Path, tiny_encoder: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(6))
    arguments = [str(tmp_path / "store"), str(source), str(tiny_encoder), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
