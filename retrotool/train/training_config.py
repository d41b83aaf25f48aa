"""The settings of ``retrotool train``: a TOML file with the sections [model], [data] and [optimiser].

Every key is checked: one that is unknown, of another type or out of range is a ``UsageError`` that names it.
The defaults are those of the dataclasses here, and of ``RetroConfig`` for [model].
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from retrotool.cli.options import read_given_file
from retrotool.errors import UsageError

Section = TypeVar("Section")
_MAY_BE_ZERO = ("seed", "warmup_steps", "weight_decay", "final_learning_rate")
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class DataConfig:
    """What to read, as for ``RetroDataset``; an empty ``table`` is main, or the only one.

    ``batch_size``: sequences that a process reads at once.
    """

    table: str = ""
    sequence_length: int = 2048
    batch_size: int = 8
    packed: bool = True
    seed: int = 0
    shuffle_blocks: int = 16


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, whose rate rises for ``warmup_steps`` and falls as a cosine until the last of all ``steps``.

    ``accumulation``: batches of each process in a step. ``clip``: largest norm of the gradient. ``seed``: for
    the initial weights. ``checkpoint_steps``: steps between two checkpoints.
    """

    steps: int
    accumulation: int = 1
    learning_rate: float = 2e-4
    final_learning_rate: float = 2e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bfloat16: bool = False
    compile: bool = False
    checkpoint_steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if max(self.beta1, self.beta2) >= 1:
            raise UsageError(f"beta1={self.beta1} and beta2={self.beta2} are not less than 1")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The settings in ``file``; the section ``model`` is read once the store is known."""

    file: str
    model: Mapping[str, Any]
    data: DataConfig
    optimiser: OptimiserConfig


def read_training_config(path: str | Path) -> TrainingConfig:
    """Read a TOML file; ``UsageError`` for what it can't have."""
    try:
        found = tomllib.loads(read_given_file("--config", path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error
    known = ("model", "data", "optimiser")
    for name, section in found.items():
        if name not in known or not isinstance(section, dict):
            raise UsageError(f"{path}: {name} is not a section", f"The sections are {', '.join(known)}.")
    model, data, optimiser = (found.get(name, {}) for name in known)
    optimiser_config = parse_section(OptimiserConfig, optimiser, f"{path}: optimiser")
    return TrainingConfig(str(path), model, parse_section(DataConfig, data, f"{path}: data"), optimiser_config)


def parse_section(kind: type[Section], values: Mapping[str, Any], where: str, **fixed: Any) -> Section:
    """Return ``values``, and those that are ``fixed``, as a dataclass; errors begin with ``where``."""
    types, known = get_type_hints(kind), [field for field in fields(kind) if field.name not in fixed]  # type: ignore[arg-type]
    names = [field.name for field in known]
    for key, value in values.items():
        if key not in names:
            raise UsageError(f"{where}.{key} is unknown", f"Known are: {', '.join(names)}.")
        due = types[key]
        if type(value) is not due and (type(value), due) != (int, float):
            raise UsageError(f"{where}.{key} is {value!r}, not {_TYPES[due]}")
        if due in (int, float) and not (value > 0 or (value == 0 and key in _MAY_BE_ZERO)):
            raise UsageError(f"{where}.{key} is {value!r}, which is too small")
    for field in known:
        if field.default is MISSING and field.name not in values:
            raise UsageError(f"{where}.{field.name} is missing")
    try:
        return kind(**values, **fixed)
    except UsageError as error:
        raise UsageError(f"{where}: {error}", error.advice) from None
