"""Removing what dead runs left: files that no commit names, unfinished writes, leases, entries that can't be read.

A file is removed only if neither the state nor a staged task names it, and its run is dead or the log shows that a
commit removed it. Cost: one listing of the store.

A run is dead if it has removed its lease, or if its process has ended on the same boot of the same machine. A run R
of another machine that was silent for a day may yet wake. So it is *fenced* first: a commit of the kind ``clean``
says so, and which tasks R has staged by then. From that commit on R can't commit (``Store.commit`` refuses it on the
newest state, and the log takes no commit that was built on an older one), and what it stages is dropped
(``folding``). Then clean-up reads staging, and the log, and removes what of R neither names. No clock decides about
more than when that is done.
"""

from __future__ import annotations

from collections.abc import Collection

from retrotool.errors import CorruptError
from retrotool.store import leases, log, staging
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.storage import Storage
from retrotool.store.store import CHECKPOINT_PATH, FENCE, Store
from retrotool.store.sums import with_sums, without_sums

_FENCES = 256
"""How many runs are remembered as fenced: the last ones."""


def clean(store: Store, run: Run, *, thorough: bool = False) -> int:
    """Remove left-overs of dead runs for ``run``; return how many files. ``LostRunError`` if ``run`` is taken for dead.

    ``thorough``: also files that a commit removed and a kill left on the disk, while the run that once wrote them is
    still alive. That reads the whole log if there are files of live runs on their way.
    """
    storage = store.storage
    unfinished = list(storage.unfinished())
    owners = {info.path: owner for info in storage.list("") if (owner := owner_of(storage, info.path)) is not None}
    seen = {*owners.values(), *(one.run for one in unfinished)} - {run.id}
    now = leases.renew(storage, run.id)
    silent = {owner: leases.silence_of(storage, owner, now) for owner in seen}
    fenced = [owner for owner, seconds in silent.items() if seconds is not None and seconds > leases.DEAD_SECONDS]
    if fenced:
        store.commit(run, lambda state: _fence(store, state, fenced))
    dead = {owner for owner, seconds in silent.items() if seconds is None or owner in fenced}
    storage.drop(one for one in unfinished if one.run in dead)
    storage.delete(staging.broken(storage))  # their tasks are planned again
    staged = {path for task in staging.read_staged(storage).values() for path in task.files()}
    state = store.refresh()
    unnamed = [path for path in owners if not (path in staged or (_is_data(path) and state.has(without_sums(path))))]
    gone = [path for path in unnamed if owners[path] in dead]
    if thorough:
        gone += _ever_added(store, [path for path in unnamed if owners[path] not in dead])
    storage.delete(gone)
    return len(gone)


def _fence(store: Store, state: State, runs: Collection[str]) -> Draft | None:
    staged: dict[str, list[str]] = {run: [] for run in runs if FENCE + run not in state.records}
    for task in staging.read_staged(store.storage).values():
        if task.run in staged:
            staged[task.run].append(task.task)
    before = sorted(state.with_prefix(FENCE).items(), key=lambda one: one[1]["commit"])
    over = max(0, len(before) + len(staged) - _FENCES)
    forgotten = {FENCE + run: None for run, _ in before[:over]}
    records = {FENCE + run: {"commit": state.number + 1, "staged": sorted(tasks)} for run, tasks in staged.items()}
    return Draft("clean", {"runs": sorted(staged)}, records={**forgotten, **records}) if staged else None


def owner_of(storage: Storage, path: str) -> str | None:
    """The run that wrote the file at a path of a store; None for files that are no business of clean-up."""
    if match := leases.RUN_PATH.fullmatch(path):
        return match["run"]
    if leases.CLAIM_PATH.fullmatch(path):
        return leases.claimer(storage, path)
    try:
        return FileName.parse(without_sums(path)).run
    except CorruptError:
        return None  # a person put it there, or it is a staged entry, or of the log


def unnamed_files(store: Store) -> list[str]:
    """Paths of files that no commit names, sorted: of commands that are running, or were interrupted."""
    staged = {path for task in staging.read_staged(store.storage).values() for path in task.files()}
    found = (info.path for info in store.storage.list("") if _is_data(info.path) and owner_of(store.storage, info.path))
    return sorted(path for path in found if path not in staged and not store.state.has(without_sums(path)))


def foreign_files(store: Store) -> list[str]:
    """Paths of files in the store's folders that no command made, by their names, sorted. They are ignored.

    Hidden files (as those of NFS) are left out, and ``log/``, of which ``verify_log`` names what is not an entry.
    """
    known = (leases.CLAIM_PATH, staging.ENTRY_PATH, CHECKPOINT_PATH)
    return sorted(
        info.path
        for info in store.storage.list("")
        if "/" in info.path and "/." not in info.path and not info.path.startswith("log/")
        if owner_of(store.storage, info.path) is None and not any(pattern.fullmatch(info.path) for pattern in known)
    )


def _is_data(path: str) -> bool:
    return not path.startswith("leases/")


def _ever_added(store: Store, candidates: list[str]) -> list[str]:
    """Those of ``candidates`` that a commit added (and, not being live, another removed). Reads the log backwards."""
    left = {path for path in candidates if _is_data(path)}
    found = []
    for number in range(store.state.number, -1, -1):
        if not left:
            break
        commit = log.read(store.storage, number)
        added = (path for entry in commit.add for path in with_sums(entry.path)) if commit else ()
        hits = left.intersection(added)
        found += sorted(hits)
        left -= hits
    return found
