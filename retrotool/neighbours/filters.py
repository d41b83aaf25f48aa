"""Filters of ``neighbours``: exclude candidates by common tokens, and by source.

* By tokens: a neighbour with its continuation, [N, F], is compared with the query chunk, and dropped if they
  share a run that is too long (measured like r of ``leakage``), or if it is a near copy. More candidates are
  searched than are saved. A row with too few left is searched again for twice as many, from twice as many
  lists, up to ``MOST`` candidates.
* By source: chunks are excluded before the search (``index.searching``). Sources are stored as keyed
  hashes.

Candidates are compared in the order of their ids, so that the database's tokens are read once per 2 to 16
million of them. Cost: about 100,000 per second and core. Memory: 30 bytes each, at most a tenth of
``--memory``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool import interrupts
from retrotool.ann.excluded import Queries
from retrotool.ann.ranking import Best
from retrotool.errors import UsageError
from retrotool.index.searching import AnyDatabase, find_sources, rows_in, source_names
from retrotool.lazy import torch
from retrotool.machine import memory_of_machine
from retrotool.neighbours.retrieved import read_pieces
from retrotool.neighbours.token_overlap import are_near_copies, check_comparable, distinct_grams, has_longer_run
from retrotool.ranges import in_steps
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import Ids
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

MOST = 1 << 12  # candidates of a row that are compared at most, or four times the saved neighbours if that is more
_QUERY_BLOCK = 1 << 20
_SHARE_OF_MACHINE, _SHARE_OF_MEMORY = 8, 6  # 1/n of the machine's memory, or of --memory, for a block of queries
_PAIRS = 1 << 13
_LISTED = 20
_FEWEST_JUDGED, _MOST_JUDGED, _BYTES_A_CANDIDATE = 1 << 21, 1 << 24, 32


@dataclass(frozen=True, slots=True)
class Filters:
    """What is excluded from a table.

    Sources are hashes keyed with the query store's secret, which keeps their names out of the log.
    """

    max_overlap: float | None = None  # largest share of the query chunk's tokens in a common run
    near_copies: bool = False  # neighbours with half or more of its runs of 8 tokens
    exclude_sources: tuple[str, ...] = ()
    only_sources: tuple[str, ...] = ()  # empty: all sources are allowed

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> Filters:
        """Read the filters in the record of a table, or in the log's entry of its file (None: no filters)."""
        found = (record or {}).get("filters", {})
        sources = {name: tuple(found.get(name, ())) for name in ("exclude_sources", "only_sources")}
        return cls(found.get("max_overlap"), bool(found.get("near_copies")), **sources)

    def as_record(self) -> dict[str, Any]:
        """Return the filters that are set, as a dictionary that is equal for equal filters."""
        sources = {"exclude_sources": sorted(set(self.exclude_sources)), "only_sources": sorted(set(self.only_sources))}
        fields = {"max_overlap": self.max_overlap, "near_copies": self.near_copies, **sources}
        return {name: value for name, value in fields.items() if value}

    @property
    def by_tokens(self) -> bool:
        """Whether neighbours are compared by their tokens."""
        return self.max_overlap is not None or self.near_copies

    @property
    def sources(self) -> frozenset[str]:
        """Keyed hashes of all sources that are named."""
        return frozenset((*self.exclude_sources, *self.only_sources))

    def allows(self, queries: Store) -> Callable[[str], bool] | None:
        """Return a predicate on the names of sources, for a table of ``queries``; None if all are allowed."""
        if not self.sources:
            return None
        keyed, exclude, only = queries.identity.keyed_hash, set(self.exclude_sources), set(self.only_sources)
        return lambda name: (found := keyed(name)) not in exclude and (not only or found in only)

    def check_can_compare(self, queries: Store, database: Store) -> None:
        """Raise ``UsageError`` if the tokens have to be compared but can't be."""
        if self.by_tokens:
            drop = "Drop --max-overlap and --exclude-near-copies (--no-filters)"
            check_comparable(queries, database, f"{drop}, or chunk one of the stores again.", f"{drop}.")


@dataclass(frozen=True, slots=True)
class FilterOptions(Filters):
    """Filters as options of a run: sources by name; None, False or empty keeps what the table has."""

    drop: bool = False  # ignore what the table has

    def check(self, databases: Sequence[Store]) -> None:
        """Raise ``UsageError`` for impossible values, and for sources that are in none of the databases."""
        if self.max_overlap is not None and not 0 < self.max_overlap <= 1:
            raise UsageError(f"--max-overlap {self.max_overlap:g} is not above 0 and at most 1")
        wanted = self.sources
        if both := sorted(set(self.exclude_sources) & set(self.only_sources)):
            raise UsageError(f"the source {both[0]!r} is given to --exclude-source and --only-source")
        have = set[str]()
        for names in chain.from_iterable(map(source_names, databases)) if wanted else ():
            if wanted <= have:
                return
            have |= names
        if missing := sorted(wanted - have):
            more = f" and {len(have) - _LISTED} more" if len(have) > _LISTED else ""
            where = " and ".join(database.place for database in databases)
            listed = f"The sources are: {', '.join(sorted(have)[:_LISTED])}{more}"
            raise UsageError(f"{where}: no document has the source {missing[0]!r}", listed)

    def applied(self, record: Mapping[str, Any] | None, queries: Store) -> Filters:
        """Apply the options to the filters in ``record``, the table's record or None."""
        kept, asked = {} if self.drop else Filters.of(record).as_record(), self.as_record()
        for option in ("exclude_sources", "only_sources"):
            if option in asked:
                asked[option] = sorted(map(queries.identity.keyed_hash, asked[option]))
        return Filters.of({"filters": {**kept, **asked}})


def check_some_left(filters: Sequence[Filters], queries: Store, databases: Sequence[Store]) -> None:
    """Raise ``UsageError`` if the filters exclude everything in all databases."""
    for one, database in zip(filters, databases, strict=True):
        allows = one.allows(queries)
        if allows is None or any(map(allows, chain.from_iterable(source_names(database)))):
            return
    excluded = "; ".join(dict.fromkeys(in_words(named(one, queries, databases)) for one in filters))
    where = " and ".join(database.place for database in databases)
    raise UsageError(f"the filters exclude all of {where}: {excluded}", "--no-filters drops filters of earlier runs.")


def named(
    filters: Filters, queries: Store, databases: Sequence[Store], parts_of_each: int | None = None
) -> dict[str, Any]:
    """Return filters with names of sources instead of hashes; ``unknown_sources`` counts missing names."""
    found = filters.as_record()
    names = find_sources(databases, queries.identity.keyed_hash, filters.sources, parts_of_each)
    for option in ("exclude_sources", "only_sources"):
        if option in found:
            found[option] = sorted(names[hashed] for hashed in found[option] if hashed in names)
    if unknown := len(filters.sources) - len(names):
        found["unknown_sources"] = unknown
    return found


def in_words(filters: Mapping[str, Any]) -> str:
    """Return a phrase for what ``named`` filters exclude, empty without filters."""
    found = []
    if "max_overlap" in filters:
        found.append(f"more than {filters['max_overlap']:g} of a chunk in common")
    if filters.get("near_copies"):
        found.append("near copies")
    if names := filters.get("exclude_sources"):
        found.append(f"the source{'s' * (len(names) > 1)} {', '.join(names)}")
    if names := filters.get("only_sources"):
        found.append(f"all sources but {', '.join(names)}")
    if unknown := filters.get("unknown_sources"):
        found.append(f"{unknown} source{'s' * (unknown > 1)} whose name was not found")
    return "; ".join(found)


def candidates_at_once(database: AnyDatabase, memory: int | None) -> int:
    """Return how many candidates to compare at a time: more for a large database, which is read each time."""
    state = database.store.state
    rows = sum(entry.rows for part in database.held() if (entry := state.part_file("chunks", part)))
    judged = min(max(rows // 16, _FEWEST_JUDGED), _MOST_JUDGED)
    return judged if memory is None else min(judged, memory // 10 // _BYTES_A_CANDIDATE)


@dataclass
class Finder:
    """Finds the neighbours of rows of one part that pass the filters.

    ``ask`` returns the queries of some rows. ``memory`` limits a search, in bytes; None: whatever is fastest.
    """

    queries: Store
    part: int
    database: AnyDatabase
    saved: int
    filters: Filters
    ask: Callable[[Ids], Queries]
    memory: int | None = None

    def __post_init__(self) -> None:
        self._tombstones = read_tombstones(self.queries) if self.filters.by_tokens else None
        self._wanted, self._most = self.saved + -(-self.saved // 2), max(MOST, 4 * self.saved)

    def blocks(self, rows: Ids) -> Iterator[Ids]:
        """Return the rows in blocks for ``search``."""
        if self._tombstones is None:
            return in_steps(rows, self._rows_at_once(rows, self.saved))
        return in_steps(rows, max(1, candidates_at_once(self.database, self.memory) // self._wanted))

    def search(self, rows: Ids, only: Collection[int] | None = None, beyond: int = 0) -> Best:
        """Return the nearest neighbours of rows of a block.

        ``only``: search only these parts of the database. ``beyond``: skip the nearest ``beyond`` lists.
        """
        if self._tombstones is None:
            return self.database.search(self.ask(rows), self.saved, only=only, beyond=beyond)
        best = Best.nothing(len(rows), self.saved)
        left, wanted, wider = np.arange(len(rows)), self._wanted, 1
        while len(left):
            short = []
            for some in in_steps(left, max(1, candidates_at_once(self.database, self.memory) // wanted)):
                found = self._candidates(rows[some], wanted, only, wider, beyond)
                whole = found.ids[:, -1] != NO_NEIGHBOUR
                dropped = self._dropped(self._tombstones, rows[some], found.ids)
                distances, ids = np.where(dropped, np.float32(np.inf), found.distances), found.ids
                kept = Best(distances, np.where(dropped, NO_NEIGHBOUR, ids)).nearest(self.saved)
                best.put(some, kept)
                short.append(some[whole & (kept.ids[:, -1] == NO_NEIGHBOUR)])
            if wanted >= self._most:
                break
            left, wanted, wider = np.concatenate(short), min(2 * wanted, self._most), 2 * wider
        return best

    def _candidates(self, rows: Ids, k: int, only: Collection[int] | None, wider: int, beyond: int) -> Best:
        best = Best.nothing(len(rows), k)
        for some in in_steps(np.arange(len(rows)), self._rows_at_once(rows, k)):
            interrupts.check()
            best.put(some, self.database.search(self.ask(rows[some]), k, only=only, wider=wider, beyond=beyond))
        return best

    def _rows_at_once(self, rows: Ids, k: int) -> int:
        share = memory_of_machine() // _SHARE_OF_MACHINE if self.memory is None else self.memory // _SHARE_OF_MEMORY
        d = self.ask(rows[:1]).vectors.shape[1]
        return min(_QUERY_BLOCK, rows_in(share, self.database.candidates_for(k), d))

    def _dropped(self, own: Tombstones, rows: Ids, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which candidates [n, c] of rows [n] are excluded; never a −1."""
        asked = read_pieces(self.queries, own, parts.chunk_ids(self.part, rows))
        tokens, n_tokens = asked.tokens[:, 0], asked.n_tokens[:, 0]
        distinct = distinct_grams(tokens, n_tokens) if self.filters.near_copies else np.zeros(len(rows), np.uint64)
        flat = ids.ravel()
        dropped = np.zeros(len(flat), np.bool_)
        order = np.flatnonzero(flat != NO_NEIGHBOUR)
        order = order[np.argsort(flat[order], kind="stable")]

        def judge(pairs: Ids) -> None:
            interrupts.check()
            of = pairs // ids.shape[1]
            dropped[pairs] = self._are_dropped(tokens[of], n_tokens[of], distinct[of], flat[pairs])

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(judge, in_steps(order, _PAIRS)))
        return dropped.reshape(ids.shape)

    def _are_dropped(
        self, tokens: npt.NDArray[Any], n_tokens: Ids, distinct: npt.NDArray[np.uint64], ids: Ids
    ) -> npt.NDArray[np.bool_]:
        """Return which candidates, one per query, are excluded, bool [n]."""
        pieces = read_pieces(self.database.store, self.database.tombstones, ids)
        others, n_others = pieces.joined()
        dropped = np.zeros(len(ids), np.bool_)
        if self.filters.max_overlap is not None:
            length = self.queries.identity.chunk_length
            run = max(n for n in range(length + 1) if n / length <= self.filters.max_overlap)
            dropped |= has_longer_run(tokens, n_tokens, others, n_others, run)
        if self.filters.near_copies:
            rest = np.flatnonzero(~dropped)
            of = (tokens[rest], n_tokens[rest], distinct[rest])
            dropped[rest] = are_near_copies(*of, others[rest], n_others[rest])
            # Chunks without a run of 8 tokens are compared as a whole.
            short = np.flatnonzero((distinct == 0) & (n_tokens == pieces.n_tokens[:, 0]))
            width = min(tokens.shape[1], pieces.tokens.shape[2])
            dropped[short] |= (tokens[short, :width] == pieces.tokens[short, 0, :width]).all(axis=1)
        return dropped
