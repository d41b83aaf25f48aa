"""Devices and number types for encoders, and detection of exhausted memory. Imports torch only for GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from retrotool.errors import AbortError, RetrotoolError, UsageError
from retrotool.lazy import torch

DTYPES = ("float32", "float16", "bfloat16")
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # tokens of a batch: what fits a CPU's caches, or fills a GPU


def check_device(device: str, dtype: str = "auto") -> None:
    """Raise ``UsageError`` for a device or type that can't be used here."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is unknown", f"Use auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if device in ("auto", "cpu"):
        return
    match = re.fullmatch(r"cuda(?::(0|[1-9]\d*))?", device)
    if match is None:
        raise UsageError(f"device {device!r} is unknown", "Use auto, cpu, cuda or cuda:N.")
    if not torch.cuda.is_available():
        advice = "Use --devices cpu, or install a CUDA build of torch."
        raise UsageError(f"device {device!r}: torch sees no GPU", advice)
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0")


def find_devices(devices: str, dtype: str = "auto") -> list[str]:
    """Return the devices in a list such as ``cuda:0,cuda:1``; ``auto``: every GPU, else the CPU."""
    if devices == "auto":
        check_device("cpu", dtype)
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]
    named = [device.strip() for device in devices.split(",")]
    for device in named:
        check_device(device, dtype)
    whole = ["cuda:0" if device == "cuda" else pick_device(device) for device in named]
    twice = next((device for device in whole if device != "cpu" and whole.count(device) > 1), None)
    if twice is not None:
        raise UsageError(f"device {twice!r} is named twice", "Name each GPU once: one process keeps it busy.")
    return whole


def pick_device(device: str) -> str:
    """Return the device that ``auto`` means: the current GPU if there is one."""
    if device not in ("auto", "cuda"):
        return device
    # With its number, since the current GPU differs between threads.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def pick_dtype(device: str, dtype: str) -> str:
    """Return the type that ``auto`` means: float16 on a GPU, float32 on a CPU."""
    automatic = "float16" if device.startswith("cuda") else "float32"
    return automatic if dtype == "auto" else dtype


def is_out_of_memory(error: BaseException | None) -> bool:
    """Check whether an error, or one of its causes, means that the device or host is out of memory."""
    signs = ("not enough memory", "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__
    return False


def check_divisible(error: Exception, what: str, device: str, rows: int, tokens: int) -> None:
    """Return if a batch that ran out of memory can be split; otherwise raise an error naming ``what``."""
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        advice = "Free some memory, or use another device (--devices cpu)."
        raise RetrotoolError(f"{what}: {device} has too little memory for a row of {tokens} tokens", advice) from error


@contextmanager
def checking_device(device: str) -> Iterator[None]:
    """Raise ``AbortError`` if the device is lost."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason, advice = str(error).splitlines()[0], "Run the same command again; finished work is kept."
        raise AbortError(f"{device} is lost: {reason}", advice) from error


def is_lost(error: BaseException) -> bool:
    """Check whether this process can't use a device any more."""
    signs = ("CUDA error", "Triton Error [CUDA]")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs) and not is_out_of_memory(error)
