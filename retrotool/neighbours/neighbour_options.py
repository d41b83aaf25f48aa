"""What may be asked of ``neighbours`` to leave out: read from options and from what a table has, checked, and named.

Options that are not given stay as they are for the tables that are there, so that a plain run changes nothing. Sources
are asked for by name and kept as keyed hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from retrotool.errors import UsageError
from retrotool.index.source_filter import find_sources, source_names
from retrotool.neighbours.neighbour_filters import Filters
from retrotool.store.store import Store

_LISTED = 20


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """What is asked for; None, False or empty: as it was. ``drop``: first forget all that was asked for before."""

    max_overlap: float | None = None
    near_copies: bool = False
    exclude_sources: tuple[str, ...] = ()
    only_sources: tuple[str, ...] = ()
    drop: bool = False

    def check(self, databases: Sequence[Store]) -> None:
        """``UsageError`` for what can't be, and for sources that none of the databases has."""
        if self.max_overlap is not None and not 0 < self.max_overlap <= 1:
            raise UsageError(f"--max-overlap {self.max_overlap:g} is not above 0 and at most 1")
        wanted = {*self.exclude_sources, *self.only_sources}
        if both := sorted(set(self.exclude_sources) & set(self.only_sources)):
            raise UsageError(f"the source {both[0]!r} is both to be left out and the only one", "Give one of the two.")
        if not wanted:
            return
        have: set[str] = set()
        for database in databases:
            for names in source_names(database):
                if wanted <= have:
                    return
                have |= names
        if missing := sorted(wanted - have):
            listed = ", ".join(sorted(have)[:_LISTED]) + (
                f" and {len(have) - _LISTED} more" if len(have) > _LISTED else ""
            )
            where = " and ".join(str(database.root) for database in databases)
            raise UsageError(f"{where}: no document has the source {missing[0]!r}", f"There are: {listed}")

    def applied(self, record: Mapping[str, Any] | None, queries: Store) -> Filters:
        """The filters that a table is to have whose record is, or was, ``record``."""
        filters = Filters() if self.drop else Filters.of(record)
        keyed = queries.identity.keyed_hash
        if self.max_overlap is not None:
            filters = replace(filters, max_overlap=self.max_overlap)
        if self.near_copies:
            filters = replace(filters, near_copies=True)
        if self.exclude_sources:
            filters = replace(filters, exclude_sources=tuple(map(keyed, self.exclude_sources)))
        if self.only_sources:
            filters = replace(filters, only_sources=tuple(map(keyed, self.only_sources)))
        # Sorted, and each once: so it is read from the record again.
        return Filters.of({"filters": filters.as_record()})


def check_some_left(filters: Sequence[Filters], queries: Store, databases: Sequence[Store]) -> None:
    """``UsageError`` if what is left out of each database is all there is: asked for now, or kept from before."""
    for one, database in zip(filters, databases, strict=True):
        allows = one.allows(queries)
        if allows is None or any(map(allows, chain.from_iterable(source_names(database)))):
            return
    told = "; ".join(dict.fromkeys(in_words(named(one, queries, databases)) for one in filters))
    where = " and ".join(str(database.root) for database in databases)
    raise UsageError(
        f"nothing of {where} would be left: left out are {told}",
        "Leave less out; what was asked for before is forgotten with --no-filters.",
    )


def named(
    filters: Filters, queries: Store, databases: Sequence[Store], parts_of_each: int | None = None
) -> dict[str, Any]:
    """Filters with the names of their sources, as far as they are found, and how many are ``unknown``."""
    found = filters.as_record()
    names = find_sources(databases, queries.identity.keyed_hash, filters.sources, parts_of_each)
    for option in ("exclude_sources", "only_sources"):
        if option in found:
            found[option] = sorted(names[hashed] for hashed in found[option] if hashed in names)
    if unknown := len(filters.sources) - len(names):
        found["unknown_sources"] = unknown
    return found


def in_words(filters: Mapping[str, Any]) -> str:
    """What ``named`` filters leave out, in a few words; empty if nothing."""
    told = []
    if "max_overlap" in filters:
        told.append(f"more than {filters['max_overlap']:g} of a chunk in common")
    if filters.get("near_copies"):
        told.append("near copies")
    if names := filters.get("exclude_sources"):
        told.append(f"the source{'s' * (len(names) > 1)} {', '.join(names)}")
    if names := filters.get("only_sources"):
        told.append(f"all sources but {', '.join(names)}")
    if unknown := filters.get("unknown_sources"):
        told.append(f"{unknown} source{'s' * (unknown > 1)} of a name that was not found")
    return "; ".join(told)
