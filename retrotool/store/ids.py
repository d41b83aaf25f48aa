"""Chunk ids: the number of a part and a row of it in 64 bits, ``part << 32 | row``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

PART_SHIFT = 32
_ROW_MASK = (1 << PART_SHIFT) - 1
Ids = npt.NDArray[np.int64]


def chunk_ids(part: int, rows: npt.NDArray[Any]) -> Ids:
    """Return the chunk ids of rows [n] of a part, int64 [n]."""
    return (np.int64(part) << PART_SHIFT) + rows.astype(np.int64)


def join_id(part: int, row: int) -> int:
    """Return the chunk id of a row of a part."""
    return (part << PART_SHIFT) | row


def split_id(chunk: int) -> tuple[int, int]:
    """Return the part and the row of a chunk id."""
    return chunk >> PART_SHIFT, chunk & _ROW_MASK


def part_of(ids: Ids) -> Ids:
    """Return the part of each chunk id, int64 [n]."""
    return ids >> PART_SHIFT


def row_of(ids: Ids) -> Ids:
    """Return the row of each chunk id in its part, int64 [n]."""
    return ids & _ROW_MASK


def distinct_parts(ids: Ids) -> list[int]:
    """Return the numbers of the parts that chunk ids, in any order, belong to, ascending."""
    return [int(part) for part in np.unique(ids >> PART_SHIFT)]


def rows_by_part(ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Yield each part that chunk ids belong to, ascending, and the rows of its ids in their order."""
    for part in distinct_parts(ids):
        yield part, row_of(ids[part_of(ids) == part])


def places_by_part(ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Yield each part that chunk ids belong to, ascending, and the places of its ids in ``ids``."""
    for part in distinct_parts(ids):
        yield part, np.flatnonzero(part_of(ids) == part)


def slice_of_part(ids: Ids, part: int) -> slice:
    """Return where the ids of a part are in ascending ``ids``, by binary search."""
    low, high = np.searchsorted(ids, [part << PART_SHIFT, (part + 1) << PART_SHIFT])
    return slice(int(low), int(high))
