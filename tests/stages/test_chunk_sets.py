"""Sets of chunks as bits, against Python's sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import CorruptError
from retrotool.export import chunk_sets
from retrotool.export.chunk_sets import ChunkSet
from retrotool.store import parts


def store_of(rows: dict[int, int]) -> Any:
    """What a ``ChunkSet`` asks of a store: its parts, and the rows of each."""

    def part_file(_kind: str, part: int, _name: str = "") -> SimpleNamespace:
        return SimpleNamespace(rows=rows[part])

    return SimpleNamespace(root=Path("store"), state=SimpleNamespace(parts=lambda: sorted(rows), part_file=part_file))


STORES = st.dictionaries(st.integers(0, 9), st.integers(0, 200), max_size=4)


@given(STORES, st.data())
def test_a_set_knows_its_members_and_counts_those_before_any_chunk(rows, data):
    every = [(part << 32) + row for part, n in rows.items() for row in range(n)]
    first = data.draw(st.lists(st.sampled_from(every), max_size=60)) if every else []
    put = data.draw(st.sampled_from(sorted(rows))) if rows else None
    members = set(first)
    found = ChunkSet(store_of(rows))
    found.add(np.array(first, np.int64))
    if put is not None:
        mask = data.draw(st.lists(st.booleans(), min_size=rows[put], max_size=rows[put]))
        found.put(put, np.array(mask, np.bool_))
        members = {i for i in members if i >> 32 != put} | {(put << 32) + row for row, in_ in enumerate(mask) if in_}
    assert found.seal() == len(members)
    ids = np.array(sorted(every), np.int64)
    assert found.contains(ids).tolist() == [i in members for i in ids.tolist()]
    assert found.rank(ids).tolist() == [sum(m < i for m in members) for i in ids.tolist()]
    for part, n in rows.items():
        assert found.of_part(part).tolist() == [(part << 32) + row in members for row in range(n)]


@given(STORES, st.integers(-3, 11), st.integers(0, 300))
def test_what_is_no_row_of_the_store_is_refused(rows, part, row):
    chunk = (part << 32) + row
    found = ChunkSet(store_of(rows))
    if row < rows.get(part, 0):
        found.add(np.array([chunk]))
        return
    with pytest.raises(CorruptError, match=f"the chunk {chunk}, which store has not"):
        found.add(np.array([chunk]))


def test_many_words_are_counted_block_by_block(monkeypatch):
    monkeypatch.setattr(chunk_sets, "_BLOCK", 3)
    found = ChunkSet(store_of({0: 1000, 2: 500}))
    ids = np.concatenate([parts.chunk_ids(0, np.arange(0, 1000, 7)), parts.chunk_ids(2, np.arange(0, 500, 3))])
    found.add(ids)
    assert found.seal() == len(ids)
    assert found.rank(ids).tolist() == list(range(len(ids)))
