"""What the tests of tokenizers share: texts that are hard to split, and small tokenizers of all common kinds."""

from __future__ import annotations

import pydoc_data.topics
from functools import cache

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from retrotool.tokenizers.cut import CL100K_PATTERN, GPT2_PATTERN, LLAMA_3_PATTERN, O200K_PATTERN

TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
SAMPLES = (
    "Ünïcödé, NAÏVE café ﬁne ½ ² ™ Ⅳ", "北京大学是中国的大学。", "한국어 문장", "こんにちは世界", "Привет, мир!",
    "ǅ ǆ ſ İ ı ß",
    "مرحبا", "हिन्दी में", "สวัสดี", "😀🎈 👩🏽‍🚀", "don't DON'T we'LL I'ſ x'RE", "\t'say' \n 'tis  \r\n\r\n  end \u2003",
    "a\u0301e\u0327\u0301 \u00a0\u3000\u200d\ufeff\ufffd\u2028", "<|endoftext|> [SEP] </s> <0x41> ▁▁a▁",
    "\0\x01\x7f\x80\x9f",
    "12345678 1,234.5 ٣٤٥ 𝟘𝟙", "x" * 300, "ab" * 200, " " * 130, "\n" * 130,
    "if (x) {\n\t\treturn;\n\t}\n \n\t.global\t_x", "=" * 99 + "\n" + "-" * 99,
)  # fmt: skip
_PIECES = [
    *SAMPLES,
    *" \n\t'.,-_()/\"#",
    "'s",
    "'ll",
    "\r\n",
    "  ",
    "\t\t}",
    "\t.x",
    "the ",
    "Word",
    "der",
    "é",
    "一",
    "😀",
    "\u0301",
]

texts = st.lists(
    st.sampled_from(_PIECES)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.text(max_size=6, alphabet="ab' \n1"),
    max_size=12,
).map("".join)
"""Texts of awkward pieces in any order."""


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> str:
    tokenizer.train_from_iterator([*TOPICS[::3], *SAMPLES * 3], trainer)
    return str(tokenizer.to_str())


def byte_level(pattern: str | None, size: int = 3000, normalizer: normalizers.Normalizer | None = None) -> str:
    """A byte-level BPE that splits by a pattern (None: that of the library's own ByteLevel)."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    return _trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=special),
    )


def wordpiece() -> str:
    """A cased WordPiece of BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False))


def unigram() -> str:
    """A Unigram model that marks words with ▁."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


KINDS = {
    "byte-level": lambda: byte_level(None),
    "gpt2": lambda: byte_level(GPT2_PATTERN),
    "nfc": lambda: byte_level(None, normalizer=normalizers.NFC()),
    "cl100k": lambda: byte_level(CL100K_PATTERN),
    "o200k": lambda: byte_level(O200K_PATTERN),
    "llama3": lambda: byte_level(LLAMA_3_PATTERN),
    "wordpiece": wordpiece,
    "unigram": unigram,
}


@cache
def made(kind: str) -> bytes:
    """The ``tokenizer.json`` of a kind."""
    return KINDS[kind]().encode()
