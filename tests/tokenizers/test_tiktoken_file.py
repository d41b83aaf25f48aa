"""A tiktoken file gives the ids that tiktoken gives."""

from __future__ import annotations

import base64
from pathlib import Path

import awkward
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from tokenizers import Tokenizer as Library

from retrotool.errors import UsageError
from retrotool.tokenizers import FastTokenizer, Tokenizer, TokenizerFile, find, find_tokenizer
from retrotool.tokenizers.tokenizer import byte_level_alphabet

ENCODINGS = ("r50k_base", "p50k_edit", "cl100k_base", "o200k_base")
_KIND = {"r50k_base": "gpt2", "p50k_edit": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}


def ranks_of(kind: str) -> dict[bytes, int]:
    """Tokens and ranks as a file has them, of a trained model without its special token."""
    byte_of = byte_level_alphabet()
    vocabulary = Library.from_str(awkward.made(kind).decode()).get_vocab()
    tokens = sorted((token for token in vocabulary if token != "<|endoftext|>"), key=vocabulary.__getitem__)
    return {bytes(byte_of[letter] for letter in token): rank for rank, token in enumerate(tokens)}


def file_of(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(scope="module")
def encodings() -> dict[str, tuple[Tokenizer, tiktoken.Encoding]]:
    """Each encoding by our way and by tiktoken's, with the pattern and special tokens that tiktoken ships."""
    found = {}
    for name in ENCODINGS:
        ranks = ranks_of(_KIND[name])
        with pytest.MonkeyPatch.context() as patch:
            # What it would download.
            patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, ranks=ranks, **__: ranks)
            shipped = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()
        shipped.pop("explicit_n_vocab", None)
        content = find.convert_tiktoken(file_of(ranks), f"some/folder/{name}.tiktoken")
        found[name] = (Tokenizer(TokenizerFile(name, content)), tiktoken.Encoding(**shipped))
    return found


@pytest.mark.parametrize("name", ENCODINGS)
@given(text=awkward.texts)
def test_ids_are_those_of_tiktoken(name, text, encodings):
    own, theirs = encodings[name]
    text = text.replace("<|", "< |")  # special tokens are found here, and refused there
    assert own.encode_batch([text])[0] == theirs.encode(text)


@pytest.mark.parametrize("name", ENCODINGS)
def test_ids_of_real_text_are_those_of_tiktoken_also_by_the_fast_way(name, encodings):
    own, theirs = encodings[name]
    expected = [theirs.encode(text) for text in awkward.TOPICS]
    assert own.encode_batch(awkward.TOPICS) == expected
    fast = FastTokenizer(own, check=1.0)
    assert fast.engine == "tokie", fast.why
    ids, lengths = fast.encode_flat(awkward.TOPICS)
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert ids.tolist() == [token for tokens in expected for token in tokens]
    assert own.lossless


@pytest.mark.parametrize("name", ENCODINGS)
def test_special_tokens_have_the_ids_that_tiktoken_ships(name, encodings):
    own, theirs = encodings[name]
    for token in theirs.special_tokens_set:
        assert own.encode_batch([f"a{token}b"])[0] == theirs.encode(f"a{token}b", allowed_special="all")


def test_a_file_is_found_by_its_name(tmp_path):
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(file_of(ranks_of("cl100k")))
    assert Tokenizer(find_tokenizer(str(path))).encode_batch(["text"])


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("mine.tiktoken", None, "'mine' is not a known encoding"),
        ("cl100k_base.tiktoken", b"YQ== 0\nYg== 1\n", "no token for 254 of the 256 bytes"),
        ("cl100k_base.tiktoken", b"YQ== 0\nYg==\n", "line 2 is not a token in base64 and its rank"),
        ("cl100k_base.tiktoken", b"YQ== 0\n?! 1\n", "line 2 is not a token in base64 and its rank"),
    ],
)
def test_what_can_not_be_understood_is_refused(name: str, data: bytes | None, said: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(file_of(ranks_of("cl100k")) if data is None else data)
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        find_tokenizer(str(path))
