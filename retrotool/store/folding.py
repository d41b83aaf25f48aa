"""The fold: committing what finished tasks have staged.

Any process may call ``fold``, which commits what is there, one commit a kind, and takes the entries away. Units of
``chunk`` get their part numbers here, in the order of their plans, so that ids do not depend on who finished first.
Folding twice, or by two processes at once, commits nothing twice.

``writing`` is what every writing command begins with: a run, clean-up, and a fold of what dead runs had finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from retrotool.errors import ErasedError
from retrotool.store import disk, parts, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import Blocked, blocked_documents, read_hashes
from retrotool.store.clean import clean
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, generation_in
from retrotool.store.runs import Run
from retrotool.store.staging import COUNTS, PLAN_COUNTS, Staged, Unit, is_whole, read_staged, staged_path
from retrotool.store.state import State
from retrotool.store.store import Store

Outcome = dict[str, str]
"""Why tasks, by their keys, are refused; "" for those that are committed."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What a fold did: keys of tasks committed, and of tasks refused with the reason."""

    committed: frozenset[str]
    refused: Mapping[str, str]


def fold(store: Store, run: Run) -> Folded:
    """Commit every staged task that goes with the newest state; drop those that do not."""
    store.refresh()
    staged = read_staged(store.root)
    alike: dict[str, list[Staged]] = {}
    for task in staged.values():
        what = {"kind": task.kind, "settings": task.settings}
        alike.setdefault(orjson.dumps(what, option=orjson.OPT_SORT_KEYS).decode(), []).append(task)
    outcome: Outcome = {}
    for _, tasks in sorted(alike.items()):
        outcome |= _commit(store, run, tasks)
    _forget(store, [staged[task] for task in outcome])
    refused = {task: reason for task, reason in outcome.items() if reason}
    return Folded(frozenset(outcome).difference(refused), refused)


def _commit(store: Store, run: Run, tasks: Sequence[Staged]) -> Outcome:
    """Commit tasks of one kind and settings; those that have to wait are not in the outcome."""
    draft_of = _draft_of_files if tasks[0].unit is None else _draft_of_units
    outcome: Outcome = {}

    def build(state: State) -> Draft | None:
        outcome.clear()
        return draft_of(store, run, state, tasks, outcome)

    store.commit(run, build)
    return outcome


def _forget(store: Store, tasks: Sequence[Staged]) -> None:
    """Take staged entries away, and those of their files that no commit names."""
    files = [path for task in tasks for path in task.files()]
    gone = [path for path in files if path.startswith("staging/") or not store.state.has(path)]
    disk.unlink_all(paths.inside(store.root, path) for path in gone)
    # Last: a kill before this leaves an entry that the next fold forgets again, files after it would stay.
    for task in tasks:
        disk.unlink(staged_path(store.root, task.task))


def _draft_of_files(store: Store, _: Run, state: State, tasks: Sequence[Staged], outcome: Outcome) -> Draft | None:
    """The commit of tasks whose files have their final names."""
    draft = Draft(tasks[0].kind, tasks[0].settings)
    for task in tasks:
        if task.add and all(state.has(entry.path) for entry in task.add):
            outcome[task.task] = ""  # a process was killed between the commit and taking the entry away
        elif not is_whole(store.root, task):
            outcome[task.task] = "its files are gone"
        elif reason := _conflict(state, draft, task):
            outcome[task.task] = reason
        else:
            outcome[task.task] = ""
            draft = _joined(draft, task)
    return draft if draft.add or draft.remove or draft.records else None


def _joined(draft: Draft, task: Staged) -> Draft:
    return dataclasses.replace(
        draft,
        reads=tuple(dict.fromkeys((*draft.reads, *task.reads))),
        add=(*draft.add, *task.add),
        remove=(*draft.remove, *task.remove),
        records={**draft.records, **task.records},
    )


def _conflict(state: State, draft: Draft, task: Staged) -> str | None:
    """Why ``task`` can't join ``draft`` on ``state``."""
    joined = Draft(draft.kind, reads=task.reads, add=task.add, remove=task.remove)
    reason = state.conflict(joined)
    if reason is None:
        places = {_place(entry) for entry in draft.add}
        reason = next((f"the place of {e.path} is taken" for e in task.add if _place(e) in places), None)
    known = {**state.records, **draft.records}
    for key, value in task.records.items():
        if known.get(key, value) != value:
            reason = f"{key} was made with other settings meanwhile"
    return reason or _overlap(state, draft, task)


def _overlap(state: State, draft: Draft, task: Staged) -> str | None:
    """Why a file that covers parts (an index shard) can't stand beside those that are there; None if it can."""
    for entry in task.add:
        covered = set((entry.about or {}).get("parts", ()))
        if not covered:
            continue
        kind, name, own = _place(entry)
        live = [other for other in state.group(kind, name).entries() if other.path not in task.remove]
        for other in (*live, *(e for e in draft.add if _place(e)[:2] == (kind, name))):
            if generation_in(_place(other)[2]) != generation_in(own):
                continue
            if not covered.isdisjoint((other.about or {}).get("parts", ())):
                return f"{other.path} covers the same parts"
    return None


def _place(entry: FileEntry) -> tuple[str, str, str]:
    return FileName.parse(entry.path).place


def _draft_of_units(store: Store, run: Run, state: State, tasks: Sequence[Staged], outcome: Outcome) -> Draft | None:
    """The commit of the units that are next in the order of their plans, their parts numbered; the others wait."""
    plans = state.with_prefix("plan:")
    waiting = _waiting(store, state, tasks, outcome)
    ready: list[Staged] = []
    progress: dict[str, Any] = {}
    for plan in sorted(plans, key=lambda plan: plans[plan]["order"]):
        done = int(plans[plan]["done"])
        first = len(ready)
        while (task := waiting.get((plan, done))) is not None:
            ready.append(task)
            done += 1
        if done > plans[plan]["done"]:
            progress[f"plan:{plan}"] = _advanced(plans[plan], ready[first:], done)
        if done < plans[plan]["units"]:
            break
    outcome |= {task.task: "" for task in ready}
    return _numbered(state, run, ready, progress) if ready else None


def _waiting(store: Store, state: State, tasks: Sequence[Staged], outcome: Outcome) -> dict[tuple[str, int], Staged]:
    """The staged units that can still be committed, by plan and index; what became of the others is noted."""
    waiting = {}
    plans = state.with_prefix("plan:")
    for task in tasks:
        if task.unit is None or task.unit.plan not in plans:
            outcome[task.task] = "its plan is gone"
        elif task.unit.index < plans[task.unit.plan]["done"]:
            outcome[task.task] = ""
        elif not all(map(state.has, task.reads)):
            outcome[task.task] = "its plan was changed"
        elif not is_whole(store.root, task):
            outcome[task.task] = "its files are gone"
        else:
            with contextlib.suppress(ErasedError):  # another process has committed, or dropped, it just now
                if _brings_back(store, state, task.unit):
                    outcome[task.task] = "a document of it was purged meanwhile"
                else:
                    waiting[task.unit.plan, task.unit.index] = task
    return waiting


def _brings_back(store: Store, state: State, unit: Unit) -> bool:
    """Whether a unit has documents that are on the block list by now: it was read before they were purged."""
    if unit.blocked is None:
        return False
    newer = [entry for slot, entry in state.group("blocked").items() if slot not in unit.blocked]
    if not newer:
        return False
    hashes = np.unique(np.concatenate([read_hashes(store, entry) for entry in newer]))
    blocked = Blocked(store.identity.secret, hashes)
    for documents, chunks in unit.parts:
        table = parts.read_parquet(store, documents, ["id", "text_hash", "first_row", "n_chunks"])
        if blocked_documents(store, blocked, chunks, table).any():
            return True
    return False


def _units(tasks: Sequence[Staged]) -> list[Unit]:
    return [task.unit for task in tasks if task.unit is not None]


def _advanced(plan: Mapping[str, Any], tasks: Sequence[Staged], done: int) -> dict[str, Any]:
    units = _units(tasks)
    counts = {name: plan.get(name, 0) + sum(unit.counts.get(name, 0) for unit in units) for name in PLAN_COUNTS}
    return {**plan, **counts, "parts": plan["parts"] + sum(len(unit.parts) for unit in units), "done": done}


def _numbered(state: State, run: Run, tasks: Sequence[Staged], progress: dict[str, Any]) -> Draft:
    """Give the parts of some units the next numbers."""
    add: list[FileEntry] = []
    links: list[tuple[str, str]] = []

    def place(entry: FileEntry, kind: str, slot: str) -> None:
        name = FileName.new(run.id, kind, slot, FileName.parse(entry.path).extension)
        add.append(FileEntry(name.path, entry.rows, entry.bytes, entry.sha256, entry.about))
        links.append((entry.path, name.path))

    number = int(state.records.get("parts", 0))
    totals = dict(state.records.get("totals", dict.fromkeys(COUNTS, 0)))
    for unit in _units(tasks):
        for part in unit.parts:
            for kind, entry in zip(("documents", "chunks"), part, strict=True):
                place(entry, kind, paths.part_slot(number))
            number += 1
        if unit.quarantine is not None:
            place(unit.quarantine, "quarantine", f"{unit.plan}.{unit.index:06d}")
        totals = {name: totals[name] + unit.counts[name] for name in COUNTS}
    reads = tuple(dict.fromkeys(path for task in tasks for path in task.reads))
    records = {**progress, "parts": number, "totals": totals}
    return Draft("chunk", {}, reads, tuple(add), (), records, tuple(links))


@contextlib.contextmanager
def writing(store: Store) -> Iterator[Run]:
    """A run on a store, after cleaning up what dead runs left."""
    with Run(store.root) as run:
        clean(store, run)
        # What dead runs had finished is kept; what an erase has overtaken since must not stay on the disk.
        fold(store, run)
        yield run
