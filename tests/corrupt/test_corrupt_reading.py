"""Reading through a store that is damaged: an error that names the file, never something else than was written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import times
from stored import copy_store, stored_file

import retrotool
from retrotool import api
from retrotool.errors import CorruptError, ErasedError, RetrotoolError
from retrotool.store import neighbour_tables, parts, tombstones
from retrotool.store.log import FileEntry
from retrotool.store.store import Store

PURGED = (5, 6, 7, 1 << 32 | 4)


@pytest.fixture
def root(store_copy: Path, tmp_path: Path) -> Path:
    """A store with a purge."""
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in PURGED))
    api.purge(store_copy, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    return store_copy


def flips(path: Path, places: list[int], seed: int, bits: int = 1) -> Iterator[int]:
    """Flip a few bits at each place, one at a time; the file is whole again at the end."""
    good, draw = path.read_bytes(), random.Random(seed)
    for place in places:
        for bit in draw.sample(range(8), bits):
            data = bytearray(good)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            yield place
    path.write_bytes(good)


def read_tokens(root: Path) -> list[Any]:
    reader = retrotool.open(root)
    ids = [part << 32 | row for part in reader.parts()[:1] for row in range(100)]
    return [reader.tokens(ids).tolist(), reader.is_live(ids).tolist(), reader.chunk(50).text]


def test_a_flipped_bit_in_a_page_of_chunks_is_an_error(root: Path) -> None:
    entry = Store.open(root).state.part_file("chunks", 0)
    path, expected = stored_file(root, entry.path), read_tokens(root)
    columns = [pq.read_metadata(path).row_group(0).column(i) for i in range(1, 5)]  # all but the row number
    pages = [
        place
        for column in columns
        for start in [column.dictionary_page_offset or column.data_page_offset]
        for place in range(start, start + column.total_compressed_size)
    ]
    caught = same = 0
    for _ in flips(path, random.Random(1).sample(pages, 150), seed=1):
        try:
            assert read_tokens(root) == expected
            same += 1  # page headers hold statistics, too, that nobody reads
        except CorruptError as error:
            assert entry.path in str(error)
            caught += 1
    assert caught > 20 * same, "the pages themselves are under a checksum"


def exactly(*arrays: np.ndarray) -> list[tuple[Any, ...]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def chunks(store: Store, row_groups: list[int] | None = None) -> list[tuple[Any, ...]]:
    found = parts.read_chunks(store, 0, row_groups)
    return exactly(found.doc, found.index, found.n_tokens, found.tokens)


def neighbours(store: Store, entry: FileEntry, row_groups: list[int] | None = None) -> list[tuple[Any, ...]]:
    found = neighbour_tables.read_table(store, entry, row_groups)
    return exactly(found.ids, found.distances)


def read_tombstones_afresh(store: Store) -> object:
    """As a new process reads them: one that has read a file does not read it again."""
    tombstones._small.clear()
    return exactly(tombstones.read_tombstones(store).ids)


READERS: dict[str, Callable[[Store, FileEntry], Any]] = {
    "chunks": lambda store, _: chunks(store),
    "chunks by row group": lambda store, _: chunks(store, [0]),
    "documents": lambda store, _: parts.read_documents(store, 0, ["id", "first_row", "n_chunks"]),
    "neighbours": neighbours,
    "neighbours by row group": lambda store, entry: neighbours(store, entry, [0]),
    "tombstones": lambda store, _: read_tombstones_afresh(store),
}


@pytest.mark.parametrize("what", READERS)
def test_no_flipped_bit_is_read_as_something_else(root: Path, what: str) -> None:
    store = Store.open(root)
    entry = next(entry for entry in store.state.files() if entry.path.startswith(what.split()[0]))
    path, read = stored_file(root, entry.path), READERS[what]
    expected = read(store, entry)
    # The footer has no checksum of its own: try all of it (by default every third byte), and a sample of the pages.
    footer = max(0, entry.bytes - 2000)
    places = [*random.Random(what).sample(range(footer), min(footer, 200)), *range(footer, entry.bytes, times(3, 1))]
    caught = 0
    for place in flips(path, places, seed=2):
        try:
            assert read(store, entry) == expected, f"byte {place}"
        except CorruptError as error:
            assert entry.path in str(error)
            caught += 1
    assert caught > len(places) // 4
    assert read(store, entry) == expected


@pytest.mark.parametrize("what", ["chunks", "chunks by row group", "neighbours", "neighbours by row group"])
def test_a_row_group_that_is_short_of_rows_is_an_error(root: Path, what: str) -> None:
    store = Store.open(root)
    entry = next(entry for entry in store.state.files() if entry.path.startswith(what.split()[0]))
    path, short = stored_file(root, entry.path), 0
    data = bytearray(path.read_bytes())
    # Few bits do this and leave the rest of the footer in order: look for them.
    for place, bit in itertools.product(range(len(data) - 2000, len(data)), range(8)):
        data[place] ^= 1 << bit
        try:
            metadata = pq.read_metadata(pa.BufferReader(bytes(data)))
            lies = metadata.num_rows == entry.rows > metadata.row_group(0).num_rows > 0
        except (pa.ArrowException, OSError, ValueError, IndexError):
            lies = False
        if lies:
            path.write_bytes(data)
            with pytest.raises(CorruptError, match=entry.path):
                READERS[what](store, entry)
            short += 1
        data[place] ^= 1 << bit
    assert short > 2


def test_a_flipped_bit_in_the_newest_commit_is_an_error(root: Path) -> None:
    # No later commit vouches for it: were it the purge, its tombstones could be gone.
    path = stored_file(root, f"log/{Store.open(root).state.number:08d}.json")
    for place in flips(path, list(range(path.stat().st_size)), seed=3):
        with pytest.raises(CorruptError, match=path.name):
            Store.open(root)
            pytest.fail(f"byte {place}")


def test_a_gap_in_the_log_does_not_bring_purged_text_back(root: Path) -> None:
    assert tombstones.read_tombstones(Store.open(root)).ids.tolist() == sorted(PURGED)
    stored_file(root, f"log/{Store.open(root).state.number - 1:08d}.json").unlink()
    with pytest.raises(CorruptError):
        Store.open(root)


@pytest.mark.parametrize("kind", ["documents", "chunks", "tombstones", "neighbours", "embeddings"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_a_file_of_another_size_is_an_error_that_names_it(root: Path, kind: str, damage: str) -> None:
    store = Store.open(root)
    entry = next(entry for entry in store.state.files() if entry.path.startswith(kind))
    path = stored_file(root, entry.path)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "shorter" else data + b"\0")
    with pytest.raises(CorruptError, match=entry.path) as caught:
        store.check_there(entry)
    assert "retrotool verify" in caught.value.advice


def test_a_file_that_a_newer_commit_removed_was_erased(root: Path, tmp_path: Path) -> None:
    reader = retrotool.open(root)
    (tmp_path / "more").write_text("8\n")
    api.purge(root, api.Selectors(chunk=tmp_path / "more"), reason="test", erase=True)
    with pytest.raises(ErasedError) as caught:
        reader.tokens([0])
    assert caught.value.advice.endswith("open the store again.")
    reader.refresh()
    assert np.any(reader.tokens([0]))


@pytest.mark.parametrize("kind", ["documents", "chunks", "tombstones", "neighbours", "embeddings", "index/main/shard"])
def test_every_command_survives_a_zeroed_file(root: Path, kind: str, tmp_path: Path) -> None:
    """Errors of ours with advice, or success where the file isn't needed; never anything else."""
    entry = next(entry for entry in Store.open(root).state.files() if entry.path.startswith(kind))
    stored_file(root, entry.path).write_bytes(b"\0" * entry.bytes)
    (tmp_path / "some").write_text("20\n")
    copy_store(root, tmp_path / "copy")

    def read_all() -> None:
        reader = retrotool.open(root)
        for i in (0, 50):
            reader.document(reader.chunk(i).document)
            reader.neighbours(i)

    actions: list[Callable[[], object]] = [
        read_all,
        lambda: api.info(root),
        lambda: api.purge(root, api.Selectors(chunk=tmp_path / "some"), reason="test", erase=True),
        lambda: api.purge(
            tmp_path / "copy", api.Selectors(pattern="store", allow_lossy=True), reason="test", dry_run=True
        ),
        lambda: api.neighbours(root, name="again"),
        lambda: api.index(root, name="again"),
    ]
    failed = 0
    for action in actions:
        try:
            action()
        except RetrotoolError as error:
            assert error.exit_code == 12, error
            failed += 1
    assert failed
