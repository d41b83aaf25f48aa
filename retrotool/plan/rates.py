"""How fast machines are: the rates that a plan reckons with, where each comes from, and the files that hold others.

A rates file is a JSON object of some of the keys below, with numbers. What it has takes the place of what is
built in. One that ``plan --calibrate`` wrote also says of which ``machine`` and ``date`` it is; any can be written by
hand. Keys end in their unit. *core* and *gpu* are of one; *disk* is of the file system that holds the store, as one
host sees it; *narrow* is of encoders of fewer than 768 dimensions, whose matrices are too small to keep a device busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import UsageError

WIDE = 768
"""Hidden dimensions from which on an encoder is not narrow."""
_ABOUT = ("machine", "date")
_LEAST, _MOST = 1, 1e24
_ADVICE = 'Mend it, such as {"embed_gpu_flop_per_s": 3e14}, or remove it.'
_H100 = "built in: an H100"
_EPYC = "built in: an EPYC with AVX-512 BF16"


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate: ``value`` in ``unit``, of what, and where the value comes from."""

    key: str
    value: float
    unit: str
    what: str
    source: str


BUILT_IN = (
    Rate("chunk_core_bytes_per_s", 21.5e6, "B/s", "chunk: text from files to Parquet, a core", _EPYC),
    Rate("embed_gpu_flop_per_s", 3.6e14, "FLOP/s", "embed: forward, a GPU", f"{_H100}, 31,600 chunks/s of BERT-base"),
    Rate("embed_gpu_narrow_flop_per_s", 1.6e14, "FLOP/s", "embed: forward of a narrow encoder, a GPU", _H100),
    Rate("embed_core_flop_per_s", 2.0e11, "FLOP/s", "embed: forward, a core", f"{_EPYC}, 17 chunks/s of BERT-base"),
    Rate("embed_core_narrow_flop_per_s", 1.77e11, "FLOP/s", "embed: forward of a narrow encoder, a core", _EPYC),
    Rate("feed_core_chunks_per_s", 6.1e4, "chunks/s", "embed: chunks made ready for a GPU, a core", _EPYC),
    Rate("assign_gpu_flop_per_s", 2.1e14, "FLOP/s", "index: nearest of many centroids, a GPU", _H100),
    Rate("assign_core_flop_per_s", 8.5e10, "FLOP/s", "index: nearest of many centroids, a core", _EPYC),
    Rate("search_gpu_flop_per_s", 5.0e13, "FLOP/s", "neighbours: queries against lists, a GPU", _H100),
    Rate("search_core_flop_per_s", 1.5e10, "FLOP/s", "neighbours: queries against lists, a core", "built in: a Xeon"),
    Rate("disk_write_bytes_per_s", 1.0e9, "B/s", "files written and fsynced, a host", "assumed: a local SSD"),
    Rate("disk_read_bytes_per_s", 2.0e9, "B/s", "files read, a host", "assumed: a local SSD"),
)
KEYS = tuple(rate.key for rate in BUILT_IN)


@dataclass(frozen=True, slots=True)
class Rates:
    """All rates, by key; ``file`` is where some of them are from, "" if none is."""

    by_key: Mapping[str, Rate]
    file: str = ""

    def __getitem__(self, key: str) -> float:
        """The value of a rate, in the unit that its key ends in."""
        return self.by_key[key].value


def default_file() -> Path:
    """Where ``plan --calibrate`` writes, and ``plan`` looks, if nothing else is said."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification a relative path is to be ignored.
    folder = Path(cache) if Path(cache).is_absolute() else Path("~/.cache").expanduser()
    return folder / "retrotool" / "rates.json"


def find_rates(file: Path | None) -> Rates:
    """The rates of ``file``, or of the default file if that is there, over those that are built in."""
    if file is None:
        file = default_file()
        if not file.is_file():
            return Rates({rate.key: rate for rate in BUILT_IN})
    return Rates({rate.key: rate for rate in _merged(file)}, str(file))


def _merged(file: Path) -> Iterable[Rate]:
    fields = read_file(file)
    source = f"given in {file}"
    if all(name in fields for name in _ABOUT):
        source = f"calibrated on {fields['machine']}, {fields['date']}"
    for rate in BUILT_IN:
        if rate.key in fields:
            yield Rate(rate.key, float(fields[rate.key]), rate.unit, rate.what, source)
        else:
            yield rate


def read_file(file: Path) -> dict[str, Any]:
    """The fields of a rates file; ``UsageError`` names what is wrong in it."""
    try:
        fields = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{file}: no such file",
            f"Measure the rates of this machine with: retrotool plan --calibrate --rates {file}",
        ) from None
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{file}: not JSON: {error}", _ADVICE) from error
    if not isinstance(fields, dict):
        raise UsageError(
            f"{file}: a {type(fields).__name__}, not a JSON object", 'Such as {"embed_gpu_flop_per_s": 3e14}'
        )
    for key, value in fields.items():
        _check(file, key, value)
    return fields


def _check(file: Path, key: str, value: Any) -> None:
    if key in _ABOUT:
        if not isinstance(value, str):
            raise UsageError(f"{file}: its {key} is {value!r}, not a text", _ADVICE)
    elif key not in KEYS:
        raise UsageError(f"{file}: {key!r} is no rate", f"{_ADVICE} Known are {', '.join(KEYS)}.")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _MOST:
        raise UsageError(f"{file}: its {key} is {value!r}, not a number from {_LEAST} to {_MOST:g}", _ADVICE)


def save(file: Path, measured: Mapping[str, float], machine: str, date: str) -> None:
    """Write a rates file, in place of one that is there; a kill leaves the old one."""
    fields = {"machine": machine, "date": date, **measured}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2) + b"\n")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
