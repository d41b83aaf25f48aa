"""Reading neighbour tables: of rows of a part, the living neighbours, nearest first, and their tokens.

A table may be a mixture: a record that names tables of several databases, each with a weight. Nothing of these is
copied: they are merged when they are read, by squared distance over weight, so that weights can be changed at no cost.

What is read goes through the tombstones of the databases as they were when the reader opened them, so a row can have
fewer than k neighbours, and never one that was purged. Cost: the row groups that hold the rows; masks by binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.neighbours.retrieved import Pieces, read_pieces
from retrotool.neighbours.stage import check_table, database_of, members_of
from retrotool.store import parts, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones, read_tombstones

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """The neighbours of n chunks, nearest first, all [n, k].

    ``ids`` int64 (−1: none), ``distances`` float32, squared L2 (+inf: none), ``databases`` uint8: which of the
    reader's ``databases`` the id is of (0 where there is none).
    """

    ids: Ids
    distances: npt.NDArray[np.float32]
    databases: npt.NDArray[np.uint8]

    def take(self, rows: Ids) -> Found:
        """Those of some of the chunks."""
        return Found(self.ids[rows], self.distances[rows], self.databases[rows])

    def is_of(self, database: int) -> npt.NDArray[np.bool_]:
        """Which are neighbours in one of the databases, bool [n, k]."""
        found: npt.NDArray[np.bool_] = (self.databases == database) & (self.ids != NO_NEIGHBOUR)
        return found


@dataclass(frozen=True, slots=True)
class Member:
    """A table that is read, and the database of its neighbours; ``within``: that is the store itself."""

    table: str
    weight: float
    store: Store
    tombstones: Tombstones
    within: bool


class NeighbourReader:
    """The table, or mixture of tables, ``name`` of a query store, read at the newest commits of its databases.

    ``UsageError`` if it is not there, or a database is not where it was: tombstones can't be applied without it.
    """

    def __init__(self, store: Store, name: str = "main") -> None:
        self.store, self.name = store, name
        self._members = []
        for table, weight in members_of(store, name):
            database = database_of(store, table)[0]
            tombstones = read_tombstones(database)
            self._members.append(Member(table, weight, database, tombstones, within=database is store))
        records = [store.state.records[f"neighbours:{member.table}"] for member in self._members]
        self.k = int(records[0]["k"])
        """Neighbours that are used, unless more are asked for."""
        self.saved = min(int(record["saved"]) for record in records)
        """The most that can be asked for."""

    @property
    def members(self) -> tuple[Member, ...]:
        """The tables that are read, in the order of ``Found.databases``."""
        return tuple(self._members)

    @property
    def databases(self) -> tuple[Store, ...]:
        """The stores that the neighbours are chunks of."""
        return tuple(member.store for member in self._members)

    @property
    def tables(self) -> tuple[tuple[str, float], ...]:
        """The table, and its weight, of the neighbours in each of the ``databases``."""
        return tuple((member.table, member.weight) for member in self._members)

    def entries(self, part: int) -> tuple[FileEntry, ...]:
        """A part's table of each member; ``UsageError`` if its ids can't be taken for chunks of the database."""
        found = []
        for member in self._members:
            entry = parts.part_entry(self.store, "neighbours", part, member.table)
            check_table(self.store, entry, member.table, member.store)
            found.append(entry)
        return tuple(found)

    def parts(self) -> list[int]:
        """Numbers of the parts that have tables of all databases, ascending."""
        of_each = [set(self.store.state.group("neighbours", member.table)) for member in self._members]
        return sorted(int(slot) for slot in set.intersection(*of_each))

    def read(self, part: int, k: int | None = None, row_groups: Sequence[int] | None = None) -> Found:
        """The neighbours of all rows of a part, or of those of some row groups (8,192 rows each), at most k a row.

        Rows of chunks that have none (purged, no key, or not embedded) are empty. What the query store itself has
        purged is for the caller to leave out.
        """
        k = self.k if k is None else k
        found = [self._read_member(which, part, row_groups) for which in range(len(self._members))]
        if len(found) == 1:
            one = found[0]
            return Found(one.ids[:, :k], one.distances[:, :k], one.databases[:, :k])
        ids = np.concatenate([one.ids for one in found], 1)
        distances = np.concatenate([one.distances for one in found], 1)
        which = np.concatenate([one.databases for one in found], 1)
        weights = np.array([member.weight for member in self._members], np.float32)
        order = np.argsort(distances / weights[which], axis=1, kind="stable")[:, :k]
        return Found(*(np.take_along_axis(values, order, 1) for values in (ids, distances, which)))

    def _read_member(self, which: int, part: int, row_groups: Sequence[int] | None) -> Found:
        member = self._members[which]
        entry = parts.part_entry(self.store, "neighbours", part, member.table)
        check_table(self.store, entry, member.table, member.store)
        table = tables.read_table(self.store, entry, None if row_groups is None else list(row_groups))
        ids, distances = table.ids, table.distances
        gone = (ids != NO_NEIGHBOUR) & member.tombstones.contains(ids)
        lost = np.flatnonzero(gone.any(axis=1))
        if len(lost):
            ids, distances = np.array(ids), np.array(distances)
            order = np.argsort(gone[lost], axis=1, kind="stable")  # the living first, in their order
            ids[lost] = np.take_along_axis(np.where(gone[lost], NO_NEIGHBOUR, ids[lost]), order, 1)
            kept = np.where(gone[lost], np.float32(np.inf), distances[lost])
            distances[lost] = np.take_along_axis(kept, order, 1)
        databases = np.where(ids == NO_NEIGHBOUR, 0, which).astype(np.uint8)
        return Found(ids, distances, databases)

    def pieces(self, found: Found, into: Pieces | None = None) -> Pieces:
        """[N, F] of neighbours [n, k], row by row: tokens [n · k, 2, chunk_length] and lengths [n · k, 2].

        ``into``: where to put those that there are; the others stay as they are.
        """
        ids, which = found.ids.ravel(), found.databases.ravel()
        into = Pieces.none(self._members[0].store, len(ids)) if into is None else into  # alike in all
        for number, member in enumerate(self._members):
            own = np.where(which == number, ids, NO_NEIGHBOUR) if len(self._members) > 1 else ids
            read_pieces(member.store, member.tombstones, own, into)
        return into

    def pieces_of(self, database: int, ids: Ids) -> Pieces:
        """[N, F] of chunk ids [n] of one of the ``databases``, in its own tokens."""
        member = self._members[database]
        return read_pieces(member.store, member.tombstones, ids)


def row_groups_of(rows: Ids) -> list[int]:
    """Numbers of the row groups that hold some rows of a part, ascending."""
    return [int(group) for group in np.unique(rows // ROW_GROUP)]
