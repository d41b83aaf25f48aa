"""Chunk ids and runs of numbers, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ranges import expand_ranges, positions_within
from retrotool.store import parts

RUNS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 5)))
PLACES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**32 - 1)))


@given(RUNS)
def test_runs_of_numbers(runs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([run[i] for run in runs], np.int64) for i in range(2))
    assert positions_within(lengths).tolist() == [i for _, length in runs for i in range(length)]
    assert expand_ranges(starts, lengths).tolist() == [i for start, n in runs for i in range(start, start + n)]


@given(PLACES)
def test_an_id_is_a_part_and_a_row(places: list[tuple[int, int]]) -> None:
    chunks = np.array([parts.join_id(*place) for place in places], np.int64)
    assert [parts.split_id(chunk) for chunk in chunks.tolist()] == places
    assert list(zip(parts.part_of(chunks).tolist(), parts.row_of(chunks).tolist(), strict=True)) == places
    numbers = sorted({part for part, _ in places})
    assert parts.distinct_parts(chunks) == numbers
    assert [(part, rows.tolist()) for part, rows in parts.rows_by_part(chunks)] == [
        (part, [row for of, row in places if of == part]) for part in numbers
    ]
    ascending = np.sort(chunks)
    for part in numbers:
        assert ascending[parts.slice_of_part(ascending, part)].tolist() == sorted(
            parts.join_id(part, row) for of, row in places if of == part
        )
        rows = np.array([row for of, row in places if of == part])
        assert sorted(parts.chunk_ids(part, rows).tolist()) == ascending[parts.slice_of_part(ascending, part)].tolist()
