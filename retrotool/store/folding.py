"""The fold: commits what finished tasks have staged.

Any process may call ``fold``. It makes one commit per kind of task and removes the staged entries. Units of
``chunk`` get their part numbers here, in the order of their plans, so that ids do not depend on which task
finished first. Folding twice, or by two processes at once, commits nothing twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from retrotool.errors import CorruptError, ErasedError
from retrotool.store import parts, paths
from retrotool.store.blocked import blocked_documents, read_blocked
from retrotool.store.gc import clean
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import generation_in
from retrotool.store.staging import COUNTS, PLAN_COUNTS, Staged, Unit, is_whole, read_staged, staged_path
from retrotool.store.state import State
from retrotool.store.store import FENCE, Store
from retrotool.store.sums import with_sums

Outcome = dict[str, str]  # reasons of refusal by key; "" for tasks that are committed


@dataclass(frozen=True, slots=True)
class Folded:
    """The result of a fold: keys of committed tasks, and the reasons of refused tasks by key."""

    committed: frozenset[str]
    refused: Mapping[str, str]


def fold(store: Store, run: Run) -> Folded:
    """Commit every staged task that is compatible with the newest state, and drop the others."""
    store.refresh()
    staged = read_staged(store.storage)
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
    """Commit tasks of one kind and settings. Tasks that have to wait are not in the outcome."""
    draft_of = _draft_of_files if tasks[0].unit is None else _draft_of_units
    outcome: Outcome = {}

    def build(state: State) -> Draft | None:
        outcome.clear()
        return draft_of(store, state, tasks, outcome)

    store.commit(run, build)
    return outcome


def _forget(store: Store, tasks: Sequence[Staged]) -> None:
    """Remove staged entries, and those of their files that no commit names."""
    store.refresh()  # others may have committed these tasks since, and then removed some of their files
    entries = [entry for task in tasks for entry in task.entries()]
    dropped = [entry.path for entry in entries if not store.state.has(entry.path)]
    store.storage.delete(path for one in dropped for path in with_sums(one))
    # Entries last: after a kill the next fold tries again. Files without an entry would stay.
    store.storage.delete(staged_path(task.task) for task in tasks)


def _draft_of_files(store: Store, state: State, tasks: Sequence[Staged], outcome: Outcome) -> Draft | None:
    joined = _Joined(state)
    for task in tasks:
        if task.add and all(state.has(entry.path) for entry in task.add):
            outcome[task.task] = ""  # a process was killed between the commit and the removal of the entry
        elif _is_fenced(state, task) or not is_whole(store.storage, task):
            outcome[task.task] = "its files are missing"
        elif reason := joined.conflict(task):
            outcome[task.task] = reason
        elif task.piece is None:  # pieces wait for the whole task
            outcome[task.task] = ""
            joined.append(task)
    draft = joined.draft(tasks[0])
    return draft if draft.add or draft.remove or draft.records else None


def _is_fenced(state: State, task: Staged) -> bool:
    """Return whether the task was staged after its run was fenced: clean-up may not have seen its files."""
    fence = state.records.get(FENCE + task.run)
    return fence is not None and task.task not in fence["staged"]


class _Joined:
    """Tasks for one commit after ``state``; the cost of each does not depend on the others."""

    def __init__(self, state: State) -> None:
        self._state, self._tasks = state, list[Staged]()
        self._places = set[tuple[str, str, str]]()
        self._records = dict(state.records)
        # Of an index and generation, the path of the shard that covers a part.
        self._covered: dict[tuple[str, str, int], dict[int, str]] = {}

    def conflict(self, task: Staged) -> str | None:
        """Return why the task can't be committed with the others."""
        reason = self._state.conflict(task)
        if reason is None:
            reason = next((f"the slot of {e.path} is taken" for e in task.add if e.place in self._places), None)
        for key, value in task.records.items():
            if self._records.get(key, value) != value:
                reason = f"another process committed {key} with other settings"
        return reason or self._overlap(task)

    def _overlap(self, task: Staged) -> str | None:
        """Return why an index shard of the task can't be added: another one covers some of the same parts."""
        for entry in filter(_is_shard, task.add):
            covered = self._covered_with(entry)
            for part in _parts_of(entry):
                if covered.get(part) not in (None, *task.remove):
                    return f"{covered[part]} covers the same parts"
        return None

    def _covered_with(self, entry: FileEntry) -> dict[int, str]:
        """Return the parts that shards of the same index and generation cover."""
        kind, name, slot = entry.place
        key = kind, name, generation_in(slot)
        if key not in self._covered:
            others = filter(_is_shard, self._state.group(kind, name).entries())
            alike = (other for other in others if generation_in(other.slot) == key[2])
            self._covered[key] = {part: other.path for other in alike for part in _parts_of(other)}
        return self._covered[key]

    def append(self, task: Staged) -> None:
        """Add a task that has no conflict."""
        self._tasks.append(task)
        self._places.update(entry.place for entry in task.add)
        self._records |= task.records
        for entry in filter(_is_shard, task.add):
            self._covered_with(entry).update(dict.fromkeys(_parts_of(entry), entry.path))

    def draft(self, like: Draft) -> Draft:
        """Return the draft of all, with the kind and settings of ``like``."""
        return Draft(
            like.kind,
            like.settings,
            reads=tuple(dict.fromkeys(path for task in self._tasks for path in task.reads)),
            add=tuple(entry for task in self._tasks for entry in task.add),
            remove=tuple(path for task in self._tasks for path in task.remove),
            records={key: value for task in self._tasks for key, value in task.records.items()},
        )


def _parts_of(shard: FileEntry) -> list[int]:
    return list((shard.about or {}).get("parts", ()))


def _is_shard(entry: FileEntry) -> bool:
    return entry.kind == "index" and entry.slot.startswith("shard-")


def _draft_of_units(store: Store, state: State, tasks: Sequence[Staged], outcome: Outcome) -> Draft | None:
    """Build the commit of the units that are next in the order of their plans; the others wait."""
    plans = state.with_prefix("plan:")
    waiting = _waiting(state, tasks, outcome)
    ready: list[Staged] = []
    progress: dict[str, Any] = {}
    for plan in sorted(plans, key=lambda plan: plans[plan]["order"]):
        done = int(plans[plan]["done"])
        first = len(ready)
        while (task := waiting.get((plan, done))) is not None:
            try:
                reason = _refused(store, state, task)
            except ErasedError:  # another process has just committed or dropped it
                break
            if reason:
                outcome[task.task] = reason
                break
            ready.append(task)
            done += 1
        if done > plans[plan]["done"]:
            progress[f"plan:{plan}"] = _advanced(plans[plan], ready[first:], done)
        if done < plans[plan]["units"]:
            break
    outcome |= {task.task: "" for task in ready}
    return _numbered(state, ready, progress) if ready else None


def _waiting(state: State, tasks: Sequence[Staged], outcome: Outcome) -> dict[tuple[str, int], Staged]:
    """Return the units of plans that go on, by plan and index; put the others into the outcome."""
    waiting = {}
    plans = state.with_prefix("plan:")
    for task in tasks:
        if task.unit is None or task.unit.plan not in plans:
            outcome[task.task] = "its plan was removed"
        elif task.unit.index < plans[task.unit.plan]["done"]:
            outcome[task.task] = ""
        elif not all(map(state.has, task.reads)):
            outcome[task.task] = "its plan was changed"
        else:
            waiting[task.unit.plan, task.unit.index] = task
    return waiting


def _refused(store: Store, state: State, task: Staged) -> str:
    """Return why a unit whose turn it is can't be committed; "" if it can."""
    assert task.unit is not None, "it waits for its turn"
    if _is_fenced(state, task) or not is_whole(store.storage, task):
        return "its files are missing"
    try:
        return "one of its documents was purged" if _brings_back(store, task.unit) else ""
    except CorruptError as error:
        return str(error)


def _brings_back(store: Store, unit: Unit) -> bool:
    """Return whether a document of the unit was added to the block list since the unit was read."""
    if unit.blocked is None:
        return False
    newer = read_blocked(store, but=unit.blocked)
    for documents, chunks in unit.parts if len(newer) else ():
        table = parts.read_parquet(store, documents, ["id", "text_hash", "first_row", "n_chunks"])
        if blocked_documents(store, newer, chunks, table).any():
            return True
    return False


def _units(tasks: Sequence[Staged]) -> list[Unit]:
    return [task.unit for task in tasks if task.unit is not None]


def _advanced(plan: Mapping[str, Any], tasks: Sequence[Staged], done: int) -> dict[str, Any]:
    units = _units(tasks)
    counts = {name: plan.get(name, 0) + sum(unit.counts.get(name, 0) for unit in units) for name in PLAN_COUNTS}
    return {**plan, **counts, "parts": plan["parts"] + sum(len(unit.parts) for unit in units), "done": done}


def _numbered(state: State, tasks: Sequence[Staged], progress: dict[str, Any]) -> Draft:
    """Give the parts of some units the next numbers."""
    add: list[FileEntry] = []
    number = int(state.records.get("parts", 0))
    first = number
    totals = dict(state.records.get("totals", dict.fromkeys(COUNTS, 0)))
    for unit in _units(tasks):
        for part in unit.parts:
            add += [dataclasses.replace(entry, slot=paths.part_slot(number)) for entry in part]
            number += 1
        add += unit.others()
        totals["rejected"] += unit.counts.get("rejected", 0)  # the other totals wait for the end of the plan
    reads = tuple(dict.fromkeys(path for task in tasks for path in task.reads))
    pending = int(state.records.get("pending", 0)) + number - first
    records = {**progress, "parts": number, "pending": pending, "totals": totals}
    return Draft("chunk", reads=reads, add=tuple(add), records=records)


@contextlib.contextmanager
def writing(store: Store) -> Iterator[Run]:
    """Register a run, clean up after dead runs, fold, and yield the run."""
    with Run(store.storage) as run:
        clean(store, run)
        fold(store, run)  # keeps what dead runs finished; removes from the disk what an erase has overtaken
        yield run
