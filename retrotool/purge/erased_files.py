"""Which files an erase has replaced, as the log tells it: for the receipt of a purge.

The log is read from its beginning, entry by entry (``store.verify_log.check_log`` calls ``note``), so it is checked at
the same time. What it names is what the commits of erases between a purge and its end have replaced or taken away, of
the parts that have its chunks, of shards with these parts, and of all that is of no part alone; another purge that was
erased at the same time may have been the reason for some. Memory: the files of a state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retrotool.index.index_files import parts_of
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Commit
from retrotool.store.paths import FileName, part_slot

_EVIDENCE = ("tombstones", "proofs")
_OF_PARTS = ("documents", "chunks", "embeddings")


@dataclass(frozen=True, slots=True)
class ErasedFile:
    """A file that is gone, and the one in its place ("": none), with SHA-256; ``commit`` did it."""

    before: str
    before_bytes: int
    before_sha256: str
    after: str
    after_bytes: int
    after_sha256: str
    commit: int


class ErasedFiles:
    """Collects the files that were replaced to erase ``purge``, whose chunks are of ``numbers``."""

    def __init__(self, purge: str, numbers: list[int]) -> None:
        self._purge, self._record = purge, f"purge:{purge}"
        self._numbers = set(numbers)
        self._slots = {part_slot(part) for part in numbers}
        self._known: dict[str, FileEntry] = {}
        self.files: list[ErasedFile] = []
        self.evidence: dict[str, FileEntry] = {}
        """The files that say who the victims are, and what they are looked for by."""
        self.purged, self.erased = "", ""
        """When it was purged, and when the last of it was erased, UTC; empty: not yet."""
        self.purged_by, self.erased_by = -1, -1
        """Numbers of these commits."""

    def note(self, commit: Commit) -> None:
        """Take in a commit; they come in order."""
        record = commit.records.get(self._record)
        if commit.kind == "purge" and record is not None:
            self.purged, self.purged_by = commit.time, commit.number
        elif commit.kind == "erase" and self.purged and not self.erased:
            self.files += self._replaced(commit)
            if record is not None and record.get("erased"):
                self.erased, self.erased_by = commit.time, commit.number
        self._known.update((entry.path, entry) for entry in commit.add)
        for entry in commit.add:
            name = FileName.parse(entry.path)
            if name.kind in _EVIDENCE and name.slot.partition(".")[0] == self._purge:
                self.evidence[entry.path] = entry
        for path in commit.remove:
            self._known.pop(path, None)
            self.evidence.pop(path, None)

    def _replaced(self, commit: Commit) -> Iterator[ErasedFile]:
        new = {_place(entry.path): entry for entry in commit.add}
        for path in commit.remove:
            old = self._known.get(path)
            if old is None or not self._concerns(old):
                continue
            now = new.get(_place(path))
            after = ("", 0, "") if now is None else (now.path, now.bytes, now.sha256)
            yield ErasedFile(old.path, old.bytes, old.sha256, *after, commit.number)

    def _concerns(self, entry: FileEntry) -> bool:
        name = FileName.parse(entry.path)
        if name.kind in _OF_PARTS:
            return name.slot in self._slots
        if name.kind == "index" and "parts" in (entry.about or {}):
            return not self._numbers.isdisjoint(parts_of(entry))
        return True


def _place(path: str) -> tuple[str, str, str]:
    name = FileName.parse(path)
    return name.kind, name.name, name.slot
