"""The state of a store: the fold of its log.

A map from slots to files, in groups by (kind, name), and a map of records. Groups are kept as columns and indexed
when asked for, so that a checkpoint of 150,000 files costs one JSON parse (about 16 MB) and no object a file.
States are values: ``fold`` returns a new one and shares what did not change. Nothing here reads or writes a data
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
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
    """The live files of one (kind, name): columns from a checkpoint, and the changes since. Not changed once shared."""

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

    def items(self) -> list[tuple[str, FileEntry]]:
        """Slots and live files, in the order of the slots."""
        return [(slot, entry) for slot in self if (entry := self.get(slot)) is not None]

    def entries(self) -> list[FileEntry]:
        """All live files, in the order of their slots."""
        return [entry for _, entry in self.items()]

    def copy(self) -> Group:
        """A group that can be changed without changing this one."""
        if len(self._changed) > _REBASE:
            # Copying ever more changes at every commit would be quadratic.
            return Group(self._prefix, self.columns())
        copy = Group(self._prefix, self._columns)
        copy._index = self._index
        copy._changed = dict(self._changed)
        return copy

    def put(self, slot: str, entry: FileEntry | None) -> None:
        """Fill a slot, or free it. Only for a copy that nobody else has yet."""
        self._changed[slot] = entry

    def columns(self) -> dict[str, list[Any]]:
        """All live files as columns, for a checkpoint."""
        rows = [
            (slot, entry.path.rpartition("/")[2], entry.rows, entry.bytes, entry.sha256, entry.about)
            for slot, entry in self.items()
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
        found = self.groups.get((kind, name))
        return Group(f"{kind}/{name}" if name else kind) if found is None else found

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
            yield from group.entries()

    def bytes(self) -> int:
        """Bytes of all live files."""
        return sum(entry.bytes for entry in self.files())

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
        places: set[tuple[str, str, str]] = set()
        for entry in change.add:
            name = FileName.parse(entry.path)
            current = self.file(name.kind, name.slot, name.name)
            if name.place in places or (current is not None and current.path not in freed):
                return f"the place of {entry.path} is taken"
            places.add(name.place)
        return None

    def fold(self, commits: Iterable[Commit]) -> State:
        """The state after ``commits``, in their order; ``CorruptError`` if one is invalid where it comes."""
        groups, records = dict(self.groups), dict(self.records)
        number, head = self.number, self.head
        now = State(number, head, groups, records)  # sees what the loop does to the two maps
        own: set[tuple[str, str]] = set()
        for commit in commits:
            reason = now.conflict(commit)
            if reason is not None:
                raise CorruptError(f"commit {commit.number} is invalid: {reason}")
            changes: list[tuple[str, FileEntry | None]] = [(path, None) for path in commit.remove]
            for path, entry in [*changes, *((entry.path, entry) for entry in commit.add)]:
                name = FileName.parse(path)
                key = (name.kind, name.name)
                if key not in own:
                    groups[key] = now.group(*key).copy()
                    own.add(key)
                groups[key].put(name.slot, entry)
            records.update(commit.records)
            for gone in [record for record, value in commit.records.items() if value is None]:
                del records[gone]
            number, head = commit.number, commit.sha256
        return State(number, head, groups, records)

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
