"""Identify an encoder: its directory, and its configuration of pooling, length and special tokens.

An encoder is a model directory that ``transformers.AutoModel`` reads from safetensors. It may have a
configuration for sentence-transformers; without one, vectors are means as in the RETRO paper (section 2.3).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import UsageError
from retrotool.store.paths import check_name
from retrotool.tokenizers import BUNDLED, resolve_model

PATTERNS = ("*.json", "*.safetensors", "*/config.json")
_HASHED = ("config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start after the padding index
POOLINGS = ("mean", "cls")


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """A store's record of an encoder; ``sha256`` covers weights, configuration, tokenizer and pooling."""

    name: str
    origin: str
    sha256: str
    tokenizer: str
    dimension: int
    pooling: str
    normalize: bool
    max_tokens: int
    prompt: str = ""  # precedes each text
    lower: bool = False  # texts are lower-cased
    overridden: bool = False  # pooling is not the model's own


def find_encoder(spec: str, *, pooling: str = "auto", name: str | None = None) -> tuple[Path, EncoderIdentity]:
    """Describe the encoder ``spec`` without loading it; raise ``UsageError`` if something is missing.

    A ``pooling`` other than the model's own makes it another encoder, by default named ``<name>-<pooling>``.
    """
    if pooling not in ("auto", *POOLINGS):
        raise UsageError(f"pooling {pooling!r} is unknown", f"Use auto, {' or '.join(POOLINGS)}.")
    path = resolve_model(spec, "encoder", PATTERNS)
    config = check_model(path, f"encoder {spec!r}", "AutoModel")
    digest = hash_model(path, _HASHED)
    own, normalize = _pooling(path, refuse=pooling == "auto")
    sentence = path / "sentence_bert_config.json"
    if prompt := _prompt(path):
        digest.update(f"prompt {prompt}\n".encode())
    if overridden := pooling not in ("auto", own):
        digest.update(f"pooling {pooling}\n".encode())
    limit = longest_row(path, config)
    dimension = _number(path / "config.json", config, "hidden_size", "dim")
    if not dimension:
        raise UsageError(f"encoder {spec!r}: {path / 'config.json'} has no hidden_size", "Use a BERT-like encoder.")
    declared = _number(sentence, _json(sentence), "max_seq_length")
    if name is None:
        name = f"{plain_name(spec)}-{pooling}" if overridden else plain_name(spec)
    identity = EncoderIdentity(
        name=check_name(name, "encoder"),
        origin=spec if spec == BUNDLED or not Path(spec).exists() else str(Path(spec).absolute()),
        sha256=digest.hexdigest(),
        tokenizer=hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
        dimension=dimension,
        pooling=own if pooling == "auto" else pooling,
        normalize=normalize,
        max_tokens=min(limit, declared) if declared else limit,
        prompt=prompt,
        lower=_json(sentence).get("do_lower_case") is True,
        overridden=overridden,
    )
    return path, identity


def check_model(path: Path, what: str, saved_by: str) -> dict[str, Any]:
    """Return the fields of ``config.json`` after checking that the directory has all that is loaded.

    Raises ``UsageError`` without safetensors (``saved_by`` writes them) or tokenizer, or if it has own code.
    """
    if not (path / "config.json").is_file():
        raise UsageError(f"{what}: {path} has no config.json", "Name a model directory saved by transformers.")
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"{what}: {path} has no safetensors weights; pickled weights can run code and are not loaded",
            f"If you trust the model, convert it once: {saved_by}.from_pretrained(...).save_pretrained(...)",
        )
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"{what}: {path} has no tokenizer.json",
            "Create it with: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    config = _json(path / "config.json")
    if "auto_map" in config:
        raise UsageError(
            f"{what} requires its own code, which is never run", "Use a model that transformers supports itself."
        )
    return config


def hash_model(path: Path, files: Iterable[str]) -> hashlib._Hash:
    """Return a SHA-256 object of a model directory's ``files``, present or not, and weights."""
    digest = hashlib.sha256()
    for file in (*(path / name for name in files), *sorted(path.glob("*.safetensors"))):
        digest.update(f"{file.relative_to(path)} {_sha256(file) if file.is_file() else '-'}\n".encode())
    return digest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def longest_row(path: Path, config: Mapping[str, Any]) -> int:
    """Return the longest row a model takes, including special tokens."""
    limit = _number(path / "config.json", config, "max_position_embeddings") or 512
    if config.get("model_type") in OFFSET_POSITIONS:
        padding = _number(path / "config.json", config, "pad_token_id")
        limit -= (1 if padding is None else padding) + 1
    return limit


def plain_name(spec: str) -> str:
    """Return a store's name for an encoder: its directory or repository name, made valid as a file name."""
    if spec == BUNDLED:
        return spec
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec).absolute().name if Path(spec).exists() else spec)
    return name.lstrip("-._") or "encoder"


def read_config(path: Path) -> dict[str, Any]:
    """Return the fields of a model directory's ``config.json``."""
    return _json(path / "config.json")


def _load(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    fields = _load(path)
    if not isinstance(fields, dict | None):
        raise UsageError(f"{path}: a {type(fields).__name__}, not a JSON object")
    return fields or {}


def _number(path: Path, fields: Mapping[str, Any], *names: str) -> int | None:
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{path}: {' or '.join(names)} is {value!r}, not a number")
    return value


def _pooling(path: Path, *, refuse: bool) -> tuple[str, bool]:
    """Return the pooling, and whether vectors are normalised; raise ``UsageError`` if unsupported."""
    config = _json(path / "1_Pooling" / "config.json")
    modules = _load(path / "modules.json") or []
    if not (isinstance(modules, list) and all(isinstance(module, dict) for module in modules)):
        raise UsageError(f"{path / 'modules.json'}: not a list of JSON objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UsageError(
            f"encoder {path}: its module {unknown.pop()} is not supported", "Use a model without a projection."
        )
    mode = config.get("pooling_mode")
    flags = ("include_prompt", "pooling_mode")
    on = {key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and key not in flags}
    chosen = {str(mode)} if mode else on or {"mean_tokens"}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    known = len(chosen) == 1 and chosen <= set(names)
    if refuse and not known:
        raise UsageError(
            f"encoder {path}: pooling {', '.join(sorted(chosen))} is not supported",
            "Choose mean or cls with --pooling.",
        )
    if config.get("include_prompt") is False and _prompt(path):
        raise UsageError(f"encoder {path}: pooling without its prompt is not supported")
    return names[chosen.pop()] if known else "", "Normalize" in kinds


def _prompt(path: Path) -> str:
    file = path / "config_sentence_transformers.json"
    config = _json(file)
    chosen = config.get("default_prompt_name")
    if chosen is None:
        return ""
    prompts = config.get("prompts")
    if not isinstance(prompts, dict) or not isinstance(prompts.get(chosen), str):
        raise UsageError(f"{file}: its default_prompt_name {chosen!r} is not one of its prompts")
    return str(prompts[chosen])
