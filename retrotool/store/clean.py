"""Removing what dead runs left: temporary files, files that no commit names, staged tasks that can't be committed.

A file is removed only if neither the state nor a staged task names it, and its run is dead or the log shows that a
commit removed it. Cost: one listing of the store's folders.

Safe beside live writers, and beside a run R that only seems dead: it may have slept for an hour, and may wake at any
time. To commit, and likewise to stage a task, R (a) writes a temporary file beside the entry's name, (b) gives a sign
of life (``runs.beat``), which fails if its run file was removed, (c) links the temporary file to the name. Clean-up

1. lists files,
2. finds out which of their runs are dead,
3. removes the run files of these,
4. lists ``log/`` and ``staging/`` again, and removes the temporary files of these,
5. reads staging, then the log: a file on its way from one to the other is seen in one of them,
6. removes the files of step 1 that neither names.

So step 6 could remove a file that R's entry names only if (c) came after step 5. Its temporary file was there then. If
it was written before the listing of step 4, step 4 removed it, and (c) failed. Else (a) came after step 4, (b) after
step 3, and (b) failed. There is no moment at which R can fall asleep, and commit a removed file when it wakes.

This rests on names that all machines see at once. NFS may answer the listing of step 4 from a cache that is up to a
minute old. A file can be lost there if R wakes after an hour, just in that minute, and does (a) and (b) before step 3
but (c) after step 5. ``Store.commit`` also checks that the files are there, just before (a); a file that is lost all
the same is reported by ``verify``, and as ``CorruptError`` to all that read it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from retrotool.errors import CorruptError
from retrotool.store import disk, log, paths, runs, staging
from retrotool.store.atomic import TEMPORARY
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import CHECKPOINT_NAME, Store

_TEMPORARY_PATH = re.compile(rf"(.*/)?{re.escape(TEMPORARY)}(?P<run>[0-9a-f]{{8}})[0-9a-f]{{8,16}}")
_RUN_PATH = re.compile(r"staging/run-(?P<run>[0-9a-f]{8})\.json")
_CLAIM_PATH = re.compile(r"staging/claims/[^/]+-(?P<run>[0-9a-f]{8})")


def clean(store: Store, run: Run, *, thorough: bool = False) -> int:
    """Remove left-overs of dead runs for ``run``; return how many files. ``LostRunError`` if ``run`` is taken for dead.

    ``thorough``: also files that a commit removed and a kill left on the disk, while the run that once wrote them is
    still alive. That reads the whole log if there are files of live runs on their way.
    """
    root = store.root
    # Symbolic links are not followed, and left alone.
    candidates = [path for path, entry in paths.walk(root) if entry.is_file(follow_symlinks=False)]
    owners = {path: owner for path in candidates if (owner := owner_of(path)) is not None}
    now = runs.beat(root, run.id)
    alive = {owner: runs.is_alive(root, owner, now=now) for owner in set(owners.values())}
    stopped = frozenset(owner for owner in alive if not alive[owner])
    # Not one that was made since: the temporary file of a run that begins is listed before its run file is there.
    disk.unlink_all(root / path for path, owner in owners.items() if _RUN_PATH.fullmatch(path) and owner in stopped)
    _remove_temporary(root, stopped)
    disk.unlink_all(staging.broken(root))  # their tasks are planned again
    staged = {path for task in staging.read_staged(root).values() for path in task.files()}
    state = store.refresh()
    unnamed = [path for path in owners if not (path in staged or (_is_data(path) and state.has(path)))]
    gone = [path for path in unnamed if not alive[owners[path]]]
    disk.unlink_all(root / path for path in gone)
    if thorough:
        once = _ever_added(store, [path for path in unnamed if alive[owners[path]]])
        disk.unlink_all(paths.inside(root, path) for path in once)
        gone += once
    return len(gone)


def _remove_temporary(root: Path, dead: Collection[str]) -> None:
    """Remove the temporary files of dead runs that could yet become entries of the log, or staged tasks."""
    for folder in (root / "log", root / "staging"):
        there = list(folder.iterdir()) if folder.is_dir() else []
        temporary = [path for path in there if path.name.startswith(TEMPORARY)]
        disk.unlink_all(path for path in temporary if owner_of(path.name) in dead)


def owner_of(path: str) -> str | None:
    """The run that wrote the file at a path of a store; None for files that are no business of clean-up."""
    for pattern in (_TEMPORARY_PATH, _RUN_PATH, _CLAIM_PATH):
        if match := pattern.fullmatch(path):
            return match["run"]
    try:
        return FileName.parse(path).run
    except CorruptError:
        return None  # a person put it there, or it is a staged entry, or of the log


def foreign_files(root: Path) -> list[str]:
    """Paths of files in the store's folders that no command made, by their names, sorted. They are ignored.

    Hidden files (as those of NFS) are left out, and ``log/``, of which ``verify_log`` names what is not an entry.
    """
    return sorted(
        path
        for path, entry in paths.walk(root)
        if "/" in path and not entry.name.startswith(".") and not path.startswith("log/")
        if not (entry.is_symlink() or owner_of(path) or staging.ENTRY_PATH.fullmatch(path))
        if not CHECKPOINT_NAME.fullmatch(path.removeprefix("checkpoints/"))
    )


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
