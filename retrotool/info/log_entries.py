"""``log``, which shows what was done to a store, and ``verify --log``, which checks that its log is complete.

``log`` reads one entry at a time, checks that it is the child of the one before, and folds nothing: 30,000
commits take about 2 s, in the memory of one. It prints nothing but what is in the entries, so it can't print
purged text.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retrotool.errors import CorruptError, UsageError
from retrotool.store import identity, log
from retrotool.store.log import Commit
from retrotool.store.storage import Storage, storage_at, where
from retrotool.store.verify_log import check_log

_PURGE = "purge:"
# By command, the fields of a purge's record that have the reason and the person.
_ABOUT = {"purge": ("reason", "who"), "erase": ("reason", "who"), "undo": ("undone_reason", "undone_by")}


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Summary of a commit, see ``docs/json.md``.

    Some kinds of files have a name (``embeddings/minilm``). ``purges`` are those that the commit made, undid
    or finished erasing, each with its reason and who gave it (for an erase, those of the purge).
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
    """Result of ``verify --log``, see ``docs/json.md``; ``head`` is empty if the last entry is broken."""

    ok: bool
    commits: int
    head: str
    kept: int | None
    checkpoints: int
    problems: list[str]


def log_entries(root: str | Path, last: int | None = None) -> Iterator[LogEntry]:
    """Yield the ``last`` (default: all) commits of a store, oldest first, one in memory at a time.

    Raises ``StoreNotFoundError`` at once; ``CorruptError`` at an entry that is missing, broken or not the
    child of the one before.
    """
    if last is not None and last < 1:
        raise UsageError(f"--last {last} is less than 1")
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
                raise CorruptError(f"{where(storage, log.commit_path(number))} is missing, but later commits exist")
        except CorruptError as error:
            verify = shlex.join(["retrotool", "verify", storage.place, "--log"])
            raise CorruptError(str(error), f"Find out what else is wrong: {verify}") from error
        yield _summary(commit)
        parent = commit.sha256


def _summary(commit: Commit) -> LogEntry:
    added: dict[str, dict[str, int]] = {}
    for entry in commit.add:
        counts = added.setdefault(entry.path.rpartition("/")[0], {"files": 0, "rows": 0})
        counts["files"] += 1
        counts["rows"] += entry.rows
    removed = dict(Counter(path.rpartition("/")[0] for path in commit.remove))
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


def verify_log(root: str | Path, kept: str | None = None) -> LogVerification:
    """Check the chain and the fold of the log, and the checkpoints, but no other file.

    ``kept``: a SHA-256, 64 hexadecimal digits, that an entry must have; it was kept elsewhere.
    """
    if kept is not None and re.fullmatch(r"[0-9a-fA-F]{64}", kept) is None:
        raise UsageError(f"--head {kept} is not a SHA-256 of 64 hexadecimal digits")
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
        problems.append(f"no entry has the hash {kept.lower()}: the log was rewritten or cut off")
    return LogVerification(not problems, len(found.hashes), found.head, place, found.checkpoints, problems)
