"""Figures for people, of three digits: numbers, bytes, hours and rates."""

from __future__ import annotations

from retrotool.plan.rates import Rate

_DIGITS = 999.5
"""From here on three digits round up to the next unit."""


def _scaled(n: float, units: tuple[str, ...]) -> tuple[float, str]:
    """A number in the largest unit, each a thousand of the one before, that leaves it at least 1."""
    for unit in units[:-1]:
        if n < _DIGITS:
            return n, unit
        n /= 1000
    return n, units[-1]


def _digits(n: float) -> str:
    """Three digits, or as many as a larger whole number has."""
    return f"{n:,.0f}" if n >= _DIGITS else f"{n:#.3g}".removesuffix(".")


def number(n: float) -> str:
    """A count: ``950``, ``12.3k``, ``28.6G``, ``1.75T``."""
    value, unit = _scaled(n, ("", "k", "M", "G", "T"))
    return f"{value:,.0f}" if not unit else f"{value:,.0f}{unit}" if value >= _DIGITS else f"{value:.3g}{unit}"


def size(n: float) -> str:
    """Bytes: ``12.3 GB``, in powers of a thousand."""
    value, unit = _scaled(n, ("B", "kB", "MB", "GB", "TB"))
    return f"{value:.0f} B" if unit == "B" else f"{_digits(value)} {unit}"


def hours(n: float) -> str:
    """Hours: ``0``, ``<0.01``, ``0.84``, ``8.1``, ``251``, ``12,345``."""
    if n and n < 0.005:
        return "<0.01"
    if not n:
        return "0"
    return f"{n:.2f}" if n < 0.995 else f"{n:.1f}" if n < 99.95 else f"{n:,.0f}"


def rate(one: Rate) -> str:
    """A rate with its unit: ``360 TFLOP/s``, ``21.5 MB/s``, ``61,000 chunks/s``."""
    if one.unit == "chunks/s":
        return f"{one.value:,.0f} {one.unit}"
    value, prefix = _scaled(one.value, ("", "k", "M", "G", "T", "P"))
    return f"{_digits(value)} {prefix}{one.unit}"
