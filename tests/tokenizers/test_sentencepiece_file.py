"""A SentencePiece model gives the ids that SentencePiece gives, or is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import awkward
import numpy as np
import pytest
import sentencepiece
from conftest import write_jsonl
from hypothesis import given
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.tokenizers import FastTokenizer, Tokenizer, TokenizerFile, find, find_tokenizer

BYTES = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
MODELS = {
    "llama": {**BYTES, "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True},
    "bpe": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "symbols": {**BYTES, "remove_extra_whitespaces": False, "user_defined_symbols": ["\n\n", "<mask>", "<mask>s"]},
    "no prefix": {**BYTES, "add_dummy_prefix": False},
    "mapped": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
}
EXACT = ("llama", "bpe", "symbols", "no prefix")
"""Those with nothing that may differ: neither scores to choose by nor a character map."""


def trained(**options: object) -> bytes:
    model = io.BytesIO()
    lines = [line for text in (*awkward.TOPICS, *awkward.SAMPLES * 4) for line in text.replace("\0", "").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=1500,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Tokenizer, sentencepiece.SentencePieceProcessor]]:
    found = {}
    for name, options in MODELS.items():
        content = trained(**options)
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)
        found[name] = (
            Tokenizer(TokenizerFile(name, find.convert_sentencepiece(content, name))),
            processor,
        )
    return found


@pytest.mark.parametrize("name", EXACT)
@given(text=awkward.texts)
def test_ids_are_those_of_sentencepiece(name, text, models):
    own, theirs = models[name]
    text = text.replace("\0", "")  # which ends a text there
    assert own.encode_batch([text])[0] == theirs.EncodeAsIds(text)


@pytest.mark.parametrize("name", ["llama", "bpe", "mapped"])
def test_ids_of_real_text_are_those_of_sentencepiece(name, models):
    own, theirs = models[name]
    assert own.encode_batch(awkward.TOPICS) == [theirs.EncodeAsIds(text) for text in awkward.TOPICS]


def test_where_a_unigram_model_differs_both_ways_score_the_same(models):
    own, theirs = models["unigram"]
    for line in (line for text in awkward.TOPICS for line in text.splitlines()):
        ids, expected = own.encode_batch([line])[0], theirs.EncodeAsIds(line)
        if ids != expected:
            assert sum(map(theirs.GetScore, ids)) == pytest.approx(sum(map(theirs.GetScore, expected)), abs=1e-3)
            assert "".join(map(theirs.IdToPiece, ids)) == "".join(map(theirs.IdToPiece, expected))


@pytest.mark.parametrize("name", MODELS)
def test_decoding_is_that_of_sentencepiece(name, models):
    own, theirs = models[name]
    lines = [line for text in awkward.TOPICS for line in text.splitlines() if line.strip()]
    texts = [ids for ids in own.encode_batch(lines) if theirs.unk_id() not in ids]
    assert len(texts) > 20
    for ids in texts:
        (decoded,) = own.decode_text(np.array([ids]), np.array([len(ids)]))
        assert decoded == theirs.DecodeIds(ids)


def test_they_go_to_the_exact_tokenizer(models):
    for own, _ in models.values():
        assert FastTokenizer(own).engine == "tokenizers"


def test_a_corpus_is_chunked_with_a_model_file(tmp_path: Path):
    model = str(tmp_path / "m.model")
    Path(model).write_bytes(trained(**MODELS["llama"]))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "text": "Some text.\n\n  Indented, café 😀"}])
    assert api.chunk(tmp_path / "store", [str(rows)], tokenizer=model).documents == 1
    assert api.chunk(tmp_path / "store", [str(rows)], tokenizer=model).known_inputs == 1
    assert "café 😀" in retrotool.open(tmp_path / "store").chunk(0).text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "char"}, "neither a Unigram nor a BPE model"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "white space as a suffix"),
        ({"model_type": "unigram", "byte_fallback": True}, "bytes for unknown characters"),
    ],
)
def test_models_that_can_not_be_put_so_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        find.convert_sentencepiece(trained(**options), "m")


def test_a_model_that_comes_out_otherwise_is_refused(monkeypatch):
    """Here because a step of the normaliser is left out."""
    content = trained(**MODELS["bpe"])
    monkeypatch.setattr(normalizers, "Prepend", lambda _: normalizers.Replace("qqq", "qqq"))
    with pytest.raises(UsageError, match="gives other ids than SentencePiece for"):
        find.convert_sentencepiece(content, "m")


def test_pieces_that_are_never_used_are_refused():
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(trained(**MODELS["bpe"]))
    model.pieces[300].type = 5
    with pytest.raises(UsageError, match="marked as unused"):
        find.convert_sentencepiece(model.SerializeToString(), "m")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))])
def test_files_of_something_else_are_refused(data, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"tokenizer '.*x.model'"):
        find_tokenizer(str(path))


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    content = trained(**MODELS["bpe"])
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError, match="is not installed") as caught:
        find.convert_sentencepiece(content, "m")
    assert caught.value.advice == "Install it with: pip install sentencepiece protobuf"
