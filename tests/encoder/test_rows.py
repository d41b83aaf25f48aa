"""Rows and batches, against the plainest way to say the same."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrotool.encoder.encoder import Rows, batches

LISTS = st.lists(st.lists(st.integers(0, 1000), max_size=12), max_size=20)


def as_lists(rows: Rows) -> list[list[int]]:
    return [rows.ids[start : start + n].tolist() for start, n in zip(rows.starts, rows.lengths, strict=True)]


@given(LISTS)
def test_rows_are_the_lists_they_were_made_of(lists: list[list[int]]) -> None:
    rows = Rows.of(lists)
    assert len(rows) == len(lists)
    assert as_lists(rows) == lists
    assert rows.ids.dtype == np.int32


@given(LISTS, st.data())
def test_some_rows(lists: list[list[int]], data: st.DataObject) -> None:
    which = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=20)) if lists else []
    taken = Rows.of(lists).take(np.array(which, np.int64))
    assert as_lists(taken) == [lists[i] for i in which]


@given(LISTS, st.lists(st.integers(0, 9), max_size=2), st.lists(st.integers(0, 9), max_size=2), st.integers(0, 14))
def test_framing(lists: list[list[int]], before: list[int], after: list[int], longest: int) -> None:
    room = max(longest - len(before) - len(after), 0)
    expected = [[*before, *row[:room], *after] for row in lists]
    assert as_lists(Rows.of(lists).framed(before, after, longest)) == expected


@given(LISTS)
def test_rows_of_a_padded_matrix(lists: list[list[int]]) -> None:
    matrix = np.full((len(lists), 12), 77, np.uint16)
    for i, row in enumerate(lists):
        matrix[i, : len(row)] = row
    lengths = np.array([len(row) for row in lists], np.int32)
    assert as_lists(Rows.of_matrix(matrix, lengths)) == lists


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 120), st.integers(1, 10), st.booleans())
def test_batches_have_every_row_with_tokens_once_and_keep_their_bounds(
    lengths: list[int], tokens: int, most_rows: int, padded: bool
) -> None:
    array = np.array(lengths, np.int64)
    found = batches(array, tokens, most_rows=most_rows, padded=padded)
    places = [int(place) for batch in found for place in batch]
    assert sorted(places) == [i for i, n in enumerate(lengths) if n]
    sizes = array[places]
    assert (np.diff(sizes) <= 0).all(), "longest first"
    for batch in found:
        assert 1 <= len(batch) <= most_rows
        size = len(batch) * array[batch].max() if padded else array[batch].sum()
        assert size <= tokens or len(batch) == 1
    for batch, following in itertools.pairwise(found):
        longest, first = array[batch].max(), array[following[0]]
        size = (len(batch) + 1) * longest if padded else array[batch].sum() + first
        assert len(batch) == most_rows or size > tokens, "no batch is cut short without a reason"
