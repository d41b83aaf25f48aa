"""Arrow input: IPC files (``.arrow``, ``.feather`` version 2) and IPC streams, told apart by their content.

A batch is read at a time, of which only the columns that are asked for. Arrow trusts the offsets in a file, so each
batch is validated in full before a value is taken: a damaged one rejects the rest of the file and can't crash the
process. For the same reason files are not memory-mapped: one that becomes shorter while it is read would end the
process, and reading costs no more. What a cut-off file has before the break is read as a stream.

Slices are runs of a file's record batches, whose rows are counted by reading their narrowest column. A stream, such as
``datasets`` saves, has no list of its batches and is not cut.

Memory: a batch, which may be as large as its writer made it; a few MiB of it as Python's values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.ipc

from retrotool.errors import InputError
from retrotool.sources import rows
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.parquet import runs
from retrotool.sources.records import Document, Fields, Rejected, reason_of

_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_START = 8
_MARK, _END = b"\xff\xff\xff\xff", b"\0\0\0\0"
"""A message begins with a mark and its length, and length 0 ends a stream; before version 0.15 there was no mark."""


def read_arrow_file(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Return documents of a range of record batches; positions are rows of the file, from 1."""
    line = 1
    with pa.OSFile(file.path) as source:
        batches = _batches(source, fields, where)
        while True:
            try:
                batch = next(batches, None)
                lacking = None if batch is None else rows.missing(batch.schema, fields)
                if batch is not None and not lacking:
                    batch.validate(full=True)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                after = where.first + line - 1
                raise InputError(f"broken off after row {after:,}: {reason_of(error)}", line) from error
            if batch is None:
                return
            if lacking:
                yield from (lacking._replace(line=line + i) for i in range(batch.num_rows))
            else:
                yield from rows.documents_of_batch(batch, fields, file.name, line, where.first + line)
            line += batch.num_rows


def cut_arrow(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Return runs of record batches of about ``target`` bytes of the file; a stream is not cut."""
    del fields
    with pa.OSFile(file.path) as source:
        if file.size <= target or source.read(len(_FILE)) != _FILE:
            return [WHOLE]
        table = pa.ipc.open_file(source)
        counts = _counts(source, table.schema, table.num_record_batches)
    total = max(sum(counts), 1)
    return runs([file.size * count // total for count in counts], [0, *itertools.accumulate(counts)], target)


def _counts(source: pa.NativeFile, schema: pa.Schema, batches: int) -> list[int]:
    """Return the number of rows of each batch."""
    widths = [kind.bit_width if pa.types.is_primitive(kind) else 1 << 20 for kind in schema.types]
    narrowest = [widths.index(min(widths))] if widths else []
    table = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=narrowest))
    return [table.get_batch(i).num_rows for i in range(batches)]


def _batches(source: pa.NativeFile, fields: Fields, where: Slice) -> Iterator[pa.RecordBatch]:
    """Return the batches of a range, with the columns that ``fields`` need."""
    head = source.read(len(_FILE))
    if head.startswith(_FEATHER_1):
        advice = "write it again with pyarrow.feather.write_feather(..., version=2)"
        raise InputError(f"Feather version 1, which is no longer written and can't be read: {advice}")
    if head != _FILE:
        source.seek(0)
        yield from _stream(source, fields)
        return
    try:
        table = pa.ipc.open_file(source)
    except pa.ArrowException as error:
        # Cut off before its footer: after the mark at its beginning it is a stream.
        source.seek(_STREAM_START)
        yield from _stream(source, fields)
        raise pa.ArrowInvalid(f"no footer: {reason_of(error)}") from error
    table = pa.ipc.open_file(source, options=_options(table.schema, fields))
    for i in range(where.start, table.num_record_batches if where.end is None else where.end):
        yield table.get_batch(i)


def _stream(source: pa.NativeFile, fields: Fields) -> Iterator[pa.RecordBatch]:
    """Return the batches of a stream; ``ArrowInvalid`` if it does not end where the file does."""
    start = source.tell()
    schema = pa.ipc.open_stream(source).schema
    source.seek(start)
    with pa.ipc.open_stream(source, options=_options(schema, fields)) as stream:
        yield from stream
    if left := source.size() - source.tell():
        raise pa.ArrowInvalid(f"{left:,} bytes follow the end of the stream")
    if not _is_ended(source, start):
        raise pa.ArrowInvalid("the stream has no end mark, so its writer was cut off")


def _is_ended(source: pa.NativeFile, start: int) -> bool:
    """Return whether a stream that began at ``start`` and was read up to here ended with its mark."""
    end = source.tell()
    source.seek(start)
    # In old streams zeros that pad the last batch look the same; there a missing mark is not always found.
    mark = _MARK + _END if source.read(len(_MARK)) == _MARK else _END
    source.seek(max(start, end - len(mark)))
    return bool(source.read(len(mark)) == mark)


def _options(schema: pa.Schema, fields: Fields) -> pa.ipc.IpcReadOptions:
    ways = [rows.steps(schema, name) for name in fields.wanted]
    needed = sorted({int(way[0]) for way in ways if way})
    # An empty choice would mean all columns; names stay whole for what is said of a missing one.
    if rows.missing(schema, fields):
        needed = []
    return pa.ipc.IpcReadOptions(included_fields=needed)
