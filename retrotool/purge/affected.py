"""``purge --affected``: which training chunks had purged chunks among their neighbours, as far as tables still tell.

Tables are read as they are stored, without a mask. Of each neighbour a model is given the chunk and what follows it, so
a chunk is affected, too, if a purged chunk only follows a neighbour of it.

At which place a purged chunk stood is told as of just before it was purged: readers did not see what earlier purges had
taken, so what is saved behind that had moved up. Where that can't be known (an earlier purge was taken back since) it
is taken to have moved up. A table of a mixture is taken by itself, as the mixture's first k of it are among its own.

What tables have no more can't be told: entries that an erase has taken out, which it does within a store, and what was
in rows that were searched again after the purge. Cost: the ids of all tables, with a binary search for each. Memory: a
row group, the affected rows of a part, and some 50 bytes a purged chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.embed.search_scope import is_same_directory
from retrotool.errors import UsageError
from retrotool.neighbours.stage import check_ids, database_of, members_of
from retrotool.store import parts, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.restored import PREFIX, is_restored, restored_chunks, restored_purges, standing_purges
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

Ids = npt.NDArray[np.int64]
NEVER = int(np.iinfo(np.int64).max)
"""A commit, or a place among neighbours, that there is not."""
_FROM_THE_BEGINNING = -1
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Asked:
    """A purge of ``database`` that is asked about: its ``chunks``, and how many of these are ``erased``.

    Of ``parts`` parts that a table of this database has, ``since`` were made, or filled up, after the purge.
    ``within``: the tables lie in the database itself, so that an erase takes entries out of them.
    """

    purge: str
    database: str
    chunks: int
    erased: int
    parts: int
    since: int
    within: bool


@dataclass(frozen=True, slots=True)
class Hits:
    """Affected rows [n] of a part, ascending, and where a purged chunk stood, from 1, at the nearest; int64 [n] each.

    ``neighbour``: as a neighbour; ``continuation``: as what follows one. ``NEVER``: it did not.
    """

    part: int
    rows: Ids
    neighbour: Ids
    continuation: Ids

    def take(self, some: npt.NDArray[np.bool_]) -> Hits:
        """Those of some rows."""
        return Hits(self.part, self.rows[some], self.neighbour[some], self.continuation[some])


class Victims:
    """The chunks of purges of a database, to be looked for in its tables."""

    def __init__(self, database: Store, purges: Sequence[str]) -> None:
        self._gone, self._masked, self._seen = _deaths(database)
        chunks = [np.zeros(0, np.int64), *(read_tombstones(database, purge).ids for purge in purges)]
        self.chunks: Ids = np.unique(np.concatenate(chunks))
        index, n_tokens = _read_chunks(database, self.chunks)
        self.erased = Tombstones(self.chunks[n_tokens == 0])
        self._followed = Tombstones(self.chunks[index > 0] - 1)
        self._either = Tombstones(np.union1d(self.chunks, self._followed.ids))

    def find(self, ids: Ids) -> tuple[Ids, Ids, Ids]:
        """Affected rows of ``ids`` [n, saved], and at which places, as ``Hits`` has them."""
        rows = np.flatnonzero(self._either.contains(ids).any(axis=1))
        ids = ids[rows]
        masked, seen = self._of(self._masked, ids), self._of(self._seen, ids)
        neighbour = _places(masked, seen, Tombstones(self.chunks).contains(ids))
        # What follows a neighbour could be read as long as both could.
        seen = np.minimum(seen, self._of(self._seen, ids + 1))
        return rows, neighbour, _places(masked, seen, self._followed.contains(ids))

    def _of(self, commits: Ids, ids: Ids) -> Ids:
        """For each id the number of a commit; ``NEVER`` for what was never purged."""
        if not len(self._gone):
            return np.full(ids.shape, NEVER)
        place = np.minimum(np.searchsorted(self._gone, ids), len(self._gone) - 1)
        return np.where(self._gone[place] == ids, commits[place], NEVER)


def _places(masked: Ids, until: Ids, hit: npt.NDArray[np.bool_]) -> Ids:
    """For each row [n, saved] at which place, from 1, the nearest ``hit`` was read just before commit ``until``.

    ``masked``: the commit from which on each entry was not seen.
    """
    found = np.full(len(masked), NEVER)
    for column in range(masked.shape[1]):
        rows = np.flatnonzero(hit[:, column])
        before = masked[rows, :column] >= until[rows, column, None]
        found[rows] = np.minimum(found[rows], 1 + before.sum(axis=1))
    return found


def _deaths(database: Store) -> tuple[Ids, Ids, Ids]:
    """All chunks that are, or were, purged, ascending; and the first commits from which on they were not seen.

    First of these commits: of all, also of purges that were taken back. Then: of what is purged still, or ``NEVER``.
    Chunks that were set aside as repeats have never been seen.
    """
    state = database.state
    standing = standing_purges(state)
    ids, masked, seen = [], [], []
    for slot in state.group("tombstones"):
        commit = int(standing[slot]["commit"]) if slot in standing else _FROM_THE_BEGINNING
        ids.append(read_tombstones(database, slot).ids)
        masked.append(np.full(len(ids[-1]), commit))
        seen.append(masked[-1])
    for purge, record in restored_purges(state).items():
        ids.append(restored_chunks(database, purge))
        masked.append(np.full(len(ids[-1]), int(record["commit"])))
        seen.append(np.full(len(ids[-1]), NEVER))
    if not ids:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    found, which = np.unique(np.concatenate(ids), return_inverse=True)
    first_masked, first_seen = np.full(len(found), NEVER), np.full(len(found), NEVER)
    np.minimum.at(first_masked, which, np.concatenate(masked))
    np.minimum.at(first_seen, which, np.concatenate(seen))
    return found, first_masked, first_seen


def _read_chunks(database: Store, ids: Ids) -> tuple[Ids, Ids]:
    """Index in its document, and number of tokens, of chunks; 0 and −1 where a ``chunk`` has taken the part back."""
    index, n_tokens = np.zeros(len(ids), np.int64), np.full(len(ids), -1)
    for part in np.intersect1d(ids >> PART_SHIFT, database.state.parts()).tolist():
        low, high = np.searchsorted(ids, [part << PART_SHIFT, (part + 1) << PART_SHIFT])
        table = parts.read_parquet(database, parts.part_entry(database, "chunks", part), ["index", "n_tokens"])
        rows = ids[low:high] - (part << PART_SHIFT)
        index[low:high], n_tokens[low:high] = table["index"].to_numpy()[rows], table["n_tokens"].to_numpy()[rows]
    return index, n_tokens


@dataclass(frozen=True, slots=True)
class _Member:
    """A table that is read, and what is looked for in it."""

    entries: dict[int, FileEntry]
    victims: Victims


class AffectedReader:
    """Reads which chunks of a store are affected by purges, through the neighbours ``name`` (a table, or a mixture).

    ``purges``: of any of the databases; none: all that stand. ``UsageError`` if there is no such purge, or it was taken
    back, or a database is not there.
    """

    def __init__(self, store: Store, name: str, purges: Sequence[str] = ()) -> None:
        self.store = store
        members = [(table, *database_of(store, table)) for table, _ in members_of(store, name)]
        self.k, self.saved = int(members[0][2]["k"]), max(int(record["saved"]) for *_, record in members)
        for purge in purges:
            _check_purge([database for _, database, _ in members], purge)
        self._members: list[_Member] = []
        asked = []
        for table, database, _ in members:
            standing = standing_purges(database.state)
            wanted = [purge for purge in standing if purge in purges or not purges]
            group = store.state.group("neighbours", table)
            entries = {int(slot): entry for slot in group if (entry := group.get(slot)) is not None}
            for entry in entries.values():
                check_ids(store, entry, table, database)
            victims = Victims(database, wanted)
            self._members += [_Member(entries, victims)] if wanted else []
            asked += [_asked(store, database, purge, victims, entries) for purge in wanted]
        self.asked = tuple(asked)

    @property
    def parts(self) -> list[int]:
        """Numbers of the parts that are read, ascending."""
        return sorted({part for member in self._members for part in member.entries})

    @property
    def bytes(self) -> int:
        """Bytes of the tables that are read."""
        return sum(entry.bytes for member in self._members for entry in member.entries.values())

    def read(self, report: Callable[[int], object] = lambda _: None) -> Iterator[Hits]:
        """The affected rows of each part, purged ones too; ``report`` is told of bytes that were read."""
        for part in self.parts:
            found = [_rows(self.store, member, part, report) for member in self._members if part in member.entries]
            rows = np.unique(np.concatenate([hits.rows for hits in found]))
            neighbour, continuation = np.full(len(rows), NEVER), np.full(len(rows), NEVER)
            for hits in found:
                place = np.searchsorted(rows, hits.rows)
                neighbour[place] = np.minimum(neighbour[place], hits.neighbour)
                continuation[place] = np.minimum(continuation[place], hits.continuation)
            yield Hits(part, rows, neighbour, continuation)


def _rows(store: Store, member: _Member, part: int, report: Callable[[int], object]) -> Hits:
    entry = member.entries[part]
    groups, nothing = -(-entry.rows // ROW_GROUP), np.zeros(0, np.int64)
    found: list[tuple[Ids, Ids, Ids]] = [(nothing, nothing, nothing)]
    for group in range(groups):
        interrupts.check()
        rows, neighbour, continuation = member.victims.find(tables.read_ids(store, entry, [group]))
        found.append((rows + group * ROW_GROUP, neighbour, continuation))
        report(entry.bytes * (group + 1) // groups - entry.bytes * group // groups)
    rows, neighbour, continuation = (np.concatenate(several) for several in zip(*found, strict=True))
    return Hits(part, rows, neighbour, continuation)


def _asked(store: Store, database: Store, purge: str, victims: Victims, entries: dict[int, FileEntry]) -> Asked:
    chunks = read_tombstones(database, purge).ids
    made = [(entry.about or {}).get("commit") for entry in entries.values()]
    purged = int(database.state.records[PREFIX + purge]["commit"])
    since = sum(commit is None or int(commit) >= purged for commit in made)
    erased = int(victims.erased.contains(chunks).sum())
    within = is_same_directory(store, database)
    return Asked(purge, str(database.root), len(chunks), erased, len(entries), since, within)


def _check_purge(databases: Sequence[Store], purge: str) -> None:
    records = [_purges(database.state) for database in databases]
    found = [record[purge] for record in records if purge in record]
    if not found:
        have = list(dict.fromkeys(known for record in records for known in record if not is_restored(record[known])))
        more = f" and {len(have) - _NAMED:,} more" if len(have) > _NAMED else ""
        where = " or ".join(str(database.root) for database in databases)
        raise UsageError(
            f"there is no purge {purge!r} of {where}",
            f"There are: {', '.join(have[:_NAMED]) or 'none'}{more}. What they are: retrotool info {where}",
        )
    if all(map(is_restored, found)):
        raise UsageError(f"the purge {purge!r} was taken back: its chunks are not purged")


def _purges(state: State) -> dict[str, dict[str, object]]:
    return state.with_prefix(PREFIX)
