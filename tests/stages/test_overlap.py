"""Longest common runs of tokens against the textbook's table and difflib; near copies against sets of runs."""

from __future__ import annotations

import random
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.neighbours import token_overlap
from retrotool.neighbours.token_overlap import are_near_copies, distinct_grams, has_longer_run, longest_common


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


def by_grams(one: list[int], other: list[int]) -> bool:
    """Whether half or more of the runs of 8 tokens of the one are in the other, each counted once."""
    ours, theirs = ({tuple(piece[i : i + 8]) for i in range(len(piece) - 7)} for piece in (one, other))
    return bool(ours) and 2 * len(ours & theirs) >= len(ours)


def some_copied(kinds: int, length: int, draw: random.Random) -> tuple[list[int], list[int]]:
    """A piece of some kinds of tokens, and another with stretches of it."""
    one = [draw.randrange(kinds) for _ in range(length)]
    other: list[int] = []
    while len(other) < 120:
        start = draw.randrange(max(length, 1))
        other += one[start : start + draw.randrange(40)] + [draw.randrange(kinds) for _ in range(draw.randrange(12))]
        if not one:
            break
    return one, other[: draw.randrange(129)]


@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 3, 30, 30000]), st.integers(0, 64))
def test_enough_in_common_is_what_counting_one_by_one_finds(draw: random.Random, kinds: int, length: int) -> None:
    some = [some_copied(kinds, draw.choice([length, 64, 9]), draw) for _ in range(6)]
    one, n_one = padded([a for a, _ in some], 64)
    other, n_other = padded([b for _, b in some], 128)
    copies = are_near_copies(one, n_one, distinct_grams(one, n_one), other, n_other)
    assert copies.tolist() == [by_grams(a, b) for a, b in some]
    for run in (0, 1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 63, 64):
        longer = has_longer_run(one, n_one, other, n_other, run)
        assert longer.tolist() == [by_table(a, b) > run for a, b in some], run


def test_distinct_grams_are_marked_where_they_come_first() -> None:
    rows = [[1] * 64, list(range(64)), [1, 2, 3, 4, 5, 6, 7, 8, 9] * 3, [5] * 7, []]
    found = distinct_grams(*padded(rows, 64))
    assert found.tolist() == [1, (1 << 57) - 1, (1 << 9) - 1, 0, 0]


def test_hardly_any_pair_that_has_nothing_in_common_is_compared_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(1000, 30000, (2000, 64)), rng.integers(1000, 30000, (2000, 128))
    compared = []
    agreement = token_overlap._agreement
    monkeypatch.setattr(token_overlap, "_agreement", lambda *pair: (compared.append(len(pair[0])), agreement(*pair))[1])
    full = np.full(2000, 64), np.full(2000, 128)
    assert not has_longer_run(one, full[0], other, full[1], 8).any()
    assert sum(compared) < 200
