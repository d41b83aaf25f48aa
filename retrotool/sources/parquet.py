"""Parquet input: the columns that are asked for, a few MiB of rows at a time.

Row groups are read one by one, pages as they come, so that memory does not grow with the row group: a batch has as
many rows as make a few MiB by the group's own sizes. Slices are runs of row groups. Page checksums are checked where
there are any. At a damaged page the group is read again row by row up to it, so that every row before comes out.
Of the footer only the numbers of row groups are used: pyarrow's accessor of column chunks ends the process if the
footer is damaged.

Not held down: a page, which Arrow decompresses whole (its own writer makes pages of 1,024 rows at least, so texts of a
megabyte make pages of a gigabyte, and 2 GiB here), and a dictionary's copies (a batch of up to 1,024 of one long text).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.errors import InputError
from retrotool.sources import rows
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, reason_of

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_RETRIED_ROWS = 100_000
"""Rows that are read one by one to come closer to a damaged page; in larger groups a few at a time."""


def read_parquet_file(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Documents of a range of row groups; positions are rows of the file, from 1."""
    with _open(file) as table:
        end = table.num_row_groups if where.end is None else where.end
        counts = [table.metadata.row_group(group).num_rows for group in range(where.start, end)]
        total = sum(counts)
        if lacking := rows.missing(table.schema_arrow, fields):
            _check_counts(table)  # or a damaged one would reject rows without end
            yield from (lacking._replace(line=line) for line in range(1, total + 1))
            return
        line = 1
        sizes = _sizes(table)
        for group, count in zip(range(where.start, end), counts, strict=True):
            begin = line
            for batch in _batches(table, group, fields, sizes[group], begin, total):
                yield from rows.documents_of_batch(batch, fields, file.name, line, where.first + line)
                line += batch.num_rows
            if line != begin + count:
                raise InputError(f"row group {group} has {line - begin:,} rows, not {count:,}", line)


def cut_parquet(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Return runs of row groups of about ``target`` decompressed bytes."""
    del fields
    with _open(file) as table:
        _check_counts(table)
        counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        return runs(_sizes(table), [0, *itertools.accumulate(counts)], target)


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
    for name in fields.wanted:
        way = rows.steps(schema, name)
        if way is not None:
            # A key of a map is no column of its own.
            found.append(name if all(isinstance(step, int) for step in way) else schema.names[int(way[0])])
    return found


def _check_counts(table: pq.ParquetFile) -> None:
    """Raise ``InputError`` if the row groups do not have the rows that the footer tells of the whole file."""
    counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != table.metadata.num_rows:
        told = f"it tells {table.metadata.num_rows:,} rows, its row groups {sum(counts):,}"
        raise InputError(f"the footer is damaged: {told}")


def _sizes(table: pq.ParquetFile) -> list[int]:
    """Return the decompressed bytes of each row group; they only decide how much is read at a time."""
    return [max(0, table.metadata.row_group(i).total_byte_size) for i in range(table.num_row_groups)]


def _batches(
    table: pq.ParquetFile, group: int, fields: Fields, bytes_: int, line: int, total: int
) -> Iterator[pa.RecordBatch]:
    """Batches of a row group of ``bytes_``, of which the first row is the range's row ``line``."""
    selected = _selected(table, fields)
    count = table.metadata.row_group(group).num_rows
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(bytes_, 1)))
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
    after, lost = line - 1 + done, max(0, total - (line - 1 + done))
    reason = reason_of(broken)
    raise InputError(f"broken off after row {after:,}, {lost:,} rows are lost: {reason}", after + 1) from broken
