"""Devices and number types that an encoder can be put on, and telling when memory has run out.

torch is imported only where a GPU is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from retrotool.errors import AbortError, RetrotoolError, UsageError
from retrotool.lazy import torch

DTYPES = ("float32", "float16", "bfloat16")
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of a batch: on a CPU what stays in its caches, on a GPU what fills it."""
MOST_BATCH_TOKENS = 1 << 19


def check_device(device: str, dtype: str = "auto") -> None:
    """``UsageError`` for a device or a type that an encoder can't be put on here; imports torch only if it has to."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known", f"Known are auto, {', '.join(DTYPES)}.")
    if device in ("auto", "cpu"):
        return
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"device {device!r} is not known", "Use auto, cpu, cuda or cuda:N.")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch sees no GPU", "Use --device cpu, or install a CUDA build of torch.")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs, numbered from 0")


def find_devices(devices: str, dtype: str = "auto") -> list[str]:
    """The devices that a list such as ``cuda:0,cuda:1`` names; ``auto``: every GPU that torch sees, else the CPU.

    ``UsageError`` for one that is not here, and for a GPU named twice (``cpu,cpu`` halves the cores).
    """
    if devices == "auto":
        check_device("cpu", dtype)
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]
    named = [device.strip() for device in devices.split(",")]
    for device in named:
        check_device(device, dtype)
    whole = ["cuda:0" if device == "cuda" else pick_device(device) for device in named]
    twice = next((device for device in whole if device != "cpu" and whole.count(device) > 1), None)
    if twice is not None:
        raise UsageError(f"device {twice!r} is named twice", "One process a GPU keeps it busy.")
    return whole


def pick_device(device: str) -> str:
    """What ``auto`` stands for: the current GPU where there is one."""
    if device not in ("auto", "cuda"):
        return device
    # With its number: which GPU is the current one is a matter of each thread.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def pick_dtype(device: str, dtype: str) -> str:
    """What ``auto`` stands for: float16 on a GPU, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "float16" if device.startswith("cuda") else "float32"


def batch_tokens_of(device: str, asked: int | None) -> int:
    """Tokens of a batch; ``UsageError`` for more than attention on a GPU can have rows of."""
    if asked is not None and not 1 <= asked <= MOST_BATCH_TOKENS:
        raise UsageError(f"--batch-tokens {asked} is not between 1 and {MOST_BATCH_TOKENS}")
    return asked or BATCH_TOKENS[device.split(":")[0]]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the device, or the host, has no memory left."""
    signs = ("not enough memory", "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__
    return False


def check_divisible(error: Exception, what: str, device: str, rows: int, tokens: int) -> None:
    """Return if what ``error`` ended, a batch of ``rows`` rows and ``tokens`` tokens, can be computed in smaller ones.

    Raises ``error`` unless memory ran out; ``RetrotoolError`` that names ``what`` if the batch is a single row.
    """
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise RetrotoolError(
            f"{what}: {device} has no memory for a row of {tokens} tokens",
            "Free some of it, or use another device (--device cpu).",
        ) from error


@contextmanager
def checking_device(device: str) -> Iterator[None]:
    """``AbortError`` if the device can't be used any more."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason, advice = str(error).splitlines()[0], "Run the same command again; what is finished is kept."
        raise AbortError(f"{device} is lost: {reason}", advice) from error


def is_lost(error: BaseException) -> bool:
    """Whether a device can't be used any more by this process, whatever is asked of it."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)
