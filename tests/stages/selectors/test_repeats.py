"""Chunks that repeat, as a dictionary finds them: whatever the parts, the memory, and what was purged before."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selector_help import purge, random_tokens, store_of
from stored import stored_files

from retrotool import api
from retrotool.purge.selectors import lookup
from retrotool.purge.selectors.lookup import select_duplicates, token_hashes
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


def by_hand(store: Store, shortest: int = 8) -> list[int]:
    seen: set[tuple[int, ...]] = set()
    found = []
    purged = set(read_tombstones(store).ids.tolist())
    for part in store.state.parts():
        chunks = parts.read_chunks(store, part)
        for row in range(len(chunks)):
            tokens = tuple(chunks.tokens[row, : chunks.n_tokens[row]].tolist())
            chunk = part << 32 | row
            if chunk in purged or len(tokens) < shortest or not chunks.key[row]:
                continue
            if tokens in seen:
                found.append(chunk)
            seen.add(tokens)
    return found


@pytest.fixture
def store(tmp_path: Path, tiny_encoder: Path) -> Store:
    """Documents that share chunks, also of their ends, in several parts and plans."""
    shared = [random_tokens(i, 64, 140) for i in range(6)]
    ends = [random_tokens(90, n, 140) for n in (1, 7, 8, 30)] + [[5] * 64, [5] * 63, [5] * 8]
    rng = np.random.default_rng(0)
    documents = []
    for i in range(90):
        middle = [random_tokens(1000 + i, 64, 140)] if i % 3 else []
        some = [shared[j] for j in rng.choice(6, rng.integers(1, 4))]
        documents.append(functools.reduce(operator.iadd, [*middle, *some, ends[i % len(ends)]], []))
    return store_of(tmp_path / "store", tiny_encoder, documents[:60], documents[60:], part_size=30)


@pytest.mark.parametrize("rows", [1, 3, 50, 1 << 22])
def test_all_but_the_first_are_found_with_any_memory(store: Store, rows: int) -> None:
    reported: list[int] = []
    files = stored_files(store)
    found = select_duplicates(store, reported.append, rows=rows)
    assert found.dtype == np.int64 and found.tolist() == by_hand(store) and len(found) > 100
    assert sum(reported) == len(store.state.parts()) > 4
    assert len(set((found >> 32).tolist())) > 3
    assert stored_files(store) == files


@pytest.mark.parametrize("shortest", [1, 7, 8, 9, 64])
def test_short_chunks_are_left_alone(store: Store, shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "SHORTEST", shortest)
    assert select_duplicates(store).tolist() == by_hand(store, shortest)


def test_what_is_purged_or_erased_is_neither_first_nor_repeats(store: Store) -> None:
    found = by_hand(store)
    firsts = set(range(40)) - set(found)
    store = purge(store, *sorted(firsts)[:10], *found[5:15])
    store = purge(store, *sorted(firsts)[10:20], *found[20:30], erase=True)
    after = select_duplicates(store).tolist()
    assert after == by_hand(store) and 50 < len(after) < len(found)
    store = purge(store, *after)
    assert select_duplicates(store).tolist() == []
    assert api.verify(store.place).ok


def test_a_store_where_nothing_repeats(tmp_path: Path, tiny_encoder: Path) -> None:
    store = store_of(tmp_path / "store", tiny_encoder, [random_tokens(0, 300, 140)])
    assert select_duplicates(store).tolist() == []


@given(st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=20), st.sampled_from(["<u2", "<u4"]))
def test_hashes_are_equal_where_tokens_are(rows: list[list[int]], dtype: str) -> None:
    """Also of those that differ in what is padding of the other."""
    table = np.zeros((len(rows), 4), dtype)
    for row, tokens in enumerate(rows):
        table[row, : len(tokens)] = tokens
    number, counts = np.zeros(len(rows), np.int32), np.array([len(row) for row in rows], np.int32)
    chunks = Chunks(0, number, number, counts, table, np.ones(len(rows), np.bool_))
    hashes = list(map(tuple, token_hashes(chunks, np.arange(len(rows))).tolist()))
    for one, a in zip(rows, hashes, strict=True):
        for other, b in zip(rows, hashes, strict=True):
            assert (one == other) == (a == b)
