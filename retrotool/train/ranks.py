"""Which rank of how many this process is."""

from __future__ import annotations

import os

import torch

from retrotool.errors import UsageError


def is_distributed() -> bool:
    """Whether ranks are those of ``torch.distributed``."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def own_rank() -> tuple[int, int]:
    """Rank and number of ranks: of ``torch.distributed``, or the environment, or one."""
    if is_distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _number("RANK"), _number("WORLD_SIZE")
    return 0, 1


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UsageError(
            f"the environment has {variable}={os.environ[variable]!r}, which is no number",
            "Set it to one, or give rank= and world_size=.",
        ) from None
