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

Standard input lies in ``spool/`` until it is chunked, under a name that tells no run: see ``clean_spool``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import orjson

from retrotool.errors import CorruptError
from retrotool.store import claims, disk, log, paths, runs, staging
from retrotool.store.atomic import TEMPORARY
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import CHECKPOINT_NAME, Store

_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<run>[0-9a-f]{8})[0-9a-f]{8,16}")
_RUN_PATH = re.compile(r"staging/run-[0-9a-f]{8}\.json")
_CLAIM_PATH = re.compile(r"staging/claims/[^/]+-[0-9a-f]{8}")
SPOOL = "spool"
SETTLED_SECONDS = 2.0
"""A process that has written standard input to the end has planned it, or announced its run, by then."""


def clean(store: Store, run: Run, *, thorough: bool = False) -> int:
    """Remove left-overs of dead runs for ``run``; return how many files. ``LostRunError`` if ``run`` is taken for dead.

    ``thorough``: also files that a commit removed and a kill left on the disk, while the run that once wrote them is
    still alive. That reads the whole log if there are files of live runs on their way.
    """
    candidates = [(path, path.relative_to(store.root).as_posix()) for path in _files(store.root)]
    owners = {relative: _owner(path, relative) for path, relative in candidates}
    now = runs.beat(store.root, run.id)
    alive = {owner: runs.is_alive(store.root, owner, now=now) for owner in set(owners.values()) if owner is not None}
    stopped = frozenset(owner for owner in alive if not alive[owner])
    # Not one that was made since: the temporary file of a run that begins is listed before its run file is there.
    disk.unlink_all(path for path, relative in candidates if _is_run(relative) and owners[relative] in stopped)
    _remove_temporary(store.root, stopped)
    disk.unlink_all(staging.broken(store.root))  # their tasks are planned again
    staged = {path for task in staging.read_staged(store.root).values() for path in task.files()}
    state = store.refresh()
    dead: list[Path] = []
    suspects: list[Path] = []
    for path, relative in candidates:
        owner = owners[relative]
        if owner is None or relative in staged or (_is_data(relative) and state.has(relative)):
            continue
        if alive[owner]:
            suspects.append(path)
            continue
        dead.append(path)
    disk.unlink_all(dead)
    removed = len(dead) + sum(1 for file in _spooled(store) if not file.planned and _remove_stale(file.path, now))
    if not thorough:
        return removed
    once = _ever_added(store, [path.relative_to(store.root).as_posix() for path in suspects])
    disk.unlink_all(paths.inside(store.root, gone) for gone in once)
    return removed + len(once)


def _remove_temporary(root: Path, dead: Collection[str]) -> None:
    """Remove the temporary files of dead runs that could yet become entries of the log, or staged tasks."""
    for folder in (root / "log", root / "staging"):
        there = list(folder.iterdir()) if folder.is_dir() else []
        temporary = [path for path in there if path.name.startswith(TEMPORARY)]
        disk.unlink_all(path for path in temporary if _owner(path, path.name) in dead)


def _files(root: Path) -> list[Path]:
    """Files that a run may have written; symbolic links are not followed, and left alone."""
    found = paths.walk(root)
    return [Path(entry) for path, entry in found if entry.is_file(follow_symlinks=False) and not _is_spool(path)]


def _owner(path: Path, relative: str) -> str | None:
    """The run that wrote a file; None for files that are no business of clean-up."""
    if match := _TEMPORARY_NAME.fullmatch(path.name):
        return match["run"]
    if _is_run(relative):
        return path.stem.removeprefix("run-")
    if _CLAIM_PATH.fullmatch(relative):
        return claims.owner(path.name)
    if relative.startswith(("log/", "checkpoints/")):
        return None
    try:
        return FileName.parse(relative).run
    except CorruptError:
        return None  # a person put it there, or it is a staged entry


def foreign_files(root: Path) -> list[str]:
    """Paths of files in the store's folders that no command made, by their names, sorted. They are ignored.

    Hidden files (as those of NFS) are left out, and ``log/``, of which ``verify_log`` names what is not an entry.
    """
    return sorted(
        path
        for path, entry in paths.walk(root)
        if "/" in path and not entry.name.startswith(".") and not path.startswith(("log/", f"{SPOOL}/"))
        if not (entry.is_symlink() or _is_ours(path))
    )


def _is_ours(path: str) -> bool:
    if path.startswith("checkpoints/"):
        return CHECKPOINT_NAME.fullmatch(path.removeprefix("checkpoints/")) is not None
    if _is_run(path) or staging.ENTRY_PATH.fullmatch(path) or _CLAIM_PATH.fullmatch(path):
        return True
    try:
        FileName.parse(path)
    except CorruptError:
        return False
    return True


def _is_spool(relative: str) -> bool:
    return relative.startswith(f"{SPOOL}/")


def _is_run(relative: str) -> bool:
    return _RUN_PATH.fullmatch(relative) is not None


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


@dataclass(frozen=True, slots=True)
class Spooled:
    """A file of standard input; ``planned``: a ``chunk`` that is not finished reads it, when it is gone on with."""

    path: Path
    planned: bool


def clean_spool(store: Store, own: str) -> list[Spooled]:
    """Remove from ``spool/`` what no unfinished plan names, and return what must stay.

    ``clean`` takes what was written an hour ago or more. Here also younger files go, unless they are half written or
    another run than ``own`` is alive, which may be about to plan them.
    """
    whole = [file.path for file in _spooled(store) if not (file.planned or file.path.name.startswith(TEMPORARY))]
    youngest = max(map(_written, whole), default=0.0)
    busy = bool(runs.others(store.root, own))
    wait = SETTLED_SECONDS - (runs.beat(store.root, own) - youngest)
    if wait > 0 and not busy:
        time.sleep(min(wait, SETTLED_SECONDS))
        busy = bool(runs.others(store.root, own))
    now = runs.beat(store.root, own)
    left = []
    for file in _spooled(store):
        certain = not busy and not file.path.name.startswith(TEMPORARY)
        if file.planned or not (_remove(file.path) if certain else _remove_stale(file.path, now)):
            left.append(file)
    return left


def _spooled(store: Store) -> list[Spooled]:
    """All standard input in ``spool/``. The live plan files are those of unfinished plans; read if there is any."""
    folder = paths.inside(store.root, SPOOL)
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in there if path.name.startswith(("stdin-", TEMPORARY))]
    if not found:
        return []
    group = store.refresh().group("plans")
    planned: set[str] = set()
    for slot in group:
        entry = group.get(slot)
        assert entry is not None
        try:
            content = orjson.loads(paths.inside(store.root, entry.path).read_bytes())
            # By name, which is made of the content: the store may have been moved, or be known by several paths.
            planned.update(Path(file["path"]).name for file in content["files"])
        except FileNotFoundError:
            continue  # it was finished just now
        except (orjson.JSONDecodeError, KeyError, TypeError):
            planned.update(path.name for path in found)  # what a broken plan needs can't be known
    return [Spooled(path, path.name in planned) for path in found]


def _written(path: Path) -> float:
    """When a file was last written to."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(path: Path) -> bool:
    disk.unlink_all([path])
    return True


def _remove_stale(path: Path, now: float) -> bool:
    """Remove a file that no process has written to for an hour; ``now`` is by the clock of the file system."""
    return now - _written(path) > runs.SILENCE_SECONDS and _remove(path)
