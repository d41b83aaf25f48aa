"""Sets of grams in places, against Python's sets; hashes, runs of chunks and distinct rows against the plain way."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from conftest import times
from hypothesis import given
from hypothesis import strategies as st

from retrotool.purge.selectors import ngrams
from retrotool.purge.selectors.ngrams import GramSets, distinct, distinct_rows, follows, gram_hashes, reach
from retrotool.store.parts import Chunks

Sets = list[frozenset[int]]


def sets_of(sets: Sets, share: float) -> GramSets:
    """Sets of single tokens."""
    pairs = [(token, owner) for owner, some in enumerate(sets) for token in some]
    table = np.array([token for token, _ in pairs], np.uint16).reshape(-1, 1)
    return GramSets(table, np.array([owner for _, owner in pairs], np.int64), share)


def matches(found: GramSets, places: Sets, close: bool) -> set[tuple[int, int, int]]:
    """(place, size of the set, shared) of all that is found; ``close``: of each place only until the first."""
    tokens = np.array([token for place in places for token in sorted(place)], np.uint16)
    place = np.repeat(np.arange(len(places)), [len(some) for some in places])
    at, hashes, _ = found.likely(tokens)
    at, gram = found.identify(tokens, at, hashes)
    entries, (even,) = found.entries(place[at], gram, tokens[at] % 2 == 0)
    closed = np.zeros(len(places), np.bool_)
    result = set()
    for shared in found.shared(entries, closed):
        assert shared.count.tolist() == np.bincount(shared.of, minlength=len(shared.place)).tolist()
        assert not closed[shared.place].any()
        sizes = found.size[shared.owner].tolist()
        result |= set(zip(shared.place.tolist(), sizes, shared.count.tolist(), strict=True))
        n = len(shared.place)
        odd, flagged = (np.bincount(shared.of[flags[shared.entry]], minlength=n) > 0 for flags in (~even, even))
        assert (odd | flagged).all()
        if close:
            closed[shared.place] = True
    return result


def by_sets(sets: Sets, places: Sets, share: float) -> set[tuple[int, int, int]]:
    return {
        (i, len(some), len(some & place))
        for i, place in enumerate(places)
        for some in sets
        if len(some & place) >= max(Fraction(str(share)) * len(some), 1)
    }


some_sets = st.lists(st.frozensets(st.integers(0, 15), min_size=1, max_size=8), min_size=1, max_size=40)


@given(some_sets, some_sets, st.sampled_from([0.1, 0.5, 0.8, 1.0]), st.sampled_from([1, 5, 1 << 18]))
def test_places_that_have_enough_of_a_set_are_found(sets: Sets, places: Sets, share: float, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_AT_ONCE", at_once)
        found = sets_of(sets, share)
        assert len(found) == len(set(sets)), "sets that are equal are one"
        due = by_sets(sets, places, share)
        assert matches(found, places, close=False) == due
        assert {place for place, _, _ in matches(found, places, close=True)} == {place for place, _, _ in due}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_of_many_sets_with_the_same_grams_the_right_ones_are_found(share: float) -> None:
    """All triples of 16 tokens: each token is in 105 sets, so several rounds are needed."""
    sets = [frozenset(some) for some in itertools.combinations(range(16), 3)]
    places = [frozenset({i, (i + 5) % 16, (i + 9) % 16}) for i in range(16)]
    found = sets_of(sets, share)
    tokens = np.array([token for place in places for token in sorted(place)], np.uint16)
    at, gram = found.identify(tokens, *found.likely(tokens)[:2])
    entries, _ = found.entries(np.arange(len(tokens))[at] // 3, gram)
    pairs = {
        (int(p), int(o))
        for shared in found.shared(entries, np.zeros(16, np.bool_))
        for p, o in zip(shared.place, shared.owner, strict=True)
    }
    needed = 3 if share == 1 else 2
    assert len(pairs) == sum(len(some & place) >= needed for some in sets for place in places)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 20))
def test_hashes_are_those_of_the_runs(tokens: list[int], n: int) -> None:
    hashes = gram_hashes(np.array(tokens, np.uint16), n)
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert len(hashes) == len(runs)
    own = [int(gram_hashes(np.array(run, np.uint32), n)[0]) for run in runs]
    assert hashes.tolist() == own
    assert len(set(own)) == len(set(runs)), "no collision among so few"


def test_few_hashes_collide() -> None:
    """Of a million runs some 116 pairs by chance; tokens that come in order, or in another order, are no worse."""
    rng, size = np.random.default_rng(0), times(1 << 18, 1 << 20)
    for tokens in (rng.integers(0, 30000, size), np.arange(size) % 65521, rng.integers(0, 12, size)):
        for n in (8, 13):
            table = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint16), n)
            runs = len(distinct_rows(table)[0])
            assert runs - len(distinct(gram_hashes(tokens.astype(np.uint16), n))) < times(
                30, 250
            )  # by chance 7, and 116


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 5), min_size=1, max_size=30), st.sampled_from(["<u2", "<u4"]))
def test_distinct_rows_are_those_of_numpy(rows: list[tuple[int, ...]], dtype: str) -> None:
    table = np.array(rows, dtype)
    kept, which = distinct_rows(table)
    assert {tuple(row) for row in table[kept].tolist()} == set(rows) and len(kept) == len(set(rows))
    assert np.array_equal(table[kept][which], table)
    assert distinct(table[:, 0]).tolist() == sorted({row[0] for row in rows})


def test_tokens_go_on_in_the_next_chunk_of_the_same_text_if_a_chunk_is_full() -> None:
    n_tokens = np.array([4, 4, 2, 4, 0, 4, 3, 2, 4, 4, 1])
    doc = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    key = np.array([True] * 8 + [True, False, False])
    chunks = Chunks(0, doc, doc, n_tokens, np.zeros((11, 4), np.uint16), key)
    follow = follows(chunks, n_tokens)
    assert follow.tolist() == [True, True, False, False, False, True, True, False, False, True, False]
    # The chunk of three tokens is not full: nothing goes on behind it.
    assert reach(n_tokens, follow, 4).tolist() == [10, 6, 2, 4, 0, 7, 3, 2, 4, 5, 1]
