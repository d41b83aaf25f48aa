"""Gaps in tables of neighbours: rows that purges have left with fewer than k, and how many they are.

What is saved beyond the k that are used fills a row by itself, so a row is short only when fewer than k of all that it
has saved are left. The log says of which purges a table knows already: one that knows of all is not read. Of others the
ids are read once, a row group at a time; a count is kept as long as this process lives, since a plan is made several
times. Cost: reading the ids of tables, and a binary search for each of them among the tombstones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.embed.search_scope import (
    erased_chunks,
    is_same_store,
    purges_erased,
    searchable_rows,
)
from retrotool.index.searching import AnyDatabase
from retrotool.store import neighbour_tables
from retrotool.store.log import FileEntry
from retrotool.store.neighbour_tables import ERASED, NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, missed_spans, read_tombstones, stands_for, stands_for_restored

Ids = npt.NDArray[np.int64]
Taken = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Gaps:
    """What is to be done about purges in a table.

    ``few``: searchable rows with fewer than k neighbours left. ``holds_erased``: a row, purged or not, names a chunk
    that another store has erased. ``text_is_stale``: the tokens of neighbours that it is to have are not there, or not
    those of the neighbours that are left.
    """

    few: int = 0
    holds_erased: bool = False
    text_is_stale: bool = False


_found: dict[tuple[str, str, str, str, str, int], Gaps] = {}
"""By table, what was purged and erased, and k."""
_FOUND = 1 << 17


class GapFinder:
    """Finds gaps in tables of a store whose neighbours are chunks of ``database``, of which k are used."""

    def __init__(self, store: Store, database: AnyDatabase, k: int, text: bool) -> None:
        self._store, self._database, self._k, self._text = store, database, k, text
        self.taken: Taken = (
            stands_for(database.store.state),
            stands_for(store.state),
            erased_of(store, database),
            # Rows of queries that were taken back are empty where they were purged when the table was made.
            stands_for_restored(store.state),
        )
        """Stands for all that was purged of database and queries, erased of the database, given back to the queries."""

    def find(self, part: int, entry: FileEntry) -> Gaps:
        """Return the gaps of a part's table; none, without reading it, if nothing was purged since it was made."""
        about = entry.about or {}
        known = about["purges"], about.get("erased", ""), about.get("restored", "")
        # Made, or filled up to k at least, after all purges: rows of queries that were purged since only became empty.
        if known == (self.taken[0], *self.taken[2:]) and int(about.get("k", self._k)) >= self._k:
            return Gaps(text_is_stale=self._lacks_text(entry))
        key = (entry.path, *self.taken, self._k)
        if key not in _found:
            if len(_found) >= _FOUND:
                _found.clear()
            _found[key] = self._read(part, entry)
        found = _found[key]
        return replace(found, text_is_stale=self._text and (found.text_is_stale or self._lacks_text(entry)))

    def _lacks_text(self, entry: FileEntry) -> bool:
        return self._text and not text_is_current(entry, self._database.store, self._k)

    def _read(self, part: int, entry: FileEntry) -> Gaps:
        searched = np.zeros(entry.rows, np.bool_)
        searched[searchable_rows(self._store, part, self._own)] = True
        few, holds_erased, stale = 0, False, False
        for group in range(-(-entry.rows // ROW_GROUP)):
            interrupts.check()
            ids = neighbour_tables.read_ids(self._store, entry, [group])
            left = ~self._database.tombstones.contains(ids) & (ids != NO_NEIGHBOUR)
            rows = searched[group * ROW_GROUP : (group + 1) * ROW_GROUP]
            few += int((left[rows].sum(axis=1) < self._k).sum())
            holds_erased |= self._erased is not None and bool(self._erased.contains(ids).any())
            if neighbour_tables.text_size(entry):
                text = neighbour_tables.read_text(self._store, entry, [group], tokens=False)
                purged, short = neighbour_tables.text_naming(text, self._database.tombstones.contains)
                stale |= bool((purged | short | (text.ids == ERASED)).any())
        return Gaps(few, holds_erased, stale)

    @cached_property
    def _own(self) -> Tombstones:
        return read_tombstones(self._store)

    @cached_property
    def _erased(self) -> Tombstones | None:
        return erased_chunks(self._database.store) if self.taken[2] else None


def text_is_current(entry: FileEntry, database: Store, k: int) -> bool:
    """Return whether a table has the tokens of k neighbours, and none of its database's chunks came back since."""
    missed = missed_spans(database.state, int((entry.about or {})["commit"]))
    return neighbour_tables.text_size(entry) >= k and not missed


def erased_of(store: Store, database: AnyDatabase) -> str:
    """What stands for the purges of the database that were erased; "" within a store, whose erase does its tables."""
    if is_same_store(store, database.store) or not (erased := purges_erased(database.store)):
        return ""
    return hashlib.blake2b(" ".join(erased).encode(), digest_size=8).hexdigest()


def few_rows(store: Store, database: AnyDatabase, part: int, ids: Ids, k: int) -> Ids:
    """Searchable rows with fewer than k living neighbours of those in ``ids`` [n, saved], ascending."""
    living = (ids != NO_NEIGHBOUR) & ~database.tombstones.contains(ids)
    few = np.flatnonzero(living.sum(axis=1) < k)
    return np.intersect1d(few, searchable_rows(store, part, read_tombstones(store))) if len(few) else few
