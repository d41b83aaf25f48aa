"""Parquet input: the columns that are asked for, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrotool.errors import InputError
from retrotool.sources.records import Document, Fields, SetAside, document_of

BATCH_ROWS = 256


def read_parquet(path: Path, name: str, fields: Fields) -> Iterator[Document | SetAside]:
    """Documents of a Parquet file's rows; positions are rows from 1."""
    row = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        present = set(file.schema_arrow.names)
        columns = [column for column in (fields.text, fields.id, "source", *fields.keep) if column in present]
        if fields.text not in present:
            have = ", ".join(sorted(present)[:12])
            for row in range(1, file.metadata.num_rows + 1):
                yield SetAside(row, f"no column {fields.text!r}; there are: {have}")
            return
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                for values in _rows(_times_as_text(batch)):
                    row += 1
                    if isinstance(values, UnicodeDecodeError):
                        yield SetAside(row, f"invalid UTF-8 at byte {values.start:,} of a value")
                    elif isinstance(values, Exception):
                        yield SetAside(row, f"a value can't be read: {str(values).splitlines()[0]}")
                    else:
                        yield document_of(values, fields, name, row, row)
        except (pa.ArrowException, OSError) as error:
            rest = file.metadata.num_rows - row
            if getattr(error, "errno", None) is not None:
                raise
            reason = str(error).splitlines()[0]
            raise InputError(f"broken off after row {row:,}, {rest:,} rows are lost: {reason}", row + 1) from error


def _times_as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times and dates as Arrow writes them: Python's have no nanoseconds."""
    columns = [c.cast(pa.string()) if pa.types.is_temporal(c.type) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """Each row's values, or why Python can't have them: broken UTF-8, which Arrow does not check, or a far-off time."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error
