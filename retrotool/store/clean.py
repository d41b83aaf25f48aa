"""Taking away what dead runs left: temporary files, files that no commit names, staged tasks that can't be committed.

Safe beside live writers: a file is removed only if neither the state nor a staged task names it, and its run is
dead or the log shows that a commit removed it. Files are listed first, then it is asked which runs are dead, then
staging is read and then the log: a file on its way from one to the next is always seen in one of them, and a run that
is dead has committed all that it ever will before the log is read. Cost: one listing of the store's folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from retrotool.errors import CorruptError
from retrotool.store import disk, log, paths, runs, staging
from retrotool.store.atomic import TEMPORARY
from retrotool.store.paths import FileName
from retrotool.store.store import Store

_FOLDERS = (*paths.DATA_KINDS, "staging", "log", "checkpoints")


def clean(store: Store, *, thorough: bool = False) -> int:
    """Remove left-overs of dead runs; return how many files.

    ``thorough``: also files that a commit removed and a kill left on the disk, while the run that once wrote them is
    still alive. That reads the whole log if there are files of live runs on their way.
    """
    candidates = [(path, path.relative_to(store.root).as_posix()) for path in _files(store.root)]
    owners = {relative: _owner(path, relative) for path, relative in candidates}
    alive = {run: runs.is_alive(store.root, run) for run in set(owners.values()) if run is not None}
    staged = {path for task in staging.read_staged(store.root).values() for path in task.files()}
    state = store.refresh()
    removed = 0
    suspects: list[Path] = []
    for path, relative in candidates:
        owner = owners[relative]
        if owner is None or relative in staged or (_is_data(relative) and state.has(relative)):
            continue
        if alive[owner]:
            suspects.append(path)
            continue
        disk.unlink(path)
        removed += 1
    if not thorough:
        return removed
    once = _ever_added(store, [path.relative_to(store.root).as_posix() for path in suspects])
    for gone in once:
        disk.unlink(paths.inside(store.root, gone))
    return removed + len(once)


def _files(root: Path) -> list[Path]:
    found = []
    for folder in _FOLDERS:
        for directory, _, names in os.walk(root / folder):
            found += [Path(directory) / name for name in names]
    found += [path for path in root.iterdir() if path.name.startswith(TEMPORARY)]
    return found


def _owner(path: Path, relative: str) -> str | None:
    """The run that wrote a file; None for files that are no business of clean-up."""
    if path.name.startswith(TEMPORARY):
        return path.name.removeprefix(TEMPORARY)[:8]
    if path.name.startswith("run-"):
        return path.stem.removeprefix("run-")
    if relative.startswith(("log/", "checkpoints/")):
        return None
    try:
        return FileName.parse(relative).run
    except CorruptError:
        return None  # not ours: a person put it there, or it is a staged entry


def _is_data(relative: str) -> bool:
    return not relative.startswith("staging/") and TEMPORARY not in relative


def _ever_added(store: Store, candidates: list[str]) -> list[str]:
    """Those of ``candidates`` that a commit added (and, not being live, another removed). Reads the log backwards."""
    left = {path for path in candidates if _is_data(path)}
    found = []
    for number in range(store.state.number, -1, -1):
        if not left:
            break
        commit = log.read(store.root, number)
        hits = left.intersection(entry.path for entry in commit.add) if commit else set()
        found += sorted(hits)
        left -= hits
    return found
