"""One story through all commands, in a folder and in memory: each step says and leaves the same, digest by digest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_jsonl
from memory_storage import memory_server
from plain_store import PlainStore
from stored import copy_store
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.store.storage import SCHEMES

ARTICLE = "id = 'doc-3' or id = 'doc-17'"
STORY = [
    "chunk STORE FIRST --tokenizer ENCODER --part-size 60 --keep year --workers 2",
    "embed STORE --encoder ENCODER",
    "index STORE --nlist 8 --sample 50",
    "neighbours STORE --saved 6 --materialise",
    "search STORE SECRET",
    "chunk STORE SECOND --workers 1",
    "embed STORE --encoder ENCODER",
    "index STORE --sample 50",
    "neighbours STORE --saved 6 --materialise",
    "export STORE OUT",
    "purge STORE --where ARTICLE --reason one --yes",
    "undo STORE PURGE --reason mistake",
    "purge STORE --where ARTICLE --reason again --erase --yes",
    "receipt STORE PURGE --out HERE",
    "search STORE SECRET",
    "neighbours STORE --saved 6 --materialise",
    "inspect STORE --random 2 --seed 1",
    "verify STORE --log",
    "verify STORE",
]
RANDOM = re.compile(r"\b(p[0-9a-f]{8}|[0-9a-f]{8,64})\b|\d+(\.\d+)? ?(s|ms|chunks/s|MB/s|queries/s)\b")
"""Names that are drawn, hashes of them, and times."""


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with memory_server(tmp_path_factory.mktemp("memory")):
        yield


def tell(store: Path | str, out: Path, words: dict[str, str]) -> list[dict[str, Any]]:
    """Run the story; for each step what is printed, and what ``verify`` says of the store."""
    out.mkdir()
    words = {**words, "STORE": str(store), "OUT": str(out / "exported"), "HERE": str(out)}
    steps = []
    for line in STORY:
        purges = api.info(store).purges if "PURGE" in line else ()
        known = words | {"PURGE": list(purges)[-1] if purges else ""}
        done = CliRunner().invoke(app, [known.get(word, word) for word in line.split()])
        assert done.exit_code == 0, f"{line}: {done.output}"
        printed = RANDOM.sub("…", done.stdout.replace(str(store), "STORE").replace(str(out), "HERE"))
        steps.append({"step": line, "printed": printed.split(), **asdict(api.verify(store))})
        if line.startswith("index"):  # its recall comes with times, here and in a file
            del steps[-1]["printed"]
        del steps[-1]["bytes"]
    return steps


def test_each_step_leaves_the_same_in_memory_and_on_a_disk(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SCHEMES, "", raising=False)
    rows = make_rows(60)
    first, second = write_jsonl(tmp_path / "first.jsonl", rows[:40]), write_jsonl(tmp_path / "second.jsonl", rows[40:])
    words = {"FIRST": str(first), "SECOND": str(second), "ENCODER": str(tiny_encoder), "ARTICLE": ARTICLE}
    words["SECRET"] = rows[3]["text"]
    on_disk, in_memory = tmp_path / "store", f"memory://{tmp_path}"
    before, after = tell(on_disk, tmp_path / "one", words), tell(in_memory, tmp_path / "two", words)
    for one, other in zip(before, after, strict=True):
        assert one == other
    assert (
        before[-1]["ok"]
        and PlainStore(copy_store(in_memory, tmp_path / "copy")).content() == PlainStore(on_disk).content()
    )
