"""Texts cut around a run of tokens: nothing is lost, and the run is what its tokens stand for."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.tokenizers import Tokenizer, TokenizerFile
from retrotool.tokenizers.tokenizer import Split, split_texts


def cut(tokenizer: Tokenizer, tokens: list[int], start: int, stop: int) -> Split:
    row = np.array([[*tokens, 0, 0]], np.uint32)
    (found,) = split_texts(tokenizer, row, *(np.array([n]) for n in (len(tokens), start, stop)))
    return found


def whole_of(split: Split) -> str:
    return split.before + split.run + split.after


@pytest.fixture(scope="module")
def byte_level(byte_level_tokenizer: Path) -> Tokenizer:
    return Tokenizer(TokenizerFile("bytes", byte_level_tokenizer.read_bytes()))


@pytest.fixture(scope="module")
def wordpiece(tiny_encoder: Path) -> Tokenizer:
    return Tokenizer(TokenizerFile("words", (tiny_encoder / "tokenizer.json").read_bytes()))


@pytest.fixture(scope="module")
def with_fallback() -> Tokenizer:
    """Words marked with ▁, and bytes for what it does not know: its decoder is that of the library alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    merges = [("a", "b"), ("c", "d"), ("▁", "ab"), ("▁", "cd")]
    vocabulary = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *"abcd", *("".join(pair) for pair in merges)]
    library = Library(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(TokenizerFile("fallback", library.to_str().encode()))


def characters(data: bytes) -> list[tuple[int, int, bool]]:
    """Where each character of a text decoded with U+FFFD begins and ends in its bytes, and whether it is whole."""
    broken: list[tuple[int, int, bool]] = []

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        broken.append((error.start, error.end, False))
        return "\ufffd", error.end

    codecs.register_error("noting", note)
    data.decode("utf-8", "noting")
    found, at = [], 0
    while at < len(data):
        hit = next((one for one in broken if one[0] == at), None)
        if hit is None:
            lead = data[at]
            hit = (at, at + (1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4), True)
        found.append(hit)
        at = hit[1]
    return found


@given(st.text(st.sampled_from("ab é漢🙂\u202e\n"), max_size=40), st.data())
def test_a_run_of_bytes_is_the_characters_that_are_wholly_in_it(byte_level, text, data) -> None:
    (tokens,) = byte_level.encode_batch([text])
    first = data.draw(st.integers(0, len(tokens)))
    tokens = tokens[first : data.draw(st.integers(first, len(tokens)))]  # chunks begin and end inside characters
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    found = cut(byte_level, tokens, start, stop)
    spelled = [byte_level.decode(np.array([[t]]), np.array([1]))[0].as_py() for t in tokens]
    whole = b"".join(spelled)
    assert whole_of(found) == whole.decode("utf-8", "replace")
    low, high = len(b"".join(spelled[:start])), len(b"".join(spelled[:stop]))
    places = characters(whole)
    if any(a < edge < b and not good for a, b, good in places for edge in (low, high)):
        return  # inside of a character of which the chunk has a part only, both ways are right
    within = [low <= a and b <= high for a, b, _ in places]
    assert found.run == "".join(c for c, inside in zip(whole_of(found), within, strict=True) if inside)
    if found.run:
        assert len(found.before) == within.index(True)


@given(st.lists(st.sampled_from(["store", "index", "vector", "xyz", "qq"]), min_size=1, max_size=12), st.data())
def test_a_run_of_word_pieces_has_the_spaces_before_its_words(wordpiece, words, data) -> None:
    (tokens,) = wordpiece.encode_batch([" ".join(words)])
    names = [wordpiece.backend.id_to_token(t) for t in tokens]
    first = data.draw(st.integers(0, len(tokens) - 1))
    tokens, names = tokens[first:], names[first:]
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    spelled = [names[0], *(n.removeprefix("##") if n.startswith("##") else f" {n}" for n in names[1:])]
    found = cut(wordpiece, tokens, start, stop)
    pieces = ("".join(some) for some in (spelled[:start], spelled[start:stop], spelled[stop:]))
    assert found == (Split(*pieces) if start < stop else Split("".join(spelled), "", ""))


@given(st.text(st.sampled_from("abcd é漢🙂"), max_size=30), st.data())
def test_with_a_decoder_of_the_library_no_character_is_cut_or_lost(with_fallback, text, data) -> None:
    (tokens,) = with_fallback.encode_batch([text])
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    found = cut(with_fallback, tokens, start, stop)
    assert whole_of(found) == with_fallback.backend.decode(tokens, skip_special_tokens=False) == text
    if text.isascii():
        names = [with_fallback.backend.id_to_token(t).replace("▁", " ") for t in tokens]
        pieces = ["".join(some) for some in (names[:start], names[start:stop], names[stop:])]
        if start < stop and start > 0:
            assert (found.before, found.run, found.after) == (pieces[0].removeprefix(" "), pieces[1], pieces[2])
    assert "\ufffd" not in whole_of(found)


def test_many_at_once_are_as_one_by_one(byte_level) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, byte_level.vocabulary, (50, 64))
    n = rng.integers(0, 65, 50)
    start = rng.integers(0, n + 1)
    stop = np.minimum(n, start + rng.integers(0, 20, 50))
    found = split_texts(byte_level, tokens, n, start, stop)
    for i, one in enumerate(found):
        assert one == cut(byte_level, tokens[i, : n[i]].tolist(), int(start[i]), int(stop[i]))
    assert split_texts(byte_level, tokens[:0], n[:0], n[:0], n[:0]) == []
