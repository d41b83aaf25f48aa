"""Which index is chosen, and which wishes are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ann.choice import (
    DEFAULT_CODE,
    FLAT_LIMIT,
    ID_BYTES,
    IndexWishes,
    choose_index,
    count_lists,
    parse_factory,
)
from retrotool.errors import UsageError


@pytest.mark.parametrize(
    ("n", "d", "wanted", "factory"),
    [
        (0, 384, IndexWishes(), "SQfp16"),
        (1, 384, IndexWishes(), "SQfp16"),
        (FLAT_LIMIT, 384, IndexWishes(), "SQfp16"),
        (48_000, 384, IndexWishes(), "OPQ64,IVF1024,PQ64"),
        (10**9, 768, IndexWishes(), "OPQ64,IVF131072,PQ64"),
        (10**6, 32, IndexWishes(), "IVF4096,SQfp16"),
        (10**6, 312, IndexWishes(), "OPQ52,IVF4096,PQ52"),
        (10**6, 300, IndexWishes(), "OPQ60,IVF4096,PQ60"),
        (10**6, 97, IndexWishes(), "IVF4096,SQ8"),
        (10**6, 384, IndexWishes(target=0.9995), "IVF4096,SQfp16"),
        (10**6, 384, IndexWishes(memory=10**12), "IVF4096,SQfp16"),
        (10**6, 384, IndexWishes(memory=50 * 10**6), "OPQ32,IVF1024,PQ32"),
        (10**6, 384, IndexWishes(code="pq32"), "IVF4096,PQ32"),
        (10**6, 384, IndexWishes(nlist=100), "OPQ64,IVF100,PQ64"),
        (100, 384, IndexWishes(nlist=4), "IVF4,SQ8"),
        (10**6, 384, IndexWishes(nlist=0), "SQfp16"),
        (10**6, 384, IndexWishes(factory="OPQ32_256, IVF9, PQ32"), "OPQ32_256,IVF9,PQ32"),
    ],
)
def test_the_index_that_is_chosen(n: int, d: int, wanted: IndexWishes, factory: str) -> None:
    chosen = choose_index(n, d, wanted)
    assert chosen.factory == factory
    assert chosen.why and parse_factory(factory, d).factory == factory


@pytest.mark.parametrize(
    "wanted",
    [
        IndexWishes(factory="HNSW32"), IndexWishes(factory="IVF4,PQ0"), IndexWishes(factory="IVF0,Flat"),
        IndexWishes(factory="OPQ8,IVF4,PQ16"),
        IndexWishes(factory="OPQ8_0,IVF4,PQ8"), IndexWishes(factory="PQ16"), IndexWishes(factory="IVF4,PQ7"),
        IndexWishes(code="pq0"),
        IndexWishes(code="lsh"), IndexWishes(nlist=10**9), IndexWishes(nlist=-1), IndexWishes(nlist=0, code="pq64"),
        IndexWishes(factory="Flat", nlist=4), IndexWishes(factory=""),
    ],
)  # fmt: skip
def test_a_wish_that_can_not_be_had_is_refused(wanted: IndexWishes) -> None:
    with pytest.raises(UsageError) as error:
        choose_index(10**6, 384, wanted)
    assert str(error.value) and error.value.exit_code == 2


@given(st.integers(0, 10**11))
def test_lists_have_enough_vectors(n: int) -> None:
    nlist = count_lists(n)
    assert nlist & (nlist - 1) == 0
    assert n < 39 or n / nlist >= 39


@given(st.integers(0, 10**11), st.integers(1, 2048), st.integers(1, 10**13))
def test_what_is_chosen_for_a_memory_fits_it_or_says_that_it_does_not(n: int, d: int, memory: int) -> None:
    chosen = choose_index(n, d, IndexWishes(memory=memory))
    if chosen.nlist:
        size = n * chosen.bytes_per_vector + chosen.trained_bytes
        assert size <= memory or "from disk" in chosen.why
    default = choose_index(n, d)
    short = [m for m in range(4, DEFAULT_CODE + 1) if d % m == 0 and m <= d // 2]
    assert not default.pieces or not short or default.bytes_per_vector <= DEFAULT_CODE + ID_BYTES
