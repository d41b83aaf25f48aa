"""Arrow input: IPC files (``.arrow``, ``.feather`` version 2) and IPC streams, told apart by their content.

Files are memory-mapped and only the columns that are asked for are taken out, so that uncompressed batches cost
nothing until their rows are read; compressed ones are decompressed a batch and a column at a time. Slices are runs of
record batches. Arrow trusts the offsets in a file; here they are checked before a value is taken, so that a damaged
file is set aside and can't crash the process. What a cut-off file has before the break is read as a stream.

Source of the layout: the Arrow columnar format, "IPC Streaming Format" and "IPC File Format".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.ipc

from retrotool.errors import InputError
from retrotool.sources import columns, rows
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.parquet import runs
from retrotool.sources.records import Document, Fields, SetAside

_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_START = 8
_MARK = b"\xff\xff\xff\xff"
_END = b"\0\0\0\0"
"""A message begins with a mark and its length, and length 0 ends a stream; before version 0.15 there was no mark."""


def read_arrow(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a range of record batches; positions are rows of the file, from 1."""
    line = 1
    with pa.memory_map(file.path) as source:
        batches = _batches(source, fields, where)
        while True:
            try:
                batch = next(batches, None)
                if batch is not None:
                    columns.check(batch)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                after = where.first + line - 1
                reason = str(error).splitlines()[0]
                raise InputError(f"broken off after row {after:,}: {reason}", line) from error
            if batch is None:
                return
            if lacking := rows.missing(batch.schema, fields):
                yield from (SetAside(line + i, lacking) for i in range(batch.num_rows))
            else:
                yield from rows.rows_of(batch, fields, file.name, line, where.first + line)
            line += batch.num_rows


def cut_arrow(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Runs of record batches of about ``target`` bytes of the file, by their rows."""
    del fields
    try:
        with pa.memory_map(file.path) as source:
            counts = [batch.num_rows for batch in _batches(source, None, WHOLE)]
    except (pa.ArrowException, OSError, UnicodeDecodeError, InputError):
        return [WHOLE]  # reading it will say what is wrong
    befores = [0, *itertools.accumulate(counts)]
    return runs([file.size * count // max(befores[-1], 1) for count in counts], befores, target)


def _batches(source: pa.NativeFile, fields: Fields | None, where: Slice) -> Iterator[pa.RecordBatch]:
    """The batches of a range, with the columns that ``fields`` need; None: one column, for counting rows."""
    head = source.read(len(_FILE))
    if head.startswith(_FEATHER_1):
        advice = "write it again with pyarrow.feather.write_feather(..., version=2)"
        raise InputError(f"Feather version 1, which is no longer written and can't be read: {advice}")
    if head == _FILE:
        try:
            table = pa.ipc.open_file(source)
        except pa.ArrowException as error:
            # Cut off before its footer: behind the mark at its beginning it is a stream.
            source.seek(_STREAM_START)
            yield from _stream(source, fields, where, f"no footer: {str(error).splitlines()[0]}")
            return
        table = pa.ipc.open_file(source, options=_options(table.schema, fields))
        for i in range(where.start, table.num_record_batches if where.end is None else where.end):
            yield table.get_batch(i)
    else:
        source.seek(0)
        yield from _stream(source, fields, where)


def _stream(source: pa.NativeFile, fields: Fields | None, where: Slice, broken: str = "") -> Iterator[pa.RecordBatch]:
    start = source.tell()
    schema = pa.ipc.open_stream(source).schema
    source.seek(start)
    with pa.ipc.open_stream(source, options=_options(schema, fields)) as stream:
        for i in itertools.count():
            if i == where.end:
                return
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                break
            if i >= where.start:
                yield batch
    if left := source.size() - source.tell():
        broken = broken or f"{left:,} bytes follow the end of the stream"
    if broken or not _is_ended(source, start):
        raise pa.ArrowInvalid(broken or "the stream has no end mark, so its writer was cut off")


def _is_ended(source: pa.NativeFile, start: int) -> bool:
    """Whether a stream that began at ``start`` and was read up to here ended with its mark, not with the file."""
    end = source.tell()
    source.seek(start)
    # In old streams zeros that pad the last batch look the same; there a missing mark is not always found.
    mark = _MARK + _END if source.read(len(_MARK)) == _MARK else _END
    source.seek(max(start, end - len(mark)))
    return bool(source.read(len(mark)) == mark)


def _options(schema: pa.Schema, fields: Fields | None) -> pa.ipc.IpcReadOptions:
    ways = [[0]] if fields is None else [columns.steps(schema, name) for name in rows.wanted(fields)]
    needed = sorted({int(way[0]) for way in ways if way})
    # An empty choice would mean all columns; names stay whole for what is said of a missing one.
    if fields is not None and rows.missing(schema, fields):
        needed = []
    return pa.ipc.IpcReadOptions(included_fields=needed)
