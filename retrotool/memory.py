"""How much memory there is, and how what is free goes back to the system.

The C library keeps what was freed for the next who asks, in pieces that fit what was asked before. Between phases that
ask for blocks of different sizes that adds up. Cost: a few milliseconds. Does nothing where the C library can't.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@lru_cache(1)
def of_machine() -> int:
    """Bytes of memory of this machine, or of the container that this is."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            found = min(found, int(Path(limit).read_text()))
    return found


def give_back() -> None:
    """Give free memory back to the system, and that of GPUs to other processes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(1)
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
