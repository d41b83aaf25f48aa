"""Folded text: one space between words, none beside anything else, whatever the tokenizer and wherever rows end."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from awkward import made
from hypothesis import given
from hypothesis import strategies as st

from retrotool.tokenizers import Tokenizer, TokenizerFile
from retrotool.tokenizers.fold import Folder

TEXTS = st.lists(st.sampled_from([*"abcdefgh XYZ .,;@+-_'09\n\t", "é", "ß", "中", "🙂", " of the "]), max_size=120).map(
    "".join
)
KINDS = ("wordpiece", "unigram")


def folded_by_hand(text: str) -> str:
    """What is left of decoded text, character by character."""
    words = " ".join(text.split())
    kept = []
    for i, character in enumerate(words):
        around = words[max(i - 1, 0) : i + 2 : 2] if i else words[1:2]
        if character == " " and not all(c.isalnum() or unicodedata.category(c)[0] == "M" for c in around):
            continue
        kept.append(character)
    return "".join(kept)


@pytest.fixture(scope="module")
def folders() -> dict[str, tuple[Tokenizer, Folder]]:
    loaded = {kind: Tokenizer(TokenizerFile(kind, made(kind))) for kind in KINDS}
    return {kind: (tokenizer, Folder(tokenizer)) for kind, tokenizer in loaded.items()}


def rows_of(tokens: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    n = -(-len(tokens) // width)
    rows, counts = np.zeros((n, width), np.uint16), np.zeros(n, np.int32)
    for i in range(n):
        some = tokens[i * width : (i + 1) * width]
        rows[i, : len(some)], counts[i] = some, len(some)
    return rows, counts


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), width=st.integers(1, 9))
def test_rows_of_documents_read_as_the_documents(kind, texts, width, folders):
    tokenizer, folder = folders[kind]
    every = [tokens for tokens in tokenizer.encode_batch(texts) if tokens]
    if not every:
        return
    cut = [rows_of(tokens, width) for tokens in every]
    rows, counts = (np.concatenate([some[i] for some in cut]) for i in (0, 1))
    is_first = np.concatenate([np.arange(len(some)) == 0 for some, _ in cut])
    starts, data = folder(rows, counts, is_first)
    assert len(starts) == len(rows) + 1
    assert starts[0] == 0
    text = bytes(data)
    bounds = [*np.flatnonzero(is_first).tolist(), len(rows)]
    for i, tokens in enumerate(every):
        found = text[starts[bounds[i]] : starts[bounds[i + 1]]].decode()
        assert found == folded_by_hand(tokenizer.backend.decode(tokens, skip_special_tokens=False))


def test_an_address_reads_as_one(folders):
    tokenizer, folder = folders["wordpiece"]
    tokens = tokenizer.encode_batch(["Write to  John.Doe+x@Example.com , (now) !"])[0]
    _, data = folder(*rows_of(tokens, 5), np.arange(-(-len(tokens) // 5)) == 0)
    assert bytes(data).decode() in ("write to john.doe+x@example.com,(now)!", "Write to John.Doe+x@Example.com,(now)!")
