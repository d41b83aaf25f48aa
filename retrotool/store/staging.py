"""Finished tasks that wait for a commit: any process may commit them (``retrotool.store.folding``)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from retrotool.errors import CorruptError, LostRunError
from retrotool.store import leases, schema, specs
from retrotool.store.log import Draft, FileEntry, checked, first_missing, with_checksum
from retrotool.store.storage import Storage, each, get_if_there
from retrotool.store.sums import with_sums

ENTRY_PATH = re.compile(r"staging/(?P<key>[0-9a-f]{32})\.json")
COUNTS = ("documents", "chunks", "tokens", "rejected")  # of units, plans and the store
PLAN_COUNTS = (  # of units and plans
    *COUNTS, "blocked", "damaged", "known_documents", "keys_cut", "hashed_ids", "compared", "exact",
)  # fmt: skip
_STORED = ("kind", "run", "settings", "reads", "add", "remove", "records", "unit", "piece")  # fields of an entry


@dataclass(frozen=True, slots=True)
class Unit:
    """The result of a unit of a chunk plan: the files (documents, chunks) of each part, not yet numbered."""

    plan: str
    index: int
    parts: tuple[tuple[FileEntry, ...], ...]
    quarantine: FileEntry | None
    counts: Mapping[str, int]
    blocked: tuple[str, ...] | None = None  # slots of the block lists applied; None: documents were not checked
    seen: FileEntry | None = None  # ids that were read, of inputs to mirror

    def others(self) -> list[FileEntry]:
        """Return its files that belong to no part."""
        return [entry for entry in (self.quarantine, self.seen) if entry is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(Draft):
    """A finished task with the key ``task``. ``records`` are added; those that exist must be equal."""

    task: str
    run: str
    unit: Unit | None = None
    piece: tuple[int, int] | None = None  # the rows [first, last] of a part of a task; not committed
    measured: Mapping[str, float] = field(default_factory=dict)  # for the process that runs the task; not stored

    def entries(self) -> list[FileEntry]:
        """Return all files that the task wrote."""
        entries = list(self.add)
        if self.unit is not None:
            entries += [entry for part in self.unit.parts for entry in part]
            entries += self.unit.others()
        return entries

    def files(self) -> list[str]:
        """Return the paths of all files that the task wrote, including sums."""
        return [path for entry in self.entries() for path in with_sums(entry.path)]


def staged_path(task: str) -> str:
    """Return the path of a finished task's entry."""
    return f"staging/{task}.json"


def stage(storage: Storage, staged: Staged) -> bool:
    """Publish a finished task; False (and its files are removed) if another process staged it first."""
    if not is_whole(storage, staged):
        raise LostRunError(f"files of a finished {staged.kind} task are missing: this run was taken for dead")
    path, data = staged_path(staged.task), orjson.dumps({name: getattr(staged, name) for name in _STORED})
    schema.load(data, specs.STAGED, path)
    leases.renew(storage, staged.run)
    won = storage.put_if_absent(path, staged.run, with_checksum(data))
    if not won:
        storage.delete(staged.files())
    return won


def is_whole(storage: Storage, task: Staged) -> bool:
    """Return whether all files that a task wrote exist with their sizes."""
    return first_missing(storage, task.entries()) is None


def _unit_from_json(fields: Mapping[str, Any]) -> Unit:
    parts = tuple(tuple(map(FileEntry.from_json, part)) for part in fields["parts"])
    quarantine, seen = (FileEntry.from_json(f) if (f := fields.get(name)) else None for name in ("quarantine", "seen"))
    blocked = None if fields["blocked"] is None else tuple(fields["blocked"])
    return Unit(fields["plan"], fields["index"], parts, quarantine, fields["counts"], blocked, seen)


def read_staged(storage: Storage) -> dict[str, Staged]:
    """Return all readable staged tasks by key."""
    return {key: task for key, task in _read_all(storage).items() if task is not None}


def broken(storage: Storage) -> list[str]:
    """Return the paths of entries that can't be read. Clean-up removes them; their tasks run again."""
    return [staged_path(key) for key, task in _read_all(storage).items() if task is None]


def _read_all(storage: Storage) -> dict[str, Staged | None]:
    """Return the staged tasks by key; None for an entry that can't be read."""
    keys = sorted(staged_keys(storage))
    entries = zip(keys, each(storage, functools.partial(get_if_there, storage), map(staged_path, keys)), strict=True)
    # Without an entry: another process just folded the task.
    return {key: _parsed(key, data) for key, data in entries if data is not None}


def _parsed(key: str, data: bytes) -> Staged | None:
    try:
        fields = schema.load(checked(data), specs.STAGED, key)
    except (CorruptError, ValueError):
        return None
    unit = _unit_from_json(fields["unit"]) if fields["unit"] else None
    piece = tuple(fields["piece"]) if fields.get("piece") else None
    return Staged(**Draft.fields_of(fields), task=key, run=fields["run"], unit=unit, piece=piece)


def is_staged(storage: Storage, task: str) -> bool:
    """Return whether the task is finished and waits for a commit."""
    return storage.stat(staged_path(task)) is not None


def staged_keys(storage: Storage) -> frozenset[str]:
    """Return the keys of all finished tasks that wait for a commit, by one listing."""
    found = (ENTRY_PATH.fullmatch(info.path) for info in storage.list("staging/"))
    return frozenset(match["key"] for match in found if match)
