"""Finished tasks, waiting for a commit.

A worker calls ``stage`` when its files are whole: what it wrote is then known to every process, and any may commit it
(``store.folding``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from retrotool.errors import CorruptError, LostRunError
from retrotool.store import leases, schema, specs
from retrotool.store.log import FileEntry, checked, is_there, with_checksum
from retrotool.store.storage import Storage
from retrotool.store.sums import with_sums

ENTRY_PATH = re.compile(r"staging/(?P<key>[0-9a-f]{32})\.json")
COUNTS = ("documents", "chunks", "tokens", "rejected")
"""What is counted of a unit, of a plan and of the store."""
PLAN_COUNTS = (*COUNTS, "blocked", "damaged", "known_documents", "keys_cut", "compared", "exact")
"""What is counted of a unit and of a plan."""


_STORED = ("kind", "run", "settings", "reads", "add", "remove", "records", "unit", "piece")
"""Fields of ``Staged`` that its entry has; its name has the task."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What a unit of a chunk plan gave: files a part (documents, chunks) under ``staging/``, not yet numbered.

    ``blocked`` are the slots of the block list that it left documents out by; None: it let all in.
    """

    plan: str
    index: int
    parts: tuple[tuple[FileEntry, ...], ...]
    quarantine: FileEntry | None
    counts: Mapping[str, int]
    blocked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished task. ``records`` are set if they are absent, and must be equal if they are there.

    ``piece``: of a task that is done in pieces, the rows [first, last] that the file has; only the task as a whole is
    committed. ``measured``: figures of the work, for the process that runs it; they are not stored.
    """

    task: str
    kind: str
    run: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    add: tuple[FileEntry, ...] = ()
    remove: tuple[str, ...] = ()
    records: Mapping[str, Any] = field(default_factory=dict)
    unit: Unit | None = None
    piece: tuple[int, int] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def entries(self) -> list[FileEntry]:
        """All files the task wrote."""
        entries = list(self.add)
        if self.unit is not None:
            entries += [entry for part in self.unit.parts for entry in part]
            entries += [self.unit.quarantine] if self.unit.quarantine else []
        return entries

    def files(self) -> list[str]:
        """Paths of all files the task wrote, sums included."""
        return [path for entry in self.entries() for path in with_sums(entry.path)]


def staged_path(task: str) -> str:
    """Where the entry of a finished task lies."""
    return f"staging/{task}.json"


def stage(storage: Storage, staged: Staged) -> bool:
    """Make a finished task known; False (and its files removed) if another process staged it first.

    ``LostRunError`` if its files are missing: another process took this run for dead and cleaned up after it.
    """
    if not is_whole(storage, staged):
        raise LostRunError(f"the files of a finished {staged.kind} task are missing: this run was taken for dead")
    data = orjson.dumps({name: getattr(staged, name) for name in _STORED})
    schema.load(data, specs.STAGED, staged_path(staged.task))
    leases.renew(storage, staged.run)
    path = staged_path(staged.task)
    won = storage.put_if_absent(path, staged.run, with_checksum(data))
    if not won:
        storage.delete(staged.files())
    return won


def is_whole(storage: Storage, task: Staged) -> bool:
    """Whether all files that a task wrote are there with their sizes."""
    return all(is_there(storage, entry) for entry in task.entries())


def _unit_from_json(fields: Mapping[str, Any]) -> Unit:
    parts = tuple(tuple(map(FileEntry.from_json, part)) for part in fields["parts"])
    quarantine = None if fields["quarantine"] is None else FileEntry.from_json(fields["quarantine"])
    blocked = None if fields["blocked"] is None else tuple(fields["blocked"])
    return Unit(fields["plan"], fields["index"], parts, quarantine, fields["counts"], blocked)


def read_staged(storage: Storage) -> dict[str, Staged]:
    """All staged tasks by key, but for broken ones."""
    return {key: task for key, task in _read_all(storage).items() if task is not None}


def broken(storage: Storage) -> list[str]:
    """Entries of finished tasks that can't be read. Each task can be done again; clean-up removes its entry."""
    return [staged_path(key) for key, task in _read_all(storage).items() if task is None]


def _read_all(storage: Storage) -> dict[str, Staged | None]:
    """The staged tasks by key; None for files that are not one."""
    found: dict[str, Staged | None] = {}
    for key in sorted(staged_keys(storage)):
        try:
            found[key] = _staged_from_json(key, schema.load(checked(storage.get(staged_path(key))), specs.STAGED, key))
        except FileNotFoundError:
            continue  # another process folded it just now
        except (CorruptError, ValueError):
            found[key] = None
    return found


def _staged_from_json(task: str, fields: Mapping[str, Any]) -> Staged:
    return Staged(
        task=task,
        kind=fields["kind"],
        run=fields["run"],
        settings=fields["settings"],
        reads=tuple(fields["reads"]),
        add=tuple(map(FileEntry.from_json, fields["add"])),
        remove=tuple(fields["remove"]),
        records=fields["records"],
        unit=_unit_from_json(fields["unit"]) if fields["unit"] else None,
        piece=tuple(fields["piece"]) if fields.get("piece") else None,
    )


def is_staged(storage: Storage, task: str) -> bool:
    """Whether the task is finished and waiting for a commit."""
    return storage.stat(staged_path(task)) is not None


def staged_keys(storage: Storage) -> frozenset[str]:
    """Keys of all tasks that are finished and waiting for a commit, by one listing."""
    found = (ENTRY_PATH.fullmatch(info.path) for info in storage.list("staging/"))
    return frozenset(match["key"] for match in found if match)
