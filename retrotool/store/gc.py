"""Clean-up of what dead runs left: files that no commit names, unfinished writes, leases, broken entries.

A file is removed only if neither the state nor a staged task names it, and either its run is dead or the log
shows that a commit removed it. Cost: one listing of the store.

A run is dead if it removed its lease, or if its process ended on the same boot of the same machine. A silent
run R of another machine may still wake up, so after a day it is *fenced* (clocks decide no more than this):

1. A commit of the kind ``clean`` records the fence of R, and which tasks R has staged by then.
2. From that commit on R can't commit: ``Store.commit`` refuses R on the newest state, and the log takes no
   commit built on an older one. What R stages later is dropped (``folding``).
3. Clean-up then reads staging and the log, and removes the files of R that neither names.
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

_FENCES = 256  # the most fences kept in the state: the last ones


def clean(store: Store, run: Run, *, thorough: bool = False) -> int:
    """Remove the leftovers of dead runs for ``run``; return the number of files.

    ``thorough``: also files that a commit removed and a kill left while their run is alive; this may read the
    whole log. ``LostRunError`` if ``run`` was taken for dead.
    """
    storage = store.storage
    unfinished = list(storage.unfinished())
    owners = {info.path: owner for info in storage.list("") if (owner := owner_of(storage, info.path)) is not None}
    seen = {*owners.values(), *(one.run for one in unfinished)} - {run.id}
    now = leases.renew(storage, run.id)
    alive = leases.with_leases(storage)  # listed after the files: a run writes its lease before any other
    silent = {owner: leases.silence_of(storage, owner, now) if owner in alive else None for owner in seen}
    fenced = [owner for owner, seconds in silent.items() if seconds is not None and seconds > leases.DEAD_SECONDS]
    if fenced:
        store.commit(run, lambda state: _fence(store, state, fenced))
    dead = {owner for owner, seconds in silent.items() if seconds is None or owner in fenced}
    storage.drop(one for one in unfinished if one.run in dead)
    storage.delete(staging.broken(storage))  # these tasks are planned again
    staged = {path for task in staging.read_staged(storage).values() for path in task.files()}
    state = store.refresh()
    unnamed = [path for path in owners if not (path in staged or (_is_data(path) and state.has(without_sums(path))))]
    leftovers = [path for path in unnamed if owners[path] in dead]
    if thorough:
        leftovers += _ever_added(store, [path for path in unnamed if owners[path] not in dead])
    storage.delete(leftovers)
    return len(leftovers)


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
    """Return the run that wrote a file of the store; None for files that clean-up must leave alone."""
    if match := leases.RUN_PATH.fullmatch(path):
        return match["run"]
    if leases.CLAIM_PATH.fullmatch(path):
        return leases.claimer(storage, path)
    try:
        return FileName.parse(without_sums(path)).run
    except CorruptError:
        return None  # a staged entry, an entry of the log, or a file that a person put there


def unnamed_files(store: Store) -> list[str]:
    """Return paths of files that no commit names, sorted: of running or interrupted commands."""
    staged = {path for task in staging.read_staged(store.storage).values() for path in task.files()}
    found = (info.path for info in store.storage.list("") if _is_data(info.path) and owner_of(store.storage, info.path))
    return sorted(path for path in found if path not in staged and not store.state.has(without_sums(path)))


def foreign_files(store: Store) -> list[str]:
    """Return paths in the store's folders that no command made, sorted, except hidden files and ``log/``."""
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
    """Return the candidates that a commit added, and so another one removed. Reads the log backwards."""
    wanted, found = set(filter(_is_data, candidates)), set[str]()
    for number in range(store.state.number, -1, -1):
        if found == wanted:
            break
        if commit := log.read(store.storage, number):
            found |= wanted.intersection(path for entry in commit.add for path in with_sums(entry.path))
    return sorted(found)
