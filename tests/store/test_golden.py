"""A small store that was made before, by ``make_golden``: what this version reads of it is what was written.

Until the format is frozen the store may be made again, with a line in CHANGELOG.md that says why:

    RETROTOOL_UPDATE_SNAPSHOTS=1 python -m pytest tests/store/test_golden.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import plain_store
import pytest
import snapshots
from conftest import make_rows, write_jsonl
from stored import folder_of, take_in

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.chunk import run as chunk_run
from retrotool.index.run import Options
from retrotool.sources import Fields
from retrotool.store.identity import FORMAT

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised")
COUNTS = ("documents", "chunks", "tokens", "files")


class Stopped(Exception):
    pass


def make_golden(store: Path, inputs: Path, encoder: Path) -> None:
    """A store with something of everything: purges, one erased and one undone, a chunk that was interrupted."""
    rows = make_rows(12, words=40)
    first = write_jsonl(inputs / "first.jsonl", [*rows, rows[3], {"id": "bad", "text": 5}])
    pairs = [{"id": f"pair-{i}", "question": f"What is {i}?", "answer": f"It is {i}. " * 9} for i in range(3)]
    api.chunk(store, [str(first)], tokenizer=str(encoder), part_size=20, chunk_length=16)
    pairs_file = write_jsonl(inputs / "pairs.jsonl", pairs)
    api.chunk(store, [str(pairs_file)], fields=Fields(key="question", value="answer"))
    api.embed(store, encoder=str(encoder), devices="cpu")
    api.index(store)
    api.index(store, name="lists", options=Options(IndexOptions(nlist=2, code="sq8")))
    api.neighbours(store, saved=4, materialise=True)
    purges = [
        api.purge(store, api.Selectors(where=f"id = 'doc-{i}'"), reason="golden", erase=i == 4).purge for i in (4, 5, 6)
    ]
    api.undo(store, purges[1], reason="golden")
    last = write_jsonl(inputs / "last.jsonl", make_rows(3, first=20, words=40))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(chunk_run, "finish_plans", _stop)
        api.chunk(store, [str(last)])


def _stop(*_: object, **__: object) -> None:
    raise Stopped


def plain(store: Path) -> Any:
    """What a reader that knows nothing of retrotool makes of a store."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(json.dumps(plain_store.PlainStore(folder_of(store, Path(folder))).content()))


def described(store: Path) -> dict[str, Any]:
    """What readers see of a store."""
    found = api.verify(store)
    assert found.problems == []
    reader, info = retrotool.open(store), api.info(store)
    texts = {int(i): reader.chunk(int(i)).text for part in reader.parts() for i in reader.chunk_ids(part)}
    near = {
        i: [[one.id, round(one.distance, 4)] for one in reader.neighbours(i)]
        for i in texts
        if reader.is_searchable([i])[0]
    }
    purges = {purge: [record["erased"], "undone" in record] for purge, record in info.purges.items()}
    return json.loads(
        json.dumps({
            "format": FORMAT, **{name: getattr(found, name) for name in (*DIGESTS, *COUNTS)}, "texts": texts,
            "neighbours": near, "purges": purges, "commit": info.commit, "unfinished": info.unfinished,
            "pending": [part["part"] for part in info.parts if part["pending"]], "plain": plain(store),
        })
    )  # fmt: skip


@pytest.fixture
def golden(tmp_path: Path, tiny_encoder: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the golden store, and what is to be read of it."""
    if snapshots.UPDATE:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        place = Path(tempfile.gettempdir()) / "golden"  # the log names it
        place.mkdir()
        try:
            make_golden(place / "store", place, Path(shutil.copytree(tiny_encoder, place / "tiny")))
            shutil.copytree(place / "store", GOLDEN / "store")
        finally:
            shutil.rmtree(place)
        (GOLDEN / "golden.json").write_text(json.dumps(described(GOLDEN / "store"), indent=1) + "\n")
    return take_in(GOLDEN / "store", tmp_path / "store"), json.loads((GOLDEN / "golden.json").read_text())


def test_what_is_read_is_what_was_written(golden: tuple[Path, dict[str, Any]]) -> None:
    store, due = golden
    assert described(store) == due


def test_others_read_the_same(golden: tuple[Path, dict[str, Any]]) -> None:
    store, due = golden
    assert plain(store) == due["plain"]


def test_this_version_goes_on_with_it(golden: tuple[Path, dict[str, Any]]) -> None:
    store, due = golden
    assert due["unfinished"] == 1
    assert due["pending"]
    api.chunk(store, [])
    assert api.info(store).documents == due["documents"] + 3
    assert api.purge(store, api.Selectors(where="id = 'doc-7'"), reason="test", erase=True).chunks > 0
    found = api.verify(store)
    assert found.problems == []
    assert found.documents == due["documents"] + 2
