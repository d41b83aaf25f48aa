"""What an encoder is: its directory, and what its configuration says of pooling, length and special tokens.

An encoder is any model directory that ``transformers.AutoModel`` reads from safetensors. Pooling, normalising and
prompts follow the model's own sentence-transformers configuration, or are the mean over time of the RETRO paper
(section 2.3) where there is none. Nothing here loads a model; the cost is that of hashing its weights.
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
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Models that number positions from behind the padding index."""
POOLINGS = ("mean", "cls")


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What a store keeps of an encoder; ``sha256`` covers weights, configuration, tokenizer and chosen pooling.

    ``prompt`` stands before every text, and ``lower`` texts are made lower case first, as the model's configuration
    says. ``overridden``: the pooling is not the model's own.
    """

    name: str
    origin: str
    sha256: str
    tokenizer: str
    dimension: int
    pooling: str
    normalize: bool
    max_tokens: int
    prompt: str = ""
    lower: bool = False
    overridden: bool = False


def find_encoder(spec: str, *, pooling: str = "auto", name: str | None = None) -> tuple[Path, EncoderIdentity]:
    """Describe the encoder that ``spec`` stands for, without loading it; ``UsageError`` says what is missing.

    ``pooling``: another one than the model's own makes it another encoder, ``<name>-<pooling>``. ``name``: what the
    store is to call it, instead of the name of its directory.
    """
    if pooling not in ("auto", *POOLINGS):
        raise UsageError(f"pooling {pooling!r} is not known", f"Known are auto, {' and '.join(POOLINGS)}.")
    path = resolve_model(spec, "encoder", PATTERNS)
    config = check_model(path, f"encoder {spec!r}", "AutoModel")
    digest = hash_model(path, _IDENTITY_FILES)
    own, normalize = _pooling(path, refuse=pooling == "auto")
    sentence = path / "sentence_bert_config.json"
    prompt = _prompt(path)
    if prompt:
        digest.update(f"prompt {prompt}\n".encode())
    if pooling not in ("auto", own):
        digest.update(f"pooling {pooling}\n".encode())
    limit = longest_row(path, config)
    dimension = _number(path / "config.json", config, "hidden_size", "dim")
    if not dimension:
        raise UsageError(f"encoder {spec!r}: {path / 'config.json'} has no hidden_size", "It is no encoder.")
    declared = _number(sentence, _json(sentence), "max_seq_length")
    if name is None:
        name = plain_name(spec) if pooling in ("auto", own) else f"{plain_name(spec)}-{pooling}"
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
        overridden=pooling not in ("auto", own),
    )
    return path, identity


def check_model(path: Path, what: str, saved_by: str) -> dict[str, Any]:
    """The fields of a model directory's ``config.json``, once it has all that a model is loaded from here.

    ``UsageError`` names ``what``, and what is missing or wrong: no safetensors weights (``saved_by`` is the class of
    ``transformers`` that writes them), no tokenizer.json, code of its own.
    """
    if not (path / "config.json").is_file():
        raise UsageError(f"{what}: {path} has no config.json", "Name a model directory as transformers saves it.")
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"{what}: {path} has no safetensors weights; pickled ones can run code and are not loaded",
            f"Convert it once, where you trust it: {saved_by}.from_pretrained(...).save_pretrained(...)",
        )
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"{what}: {path} has no tokenizer.json",
            "Make it with: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    config = _json(path / "config.json")
    if "auto_map" in config:
        raise UsageError(
            f"{what} asks to run code of its own, which is never done", "Use a model that transformers knows itself."
        )
    return config


def hash_model(path: Path, files: Iterable[str]) -> hashlib._Hash:
    """A SHA-256 that has taken in some files of a model directory, there or not, and its weights."""
    digest = hashlib.sha256()
    for file in (*(path / name for name in files), *sorted(path.glob("*.safetensors"))):
        digest.update(f"{file.relative_to(path)} {_sha256(file) if file.is_file() else '-'}\n".encode())
    return digest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def longest_row(path: Path, config: Mapping[str, Any]) -> int:
    """Tokens that a model takes at most, special ones included."""
    limit = _number(path / "config.json", config, "max_position_embeddings") or 512
    if config.get("model_type") in OFFSET_POSITIONS:
        padding = _number(path / "config.json", config, "pad_token_id")
        limit -= (1 if padding is None else padding) + 1
    return limit


def plain_name(spec: str) -> str:
    """What a store calls an encoder: the name of its directory, or of its repository, as far as a file can have it."""
    if spec == BUNDLED:
        return spec
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec).absolute().name if Path(spec).exists() else spec)
    return name.lstrip("-._") or "encoder"


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a model directory's ``config.json``."""
    return _json(path / "config.json")


def _load(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if there is no such file."""
    fields = _load(path)
    if not isinstance(fields, dict | None):
        raise UsageError(f"{path}: a {type(fields).__name__}, not a JSON object")
    return fields or {}


def _number(path: Path, fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of some fields that is set; None if none is."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{path}: {' or '.join(names)} is {value!r}, not a number")
    return value


def _pooling(path: Path, *, refuse: bool) -> tuple[str, bool]:
    """Pooling and whether vectors are normalised, as the model's own configuration says.

    ``UsageError`` for modules that are not known, and for a pooling that is not, if that is to be refused.
    """
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
            "Known are mean and cls; choose one with --pooling.",
        )
    if config.get("include_prompt") is False and _prompt(path):
        raise UsageError(f"encoder {path}: it leaves its prompt out of the pooling, which is not supported")
    return names[chosen.pop()] if known else "", "Normalize" in kinds


def _prompt(path: Path) -> str:
    """What the model's configuration wants before every text that is given without saying what it is."""
    file = path / "config_sentence_transformers.json"
    config = _json(file)
    chosen = config.get("default_prompt_name")
    if chosen is None:
        return ""
    prompts = config.get("prompts")
    if not isinstance(prompts, dict) or not isinstance(prompts.get(chosen), str):
        raise UsageError(f"{file}: its default_prompt_name {chosen!r} is none of its prompts")
    return str(prompts[chosen])
