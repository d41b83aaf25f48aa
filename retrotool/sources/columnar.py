"""Parquet and Arrow input: only the columns needed, a few MiB of rows at a time.

* A batch is processed in windows of rows. A value that Python can't represent (broken
  UTF-8, a distant time) rejects only its row.
* At a damaged Parquet page the row group is read again in small steps, so that every row before it comes out.
  Column chunks in the footer are not used: pyarrow's accessor crashes the process if the footer is damaged.
* Arrow files and streams are recognised by content. Arrow trusts offsets, so each batch is validated in full.
  Files are not memory-mapped: truncating one would crash the process. A file without its footer is a stream.
* Slices are runs of row groups or record batches; streams are not sliced.

Cost: about 2 µs per row besides copying its text, more for key-value records, token ids and kept fields.
Memory: one Arrow batch or Parquet page.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from retrotool.errors import InputError
from retrotool.sources import records
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, column_names, maker, reason_of, too_many_tokens

WINDOW_ROWS = 4096
BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
_FIRST_ROWS = 16
_BUFFER_BYTES = 1 << 20
_RANGE_BYTES = 4 << 20  # of a column, by one request
_RETRIED_ROWS = 100_000  # most steps to read a row group again up to a damaged page
_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_START = 8
_MARK, _END = b"\xff\xff\xff\xff", b"\0\0\0\0"  # before a message's length since version 0.15; length 0, the end
_TEXT = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary,
)  # fmt: skip
_LISTS = (pa.ListType, pa.LargeListType, pa.ListViewType, pa.LargeListViewType, pa.FixedSizeListType)


def _steps(schema: pa.Schema, name: str) -> list[int | str] | None:
    """Return the path to a field: its column, then struct fields by number or map keys; None if missing."""
    names = schema.names
    if name in names:
        return [names.index(name)]
    first, *rest = name.split(".")
    if not rest or first not in names:
        return None
    way: list[int | str] = [names.index(first)]
    kind = schema.types[names.index(first)]
    for step in rest:
        if pa.types.is_struct(kind) and (inner := [kind.field(i).name for i in range(kind.num_fields)]).count(step):
            way.append(inner.index(step))
            kind = kind.field(inner.index(step)).type
        elif pa.types.is_map(kind) and _is_text(kind.key_type):
            way.append(step)
            kind = kind.item_type
        else:
            return None
    return way


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """Return the array of a field, null where a parent is null; None if missing."""
    way = _steps(batch.schema, name)
    if way is None:
        return None
    array = batch.column(way[0])
    for step in way[1:]:
        if isinstance(step, int):
            array = pc.struct_field(array, [step])
        else:
            array = pc.map_lookup(array, pa.scalar(step, array.type.key_type), "first")
    return array


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _TEXT)


def _plain(array: pa.Array) -> pa.Array:
    """Remove extension types and run-length encoding; make text large_binary, without copying."""
    if isinstance(array, pa.ExtensionArray):
        return _plain(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return _plain(pc.run_end_decode(array))
    if pa.types.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(array.indices, _plain(array.dictionary), safe=False)
    if _is_text(array.type):
        return array.cast(pa.large_binary())
    return array


def _lengths(array: pa.Array) -> npt.NDArray[np.int64]:
    """Return the bytes of each value of a plain text or list column; 0 for other types, which are small."""
    if pa.types.is_dictionary(array.type):
        inner: npt.NDArray[np.int64] = np.append(_lengths(array.dictionary), 0)  # the last for nulls
        places = array.indices.cast(pa.int64()).fill_null(len(inner) - 1).to_numpy(zero_copy_only=False)
        return np.asarray(inner[places])
    if _is_text(array.type):
        counted, width = pc.binary_length(array), 1
    elif isinstance(array.type, _LISTS):
        counted, width = pc.list_value_length(array), records.TOKEN_BYTES
    else:
        return np.zeros(len(array), np.int64)
    counts: npt.NDArray[np.int64] = counted.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return counts * width


def _values(array: pa.Array, unreadable: dict[int, str], first: int = 0) -> list[Any]:
    """Return Python values from row ``first`` on, times as text; None, and why in ``unreadable``, if none."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        if pa.types.is_temporal(array.type):  # Python's times have no nanoseconds
            array = array.cast(pa.string())
        elif _is_text(array.type):
            # Not checked here, but when Python's strings are made.
            array = pc.cast(array, options=pc.CastOptions(pa.large_string(), allow_invalid_utf8=True))
        is_fast = _is_text(array.type) or (pa.types.is_integer(array.type) and not array.null_count)
        if is_fast and len(array) > 1:
            array = array.to_numpy(zero_copy_only=False)
        found: list[Any] = array.tolist()
        return found
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if len(array) != 1:
            return [_values(array.slice(i, 1), unreadable, i)[0] for i in range(len(array))]
        why = f"a value can't be read: {reason_of(error)}"
        if isinstance(error, UnicodeDecodeError):
            why = f"{reason_of(error)} of a value"
        unreadable.setdefault(first, why)
        return [None]


def _token_rows(array: pa.Array, unreadable: dict[int, str]) -> list[Any]:
    """Return each row's token ids as an array; other types as ``values`` does."""
    if not isinstance(array.type, _LISTS) or not pa.types.is_integer(array.type.value_type):
        return _values(array, unreadable)
    if not array.flatten().null_count and not isinstance(array.type, pa.ListViewType | pa.LargeListViewType):
        return list(array.to_numpy(zero_copy_only=False))
    rows: list[Any] = array.to_pylist()  # numpy would make floating-point numbers of rows with null, and knows no views
    for i in (i for i, row in enumerate(rows) if row is not None and None in row):
        unreadable.setdefault(i, "a token id is null")
    return rows


def head_of_table(file: InputFile, wanted: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return which ``wanted`` fields a table lacks, and its first rows, if Python can represent them."""
    if file.base == "parquet":
        with _open(file) as table:
            schema, batch = table.schema_arrow, None
            if any(_steps(schema, name) is None for name in wanted):  # else nobody needs to see its rows
                batch = next(table.iter_batches(_FIRST_ROWS), None)
    else:
        with file.open_arrow() as source:
            batch = next(_record_batches(source, Fields(text=""), WHOLE), None)
            schema = pa.schema([]) if batch is None else batch.schema
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError, OverflowError, pa.ArrowException):
        rows = [] if batch is None else batch.slice(0, _FIRST_ROWS).to_pylist()
    return [name for name in wanted if _steps(schema, name) is None], rows or [dict.fromkeys(schema.names)]


def _missing(schema: pa.Schema, fields: Fields) -> Rejected | None:
    """Return the rejection for every row of a table without a required field, or None."""
    for name in fields.required:
        if _steps(schema, name) is None:
            return Rejected(0, records.no_column(name, len(schema.names)), excerpt=column_names(schema.names))
    return None


def documents_of_batch(
    batch: pa.RecordBatch, fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | Rejected]:
    """Yield documents of a batch; its first row is ``line`` of the slice and ``position`` of the file."""
    found = ((name, _column(batch, name)) for name in fields.wanted)
    arrays = {name: _plain(array) for name, array in found if array is not None}
    make = maker(fields, source)
    for start in range(0, batch.num_rows, WINDOW_ROWS):
        reasons: dict[int, str] = {}
        columns: list[list[Any]] = []
        for name, array in arrays.items():
            window = array.slice(start, WINDOW_ROWS)
            if name in fields.required:
                window = _limited(window, name, fields, reasons)
            columns.append((_token_rows if name == fields.tokens else _values)(window, reasons))
        for i, row in enumerate(zip(*columns, strict=True)):
            if i in reasons:
                yield Rejected(line + start + i, reasons[i])
            else:
                yield make(dict(zip(arrays, row, strict=True)), line + start + i, position + start + i, -1)


def _limited(array: pa.Array, name: str, fields: Fields, reasons: dict[int, str]) -> pa.Array:
    """Mask values over the size limit, so that they are not decoded; add them to ``reasons``."""
    limit = fields.max_document
    sizes: npt.NDArray[np.int64] = _lengths(array)
    over = sizes > limit
    if not over.any():
        return array
    for i in np.flatnonzero(over).tolist():
        too_many = too_many_tokens(int(sizes[i]) // records.TOKEN_BYTES, limit) if name == fields.tokens else None
        reasons[i] = too_many or f"{name!r} has {sizes[i]:,} bytes, more than --max-document {limit:,}"
    # ``take`` with a null index gives null for any type.
    return array.take(pa.array(np.arange(len(array)), mask=over))


def read_parquet_file(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield documents of a range of row groups; positions are rows of the file, from 1."""
    with _open(file) as table:
        sizes, all_counts = _row_groups(table)
        counts = [all_counts[group] for group in range(where.start, len(sizes) if where.end is None else where.end)]
        total = sum(counts)
        if rejected := _missing(table.schema_arrow, fields):
            _check_counts(table)  # a damaged footer could claim any number of rows
            yield from (rejected._replace(line=line) for line in range(1, total + 1))
            return
        line = 1
        for group, count in enumerate(counts, where.start):
            begin = line
            for batch in _batches(table, group, count, fields, sizes[group], begin, total):
                yield from documents_of_batch(batch, fields, file.name, line, where.first + line)
                line += batch.num_rows
            if line != begin + count:
                raise InputError(f"row group {group} has {line - begin:,} rows, not {count:,}", line)


def cut_parquet(file: InputFile, target: int) -> list[Slice]:
    """Return runs of row groups of about ``target`` decompressed bytes."""
    with _open(file) as table:
        _check_counts(table)
        return _runs(*_row_groups(table), target)


def _runs(sizes: list[int], counts: list[int], target: int) -> list[Slice]:
    befores = [0, *itertools.accumulate(counts)]
    found, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= target or i == len(sizes) - 1:
            found.append(Slice(start, i + 1, befores[start], befores[i + 1]))
            start, held = i + 1, 0
    return found if len(found) > 1 else [WHOLE]


def _open(file: InputFile) -> pq.ParquetFile:
    source, buffer = (file.open_arrow(), _RANGE_BYTES) if file.is_remote else (file.path, _BUFFER_BYTES)
    return pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=buffer)


def _selected(table: pq.ParquetFile, fields: Fields) -> list[str]:
    schema = table.schema_arrow
    ways = [(name, way) for name in fields.wanted if (way := _steps(schema, name))]
    # Of a map the whole column is read.
    return [name if all(isinstance(step, int) for step in way) else schema.names[int(way[0])] for name, way in ways]


def _check_counts(table: pq.ParquetFile) -> None:
    counts, rows = _row_groups(table)[1], table.metadata.num_rows
    if min(counts, default=0) < 0 or sum(counts) != rows:
        raise InputError(f"the footer is damaged: {rows:,} rows, but {sum(counts):,} in its row groups")


def _row_groups(table: pq.ParquetFile) -> tuple[list[int], list[int]]:
    """Return the decompressed bytes and the rows of each."""
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    return [max(0, group.total_byte_size) for group in groups], [group.num_rows for group in groups]


def _batches(
    table: pq.ParquetFile, group: int, count: int, fields: Fields, bytes_: int, line: int, total: int
) -> Iterator[pa.RecordBatch]:
    """Yield batches of a row group of ``count`` rows; ``line`` is its first row in the slice."""
    selected = _selected(table, fields)
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


def read_arrow_file(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Yield documents of a range of record batches; positions are rows of the file, from 1."""
    line = 1
    with file.open_arrow() as source:
        batches = _record_batches(source, fields, where)
        while True:
            try:
                batch = next(batches, None)
                rejected = None if batch is None else _missing(batch.schema, fields)
                if batch is not None and not rejected:
                    batch.validate(full=True)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                after = where.first + line - 1
                raise InputError(f"broken off after row {after:,}: {reason_of(error)}", line) from error
            if batch is None:
                return
            if rejected:
                yield from (rejected._replace(line=line + i) for i in range(batch.num_rows))
            else:
                yield from documents_of_batch(batch, fields, file.name, line, where.first + line)
            line += batch.num_rows


def cut_arrow(file: InputFile, target: int) -> list[Slice]:
    """Return runs of record batches of about ``target`` bytes of the file; streams are not cut."""
    if file.size <= target or file.is_remote:  # the number of rows is in the header of each batch
        return [WHOLE]
    with file.open_arrow() as source:
        if source.read(len(_FILE)) != _FILE:
            return [WHOLE]
        types = pa.ipc.open_file(source).schema.types
        widths = [kind.bit_width if pa.types.is_primitive(kind) else 1 << 20 for kind in types]
        narrowest = [widths.index(min(widths))] if widths else []
        table = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=narrowest))
        counts = [table.get_batch(i).num_rows for i in range(table.num_record_batches)]
    total = max(sum(counts), 1)
    return _runs([file.size * count // total for count in counts], counts, target)


def _record_batches(source: pa.NativeFile, fields: Fields, where: Slice) -> Iterator[pa.RecordBatch]:
    head = source.read(len(_FILE))
    if head.startswith(_FEATHER_1):
        advice = "write it again with pyarrow.feather.write_feather(..., version=2)"
        raise InputError(f"Feather version 1 is not supported: {advice}")
    if head != _FILE:
        source.seek(0)
        yield from _stream(source, fields)
        return
    try:
        table = pa.ipc.open_file(source)
    except pa.ArrowException as error:
        # The footer is missing; what follows the magic bytes is a stream.
        source.seek(_STREAM_START)
        yield from _stream(source, fields)
        raise pa.ArrowInvalid(f"no footer: {reason_of(error)}") from error
    table = pa.ipc.open_file(source, options=_options(table.schema, fields))
    for i in range(where.start, table.num_record_batches if where.end is None else where.end):
        yield table.get_batch(i)


def _stream(source: pa.NativeFile, fields: Fields) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a stream; raise ``ArrowInvalid`` if it does not end where the file does."""
    start = source.tell()
    schema = pa.ipc.open_stream(source).schema
    source.seek(start)
    with pa.ipc.open_stream(source, options=_options(schema, fields)) as stream:
        yield from stream
    if left := source.size() - source.tell():
        raise pa.ArrowInvalid(f"{left:,} bytes follow the end of the stream")
    end = source.tell()
    source.seek(start)
    # In old streams the last batch's padding looks like the end mark, so a missing one is not always found.
    mark = _MARK + _END if source.read(len(_MARK)) == _MARK else _END
    source.seek(max(start, end - len(mark)))
    if source.read(len(mark)) != mark:
        raise pa.ArrowInvalid("the stream has no end mark, so its writer was cut off")


def _options(schema: pa.Schema, fields: Fields) -> pa.ipc.IpcReadOptions:
    ways = [_steps(schema, name) for name in fields.wanted]
    # An empty list reads all columns, whose names are reported.
    needed = [] if _missing(schema, fields) else sorted({int(way[0]) for way in ways if way})
    return pa.ipc.IpcReadOptions(included_fields=needed)
