"""Which index is chosen, and which requests are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ann.choice import (
    DEFAULT_CODE,
    FLAT_LIMIT,
    ID_BYTES,
    IndexOptions,
    choose_index,
    count_lists,
    parse_factory,
)
from retrotool.errors import UsageError


@pytest.mark.parametrize(
    ("n", "d", "wanted", "factory"),
    [
        (0, 384, IndexOptions(), "SQfp16"),
        (1, 384, IndexOptions(), "SQfp16"),
        (FLAT_LIMIT, 384, IndexOptions(), "SQfp16"),
        (48_000, 384, IndexOptions(), "OPQ64,IVF1024,PQ64"),
        (10**9, 768, IndexOptions(), "OPQ64,IVF131072,PQ64"),
        (10**6, 32, IndexOptions(), "IVF4096,SQfp16"),
        (10**6, 312, IndexOptions(), "OPQ52,IVF4096,PQ52"),
        (10**6, 300, IndexOptions(), "OPQ60,IVF4096,PQ60"),
        (10**6, 97, IndexOptions(), "IVF4096,SQ8"),
        (10**6, 384, IndexOptions(target=0.9995), "IVF4096,SQfp16"),
        (10**6, 384, IndexOptions(memory=10**12), "IVF4096,SQfp16"),
        (10**6, 384, IndexOptions(memory=50 * 10**6), "OPQ32,IVF1024,PQ32"),
        (10**6, 384, IndexOptions(code="pq32"), "IVF4096,PQ32"),
        (10**6, 384, IndexOptions(nlist=100), "OPQ64,IVF100,PQ64"),
        (100, 384, IndexOptions(nlist=4), "IVF4,SQ8"),
        (10**6, 384, IndexOptions(nlist=0), "SQfp16"),
        (10**6, 384, IndexOptions(factory="OPQ32_256, IVF9, PQ32"), "OPQ32_256,IVF9,PQ32"),
    ],
)
def test_the_index_that_is_chosen(n: int, d: int, wanted: IndexOptions, factory: str) -> None:
    chosen = choose_index(n, d, wanted)
    assert chosen.factory == factory
    assert chosen.why and parse_factory(factory, d).factory == factory


@pytest.mark.parametrize(
    "wanted",
    [
        IndexOptions(factory="HNSW32"), IndexOptions(factory="IVF4,PQ0"), IndexOptions(factory="IVF0,Flat"),
        IndexOptions(factory="OPQ8,IVF4,PQ16"),
        IndexOptions(factory="OPQ8_0,IVF4,PQ8"), IndexOptions(factory="PQ16"), IndexOptions(factory="IVF4,PQ7"),
        IndexOptions(code="pq0"),
        IndexOptions(code="lsh"), IndexOptions(nlist=10**9), IndexOptions(nlist=-1), IndexOptions(nlist=0, code="pq64"),
        IndexOptions(factory="Flat", nlist=4), IndexOptions(factory=""),
    ],
)  # fmt: skip
def test_a_wish_that_can_not_be_had_is_refused(wanted: IndexOptions) -> None:
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
    chosen = choose_index(n, d, IndexOptions(memory=memory))
    if chosen.nlist:
        size = n * chosen.bytes_per_vector + chosen.trained_bytes
        assert size <= memory or "from disk" in chosen.why
    default = choose_index(n, d)
    short = [m for m in range(4, DEFAULT_CODE + 1) if d % m == 0 and m <= d // 2]
    assert not default.pieces or not short or default.bytes_per_vector <= DEFAULT_CODE + ID_BYTES
