"""Longest common runs of tokens against the textbook's table, and against difflib."""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrotool.stages.overlap import longest_common


def by_table(one: list[int], other: list[int]) -> int:
    """Dynamic programming: run[i][j] ends at tokens i and j."""
    best, before = 0, [0] * (len(other) + 1)
    for a in one:
        row = [0] * (len(other) + 1)
        for j, b in enumerate(other, 1):
            if a == b:
                row[j] = before[j - 1] + 1
        best, before = max(best, *row), row
    return best


def padded(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.zeros((len(rows), width), np.uint32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table, np.array([len(row) for row in rows])


pairs = st.integers(1, 5).flatmap(
    lambda kinds: st.lists(
        st.tuples(
            st.lists(st.integers(0, kinds), max_size=64), st.lists(st.integers(0, kinds), max_size=128)
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip


@given(pairs)
@settings(max_examples=150, deadline=None)
def test_runs_are_those_of_the_textbook_and_where_they_are_said_to_be(some: list[tuple[list[int], list[int]]]) -> None:
    one, n_one = padded([a for a, _ in some], 64)
    other, n_other = padded([b for _, b in some], 128)
    found = longest_common(one, n_one, other, n_other)
    for i, (a, b) in enumerate(some):
        length, start, there = int(found.length[i]), int(found.start[i]), int(found.other[i])
        assert length == by_table(a, b)
        assert length == SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
        assert a[start : start + length] == b[there : there + length] and len(a[start : start + length]) == length


@pytest.mark.parametrize("width", [1, 7, 63, 64])
def test_of_all_lengths_and_at_all_places(width: int) -> None:
    rng = np.random.default_rng(width)
    one = rng.permuted(np.tile(np.arange(1000, 2000), (300, 1)), axis=1)[:, :width]
    other = rng.integers(3000, 4000, (300, 128))
    length, place, there = rng.integers(0, width + 1, 300), np.zeros(300, int), np.zeros(300, int)
    for i, n in enumerate(length):
        place[i], there[i] = rng.integers(0, width - n + 1), rng.integers(0, 128 - n + 1)
        other[i, there[i] : there[i] + n] = one[i, place[i] : place[i] + n]
    found = longest_common(one, np.full(300, width), other, np.full(300, 128))
    assert np.array_equal(found.length, length)
    some = length > 0
    assert np.array_equal(found.start[some], place[some]) and np.array_equal(found.other[some], there[some])


def test_padding_is_no_token() -> None:
    nothing = np.zeros((2, 64), np.uint16)
    found = longest_common(nothing, np.array([3, 64]), np.zeros((2, 128), np.uint16), np.array([0, 5]))
    assert found.length.tolist() == [0, 5]
    with pytest.raises(ValueError, match="64 bits"):
        longest_common(np.zeros((1, 65), int), np.array([65]), nothing[:1], np.array([1]))
