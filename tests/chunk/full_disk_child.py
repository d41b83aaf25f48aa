"""Run by test_full_disk.py in a process of its own: ``chunk`` on a disk that is full, reported as JSON on stdout."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from chunk_helpers import run_chunk

from retrotool import api

_fail_at: int | None = None
_events: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what takes space on a disk, and fail at the call that is asked for."""
    if event != "retrotool.disk" or arguments[0] in ("read", "unlink"):
        return
    operation, path = arguments
    _events.append(f"{operation} {Path(path).parent.name}")
    if _fail_at == len(_events) - 1:
        raise OSError(errno.ENOSPC, "No space left on device", path)


def _attempt(store: Path, source: Path, part_size: int) -> dict[str, Any]:
    result = run_chunk(store, source, "--part-size", part_size)
    found = api.verify(store)
    reported = {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
    return {**reported, "problems": list(map(str, found.problems)), "content": found.content}


def inject(base: Path, source: Path) -> list[dict[str, Any]]:
    """Fail once at the first and once at the last call of each kind in each folder; then go on without failing."""
    global _fail_at
    sys.addaudithook(_hook)
    store = base.with_name("full")
    shutil.copytree(base, store)
    _events.clear()
    run_chunk(store, source, "--part-size", 20)
    seen = list(_events)
    found = []
    for point in sorted({seen.index(event) for event in seen} | {len(seen) - 1 - seen[::-1].index(e) for e in seen}):
        shutil.rmtree(store)
        shutil.copytree(base, store)
        _events.clear()
        _fail_at = point
        full = _attempt(store, source, 20)
        _fail_at = None
        found.append({"point": f"{point}: {seen[point]}", "full": full, "after": _attempt(store, source, 20)})
    return found


def mount(base: Path, source: Path) -> list[dict[str, Any]]:
    """Fill a real file system of 384 KiB, then make it larger. Needs a mount namespace of its own."""
    folder = base.with_name("mounted")
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=384k", "none", folder], stderr=subprocess.DEVNULL
    ).returncode:
        return []
    shutil.copytree(base, folder / "store")
    full = _attempt(folder / "store", source, 1000)
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    return [{"point": "tmpfs", "full": full, "after": _attempt(folder / "store", source, 1000)}]


if __name__ == "__main__":
    how, base, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print(json.dumps({"inject": inject, "mount": mount}[how](base, source)))
