"""The commit log: one JSON file per commit, chained by SHA-256, appended by put-if-absent.

A store changes only by ``append``. It gives a finished file the next number, so that of several writers one
wins and a kill leaves no torn entry. ``read`` checks number and chain; ``state`` applies commits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from retrotool.errors import CorruptError
from retrotool.store import schema, specs
from retrotool.store.paths import FileName
from retrotool.store.storage import Storage, each, get_if_there, where
from retrotool.store.sums import size_of_sums, with_sums

_NUMBER = re.compile(r"log/(\d+)\.json")
_CHECKSUM_BYTES = len(',"sha256":""}') + 64


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a commit names it. A slot holds at most one live file of a kind and name."""

    path: str
    slot: str  # "" for documents and chunks until their part has a number
    rows: int  # what the kind of file counts
    bytes: int
    sha256: str
    about: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry as a commit stores it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def kind(self) -> str:
        """The kind of file."""
        return self.path.partition("/")[0]

    @property
    def name(self) -> str:
        """The name of its encoder, index or table; empty for kinds without names."""
        return FileName.parse(self.path).name

    @property
    def part(self) -> int:
        """The number of the file's part."""
        return int(self.slot)

    @property
    def place(self) -> tuple[str, str, str]:
        """Kind, name and slot."""
        return self.kind, self.name, self.slot

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FileEntry:
        """Invert ``as_json`` for an entry that was checked (``specs.FILES``); unknown fields are ignored."""
        about = fields.get("about")
        return cls(fields["path"], fields["slot"], fields["rows"], fields["bytes"], fields["sha256"], about)


def first_missing(storage: Storage, entries: Iterable[FileEntry]) -> str | None:
    """Return the path of a file, or of its sums, that is missing or has another size than its entry says."""
    due: dict[str, int] = {}
    for entry in entries:
        due |= zip(with_sums(entry.path), (entry.bytes, size_of_sums(entry.bytes)), strict=False)
    found = zip(due.items(), each(storage, storage.stat, due), strict=True)
    return next((path for (path, size), status in found if status is None or status.size != size), None)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a writer wants to commit."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    add: tuple[FileEntry, ...] = ()
    remove: tuple[str, ...] = ()
    records: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def fields_of(stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a draft as JSON that was checked has them."""
        return {
            **{name: stored[name] for name in ("kind", "settings", "records")},
            **{name: tuple(stored[name]) for name in ("reads", "remove")},
            "add": tuple(map(FileEntry.from_json, stored["add"])),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Draft):
    """An entry of the log; ``sha256`` is that of its bytes, and the ``parent`` of the next entry."""

    number: int
    uuid: str
    parent: str
    time: str
    tool: str
    sha256: str


def commit_path(number: int) -> str:
    """Return the path of commit ``number``."""
    return f"log/{number:08d}.json"


def with_checksum(entry: bytes) -> bytes:
    """Return a JSON object with a field appended: ``sha256``, the hash of its bytes before."""
    return entry[:-1] + b',"sha256":"' + hashlib.sha256(entry).hexdigest().encode() + b'"}'


def checked(data: bytes) -> bytes:
    """Return the bytes of a JSON object without its checksum; ``ValueError`` if it does not match."""
    entry = data[:-_CHECKSUM_BYTES] + b"}"
    if with_checksum(entry) != data:
        raise ValueError("wrong checksum")
    return entry


def read(storage: Storage, number: int, parent: str | None = None) -> Commit | None:
    """Read a commit, or None. ``CorruptError`` if it is broken or not a child of ``parent``."""
    data = get_if_there(storage, commit_path(number))
    return None if data is None else _parse(storage, number, data, parent)


def _parse(storage: Storage, number: int, data: bytes, parent: str | None) -> Commit:
    path = where(storage, commit_path(number))
    try:
        fields = schema.load(checked(data), specs.COMMIT, path)
    except ValueError as error:
        raise CorruptError(f"{path} is not a commit: {error}") from error
    own = {name: fields[name] for name in ("number", "uuid", "parent", "time", "tool")}
    commit = Commit(**Draft.fields_of(fields), **own, sha256=hashlib.sha256(data).hexdigest())
    if commit.number != number:
        raise CorruptError(f"{path} contains commit {commit.number}")
    if parent is not None and commit.parent != parent:
        raise CorruptError(f"{path} is not the child of the commit before it; the log was edited or reordered")
    return commit


def last_number(storage: Storage, after: int = -1) -> int:
    """Return the highest number of a commit after ``after``, reachable or not; ``after`` without any."""
    listed = storage.list("log/", commit_path(after) if after >= 0 else "")
    found = (_NUMBER.fullmatch(info.path) for info in listed)
    return max((int(match[1]) for match in found if match), default=after)


def read_after(storage: Storage, number: int, head: str, last: int = -1) -> Iterator[Commit]:
    """Yield the commits after commit ``number``, whose bytes hash to ``head``; those up to ``last`` exist."""
    read_entry = functools.partial(get_if_there, storage)
    known = each(storage, read_entry, map(commit_path, range(number + 1, last + 1)))
    with contextlib.closing(known):
        while (data := next(known) if number < last else read_entry(commit_path(number + 1))) is not None:
            yield (commit := _parse(storage, number + 1, data, head))
            number, head = commit.number, commit.sha256


def append(storage: Storage, run: str, number: int, parent: str, draft: Draft) -> bool:
    """Try to make ``draft`` commit ``number``; False if another writer has it. Durable on True."""
    from importlib.metadata import version  # slow, and not needed by readers

    path = commit_path(number)
    if storage.stat(path) is not None:
        return False
    fields = {
        "number": number,
        "uuid": str(uuid.uuid4()),
        "parent": parent,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "kind": draft.kind,
        "tool": f"retrotool {version('retrotool')}",
        "settings": draft.settings,
        "reads": draft.reads,
        "add": [entry.as_json() for entry in draft.add],
        "remove": draft.remove,
        "records": draft.records,
    }
    data = orjson.dumps(fields)
    schema.load(data, specs.COMMIT, where(storage, path))
    return storage.put_if_absent(path, run, with_checksum(data))
