"""Tombstones: the chunks that are purged. Every reader looks through them.

A purge is one sorted file of chunk ids; the set of a view is their union, 8 bytes a chunk in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store


class Tombstones:
    """A set of chunk ids; ``ids`` is int64, sorted, without repeats."""

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def contains(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of ``ids`` (any shape) are purged."""
        if not len(self.ids):
            return np.zeros(ids.shape, np.bool_)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found: npt.NDArray[np.bool_] = self.ids[place] == ids
        return found

    def rows(self, part: int) -> npt.NDArray[np.int64]:
        """Purged rows of a part, ascending."""
        low, high = np.searchsorted(self.ids, [part << parts.PART_SHIFT, (part + 1) << parts.PART_SHIFT])
        return self.ids[low:high] - (part << parts.PART_SHIFT)

    def parts(self) -> list[int]:
        """Numbers of the parts that have purged chunks."""
        return [int(part) for part in np.unique(self.ids >> parts.PART_SHIFT)]


def write_tombstones(root: Path, name: FileName, ids: npt.NDArray[np.int64]) -> FileEntry:
    """Write a purge's ids, sorted."""
    return parts.write_parquet(
        root, name, pa.table([pa.array(np.sort(ids), pa.int64())], schema=parts.TOMBSTONES_SCHEMA)
    )


def read_tombstones(store: Store, purge: str | None = None) -> Tombstones:
    """Tombstones of the store's view, or of one purge."""
    group = store.state.group("tombstones")
    entries = [entry for slot in (group if purge is None else [purge]) if (entry := group.get(slot)) is not None]
    ids = [parts.read_parquet(store, entry)["chunk"].to_numpy() for entry in entries]
    return Tombstones(np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64))
