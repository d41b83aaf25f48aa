"""Index files that were not written whole, or broke later: never committed in silence, and named when they are read."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import make_rows, write_jsonl

import retrotool
from retrotool import api
from retrotool.ann import lists
from retrotool.ann.choice import IndexWishes
from retrotool.ann.codes import Whole
from retrotool.ann.trained import Trained, to_faiss
from retrotool.errors import CorruptError, StorageError
from retrotool.index.index_files import write_index
from retrotool.index.run import Options
from retrotool.store.paths import FileName

VECTORS = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float16)
IDS = (np.int64(3) << 32) + np.arange(500)


def make_index(nlist: int, shift: int = 0, first: int = 0) -> object:
    trained = Trained(16, Whole(16), VECTORS[:nlist].astype(np.float32) if nlist else None, nlist=nlist)
    index = to_faiss(trained)
    codes = VECTORS.view(np.uint8)[first:]
    lists.fill(index, np.arange(first, 500) % max(nlist, 1), IDS[first:] + shift, codes)
    return index


@pytest.fixture
def embedded(built_store: Path, tmp_path: Path, corpus: Path, tiny_encoder: Path) -> Path:
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(tiny_encoder))
    api.embed(tmp_path / "store", encoder=str(tiny_encoder))
    return tmp_path / "store"


@pytest.mark.parametrize("nlist", [0, 8])
def test_what_is_written_is_what_faiss_writes(tmp_path: Path, nlist: int) -> None:
    index = make_index(nlist)
    assert lists.write_lists(index, tmp_path / "ours") == 500
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    lists.check_written(index, tmp_path / "ours")


@pytest.mark.parametrize("nlist", [0, 8])
@pytest.mark.parametrize("damage", ["cut by one", "cut in half", "empty", "a bit in the middle", "other ids", "fewer"])
def test_a_file_that_is_not_what_was_meant_does_not_pass(tmp_path: Path, nlist: int, damage: str) -> None:
    """As after a full disk, of which faiss says nothing, or on a failing one."""
    index, written = make_index(nlist), make_index(nlist)
    if damage == "other ids":
        written = make_index(nlist, shift=1)
    elif damage == "fewer":
        written = make_index(nlist, first=1)

    def spoil(_: object, path: Path) -> int:
        faiss.write_index(written, str(path))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1 if damage.startswith("a bit") else 0
        size = {"cut by one": len(data) - 1, "cut in half": len(data) // 2, "empty": 0}.get(damage, len(data))
        path.write_bytes(data[:size])
        return 500

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match="not what was written") as error:
        patch.setattr(lists, "write_lists", spoil)
        write_index(tmp_path, index, FileName.new("0" * 8, "index", "shard-0000", "faiss", "main"), {"parts": [3]})
    assert "disk" in error.value.advice
    assert not list((tmp_path / "index" / "main").iterdir())


def test_a_disk_that_is_full_is_told_and_the_command_goes_on_when_it_is_not(embedded: Path) -> None:
    probe = Path(shutil.copytree(embedded, embedded.with_name("probe")))
    api.index(probe)
    size = (probe / api.info(probe).indexes["main"]["shards"][0]).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 50, limits[1]))
    try:
        with pytest.raises(StorageError):
            api.index(embedded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert api.info(embedded).indexes["main"]["shards"] == []
    assert api.index(embedded).recall_at_10 == 1.0
    assert api.verify(embedded).problems == []


def test_a_training_that_was_damaged_is_named_and_nothing_is_indexed_by_it(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    api.index(store_copy, name="ivf", options=Options(IndexWishes(nlist=8, code="float16")))
    api.chunk(store_copy, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(5, first=500)))])
    api.embed(store_copy, encoder=str(tiny_encoder))
    for name, places in (("main", (0, -20)), ("ivf", (0, 200, -20))):
        path = store_copy / api.info(store_copy).indexes[name]["trained"]
        whole = path.read_bytes()
        for place in places:
            data = bytearray(whole)
            data[place] ^= 0xFF
            path.write_bytes(data)
            for target in (0.95, 0.5):  # a new shard; after it, only the recall
                with pytest.raises(CorruptError, match=path.name) as error:
                    api.index(store_copy, name=name, target_recall=target)
                assert error.value.exit_code == 12
        path.write_bytes(whole)
        api.index(store_copy, name=name)
        path.write_bytes(whole[:-1])
        with pytest.raises(CorruptError, match=path.name):
            api.index(store_copy, name=name, target_recall=0.5)
        path.write_bytes(whole)


def test_a_shard_that_was_damaged_is_named(store_copy: Path) -> None:
    path = store_copy / api.info(store_copy).indexes["main"]["shards"][0]
    whole = path.read_bytes()
    for data in (b"x" + whole[1:], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=path.name):
            retrotool.open(store_copy).search("city", encoder=retrotool.open(store_copy).load_encoder())
        with pytest.raises(CorruptError, match=path.name):
            api.neighbours(store_copy, name="new")
