"""Parquet input: the columns that are asked for, a few MiB of rows at a time.

Row groups are read one by one, pages as they come, so that memory does not grow with the row group: a batch has as
many rows as make a few MiB by the group's own sizes. Slices are runs of row groups. Page checksums are checked where
there are any. At a damaged page the group is read again row by row up to it, so that every row before comes out.

Not held down: a page, which Arrow decompresses whole (its own writer makes pages of 1,024 rows at least, so texts of a
megabyte make pages of a gigabyte, and 2 GiB here), and a dictionary's copies (a batch of up to 1,024 of one long text).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.errors import InputError
from retrotool.sources import columns, rows
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, SetAside

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_RETRIED_ROWS = 100_000
"""Rows that are read one by one to come closer to a damaged page; in larger groups a few at a time."""


def read_parquet(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a range of row groups; positions are rows of the file, from 1."""
    with _open(file) as table:
        end = table.num_row_groups if where.end is None else where.end
        counts = [table.metadata.row_group(group).num_rows for group in range(where.start, end)]
        total = sum(counts)
        if lacking := rows.missing(table.schema_arrow, fields):
            yield from (SetAside(line, lacking) for line in range(1, total + 1))
            return
        line = 1
        for group, count in zip(range(where.start, end), counts, strict=True):
            begin = line
            for batch in _batches(table, group, fields, begin, total):
                yield from rows.rows_of(batch, fields, file.name, line, where.first + line)
                line += batch.num_rows
            if line != begin + count:
                raise InputError(f"row group {group} has {line - begin:,} rows, not {count:,}", line)


def cut_parquet(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Runs of row groups of about ``target`` decompressed bytes of the columns that ``fields`` need."""
    try:
        with _open(file) as table:
            metadata = table.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            sizes = [_bytes(group, _selected(table, fields)) for group in groups]
            befores = [0, *itertools.accumulate(group.num_rows for group in groups)]
    except (pa.ArrowException, OSError):
        return [WHOLE]  # reading it will say what is wrong
    return runs(sizes, befores, target)


def runs(sizes: list[int], befores: list[int], target: int) -> list[Slice]:
    """Slices of consecutive groups that reach ``target`` bytes; ``befores``: the rows before each, and all at last."""
    found, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= target or i == len(sizes) - 1:
            found.append(Slice(start, i + 1, befores[start], befores[i + 1]))
            start, held = i + 1, 0
    return found if len(found) > 1 else [WHOLE]


def _open(file: InputFile) -> pq.ParquetFile:
    return pq.ParquetFile(file.path, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER_BYTES)


def _selected(table: pq.ParquetFile, fields: Fields) -> list[str]:
    """Paths of the columns to read; of a struct only the fields that are asked for."""
    schema = table.schema_arrow
    found = []
    for name in rows.wanted(fields):
        way = columns.steps(schema, name)
        if way is not None:
            # A key of a map is no column of its own.
            found.append(name if all(isinstance(step, int) for step in way) else schema.names[int(way[0])])
    return found


def _bytes(group: pq.RowGroupMetaData, selected: list[str] | None) -> int:
    if selected is None:
        return int(group.total_byte_size)
    chunks = (group.column(i) for i in range(group.num_columns))
    prefixes = tuple(f"{path}." for path in selected)
    return sum(
        int(chunk.total_uncompressed_size) for chunk in chunks if f"{chunk.path_in_schema}.".startswith(prefixes)
    )


def _batches(table: pq.ParquetFile, group: int, fields: Fields, line: int, total: int) -> Iterator[pa.RecordBatch]:
    """Batches of a row group, of which the first row is the range's row ``line``."""
    selected = _selected(table, fields)
    metadata = table.metadata.row_group(group)
    count = metadata.num_rows
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(_bytes(metadata, selected), 1)))
    done = 0
    for step in (size, max(1, min(size, count // _RETRIED_ROWS))):
        seen = 0
        try:
            for batch in table.iter_batches(step, row_groups=[group], columns=selected, use_threads=False):
                seen += batch.num_rows
                if seen > done:
                    yield batch.slice(max(0, batch.num_rows - (seen - done)))
                    done = seen
            return
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            broken = error
    after, lost = line - 1 + done, total - (line - 1 + done)
    reason = str(broken).splitlines()[0]
    raise InputError(f"broken off after row {after:,}, {lost:,} rows are lost: {reason}", after + 1) from broken
