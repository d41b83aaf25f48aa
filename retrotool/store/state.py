"""The state of a store: the fold of its log.

A map from slots to files, in groups by (kind, name), and a map of records. Groups are kept as columns and indexed
when asked for, so that a checkpoint of 150,000 files costs one JSON parse (about 16 MB) and no object a file.
States are values: ``apply`` returns a new one and shares what did not change. Nothing here reads or writes a data
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from retrotool.errors import ConflictError, CorruptError
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Commit, Draft
from retrotool.store.paths import FileName, part_slot

_COLUMNS = ("slot", "file", "rows", "bytes", "sha256", "about")
_REBASE = 2048


class Group:
    """The live files of one (kind, name): columns from a checkpoint, and the changes since. Not mutated once shared."""

    __slots__ = ("_changed", "_columns", "_index", "_prefix")

    def __init__(self, prefix: str, columns: Mapping[str, list[Any]] | None = None) -> None:
        self._prefix = prefix
        self._columns = columns if columns is not None else {name: [] for name in _COLUMNS}
        self._index: dict[str, int] | None = None
        self._changed: dict[str, FileEntry | None] = {}

    def __len__(self) -> int:
        """Count the live files."""
        if not self._changed:
            return len(self._columns["slot"])
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        """Slots of the live files, in order of their names."""
        base = (slot for slot in self._columns["slot"] if slot not in self._changed)
        added = (slot for slot, entry in self._changed.items() if entry is not None)
        return iter(sorted([*base, *added], key=lambda slot: (len(slot), slot)))

    def get(self, slot: str) -> FileEntry | None:
        """The live file of a slot."""
        if slot in self._changed:
            return self._changed[slot]
        if self._index is None:
            self._index = {slot: i for i, slot in enumerate(self._columns["slot"])}
        i = self._index.get(slot)
        if i is None:
            return None
        c = self._columns
        return FileEntry(f"{self._prefix}/{c['file'][i]}", c["rows"][i], c["bytes"][i], c["sha256"][i], c["about"][i])

    def changed(self, changes: Mapping[str, FileEntry | None]) -> Group:
        """A copy with some slots filled or freed."""
        if len(self._changed) > _REBASE:
            # Copying the changes at every commit would make folding a long log quadratic.
            return Group(self._prefix, self.columns()).changed(changes)
        copy = Group(self._prefix, self._columns)
        copy._index = self._index
        copy._changed = {**self._changed, **changes}
        return copy

    def columns(self) -> dict[str, list[Any]]:
        """All live files as columns, for a checkpoint."""
        entries = [(slot, self.get(slot)) for slot in self]
        rows = [
            (slot, entry.path.rpartition("/")[2], entry.rows, entry.bytes, entry.sha256, entry.about)
            for slot, entry in entries
            if entry is not None
        ]
        return {name: [row[i] for row in rows] for i, name in enumerate(_COLUMNS)}


@dataclass(frozen=True, slots=True)
class State:
    """A store after commit ``number`` (−1: none), whose bytes hash to ``head``."""

    number: int
    head: str
    groups: Mapping[tuple[str, str], Group] = field(default_factory=dict)
    records: Mapping[str, Any] = field(default_factory=dict)

    def group(self, kind: str, name: str = "") -> Group:
        """The files of a kind (and name); empty if there are none."""
        return self.groups.get((kind, name)) or Group(f"{kind}/{name}" if name else kind)

    def names(self, kind: str) -> list[str]:
        """Names under which a kind has files, sorted."""
        return sorted(name for (k, name), group in self.groups.items() if k == kind and len(group))

    def file(self, kind: str, slot: str, name: str = "") -> FileEntry | None:
        """The live file of a slot, or None."""
        return self.group(kind, name).get(slot)

    def part_file(self, kind: str, part: int, name: str = "") -> FileEntry | None:
        """The live file of a part, or None."""
        return self.file(kind, part_slot(part), name)

    def parts(self) -> list[int]:
        """Numbers of all parts, ascending."""
        return [int(slot) for slot in self.group("chunks")]

    def files(self) -> Iterator[FileEntry]:
        """Every live file."""
        for group in self.groups.values():
            for slot in group:
                entry = group.get(slot)
                if entry is not None:
                    yield entry

    def has(self, path: str) -> bool:
        """Whether the file is live."""
        name = FileName.parse(path)
        entry = self.file(name.kind, name.slot, name.name)
        return entry is not None and entry.path == path

    def with_prefix(self, prefix: str) -> dict[str, Any]:
        """Records whose key begins with ``prefix``, without it, in order of their keys."""
        return {key.removeprefix(prefix): self.records[key] for key in sorted(self.records) if key.startswith(prefix)}

    def conflict(self, change: Draft | Commit) -> str | None:
        """Why ``change`` can't follow this state; None if it can."""
        for path in (*change.reads, *change.remove):
            if not self.has(path):
                return f"{path} has left the store"
        freed = set(change.remove)
        slots: set[tuple[str, str, str]] = set()
        for entry in change.add:
            name = FileName.parse(entry.path)
            slot = (name.kind, name.name, name.slot)
            current = self.file(name.kind, name.slot, name.name)
            if slot in slots or (current is not None and current.path not in freed):
                return f"the place of {entry.path} is taken"
            slots.add(slot)
        return None

    def apply(self, commit: Commit) -> State:
        """The state after ``commit``; ``CorruptError`` if it is invalid here."""
        reason = self.conflict(commit)
        if reason is not None:
            raise CorruptError(f"commit {commit.number} is invalid: {reason}")
        changes: dict[tuple[str, str], dict[str, FileEntry | None]] = {}
        for path in commit.remove:
            name = FileName.parse(path)
            changes.setdefault((name.kind, name.name), {})[name.slot] = None
        for entry in commit.add:
            name = FileName.parse(entry.path)
            changes.setdefault((name.kind, name.name), {})[name.slot] = entry
        groups = dict(self.groups)
        for (kind, group_name), slots in changes.items():
            groups[kind, group_name] = self.group(kind, group_name).changed(slots)
        records = {key: value for key, value in {**self.records, **commit.records}.items() if value is not None}
        return State(commit.number, commit.sha256, groups, records)

    def check(self, draft: Draft) -> None:
        """``ConflictError`` if ``draft`` can't be committed on this state."""
        reason = self.conflict(draft)
        if reason is not None:
            raise ConflictError(f"{draft.kind}: {reason}", "Run the same command again: it plans anew.")


def encode_checkpoint(state: State) -> bytes:
    """The two lines of a checkpoint file."""
    groups = [[kind, name, group.columns()] for (kind, name), group in sorted(state.groups.items())]
    body = orjson.dumps({"groups": groups, "records": dict(state.records)})
    header = {"commit": state.number, "head": state.head, "sha256": hashlib.sha256(body).hexdigest()}
    return orjson.dumps(header) + b"\n" + body


def decode_checkpoint(data: bytes) -> State | None:
    """Inverse of ``encode_checkpoint``; None if the file is not whole."""
    line, _, body = data.partition(b"\n")
    try:
        header = orjson.loads(line)
        if hashlib.sha256(body).hexdigest() != header["sha256"]:
            return None
        fields = orjson.loads(body)
        groups = {
            (kind, name): Group(f"{kind}/{name}" if name else kind, columns) for kind, name, columns in fields["groups"]
        }
        return State(int(header["commit"]), str(header["head"]), groups, fields["records"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
