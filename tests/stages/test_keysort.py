"""Repeats are found whatever the order, the sizes and the memory, as a dictionary finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.chunk import external_sort
from retrotool.chunk.external_sort import RECORD, Bitmap, Sorter, split
from retrotool.errors import StorageError
from retrotool.store.atomic import TEMPORARY

RUN = "0123abcd"
U64 = st.sampled_from([0, 1, 1 << 52, (1 << 52) + 1, 1 << 63, (1 << 64) - 1])
hashes = st.tuples(U64, U64)
"""Few values, which share halves and leading bits, so that ties of every kind occur."""


def records_of(rows: list[tuple[int, int]], places: list[int]) -> np.ndarray:
    return np.array([(high, low, place) for (high, low), place in zip(rows, places, strict=True)], RECORD)


def repeats_by_hand(records: np.ndarray) -> list[int]:
    first: dict[tuple[int, int], int] = {}
    for high, low, place in sorted(records.tolist(), key=lambda record: record[2]):
        first.setdefault((high, low), place)
    return sorted(place for high, low, place in records.tolist() if first[high, low] != place)


@st.composite
def batches(draw: st.DrawFn) -> list[np.ndarray]:
    rows = draw(st.lists(hashes, max_size=60))
    places = draw(st.permutations(range(len(rows))))
    records = records_of(rows, places)
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    return np.split(records, cuts)


@given(batches=batches())
def test_of_equal_hashes_the_lowest_place_is_the_first(batches: list[np.ndarray]) -> None:
    records = np.concatenate(batches)
    first, again = split(records)
    kept = records[first]
    assert sorted(again.tolist()) == repeats_by_hand(records)
    assert sorted([*kept["place"].tolist(), *again.tolist()]) == sorted(records["place"].tolist())
    order = list(zip(kept["high"].tolist(), kept["low"].tolist(), strict=True))
    assert order == sorted(set(order))


@given(batches=batches(), rows=st.integers(1, 70))
def test_the_memory_changes_nothing(tmp_path_factory: pytest.TempPathFactory, batches: list, rows: int) -> None:
    root = tmp_path_factory.mktemp("sorter")
    with Sorter(root, RUN, rows) as sorter:
        for batch in batches:
            sorter.add(batch)
        found = np.concatenate([np.zeros(0, np.int64), *sorter.repeats()])
    records = np.concatenate(batches)
    assert sorted(found.tolist()) == repeats_by_hand(records)
    assert scratch_files(root) == []


def scratch_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def fill(root: Path, act: Callable[[Sorter], object]) -> None:
    """A sorter of random hashes that has written scratch files."""
    draw = np.random.default_rng(0)
    with Sorter(root, RUN, 1000) as sorter:
        for start in range(0, 10_000, 500):
            records = np.empty(500, RECORD)
            records["high"], records["low"] = draw.integers(0, 1 << 63, (2, 500))
            records["place"] = np.arange(start, start + 500)
            sorter.add(records)
        assert len(scratch_files(root)) > 5
        act(sorter)


def test_no_range_is_read_that_is_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = external_sort.split

    def watched(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(records))
        return whole(records)

    monkeypatch.setattr(external_sort, "split", watched)
    fill(tmp_path, lambda sorter: list(sorter.repeats()))
    assert max(sizes) <= 1000
    assert sum(sizes) == 20_000, "every record is sorted once before and once after it was written"


def test_a_hash_that_everything_shares_takes_one_record_a_file(tmp_path: Path) -> None:
    with Sorter(tmp_path, RUN, 100) as sorter:
        for start in range(0, 5000, 100):
            records = np.zeros(100, RECORD)
            records["place"] = np.arange(start, start + 100)
            sorter.add(records)
        assert max(path.stat().st_size for path in scratch_files(tmp_path)) == RECORD.itemsize
        assert sorted(np.concatenate(list(sorter.repeats())).tolist()) == list(range(1, 5000))


def test_scratch_files_are_temporary_files_of_the_run_and_gone_after_an_error(tmp_path: Path) -> None:
    names: list[str] = []

    def fail(_: Sorter) -> None:
        names.extend(path.name for path in scratch_files(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, fail)
    assert all(name.startswith(f"{TEMPORARY}{RUN}") for name in names)
    assert scratch_files(tmp_path) == []


def test_a_scratch_file_that_changed_is_not_believed(tmp_path: Path) -> None:
    def damage(sorter: Sorter) -> None:
        path = scratch_files(tmp_path)[2]
        data = bytearray(path.read_bytes())
        data[100] ^= 4
        path.write_bytes(data)
        list(sorter.repeats())

    with pytest.raises(StorageError, match="does not hold what was written"):
        fill(tmp_path, damage)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=50), st.integers(0, 10**6))
def test_what_was_added_may_be_held(values: list[int], expected: int) -> None:
    bitmap = Bitmap(expected)
    added = np.array(values, np.uint64)
    bitmap.add(added)
    assert bitmap.may_hold(added).all()


def test_little_else_is_held_and_the_bitmap_stays_small() -> None:
    draw = np.random.default_rng(0)
    bitmap = Bitmap(10_000)
    bitmap.add(draw.integers(0, 1 << 63, 10_000).astype(np.uint64) * np.uint64(2))
    others = draw.integers(0, 1 << 63, 10_000).astype(np.uint64) * np.uint64(2)
    assert bitmap.may_hold(others).mean() < 0.1
    assert Bitmap(1 << 40)._bytes.nbytes == 128 << 20
