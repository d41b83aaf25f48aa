"""Index files that were not written whole, or broke later: never committed in silence, and named when they are read."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from stored import copy_store, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.ann import lists
from retrotool.ann.choice import IndexOptions
from retrotool.ann.codes import Whole
from retrotool.ann.lists import Trained, to_faiss
from retrotool.errors import CorruptError, StorageError
from retrotool.index.run import Options
from retrotool.index.searching import write_index
from retrotool.store import disk
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.storage import Sink
from retrotool.store.store import Store

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


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A new one, with nothing in it."""
    return Store.create(tmp_path / "store", TokenizerIdentity.of("test", b"{}", 100, False), b"{}", 8)


def write_shard(store: Store, index: object) -> FileEntry:
    return write_index(store, index, FileName.new("0" * 8, "index", "shard-0000", "faiss", "main"), {"parts": [3]})


@pytest.mark.parametrize("nlist", [0, 8])
def test_what_is_written_is_what_faiss_writes(tmp_path: Path, store: Store, nlist: int) -> None:
    index = make_index(nlist)
    entry = write_shard(store, index)
    assert entry.rows == 500
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert stored_file(store, entry.path).read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.on_disk
@pytest.mark.parametrize("damage", ["cut by one", "cut in half", "empty"])
def test_a_file_that_is_shorter_than_what_was_written_gets_no_name(store: Store, damage: str) -> None:
    """As after a full disk, of which nothing was said."""
    fsync = disk.fsync

    def spoil(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, {"cut by one": size - 1, "cut in half": size // 2, "empty": 0}[damage])
        fsync(path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match="bytes were written"):
        patch.setattr(disk, "fsync", spoil)
        write_shard(store, make_index(8))
    assert not stored_files(store, "index/main/*")


@pytest.mark.parametrize("nlist", [0, 8])
@pytest.mark.parametrize("written", ["a bit in the middle", "other ids", "fewer"])
def test_the_sum_in_the_log_is_of_what_was_meant(store: Store, nlist: int, written: str) -> None:
    """So that what a failing disk made of it is found, whenever the sum is checked."""
    entry = write_shard(store, make_index(nlist))
    path = stored_file(store, entry.path)
    data = bytearray(path.read_bytes())
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    store.check_sum(entry)
    if written == "a bit in the middle":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        index = make_index(nlist, shift=1) if written == "other ids" else make_index(nlist, first=1)
        path.write_bytes(faiss.serialize_index(index).tobytes())
    with pytest.raises(CorruptError, match=path.name):
        store.check_sum(entry)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_the_writing_is_raised_and_nothing_is_left(store: Store, error: BaseException) -> None:
    """faiss would say that its callback failed."""

    def stop(*_: object) -> int:
        raise error

    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(expected):
        patch.setattr(Sink, "write", stop)
        write_shard(store, make_index(8))
    assert not stored_files(store, "index/main/*")


@pytest.mark.on_disk
def test_a_disk_that_is_full_is_reported_and_the_command_goes_on_when_it_is_not(embedded: Path) -> None:
    probe = copy_store(embedded, embedded.with_name("probe"))
    api.index(probe)
    size = stored_file(probe, api.info(probe).indexes["main"]["shards"][0]).stat().st_size
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
    api.index(store_copy, name="ivf", options=Options(IndexOptions(nlist=8, code="float16")))
    api.chunk(store_copy, [str(write_jsonl(tmp_path / "more.jsonl", make_rows(5, first=500)))])
    api.embed(store_copy, encoder=str(tiny_encoder))
    for name, places in (("main", (0, -20)), ("ivf", (0, 200, -20))):
        path = stored_file(store_copy, api.info(store_copy).indexes[name]["trained"])
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
    path = stored_file(store_copy, api.info(store_copy).indexes["main"]["shards"][0])
    whole = path.read_bytes()
    for data in (b"x" + whole[1:], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=path.name):
            retrotool.open(store_copy).search("city", encoder=retrotool.open(store_copy).load_encoder())
        with pytest.raises(CorruptError, match=path.name):
            api.neighbours(store_copy, name="new")
