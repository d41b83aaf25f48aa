"""Chunk ids and runs of numbers, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ranges import expand_ranges, positions_within
from retrotool.store import ids

RUNS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 5)))
PLACES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**32 - 1)))


@given(RUNS)
def test_runs_of_numbers(runs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([run[i] for run in runs], np.int64) for i in range(2))
    assert positions_within(lengths).tolist() == [i for _, length in runs for i in range(length)]
    assert expand_ranges(starts, lengths).tolist() == [i for start, n in runs for i in range(start, start + n)]


@given(PLACES)
def test_an_id_is_a_part_and_a_row(places: list[tuple[int, int]]) -> None:
    chunks = np.array([ids.join_id(*place) for place in places], np.int64)
    assert [ids.split_id(chunk) for chunk in chunks.tolist()] == places
    assert list(zip(ids.part_of(chunks).tolist(), ids.row_of(chunks).tolist(), strict=True)) == places
    parts = sorted({part for part, _ in places})
    assert ids.distinct_parts(chunks) == parts
    assert [(part, rows.tolist()) for part, rows in ids.rows_by_part(chunks)] == [
        (part, [row for of, row in places if of == part]) for part in parts
    ]
    assert [(part, chunks[there].tolist()) for part, there in ids.places_by_part(chunks)] == [
        (part, [ids.join_id(part, row) for of, row in places if of == part]) for part in parts
    ]
    ascending = np.sort(chunks)
    for part in parts:
        assert ascending[ids.slice_of_part(ascending, part)].tolist() == sorted(
            ids.join_id(part, row) for of, row in places if of == part
        )
        rows = np.array([row for of, row in places if of == part])
        assert sorted(ids.chunk_ids(part, rows).tolist()) == ascending[ids.slice_of_part(ascending, part)].tolist()
