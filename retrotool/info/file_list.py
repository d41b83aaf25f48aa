"""List the live files of a store, for tools that read them without retrotool.

The folders of a store can also hold leftovers of killed commands and files that are not committed yet, and
file names do not have the number of the part. The log has both facts, and only the log is read: 120,000 files
take two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retrotool.store.paths import DATA_KINDS, PART_KINDS
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A live file; its ``path`` is relative to the store."""

    path: str
    kind: str  # of content, such as chunks
    name: str  # encoder, index, table or scan it belongs to, empty for other kinds
    slot: str  # identifies it among the files of that kind and name
    part: int | None  # None for kinds without a file per part
    rows: int  # its items, such as chunks
    bytes: int
    pending: bool  # its part belongs to an unfinished ``chunk``, and no reader returns it


@dataclass(frozen=True, slots=True)
class FileList:
    """The live files of the store at ``path`` at one ``commit``, by kind, name and slot."""

    path: str
    commit: int
    files: tuple[ListedFile, ...]


def list_files(root: str | Path) -> FileList:
    """List the live files of a store without opening them."""
    state = Store.open(root).state
    listed = []
    for group in (state.group(kind, name) for kind in DATA_KINDS for name in state.names(kind)):
        for one in group.entries():
            part = one.part if one.kind in PART_KINDS else None
            pending = part is not None and part >= state.live
            listed.append(ListedFile(one.path, one.kind, one.name, one.slot, part, one.rows, one.bytes, pending))
    return FileList(str(root), state.number, tuple(listed))
