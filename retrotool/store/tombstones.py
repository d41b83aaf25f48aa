"""Tombstones: the chunks that are purged, and those of undone purges. Every reader applies them.

A purge is a sorted file of chunk ids; the set of a view is their union, 8 bytes of memory per chunk. Undoing
a purge removes its file from the state and keeps a copy in ``undone/`` for views from before.

Files built while a purge was in effect lack its chunks. The record of an undone purge says between which
commits and in which parts that was, and every derived file records its commit, so the log alone shows which
files miss chunks (``missed_spans``). Indexes do not: they hold purged chunks until an erase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import ConflictError, ErasedError
from retrotool.ranges import is_in
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.parts import distinct_parts, row_of, slice_of_part
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken

_SPANS = 16
_EVERYWHERE = [(0, (1 << 63) - 1)]
_SMALL, _MOST_SMALL = 256, 1 << 15
_small: dict[tuple[str, str, str], npt.NDArray[np.int64]] = {}  # ids of small files, up to 64 MiB
KEPT = "undone"  # kind of the files that keep the chunks of undone purges


@dataclass(frozen=True, slots=True)
class Tombstones:
    """A set of chunk ids; ``ids`` is int64, sorted, without repeats."""

    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def contains(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which of ``ids`` (any shape) are purged."""
        return is_in(ids, self.ids)

    def rows(self, part: int) -> npt.NDArray[np.int64]:
        """Return the purged rows of a part, ascending."""
        return row_of(self.ids[slice_of_part(self.ids, part)])

    def parts(self) -> list[int]:
        """Return the numbers of the parts that have purged chunks."""
        return distinct_parts(self.ids)


def write_tombstones(store: Store, name: FileName, ids: npt.NDArray[np.int64]) -> FileEntry:
    """Write a purge's ids, sorted. The log gets ranges that contain them, so most lookups read no file."""
    ids = np.sort(ids)
    table = pa.table([pa.array(ids, pa.int64())], schema=parts.TOMBSTONES_SCHEMA)
    return parts.write_parquet(store, name, table, about={"within": _spans(ids)})


def add_tombstones(store: Store, run_id: str, purge: str, more: npt.NDArray[np.int64]) -> tuple[FileEntry, str]:
    """Write a purge's tombstones plus ``more``; return the new file and the path of the one it replaces."""
    before = store.state.group("tombstones").get(purge)
    if before is None:
        raise store.corrupt(f"purge {purge} has no tombstones")
    ids = np.union1d(read_tombstones(store, purge).ids, more)
    return write_tombstones(store, FileName.new(run_id, "tombstones", purge, "parquet"), ids), before.path


def _spans(ids: npt.NDArray[np.int64]) -> list[list[int]]:
    """Return up to 16 [first, last] that cover ascending ids, without the widest gaps between them."""
    gaps = np.diff(ids)
    widest = np.sort(np.argsort(gaps, kind="stable")[-(_SPANS - 1) :])
    pieces = np.split(ids, widest[gaps[widest] > 1] + 1)
    return [[int(piece[0]), int(piece[-1])] for piece in pieces if len(piece)]


def may_name(store: Store, slot: str, wanted: Tombstones) -> bool:
    """Return whether a tombstones file may name any of ``wanted``, without reading it."""
    entry = store.state.file("tombstones", slot)
    spans = [] if entry is None else (entry.about or {}).get("within", _EVERYWHERE)
    first, last = np.array(spans, np.int64).reshape(-1, 2).T
    return bool((np.searchsorted(wanted.ids, last, side="right") > np.searchsorted(wanted.ids, first)).any())


def tombstones_near(store: Store, part: int) -> list[str]:
    """Return the paths of the tombstones files that may name chunks of a part."""
    purged = read_tombstones(store).ids
    here = Tombstones(purged[slice_of_part(purged, part)])
    return [entry.path for slot, entry in store.state.group("tombstones").items() if may_name(store, slot, here)]


def read_tombstones(store: Store, purge: str | None = None) -> Tombstones:
    """Read the tombstones of the store's view, or of one purge."""
    return Tombstones(named_chunks(store, store.state.group("tombstones") if purge is None else (purge,)))


def named_chunks(store: Store, slots: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return the chunks that tombstones files name: int64, ascending."""
    group = store.state.group("tombstones")
    found = (_read(store, slot, entry) for slot in slots if (entry := group.get(slot)) is not None)
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def read_rejected(store: Store) -> Tombstones:
    """Read the chunks that ``chunk`` left out as repeats: tombstones that belong to no purge."""
    purges = store.state.with_prefix("purge:")
    return Tombstones(named_chunks(store, (slot for slot in store.state.group("tombstones") if slot not in purges)))


def _read(store: Store, slot: str, entry: FileEntry) -> npt.NDArray[np.int64]:
    """Return the ids of a file, even if its purge was undone. Small files are cached for erases."""
    key = (store.identity.uuid, entry.path, entry.sha256)
    if (known := _small.get(key)) is not None:
        return known

    def read_newest() -> pa.Table:
        newest = Store.open(store.storage)
        kept = newest.state.file(KEPT, slot) or newest.state.file("tombstones", slot)
        return parts.read_parquet(newest, kept or entry)

    try:
        table = parts.read_parquet(store, entry)
    except ErasedError:
        table = retry_overtaken(read_newest)  # a file that replaced this one has more ids
    ids = np.asarray(table["chunk"].to_numpy())
    if len(ids) <= _SMALL:
        if len(_small) >= _MOST_SMALL:
            _small.clear()
        _small[key] = ids
    return ids


def tombstone_paths(state: State) -> list[str]:
    """Return the paths of a state's tombstones files."""
    return [entry.path for _, entry in state.group("tombstones").items()]


def stands_for(state: State) -> str:
    """Return a hash of a state's purges, without reading a file."""
    return hashlib.blake2b(" ".join(tombstone_paths(state)).encode(), digest_size=8).hexdigest()


PREFIX = "purge:"
REPLACED = "replaced"  # the selector of a purge of documents that others replace
Record = Mapping[str, Any]
_known: dict[str, Mapping[str, Record]] = {}  # undone purges by the state's head: they are needed for every file
_KNOWN = 64


def undone_purges(state: State) -> Mapping[str, Record]:
    """Return the records of undone purges by id."""
    if state.head not in _known:
        if len(_known) >= _KNOWN:
            _known.clear()
        found = {purge: record for purge, record in state.with_prefix(PREFIX).items() if "undone" in record}
        _known[state.head] = found
    return _known[state.head]


def standing_purges(state: State) -> dict[str, Record]:
    """Return the records, by id, of purges that were not undone, including erased ones."""
    return {purge: record for purge, record in state.with_prefix(PREFIX).items() if "undone" not in record}


def check_not_undone(state: State, purges: Iterable[str]) -> None:
    """Check that none of the store's ``purges`` was undone, else raise ``ConflictError``."""
    for purge in purges:
        if "undone" in state.records[PREFIX + purge]:
            raise ConflictError(f"the purge {purge!r} was undone by another process", "Run the same command again.")


def digest_of_undone(state: State) -> str:
    """Return a text that changes with each undone purge; "" without any."""
    purges = " ".join(undone_purges(state))
    return hashlib.blake2b(purges.encode(), digest_size=8).hexdigest() if purges else ""


def missed_spans(state: State, commit: int) -> list[list[int]]:
    """Return [first, last] of parts with chunks that were purged at a commit and undone since."""
    records = undone_purges(state).values()
    return [span for record in records if record["commit"] <= commit < record["undone"] for span in record["parts"]]


def undone_chunks(store: Store, purge: str) -> npt.NDArray[np.int64]:
    """Return the chunks of a purge that was undone, ascending."""
    entry = store.state.file(KEPT, purge)
    return np.zeros(0, np.int64) if entry is None else parts.read_parquet(store, entry)["chunk"].to_numpy()


def tombstones_naming(store: Store, purged: Tombstones) -> list[str]:
    """Return paths of purges' tombstones that name any of ``purged``; ``ConflictError`` if one was undone."""
    purges = standing_purges(store.state)
    if not read_tombstones(store).contains(purged.ids).all():
        raise ConflictError("another process undid the purge of some chunks to erase", "Run the same command again.")
    return [
        entry.path
        for slot, entry in store.state.group("tombstones").items()
        if slot in purges and may_name(store, slot, purged)
        if read_tombstones(store, slot).contains(purged.ids).any()
    ]
