"""Arguments that several commands share."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

import typer

from retrotool.errors import UsageError


def opt(
    help: str,  # noqa: A002  as typer has it
    *names: str,
    metavar: str | None = None,
    panel: str | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Return an option of typer with its help; ``least`` and ``most`` bound a number, ``panel`` heads it in the help.

    ``names`` are by default "--" and the parameter's name. The default value is shown, unless it is None or False.
    """
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, min=least, max=most)


def arg(help: str, *, metavar: str) -> Any:  # noqa: A002
    """Return an argument of typer with its help."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


StoreArgument = Annotated[str, arg("Directory of the store.", metavar="STORE")]
Json = Annotated[bool, opt("Print one JSON object on stdout.", "--json")]
EncoderOption = Annotated[
    str | None, opt("Encoder whose embeddings to use, if the store has several.", "--encoder", metavar="NAME")
]
IndexOption = Annotated[
    str | None, opt("Index to search.  [default: the default index, else main]", "--index", metavar="NAME")
]
DevicesOption = Annotated[
    str,
    opt(
        "auto (every GPU, else the CPU), cpu, cuda, cuda:N; several with commas, one process each.",
        "--devices",
        "--device",
        metavar="D,...",
    ),
]
ShardOption = Annotated[
    str | None,
    opt("This is job I of N on the store, from 0: begin with that share of the work.", "--shard", metavar="I/N"),
]
Device = Annotated[str, opt("auto (a GPU where there is one), cpu, cuda or cuda:N.")]

LEAST_MEMORY = 16 << 20
"""Bytes that ``--memory`` must leave."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "t": 10**12, "ti": 2**40}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "0": "\0", "f": "\f"}


def parse_size(option: str, text: str, *, least: int = 1) -> int:
    """Bytes, not below ``least``, from ``64MiB``, ``10 MB`` or ``4096``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = 0 if match is None else int(Fraction(match[1]) * _UNITS[match[2] or ""])
    if not least <= size < 1 << 63:
        at_least = f" of at least {least >> 20} MiB" if least > 1 else ""
        raise UsageError(f"{option} {text}: it is a size{at_least}, such as 64MiB")
    return size


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """(i, n) of ``i/n``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text)
    if match is None:
        raise UsageError(f"--shard {text}: it is a job and how many there are, such as 3/16")
    return int(match[1]), int(match[2])


def parse_count(option: str, text: str) -> int:
    """A number from ``1.75T``, ``300B`` (or ``300G``), ``20M``, ``500k``, ``1e9`` or ``4096``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d\d?)?)\s*([kmbgt])?", text.strip().lower())
    count = 0 if match is None else int(Fraction(match[1]) * _COUNTS[match[2] or ""])
    if count < 1:
        raise UsageError(f"{option} {text}: it is a number, such as 1.75T, 20M or 4096")
    return count


def unescape(text: str) -> str:
    """A text with the usual backslash escapes (of n, t, r, f, 0 and the backslash) made what they stand for."""
    return re.sub(r"\\([ntrf0\\])", lambda match: _ESCAPES[match[1]], text)


def check_utf8(option: str, text: str) -> None:
    """``UsageError`` if a text is not UTF-8: the shell hands any bytes on, and no file of a store can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {text!a} is not UTF-8") from None
