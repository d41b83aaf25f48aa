"""Write the parts of a unit, while a thread cuts the next batches into chunks.

A part's chunks file is written a few row groups at a time. The documents' columns are held as Arrow arrays
(about 150 bytes per document, plus ``--keep``) until the part ends, at ``COLUMN_BYTES`` at the latest.
Plain documents and key-value records never share a part: their chunks files have different columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.chunk.chunker import Tokens, cut_chunks
from retrotool.read_ahead import ahead
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store

_FLUSH_ROWS = 8 * parts.ROW_GROUP
_AHEAD = 2  # tables that wait while one is written
COLUMN_BYTES = 128 << 20  # of documents' columns, at which a part ends early
Files = tuple[tuple[FileEntry, ...], ...]  # (documents, chunks) of each part
Batch = tuple[str, Tokens]  # with the input's name


class PartWriter:
    """Writes the documents of a unit; ends a part at the first document end after ``part_size`` chunks."""

    def __init__(self, store: Store, run: str, keep: Sequence[str], part_size: int) -> None:
        self._store, self._run, self._part_size = store, run, part_size
        self._schema = parts.documents_schema(keep)
        self._dtype = parts.token_dtype(store.identity.tokenizer.token_bytes)
        self._begin_part()
        self.counts = {"documents": 0, "chunks": 0, "tokens": 0}

    def _begin_part(self) -> None:
        self._columns: list[pa.RecordBatch] = []
        self._documents = self._column_bytes = 0
        self._chunks: list[tuple[npt.NDArray[Any], ...]] = []  # doc, index, n_tokens, tokens, and key of records
        self._rows = self._flushed = 0

    def write(self, batches: Generator[Batch]) -> Files:
        """Write all batches; return the entries of all parts."""
        written: list[tuple[FileEntry, ...]] = []
        with contextlib.closing(ahead(self._tables(batches), _AHEAD)) as tables:
            for first in tables:
                documents: list[pa.Table] = []
                name = FileName.new(self._run, "chunks", "", "parquet")  # parts are numbered at the commit
                of_part = self._of_part(first, tables, documents)
                chunks = parts.write_batches(self._store, name, first.schema, of_part, row_group=parts.ROW_GROUP)
                name = FileName.new(self._run, "documents", "", "parquet")
                written.append((parts.write_parquet(self._store, name, *documents), chunks))
        return tuple(written)

    def _of_part(self, first: pa.Table, tables: Iterator[pa.Table], documents: list[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables of chunks of a part; add that of its documents, which ends it, to the list."""
        yield first
        for table in tables:
            if "first_row" in table.schema.names:
                documents.append(table)
                return
            yield table

    def _tables(self, batches: Generator[Batch]) -> Generator[pa.Table]:
        """Yield the tables of chunks of each part, and after them the table of its documents."""
        pieces = 1
        with contextlib.closing(batches):
            for name, batch in batches:
                if batch.pieces != pieces and self._rows:
                    yield from self._end_part()
                pieces = batch.pieces
                yield from self._add(name, batch)
        if self._rows:
            yield from self._end_part()

    def _add(self, name: str, batch: Tokens) -> Iterator[pa.Table]:
        cut = cut_chunks(batch.ids, batch.lengths, self._store.identity.chunk_length, self._dtype, batch.pieces)
        ends = np.cumsum(cut.n_chunks)
        n_tokens = batch.lengths.reshape(-1, batch.pieces).sum(axis=1)
        start = 0
        while start < len(batch.documents):
            before = int(ends[start - 1]) if start else 0
            room = before + self._part_size - self._rows
            stop = min(int(np.searchsorted(ends, room)) + 1, len(batch.documents))
            rows = slice(before, int(ends[stop - 1]))
            some = slice(start, stop)
            first_row = self._rows + ends[some] - cut.n_chunks[some] - before
            documents = batch.documents[some]
            values = [
                [document.id for document in documents],
                [key for key, _ in batch.hashes[some]],
                [text for _, text in batch.hashes[some]],
                [document.source for document in documents],
                first_row,
                cut.n_chunks[some],
                n_tokens[some],
                [name] * len(documents),
                [document.position for document in documents],
                *zip(*(document.kept for document in documents), strict=True),
            ]
            arrays = [pa.array(value, field.type) for value, field in zip(values, self._schema, strict=True)]
            self._columns.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._column_bytes += self._columns[-1].nbytes
            doc = cut.doc[rows] - start + self._documents
            columns = (doc, cut.index[rows], cut.n_tokens[rows], cut.tokens[rows])
            self._chunks.append(columns if cut.key is None else (*columns, cut.key[rows]))
            self._rows += len(doc)
            self._documents += stop - start
            self.counts["documents"] += stop - start
            self.counts["chunks"] += len(doc)
            self.counts["tokens"] += int(n_tokens[some].sum())
            if self._rows - self._flushed >= _FLUSH_ROWS:
                yield self._flush((self._rows - self._flushed) // parts.ROW_GROUP * parts.ROW_GROUP)
            if self._rows >= self._part_size or self._column_bytes >= COLUMN_BYTES:
                yield from self._end_part()
            start = stop

    def _flush(self, rows: int) -> pa.Table:
        columns = [np.concatenate(column) for column in zip(*self._chunks, strict=True)]
        # Copied: a view would keep the whole array.
        self._chunks = [tuple(column[rows:].copy() for column in columns)]
        self._flushed += rows
        return parts.chunks_table(*(column[:rows] for column in columns), first=self._flushed - rows)

    def _end_part(self) -> Iterator[pa.Table]:
        if self._rows > self._flushed:
            yield self._flush(self._rows - self._flushed)
        yield pa.Table.from_batches(self._columns, self._schema).combine_chunks()
        self._begin_part()
