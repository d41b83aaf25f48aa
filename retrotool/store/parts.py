"""The files of a part: documents and chunks in Parquet. Also reads and writes a store's other Parquet files.

Files have zstd compression and page checksums, which are verified on reading (pyarrow's defaults miss nine in
ten flipped bits). Tokens are fixed-size binary, little-endian uint16 or uint32, which numpy reads without a
copy. Reading a part's tokens takes about 0.1 s per million chunks, writing about 1 s.

A chunk id is ``part << 32 | row``. Chunks that are not keys (the values of key-value records) are marked in a
column that only files with such chunks have: at most 0.1 MB per million chunks. Only ``Chunks.embedded`` and
``read_embedded`` decide which rows have a vector.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrotool.errors import CorruptError
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.storage import Sink
from retrotool.store.store import Store

ROW_GROUP = 8192
_UNIQUE = frozenset(("tokens", "distances", "vector"))  # files with such columns: a dictionary would save nothing
_CHECKED: dict[str, Any] = {"write_page_checksum": True, "write_page_index": True}
HASH_BYTES = 16
PART_SHIFT = 32
_ROW_MASK = (1 << PART_SHIFT) - 1
Ids = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def documents_schema(keep: Sequence[str]) -> pa.Schema:
    """Return the schema of a documents file with the kept columns ``keep``."""
    return pa.schema({
        "id": pa.string(), "key": pa.binary(HASH_BYTES), "text_hash": pa.binary(HASH_BYTES), "source": pa.string(),
        "first_row": pa.int32(), "n_chunks": pa.int32(), "n_tokens": pa.int64(),
        "input": pa.string(), "position": pa.int64(), **dict.fromkeys(keep, pa.string()),
    })  # fmt: skip


RESERVED_COLUMNS = (*documents_schema(()).names, "doc", "part")  # names that a kept column can't have
TOMBSTONES_SCHEMA = pa.schema({"chunk": pa.int64()})
BLOCKED_SCHEMA = pa.schema({"hash": pa.binary(HASH_BYTES)})
SCANS_SCHEMA = pa.schema({
    "chunks": pa.int64(), "selectors": pa.int16(), "labels": pa.int32(), "begin": pa.int64(), "end": pa.int64(),
    "figures": pa.float32(),
})  # fmt: skip
QUARANTINE_SCHEMA = pa.schema({
    "input": pa.string(), "line": pa.int64(), "offset": pa.int64(), "reason": pa.string(), "excerpt": pa.string(),
    "damage": pa.bool_(),
})  # fmt: skip
SEEN_SCHEMA = pa.schema({"file": pa.int32(), "key": pa.binary(HASH_BYTES)})
KEY = pa.field("key", pa.bool_(), nullable=False)


def chunks_schema(chunk_bytes: int, *, key: bool = False) -> pa.Schema:
    """Return the schema of a chunks file with ``chunk_bytes`` bytes of tokens per chunk."""
    names = ("row", "doc", "index", "n_tokens")
    columns = [*((name, pa.int32()) for name in names), ("tokens", pa.binary(chunk_bytes))]
    return pa.schema([*columns, KEY] if key else columns)


_SCHEMAS = {  # the columns that all files of a kind have
    "documents": documents_schema(()), "quarantine": QUARANTINE_SCHEMA, "tombstones": TOMBSTONES_SCHEMA,
    "undone": TOMBSTONES_SCHEMA, "scans": SCANS_SCHEMA, "blocked": BLOCKED_SCHEMA,
    "seen": SEEN_SCHEMA,
}  # fmt: skip


def chunk_ids(part: int, rows: npt.NDArray[Any]) -> Ids:
    """Return the chunk ids of rows [n] of a part, int64 [n]."""
    return (np.int64(part) << PART_SHIFT) + rows.astype(np.int64)


def join_id(part: int, row: int) -> int:
    """Return the chunk id of a row of a part."""
    return (part << PART_SHIFT) | row


def split_id(chunk: int) -> tuple[int, int]:
    """Return the part and the row of a chunk id."""
    return chunk >> PART_SHIFT, chunk & _ROW_MASK


def format_id(chunk: int) -> str:
    """Return a chunk id as ``part:row``, for people; a negative number, which is not an id, unchanged."""
    return "{}:{}".format(*split_id(chunk)) if chunk >= 0 else str(chunk)


def parse_id(text: str) -> int | None:
    """Return the chunk id that ``part:row`` or a plain number stands for, None for any other text."""
    match = re.fullmatch(r"(?:([0-9]{1,10}):)?([0-9]{1,19})", text.strip())
    if match is None:
        return None
    number = int(match[2])
    if match[1] is not None:
        number = join_id(int(match[1]), number) if number <= _ROW_MASK else -1
    return number if 0 <= number < 1 << 63 else None


def part_of(ids: Ids) -> Ids:
    """Return the part of each chunk id, int64 [n]."""
    return ids >> PART_SHIFT


def row_of(ids: Ids) -> Ids:
    """Return the row of each chunk id in its part, int64 [n]."""
    return ids & _ROW_MASK


def distinct_parts(ids: Ids) -> list[int]:
    """Return the numbers of the parts that the chunk ids belong to, ascending."""
    return [int(part) for part in np.unique(ids >> PART_SHIFT)]


def rows_by_part(ids: Ids) -> Iterator[tuple[int, Ids]]:
    """Yield each part that the chunk ids belong to, ascending, with the rows of its ids in their order."""
    if (ids[1:] < ids[:-1]).any():
        ids = ids[np.argsort(part_of(ids), kind="stable")]
    of = part_of(ids)
    for rows in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(of)) + 1) if len(ids) else ():
        yield int(of[rows[0]]), row_of(ids[rows])


def slice_of_part(ids: Ids, part: int) -> slice:
    """Return where the ids of a part are in ascending ``ids``, by binary search."""
    low, high = np.searchsorted(ids, [part << PART_SHIFT, (part + 1) << PART_SHIFT])
    return slice(int(low), int(high))


def token_dtype(token_bytes: int) -> np.dtype[Any]:
    """Return little-endian uint16 or uint32."""
    return np.dtype("<u2" if token_bytes == 2 else "<u4")


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a part: arrays of length n; ``tokens`` is [n, chunk_length], zero-padded."""

    part: int
    doc: npt.NDArray[np.int32]
    index: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]
    key: Bools  # False: a value of a key-value record, which is not searched and only a continuation

    def __len__(self) -> int:
        """Return the number of rows, including erased ones."""
        return len(self.doc)

    @property
    def embedded(self) -> Bools:
        """Which rows have a vector, bool [n]: keys that are not erased. Purged rows keep theirs."""
        return (self.n_tokens > 0) & self.key

    def between(self, start: int, stop: int) -> Chunks:
        """Return some of the rows, without a copy."""
        columns: tuple[npt.NDArray[Any], ...] = (self.doc, self.index, self.n_tokens, self.tokens, self.key)
        return Chunks(self.part, *(values[start:stop] for values in columns))


def write_parquet(store: Store, name: FileName, table: pa.Table, *, about: dict[str, Any] | None = None) -> FileEntry:
    """Write a table in row groups of ``ROW_GROUP`` rows, as ``write_batches`` does."""
    return write_batches(store, name, table.schema, [table], row_group=ROW_GROUP, about=about)


def write_batches(
    store: Store,
    name: FileName,
    schema: pa.Schema,
    batches: Iterable[pa.Table],
    *,
    row_group: int | None = None,
    brief: bool = False,
    about: dict[str, Any] | None = None,
) -> FileEntry:
    """Write tables of one schema to one file, in row groups of their own or of ``row_group`` rows.

    ``brief``: for files that are read once, without compression and statistics.

    Only one table is held at a time. For chunks with a ``key`` column, ``about`` gets the number of keys.
    """
    keys = 0

    def write(sink: Sink) -> int:
        nonlocal keys
        rows = 0
        repeats = _UNIQUE.isdisjoint(schema.names)
        with pq.ParquetWriter(
            sink,
            schema,
            compression="none" if brief else "zstd",
            write_statistics=not brief,
            use_dictionary=repeats,
            **_CHECKED,
        ) as writer:
            for batch in batches:
                writer.write_table(batch, row_group_size=row_group)
                rows += batch.num_rows
                keys += int(pc.sum(batch["key"]).as_py() or 0) if _has_values(schema) else 0
        return rows

    entry = store.write(name, write, about=about)
    return replace(entry, about={**(about or {}), "keys": keys}) if _has_values(schema) else entry


def _has_values(schema: pa.Schema) -> bool:
    return "key" in schema.names and schema.field("key").type == KEY.type


def read_parquet(
    store: Store,
    entry: FileEntry,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    *,
    optional: Sequence[str] = (),
) -> pa.Table:
    """Read a Parquet file of the store's view, and those ``optional`` columns that it has."""
    with _open_parquet(store, entry) as file:
        path = store.where(entry.path)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if not file.metadata.num_rows == sum(rows) == entry.rows:
            raise CorruptError(f"{path}: {sum(rows):,} rows, the log says {entry.rows:,}")
        _check_schema(store, entry, file.schema_arrow, columns)
        groups = list(range(len(rows)) if row_groups is None else row_groups)
        present = [name for name in optional if name in file.schema_arrow.names]
        table = file.read_row_groups(groups, columns=None if columns is None else [*columns, *present])
        if table.num_rows != (due := sum(rows[group] for group in groups)):
            raise CorruptError(f"{path}: {table.num_rows:,} rows read, the log says {due:,}")
        return table


@contextlib.contextmanager
def _open_parquet(store: Store, entry: FileEntry) -> Iterator[pq.ParquetFile]:
    with store.reading(entry) as storage, store.opened(entry) as source:
        try:
            # In a bucket, columns that are near each other are read by one request.
            with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=storage.latent) as file:
                yield file
        except (pa.ArrowException, OSError, ValueError) as error:
            raise store.corrupt(f"{store.where(entry.path)}: {str(error).splitlines()[0]}") from error


def read_schema(store: Store, entry: FileEntry) -> pa.Schema:
    """Read the schema of a Parquet file, with its metadata."""
    return read_parquet(store, entry, row_groups=[]).schema


def read_tables(store: Store, entry: FileEntry, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the row groups of a Parquet file as ``read_parquet`` does, for files larger than memory."""
    with _open_parquet(store, entry) as file:
        groups = file.metadata.num_row_groups
    for group in range(groups):
        yield read_parquet(store, entry, columns, [group])


def _check_schema(store: Store, entry: FileEntry, schema: pa.Schema, columns: Sequence[str] | None) -> None:
    """Check the names and types of columns, which page checksums do not cover."""
    own = store.identity
    expected = _SCHEMAS.get(entry.kind, pa.schema([]))
    if entry.kind == "chunks":
        expected = chunks_schema(own.chunk_length * own.tokenizer.token_bytes)
        # Without the column ``key``, values would become keys.
        key = schema.field("key").type if "key" in schema.names else None
        if key != (due := KEY.type if "keys" in (entry.about or {}) else None):
            raise CorruptError(f"{entry.path}: column 'key' is {key or 'missing'}, the log says {due or 'missing'}")
    # pyarrow silently ignores a requested column that does not exist.
    for name in (*expected.names, *(columns or ())):
        if name not in schema.names:
            raise CorruptError(f"{entry.path}: column {name!r} is missing")
        if name in expected.names and schema.field(name).type != expected.field(name).type:
            found, due = schema.field(name).type, expected.field(name).type
            raise CorruptError(f"{entry.path}: column {name!r} is {found}, not {due}")


def n_keys(entry: FileEntry) -> int:
    """Return how many rows of a chunks file are keys, including erased and purged ones."""
    return int((entry.about or {}).get("keys", entry.rows))


def fixed_binary(values: npt.NDArray[Any]) -> pa.Array:
    """Return [n, w] numbers as n fixed-size binaries, without a copy."""
    data = np.ascontiguousarray(values)
    kind = pa.binary(data.shape[1] * data.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(data), [None, pa.py_buffer(data)])


def from_fixed_binary(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Invert ``fixed_binary``; nulls become zeros."""
    if column.null_count:
        column = column.fill_null(b"\0" * column.type.byte_width)
    array = column.combine_chunks()
    size = array.type.byte_width
    width = size // dtype.itemsize
    if not len(array):
        return np.zeros((0, width), dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array) * width, array.offset * size).reshape(-1, width)


def chunks_table(
    doc: Any, index: Any, n_tokens: Any, tokens: npt.NDArray[Any], key: Bools | None = None, *, first: int = 0
) -> pa.Table:
    """Return the table of a chunks file, or of its rows from ``first`` on; None for ``key``: all are keys."""
    binary = fixed_binary(tokens)
    row = np.arange(first, first + len(doc))
    columns = [*(pa.array(c, pa.int32()) for c in (row, doc, index, n_tokens)), binary]
    some = key is not None and not np.all(key)
    columns += [pa.array(key, pa.bool_())] if some else []
    return pa.table(columns, schema=chunks_schema(binary.type.byte_width, key=some))


def named_by_text(documents: pa.Table) -> Bools:
    """Return which documents came without an id, and so have the hash of their text as id: bool [n]."""
    named = np.zeros(documents.num_rows, np.bool_)
    may = np.flatnonzero(pc.equal(pc.binary_length(documents["id"]), 2 * HASH_BYTES).fill_null(False).to_numpy())
    ids, hashes = (documents[name].take(pa.array(may)).to_pylist() for name in ("id", "text_hash"))
    named[may] = [hashed is not None and name == hashed.hex() for name, hashed in zip(ids, hashes, strict=True)]
    return named


def part_entry(store: Store, kind: str, part: int, name: str = "") -> FileEntry:
    """Return the live file of a part; ``CorruptError`` if it has none."""
    entry = store.state.part_file(kind, part, name)
    if entry is None:
        raise store.corrupt(f"part {part} has no {kind} file")
    return entry


def read_chunks(store: Store, part: int, row_groups: Sequence[int] | None = None) -> Chunks:
    """Read a part's chunks, or those of some row groups."""
    entry = part_entry(store, "chunks", part)
    table = read_parquet(store, entry, ["doc", "index", "n_tokens", "tokens"], row_groups, optional=["key"])
    dtype = token_dtype(store.identity.tokenizer.token_bytes)
    doc, index, n_tokens = (table[name].to_numpy() for name in ("doc", "index", "n_tokens"))
    return Chunks(part, doc, index, n_tokens, from_fixed_binary(table["tokens"], dtype), _key(entry, table))


def read_groups_of(store: Store, ids: Ids) -> Iterator[tuple[Ids, Chunks, Ids]]:
    """Yield the places in ``ids``, the chunks, and the rows of each row group that has any of the chunks."""
    firsts = ids - row_of(ids) % ROW_GROUP
    order = np.argsort(firsts, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(firsts[order])) + 1) if len(ids) else ():
        part, row = split_id(int(firsts[places[0]]))
        yield places, read_chunks(store, part, [row // ROW_GROUP]), row_of(ids[places]) % ROW_GROUP


def read_embedded(store: Store, part: int) -> Bools:
    """Return which rows of a part have a vector (``Chunks.embedded``), without reading tokens: bool [n]."""
    entry = part_entry(store, "chunks", part)
    table = read_parquet(store, entry, ["n_tokens"], optional=["key"])
    return np.asarray((table["n_tokens"].to_numpy() > 0) & _key(entry, table))


def read_key(store: Store, part: int) -> Bools:
    """Return which rows of a part are keys, including erased and purged ones: bool [n]."""
    entry = part_entry(store, "chunks", part)
    if n_keys(entry) == entry.rows:
        return np.ones(entry.rows, np.bool_)
    return _key(entry, read_parquet(store, entry, ["key"]))


def _key(entry: FileEntry, table: pa.Table) -> Bools:
    if "key" not in table.schema.names:
        return np.ones(table.num_rows, np.bool_)
    if table["key"].null_count:
        raise CorruptError(f"{entry.path}: column 'key' has nulls")
    return np.asarray(table["key"].to_numpy())


def read_documents(store: Store, part: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part's documents."""
    return read_parquet(store, part_entry(store, "documents", part), columns)
