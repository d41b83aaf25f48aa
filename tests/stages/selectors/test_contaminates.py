"""Documents like evaluation text: the Jaccard similarity against sets, planted documents, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selector_help import GRAM_HASHES, block_of, purge, random_tokens, scanned, store_of, weak_hashes
from stored import stored_file

from retrotool.errors import StoreNotFoundError, UsageError
from retrotool.purge.selectors import ngrams
from retrotool.purge.selectors.contaminates import Contaminates, ContaminationMatcher, read_evaluation
from retrotool.purge.selectors.ngrams import GramSets
from retrotool.store import parts
from retrotool.store.store import Store


def runs(
    tokens: list[int], length: int, erased: set[int], first: int, n: int
) -> tuple[set[tuple[int, ...]], list[int]]:
    """The n-grams of a document whose first row is ``first``, and all of its tokens, without the erased rows."""
    found: set[tuple[int, ...]] = set()
    left: list[int] = []
    run: list[int] = []
    for index, start in enumerate(range(0, len(tokens), length)):
        if first + index in erased:
            run = []
            continue
        run = run + tokens[start : start + length]
        left += tokens[start : start + length]
        found |= {tuple(run[i : i + n]) for i in range(len(run) - n + 1)}
    return found, left


def by_rule(evaluation: list, documents: list, length: int, erased: set[int], n: int, share: float) -> list[int]:
    theirs = [runs(tokens, length, set(), 0, n) for tokens in evaluation]
    rows, first = [], 0
    for tokens in documents:
        ours, left = runs(tokens, length, erased, first, n)
        count = -(-len(tokens) // length)
        alike = [
            Fraction(len(ours & other), len(ours | other)) >= Fraction(str(share)) if ours and other
            else bool(left) and not ours and not other and left == whole
            for other, whole in theirs
        ]  # fmt: skip
        rows += [row for row in range(first, first + count) if any(alike) and row not in erased]
        first += count
    return rows


def matcher_of(evaluation: list[list[int]], n: int, share: float) -> ContaminationMatcher:
    windows = [(tokens[i : i + n], who) for who, tokens in enumerate(evaluation) for i in range(len(tokens) - n + 1)]
    table = np.array([w for w, _ in windows], np.uint16).reshape(-1, n)
    short = {np.array(tokens, "<u4").tobytes() for tokens in evaluation if len(tokens) < n}
    return ContaminationMatcher(GramSets(table, np.array([w for _, w in windows], np.int64), share), short)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Evaluation documents, and documents that are them, changed a little or much; erased rows."""
    token = st.integers(0, draw(st.sampled_from([0, 1, 3])))
    evaluation = draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=5))
    documents = []
    for _ in range(draw(st.integers(1, 6))):
        document = list(draw(st.sampled_from(evaluation)))
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, len(document)))
            document[place : place + draw(st.integers(0, 2))] = draw(st.lists(token, max_size=2))
        documents.append(document or [0])
    return evaluation, documents, draw(st.lists(st.integers(0, 12), max_size=2))


@given(
    corpora(), st.sampled_from([1, 2, 3, 5]), st.sampled_from([3, 8, 64]), st.sampled_from([0.3, 0.8, 1.0]),
    st.booleans(), st.sampled_from([1, 7, 1 << 16]),
)  # fmt: skip
def test_it_selects_what_the_rule_selects(
    corpus: tuple, n: int, length: int, share: float, weak: bool, slices: int
) -> None:
    evaluation, documents, erased = corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "gram_hashes", weak_hashes if weak else GRAM_HASHES)
        patch.setattr(ngrams, "_SLICE_TOKENS", slices)
        patch.setattr(ngrams, "_AT_ONCE", slices)
        hits = matcher_of(evaluation, n, share)(block_of(documents, length, erased))
    assert hits.rows.tolist() == by_rule(evaluation, documents, length, set(erased), n, share)


QUESTION = random_tokens(0, 500)


@pytest.fixture
def evaluation(tmp_path: Path, tiny_encoder: Path) -> Store:
    """The question, in chunks of another length, a short one, and questions that all share a heading."""
    heading = [[*([5] * 40), *random_tokens(50 + i, 60, 140)] for i in range(200)]
    documents = [[t % 140 for t in QUESTION], [7, 7, 7], *heading]
    return store_of(tmp_path / "evaluation", tiny_encoder, documents, chunk_length=48)


def documents_of(store: Store, ids: list[int]) -> set[int]:
    """Numbers of the documents of a store in one part that have these chunks, all of them."""
    chunks = parts.read_chunks(store, 0)
    found = {int(chunks.doc[i]) for i in ids}
    assert ids == np.flatnonzero(np.isin(chunks.doc, list(found))).tolist()
    return found


def test_copies_and_near_copies_of_evaluation_documents_are_found(
    tmp_path: Path, tiny_encoder: Path, evaluation: Store
) -> None:
    question = [t % 140 for t in QUESTION]
    changed = {i: [*question] for i in (1, 2, 3, 4, 5)}
    for count, document in changed.items():
        for place in range(count):
            document[60 * place + 30] = 149  # each takes 13 of 488 runs away, and adds as many
    documents = [question, question[:440], question[:300], random_tokens(9, 40, 140) + question, [7, 7, 7], [7, 7]]
    documents += [random_tokens(8, 400, 140) + question, [*([5] * 300)], *changed.values()]
    store = store_of(tmp_path / "store", tiny_encoder, documents)
    selector = Contaminates(evaluation.place)
    assert selector.literal() == {"evaluation": evaluation.place, "as_of": ""}
    # 428/488 of a part; 488/528; with k changed tokens (488 − 13 k) / (488 + 13 k): 0.81 with four, 0.77 with five
    # (places are in order: whole, 440, 300, 40 before, short, ..., one to five changed).
    assert documents_of(store, scanned(store, selector.open(store))) == {0, 1, 3, 4, 8, 9, 10, 11}
    exact = read_evaluation(evaluation, 13, 1.0)
    assert documents_of(store, scanned(store, exact)) == {0, 4}


def test_what_is_purged_from_the_evaluation_store_does_not_count(
    tmp_path: Path, tiny_encoder: Path, evaluation: Store
) -> None:
    question = [t % 140 for t in QUESTION]
    store = store_of(tmp_path / "store", tiny_encoder, [question, question[:240], [7, 7, 7]])
    selector = Contaminates(evaluation.place)
    assert documents_of(store, scanned(store, selector.open(store))) == {0, 2}
    purge(evaluation, *range(5, 12))  # of 500 tokens 240 are left, and the short one goes
    assert documents_of(store, scanned(store, selector.open(store))) == {1}
    store = purge(store, 8)
    assert documents_of(store, scanned(store, selector.open(store))) == {1}, "purged chunks of the store do"


def test_what_can_not_be_compared_is_refused(tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path) -> None:
    store = store_of(tmp_path / "store", tiny_encoder, [[7, 8]])
    other = store_of(tmp_path / "other", byte_level_tokenizer, [[7, 8]])
    with pytest.raises(UsageError, match="tokenizer") as error:
        Contaminates(other.place).open(store)
    assert f"--tokenizer {Path(store.place) / store.identity.tokenizer.file}" in error.value.advice
    assert stored_file(store, store.identity.tokenizer.file).exists()
    with pytest.raises(StoreNotFoundError):
        Contaminates(str(tmp_path / "none")).open(store)
    empty = purge(store_of(tmp_path / "empty", tiny_encoder, [[7, 8]]), 0)
    with pytest.raises(UsageError, match="no live text"):
        Contaminates(empty.place).open(store)
