"""Chunks that purges name: which these are, and what is left of them in the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT
from retrotool.store.restored import standing_purges
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, may_name, read_tombstones

Ids = npt.NDArray[np.int64]


def has_any(store: Store, purge: str, chunks: Tombstones) -> bool:
    """Whether a purge has any of ``chunks``; its file is read only if it may."""
    return may_name(store, [purge], chunks) and bool(chunks.contains(read_tombstones(store, purge).ids).any())


def count_rows(store: Store) -> int:
    """All chunks that the parts of a store ever had."""
    state = store.state
    return sum(entry.rows for part in state.parts() if (entry := state.part_file("chunks", part)) is not None)


def count_unerased(store: Store, chunks: Ids) -> int:
    """How many of some chunks still have tokens."""
    count = 0
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        n_tokens = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])["n_tokens"]
        count += int((n_tokens.to_numpy()[chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)] > 0).sum())
    return count


def documents_ended(doc: npt.NDArray[Any], n_tokens: npt.NDArray[Any], before: Ids, rows: Ids) -> int:
    """How many documents of a part have their last living chunk among ``rows``."""
    alive = n_tokens > 0
    alive[before] = False
    left = alive.copy()
    left[rows] = False
    size = int(doc[-1]) + 1 if len(doc) else 0
    had, has = np.bincount(doc[alive], minlength=size), np.bincount(doc[left], minlength=size)
    return int(((had > 0) & (has == 0)).sum())


def erased_purges(store: Store, erased: Tombstones) -> list[str]:
    """Ids of the purges that are not known to be erased and of which nothing is left once ``erased`` chunks are.

    What other purges erased counts.
    """
    records = standing_purges(store.state)
    waiting = {purge: read_tombstones(store, purge).ids for purge, r in records.items() if not r["erased"]}
    left = Tombstones(np.setdiff1d(np.concatenate([np.zeros(0, np.int64), *waiting.values()]), erased.ids))
    before = [
        read_tombstones(store, purge).ids
        for purge, record in records.items()
        if record["erased"] and may_name(store, [purge], left)
    ]
    gone = Tombstones(np.unique(np.concatenate([erased.ids, *before])))
    return [purge for purge, chunks in waiting.items() if gone.contains(chunks).all()]
