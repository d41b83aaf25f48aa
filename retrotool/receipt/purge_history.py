"""What the log says of one purge: which commits made it and erased it, and which files ever left the store.

``check_log`` reads the log from its beginning and calls ``PurgeHistory.note`` with each commit, so one reading checks
the chain and gathers this. Memory: the path of every file that a commit named, about 150 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrotool.store.log import Commit


@dataclass(frozen=True, slots=True)
class CommitDigest:
    """A commit that purged or erased: its ``number``, ``kind``, ``time`` (UTC) and ``sha256``, and counts of files."""

    number: int
    kind: str
    time: str
    sha256: str
    files_added: int
    files_removed: int


class PurgeHistory:
    """Collects what happened to ``purge``, commit by commit."""

    def __init__(self, purge: str) -> None:
        self._record = f"purge:{purge}"
        self.purged: CommitDigest | None = None
        self.erased: CommitDigest | None = None
        """The commit after which nothing of the purge was left."""
        self.commits: list[CommitDigest] = []
        """The commit of the purge, and those of all erases from then until it was erased."""
        self.added: dict[str, int] = {}
        """Number of the commit that added each live file, by path."""
        self.removed: set[str] = set()
        """Paths of all files that ever left the state."""
        self._slots: set[str] = set()

    def is_after(self, path: str) -> bool:
        """Return whether a file was added after the erase was done."""
        return self.erased is not None and self.added.get(path, -1) > self.erased.number

    def is_new(self, path: str) -> bool:
        """Return whether a file was added after the erase was done, to a slot that no file had before."""
        return self.is_after(path) and _slot(path) not in self._slots

    def note(self, commit: Commit) -> None:
        """Take in the next commit."""
        record = commit.records.get(self._record)
        digest = CommitDigest(
            commit.number, commit.kind, commit.time, commit.sha256, len(commit.add), len(commit.remove)
        )
        if self.purged is None and record is not None:
            self.purged = digest
            self.commits.append(digest)
        elif self.erased is not None and record is not None and not record.get("erased"):
            # The finish of a plan has added chunks to the purge.
            self.erased = None
            self.commits.append(digest)
            self._slots.update(map(_slot, self.added))
        elif self.purged is not None and self.erased is None and commit.kind == "erase":
            self.commits.append(digest)
            if record is not None and record.get("erased"):
                self.erased = digest
        if self.erased is None:
            self._slots.update(_slot(entry.path) for entry in commit.add)
        for path in commit.remove:
            self.added.pop(path, None)
            self.removed.add(path)
        for entry in commit.add:
            self.added[entry.path] = commit.number


def _slot(path: str) -> str:
    """The path of a file without its token."""
    return path.rpartition("-")[0]
