"""Purges that were taken back: what was made while their chunks were purged lacks these, and which that is.

The record of such a purge says between which commits its chunks were purged, and which parts have any. Whatever was
made of the store says of which commit it is; so the log tells what lacks something, and no file is read for it. Which
chunks they were is stored in ``restored/``, for readers that have a view from before. An index lacks nothing: it holds
purged chunks until they are erased.

Nothing here brings anything up to date: that is done by ``neighbours`` and ``neighbours --materialise``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import ConflictError
from retrotool.store import parts
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import KEPT, Tombstones, may_name, read_tombstones

PREFIX = "purge:"
Record = Mapping[str, Any]
_known: dict[str, Mapping[str, Record]] = {}
"""Of some states, by their heads: they are asked for every file."""
_KNOWN = 64


def is_restored(record: Record) -> bool:
    """Whether the purge of a record was taken back."""
    return "restored" in record


def restored_purges(state: State) -> Mapping[str, Record]:
    """Records, by their ids, of the purges that were taken back."""
    if state.head not in _known:
        if len(_known) >= _KNOWN:
            _known.clear()
        found = {purge: record for purge, record in state.with_prefix(PREFIX).items() if is_restored(record)}
        _known[state.head] = found
    return _known[state.head]


def standing_purges(state: State) -> dict[str, Record]:
    """Records, by their ids, of the purges that were not taken back, the erased ones too."""
    return {purge: record for purge, record in state.with_prefix(PREFIX).items() if not is_restored(record)}


def check_not_restored(state: State, purges: Iterable[str]) -> None:
    """``ConflictError`` if any of some purges of the store was undone."""
    for purge in purges:
        if is_restored(state.records[PREFIX + purge]):
            raise ConflictError(f"the purge {purge!r} was undone by another process", "Run the same command again.")


def stands_for_restored(state: State) -> str:
    """Another text after each purge that is taken back; "" without any."""
    purges = " ".join(restored_purges(state))
    return hashlib.blake2b(purges.encode(), digest_size=8).hexdigest() if purges else ""


def missed_parts(state: State, commit: int | None) -> set[int]:
    """Parts that have chunks which were purged at a commit (None: nobody knows which), and were taken back since."""
    missed: set[int] = set()
    for record in restored_purges(state).values():
        if commit is None or record["commit"] <= commit < record["restored"]:
            missed.update(_parts(record))
    return missed


def _parts(record: Record) -> set[int]:
    return {part for first, last in record["parts"] for part in range(first, last + 1)}


def restored_chunks(store: Store, purge: str) -> npt.NDArray[np.int64]:
    """The chunks that a purge had, before it was taken back; ascending."""
    entry = store.state.file(KEPT, purge)
    return np.zeros(0, np.int64) if entry is None else parts.read_parquet(store, entry)["chunk"].to_numpy()


def tombstones_naming(store: Store, victims: Tombstones) -> list[str]:
    """Paths of the tombstones of purges that name any victim; ``ConflictError`` if a victim is no tombstone."""
    purges, slots = standing_purges(store.state), store.state.group("tombstones")
    if not read_tombstones(store).contains(victims.ids).all():
        raise ConflictError("chunks that were to be erased were taken back meanwhile", "Run the same command again.")
    near = [slot for slot in slots if slot.partition(".")[0] in purges and may_name(store, [slot], victims)]
    entries = {slot: slots.get(slot) for slot in near}
    naming = [slot for slot in entries if read_tombstones(store, slot).contains(victims.ids).any()]
    return [entry.path for slot in naming if (entry := entries[slot]) is not None]
