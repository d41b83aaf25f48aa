"""Paths in a store: what a name says, and that none leads out, by its form or by a symbolic link.

``kind/[name/]slot-token.extension``, relative to the store's root. A *slot* holds at most one live file; the
*token* (run id and a random number) makes every written name new, so that a name is never written twice.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retrotool.errors import CorruptError, UsageError

DATA_KINDS = (
    "documents",
    "chunks",
    "embeddings",
    "index",
    "neighbours",
    "tombstones",
    "restored",
    "blocked",
    "quarantine",
    "plans",
    "inputs",
    "selectors",
    "scans",
)
FOLDERS = (*DATA_KINDS, "staging", "log", "checkpoints")
"""All folders of a store."""
NAMED_KINDS = ("embeddings", "index", "neighbours", "scans")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FILE = re.compile(r"(?P<slot>[A-Za-z0-9._-]+)-(?P<token>[0-9a-f]{16})\.(?P<extension>[a-z0-9]+)")


@dataclass(frozen=True, slots=True)
class FileName:
    """The parts of a data file's path. ``name`` is empty for kinds that have none."""

    kind: str
    name: str
    slot: str
    token: str
    extension: str

    @property
    def path(self) -> str:
        """The path relative to the store, with ``/``."""
        folder = f"{self.kind}/{self.name}" if self.name else self.kind
        return f"{folder}/{self.slot}-{self.token}.{self.extension}"

    @property
    def place(self) -> tuple[str, str, str]:
        """Kind, name and slot: what at most one live file has."""
        return self.kind, self.name, self.slot

    @property
    def run(self) -> str:
        """The id of the run that wrote the file."""
        return self.token[:8]

    @classmethod
    def parse(cls, path: str) -> FileName:
        """Take a path apart; ``CorruptError`` if it has not the form of one."""
        pieces = path.split("/")
        match = _FILE.fullmatch(pieces[-1])
        kind = pieces[0]
        if (
            match is None
            or kind not in (*DATA_KINDS, "staging")
            or len(pieces) != (3 if kind in NAMED_KINDS else 2)
            or not all(map(_safe, pieces))
        ):
            raise CorruptError(f"{path!r} is no path of a store's file")
        return cls(kind, pieces[1] if len(pieces) == 3 else "", **match.groupdict())

    @classmethod
    def new(cls, run: str, kind: str, slot: str, extension: str, name: str = "") -> FileName:
        """Make a name that was never used; ``run`` is the writer's id (8 hexadecimal digits)."""
        return cls(kind, name, slot, new_token(run), extension)


def new_token(run: str) -> str:
    """A token of a run: its id and 32 random bits."""
    return run + secrets.token_hex(4)


def part_slot(part: int) -> str:
    """The slot of a part: six decimal digits or more."""
    return f"{part:06d}"


def generation_slot(what: str, generation: int) -> str:
    """The slot of a file of an index, whose training is the ``generation``-th, from 0."""
    return f"{what}.g{generation}" if generation else what


def generation_in(slot: str) -> int:
    """The generation that a slot of an index is of."""
    _, dot, last = slot.rpartition(".g")
    return int(last) if dot and last.isdigit() else 0


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be a folder of the store, else ``UsageError`` naming ``what`` it was for."""
    if not _COMPONENT.fullmatch(name) or len(name) > 100:
        raise UsageError(
            f"{what} {name!r} can't be used as a name",
            "Use up to 100 letters, digits, '.', '_' and '-', starting with a letter or a digit.",
        )
    return name


def inside(root: Path, path: str) -> Path:
    """The absolute path of a store's path.

    ``CorruptError`` if it would lead out of the store, or if the file or a folder of it is a symbolic link, wherever
    that points to: what is removed must be the file itself. The root itself may be reached by a link.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or not all(map(_safe, path.split("/"))):
        raise CorruptError(f"{path!r} leads out of the store")
    place = root
    for component in pure.parts:
        place = place / component
        if place.is_symlink():
            raise CorruptError(
                f"{place} is a symbolic link: the files of a store must be in its own folders",
                "Put what it points to in its place, or remove it.",
            )
    return place


def walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is in the folders of a store and beside them, but for folders, with its path relative to ``root``.

    Symbolic links are not followed; they are yielded. What disappears meanwhile is left out.
    """
    for name, entry in _list(root, ""):
        if entry.is_dir(follow_symlinks=False):
            if name in FOLDERS:
                yield from walk_below(root, f"{name}/")
        else:
            yield name, entry


def walk_below(root: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is below a folder of a store, given as the ``prefix`` of its files' paths, likewise."""
    for name, entry in _list(root / prefix, prefix):
        if entry.is_dir(follow_symlinks=False):
            yield from walk_below(root, f"{name}/")
        else:
            yield name, entry


def _list(folder: Path, prefix: str) -> list[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            return [(prefix + entry.name, entry) for entry in entries]
    except FileNotFoundError:
        return []


def _safe(component: str) -> bool:
    return _COMPONENT.fullmatch(component) is not None
