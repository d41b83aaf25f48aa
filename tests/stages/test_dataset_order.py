"""Slots, orders and shares: every chunk in one slot, every sequence once, equally many for each rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrotool.train.dataset import Order, Share, cut_spans, length, slots_of

COUNTS = st.lists(st.integers(0, 9), max_size=40).map(lambda counts: np.array(counts, np.int64))


def slow_slots(live: list[bool], doc: list[int], size: int, packed: bool) -> list[list[int]]:
    """One row after the other."""
    found: list[list[int]] = []
    last = None
    for row, (alive, document) in enumerate(zip(live, doc, strict=True)):
        if not alive:
            continue
        if not found or len(found[-1]) == size or (not packed and document != last):
            found.append([])
        found[-1].append(row)
        last = document
    return [slots + [-1] * (size - len(slots)) for slots in found]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60), st.integers(1, 7), st.booleans())
def test_slots_are_those_of_one_row_after_the_other(rows: list[tuple[bool, int]], size: int, packed: bool) -> None:
    live = [alive for alive, _ in rows]
    doc = np.cumsum([step for _, step in rows]).tolist()
    found = slots_of(np.array(live, np.bool_), np.array(doc, np.int32), size, packed=packed)
    assert found.tolist() == slow_slots(live, doc, size, packed)
    assert found.shape[1] == size


def read(order: Order, spans: list[tuple[int, int]], skip: int = 0) -> list[tuple[int, int, int]]:
    return [
        (first + i, int(block), int(sequence))
        for first, blocks, sequences in order.pieces(spans, skip)
        for i, (block, sequence) in enumerate(zip(blocks, sequences, strict=True))
    ]


@given(COUNTS, st.none() | st.integers(0, 5), st.integers(0, 3), st.integers(1, 6))
def test_an_order_has_every_sequence_once(counts: np.ndarray, seed: int | None, epoch: int, mixed: int) -> None:
    order = Order(counts, seed, epoch, mixed)
    found = read(order, [(0, len(order))])
    everything = [(block, sequence) for block, n in enumerate(counts.tolist()) for sequence in range(n)]
    assert sorted(found_[1:] for found_ in found) == everything
    assert [place for place, _, _ in found] == list(range(len(order)))
    if seed is None:
        assert [found_[1:] for found_ in found] == everything


@given(COUNTS, st.data())
def test_spans_of_an_order_are_cut_out_of_it(counts: np.ndarray, data: st.DataObject) -> None:
    order = Order(counts, data.draw(st.none() | st.integers(0, 5)), 0, data.draw(st.integers(1, 4)))
    whole = [found[1:] for found in read(order, [(0, len(order))])]
    edges = sorted(data.draw(st.lists(st.integers(0, len(order)), min_size=4, max_size=4)))
    spans = [(edges[0], edges[1]), (edges[2], edges[3])]
    chosen = whole[edges[0] : edges[1]] + whole[edges[2] : edges[3]]
    skip = data.draw(st.integers(0, len(chosen)))
    found = read(order, spans, skip)
    assert [some[1:] for some in found] == chosen[skip:]
    assert [some[0] for some in found] == list(range(skip, len(chosen)))


def test_a_window_is_of_as_many_blocks_from_anywhere_and_mixes_them() -> None:
    order = Order(np.full(400, 50), 3, 0, 16)
    windows = [block for _, block, _ in order.pieces([(0, len(order))])]
    assert [len(np.unique(block)) for block in windows] == [16] * 25
    for block in windows:
        assert np.ptp(block) > 200
        blocks = len(np.unique(block[:50]))
        assert blocks > 12, "a few sequences are of nearly all blocks of a window"
    other = Order(np.full(400, 50), 3, 1, 16)
    first, again = (read(some, [(0, 50)]) for some in (order, other))
    assert first != again


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4).map(
    lambda pairs: [(1000 * i + low, 1000 * i + low + n) for i, (low, n) in enumerate(pairs)]
)


def places(spans: list[tuple[int, int]]) -> list[int]:
    return [place for start, stop in spans for place in range(start, stop)]


@given(SPANS, st.integers(0, 70), st.integers(0, 70))
def test_cutting_spans_is_cutting_their_places(spans: list[tuple[int, int]], low: int, high: int) -> None:
    assert places(cut_spans(spans, low, high)) == places(spans)[low:high]
    assert length(spans) == len(places(spans))


@given(SPANS, st.integers(1, 6), st.integers(0, 4), st.data())
def test_ranks_read_equally_many_and_together_everything(
    spans: list[tuple[int, int]], ranks: int, whole: int, data: st.DataObject
) -> None:
    shares = [Share(tuple(spans), rank, ranks, whole) for rank in range(ranks)]
    lengths = {len(share) for share in shares}
    assert len(lengths) == 1
    n = lengths.pop()
    read = [places(share.of(share.rank)) for share in shares]
    together = [place for own in read for place in own]
    if whole:
        assert together == places(spans)[: len(together)]
        assert n % whole == 0 and length(spans) - len(together) < whole * ranks
        assert {len(own) for own in read} == {n}
    else:
        assert together == places(spans)
        assert {len(own) for own in read} <= {n - 1, n}
    consumed = data.draw(st.integers(0, n))
    left = places(shares[0].left(consumed))
    done = [place for own in read for place in own[:consumed]]
    assert sorted(left + done) == places(spans)
