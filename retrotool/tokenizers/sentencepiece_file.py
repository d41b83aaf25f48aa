"""A SentencePiece ``.model`` as a ``tokenizer.json`` that gives its ids.

The model's pieces and normaliser (Kudo and Richardson 2018, arXiv 1808.06226; ``sentencepiece_model.proto``) are put
into the terms of the `tokenizers` library, and the result is held against SentencePiece itself, on texts of many
scripts and of the model's own pieces, before anything is done with it. A model that can't be put so, or that comes out
otherwise, is refused with the reason: its ids would not be those that the model was trained with.

What may differ, here as wherever `tokenizers` reads such models: a Unigram model chooses otherwise between two ways to
split of the same score (``ww|w`` and ``w|ww``); and a character map is applied otherwise to some rare sequences of
combining marks. Control pieces (``<s>``) are never found in text, as SentencePiece does not find them either.

Needs the extra ``sentencepiece``. Cost: about a second for 32,000 pieces. Does not do: WORD and CHAR models, white
space as a suffix, pieces that are marked as unused, Unigram models with bytes for unknown characters.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retrotool.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
_PROBES = (
    "The quick brown fox, 1,234.5 times: don't!", "  two  spaces  ", "tab\tnewline\nend", "a", " ", "",
    "x_y ##a <s> </s>",
    "Ünïcödé naïve café Straße", "北京大学是中国的大学。", "한국어 문장입니다.", "こんにちは世界", "Привет, мир!",
    "مرحبا بالعالم", "हिन्दी में", "สวัสดีชาวโลก", "γειά σου κόσμε", "שלום עולם", "😀 🎈🎈", "<0x41> <unk> ▁▁a▁",
    "http://example.org/a?b=c&d=%20", "def f(x):\n    return x ** 2\n", "…“quoted” — ½ ² ™ ﬁ Ⅳ",
)  # fmt: skip
_ROUNDING = 1e-3
"""Sums of a few dozen float32 scores that differ by less are the same."""
_ADVICE = "Convert it to a tokenizer.json with the library that the model was trained with, and give that."


def convert_sentencepiece(content: bytes, name: str) -> bytes:
    """The ``tokenizer.json`` of a SentencePiece model; ``UsageError`` if there is none with the same ids."""
    try:
        import sentencepiece

        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise UsageError(
            f"tokenizer {name!r} is a SentencePiece model, and what reads them is not installed ({error})",
            "Install it with: pip install sentencepiece protobuf",
        ) from error
    model = messages.ModelProto()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        model.ParseFromString(content)
        processor.LoadFromSerializedProto(content)
    except Exception as error:  # protobuf and SentencePiece have no common error
        raise UsageError(f"tokenizer {name!r} is no SentencePiece model: {error}", _ADVICE) from error
    why = _why_not(model)
    if why:
        raise UsageError(f"tokenizer {name!r} can't be used: {why}", _ADVICE)
    library = _build(model)
    for text in (*_PROBES, *_own_texts(model)):
        ids, expected = library.encode(text, add_special_tokens=False).ids, processor.EncodeAsIds(text)
        if ids != expected and not _score_the_same(model, ids, expected):
            raise UsageError(
                f"tokenizer {name!r} can't be used: `tokenizers` gives other ids than SentencePiece for {text[:40]!a}",
                _ADVICE,
            )
    return library.to_str().encode()


def _score_the_same(model: Any, ids: Sequence[int], others: Sequence[int]) -> bool:
    """Whether a Unigram model has nothing to choose by between two ways to split the same text."""
    one, other = ([model.pieces[i] for i in way] for way in (ids, others))
    same_text = "".join(piece.piece for piece in one) == "".join(piece.piece for piece in other)
    gap = sum(piece.score for piece in one) - sum(piece.score for piece in other)
    return model.trainer_spec.model_type == _UNIGRAM and same_text and abs(gap) < _ROUNDING


def _why_not(model: Any) -> str:
    kind, kinds = model.trainer_spec.model_type, {piece.type for piece in model.pieces}
    if kind not in (_UNIGRAM, _BPE):
        return "it is neither a Unigram nor a BPE model"
    if model.trainer_spec.treat_whitespace_as_suffix:
        return "it has white space as a suffix"
    if not model.normalizer_spec.escape_whitespaces:
        return "it does not escape white space"
    if _UNUSED in kinds:
        return "it has pieces that are marked as unused"
    if kind == _UNIGRAM and _BYTE in kinds:
        return "it is a Unigram model with bytes for unknown characters, for which text such as <0x41> would be taken"
    return ""


def _build(model: Any) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec, normal = model.trainer_spec, model.normalizer_spec
    names = [_inert(piece) for piece in model.pieces]
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    if spec.model_type == _BPE:
        kernel: Any = models.BPE(
            vocab={piece: i for i, piece in enumerate(names)},
            merges=list(_merges(model)),
            unk_token=names[spec.unk_id],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            ignore_merges=bool(own),
        )
    else:
        kernel = models.Unigram(
            [(piece, scored.score) for piece, scored in zip(names, model.pieces, strict=True)], unk_id=spec.unk_id
        )
    library = Tokenizer(kernel)
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        # Spaces only: SentencePiece leaves newlines alone, unless its character map makes spaces of them.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if normal.remove_extra_whitespaces:
        # What looks like an escaped space at the end is taken for one.
        steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    library.normalizer = normalizers.Sequence(steps)
    if own:
        # They come out whole wherever they stand, the longest first.
        longest_first = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    back: list[Any] = [decoders.Replace(_SPACE, " ")]
    if spec.byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if normal.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1))
    library.decoder = decoders.Sequence(back)
    return library


def _inert(piece: Any) -> str:
    """A piece's name; that of a control piece with a space before it, which no normalised text has."""
    return f" {piece.piece}" if piece.type in (_CONTROL, _UNKNOWN) else str(piece.piece)


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    """Pairs that SentencePiece's BPE may merge, those of the highest score first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = [
        (-score, place, piece[:end], piece[end:])
        for place, (piece, score) in enumerate(scores.items())
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    for _, _, left, right in sorted(ranked):
        yield left, right


def _own_texts(model: Any) -> list[str]:
    pieces = [piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    draw = np.random.default_rng(0)
    return ["".join(draw.choice(pieces, 12)).replace(_SPACE, " ") for _ in range(500)] if pieces else []
