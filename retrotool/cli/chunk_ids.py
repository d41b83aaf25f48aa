"""Chunk ids as text: ``part:row`` for people, ``part << 32 | row`` in JSON, files and Python.

``store.parts`` has the same arithmetic for arrays, but importing it would make ``--help`` slow.
"""

from __future__ import annotations

import re

_SHIFT = 32


def format_id(chunk: int) -> str:
    """Return a chunk id as ``part:row``; a negative number, which is not an id, unchanged."""
    return f"{chunk >> _SHIFT}:{chunk & (1 << _SHIFT) - 1}" if chunk >= 0 else str(chunk)


def parse_id(text: str) -> int | None:
    """Return the chunk id that ``part:row`` or a plain number stands for, None for any other text."""
    match = re.fullmatch(r"(?:([0-9]{1,10}):)?([0-9]{1,19})", text.strip())
    if match is None:
        return None
    number = int(match[2])
    if match[1] is not None:
        number = int(match[1]) << _SHIFT | number if number < 1 << _SHIFT else -1
    return number if 0 <= number < 1 << 63 else None
