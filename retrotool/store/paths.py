"""Names of a store's files: ``kind/[name/][slot-]token.extension``, relative to the store.

The *token* (run id and random digits) makes every written name new, so a name is never written twice. A
commit says which *slot* a file is in; a slot holds at most one live file. The names of documents and chunks
have no slot, as these files are written before their part has a number.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from retrotool.errors import CorruptError, UsageError

DATA_KINDS = (
    "documents", "chunks", "embeddings", "index", "neighbours", "tombstones", "undone", "blocked", "quarantine",
    "plans", "inputs", "selectors", "scans", "seen", "edits", "routes",
)  # fmt: skip
FOLDERS = (*DATA_KINDS, "staging", "leases", "log", "checkpoints")
NAMED_KINDS = ("embeddings", "index", "neighbours", "scans", "edits", "routes")
PART_KINDS = ("documents", "chunks", "embeddings", "neighbours", "scans")  # one file per part; the slot is its number
UNNUMBERED_KINDS = ("documents", "chunks")  # without a slot in the name
PROBE = "probe"  # the slot of a file of "plans" that only tests a server
COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of an encoder, an index, a table or a purge
_OTHERS = "|".join(kind for kind in DATA_KINDS if kind not in (*NAMED_KINDS, *UNNUMBERED_KINDS))
_SLOT = rf"(?:(?:{'|'.join(NAMED_KINDS)})/{NAME.pattern}|(?:{_OTHERS}))/{NAME.pattern}-"
PATH = re.compile(rf"(?:(?:{'|'.join(UNNUMBERED_KINDS)})/|{_SLOT})[0-9a-f]{{16,32}}\.[a-z0-9]{{1,16}}")


@dataclass(frozen=True, slots=True)
class FileName:
    """The components of a data file's path; ``name`` and ``slot`` are empty where the path has none."""

    kind: str
    name: str
    slot: str
    token: str
    extension: str

    @property
    def path(self) -> str:
        """The path relative to the store."""
        folder = f"{self.kind}/{self.name}" if self.name else self.kind
        slot = "" if self.kind in UNNUMBERED_KINDS else f"{self.slot}-"
        return f"{folder}/{slot}{self.token}.{self.extension}"

    @property
    def run(self) -> str:
        """The id of the run that wrote the file."""
        return self.token[:8]

    @classmethod
    def parse(cls, path: str) -> FileName:
        """Parse a path; ``CorruptError`` if it is not valid."""
        if not PATH.fullmatch(path):
            raise CorruptError(f"{path!r} is not the path of a data file")
        *folders, file = path.split("/")
        slot, _, file = file.rpartition("-")
        token, _, extension = file.partition(".")
        return cls(folders[0], folders[1] if len(folders) == 2 else "", slot, token, extension)

    @classmethod
    def new(cls, run: str, kind: str, slot: str, extension: str, name: str = "") -> FileName:
        """Make a name that was never used; ``run`` is the writer's id (8 hexadecimal digits)."""
        # 32 bits would not do without a slot: of 100,000 names two would probably be equal.
        return cls(kind, name, slot, new_token(run, 64 if kind in UNNUMBERED_KINDS else 32), extension)


def new_token(run: str, bits: int = 32) -> str:
    """Return a new token: the run's id and random bits."""
    return run + secrets.token_hex(bits // 8)


def part_slot(part: int) -> str:
    """Return the slot of a part: six decimal digits or more."""
    return f"{part:06d}"


def generation_slot(what: str, generation: int) -> str:
    """Return the slot of a file of an index; generations count trainings, from 0."""
    return f"{what}.g{generation}" if generation else what


def generation_in(slot: str) -> int:
    """Return the generation in a slot of an index."""
    _, dot, last = slot.rpartition(".g")
    return int(last) if dot and last.isdigit() else 0


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can name a folder of the store, else raise ``UsageError``; it is a ``what``."""
    if not NAME.fullmatch(name):
        advice = "Use up to 100 letters, digits, '.', '_' and '-', starting with a letter or a digit."
        raise UsageError(f"{what} {name!r} can't be used as a name", advice)
    return name
