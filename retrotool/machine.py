"""Facts about this machine (cores, memory, user, oneDNN), and how to return free memory to the system.

The C library keeps freed memory in pieces that fit earlier requests. Between phases with blocks of different
sizes that adds up. ``give_memory_back`` takes some milliseconds, and does nothing if the C library can't.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(n: int, group: int | None = None) -> None:
    """Limit libraries that are loaded from now on to ``n`` threads each.

    ``group``: also limit this thread, and those that it starts, to this group of n of the cores.
    """
    if group is not None and hasattr(os, "sched_setaffinity"):
        # tokie honours nothing else. With a thread per core in each worker it would lose a third of its rate.
        mine = sorted(os.sched_getaffinity(0))
        first = group * n % len(mine)
        os.sched_setaffinity(0, (mine + mine)[first : first + n])
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(n)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if n > 1 else "false"


def cpu_quota() -> float | None:
    """Return how many cores' time this container may use; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # not this kind of cgroup, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return quota / period
    return None


@cache
def memory_of_machine() -> int:
    """Return the bytes of memory of this machine or container."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
            found = min(found, int(Path(limit).read_text()))
    return found


def user_name() -> str:
    """Return who works here, for the log: ``$RETROTOOL_WHO``, or the user of this process."""
    if (name := os.environ.get("RETROTOOL_WHO")) is not None:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"


def give_memory_back() -> None:
    """Return free memory to the system, and GPU memory to other processes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies ``dtype`` quickly and correctly; torch may remove its operators."""
    import torch

    try:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return False
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return False
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 8, dtype=dtype), None)
        rows, bias = torch.ones(2, 8, dtype=dtype), torch.ones(16, dtype=dtype)
        return bool((torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "") == 9).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
