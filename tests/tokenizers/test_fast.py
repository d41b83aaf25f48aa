"""The fast tokenizer gives the ids of `tokenizers`, whatever the text; what it may get wrong goes another way."""

from __future__ import annotations

import os
from dataclasses import asdict

import awkward
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import UsageError
from retrotool.tokenizers import FastTokenizer, Tokenizer, TokenizerFile, TokensDiffer, equivalence
from retrotool.tokenizers import fast as fast_module

FAST = ("byte-level", "nfc", "wordpiece")
"""Kinds that tokie is used for with these vocabularies; with the others it may be found to differ too often."""


@pytest.fixture(scope="module")
def tokenizers_of() -> dict[str, tuple[Tokenizer, FastTokenizer]]:
    """Each kind, exact and fast; nothing is compared while it is used."""
    found = {}
    for kind in awkward.KINDS:
        exact = Tokenizer(TokenizerFile(kind, awkward.made(kind)))
        found[kind] = (exact, FastTokenizer(exact, check=0, first=0))
    return found


long_texts = st.lists(st.tuples(awkward.texts, st.integers(1, 60)), max_size=6).map(
    lambda pieces: "".join(text * times for text, times in pieces)
)


@pytest.mark.parametrize("kind", awkward.KINDS)
@given(texts=st.lists(awkward.texts | long_texts, max_size=5))
def test_ids_are_those_of_tokenizers(kind, texts, tokenizers_of):
    exact, fast = tokenizers_of[kind]
    ids, lengths = fast.encode_flat(texts)
    expected = exact.encode_batch(texts)
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert ids.tolist() == [token for tokens in expected for token in tokens]


@pytest.mark.parametrize("kind", awkward.KINDS)
def test_ids_of_real_text_are_those_of_tokenizers(kind, tokenizers_of):
    exact, fast = tokenizers_of[kind]
    ids, lengths = fast.encode_flat(awkward.TOPICS)
    expected, counts = exact.encode_flat(awkward.TOPICS)
    assert np.array_equal(ids, expected)
    assert np.array_equal(lengths, counts)


@pytest.mark.parametrize("kind", FAST)
def test_most_text_goes_the_fast_way(kind, tokenizers_of, monkeypatch):
    _, fast = tokenizers_of[kind]
    assert (fast.engine, fast.why) == ("tokie", "")
    quick = 0
    encode = fast._fast

    def counted(texts):
        nonlocal quick
        quick += sum(map(len, texts))
        return encode(texts)

    monkeypatch.setattr(fast, "_fast", counted)
    fast.encode_flat(awkward.TOPICS)
    assert quick > 0.85 * sum(map(len, awkward.TOPICS))


@pytest.mark.parametrize("kind", ["byte-level", "cl100k", "wordpiece"])
def test_findings_are_as_good_as_finding_out(kind, tokenizers_of):
    exact, fast = tokenizers_of[kind]
    found = fast.findings
    again = type(found).from_json(orjson.loads(orjson.dumps(asdict(found))))
    assert again == found
    other = FastTokenizer(exact, check=0, first=0, findings=again)
    assert (other.engine, other.findings) == (fast.engine, found)
    texts = [*awkward.SAMPLES, *awkward.TOPICS[:20]]
    assert np.array_equal(other.encode_flat(texts)[0], fast.encode_flat(texts)[0])


def test_findings_are_kept_for_the_next_store_and_found_again_where_that_fails(tokenizers_of, tmp_path, monkeypatch):
    exact, fast = tokenizers_of["wordpiece"]
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path / "cache"))
    assert FastTokenizer(exact).findings == fast.findings
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    compared, unlike = [], equivalence._unlike
    monkeypatch.setattr(equivalence, "_unlike", lambda *pair: compared.append(pair) or unlike(*pair))
    assert FastTokenizer(exact).findings == fast.findings and not compared
    for damage in (kept.read_bytes()[:-9], b"[]"):
        kept.write_bytes(damage)
        assert FastTokenizer(exact).findings == fast.findings and compared
        assert kept.stat().st_size > 50, "and kept again"
        compared.clear()
    monkeypatch.setenv("RETROTOOL_CACHE", os.devnull)
    assert FastTokenizer(exact).findings == fast.findings, "a folder that can't be made is no reason to stop"
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fast_module, "library_versions", lambda: "others")
    compared.clear()
    assert FastTokenizer(exact).findings.versions == "others" and compared


def test_states_of_code_points_are_kept_with_those_of_others(tokenizers_of, tmp_path, monkeypatch):
    exact, _ = tokenizers_of["byte-level"]
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path))
    first, second = FastTokenizer(exact), FastTokenizer(exact)
    for fast, text in ((first, "ꙮ ⓘ"), (second, "一")):
        fast.encode_flat([text])
        fast.keep_states()
    (kept,) = tmp_path.rglob("*.points")
    third = FastTokenizer(exact)
    assert third.encode_flat(["ꙮ ⓘ 一"])[0].tolist() == exact.encode_batch(["ꙮ ⓘ 一"])[0]
    assert third._guard.classified == 0
    before = kept.stat().st_mtime_ns
    third.keep_states()
    assert kept.stat().st_mtime_ns == before, "there is nothing new"
    kept.write_bytes(b"damaged")
    assert FastTokenizer(exact).encode_flat(["ⓘ"])[0].tolist() == exact.encode_batch(["ⓘ"])[0]


def test_findings_of_other_versions_are_not_believed(tokenizers_of, monkeypatch):
    exact, fast = tokenizers_of["byte-level"]
    monkeypatch.setattr(fast_module, "library_versions", lambda: "others")
    assert FastTokenizer(exact, findings=fast.findings).findings.versions == "others"


def test_texts_without_utf8_are_refused(tokenizers_of):
    for exact, fast in tokenizers_of.values():
        for tokenizer in (exact, fast):
            with pytest.raises(UsageError, match=r"with the surrogate U\+D800 at character 1"):
                tokenizer.encode_flat(["fine", "a\ud800b"])


@pytest.mark.parametrize("length", [100, 40_000])
def test_a_difference_that_the_judge_sees_is_raised_with_its_place(length, tokenizers_of, monkeypatch):
    exact, fast = tokenizers_of["byte-level"]
    judged = FastTokenizer(exact, check=1.0, findings=fast.findings)
    text = "".join(awkward.TOPICS)[:length]
    ids = exact.encode_batch([text])[0]
    encode = judged._fast

    def wrong(texts):
        found, lengths = encode(texts)
        found = found.copy()
        found[min(7, len(found) - 1)] ^= 1
        return found, lengths

    monkeypatch.setattr(judged, "_fast", wrong)
    with pytest.raises(TokensDiffer) as caught:
        judged.encode_flat([text])
    assert "differ at token 7 of a text" in str(caught.value)
    assert ascii(exact.backend.decode(ids[7:8])).strip("'") in str(caught.value)


def test_the_first_texts_and_a_share_of_the_others_are_compared(tokenizers_of):
    exact, fast = tokenizers_of["byte-level"]
    texts = [f"a plain text, number {i}" for i in range(4000)]
    for check, least, most in ((0.0, 32, 32), (0.05, 130, 330), (1.0, 4000, 4000)):
        judged = FastTokenizer(exact, check=check, first=32, findings=fast.findings)
        judged.encode_flat(texts[:100])
        judged.encode_flat(texts[100:])
        assert least <= judged.compared <= most


def changed(kind: str, **changes: object) -> Tokenizer:
    fields = {**orjson.loads(awkward.made(kind)), **changes}
    return Tokenizer(TokenizerFile("changed", orjson.dumps(fields)))


ADDED = {"id": 5, "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: changed("unigram"), "Unigram models"),
        (lambda: changed("byte-level", normalizer={"type": "NFKC"}), "the normaliser NFKC"),
        (
            lambda: changed("byte-level", pre_tokenizer={"type": "Whitespace"}),
            "the pre-tokenizer Whitespace",
        ),
        (
            lambda: changed(
                "byte-level",
                pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            ),
            "a space before every text",
        ),
        (
            lambda: changed("byte-level", added_tokens=[{**ADDED, "content": "of the"}]),
            "the added token 'of the' may reach across white space",
        ),
        (
            lambda: changed("byte-level", added_tokens=[{**ADDED, "content": "END", "rstrip": True}]),
            "the added token 'END' may reach across white space",
        ),
    ],
)
def test_what_it_is_not_known_to_be_exact_for_it_leaves_alone(tokenizer, said):
    exact = tokenizer()
    fast = FastTokenizer(exact)
    assert fast.engine == "tokenizers"
    assert said in fast.why
    texts = awkward.TOPICS[:10]
    assert np.array_equal(fast.encode_flat(texts)[0], exact.encode_flat(texts)[0])


def test_without_tokie_it_is_tokenizers(tokenizers_of, monkeypatch):
    exact, _ = tokenizers_of["byte-level"]

    def missing(_):
        raise ImportError("no module")

    monkeypatch.setattr(fast_module, "_read", missing)
    fast = FastTokenizer(exact)
    assert (fast.engine, fast.findings) == ("tokenizers", None)
    assert "can't be imported" in fast.why
    assert fast.encode_flat(["a b"])[0].tolist() == exact.encode_batch(["a b"])[0]
