"""A query store's neighbour tables opened to be handed over to other tools, and its living chunks with all they have.

One view of the query store and of each database is taken when it opens, always through the tombstones.

Cost: neighbours lie anywhere, so looking up those of some chunks touches most row groups of the databases, and reads
each once. So it is done for as many chunks as give ``HELD_BYTES`` of tokens, not for a row group; a database is
read about (chunks · k · 2 · bytes a chunk) / ``HELD_BYTES`` times. Memory: some four times ``HELD_BYTES``, a part of
the database, and a part's documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.stage import check_table, members_of
from retrotool.neighbours.table_reader import Found, NeighbourReader
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones, read_tombstones

Ids = npt.NDArray[np.int64]

HELD_BYTES = 128 << 20
"""Tokens of neighbours that are looked up at once."""
GROUPS = 16
"""Row groups of a block."""


@dataclass(frozen=True, slots=True)
class Handover:
    """The living chunks of ``store`` and, through ``reader``, k neighbours of each; ``tombstones`` are the store's.

    ``tabled`` are the parts that have tables; chunks of others have no neighbours.
    """

    store: Store
    reader: NeighbourReader
    tombstones: Tombstones
    tabled: frozenset[int]
    k: int

    def total(self) -> int:
        """How many living chunks there are; the log and the tombstones know."""
        # Tombstones may be of parts that were taken back, too.
        return sum(
            parts.part_entry(self.store, "chunks", part).rows - len(self.tombstones.rows(part))
            for part in self.store.state.parts()
        )

    def found(self, part: int, row_groups: list[int], rows: int) -> Found:
        """The neighbours, [rows, k], of all rows of some row groups, of purged ones too."""
        if part in self.tabled:
            found = self.reader.read(part, self.k, row_groups)
            if len(found.ids) == rows:
                return found
            raise CorruptError(
                f"the neighbours {self.reader.name!r} of part {part} have {len(found.ids):,} rows, not {rows:,}",
                f"See what else is wrong: retrotool verify {self.store.root}",
            )
        empty = np.full((rows, self.k), NO_NEIGHBOUR, np.int64)
        return Found(empty, np.full(empty.shape, np.inf, np.float32), np.zeros(empty.shape, np.uint8))

    def foreign(self, database: Store, chunk: int) -> CorruptError:
        """The error of a table that names a chunk which its database has not."""
        return CorruptError(
            f"the neighbours {self.reader.name!r} name the chunk {chunk}, which {database.root} has not",
            f"See what is wrong: retrotool verify {self.store.root}, and: retrotool verify {database.root}",
        )


def open_handover(store: Store, name: str, k: int | None = None) -> Handover:
    """Open the table, or mixture of tables, ``name``, with ``k`` neighbours a chunk (default: the table's own).

    ``UsageError`` if it, a database or so many neighbours are not there, if a table is out of date, or if the chunks of
    a database are of another length or another tokenizer: ids of their tokens would mean something else.
    """
    reader = NeighbourReader(store, name)
    k = reader.k if k is None else k
    if not 1 <= k <= reader.saved:
        raise UsageError(
            f"-k {k} is not between 1 and the {reader.saved} neighbours that {name!r} has of a chunk",
            "To have more, compute them with a greater --saved: retrotool neighbours",
        )
    own = store.identity
    for database in reader.databases:
        theirs = database.identity
        if theirs.tokenizer.sha256 != own.tokenizer.sha256 or theirs.chunk_length != own.chunk_length:
            raise UsageError(
                f"{store.root} has chunks of {own.chunk_length} tokens of {own.tokenizer.name}, and {database.root} of "
                f"{theirs.chunk_length} tokens of {theirs.tokenizer.name}: no reader can take them for one text",
                "Chunk one of them again, with the tokenizer and the length of the other.",
            )
    tabled = reader.parts()
    for (table, _), database in zip(members_of(store, name), reader.databases, strict=True):
        for part in tabled:
            check_table(store, parts.part_entry(store, "neighbours", part, table), table, database)
    return Handover(store, reader, read_tombstones(store), frozenset(tabled), k)


@dataclass(slots=True)
class Counts:
    """What was handed over: chunks, their documents and tokens, pairs of a chunk and a neighbour, chunks with none."""

    chunks: int = 0
    documents: int = 0
    tokens: int = 0
    neighbours: int = 0
    alone: int = 0
    _last: tuple[int, int] = (-1, -1)

    def add(self, part: int, doc: npt.NDArray[np.int32], n_tokens: npt.NDArray[np.int32], found: Found) -> None:
        """Count chunks [n] of a part, in order; the document of the first may have been counted."""
        if not len(doc):
            return
        before = self._last[1] if self._last[0] == part else -1
        there = found.ids != NO_NEIGHBOUR
        self.chunks += len(doc)
        self.documents += int((np.diff(doc, prepend=before) != 0).sum())
        self.tokens += int(n_tokens.sum())
        self.neighbours += int(there.sum())
        self.alone += int((~there.any(axis=1)).sum())
        self._last = part, int(doc[-1])


@dataclass(frozen=True, slots=True)
class Block:
    """n living chunks of a part: ``ids`` int64 [n], ids and sources of their documents, places in these int32 [n].

    ``tokens`` [n, chunk_length] is zero-padded, of which ``n_tokens`` [n] count; ``found`` their neighbours, [n, k].
    """

    part: int
    ids: Ids
    doc: npt.NDArray[np.int32]
    documents: pa.ChunkedArray
    sources: pa.ChunkedArray
    index: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]
    n_tokens: npt.NDArray[np.int32]
    found: Found

    def __len__(self) -> int:
        """Chunks of the block."""
        return len(self.ids)


def read_blocks(handover: Handover) -> Iterator[tuple[Block, Pieces]]:
    """All living chunks in the order of their ids, block by block, with [N, F] of their neighbours, [n · k]."""
    own = handover.store.identity
    rows = HELD_BYTES // (2 * handover.k * own.chunk_length * own.tokenizer.token_bytes)
    waiting: list[Block] = []
    for block in _blocks(handover, rows // ROW_GROUP):
        if sum(map(len, waiting)) + len(block) > rows:
            yield from _with_pieces(handover, waiting)
            waiting = []
        waiting.append(block)
    yield from _with_pieces(handover, waiting)


def row_slices(rows: int, most: int | None = None) -> Iterator[tuple[list[int], slice]]:
    """The rows of a part, at most so many row groups at a time (``GROUPS``): the numbers of these, and the rows."""
    groups = -(-rows // ROW_GROUP)
    step = GROUPS if most is None else max(1, min(most, GROUPS))
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield list(range(start, stop)), slice(start * ROW_GROUP, min(stop * ROW_GROUP, rows))


def _blocks(handover: Handover, most: int) -> Iterator[Block]:
    store = handover.store
    for part in store.state.parts():
        documents = parts.read_documents(store, part, ["id", "source"])
        for groups, some in row_slices(parts.part_entry(store, "chunks", part).rows, most):
            chunks = parts.read_chunks(store, part, groups)
            ids = parts.chunk_ids(part, np.arange(some.start, some.stop))
            rows = np.flatnonzero((chunks.n_tokens > 0) & ~handover.tombstones.contains(ids))
            if len(rows):
                found = handover.found(part, groups, len(chunks)).take(rows)
                doc = chunks.doc[rows]
                named = documents.take(pa.array(doc))
                yield Block(
                    part, ids[rows], doc, named["id"], named["source"], chunks.index[rows], chunks.tokens[rows],
                    chunks.n_tokens[rows], found,
                )  # fmt: skip


def _with_pieces(handover: Handover, blocks: list[Block]) -> Iterator[tuple[Block, Pieces]]:
    """Blocks with what their neighbours are, looked up for all at once."""
    if not blocks:
        return
    every = [block.found for block in blocks]
    found = Found(
        np.concatenate([one.ids for one in every]),
        np.concatenate([one.distances for one in every]),
        np.concatenate([one.databases for one in every]),
    )
    pieces = handover.reader.pieces(found)
    wrong = (found.ids != NO_NEIGHBOUR) & (pieces.n_tokens[:, 0] == 0).reshape(found.ids.shape)
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        database = handover.reader.databases[found.databases[row, place]]
        raise handover.foreign(database, int(found.ids[row, place]))
    start = 0
    for block in blocks:
        some = slice(start, start + len(block) * handover.k)
        yield block, Pieces(pieces.tokens[some], pieces.n_tokens[some])
        start = some.stop
