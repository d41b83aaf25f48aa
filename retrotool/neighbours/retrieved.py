"""Read the tokens of chunks with their continuations, [N, F]: what a model gets of a neighbour.

F is the chunk after N in its document; it is empty at the end of the document, and once it is purged. Each
row group with a requested id is read once, in 3 ms, so ids should be requested many at a time. Memory: the
requested tokens, and 16 row groups of one part, sixteen times as many from a bucket. The tokens for a whole
table are read in blocks of up to 0.5 GiB, which each read every row group of the database that they need: 0.4
s per million chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.store import neighbour_tables, parts
from retrotool.store.log import FileEntry
from retrotool.store.neighbour_tables import NO_NEIGHBOUR, NeighbourTable, NeighbourText
from retrotool.store.parts import PART_SHIFT, ROW_GROUP, Ids
from retrotool.store.storage import each
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

BLOCK_BYTES = 1 << 29
_GROUPS_AT_ONCE = 16
_COPIED = 1 << 16


@dataclass(frozen=True, slots=True)
class Pieces:
    """Zero-padded ``tokens`` [n, 2, chunk_length] of chunks and continuations; ``n_tokens`` int [n, 2]."""

    tokens: npt.NDArray[Any]
    n_tokens: npt.NDArray[Any]

    @classmethod
    def none(cls, store: Store, n: int) -> Pieces:
        """Return the pieces of n chunks, all empty."""
        own = store.identity
        tokens = np.zeros((n, 2, own.chunk_length), parts.token_dtype(own.tokenizer.token_bytes))
        return cls(tokens, np.zeros((n, 2), np.int64))

    def joined(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Join N and F without padding in between: tokens [n, 2 · chunk_length], and their numbers [n]."""
        length = self.tokens.shape[2]
        out = np.concatenate([self.tokens[:, 0], np.zeros_like(self.tokens[:, 0])], 1)
        place = self.n_tokens[:, :1] + np.arange(length)
        np.put_along_axis(out, place, self.tokens[:, 1], 1)
        return out, self.n_tokens.sum(axis=1)


def read_pieces(store: Store, tombstones: Tombstones, ids: Ids, into: Pieces | None = None) -> Pieces:
    """Read the pieces of chunk ids [n], in any order. Unknown ids, purged ids and −1 give empty pieces.

    ``into``: write into these pieces instead; pieces that would be empty stay unchanged.
    """
    found = Pieces.none(store, len(ids)) if into is None else into
    order = np.flatnonzero((ids >= 0) & ~tombstones.contains(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    known = set(store.state.parts())
    # Read 16 row groups at a time. A group is read twice only if it begins with the continuation of a chunk.
    blocks = ids[order] // (_GROUPS_AT_ONCE * ROW_GROUP)

    def fill(some: Ids) -> None:
        part = int(ids[some[0]]) >> PART_SHIFT
        if part in known:
            _fill(found, some, store, tombstones, part, ids[some] - (part << PART_SHIFT))

    list(each(store.storage, fill, np.split(order, np.flatnonzero(np.diff(blocks)) + 1) if len(order) else ()))
    return found


def read_document_ids(store: Store, ids: Ids) -> npt.NDArray[np.object_]:
    """Return the document id of each chunk [n], in any order; None for −1. Each file is read once."""
    order, names = np.argsort(ids, kind="stable"), np.full(len(ids), None, np.object_)
    ascending = ids[order]
    for part in set(store.state.parts()).intersection(parts.distinct_parts(ascending)):
        table, some = parts.read_documents(store, part, ["id", "first_row"]), parts.slice_of_part(ascending, part)
        docs = np.searchsorted(table["first_row"].to_numpy(), parts.row_of(ascending[some]), side="right") - 1
        names[order[some]] = table["id"].take(pa.array(docs)).to_numpy()
    return names


Read = Callable[[Ids, Pieces], object]  # fills pieces, as ``read_pieces`` does


def read_text_of(
    database: Store,
    tombstones: Tombstones,
    table: NeighbourTable,
    k: int,
    old: tuple[Store, FileEntry] | None = None,
    read: Read | None = None,
) -> Iterator[NeighbourText]:
    """Yield, by row group, the first k live neighbours of each row of a table, with their tokens.

    ``old``: a query store and its former table, whose tokens are copied where the neighbours are the same.
    """
    no_rows, own = np.zeros(0, np.int64), database.identity
    read = partial(read_pieces, database, tombstones) if read is None else read
    at_once = max(1, BLOCK_BYTES // (2 * k * own.chunk_length * own.tokenizer.token_bytes * ROW_GROUP))
    groups = range(-(-len(table.ids) // ROW_GROUP))
    for first in groups[::at_once]:
        block = groups[first : first + at_once]
        rows = slice(first * ROW_GROUP, (first + len(block)) * ROW_GROUP)
        near = NeighbourTable(table.ids[rows], table.distances[rows])
        near = neighbour_tables.erase_neighbours(near, no_rows, tombstones.contains)
        ids, into = near.ids[:, :k], Pieces.none(database, len(near.ids) * k)
        n_tokens, tokens = into.n_tokens.reshape(-1, k, 2), into.tokens.reshape(-1, k, 2, own.chunk_length)
        missing = ids
        if old is not None:
            text = neighbour_tables.read_text(*old, list(block)).nearest(k)
            _, short = neighbour_tables.text_naming(text, tombstones.contains)
            same = text.ids == ids
            n_tokens[same], tokens[same] = text.n_tokens[same], text.tokens[same]
            n_tokens[:, :, 1][short], tokens[:, :, 1][short] = 0, 0
            missing = np.where(same, NO_NEIGHBOUR, ids)
        read(missing.ravel(), into)
        text = NeighbourText(ids, near.distances[:, :k], n_tokens.astype(np.int32), tokens)
        for start in range(0, len(ids), ROW_GROUP):
            yield text.rows(slice(start, start + ROW_GROUP))


def _fill(found: Pieces, places: Ids, store: Store, tombstones: Tombstones, part: int, rows: Ids) -> None:
    """Read ascending rows [n] of a part, and the rows after them, into ``places`` [n] of ``found``."""
    total = parts.part_entry(store, "chunks", part).rows
    there = rows < total
    both = np.stack([np.where(there, rows, 0), np.where(there, np.minimum(rows + 1, total - 1), 0)], 1)
    groups = np.unique(both // ROW_GROUP)
    chunks = parts.read_chunks(store, part, groups.tolist())
    place = np.searchsorted(groups, both // ROW_GROUP) * ROW_GROUP + both % ROW_GROUP
    index, counts = chunks.index[place[:, 1]].astype(np.int64), chunks.n_tokens[place].astype(np.int64)
    counts[~there] = 0
    following = both[:, 1]
    same = (following > both[:, 0]) & (chunks.doc[place[:, 0]] == chunks.doc[place[:, 1]]) & (index > 0)
    ids = parts.chunk_ids(part, following)
    # Values of a purged key are not continuations.
    of_key = chunks.key[place[:, 1]] | ~tombstones.contains(ids - index)
    counts[~(same & of_key & ~tombstones.contains(ids)), 1] = 0
    found.n_tokens[places] = counts
    for start in range(0, len(rows), _COPIED):
        some = slice(start, start + _COPIED)
        tokens = chunks.tokens[place[some]]
        tokens[counts[some] == 0] = 0
        found.tokens[places[some]] = tokens
