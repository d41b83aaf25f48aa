"""How fast machines are: the table of rates that a plan computes with, and the sizes of encoders.

Rates are measured ones, and are of one core, one GPU, or one host (its file system). For ``embed`` the table has
floating-point operations, and a plan shows the chunks a second that follow for its encoder. *Narrow* encoders have
fewer than 768 dimensions: their matrices are too small to keep a device busy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrotool.encoder.encoder_identity import read_config
from retrotool.errors import UsageError

WIDE = 768
"""Hidden dimensions from which on an encoder is not narrow."""
_EPYC = "an EPYC with AVX-512 BF16"
_SSD = "assumed: a local SSD"
_MOST_SIZE = 1 << 14
_MOST_RATE = 1e24


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast a stage is: ``value`` in ``unit``, of one ``per`` ("core", "GPU" or "host"), and where that is from."""

    stage: str
    value: float
    unit: str
    per: str
    source: str


TABLE = (
    Rate("chunk", 21.5e6, "B/s", "core", f"{_EPYC}: text from files to Parquet"),
    Rate("embed", 3.6e14, "FLOP/s", "GPU", "an H100: 31,600 full chunks of BERT-base"),
    Rate("embed", 2.0e11, "FLOP/s", "core", _EPYC),
    Rate("embed narrow", 1.6e14, "FLOP/s", "GPU", "an H100"),
    Rate("embed narrow", 1.77e11, "FLOP/s", "core", _EPYC),
    Rate("feed", 6.1e4, "chunks/s", "core", f"{_EPYC}: chunks made ready for a GPU"),
    Rate("index", 2.1e14, "FLOP/s", "GPU", "an H100: nearest of many centroids"),
    Rate("index", 8.5e10, "FLOP/s", "core", f"{_EPYC}: nearest of many centroids"),
    Rate("neighbours", 5.0e13, "FLOP/s", "GPU", "an H100: queries against lists"),
    Rate("neighbours", 1.5e10, "FLOP/s", "core", "a Xeon: queries against lists"),
    Rate("read", 2.0e9, "B/s", "host", _SSD),
    Rate("write", 1.0e9, "B/s", "host", _SSD),
)
STAGES = ("chunk", "embed", "feed", "index", "neighbours", "read", "write")
"""Stages whose rate can be given."""


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """A BERT of ``layers`` layers of ``hidden`` dimensions, with ``intermediate`` in its feed-forward network."""

    name: str
    layers: int
    hidden: int
    intermediate: int

    def flops_per_token(self, length: float) -> float:
        """Return the floating-point operations a token of a forward over texts of ``length`` tokens.

        A layer multiplies each token with four matrices hidden × hidden (query, key, value, output) and two hidden ×
        intermediate, and compares it with ``length`` tokens, twice. A multiplication and its addition are two.
        """
        products = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        return self.layers * (2.0 * products + 4.0 * length * self.hidden)


class Rates:
    """Rates of the table, unless another was ``given`` for a stage; ``used`` has those that were asked for."""

    def __init__(self, given: Mapping[str, float]) -> None:
        self._given = given
        self.used: dict[str, Rate] = {}

    def find(self, stage: str, per: str) -> float:
        """Return the rate of a stage on a device, in the unit of the table."""
        return self._use(stage, _of_table(stage, per))

    def find_embed(self, per: str, encoder: EncoderShape, length: float) -> float:
        """Return the chunks of ``length`` tokens, special ones counted, that a device embeds a second."""
        known = _of_table("embed" if encoder.hidden >= WIDE else "embed narrow", per)
        chunks = known.value / (length * encoder.flops_per_token(length))
        return self._use("embed", Rate("embed", chunks, "chunks/s", per, known.source))

    def _use(self, stage: str, rate: Rate) -> float:
        if stage in self._given:
            rate = Rate(stage, float(self._given[stage]), rate.unit, rate.per, "given")
        self.used[stage] = rate
        return rate.value


def _of_table(stage: str, per: str) -> Rate:
    return next(rate for rate in TABLE if (rate.stage, rate.per) == (stage, per))


def check_rates(given: Mapping[str, float]) -> None:
    """Raise ``UsageError`` for a rate of no stage, or that is not a positive number."""
    for stage, value in given.items():
        if stage not in STAGES:
            raise UsageError(f"--rate {stage}={value:g}: {stage!r} is not one of {', '.join(STAGES)}")
        if not 0 < value <= _MOST_RATE:
            raise UsageError(f"--rate {stage}={value:g} is not above 0 and at most {_MOST_RATE:g}")


_KNOWN = {"minilm": (6, 384), "bert-base": (12, 768), "bert-large": (24, 1024)}
_FIELDS = {
    "layers": ("num_hidden_layers", "n_layers"),
    "hidden": ("hidden_size", "dim"),
    "intermediate": ("intermediate_size", "hidden_dim"),
}


def find_shape(spec: str) -> EncoderShape:
    """Return the sizes of the encoder ``spec``: a name, LAYERSxHIDDEN, or a model directory, whose config is read."""
    path = Path(spec).expanduser()
    if spec in _KNOWN:
        layers, hidden = _KNOWN[spec]
    elif sizes := re.fullmatch(r"(\d{1,4})x(\d{1,4})", spec):
        layers, hidden = int(sizes[1]), int(sizes[2])
    elif path.is_dir():
        return _of_directory(spec, path)
    else:
        raise UsageError(
            f"encoder {spec!r} is not a directory, and not known by name",
            f"Known are {', '.join(_KNOWN)}; for another one name its directory, or its layers and hidden dimensions, "
            "such as 12x768.",
        )
    if not layers or not hidden:
        raise UsageError(f"encoder {spec!r}: layers and dimensions are not 0")
    return EncoderShape(spec, layers, hidden, 4 * hidden)


def _of_directory(spec: str, path: Path) -> EncoderShape:
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"encoder {spec!r}: {path} has no config.json", "Name a model directory with one.")
    config = read_config(path)
    return EncoderShape(path.absolute().name, **{size: _size(file, config, names) for size, names in _FIELDS.items()})


def _size(file: Path, config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_SIZE:
        raise UsageError(
            f"{file}: its {names[0]} is {value!r}, not a number from 1 to {_MOST_SIZE:,}",
            "Only encoders of the BERT family can be planned; give others as --encoder LAYERSxHIDDEN.",
        )
    return value
