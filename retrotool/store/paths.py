"""Paths in a store: what a name says.

``kind/[name/][slot-]token.extension``, relative to the store. The *token* (run id and a random number) makes every
written name new, so that a name is never written twice. A *slot* holds at most one live file; which, a commit says:
documents and chunks are written before their part has its number, and do not have it in their names.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from retrotool.errors import CorruptError, UsageError

DATA_KINDS = (
    "documents",
    "chunks",
    "embeddings",
    "index",
    "neighbours",
    "tombstones",
    "undone",
    "blocked",
    "quarantine",
    "plans",
    "inputs",
    "selectors",
    "scans",
)
FOLDERS = (*DATA_KINDS, "staging", "leases", "log", "checkpoints")
"""All folders of a store."""
NAMED_KINDS = ("embeddings", "index", "neighbours", "scans")
PART_KINDS = ("documents", "chunks", "embeddings", "neighbours", "scans")
"""Kinds with a file for each part, in the slot of its number."""
UNNUMBERED_KINDS = ("documents", "chunks")
"""Kinds whose names say no slot."""
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What an encoder, an index, a table or a purge can be called."""
_OTHERS = "|".join(kind for kind in DATA_KINDS if kind not in (*NAMED_KINDS, *UNNUMBERED_KINDS))
_SLOT = rf"(?:(?:{'|'.join(NAMED_KINDS)})/{NAME.pattern}|(?:{_OTHERS}))/{NAME.pattern}-"
PATH = re.compile(rf"(?:(?:{'|'.join(UNNUMBERED_KINDS)})/|{_SLOT})[0-9a-f]{{16,32}}\.[a-z0-9]{{1,16}}")
"""The path of a data file."""


@dataclass(frozen=True, slots=True)
class FileName:
    """The parts of a data file's path; ``name`` is empty for kinds that have none, as is ``slot`` in what is parsed."""

    kind: str
    name: str
    slot: str
    token: str
    extension: str

    @property
    def path(self) -> str:
        """The path relative to the store, with ``/``."""
        folder = f"{self.kind}/{self.name}" if self.name else self.kind
        slot = "" if self.kind in UNNUMBERED_KINDS else f"{self.slot}-"
        return f"{folder}/{slot}{self.token}.{self.extension}"

    @property
    def run(self) -> str:
        """The id of the run that wrote the file."""
        return self.token[:8]

    @classmethod
    def parse(cls, path: str) -> FileName:
        """Take a path apart; ``CorruptError`` if it has not the form of one."""
        if not PATH.fullmatch(path):
            raise CorruptError(f"{path!r} is no path of a store's file")
        *folders, file = path.split("/")
        slot, _, file = file.rpartition("-")
        token, _, extension = file.partition(".")
        return cls(folders[0], folders[1] if len(folders) == 2 else "", slot, token, extension)

    @classmethod
    def new(cls, run: str, kind: str, slot: str, extension: str, name: str = "") -> FileName:
        """Make a name that was never used; ``run`` is the writer's id (8 hexadecimal digits)."""
        # Of 100,000 names without a slot two would have the same 32 bits, more likely than not.
        return cls(kind, name, slot, new_token(run, 64 if kind in UNNUMBERED_KINDS else 32), extension)


def new_token(run: str, bits: int = 32) -> str:
    """A token of a run: its id and some random bits."""
    return run + secrets.token_hex(bits // 8)


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
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} can't be used as a name",
            "Use up to 100 letters, digits, '.', '_' and '-', starting with a letter or a digit.",
        )
    return name


def is_safe(path: str) -> bool:
    """Whether a path stays in the store, by its form."""
    return all(map(_COMPONENT.fullmatch, path.split("/")))
