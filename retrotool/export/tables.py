"""The live chunks of a query store with their neighbours, and the tokens of both, as Parquet.

One view of the query store and of each database is taken when it opens, always through the tombstones.

Cost: neighbours are anywhere, so looking up those of some chunks touches most row groups of the databases, and reads
each once. So it is done for as many chunks as give ``HELD_BYTES`` of tokens, not for a row group; a database is
read about (chunks · k · 2 · bytes a chunk) / ``HELD_BYTES`` times. Memory: some four times ``HELD_BYTES``, a part of
the database, a part's documents, and a table of 8,192 chunks. On disk about a kilobyte a chunk at k = 2, before
compression.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.engine.task import Report
from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.stage import check_table, members_of
from retrotool.neighbours.table_reader import Found, NeighbourReader, check_same_tokens
from retrotool.store import disk, parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.tokenizers import Tokenizer, stored_tokenizer

Ids = npt.NDArray[np.int64]

HELD_BYTES = 128 << 20
"""Tokens of neighbours that are looked up at once."""
GROUPS = 16
"""Row groups of a block."""


@dataclass(frozen=True, slots=True)
class ExportedTables:
    """The live chunks of ``store`` and, through ``reader``, k neighbours of each; ``tombstones`` are the store's.

    ``tabled`` are the parts that have tables; chunks of others have no neighbours.
    """

    store: Store
    reader: NeighbourReader
    tokenizer: Tokenizer
    tombstones: Tombstones
    tabled: frozenset[int]
    k: int

    def total(self) -> int:
        """Return how many live chunks there are, from the log and the tombstones."""
        return sum(
            parts.part_entry(self.store, "chunks", part).rows - len(self.tombstones.rows(part))
            for part in self.store.state.parts()
        )

    def found(self, part: int, row_groups: list[int], rows: int) -> Found:
        """Return the neighbours, [rows, k], of all rows of some row groups, of purged ones too."""
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
        """Return the error of a table that names a chunk which its database does not have."""
        return CorruptError(
            f"the neighbours {self.reader.name!r} name the chunk {chunk}, which {database.root} does not have",
            f"See what is wrong: retrotool verify {self.store.root}, and: retrotool verify {database.root}",
        )


def open_tables(store: Store, name: str, k: int | None = None) -> ExportedTables:
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
    check_same_tokens(store, reader.databases)
    tabled = reader.parts()
    for (table, _), database in zip(members_of(store, name), reader.databases, strict=True):
        for part in tabled:
            check_table(store, parts.part_entry(store, "neighbours", part, table), table, database)
    tokenizer = stored_tokenizer(store)
    return ExportedTables(store, reader, tokenizer, read_tombstones(store), frozenset(tabled), k)


@dataclass(slots=True)
class Counts:
    """What was exported: chunks, their documents and tokens, pairs of a chunk and a neighbour, chunks with none."""

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
    """n live chunks of a part: ``ids`` int64 [n], ids and sources of their documents, places in these int32 [n].

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


def read_blocks(opened: ExportedTables) -> Iterator[tuple[Block, Pieces]]:
    """Yield all live chunks in the order of their ids, block by block, with [N, F] of their neighbours, [n · k]."""
    own = opened.store.identity
    rows = HELD_BYTES // (2 * opened.k * own.chunk_length * own.tokenizer.token_bytes)
    waiting: list[Block] = []
    for block in _blocks(opened, rows // ROW_GROUP):
        if sum(map(len, waiting)) + len(block) > rows:
            yield from _with_pieces(opened, waiting)
            waiting = []
        waiting.append(block)
    yield from _with_pieces(opened, waiting)


def _row_slices(rows: int, most: int) -> Iterator[tuple[list[int], slice]]:
    """Yield the rows of a part, at most so many row groups at a time: the numbers of these, and the rows."""
    groups = -(-rows // ROW_GROUP)
    step = max(1, min(most, GROUPS))
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield list(range(start, stop)), slice(start * ROW_GROUP, min(stop * ROW_GROUP, rows))


def _blocks(opened: ExportedTables, most: int) -> Iterator[Block]:
    store = opened.store
    for part in store.state.parts():
        documents = parts.read_documents(store, part, ["id", "source"])
        for groups, some in _row_slices(parts.part_entry(store, "chunks", part).rows, most):
            chunks = parts.read_chunks(store, part, groups)
            ids = parts.chunk_ids(part, np.arange(some.start, some.stop))
            rows = np.flatnonzero((chunks.n_tokens > 0) & ~opened.tombstones.contains(ids))
            if len(rows):
                found = opened.found(part, groups, len(chunks)).take(rows)
                doc = chunks.doc[rows]
                named = documents.take(pa.array(doc))
                yield Block(
                    part, ids[rows], doc, named["id"], named["source"], chunks.index[rows], chunks.tokens[rows],
                    chunks.n_tokens[rows], found,
                )  # fmt: skip


def _with_pieces(opened: ExportedTables, blocks: list[Block]) -> Iterator[tuple[Block, Pieces]]:
    """Blocks with what their neighbours are, looked up for all at once."""
    if not blocks:
        return
    every = [block.found for block in blocks]
    found = Found(
        np.concatenate([one.ids for one in every]),
        np.concatenate([one.distances for one in every]),
        np.concatenate([one.databases for one in every]),
    )
    pieces = opened.reader.pieces(found)
    wrong = (found.ids != NO_NEIGHBOUR) & (pieces.n_tokens[:, 0] == 0).reshape(found.ids.shape)
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        database = opened.reader.databases[found.databases[row, place]]
        raise opened.foreign(database, int(found.ids[row, place]))
    start = 0
    for block in blocks:
        some = slice(start, start + len(block) * opened.k)
        yield block, Pieces(pieces.tokens[some], pieces.n_tokens[some])
        start = some.stop


def _schema(k: int, chunk_length: int, token: pa.DataType) -> pa.Schema:
    """Return the columns of a chunk with k neighbours; ``token`` is the type of token ids."""
    tokens = pa.list_(pa.list_(token, chunk_length), k)
    lengths = pa.list_(pa.int32(), k)
    return pa.schema([
        ("chunk", pa.int64()), ("document", pa.string()), ("source", pa.string()), ("index", pa.int32()),
        ("text", pa.string()), ("tokens", pa.list_(token)),
        ("neighbours", pa.list_(pa.int64(), k)), ("distances", pa.list_(pa.float32(), k)),
        ("databases", pa.list_(pa.int16(), k)),
        ("neighbour_tokens", tokens), ("neighbour_lengths", lengths),
        ("continuation_tokens", tokens), ("continuation_lengths", lengths),
    ])  # fmt: skip


def _tables_of(opened: ExportedTables, block: Block, pieces: Pieces, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield a block as tables of ``schema``, of at most 8,192 chunks each."""
    for start in range(0, len(block), ROW_GROUP):
        yield _table(opened, block, pieces, slice(start, min(start + ROW_GROUP, len(block))), schema)


def _table(opened: ExportedTables, block: Block, pieces: Pieces, some: slice, schema: pa.Schema) -> pa.Table:
    n, k = some.stop - some.start, block.found.ids.shape[1]
    ids = block.found.ids[some]
    rows = slice(some.start * k, some.stop * k)
    tokens = pieces.tokens[rows].reshape(n, k, 2, -1)
    lengths = pieces.n_tokens[rows].reshape(n, k, 2)
    databases = np.where(ids == NO_NEIGHBOUR, -1, block.found.databases[some].astype(np.int16))
    columns = [
        pa.array(block.ids[some]), block.documents[some.start : some.stop], block.sources[some.start : some.stop],
        pa.array(block.index[some]), opened.tokenizer.decode_text(block.tokens[some], block.n_tokens[some]),
        _lists(block.tokens[some], block.n_tokens[some], schema.field("tokens").type),
        *(_fixed(values, schema.field(name).type) for name, values in (
            ("neighbours", ids), ("distances", block.found.distances[some]), ("databases", databases),
            ("neighbour_tokens", tokens[:, :, 0]), ("neighbour_lengths", lengths[:, :, 0]),
            ("continuation_tokens", tokens[:, :, 1]), ("continuation_lengths", lengths[:, :, 1]),
        )),
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


def _fixed(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """[n, k] or [n, k, l] numbers as fixed-size lists."""
    sizes = []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    array = pa.array(np.ascontiguousarray(values, kind.to_pandas_dtype()).reshape(-1))
    for size in reversed(sizes):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _lists(tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """The first ``n_tokens`` [n] of each row of tokens [n, l] as lists."""
    used = np.arange(tokens.shape[1]) < n_tokens[:, None]
    offsets = np.concatenate([[0], np.cumsum(n_tokens, dtype=np.int64)]).astype(np.int32)
    values = pa.array(tokens[used].astype(kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def write_export(opened: ExportedTables, folder: Path, report: Report) -> Counts:
    """Write ``part-<number>.parquet`` for each part that has live chunks: zstd, with page checksums."""
    own = opened.store.identity
    columns = _schema(opened.k, own.chunk_length, pa.uint16() if own.tokenizer.token_bytes == 2 else pa.uint32())
    counts, part, writer = Counts(), -1, cast(Any, None)
    with ExitStack() as files:
        for block, pieces in read_blocks(opened):
            counts.add(block.part, block.doc, block.n_tokens, block.found)
            path = folder / f"part-{block.part:06d}.parquet"
            if block.part != part:
                files.close()
                part, writer = block.part, files.enter_context(_writer(path, columns))
            for table in _tables_of(opened, block, pieces, columns):
                disk.announce("write", path)
                writer.write_table(table)
                report(table.num_rows)
    return counts


def _writer(path: Path, columns: pa.Schema) -> pq.ParquetWriter:
    names = ["document", "source"]
    return pq.ParquetWriter(
        path, columns, compression="zstd", use_dictionary=names, write_page_checksum=True, write_page_index=True
    )
