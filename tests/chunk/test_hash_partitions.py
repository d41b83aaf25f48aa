"""Repeats are found whatever the order, the sizes and the memory, as a dictionary finds them."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.chunk.hash_partitions import RECORD, repeats_among, split
from retrotool.errors import StorageError

U64 = st.sampled_from([0, 1, 1 << 52, (1 << 52) + 1, 1 << 63, (1 << 64) - 1])
hashes = st.tuples(U64, U64)
"""Few values, which share halves and leading bits, so that ties of every kind occur."""


def records_by_hand(rows: list[tuple[int, int]], places: list[int]) -> np.ndarray:
    return np.array([(high, low, place) for (high, low), place in zip(rows, places, strict=True)], RECORD)


def repeats_by_hand(records: np.ndarray) -> list[int]:
    first: dict[tuple[int, int], int] = {}
    for high, low, place in sorted(records.tolist(), key=lambda record: record[2]):
        first.setdefault((high, low), place)
    return sorted(place for high, low, place in records.tolist() if first[high, low] != place)


def repeats(batches: list[np.ndarray], rows: int) -> list[int]:
    return sorted(np.concatenate(list(repeats_among(batches, sum(map(len, batches)), rows))).tolist())


def random_batches(n: int, size: int) -> list[np.ndarray]:
    """Batches of hashes, of which a tenth occur twice or more."""
    draw = np.random.default_rng(0)
    pool = draw.integers(0, (1 << 64) - 1, (n, 2), dtype=np.uint64)
    records = np.empty(n, RECORD)
    chosen = pool[np.where(draw.random(n) < 0.1, draw.integers(0, n, n), np.arange(n))]
    records["high"], records["low"], records["place"] = chosen[:, 0], chosen[:, 1], draw.permutation(n)
    return np.split(records, range(size, n, size))


@st.composite
def batches(draw: st.DrawFn) -> list[np.ndarray]:
    rows = draw(st.lists(hashes, max_size=60))
    places = draw(st.permutations(range(len(rows))))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    return np.split(records_by_hand(rows, places), cuts)


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
def test_the_memory_changes_nothing(batches: list[np.ndarray], rows: int) -> None:
    assert repeats(batches, rows) == repeats_by_hand(np.concatenate(batches))


@pytest.mark.parametrize("times", [4, 40])
def test_the_peak_does_not_grow_with_the_records(times: int) -> None:
    rows = 10_000
    batches = random_batches(times * rows, 500)
    repeats(batches[:1], rows)  # numpy imports what it needs at the first call
    tracemalloc.start()
    try:
        found = sum(len(places) for places in repeats_among(batches, times * rows, rows))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == len(repeats_by_hand(np.concatenate(batches))) > 0.05 * times * rows
    # 80 bytes a record in memory, 8 a repeat, and the bounds of 128 partitions or fewer for each write.
    assert peak < 80 * rows + 8 * found + times * 128 * 8 + 100_000


def test_a_hash_that_everything_shares_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (tmp_path / "scratch").open("w+b"))
    records = np.zeros(5000, RECORD)
    records["place"] = np.arange(5000)
    assert repeats(np.split(records, 50), 100) == list(range(1, 5000))
    assert (tmp_path / "scratch").stat().st_size == 50 * RECORD.itemsize, "one record for each write"


def test_the_scratch_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = random_batches(1000, 100)
    found = []
    for places in repeats_among(batches, 1000, 10):
        found += places.tolist()
        assert list(tmp_path.iterdir()) == [], "a process that is killed leaves nothing"
    assert sorted(found) == repeats_by_hand(np.concatenate(batches))


def test_a_temporary_folder_that_can_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self/nowhere")
    assert repeats(random_batches(100, 10), 100), "nothing is written while all fits into memory"
    with pytest.raises(StorageError, match="/proc/self/nowhere: No such file") as caught:
        repeats(random_batches(100, 10), 10)
    assert "--scratch" in caught.value.advice


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(StorageError, match="No space left") as caught:
        repeats(random_batches(100, 10), 10)
    assert "--scratch" in caught.value.advice
