"""One story through all commands: each step says and leaves the same on every storage, digest by digest.

azurite, a server of Azure's blobs, takes part if RETROTOOL_AZURITE names its ``azurite-blob``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import buckets
import pytest
from conftest import make_rows, write_jsonl
from memory_storage import memory_server
from plain_store import PlainStore
from stored import copy_store
from typer.testing import CliRunner

import retrotool
from retrotool import api
from retrotool.app import app
from retrotool.store.storage import SCHEMES

pytestmark = [pytest.mark.sends_requests, pytest.mark.on_disk]  # it names the storages that it compares

ARTICLE = "id = 'doc-3' or id = 'doc-17'"
STORY = [
    "chunk STORE FIRST --tokenizer ENCODER --part-size 120 --keep year --workers 2",
    "embed STORE --encoder ENCODER",
    "index STORE --nlist 8 --sample 50",
    "neighbours STORE --saved 6 --materialise",
    "search STORE SECRET",
    "chunk STORE SECOND --workers 1",
    "chunk STORE CHANGED --existing replace --workers 1",
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
READING = ("search", "export", "receipt", "inspect", "verify STORE --log")
"""Steps that only read: what ``verify`` says after the next one is also about them."""
RANDOM = re.compile(r"\b(p[0-9a-f]{8}|[0-9a-f]{8,64})\b|\d+(\.\d+)? ?(s|ms|chunks/s|MB/s|queries/s|kB|MB)\b")
"""Names that are drawn, hashes of them, times, and sizes of files with such names."""
UNKNOWN = re.compile(
    r"^not checked: .* the server can't say \(501\)\.\n?| Copies that its bucket may have were not checked\."
    r"|^OK\. (?=Nothing of it)",
    re.MULTILINE | re.IGNORECASE,
)
"""What is said of LocalBucket, which can't say what it keeps of deleted files."""


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with memory_server(tmp_path_factory.mktemp("memory")):
        yield


def tell(store: Path | str, out: Path, words: dict[str, str]) -> list[dict[str, Any]]:
    """Run the story; for each step what is printed, and for those that may write what ``verify`` says of the store."""
    out.mkdir()
    words = {**words, "STORE": str(store), "OUT": str(out / "exported"), "HERE": str(out)}
    steps: list[dict[str, Any]] = []
    for line in STORY:
        purges = api.info(store).purges if "PURGE" in line else ()
        known = words | {"PURGE": list(purges)[-1] if purges else ""}
        done = CliRunner().invoke(app, [known.get(word, word) for word in line.split()])
        assert done.exit_code == 0, f"{line}: {done.output}"
        printed = RANDOM.sub("…", done.stdout.replace(str(store), "STORE").replace(str(out), "HERE"))
        verified = {} if line.startswith(READING) else asdict(api.verify(store))
        steps.append({"step": line, "printed": UNKNOWN.sub("", printed).split(), **verified})
        if line.startswith("index"):  # its recall comes with times, here and in a file
            del steps[-1]["printed"]
        steps[-1].pop("bytes", None)
    batches = list(retrotool.RetroDataset(str(store), sequence_length=64 * 4, batch_size=2))
    assert len(batches) > 3
    epoch = [{name: value.tolist() for name, value in batch.items()} for batch in batches]
    return [*steps, {"step": "an epoch", "batches": epoch}]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, str]:
    rows, root = make_rows(60), tmp_path_factory.mktemp("inputs")
    first, second = write_jsonl(root / "first.jsonl", rows[:40]), write_jsonl(root / "second.jsonl", rows[40:])
    words = {"FIRST": str(first), "SECOND": str(second), "ENCODER": str(tiny_encoder), "ARTICLE": ARTICLE}
    changed = write_jsonl(root / "changed.jsonl", [{**row, "text": f"{row['text']} corrected"} for row in rows[5:7]])
    return words | {"SECRET": rows[3]["text"], "CHANGED": str(changed)}


@pytest.fixture(scope="module")
def on_disk(words: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The store of the story in a folder, and what its steps say."""
    root = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(SCHEMES, "", raising=False)
        return root / "store", tell(root / "store", root / "out", words)


@pytest.fixture(
    params=["localbucket", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("memory", "moto", "azurite"))]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://{tmp_path}"
    elif request.param == "azurite":
        if (program := os.environ.get("RETROTOOL_AZURITE")) is None:
            pytest.skip("RETROTOOL_AZURITE does not name a program")
        pytest.importorskip("azure.storage.blob")  # else a receipt says that the container was not checked
        with buckets.azurite(program):
            yield f"az://{buckets.BUCKET}/a/store"
    else:
        server = buckets.moto() if request.param == "moto" else buckets.local_bucket(tmp_path / "root")
        with server as address, buckets.settings_of(address):
            yield f"s3://{buckets.BUCKET}/a/store"


def test_each_step_leaves_the_same_as_on_a_disk(
    place: str, words: dict[str, str], on_disk: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    before, after = on_disk[1], tell(place, tmp_path / "out", words)
    for one, other in zip(before, after, strict=True):
        assert one == other
    assert (
        before[-2]["ok"]
        and PlainStore(copy_store(place, tmp_path / "copy")).content() == PlainStore(on_disk[0]).content()
    )
