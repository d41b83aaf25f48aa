"""Arrow input: IPC files (``.arrow``, ``.feather`` version 2) and IPC streams, told apart by their content.

A batch is read at a time: of a file only the columns that are asked for, of a stream all, as they come. Slices are runs
of record batches. Arrow trusts the offsets in a file; here they are checked before a value is taken, so that a damaged
file is set aside and can't crash the process. For the same reason files are not memory-mapped: one that becomes
shorter meanwhile would end the process, and reading costs no more. What a cut-off file has before the break is read as
a stream.

Memory: a batch, which may be as large as its writer made it; a few MiB of it as Python's values.

Source of the layout: the Arrow columnar format, "IPC Streaming Format" and "IPC File Format".
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.ipc

from retrotool.errors import InputError
from retrotool.sources import columns, rows
from retrotool.sources.arrow_messages import MARK, Message, messages
from retrotool.sources.files import InputFile, Slice
from retrotool.sources.parquet import runs
from retrotool.sources.records import Document, Fields, SetAside, told

_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_START = 8
_END = b"\0\0\0\0"
"""The length that ends a stream."""


def read_arrow(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """Documents of a range of record batches; positions are rows of the file, from 1."""
    line = 1
    with pa.OSFile(file.path) as source:
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
                reason = told(error)
                raise InputError(f"broken off after row {after:,}: {reason}", line) from error
            if batch is None:
                return
            if lacking := rows.missing(batch.schema, fields):
                yield from (lacking._replace(line=line + i) for i in range(batch.num_rows))
            else:
                yield from rows.rows_of(batch, fields, file.name, line, where.first + line)
            line += batch.num_rows


def cut_arrow(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Runs of record batches of about ``target`` bytes of the file."""
    del fields
    with pa.OSFile(file.path) as source:
        found = _batch_messages(source)
    counts = [message.rows or 0 for message in found]
    return runs([message.end - message.offset for message in found], [0, *itertools.accumulate(counts)], target)


def _batch_messages(source: pa.NativeFile) -> list[Message]:
    """The messages that are record batches, in order; raises if the file is not whole."""
    in_file = source.read(len(_FILE)) == _FILE
    count = pa.ipc.open_file(source).num_record_batches if in_file else None
    found: list[Message] = []
    for message in messages(source, _STREAM_START if in_file else 0):
        if len(found) == count:
            break  # what follows is for the footer to tell
        if isinstance(message, int):
            if in_file or message != source.size():
                raise ValueError("the stream does not end where the file does")
        elif message.rows is not None:
            found.append(message)
    return found


def _batches(source: pa.NativeFile, fields: Fields, where: Slice) -> Iterator[pa.RecordBatch]:
    """The batches of a range, with the columns that ``fields`` need."""
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
            yield from _stream(source, fields, where, f"no footer: {told(error)}")
            return
        table = pa.ipc.open_file(source, options=_options(table.schema, fields))
        for i in range(where.start, table.num_record_batches if where.end is None else where.end):
            yield table.get_batch(i)
    else:
        source.seek(0)
        yield from _stream(source, fields, where)


def _stream(source: pa.NativeFile, fields: Fields, where: Slice, broken: str = "") -> Iterator[pa.RecordBatch]:
    start = source.tell()
    schema = pa.ipc.open_stream(source).schema
    source.seek(start)
    with pa.ipc.open_stream(source, options=_options(schema, fields)) as stream:
        for i in itertools.count(_skip(source, where.start)):
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


def _skip(source: pa.NativeFile, count: int) -> int:
    """Pass over ``count`` batches, unread, from behind the schema on; returns how many were passed.

    That is none if there are dictionaries among them, which later batches refer to.
    """
    begin = source.tell()
    passed = 0
    try:
        for message in messages(source, begin) if count else ():
            if isinstance(message, int) or message.is_dictionary:
                break
            passed += message.rows is not None
            if passed == count:
                source.seek(message.end)
                return passed
    except (ValueError, struct.error):
        pass  # the reader will come to it
    source.seek(begin)
    return 0


def _is_ended(source: pa.NativeFile, start: int) -> bool:
    """Whether a stream that began at ``start`` and was read up to here ended with its mark, not with the file."""
    end = source.tell()
    source.seek(start)
    # In old streams zeros that pad the last batch look the same; there a missing mark is not always found.
    mark = MARK + _END if source.read(len(MARK)) == MARK else _END
    source.seek(max(start, end - len(mark)))
    return bool(source.read(len(mark)) == mark)


def _options(schema: pa.Schema, fields: Fields) -> pa.ipc.IpcReadOptions:
    ways = [columns.steps(schema, name) for name in rows.wanted(fields)]
    needed = sorted({int(way[0]) for way in ways if way})
    # An empty choice would mean all columns; names stay whole for what is said of a missing one.
    if rows.missing(schema, fields):
        needed = []
    return pa.ipc.IpcReadOptions(included_fields=needed)
