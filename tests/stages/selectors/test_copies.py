"""Copies of chunks: the rule against one of sets, planted copies, and what must not be selected."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selector_help import GRAM_HASHES, block_of, purge, random_tokens, scanned, store_of, weak_hashes

from retrotool import api
from retrotool.errors import UsageError
from retrotool.purge.selectors import ngrams
from retrotool.purge.selectors.copies import GRAM, CopyMatcher, NearDuplicates
from retrotool.purge.selectors.selector import TextBlock

LENGTH = 64


def matcher_of(originals: list[list[int]], length: int = LENGTH, share: float = 0.5, fewest: int = 1) -> CopyMatcher:
    tokens = np.zeros((len(originals), length), np.uint16)
    for row, original in enumerate(originals):
        tokens[row, : len(original)] = original
    return CopyMatcher(tokens, np.array([len(v) for v in originals]), share, fewest)


def selected(matcher: CopyMatcher, block: TextBlock) -> list[int]:
    hits = matcher(block)
    assert (hits.begin == -1).all() and (hits.end == -1).all() and (hits.labels == 0).all()
    return sorted(set(hits.rows.tolist()))


def by_rule(originals: list[list[int]], block: TextBlock, share: float, fewest: int = 1) -> list[int]:
    """The rule of the module, with sets."""
    chunks, length = block.chunks, block.chunks.tokens.shape[1]
    rows = [row[:n].tolist() for row, n in zip(chunks.tokens, chunks.n_tokens, strict=True)]
    found = set()
    for i, tokens in enumerate(rows):
        following: list[int] = []
        if i + 1 < len(rows) and chunks.doc[i] == chunks.doc[i + 1] and tokens:
            following = rows[i + 1]
        # (gram, tokens of it in the first chunk) of the place.
        held: list[tuple[tuple[int, ...], int]] = []
        pieces = [(0, tokens + following)] if len(tokens) == length else [(0, tokens), (len(tokens), following)]
        for offset, piece in pieces:
            for start in range(len(piece) - GRAM + 1):
                inside = min(max(len(tokens) - offset - start, 0), GRAM)
                held.append((tuple(piece[start : start + GRAM]), inside))
        for original in originals:
            wanted = {tuple(original[s : s + GRAM]) for s in range(len(original) - GRAM + 1)}
            if len(wanted) < fewest:
                if tokens and tokens == original:
                    found.add(i)
                continue
            if len({gram for gram, _ in held} & wanted) < Fraction(str(share)) * len(wanted):
                continue
            for gram, inside in held:
                if gram in wanted:
                    found |= {i} if inside >= 4 else set()
                    found |= {i + 1} if GRAM - inside >= 4 else set()
    return sorted(found)


def _joined(pieces: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int, list[int]]:
    """Targets, documents made of pieces of them and of few other tokens, the chunk length, erased rows."""
    length = draw(st.sampled_from([5, 8, 11, 16]))
    kinds = draw(st.sampled_from([1, 2, 5]))
    token = st.integers(0, kinds)
    originals = draw(st.lists(st.lists(token, max_size=length), min_size=1, max_size=5))
    piece = st.one_of(st.sampled_from(originals), st.lists(token, max_size=6))
    documents = draw(st.lists(st.lists(piece, max_size=5).map(_joined).filter(bool), min_size=1, max_size=5))
    erased = draw(st.lists(st.integers(0, 12), max_size=2))
    return originals, documents, length, erased


@given(
    corpora(),
    st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
    st.sampled_from([1, 2, 1024]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_it_selects_what_the_rule_selects(corpus: tuple, share: float, slices: int, weak: bool, fewest: int) -> None:
    originals, documents, length, erased = corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_SLICE_TOKENS", slices)
        patch.setattr(ngrams, "_AT_ONCE", slices)
        patch.setattr(ngrams, "gram_hashes", weak_hashes if weak else GRAM_HASHES)
        block = block_of(documents, length, erased)
        matcher = matcher_of(originals, length, share, fewest)
        assert selected(matcher, block) == by_rule(originals, block, share, fewest)


@pytest.mark.parametrize("hashes", [GRAM_HASHES, weak_hashes])
def test_chunks_of_64_of_text_like_tokens_too(hashes: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "gram_hashes", hashes)
    rng = np.random.default_rng(1)
    documents = [(rng.zipf(1.5, rng.integers(1, 700)) % 50).tolist() for _ in range(40)]
    documents += [d[rng.integers(0, 30) :] for d in documents[:20]]
    block = block_of([d for d in documents if d], LENGTH, [3, 50])
    originals = [block.chunks.tokens[r, : block.chunks.n_tokens[r]].tolist() for r in rng.choice(len(block), 40)]
    found = selected(matcher_of(originals), block)
    assert found == by_rule(originals, block, 0.5) and 40 < len(found) < len(block)


TARGET = random_tokens(0, LENGTH)
BEFORE, BEHIND = random_tokens(1, 200), random_tokens(2, 200)


def planted(shift: int, copy: list[int]) -> tuple[TextBlock, set[int]]:
    """A document with a copy ``shift`` tokens into its second chunk, after another; and the chunks that hold it."""
    document = BEFORE[: LENGTH + shift] + copy + BEHIND
    first, last = LENGTH + shift, LENGTH + shift + len(copy) - 1
    # A chunk that has three tokens of it at the most need not go.
    rows = {row for row in (1, 2) if min(last + 1, (row + 1) * LENGTH) - max(first, row * LENGTH) > 3}
    return block_of([BEHIND, document], LENGTH), {4 + row for row in rows}


@pytest.mark.parametrize("shift", range(64))
def test_a_copy_is_found_wherever_it_begins(shift: int) -> None:
    block, rows = planted(shift, TARGET)
    assert set(selected(matcher_of([random_tokens(5, 64), TARGET]), block)) == rows


def test_a_copy_with_one_token_changed_left_out_or_put_in_is_found() -> None:
    matcher = matcher_of([TARGET])
    for place in range(64):
        for shift in (0, 1, 31, 63):
            changes = [[*TARGET[:place], 1999, *TARGET[place + 1 :]], TARGET[:place] + TARGET[place + 1 :]]
            changes.append([*TARGET[:place], 1999, *TARGET[place:]])
            for copy in changes:
                block, rows = planted(shift, copy)
                found = set(selected(matcher, block))
                assert found and found <= rows, (place, shift)
                # Beside the token that was changed fewer than eight may be left at the border of a chunk.
                assert rows - found <= {min(rows), max(rows)} and (8 < place < 55 or found)


def test_a_half_is_enough_and_less_is_not() -> None:
    matcher = matcher_of([TARGET])  # 57 grams, of which 29 are needed: 36 tokens in a row
    assert selected(matcher, block_of([TARGET[:36]], LENGTH)) == [0]
    assert selected(matcher, block_of([TARGET[:35]], LENGTH)) == []
    assert selected(matcher, block_of([[*TARGET[20:35], 3, *TARGET[:35]]], LENGTH)) == []
    assert selected(matcher, block_of([[*TARGET[35:64], 3, *TARGET[:35]]], LENGTH)) == [0]


def test_of_two_copies_of_which_each_lies_in_two_chunks_all_are_found() -> None:
    """Two originals in a row, shifted by 40: the chunk between holds some of both."""
    one, two = random_tokens(10, 64), random_tokens(11, 64)
    block = block_of([BEFORE[:40] + one + two + BEHIND], LENGTH)
    assert selected(matcher_of([one]), block) == [0, 1]
    assert selected(matcher_of([two]), block) == [1, 2]
    assert selected(matcher_of([one, two]), block) == [0, 1, 2]


def test_two_halves_in_two_documents_or_beside_an_erased_chunk_are_no_copy() -> None:
    matcher = matcher_of([TARGET])
    half = block_of([BEFORE[:32] + TARGET[:32], TARGET[32:] + BEHIND], LENGTH)
    assert selected(matcher, half) == []
    gap = [BEFORE[:64] + BEFORE[:32] + TARGET[:32] + BEHIND[:64] + TARGET[32:]]
    assert selected(matcher, block_of(gap, LENGTH, [2])) == []
    assert selected(matcher, block_of([BEFORE[:32] + TARGET[:32] + TARGET[32:]], LENGTH)) == [0, 1]


def test_short_chunks_are_held_against_whole_chunks_only() -> None:
    matcher = matcher_of([[7, 0], [0] * 7, [5, 6, 7]])
    block = block_of([[7, 0], [7], [7, 0, 0], [0] * 7, [0] * 6, [0] * 8, [5, 6, 7], [*BEHIND[:64], 5, 6, 7]], LENGTH)
    assert selected(matcher, block) == [0, 3, 6, 8]


def test_what_repeats_itself_selects_all_that_do_unless_more_runs_are_asked_for() -> None:
    dashes = [5] * 64
    block = block_of([dashes, BEFORE[:50] + [5] * 14, BEHIND, [5] * 63], LENGTH)
    assert selected(matcher_of([dashes]), block) == [0, 1, 6]
    assert selected(matcher_of([dashes], fewest=2), block) == [0]
    copied, rows = planted(11, TARGET)
    assert set(selected(matcher_of([dashes, TARGET], fewest=57), copied)) == rows
    assert set(selected(matcher_of([dashes, TARGET], fewest=58), copied)) == set()


def test_text_that_is_everywhere_costs_no_more_than_it_occurs() -> None:
    """2,000 originals of licence text at all offsets, tables of few tokens, in a block that is made of nothing else."""
    rng = np.random.default_rng(0)
    licence = random_tokens(20, 2000)
    documents = []
    for i in range(1500):
        start = int(rng.integers(0, 1500))
        table = (rng.random(300) < 0.05).astype(int) * rng.integers(1, 5, 300)
        documents.append(
            random_tokens(100 + i, int(rng.integers(1, 64))) + licence[start : start + 400] + table.tolist()
        )
    block = block_of(documents, LENGTH)
    originals = [
        block.chunks.tokens[r, : block.chunks.n_tokens[r]].tolist() for r in rng.choice(len(block), 2000, False)
    ]
    matcher = matcher_of(originals)
    start_time = time.process_time()
    found = selected(matcher, block)
    seconds = time.process_time() - start_time
    assert len(found) > len(block) * 0.8
    assert seconds < len(block) * 2e-4, "0.2 ms a chunk at the very most; all pairs of originals would take 20"


def test_it_answers_several_threads_at_once() -> None:
    block, rows = planted(17, TARGET)
    matcher = matcher_of([TARGET])
    with ThreadPoolExecutor(4) as pool:
        assert all(set(found) == rows for found in pool.map(lambda _: selected(matcher, block), range(40)))


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    plain = [random_tokens(1000 + i, 30 + 37 * i % 400) for i in range(60)]
    copied = [random_tokens(3, shift) + TARGET + random_tokens(4, 90) for shift in range(64)]
    return [TARGET + random_tokens(6, 30), *plain, *copied]


def test_in_a_store_copies_are_found_in_all_parts(tmp_path: Path, tiny_encoder: Path, documents: list) -> None:
    store = store_of(tmp_path / "s", tiny_encoder, [[t % 150 + 5 for t in d] for d in documents], part_size=70)
    assert len(store.state.parts()) > 2
    selector = NearDuplicates((0,))
    assert selector.literal() == {"chunks": (0,)} and selector.kind == "near-duplicates-of"
    found = scanned(store, selector.open(store), rows=16)
    assert found == scanned(store, selector.open(store)) and found[0] == 0 and len(found) >= 64
    store = purge(store, found[3])
    assert found == scanned(store, selector.open(store)), "what is purged may still be erased"
    # The original is erased: its copies can be found by another of them only.
    store = purge(store, 0, erase=True)
    with pytest.raises(UsageError, match="all of these chunks are erased"):
        api.purge(store.place, api.Selectors(near_duplicates_of=0), dry_run=True)
    assert not scanned(store, selector.open(store)), "an erase that was killed goes on without them"
    assert scanned(store, NearDuplicates((0, found[5])).open(store))


def test_what_can_not_be_asked(tmp_path: Path, tiny_encoder: Path) -> None:
    store = store_of(tmp_path / "s", tiny_encoder, [[5, 6, 7]])
    for strange in (1, 1 << 32):
        (tmp_path / "ids").write_text(f"0\n{strange}\n")
        with pytest.raises(UsageError, match=f"line 2: the store has no chunk {strange}"):
            api.Selectors(near_duplicates_of=tmp_path / "ids").read(store)
    with pytest.raises(UsageError):
        api.Selectors(near_duplicates_of=()).read(store)
