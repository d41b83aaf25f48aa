"""Neighbour tables: for every row of a part, the ids and distances of its neighbours, nearest first.

Ids may have been purged since: ``read_table`` gives what is stored, and the reader masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store

NO_NEIGHBOUR = -1


@dataclass(frozen=True, slots=True)
class NeighbourTable:
    """``ids`` int64 [n, saved] (−1: none) and ``distances`` float32 [n, saved] (+inf: none), nearest first."""

    ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]


def made_as(entry: FileEntry) -> str:
    """The path that a table was first written under: an erase rewrites it, and it stays the same table."""
    return str((entry.about or {}).get("made", entry.path))


def write_table(
    root: Path, name: FileName, table: NeighbourTable, *, database: str, commit: int, path: str, about: dict[str, Any]
) -> FileEntry:
    """Write a part's neighbours; they come from commit ``commit`` of the store ``database`` (uuid) at ``path``."""
    saved = table.ids.shape[1]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), saved)
        for values in (table.ids, table.distances)
    ]
    metadata = {"retrotool.database": database, "retrotool.commit": str(commit), "retrotool.path": path}
    arrow = pa.table(columns, names=["ids", "distances"]).replace_schema_metadata(metadata)
    return parts.write_parquet(root, name, arrow, about=about)


def read_table(store: Store, entry: FileEntry, row_groups: list[int] | None = None) -> NeighbourTable:
    """Read a part's neighbours as they are stored."""
    arrow = parts.read_parquet(store, entry, row_groups=row_groups)
    return NeighbourTable(_lists(store, entry, arrow, "ids"), _lists(store, entry, arrow, "distances"))


def read_ids(store: Store, entry: FileEntry, row_groups: list[int] | None = None) -> npt.NDArray[np.int64]:
    """Of a part's neighbours the ids alone, int64 [n, saved], which is two thirds of the reading."""
    found: npt.NDArray[np.int64] = _lists(store, entry, parts.read_parquet(store, entry, ["ids"], row_groups), "ids")
    return found


def erase_neighbours(
    table: NeighbourTable,
    rows: npt.NDArray[np.int64],
    banned: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]] | None,
) -> NeighbourTable:
    """Return neighbours with ``rows`` emptied, and without the entries that are ``banned`` (None: none is)."""
    ids, distances = table.ids.copy(), table.distances.copy()
    ids[rows], distances[rows] = NO_NEIGHBOUR, np.inf
    if banned is not None:
        drop = banned(ids)
        ids[drop], distances[drop] = NO_NEIGHBOUR, np.inf
        hit = np.flatnonzero(drop.any(axis=1))
        order = np.argsort(drop[hit], axis=1, kind="stable")  # those that stay move up, in their order
        ids[hit] = np.take_along_axis(ids[hit], order, 1)
        distances[hit] = np.take_along_axis(distances[hit], order, 1)
    return NeighbourTable(ids, distances)


def _lists(store: Store, entry: FileEntry, arrow: pa.Table, name: str) -> npt.NDArray[Any]:
    try:
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in arrow[name].chunks])
        return flat.reshape(arrow.num_rows, -1)
    except (KeyError, ValueError, AttributeError) as error:
        raise CorruptError(f"{store.root / entry.path} is no neighbour table: {error}") from error
