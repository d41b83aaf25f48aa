"""Identify an encoder: its directory, and its configuration of pooling, length, prompts and special tokens.

An encoder is a model directory that ``transformers.AutoModel`` reads from safetensors. It may have files for
sentence-transformers; without these, vectors are means as in the RETRO paper (section 2.3). Nothing in them
is run as code. Before anything is read, the weights' headers decide whether the model is one: sizes in
``config.json`` that the weights don't have would take memory and time without limit.
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
from retrotool.machine import memory_of_machine
from retrotool.store.paths import check_name
from retrotool.tokenizers import BUNDLED, resolve_model

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
        advice = f"Choose {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]} with --pooling."
        raise UsageError(f"encoder {path}: pooling {', '.join(sorted(chosen))} is not supported", advice)
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


PATTERNS = ("*.json", "*.safetensors", "*/config.json")
_HASHED = ("config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start after the padding index
_LARGEST_TOKENIZER = 256 << 20  # bytes of tokenizer.json
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "num_experts", "num_local_experts")
_WIDTHS = (
    "vocab_size", "hidden_size", "dim", "embedding_size", "intermediate_size", "hidden_dim", "num_attention_heads",
    "n_heads", "num_key_value_heads", "head_dim", "type_vocab_size",
)  # fmt: skip
_CODE = ("auto_map", "transformers_weights", "attn_implementation", "experts_implementation")


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
    prompt: str = ""  # precedes each chunk
    lower: bool = False  # texts are lower-cased
    overridden: bool = False  # pooling is not the model's own
    query_prompt: str = ""  # precedes each text that is searched for
    truncated: bool = False  # dimension is not the model's own
    foreign: bool = False  # only vectors are known, which a model called ``origin`` made

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments with which ``find_encoder`` finds the same encoder."""
        return {"pooling": self.pooling, "name": self.name, "dimension": self.dimension}


def find_encoder(
    spec: str, *, pooling: str = "auto", name: str | None = None, dimension: int | None = None
) -> tuple[Path, EncoderIdentity]:
    """Describe the encoder ``spec`` without loading it; raise ``UsageError`` if something is missing.

    A ``pooling`` or ``dimension`` other than the model's own makes it another encoder, see ``default_name``.
    """
    if pooling not in ("auto", *POOLINGS):
        raise UsageError(f"pooling {pooling!r} is unknown", f"Use auto, {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}.")
    path = resolve_model(spec, "encoder", PATTERNS)
    config = check_model(path, f"encoder {spec!r}", "AutoModel")
    digest = hash_model(path, _HASHED)
    modules = read_modules(path, refuse=pooling == "auto")
    sentence = path / "sentence_bert_config.json"
    for folder, activation in modules.projections:
        digest.update(f"{activation} {_sha256(folder / 'model.safetensors')}\n".encode())
    if modules.prompt:
        digest.update(f"prompt {modules.prompt}\n".encode())
    if modules.query_prompt != modules.prompt:
        digest.update(f"query prompt {modules.query_prompt}\n".encode())
    if overridden := pooling not in ("auto", modules.pooling):
        digest.update(f"pooling {pooling}\n".encode())
    limit = longest_row(path, config)
    width = integer(path / "config.json", config, "hidden_size", "dim")
    if not width:
        raise UsageError(f"encoder {spec!r}: {path / 'config.json'} has no hidden_size", "Use an encoder of text.")
    width = modules.width or width
    own = min(modules.kept or width, width)
    if dimension is not None and not 1 <= dimension <= own:
        raise UsageError(f"encoder {spec!r} has {own} dimensions, not {dimension}", "Give fewer with --dimension.")
    if own < width or dimension not in (None, own):
        digest.update(f"dimension {dimension or own}\n".encode())
    declared = integer(sentence, json_object(sentence), "max_seq_length")
    if name is None:
        name = default_name(spec, pooling if overridden else None, dimension if dimension != own else None)
    identity = EncoderIdentity(
        name=check_name(name, "encoder"),
        origin=spec if spec == BUNDLED or not Path(spec).exists() else str(Path(spec).absolute()),
        sha256=digest.hexdigest(),
        tokenizer=hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest(),
        dimension=dimension or own,
        pooling=modules.pooling if pooling == "auto" else pooling,
        normalize=modules.normalize,
        max_tokens=min(limit, declared) if declared else limit,
        prompt=modules.prompt,
        query_prompt=modules.query_prompt,
        lower=json_object(sentence).get("do_lower_case") is True,
        overridden=overridden,
        truncated=dimension not in (None, own),
    )
    return path, identity


def check_model(path: Path, what: str, saved_by: str) -> dict[str, Any]:
    """Return the fields of ``config.json`` after checking that the directory has all that is loaded.

    Raises ``UsageError`` without safetensors (``saved_by`` writes them) or tokenizer, or if it has own code.
    """
    convert = f"If you trust the model, convert it once: {saved_by}.from_pretrained(...).save_pretrained(...)"
    for pattern, missing, advice in (
        ("config.json", "config.json", "Name a model directory saved by transformers."),
        ("*.safetensors", "safetensors weights; pickled weights can run code and are not loaded", convert),
        ("tokenizer.json", "tokenizer.json", "Create it with: AutoTokenizer.from_pretrained(...).save_pretrained(...)"),
    ):
        if not any(path.glob(pattern)):
            raise UsageError(f"{what}: {path} has no {missing}", advice)
    config = json_object(path / "config.json")
    for field, value in config.items():  # kernels of the hub are code, too: their names have a slash
        if field.strip("_") in _CODE and ("/" in str(value) or "implementation" not in field):
            raise UsageError(
                f"{what} requires its own code, which is never run: {path / 'config.json'} has {field}",
                "Use a model that transformers supports itself.",
            )
    if (path / "adapter_config.json").exists():
        raise UsageError(f"{what}: {path} is an adapter of another model", "Merge it into its model, and save that.")
    _check_sizes(path, what, config)
    return config


def weight_files(path: Path) -> list[Path]:
    """Return the files that ``transformers`` would read, without variants; without these, all."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    listed = json_object(index).get("weight_map")
    names = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    if bad := [name for name in names if name != Path(name).name or not (path / name).is_file()]:
        raise UsageError(f"{index}: {bad[0]} is not a file beside it", "The model is incomplete, or not to be trusted.")
    return sorted(path / name for name in names)


def _check_sizes(path: Path, what: str, config: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` if configuration and weights don't fit each other, or this machine."""
    from safetensors import SafetensorError, safe_open

    if (size := (path / "tokenizer.json").stat().st_size) > _LARGEST_TOKENIZER:
        raise UsageError(f"{what}: {path / 'tokenizer.json'} has {size:,} bytes, which is no tokenizer")
    files, tensors, shapes = weight_files(path), 0, list[int]()
    if (size := sum(file.stat().st_size for file in files)) > memory_of_machine():
        raise UsageError(f"{what}: its weights take {size:,} bytes, and this machine has {memory_of_machine():,}")
    for file in files:
        try:
            with safe_open(file, "np") as opened:  # reads the header, and compares it with the file's size
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    tensors += 1
                    shapes += opened.get_slice(key).get_shape()
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{what} can't be loaded: {file} is not a whole safetensors file: {error}") from error
    for fields, most, of in ((_LAYERS, tensors, "tensors"), (_WIDTHS, max(shapes, default=0), "numbers in a row")):
        for field in fields:
            if (integer(path / "config.json", config, field) or 0) > most:
                raise UsageError(
                    f"{what}: {path / 'config.json'} has {field} {config[field]:,}, but its weights have {most:,} {of}",
                    "The model is incomplete, or its config.json belongs to another model.",
                )


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
    limit = integer(path / "config.json", config, "max_position_embeddings") or 512
    if config.get("model_type") in OFFSET_POSITIONS:
        padding = integer(path / "config.json", config, "pad_token_id")
        limit -= (1 if padding is None else padding) + 1
    return limit


def default_name(spec: str, *others: object) -> str:
    """Return a store's name for an encoder: that of its directory or repository, and settings not its own."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec).absolute().name if Path(spec).exists() else spec)
    plain = spec if spec == BUNDLED else name.lstrip("-._") or "encoder"
    return "-".join([plain, *(str(setting) for setting in others if setting is not None)])
