"""Cutting a text changes none of its tokens."""

from __future__ import annotations

import json
import re

import awkward
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ranges import runs_up_to
from retrotool.tokenizers import Tokenizer, TokenizerFile
from retrotool.tokenizers.cut import cut_texts, isolate_tabs, places_beside_digits, tabs_to_isolate

CUTTABLE = [kind for kind in awkward.KINDS if kind != "unigram"]
sizes = st.tuples(st.integers(1, 8), st.integers(1, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(texts=st.lists(awkward.texts, max_size=6), limits=sizes)
def test_pieces_are_the_texts_in_order(texts, limits):
    least, most = limits
    pieces, counts = cut_texts(texts, least, most)
    assert len(counts) == len(texts)
    ends = np.cumsum(counts)
    assert ["".join(pieces[end - n : end]) for end, n in zip(ends, counts, strict=True)] == texts
    for end, n in zip(ends, counts, strict=True):
        assert all(len(piece) >= least for piece in pieces[end - n : end - 1])


@pytest.mark.parametrize("kind", CUTTABLE)
@given(text=awkward.texts, limits=sizes)
def test_tokens_of_the_pieces_are_those_of_the_text(kind, text, limits):
    tokenizer = loaded(kind)
    pieces, _ = cut_texts([text], *limits)
    assert [token for tokens in tokenizer.encode_batch(pieces) for token in tokens] == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("kind", CUTTABLE)
def test_real_text_is_cut_often_and_keeps_its_tokens(kind):
    tokenizer = loaded(kind)
    pieces, counts = cut_texts(awkward.TOPICS, 10, 40)
    assert len(pieces) > sum(map(len, awkward.TOPICS)) / 200
    flat, _ = tokenizer.encode_flat(pieces)
    assert np.array_equal(flat, tokenizer.encode_flat(awkward.TOPICS)[0])
    assert sum(counts) == len(pieces)


@pytest.mark.parametrize("kind", [kind for kind in CUTTABLE if kind != "wordpiece"])
@given(text=st.text("aB01.\\x/'|é ", min_size=20, max_size=60) | awkward.texts, limits=sizes)
def test_cuts_beside_digits_change_no_token(kind, text, limits):
    inside = places_beside_digits(json.loads(awkward.made(kind)))
    assert inside is not None
    pieces, _ = cut_texts([text], *limits, inside=inside)
    tokenizer = loaded(kind)
    assert [token for tokens in tokenizer.encode_batch(pieces) for token in tokens] == tokenizer.encode_batch([text])[0]
    assert len(cut_texts(["\\25\\17\\x00\\x18" * 5], 4, 8, inside=inside)[0]) > 5


def test_added_tokens_are_not_cut_beside_digits():
    fields = json.loads(awkward.made("byte-level"))
    fields["added_tokens"].append({"content": "<|reserved_0|>"})
    inside = places_beside_digits(fields)
    assert inside and inside.search("x0") and not inside.search("0|")
    fields["added_tokens"].append({"content": "[unused1]"})
    assert places_beside_digits(fields) is None
    assert places_beside_digits(json.loads(awkward.made("wordpiece"))) is None


@pytest.mark.parametrize("kind", ["o200k", "llama3"])
@given(texts=st.lists(awkward.texts, max_size=6))
def test_tabs_are_isolated_without_changing_a_token(kind, texts):
    tokenizer = loaded(kind)
    tab = tabs_to_isolate(json.loads(awkward.made(kind)))
    assert tab is not None
    pieces, counts = isolate_tabs(texts, [True] * len(texts), tab)
    assert ("".join(pieces), sum(counts)) == ("".join(texts), len(pieces))
    flat = [token for tokens in tokenizer.encode_batch(pieces) for token in tokens]
    assert flat == [token for tokens in tokenizer.encode_batch(texts) for token in tokens]
    assert not any(re.search(r"[^\t]\t[!-/:;=-@{-~]|\t[!-/:;=-@{-~].", piece) for piece in pieces), "they are alone"


@pytest.mark.parametrize(
    ("kind", "added"),
    [("cl100k", {}), ("byte-level", {}), ("llama3", {"lstrip": True}), ("llama3", {"rstrip": True}),
     ("llama3", {"content": "\t."})],
)  # fmt: skip
def test_tabs_are_left_where_tokens_reach_over_them(kind, added):
    fields = json.loads(awkward.made(kind))
    fields["added_tokens"].append({"content": "[X]", **added})
    assert tabs_to_isolate(fields) is None


def test_only_chosen_texts_are_cut():
    texts = ["one two three four", "five six seven eight"]
    pieces, counts = cut_texts(texts, 3, 6, [False, True])
    assert pieces[0] == texts[0]
    assert "".join(pieces[1:]) == texts[1]
    assert counts == [1, len(pieces) - 1]
    assert len(pieces) > 3


def test_runs_hold_consecutive_texts():
    texts = ["a" * n for n in (1, 5, 3, 20, 1, 1)]
    runs = list(runs_up_to(8, texts, len))
    assert [text for run in runs for text in run] == texts
    assert [sum(map(len, run)) for run in runs] == [6, 3, 20, 2]


def loaded(kind: str) -> Tokenizer:
    return Tokenizer(TokenizerFile(kind, awkward.made(kind)))
