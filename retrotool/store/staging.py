"""Finished tasks, waiting for a commit.

A worker calls ``stage`` when its files are whole: what it wrote is then known to every process, and any may commit it
(``store.folding``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import LostRunError
from retrotool.store import atomic, disk, paths, runs
from retrotool.store.atomic import FileEntry

ENTRY_PATH = re.compile(r"staging/[0-9a-f]{32}\.json")
COUNTS = ("documents", "chunks", "tokens", "set_aside")
"""What is counted of a unit, of a plan and of the store."""
PLAN_COUNTS = (*COUNTS, "blocked", "damaged", "known_documents", "keys_cut", "compared", "exact")
"""What is counted of a unit and of a plan."""


_STORED = ("kind", "run", "settings", "reads", "add", "remove", "records", "unit")
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

    ``measured``: figures of the work, for the process that runs it; they are not stored.
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
    measured: Mapping[str, float] = field(default_factory=dict)

    def entries(self) -> list[FileEntry]:
        """All files the task wrote."""
        entries = list(self.add)
        if self.unit is not None:
            entries += [entry for part in self.unit.parts for entry in part]
            entries += [self.unit.quarantine] if self.unit.quarantine else []
        return entries

    def files(self) -> list[str]:
        """Paths of all files the task wrote."""
        return [entry.path for entry in self.entries()]


def staged_path(root: Path, task: str) -> Path:
    """Where the entry of a finished task lies."""
    return paths.inside(root, f"staging/{task}.json")


def stage(root: Path, staged: Staged) -> bool:
    """Make a finished task known; False (and its files removed) if another process staged it first.

    ``LostRunError`` if its files are missing: another process took this run for dead and cleaned up after it.
    """
    if not is_whole(root, staged):
        raise LostRunError(f"the files of a finished {staged.kind} task are missing: this run was taken for dead")
    data = orjson.dumps({name: getattr(staged, name) for name in _STORED})
    target, token = staged_path(root, staged.task), paths.new_token(staged.run)
    won = atomic.put_if_absent(target, token, data, lambda: runs.beat(root, staged.run))
    if not won:
        with contextlib.suppress(FileNotFoundError):  # over NFS a link can succeed and its answer be lost
            won = target.read_bytes() == data
    if not won:
        for path in staged.files():
            disk.unlink(paths.inside(root, path))
    return won


def is_whole(root: Path, task: Staged) -> bool:
    """Whether all files that a task wrote are there with their sizes."""
    return all(atomic.is_there(root, entry) for entry in task.entries())


def _unit_from_json(fields: Mapping[str, Any]) -> Unit:
    parts = tuple(tuple(map(FileEntry.from_json, part)) for part in fields["parts"])
    quarantine = FileEntry.from_json(fields["quarantine"]) if fields["quarantine"] else None
    blocked = None if fields["blocked"] is None else tuple(fields["blocked"])
    return Unit(fields["plan"], fields["index"], parts, quarantine, fields["counts"], blocked)


def read_staged(root: Path) -> dict[str, Staged]:
    """All staged tasks by key, but for broken ones."""
    return {key: task for key, task in _read_all(root).items() if task is not None}


def broken(root: Path) -> list[Path]:
    """Entries of finished tasks that can't be read. Each task can be done again; clean-up removes its entry."""
    found = [f"staging/{key}.json" for key, task in _read_all(root).items() if task is None]
    return [paths.inside(root, path) for path in found if ENTRY_PATH.fullmatch(path)]


def _read_all(root: Path) -> dict[str, Staged | None]:
    """The staged tasks by key; None for files that are not one."""
    folder = root / "staging"
    found: dict[str, Staged | None] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if path.name.startswith("run-"):
            continue
        try:
            found[path.stem] = _staged_from_json(path.stem, orjson.loads(path.read_bytes()))
        except FileNotFoundError:
            continue  # another process folded it just now
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            found[path.stem] = None
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
    )


def staged_keys(root: Path) -> frozenset[str]:
    """Keys of all tasks that are finished and waiting for a commit, by one listing."""
    folder = root / "staging"
    return frozenset(path.stem for path in folder.glob("*.json")) if folder.is_dir() else frozenset()


def is_staged(root: Path, task: str) -> bool:
    """Whether the task is finished and waiting for a commit."""
    return staged_path(root, task).exists()
