"""The guard finds out what a tokenizer gets wrong: here an exact one that is made to be wrong somewhere."""

from __future__ import annotations

import functools
import re

import awkward
import numpy as np
import pytest

from retrotool.tokenizers import Tokenizer, TokenizerFile
from retrotool.tokenizers.equivalence import Findings, Guard, differing


@pytest.fixture(scope="module")
def exact():
    """An exact way to encode; what guards ask all of them for is encoded once."""
    encode = Tokenizer(TokenizerFile("byte-level", awkward.made("byte-level"))).encode_flat
    known = functools.cache(lambda texts: encode(list(texts)))
    return lambda texts: known(tuple(texts))


def wrong_at(exact, pattern: str):
    """As ``exact``, but with another first token for texts in which ``pattern`` occurs."""

    def encode(texts):
        ids, lengths = exact(texts)
        ids = ids.copy()
        starts = np.cumsum(lengths) - lengths
        for i, text in enumerate(texts):
            if lengths[i] and re.search(pattern, text):
                ids[starts[i]] += 1
        return ids, lengths

    return encode


CLEAN = ["plain text, and more of it.\nA line", "x = 1", "naïve"]


def explored(whole, split=None, **options) -> Guard:
    guard = Guard(whole, Findings("any"))
    guard.explore(split or whole, longest=600, **options)
    return guard


def guarded(exact, pattern: str) -> Guard:
    guard = explored((wrong_at(exact, pattern), exact))
    assert guard.findings.why == ""
    return guard


@pytest.mark.parametrize(
    ("pattern", "unsafe"),
    [
        ("q;", ["q;", "a q; b", "é q;"]),
        ("\t'", ["say\t'it'", "\t'"]),
        ("~", ["~", "a~b"]),
        ("\n +\n", ["a\n \nb", "a\n" + " " * 77 + "\nb", "é\n  \n"]),
        (" {17,}\r", ["a" + " " * 17 + "\r", "é" + " " * 40 + "\r"]),
        ("ж", ["жизнь", "a ж"]),
        ("一'", ["一's", "x 一'"]),
    ],
)
def test_what_is_wrong_is_unsure_and_other_text_is_not(exact, pattern, unsafe):
    guard = guarded(exact, pattern)
    assert guard.unsure(unsafe).all()
    assert not guard.unsure(CLEAN).any()
    texts = [*CLEAN, *unsafe]
    assert guard.unsure(texts).tolist() == [False] * len(CLEAN) + [True] * len(unsafe)


def test_with_nothing_wrong_everything_is_sure_but_what_python_does_not_know(exact):
    guard = explored((exact, exact))
    assert (guard.findings.substrings, guard.findings.runs, guard.findings.why) == ((), (), "")
    assert not guard.unsure([*awkward.TOPICS, *awkward.SAMPLES]).any()
    assert guard.unsure(["\U000e0fff", "a \u0378"]).all()  # no characters of Unicode


def test_one_that_is_wrong_in_many_ways_is_not_used(exact):
    pair = (wrong_at(exact, "[a-z][A-Z]|[0-9][a-f]|[;:][!-/]"), exact)
    assert "pairs of ASCII characters" in explored(pair).findings.why


def test_one_that_is_wrong_where_no_sign_tells_is_not_used(exact):
    pair = (wrong_at(exact, "^(..)*.$"), exact)  # every text of odd length
    assert explored(pair).findings.why


def test_added_tokens_that_are_found_otherwise_are_unsure(exact):
    pair = (wrong_at(exact, re.escape("<|end|>")), exact)
    split = (exact, exact)
    guard = explored(pair, split, added=["<|end|>", "<|other|>"])
    assert guard.unsure(["a<|end|>b", "a<|other|>b"]).tolist() == [True, False]


def test_texts_differ_by_length_or_by_ids(exact):
    one, other = exact(["same", "two words here", "abc"]), exact(["same", "two words", "abd"])
    assert differing(one, other).tolist() == [False, True, True]
    assert differing(one, one).tolist() == [False, False, False]
