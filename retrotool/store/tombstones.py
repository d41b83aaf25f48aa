"""Tombstones: the chunks that are purged, and those of purges that were undone. Every reader looks through them.

A purge is one sorted file of chunk ids; the set of a view is their union, 8 bytes a chunk in memory. When a purge is
undone its file leaves the state, and a copy stays in ``undone/``: a view from before still has these tombstones.

What was made of the store while such chunks were purged lacks them. The record of an undone purge says between which
commits they were purged, and in which parts, and whatever is made of the store says of which commit it is: so the log
alone shows what lacks something (``missed_spans``). An index lacks nothing: it holds purged chunks until an erase.
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
_small: dict[tuple[str, str, str], npt.NDArray[np.int64]] = {}
"""Ids of files with few, up to 64 MiB of them."""
KEPT = "undone"
"""The kind of the files that keep which chunks a purge had that was undone."""


@dataclass(frozen=True, slots=True)
class Tombstones:
    """A set of chunk ids; ``ids`` is int64, sorted, without repeats."""

    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def contains(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of ``ids`` (any shape) are purged."""
        return is_in(ids, self.ids)

    def rows(self, part: int) -> npt.NDArray[np.int64]:
        """Purged rows of a part, ascending."""
        return row_of(self.ids[slice_of_part(self.ids, part)])

    def parts(self) -> list[int]:
        """Numbers of the parts that have purged chunks."""
        return distinct_parts(self.ids)


def write_tombstones(store: Store, name: FileName, ids: npt.NDArray[np.int64]) -> FileEntry:
    """Write a purge's ids, sorted; the log says between which they lie, so that a look there spares most files."""
    ids = np.sort(ids)
    table = pa.table([pa.array(ids, pa.int64())], schema=parts.TOMBSTONES_SCHEMA)
    return parts.write_parquet(store, name, table, about={"within": _spans(ids)})


def add_tombstones(store: Store, run_id: str, purge: str, more: npt.NDArray[np.int64]) -> tuple[FileEntry, str]:
    """Write the tombstones of a purge with ``more``; return the new file, and the path of the one that it replaces."""
    before = store.state.group("tombstones").get(purge)
    if before is None:
        raise store.corrupt(f"purge {purge} has no tombstones")
    ids = np.union1d(read_tombstones(store, purge).ids, more)
    return write_tombstones(store, FileName.new(run_id, "tombstones", purge, "parquet"), ids), before.path


def _spans(ids: npt.NDArray[np.int64]) -> list[list[int]]:
    """Up to 16 [first, last] that have all of some ascending ids: without the widest gaps between them."""
    if not len(ids):
        return []
    gaps = np.diff(ids)
    widest = np.sort(np.argsort(gaps, kind="stable")[-(_SPANS - 1) :])
    widest = widest[gaps[widest] > 1]
    firsts, lasts = np.concatenate([[0], widest + 1]), np.concatenate([widest, [len(ids) - 1]])
    found: list[list[int]] = np.stack([ids[firsts], ids[lasts]], axis=1).tolist()
    return found


def may_name(store: Store, slot: str, wanted: Tombstones) -> bool:
    """Whether a file of tombstones, if there is one, may name any of ``wanted``; it is not read for it."""
    entry = store.state.file("tombstones", slot)
    spans = [] if entry is None else (entry.about or {}).get("within", _EVERYWHERE)
    first, last = np.array(spans, np.int64).reshape(-1, 2).T
    return bool((np.searchsorted(wanted.ids, last, side="right") > np.searchsorted(wanted.ids, first)).any())


def read_tombstones(store: Store, purge: str | None = None) -> Tombstones:
    """Tombstones of the store's view, or of one purge."""
    return Tombstones(named_chunks(store, store.state.group("tombstones") if purge is None else (purge,)))


def named_chunks(store: Store, slots: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return the chunks that some files of tombstones, such as those of purges, name: int64, ascending."""
    group = store.state.group("tombstones")
    found = (_read(store, slot, entry) for slot in slots if (entry := group.get(slot)) is not None)
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def read_rejected(store: Store) -> Tombstones:
    """The chunks that ``chunk`` left out as repeats of others: those of tombstones that are no purge's."""
    purges = store.state.with_prefix("purge:")
    slots = [slot for slot in store.state.group("tombstones") if slot.partition(".")[0] not in purges]
    return Tombstones(named_chunks(store, slots))


def _read(store: Store, slot: str, entry: FileEntry) -> npt.NDArray[np.int64]:
    """The ids of a file; from what is kept of them if the purge was undone since the view was opened.

    Small ones are read once a process: a path always names the same bytes, and an erase asks for all many times.
    """
    key = (store.identity.uuid, entry.path, entry.sha256)
    if (known := _small.get(key)) is not None:
        return known
    ids = _read_file(store, slot, entry)
    if len(ids) <= _SMALL:
        if len(_small) >= _MOST_SMALL:
            _small.clear()
        _small[key] = ids
    return ids


def _read_file(store: Store, slot: str, entry: FileEntry) -> npt.NDArray[np.int64]:
    def read_newest() -> pa.Table:
        newest = Store.open(store.storage)
        kept = newest.state.file(KEPT, slot) or newest.state.file("tombstones", slot)
        return parts.read_parquet(newest, kept or entry)

    try:
        table = parts.read_parquet(store, entry)
    except ErasedError:
        table = retry_overtaken(read_newest)  # in the place of a file that was replaced is one with more
    ids: npt.NDArray[np.int64] = table["chunk"].to_numpy()
    return ids


def tombstone_paths(state: State) -> list[str]:
    """Paths of all files of tombstones of a state."""
    return [entry.path for _, entry in state.group("tombstones").items()]


def stands_for(state: State) -> str:
    """Stands for the tombstones of a state: the same for the same purges. The log knows, no file is read."""
    return hashlib.blake2b(" ".join(tombstone_paths(state)).encode(), digest_size=8).hexdigest()


PREFIX = "purge:"
Record = Mapping[str, Any]
_known: dict[str, Mapping[str, Record]] = {}
"""Of some states, by their heads: they are asked for every file."""
_KNOWN = 64


def undone_purges(state: State) -> Mapping[str, Record]:
    """Records, by their ids, of the purges that were undone."""
    if state.head not in _known:
        if len(_known) >= _KNOWN:
            _known.clear()
        found = {purge: record for purge, record in state.with_prefix(PREFIX).items() if "undone" in record}
        _known[state.head] = found
    return _known[state.head]


def standing_purges(state: State) -> dict[str, Record]:
    """Records, by their ids, of the purges that were not undone, the erased ones too."""
    return {purge: record for purge, record in state.with_prefix(PREFIX).items() if "undone" not in record}


def check_not_undone(state: State, purges: Iterable[str]) -> None:
    """``ConflictError`` if any of some purges of the store was undone."""
    for purge in purges:
        if "undone" in state.records[PREFIX + purge]:
            raise ConflictError(f"the purge {purge!r} was undone by another process", "Run the same command again.")


def digest_of_undone(state: State) -> str:
    """Another text after each purge that is undone; "" without any."""
    purges = " ".join(undone_purges(state))
    return hashlib.blake2b(purges.encode(), digest_size=8).hexdigest() if purges else ""


def missed_spans(state: State, commit: int) -> list[list[int]]:
    """[first, last] of parts that have chunks which were purged at a commit, and were undone since."""
    records = undone_purges(state).values()
    return [span for record in records if record["commit"] <= commit < record["undone"] for span in record["parts"]]


def undone_chunks(store: Store, purge: str) -> npt.NDArray[np.int64]:
    """The chunks that a purge had, before it was undone; ascending."""
    entry = store.state.file(KEPT, purge)
    return np.zeros(0, np.int64) if entry is None else parts.read_parquet(store, entry)["chunk"].to_numpy()


def tombstones_naming(store: Store, victims: Tombstones) -> list[str]:
    """Paths of the tombstones of purges that name any victim; ``ConflictError`` if a victim is no tombstone."""
    purges = standing_purges(store.state)
    if not read_tombstones(store).contains(victims.ids).all():
        raise ConflictError("chunks that were to be erased were undone meanwhile", "Run the same command again.")
    return [
        entry.path
        for slot, entry in store.state.group("tombstones").items()
        if slot.partition(".")[0] in purges and may_name(store, slot, victims)
        if read_tombstones(store, slot).contains(victims.ids).any()
    ]
