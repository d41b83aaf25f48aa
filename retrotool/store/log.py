"""The commit log: one JSON file a commit, chained by SHA-256, appended by put-if-absent.

``append`` is the only way a store changes: it links a finished file to the next number, so that of several writers
one wins, and a kill leaves no torn entry. ``read`` checks number and chain. What a commit means is the business of
``state``.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import CorruptError
from retrotool.store import atomic, paths, runs
from retrotool.store.atomic import FileEntry

_CHECKSUM_BYTES = len(',"sha256":""}') + 64


@dataclass(frozen=True, slots=True)
class Draft:
    """What a writer wants to commit. ``links`` are (source, target) names to make just before."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    add: tuple[FileEntry, ...] = ()
    remove: tuple[str, ...] = ()
    records: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """One entry of the log; ``sha256`` is that of its bytes, the ``parent`` of the next."""

    number: int
    uuid: str
    parent: str
    time: str
    kind: str
    tool: str
    settings: Mapping[str, Any]
    reads: tuple[str, ...]
    add: tuple[FileEntry, ...]
    remove: tuple[str, ...]
    records: Mapping[str, Any]
    sha256: str


def commit_path(root: Path, number: int) -> Path:
    """Where commit ``number`` lies."""
    return paths.inside(root, f"log/{number:08d}.json")


def with_checksum(entry: bytes) -> bytes:
    """A JSON object with one more field, the ``sha256`` of its bytes before."""
    return entry[:-1] + b',"sha256":"' + hashlib.sha256(entry).hexdigest().encode() + b'"}'


def _checked(data: bytes) -> bytes:
    """The bytes of an entry without its checksum; ``ValueError`` if they do not match it."""
    entry = data[:-_CHECKSUM_BYTES] + b"}"
    if with_checksum(entry) != data:
        raise ValueError("its checksum is wrong")
    return entry


def read(root: Path, number: int, parent: str | None = None) -> Commit | None:
    """Read a commit; None if it does not exist. ``CorruptError`` if it is broken, or not a child of ``parent``."""
    path = commit_path(root, number)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = orjson.loads(_checked(data))
        commit = Commit(
            number=int(fields["number"]),
            uuid=str(fields["uuid"]),
            parent=str(fields["parent"]),
            time=str(fields["time"]),
            kind=str(fields["kind"]),
            tool=str(fields["tool"]),
            settings=dict(fields["settings"]),
            reads=tuple(map(str, fields["reads"])),
            add=tuple(map(FileEntry.from_json, fields["add"])),
            remove=tuple(map(str, fields["remove"])),
            records=dict(fields["records"]),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path}: not a commit: {error}") from error
    if commit.number != number:
        raise CorruptError(f"{path}: says that it is commit {commit.number}")
    if parent is not None and commit.parent != parent:
        raise CorruptError(f"{path}: is no child of the commit before it; the log was edited or reordered")
    return commit


def last_number(root: Path) -> int:
    """The highest number that a commit in the folder has, reachable or not; −1 if there is none."""
    try:
        with os.scandir(root / "log") as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return -1
    return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()), default=-1)


def read_after(root: Path, number: int, head: str) -> Iterator[Commit]:
    """The commits after ``number``, whose bytes hash to ``head``, as far as there are any."""
    while (commit := read(root, number + 1, head)) is not None:
        yield commit
        number, head = commit.number, commit.sha256


def append(root: Path, run: str, number: int, parent: str, draft: Draft) -> bool:
    """Try to make ``draft`` commit ``number``; False if another writer has it. Durable on True.

    ``LostRunError`` if ``run`` was taken for dead.
    """
    from importlib.metadata import version  # which readers need not wait for

    path = commit_path(root, number)
    if path.exists():
        return False
    identifier = str(uuid.uuid4())
    fields = {
        "number": number,
        "uuid": identifier,
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
    data = with_checksum(orjson.dumps(fields))
    won = atomic.put_if_absent(path, paths.new_token(run), data, lambda: runs.beat(root, run))
    if not won:
        # Over NFS a link can succeed and its answer be lost; the entry itself knows whose it is.
        existing = read(root, number)
        won = existing is not None and existing.uuid == identifier
    return won
