"""Several processes at one index: whatever they meet, each chunk is in one shard, and the next command finishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from forked import Forked
from stored import copy_store

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.index import run as index_run
from retrotool.index.run import Options
from retrotool.index.searching import Database
from retrotool.store.store import Store

LISTS = ("--name", "lists", "--nlist", 4, "--code", "sq8", "--shard-size", 12)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Many small parts, embedded; "lists" is an index of the first half in several shards."""
    root = tmp_path_factory.mktemp("rivals")
    store = root / "store"
    for name, first in (("one", 0), ("two", 200)):
        rows = make_rows(60, first=first, words=60)
        api.chunk(store, [str(write_jsonl(root / f"{name}.jsonl", rows))], tokenizer=str(tiny_encoder), part_size=8)
        api.embed(store, encoder=str(tiny_encoder), devices="cpu")
        if name == "one":
            api.index(store, name="lists", options=Options(IndexOptions(nlist=4, code="sq8", shard_rows=12)))
    return store


def at_once(store: Path, *calls: tuple[object, ...]) -> list[tuple[int, str]]:
    """Exit status and stderr of ``retrotool`` processes that run at the same time."""
    started = [Forked([str(call[0]), str(store), *map(str, call[1:])]) for call in calls]
    printed = [process.communicate()[1] for process in started]
    return [(process.returncode or 0, err) for process, err in zip(started, printed, strict=True)]


def check(store: Path, name: str) -> None:
    """All live keys with embeddings are in the shards of the index, each once, and the store is whole."""
    assert api.verify(store).problems == []
    opened = Store.open(store)
    found = [shard.ids(number) for shard in Database(opened, name).shards for number in shard.numbers]
    ids = np.concatenate(found)
    assert len(np.unique(ids)) == len(ids) == api.info(store).chunks


@pytest.mark.parametrize(
    "calls",
    [
        [("index", *LISTS, "--shard", "0/2"), ("index", *LISTS, "--shard", "1/2")],
        [("index", "--name", "new", *LISTS[2:]), ("index", "--name", "new", *LISTS[2:])],
        [("index", *LISTS), ("index", "--name", "lists", "--drop")],
        [("index", "--name", "lists", "--retrain"), ("index", *LISTS)],
        [("index", *LISTS), ("purge", "--where", "id = 'doc-3' OR id = 'doc-210'", "--reason", "test", "--erase")],
        [("index", "--name", "lists", "--merge"), ("index", "--name", "lists", "--tune")],
    ],
    ids=["shards", "new", "drop", "retrain", "erase", "tune"],
)  # fmt: skip
def test_two_processes_at_one_index(embedded: Path, tmp_path: Path, calls: list[tuple[object, ...]]) -> None:
    store = copy_store(embedded, tmp_path / "store")
    for code, err in at_once(store, *calls):
        assert "Traceback" not in err
        # What was to be worked on was dropped, or trained again.
        assert code == 0 or (code in (2, 11) and err.startswith("error: ")), err
    assert api.verify(store).problems == []
    name = "new" if "new" in calls[0] else "lists"
    api.index(store, name=name, options=Options(IndexOptions(nlist=4, code="sq8", shard_rows=12)))
    check(store, name)


def test_several_worker_processes_make_what_one_makes(embedded: Path, tmp_path: Path) -> None:
    one, several = (copy_store(embedded, tmp_path / name) for name in ("one", "several"))
    for store, devices in ((one, "cpu"), (several, "cpu,cpu")):
        api.index(store, name="new", options=Options(IndexOptions(nlist=4, code="sq8", shard_rows=12), devices))
        check(store, "new")
    assert api.verify(one).indexes == api.verify(several).indexes


def test_an_erase_while_the_result_is_read_makes_it_read_again(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_store(embedded, tmp_path / "store")
    api.purge(store, api.Selectors(document="doc-3"), reason="test")
    read, seen = index_run.read_json_file, []

    def overtaken(*arguments: Any) -> Any:
        if not seen:
            api.erase(store, ["last"])
        seen.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(index_run, "read_json_file", overtaken)
    assert api.index(store, name="lists").vectors > 0
    assert len(seen) == 1, "the recall that was measured before is erased, too"
    assert [one.state for one in api.list_purges(store).purges] == ["erased"]
    assert api.verify(store).ok
