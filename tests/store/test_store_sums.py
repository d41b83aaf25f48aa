"""Sums of blocks: any flipped bit of embeddings and of an index is noticed when it is read, and not before."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import xxhash
from conftest import times
from hypothesis import given
from hypothesis import strategies as st
from store_help import make_store, viewing
from stored import stored_file

from retrotool.ann.lists import of_faiss
from retrotool.errors import CorruptError
from retrotool.index.searching import read_shard, write_index
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.sums import BLOCK, SUMS, BlockSums, size_of_sums, with_sums
from retrotool.store.vectors import MappedVectors, read_vectors, write_vector_blocks, write_vectors

RUN = "0123abcd"
NAME = FileName.new(RUN, "embeddings", "000000", "npy", "tiny")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def matrix(rows: int, dimension: int = 48) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, dimension)).astype(np.float16)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


@given(pieces=st.lists(st.integers(0, 3 * BLOCK), max_size=6))
def test_the_sums_do_not_depend_on_how_a_file_is_written(pieces: list[int]) -> None:
    data = random.Random(1).randbytes(sum(pieces))
    sums, start = BlockSums(), 0
    for size in pieces:
        sums.update(memoryview(data)[start : start + size])
        start += size
    due = [xxhash.xxh3_64(data[place : place + BLOCK]).intdigest() for place in range(0, len(data), BLOCK)]
    assert np.frombuffer(sums.content(), "<u8").tolist() == due
    assert len(sums.content()) == size_of_sums(len(data))


def test_what_has_sums() -> None:
    assert with_sums("embeddings/tiny/000000-0123abcd00000000.npy")[1].endswith(".npy.xxh3")
    assert with_sums("index/main/trained-0123abcd00000000.faiss")[1].endswith(".faiss.xxh3")
    assert with_sums("chunks/0123abcd00000000.parquet") == ("chunks/0123abcd00000000.parquet",)


TAKEN: dict[str, Callable[[int], object]] = {
    "a row": lambda n: n // 3,
    "the last row": lambda _: -1,
    "some rows": lambda n: np.array([0, n - 1, n // 2, n // 2, 1]),
    "no rows": lambda _: np.zeros(0, np.int64),
    "flags": lambda n: np.arange(n) % 7 == 3,
    "a slice": lambda n: slice(n // 3, n // 2),
    "a step": lambda n: slice(5, n, 3),
    "backwards": lambda n: slice(n // 2, 2, -2),
    "everything": lambda _: slice(None),
}


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize(("rows", "dimension"), [(2000, 48), (300, 16384), (9, 3)])
def test_what_is_taken_is_what_numpy_takes(store: Store, taken: str, rows: int, dimension: int) -> None:
    values = matrix(rows, dimension)
    entry = write_vectors(store, NAME, values)
    found = read_vectors(viewing(store, entry), entry)
    key = TAKEN[taken](rows)
    np.testing.assert_array_equal(found[key], values[key])  # type: ignore[index]
    assert (len(found), found.shape, found.dtype) == (rows, values.shape, values.dtype)
    np.testing.assert_array_equal(np.asarray(found), values)
    assert np.asarray(found, np.float32).dtype == np.float32


def test_only_the_block_that_is_touched_is_checked(store: Store) -> None:
    values = matrix(3000)
    entry = write_vectors(store, NAME, values)
    path = stored_file(store, entry.path)
    flip(path, 3 * BLOCK + 100)
    found = read_vectors(viewing(store, entry), entry)
    row_bytes, bad = values[0].nbytes, range(3 * BLOCK, 4 * BLOCK)
    offset = entry.bytes - values.nbytes
    for row in range(len(values)):
        touched = range(offset + row * row_bytes, offset + (row + 1) * row_bytes)
        if touched.stop > bad.start and touched.start < bad.stop:
            with pytest.raises(CorruptError, match=f"{entry.path}: the block at byte {3 * BLOCK:,} does not match"):
                found[np.array([row])]
        else:
            np.testing.assert_array_equal(found[np.array([row])], values[[row]])
    with pytest.raises(CorruptError):
        np.asarray(found)


def read_everything(vectors: MappedVectors) -> None:
    for start in range(0, len(vectors), 100):
        _ = vectors[start : start + 100]


def test_every_flipped_bit_of_embeddings_is_noticed(store: Store) -> None:
    values = matrix(700)
    entry = write_vectors(store, NAME, values)
    path, seen = stored_file(store, entry.path), viewing(store, entry)
    whole = path.read_bytes()
    places = [*range(0, 160, 3), *random.Random(2).sample(range(entry.bytes), 150), entry.bytes - 1]
    for place in places:
        flip(path, place)
        with pytest.raises(CorruptError, match=entry.path):
            read_everything(read_vectors(seen, entry))
        path.write_bytes(whole)
    read_everything(read_vectors(seen, entry))


@pytest.mark.parametrize("what", ["flipped", "short", "long", "gone"])
def test_sums_that_are_damaged_are_noticed(store: Store, what: str) -> None:
    entry = write_vectors(store, NAME, matrix(700))
    sums = stored_file(store, entry.path + SUMS)
    data = sums.read_bytes()
    changed = {"flipped": bytes([data[0] ^ 1]) + data[1:], "short": data[:-4], "long": data + b"\0"}
    if what == "gone":
        sums.unlink()
    else:
        sums.write_bytes(changed[what])
    with pytest.raises(CorruptError, match=r"embeddings/tiny/.*\.npy"):
        read_everything(read_vectors(viewing(store, entry), entry))
    with pytest.raises(CorruptError, match=r"\.xxh3 is missing or does not match"):
        viewing(store, entry).check_sum(entry)


def make_index(store: Store, factory: str) -> tuple[FileEntry, Any]:
    index = faiss.index_factory(32, factory)
    if isinstance(index, faiss.IndexPreTransform):
        # Most of the time, and of no use here.
        faiss.downcast_index(index.index).do_polysemous_training = False
        faiss.downcast_VectorTransform(index.chain.at(0)).niter = 2
    values = np.random.default_rng(3).normal(size=(4000, 32)).astype(np.float32)
    index.train(values)
    index.add_with_ids(values, np.arange(4000))
    return write_index(store, index, FileName.new(RUN, "index", "shard-0000", "faiss", "main"), None), index


def read_lists(store: Store, entry: FileEntry, index: Any) -> list[bytes]:
    shard = read_shard(store, entry, of_faiss(index))
    return [bytes(shard.ids(n)) + bytes(shard.codes(n)) for n in shard.numbers]


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "OPQ8,IVF32,PQ8", "IDMap2,SQfp16"])
def test_every_flipped_bit_of_an_index_is_noticed(store: Store, factory: str) -> None:
    entry, index = make_index(store, factory)
    path, seen = stored_file(store, entry.path), viewing(store, entry)
    whole, due = path.read_bytes(), read_lists(viewing(store, entry), entry, index)
    places = [
        *range(0, 400, times(19, 9)),
        *random.Random(4).sample(range(entry.bytes), times(40, 100)),
        entry.bytes - 1,
    ]
    noticed = 0
    for place in places:
        flip(path, place)
        try:
            assert read_lists(seen, entry, index) == due, f"byte {place}"
        except CorruptError as error:
            assert entry.path in str(error)
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= len(places) - 3, "there may be bytes that nobody reads"
    assert read_lists(seen, entry, index) == due


def test_only_the_list_that_is_read_is_checked(store: Store) -> None:
    entry, index = make_index(store, "IVF32,SQ8")
    path = stored_file(store, entry.path)
    mapped = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP)
    flip(path, faiss.downcast_InvertedLists(mapped.invlists).lists.at(20).offset + 7)
    shard = read_shard(viewing(store, entry), entry, of_faiss(index))
    for number in (0, 1, 2, 31):
        assert len(shard.codes(number)) == index.invlists.list_size(number)
    with pytest.raises(CorruptError, match="does not match its checksum"):
        shard.codes(20)
    with pytest.raises(CorruptError):
        shard.ids(20)


def test_blocks_are_written_in_pieces_and_summed_as_one(store: Store) -> None:
    values = matrix(2000)
    entry = write_vector_blocks(store, NAME, 2000, 48, [values[:1], values[1:999], values[999:]])
    other = write_vectors(store, FileName.new(RUN, "embeddings", "000000", "npy", "tiny"), values)
    one, two = (stored_file(store, (path.path + SUMS)).read_bytes() for path in (entry, other))
    assert one == two
    assert entry.sha256 == other.sha256
