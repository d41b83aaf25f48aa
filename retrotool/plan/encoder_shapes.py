"""The sizes of an encoder that decide what it costs: of a model directory, or of a model that is well known by name.

Nothing is loaded or fetched: a directory's ``config.json`` is read, and a name is looked up in a table of the models
that people embed with. All of them are of the BERT family; versions and languages of one model are of one size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrotool.encoder.identity import read_config
from retrotool.errors import UsageError
from retrotool.tokenizers import BUNDLED


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """A BERT of ``layers`` layers of ``hidden`` dimensions, with ``intermediate`` in its feed-forward network.

    ``dimension`` is that of its vectors.
    """

    name: str
    dimension: int
    layers: int
    hidden: int
    intermediate: int

    def flops_per_token(self, length: float) -> float:
        """Floating-point operations a token of a forward over texts of ``length`` tokens, special ones counted.

        A layer multiplies each token with four matrices hidden × hidden (query, key, value, output) and two hidden ×
        intermediate, and compares it with ``length`` tokens, twice. A multiplication and its addition are two.
        """
        products = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        return self.layers * (2.0 * products + 4.0 * length * self.hidden)


_MINILM_6, _SMALL, _DISTILLED = (6, 384, 1536), (12, 384, 1536), (6, 768, 3072)
_BASE, _LARGE = (12, 768, 3072), (24, 1024, 4096)
KNOWN = {
    "bert-base": _BASE,
    "bert-large": _LARGE,
    "bge-small": _SMALL,
    "bge-base": _BASE,
    "bge-large": _LARGE,
    "contriever": _BASE,
    "distilbert-base": _DISTILLED,
    "e5-small": _SMALL,
    "e5-base": _BASE,
    "e5-large": _LARGE,
    "gte-small": _SMALL,
    "gte-base": _BASE,
    "gte-large": _LARGE,
    "minilm-l6": _MINILM_6,
    "minilm-l12": _SMALL,
    "mpnet-base": _BASE,
    "roberta-base": _BASE,
    "roberta-large": _LARGE,
}
"""Layers, hidden and intermediate size, by a model's name without organisation, language and version."""

_BEFORE = re.compile(r"^(?:(?:all|paraphrase|multilingual|xlm)-)+")
_BEHIND = re.compile(r"-(?:cased|uncased|en|zh|multilingual|h384|v\d+(?:\.\d+)?)(?=-|$)")
_MOST = 1 << 14
_FIELDS = {
    "layers": ("num_hidden_layers", "n_layers"),
    "hidden": ("hidden_size", "dim"),
    "intermediate": ("intermediate_size", "hidden_dim"),
}


def find_shape(spec: str) -> EncoderShape:
    """The sizes of the encoder ``spec``: minilm, a model directory, or a well-known name; ``UsageError`` for others."""
    path = Path(spec).expanduser()
    if spec != BUNDLED and path.is_dir():
        return _of_directory(spec, path)
    sizes = KNOWN.get("minilm-l6" if spec == BUNDLED else _plain(spec))
    if sizes is None:
        raise UsageError(
            f"encoder {spec!r} is no directory, and not known by name",
            f"Known are {BUNDLED} and {', '.join(KNOWN)}, with or without organisation and version; "
            "for any other one name a directory with its config.json.",
        )
    layers, hidden, intermediate = sizes
    return EncoderShape(spec, hidden, layers, hidden, intermediate)


def _plain(name: str) -> str:
    """A model's name without its organisation, language and version: ``BAAI/bge-base-en-v1.5`` → ``bge-base``."""
    return _BEHIND.sub("", _BEFORE.sub("", name.lower().rpartition("/")[2]))


def _of_directory(spec: str, path: Path) -> EncoderShape:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"encoder {spec!r}: {path} has no config.json", "Name a model directory with one.")
    config = read_config(path)
    sizes = {size: _number(file, config, fields) for size, fields in _FIELDS.items()}
    return EncoderShape(path.absolute().name, sizes["hidden"], **sizes)


def _number(file: Path, config: dict[str, Any], fields: tuple[str, ...]) -> int:
    found = [config[field] for field in fields if config.get(field) is not None]
    if not found:
        raise UsageError(f"{file} has no {fields[0]}", "It is no encoder of the BERT family: its cost is not known.")
    value = found[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise UsageError(f"{file}: its {fields[0]} is {value!r}, not a number from 1 to {_MOST:,}")
    return value
