"""What machine this is: its processor and GPU by name."""

from __future__ import annotations

import platform
from pathlib import Path

from retrotool.encoder.devices import cores


def describe() -> str:
    """Processor, cores that may be used, and the first GPU."""
    found = f"{_processor()}, {cores()} cores"
    if not has_gpu():
        return found
    import torch

    return f"{found}, {torch.cuda.get_device_name(0)}"


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine() or "unknown processor"
