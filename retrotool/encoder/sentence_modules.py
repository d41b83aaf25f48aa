"""What an encoder's files for sentence-transformers say: pooling, projections, length of vectors, prompts.

Without these files, vectors are means as in the RETRO paper (section 2.3). Nothing in them is run as code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import UsageError

POOLINGS = ("mean", "cls", "lasttoken")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")  # of projections, by their names in torch.nn
_LARGEST = 64 << 20  # bytes of a JSON file
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """How vectors are made of a model's outputs; ``pooling`` "": not supported."""

    pooling: str
    projections: tuple[tuple[Path, str], ...]  # folder and activation of each dense layer
    width: int | None  # dimensions after projections; None: the model's
    kept: int | None  # of these, by ``truncate_dim``
    normalize: bool
    prompt: str  # precedes each chunk
    query_prompt: str  # precedes each text that is searched for


def read_modules(path: Path, *, refuse: bool) -> SentenceModules:
    """Read a model directory's modules; ``UsageError`` if unsupported (a pooling: only if ``refuse``)."""
    modules = load_json(path / "modules.json") or []
    if not (isinstance(modules, list) and all(isinstance(module, dict) for module in modules)):
        raise UsageError(f"{path / 'modules.json'}: not a list of JSON objects")
    projections, kinds, width = [], list[str](), None
    for module in modules:
        library, _, kind = str(module.get("type")).rpartition(".")
        folder = path / str(module.get("path", ""))
        kinds.append(kind)
        known = kind in _ORDER and library.startswith("sentence_transformers.")
        at_home = folder.name == "1_Pooling" if kind == "Pooling" else folder.resolve().is_relative_to(path.resolve())
        if not known or not at_home or kinds != sorted(kinds, key=_ORDER.index):
            raise UsageError(f"encoder {path}: its module {module.get('type')}, here and in {folder}, is not supported")
        if kind == "Dense":
            activation, width = _projection(folder)
            projections.append((folder, activation))
    file = path / "config_sentence_transformers.json"
    config, pooled = json_object(file), json_object(path / "1_Pooling" / "config.json")
    prompt, query_prompt = _prompts(file, config)
    if pooled.get("include_prompt") is False and (prompt or query_prompt):
        raise UsageError(f"encoder {path}: pooling without its prompt is not supported")
    way, kept = _pooling(path, pooled, refuse=refuse), integer(file, config, "truncate_dim")
    return SentenceModules(way, tuple(projections), width, kept, "Normalize" in kinds, prompt, query_prompt)


def _pooling(path: Path, config: dict[str, Any], *, refuse: bool) -> str:
    mode = config.get("pooling_mode")
    flags = ("include_prompt", "pooling_mode")
    on = {key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and key not in flags}
    chosen = {str(mode)} if mode else on or {"mean"}
    known = {name.removesuffix("_tokens").removesuffix("_token") for name in chosen}
    if len(known) == 1 and known <= set(POOLINGS):
        return known.pop()
    if refuse:
        raise UsageError(
            f"encoder {path}: pooling {', '.join(sorted(chosen))} is not supported",
            f"Choose {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]} with --pooling.",
        )
    return ""


def _projection(folder: Path) -> tuple[str, int]:
    """Return the activation and the outputs of a dense layer; raise ``UsageError`` if it is not supported."""
    config = json_object(folder / "config.json")
    library, _, activation = str(config.get("activation_function")).rpartition(".")
    outputs = integer(folder / "config.json", config, "out_features")
    others = {config.get("module_input_name"), config.get("module_output_name")} - {None, "sentence_embedding"}
    known = library.startswith("torch.nn.") and activation in ACTIVATIONS
    if others or config.get("use_residual") or not outputs or not known:
        raise UsageError(f"{folder}: this projection is not supported", f"Activations are {', '.join(ACTIVATIONS)}.")
    if not (folder / "model.safetensors").is_file():
        raise UsageError(f"{folder} has no model.safetensors; pickled weights can run code and are not loaded")
    return activation, outputs


def _prompts(file: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Return the prompts of chunks and queries; where there is none of their own, the default one."""
    prompts, chosen = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or (chosen is not None and chosen not in prompts):
        raise UsageError(f"{file}: its default_prompt_name {chosen!r} is not one of its prompts")
    own = next((name for name in ("document", "passage", "corpus") if name in prompts), chosen)
    query = "query" if "query" in prompts else chosen
    return str(prompts.get(own) or ""), str(prompts.get(query) or "")


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, None without one; ``UsageError`` for another or a large file."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes, which is no configuration of a model")
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error


def json_object(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; none if there is no file."""
    fields = load_json(path)
    if not isinstance(fields, dict | None):
        raise UsageError(f"{path}: a {type(fields).__name__}, not a JSON object")
    return fields or {}


def integer(path: Path, fields: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of the fields that is set, at least 0; ``UsageError`` if it is not an integer."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UsageError(f"{path}: {' or '.join(names)} is {value!r}, not a number")
    return value
