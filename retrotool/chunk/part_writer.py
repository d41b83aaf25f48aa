"""Write the parts of a unit, in a thread, while the next batch is tokenised.

A part's chunks file is written a few row groups at a time. The documents' columns are held as Arrow arrays
(about 150 bytes per document, plus ``--keep``) until the part is closed, at ``COLUMN_BYTES`` at the latest.
Plain documents and key-value records never share a part: their chunks files have different columns.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.chunk.chunker import Tokens, cut_chunks
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store

_FLUSH_ROWS = 8 * parts.ROW_GROUP
_QUEUE = 2
COLUMN_BYTES = 128 << 20  # of documents' columns, at which a part is closed early
Files = tuple[tuple[FileEntry, ...], ...]  # (documents, chunks) of each part


class _ChunksFile:
    """A chunks file written by a thread, which starts with the first row groups."""

    def __init__(self, store: Store, run: str, threads: ThreadPoolExecutor) -> None:
        self._store, self._run, self._threads = store, run, threads
        self._tables: queue.Queue[pa.Table | CancelledError | None] = queue.Queue(_QUEUE)
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._flushed = 0
        self._written: Future[FileEntry] | None = None
        self.rows = 0

    def add(self, *columns: npt.NDArray[Any]) -> None:
        """Add chunks: doc, index, n_tokens, tokens and, for key-value records, key."""
        self._waiting.append(columns)
        self.rows += len(columns[0])
        if self.rows - self._flushed >= _FLUSH_ROWS:
            self._flush((self.rows - self._flushed) // parts.ROW_GROUP * parts.ROW_GROUP)

    def _flush(self, rows: int) -> None:
        columns = [np.concatenate(column) for column in zip(*self._waiting, strict=True)]
        # Copied: a view would keep the whole array.
        self._waiting = [tuple(column[rows:].copy() for column in columns)]
        self._put(parts.chunks_table(*(column[:rows] for column in columns), first=self._flushed))
        self._flushed += rows

    def _put(self, item: pa.Table | CancelledError | None) -> None:
        if self._written is None:
            assert isinstance(item, pa.Table)
            self._written = self._threads.submit(self._write, item.schema)
        while True:
            try:
                self._tables.put(item, timeout=0.2)
                return
            except queue.Full:
                if self._written.done():
                    self._written.result()  # raises the thread's error, such as a full disk

    def _write(self, schema: pa.Schema) -> FileEntry:
        name = FileName.new(self._run, "chunks", "", "parquet")  # parts are numbered at the commit
        return parts.write_batches(self._store, name, schema, self._given(), row_group=parts.ROW_GROUP)

    def _given(self) -> Iterator[pa.Table]:
        while (item := self._tables.get()) is not None:
            if isinstance(item, CancelledError):
                raise item
            yield item

    def close(self) -> Future[FileEntry]:
        """End the file; the future gives its entry once it is on disk."""
        if self.rows > self._flushed:
            self._flush(self.rows - self._flushed)
        self._put(None)
        assert self._written is not None
        return self._written

    def abandon(self) -> None:
        if self._written is None:
            # A Ctrl-C inside ``submit`` can leave a waiting thread but no future.
            self._tables.put(CancelledError())
            return
        while not self._written.done():
            try:
                self._tables.put(CancelledError(), timeout=0.05)
            except queue.Full:
                continue
            self._written.exception()


class PartWriter:
    """Writes the documents of a unit; closes a part at the first document end after ``part_size`` chunks."""

    def __init__(self, store: Store, run: str, keep: Sequence[str], part_size: int) -> None:
        self._store, self._run, self._part_size = store, run, part_size
        self._schema = parts.documents_schema(keep)
        self._dtype = parts.token_dtype(store.identity.tokenizer.token_bytes)
        # One thread, so at most one chunks file is open.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="retrotool-write")
        self._closed: list[tuple[FileEntry, Future[FileEntry]]] = []
        self._columns: list[pa.RecordBatch] = []
        self._column_bytes = 0
        self._documents = 0
        self._pieces = 1
        self._chunks = _ChunksFile(self._store, self._run, self._threads)
        self.counts = {"documents": 0, "chunks": 0, "tokens": 0}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._chunks.abandon()
        self._threads.shutdown()

    def add(self, name: str, batch: Tokens, hashes: Sequence[tuple[bytes, bytes]]) -> None:
        """Add documents of the input ``name`` with the key and the text hash of each."""
        if batch.pieces != self._pieces and self._chunks.rows:
            self._close_part()
        self._pieces = batch.pieces
        cut = cut_chunks(batch.ids, batch.lengths, self._store.identity.chunk_length, self._dtype, batch.pieces)
        ends = np.cumsum(cut.n_chunks)
        n_tokens = batch.lengths.reshape(-1, batch.pieces).sum(axis=1)
        start = 0
        while start < len(batch.documents):
            before = int(ends[start - 1]) if start else 0
            room = before + self._part_size - self._chunks.rows
            stop = min(int(np.searchsorted(ends, room)) + 1, len(batch.documents))
            rows = slice(before, int(ends[stop - 1]))
            some = slice(start, stop)
            first_row = self._chunks.rows + ends[some] - cut.n_chunks[some] - before
            documents = batch.documents[some]
            values = [
                [document.id for document in documents],
                [key for key, _ in hashes[some]],
                [text for _, text in hashes[some]],
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
            columns = [doc, cut.index[rows], cut.n_tokens[rows], cut.tokens[rows]]
            self._chunks.add(*columns, *([] if cut.key is None else [cut.key[rows]]))
            self._documents += stop - start
            self.counts["documents"] += stop - start
            self.counts["chunks"] += rows.stop - rows.start
            self.counts["tokens"] += int(n_tokens[some].sum())
            if self._chunks.rows >= self._part_size or self._column_bytes >= COLUMN_BYTES:
                self._close_part()
            start = stop

    def _close_part(self) -> None:
        chunks = self._chunks.close()
        documents = pa.Table.from_batches(self._columns, self._schema).combine_chunks()
        self._columns, self._documents, self._column_bytes = [], 0, 0
        name = FileName.new(self._run, "documents", "", "parquet")
        self._closed.append((parts.write_parquet(self._store, name, documents), chunks))
        self._chunks = _ChunksFile(self._store, self._run, self._threads)

    def close(self) -> Files:
        """Close the last part; return the entries of all parts."""
        if self._chunks.rows:
            self._close_part()
        return tuple((documents, chunks.result()) for documents, chunks in self._closed)
