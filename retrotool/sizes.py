"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from retrotool.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "t": 10**12, "ti": 2**40}


def parse_size(option: str, text: str, *, least: int = 1) -> int:
    """Parse a size such as ``64MiB``, ``10 MB`` or ``4096``: bytes, at least ``least``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = 0 if match is None else int(Fraction(match[1]) * _UNITS[match[2] or ""])
    if not least <= size < 1 << 63:
        at_least = f" of at least {least >> 20} MiB" if least > 1 else ""
        raise UsageError(f"{option} {text}: not a size{at_least}", "Give for example 64MiB.")
    return size


def megabytes(n: int) -> str:
    """Return bytes as text, rounded up to megabytes, or to kilobytes below one."""
    return f"{-(-n // 1000):,} kB" if n < 10**6 else f"{-(-n // 10**6):,} MB"
