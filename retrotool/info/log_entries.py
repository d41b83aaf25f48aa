"""The log as a person or an auditor reads it: ``log`` tells what was done, ``verify --log`` whether it is all there.

``log`` reads one entry at a time, checks that each is the child of the one before, and folds nothing: 30,000 commits
take about 2 s, and no more memory than one. What it tells of a commit is in its entry already, so no purged text can
be among it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retrotool.errors import CorruptError, UsageError
from retrotool.store import identity, log
from retrotool.store.log import Commit
from retrotool.store.paths import NAMED_KINDS
from retrotool.store.storage import Storage, storage_at, where
from retrotool.store.verify_log import check_log

_PURGE = "purge:"
_ABOUT = {"purge": ("reason", "who"), "erase": ("reason", "who"), "undo": ("undone_reason", "undone_by")}
"""Of commits that are about purges, where their records say why and who."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A commit in a few words.

    ``added`` has, by kind of file (for some with a name behind it: ``embeddings/minilm``), how many ``files`` and
    ``rows``; ``removed`` how many files. ``records`` are the keys that were set. ``purges`` are those that it made,
    undid or finished erasing, with the reason and who, of an erase those of the purge. ``sha256`` is that of the
    entry, by which the next one names it.
    """

    number: int
    time: str
    command: str
    added: dict[str, dict[str, int]]
    removed: dict[str, int]
    records: tuple[str, ...]
    purges: tuple[dict[str, str], ...]
    tool: str
    parent: str
    sha256: str


@dataclass(frozen=True, slots=True)
class LogVerification:
    """What ``verify --log`` found.

    ``commits`` is how many entries there are, and ``head`` the SHA-256 of the last one, to be kept elsewhere; empty if
    that one is broken. ``kept`` is the number of the commit that has the hash which was given, or None.
    """

    ok: bool
    commits: int
    head: str
    kept: int | None
    checkpoints: int
    problems: list[str]


def log_entries(root: str | Path, last: int | None = None) -> Iterator[LogEntry]:
    """The commits of a store, oldest first, or the ``last`` ones; one is held at a time.

    ``StoreNotFoundError`` at once, ``CorruptError`` where an entry is missing, broken or no child of the one before.
    """
    if last is not None and last < 1:
        raise UsageError(f"--last {last}: it is a number of commits, from 1")
    storage = storage_at(root)
    _, genesis = identity.read_identity(storage)
    return _entries(storage, genesis, last)


def _entries(storage: Storage, genesis: str, last: int | None) -> Iterator[LogEntry]:
    end = log.last_number(storage)
    first = 0 if last is None else max(0, end + 1 - last)
    parent = genesis if first == 0 else None
    for number in range(first, end + 1):
        try:
            commit = log.read(storage, number, parent)
            if commit is None:
                raise CorruptError(
                    f"{where(storage, log.commit_path(number))} is missing, and there are commits after it"
                )
        except CorruptError as error:
            raise CorruptError(str(error), f"See what else is wrong: retrotool verify {storage.place} --log") from error
        yield _told(commit)
        parent = commit.sha256


def _told(commit: Commit) -> LogEntry:
    added: dict[str, dict[str, int]] = {}
    for entry in commit.add:
        counts = added.setdefault(_kind(entry.path), {"files": 0, "rows": 0})
        counts["files"] += 1
        counts["rows"] += entry.rows
    removed = dict(Counter(map(_kind, commit.remove)))
    purges = []
    if commit.kind in _ABOUT:
        reason, who = _ABOUT[commit.kind]
        found = {key: record or {} for key, record in commit.records.items() if key.startswith(_PURGE)}
        purges = [
            {"purge": key.removeprefix(_PURGE), "reason": record.get(reason, ""), "who": record.get(who, "")}
            for key, record in found.items()
        ]
    return LogEntry(
        commit.number, commit.time, commit.kind, added, removed, tuple(commit.records), tuple(purges), commit.tool,
        commit.parent, commit.sha256,
    )  # fmt: skip


def _kind(path: str) -> str:
    """``chunks``, or with its name ``embeddings/minilm``."""
    kind, _, rest = path.partition("/")
    return f"{kind}/{rest.partition('/')[0]}" if kind in NAMED_KINDS else kind


def verify_log(root: str | Path, kept: str | None = None) -> LogVerification:
    """Check the log, its chain, its fold and the checkpoints, and no other file.

    ``kept``: the SHA-256 of an entry that somebody kept, 64 hexadecimal digits; it is a problem if no entry has it.
    """
    if kept is not None and re.fullmatch(r"[0-9a-fA-F]{64}", kept) is None:
        raise UsageError(f"--head {kept}: it is the SHA-256 of an entry, 64 hexadecimal digits")
    storage = storage_at(root)
    problems: list[str] = []
    genesis: str | None = None
    try:
        _, genesis = identity.read_identity(storage)
    except CorruptError as error:
        problems.append(str(error))
    found = check_log(storage, genesis)
    problems += found.problems
    place = None if kept is None else found.place(kept)
    if kept is not None and place is None:
        problems.append(f"no entry has the hash that was kept, {kept.lower()}: the log was written anew, or cut off")
    return LogVerification(not problems, len(found.hashes), found.head, place, found.checkpoints, problems)
