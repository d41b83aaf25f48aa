"""``doctor``: check this machine, and the place of a store, for what makes commands slow or stop.

The only thing written is the lease of a run in the store, a few times, to measure how long a durable write
takes. Takes about three seconds, most of it to import torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from retrotool import machine
from retrotool.cli.output import count, size
from retrotool.errors import RetrotoolError
from retrotool.lazy import faiss, torch
from retrotool.scratch import more_scratch, scratch_folder
from retrotool.store import cache
from retrotool.store.bucket_copies import bucket_settings
from retrotool.store.leases import Run, renew
from retrotool.store.store import Store

EXTRAS = ("minilm", "sentencepiece", "warc", "cloud", "ray")
_OLD_KERNELS = ("Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Atom", "Katmai", "Coppermine", "generic")
_CORENAMES = ("openblas_get_corename", "scipy_openblas_get_corename64_", "openblas_get_corename64_")
_WRITES, _WRITING_SECONDS = 5, 0.5  # the most writes to measure, and when to stop
_SLOW_WRITE, _SKEW = 0.1, 60.0  # seconds
_LEAST_MEMORY, _LEAST_SHARED, _LEAST_DISK = 2 << 30, 1 << 30, 5 << 30
_OTHER_FILES = 256  # that a process has open besides mapped ones
SHARED = "/dev/shm"  # noqa: S108


@dataclass(frozen=True, slots=True)
class Check:
    """What was found about a subject; ``advice`` says what to do about it, or is empty."""

    name: str
    status: Literal["ok", "info", "warn", "fail"]
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of ``doctor``, see ``docs/json.md``; not ``ok``: a check failed."""

    ok: bool
    checks: tuple[Check, ...]


def doctor(root: str | Path | None = None) -> Diagnosis:
    """Check this machine, and the place of a store."""
    checks = (*_packages(), _gpus(), _kernels(), *_limits(), *(() if root is None else _store(root)))
    return Diagnosis(all(check.status != "fail" for check in checks), checks)


def _check(name: str, found: str, advice: str, *, wrong: object) -> Check:
    return Check(name, "warn", found, advice) if wrong else Check(name, "ok", found)


def _packages() -> Iterator[Check]:
    pattern = re.compile(r"([\w.-]+)[^;]*(?:;.*extra == ['\"](\w+))?")
    needed = [match.groups() for one in metadata.requires("retrotool") or () if (match := pattern.match(one))]
    found = {name: version_of(name) for name, _ in needed}
    required = [name for name, extra in needed if extra is None]
    shown = [f"Python {platform.python_version()}", f"retrotool {version_of('retrotool')}"]
    yield Check("versions", "ok", ", ".join([*shown, *(f"{name} {found[name]}" for name in required if found[name])]))
    if missing := [name for name in required if not found[name]]:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    for extra in EXTRAS:
        if lacks := [name for name, of in needed if of == extra and not found[name]]:
            yield Check(f"extra {extra}", "info", "not installed", f"If you need it: pip install {' '.join(lacks)}")


def version_of(package: str) -> str:
    """Return the version of an installed package, "" for others."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _gpus() -> Check:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names += [] if not names or torch.cuda.is_bf16_supported() else ["without bfloat16"]
    unseen = not names and Path("/dev/nvidiactl").exists()
    seen = ", ".join(names) or ("torch sees no GPU, but the driver of one is loaded" if unseen else "no GPU")
    bfloat16 = "" if machine.has_onednn(torch.bfloat16) else "not "
    advice = "Install a build of torch for the driver's CUDA version: https://pytorch.org/get-started/locally"
    return _check("devices", f"{seen}; bfloat16 is {bfloat16}fast on the CPU", advice, wrong=unseen)


def _kernels() -> Check:
    """Check which kernels OpenBLAS chose: for a CPU that it does not know, very old ones."""
    kernels = loaded_kernels()
    best = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability(), "")
    slow = best and any(kernel in _OLD_KERNELS for kernel in kernels.values())
    shown = ", ".join(f"{library}: {kernel}" for library, kernel in kernels.items()) or "none"
    advice = f"Products are several times as slow as they could be. Set OPENBLAS_CORETYPE={best} in the environment."
    return _check("OpenBLAS", shown, advice, wrong=slow)


def loaded_kernels() -> dict[str, str]:
    """Return the kernels of the OpenBLAS of numpy and faiss, by package."""
    _ = faiss.IndexFlat  # loads it
    found = {}
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        for path in sorted({line[line.index("/") :] for line in lines if "openblas" in line}):
            library = ctypes.CDLL(path)
            for function in (getattr(library, name) for name in _CORENAMES if hasattr(library, name)):
                function.restype = ctypes.c_char_p
                found[Path(path).parent.name.partition(".")[0]] = function().decode()
    return found


def _limits() -> Iterator[Check]:
    cores, quota = machine.cores(), machine.cpu_quota()
    few = quota is not None and quota < cores
    threads = max(1, int(quota or cores))
    advice = f"Set OMP_NUM_THREADS={threads} and RETROTOOL_WORKERS={threads}, or processes will be paused."
    yield _check("cores", count(cores, "core") + (f", but time for {quota:g}" if few else ""), advice, wrong=few)
    memory = machine.memory_of_machine()
    advice = "Raise the container's limit, or use --memory and a small --part-size."
    yield _check("memory", size(memory), advice, wrong=memory < _LEAST_MEMORY)
    if (shared := free_in(SHARED)) is not None:
        advice = "DataLoader workers pass batches there: docker run --shm-size=8g, or num_workers=0."
        yield _check(SHARED, f"{size(shared)} free", advice, wrong=shared < _LEAST_SHARED)
    folder = scratch_folder()
    if (scratch := free_in(folder)) is None or not os.access(folder, os.W_OK):
        yield Check("scratch", "fail", f"{folder} can't be written", more_scratch("some space"))
    else:
        advice = more_scratch(size(_LEAST_DISK))
        yield _check("scratch", f"{folder}: {size(scratch)} free", advice, wrong=scratch < _LEAST_DISK)
    held, limit = cache.usage()
    yield Check("cache", "ok", f"{cache.cache_folder()}: {size(held)} of at most {size(limit)} copied from buckets")


def free_in(folder: str) -> int | None:
    """Return the free bytes of a folder's file system; None if there is no such folder."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def _store(root: str | Path) -> Iterator[Check]:
    try:
        store = Store.open(root)
        milliseconds, skew = durable_write(store)
    except (RetrotoolError, OSError) as error:
        yield Check("store", "fail", str(error), getattr(error, "advice", ""))
        return
    if (free := free_in(store.place)) is not None:
        yield _check("disk", f"{size(free)} free", "Free some space.", wrong=free < _LEAST_DISK)
    advice = "Every commit takes several of these: put the store on a local disk or a faster file system."
    yield _check("durable write", f"{milliseconds:.1f} ms", advice, wrong=milliseconds > 1000 * _SLOW_WRITE)
    advice = "Leases go by the storage's clock and still work, but times in the log are wrong: use NTP."
    yield _check(
        "clock", f"{abs(skew):.1f} s {'before' if skew < 0 else 'after'} the storage's", advice, wrong=abs(skew) > _SKEW
    )
    for one in bucket_settings(store.storage.uri):
        status: Literal["info", "warn"] = "warn" if one.status == "setting" else "info"
        yield Check("erase in the bucket", status, one.what, one.advice)
    groups = [store.state.group(kind, name) for kind in ("embeddings", "index") for name in store.state.names(kind)]
    due, limit = max(map(len, groups), default=0) + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = f"at most {limit:,}, {due:,} needed to map the store's vectors"
    yield _check("open files", found, f"ulimit -n {due}", wrong=limit < due)


def durable_write(store: Store) -> tuple[float, float]:
    """Return the milliseconds of a small write, and by how many seconds the storage's clock is ahead."""
    spent, writes, skew = 0.0, 0, 0.0
    while writes < _WRITES and spent < _WRITING_SECONDS:
        begun = time.perf_counter()
        with Run(store.storage) as run:
            spent, writes = spent + time.perf_counter() - begun, writes + 1
            skew = renew(store.storage, run.id) - time.time()
    return 1000 * spent / writes, skew
