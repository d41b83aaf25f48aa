"""Parquet and Arrow input: the columns that are asked for, a few MiB of rows at a time.

A batch is cut into windows by the bytes of its texts, so that a batch of any size costs no more memory than a window
and the longest document. Columns become Python values one by one; a value that Python can't have (broken UTF-8, a time
far off) rejects its own row only.

Parquet: row groups are read one by one, pages as they come, with their checksums. At a damaged page the group is read
again row by row up to it, so that every row before comes out. Of the footer only the numbers of row groups are used:
pyarrow's accessor of column chunks ends the process if the footer is damaged.

Arrow: IPC files (``.arrow``, ``.feather`` version 2) and streams, told apart by their content. Arrow trusts the offsets
in a file, so each batch is validated in full before a value is taken. Files are not memory-mapped: one that becomes
shorter while it is read would end the process. What a cut-off file has before the break is read as a stream.

Slices are runs of row groups or record batches; a stream has no list of its batches and is not cut.

Cost: about 2 µs a row over the copy of its text, more for key-value records, token ids and kept fields, and BLAKE2b
of the text where rows have no id. Memory: an Arrow batch, or a Parquet page, as large as its writer made it.
"""

from __future__ import annotations

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
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import (
    TOKEN_BYTES,
    Document,
    Fields,
    Rejected,
    column_names,
    maker,
    no_column,
    reason_of,
    too_many_tokens,
)  # fmt: skip

WINDOW_BYTES = 8 << 20
WINDOW_ROWS = 4096
BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_RETRIED_ROWS = 100_000
"""Rows that are read one by one to come closer to a damaged page; in larger groups a few at a time."""
_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_START = 8
_MARK, _END = b"\xff\xff\xff\xff", b"\0\0\0\0"
"""A message begins with a mark and its length, and length 0 ends a stream; before version 0.15 there was no mark."""
_TEXT = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary,
)  # fmt: skip
_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view,
    pa.types.is_fixed_size_list,
)  # fmt: skip


def steps(schema: pa.Schema, name: str) -> list[int | str] | None:
    """The way to a field: its column, then a struct's fields by number or a map's keys; None if there is none."""
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
        elif pa.types.is_map(kind) and is_text(kind.key_type):
            way.append(step)
            kind = kind.item_type
        else:
            return None
    return way


def column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The array of a field, null where something around it is; None if there is none."""
    way = steps(batch.schema, name)
    if way is None:
        return None
    array = batch.column(way[0])
    for step in way[1:]:
        if isinstance(step, int):
            array = pc.struct_field(array, [step])
        else:
            array = pc.map_lookup(array, pa.scalar(step, array.type.key_type), "first")
    return array


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column's values are strings, or bytes that may be."""
    return any(is_kind(kind) for is_kind in _TEXT)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column's values are lists, of whatever layout."""
    return any(is_kind(kind) for is_kind in _LISTS)


def plain(array: pa.Array) -> pa.Array:
    """The same values without extension type, dictionary stays; text as bytes of 64-bit offsets, without a copy."""
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return plain(pc.run_end_decode(array))
    if pa.types.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(array.indices, plain(array.dictionary), safe=False)
    if is_text(array.type):
        return array.cast(pa.large_binary())
    return array


def lengths(array: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each value of a plain column of text or of lists; zeros for other types, whose values are small."""
    if pa.types.is_dictionary(array.type):
        inner: npt.NDArray[np.int64] = np.append(lengths(array.dictionary), 0)  # the last for nulls
        places = array.indices.cast(pa.int64()).fill_null(len(inner) - 1).to_numpy(zero_copy_only=False)
        return np.asarray(inner[places])
    if is_text(array.type):
        counted, width = pc.binary_length(array), 1
    elif is_list(array.type):
        counted, width = pc.list_value_length(array), 8
    else:
        return np.zeros(len(array), np.int64)
    counts: npt.NDArray[np.int64] = counted.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return counts * width


def values(array: pa.Array, unreadable: dict[int, str]) -> list[Any]:
    """Return Python's values of a plain column: text as str, times as Arrow writes them (Python's have no nanoseconds).

    A value that Python can't have is None; ``unreadable`` gets its place and the reason.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    try:
        if is_text(kind):
            # Unchecked on the way to Python's strings, which check.
            text = pc.cast(array, options=pc.CastOptions(pa.large_string(), allow_invalid_utf8=True))
            found: list[Any] = text.to_numpy(zero_copy_only=False).tolist()
        elif pa.types.is_temporal(kind):
            found = array.cast(pa.string()).to_pylist()
        elif pa.types.is_integer(kind) and not array.null_count:
            found = array.to_numpy(zero_copy_only=False).tolist()
        else:
            found = array.to_pylist()
        return found
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(array.slice(i, 1), i, unreadable) for i in range(len(array))]


def _value(one: pa.Array, place: int, unreadable: dict[int, str]) -> Any:
    try:
        if pa.types.is_temporal(one.type):
            return one.cast(pa.string())[0].as_py()
        value = one[0].as_py()
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        unreadable.setdefault(place, f"invalid UTF-8 at byte {error.start:,} of a value")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        unreadable.setdefault(place, f"a value can't be read: {reason_of(error)}")
    return None


def token_rows(array: pa.Array, unreadable: dict[int, str]) -> list[Any]:
    """Each row's token ids as a view of one numpy array; what is no list of whole numbers as ``values`` gives it."""
    if not is_list(array.type) or not pa.types.is_integer(array.type.value_type):
        return values(array, unreadable)
    begins, ends = _bounds(array)
    known = array.is_valid().to_numpy(zero_copy_only=False) & (ends > begins)
    low, high = (int(begins[known].min()), int(ends[known].max())) if known.any() else (0, 0)
    begins, ends = np.where(known, begins - low, 0), np.where(known, ends - low, 0)
    flat = array.values.slice(low, high - low)
    numbers = (flat.fill_null(0) if flat.null_count else flat).to_numpy(zero_copy_only=False)
    found: list[Any] = [numbers[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
    if flat.null_count:
        counted = np.concatenate([[0], np.cumsum(flat.is_null().to_numpy(zero_copy_only=False))])
        for i in np.flatnonzero(counted[ends] > counted[begins]).tolist():
            unreadable.setdefault(i, "a token id is null")
    if array.null_count:
        for i in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
            found[i] = None
    return found


def _bounds(array: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each list begins and ends among ``array.values``; of a null anything may be there."""
    if pa.types.is_fixed_size_list(array.type):
        places = (array.offset + np.arange(len(array) + 1, dtype=np.int64)) * array.type.list_size
        return places[:-1], places[1:]
    places = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        return places, places + array.sizes.to_numpy(zero_copy_only=False)
    return places[:-1], places[1:]


def missing(schema: pa.Schema, fields: Fields) -> Rejected | None:
    """Why no row of a table can be a document, for a row without a number, or None."""
    for name in fields.required:
        if steps(schema, name) is None:
            return Rejected(0, no_column(name, len(schema.names)), excerpt=column_names(schema.names))
    return None


def documents_of_batch(
    batch: pa.RecordBatch, fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | Rejected]:
    """Documents of a batch; its first row has ``line`` in what is read, and ``position`` in the file, both from 1."""
    arrays = {}
    for name in fields.wanted:
        if (array := column(batch, name)) is not None:
            arrays[name] = plain(array)
    for start, end in row_windows(arrays, batch.num_rows):
        window = {name: array.slice(start, end - start) for name, array in arrays.items()}
        yield from _window(window, fields, source, line + start, position + start)


def row_windows(arrays: dict[str, pa.Array], rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about ``WINDOW_BYTES`` of text."""
    total = np.zeros(rows, np.int64)
    for array in arrays.values():
        total += lengths(array)
    ends = total.cumsum()
    start, before = 0, 0
    while start < rows:
        end = int(np.searchsorted(ends, before + WINDOW_BYTES, side="right"))
        end = min(max(end, start + 1), start + WINDOW_ROWS, rows)
        yield start, end
        start, before = end, int(ends[end - 1])


def _window(
    arrays: dict[str, pa.Array], fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | Rejected]:
    reasons: dict[int, str] = {}
    columns: list[list[Any]] = []
    for name, array in arrays.items():
        within = _limited(array, name, fields, reasons) if name in fields.required else array
        columns.append((token_rows if name == fields.tokens else values)(within, reasons))
    make, names = maker(fields, source), tuple(arrays)
    for i, row in enumerate(zip(*columns, strict=True)):
        if i in reasons:
            yield Rejected(line + i, reasons[i])
        else:
            yield make(dict(zip(names, row, strict=True)), line + i, position + i, -1)


def _limited(array: pa.Array, name: str, fields: Fields, reasons: dict[int, str]) -> pa.Array:
    """Return a column without the values over the limit, which are not even decoded; ``reasons`` gets their places."""
    limit = fields.max_document
    sizes: npt.NDArray[np.int64] = lengths(array)
    if is_list(array.type):
        sizes = sizes // 8 * TOKEN_BYTES
    over = sizes > limit
    if not over.any():
        return array
    for i in np.flatnonzero(over).tolist():
        too_many = too_many_tokens(name, int(sizes[i]) // TOKEN_BYTES, limit) if name == fields.tokens else None
        reasons[i] = too_many or f"{name!r} has {sizes[i]:,} bytes, more than --max-document {limit:,}"
    # A null place in ``take`` is a null, whatever the type, and copies nothing.
    return array.take(pa.array(np.arange(len(array)), mask=over))


def read_parquet_file(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | Rejected]:
    """Documents of a range of row groups; positions are rows of the file, from 1."""
    with _open(file) as table:
        end = table.num_row_groups if where.end is None else where.end
        counts = [table.metadata.row_group(group).num_rows for group in range(where.start, end)]
        total = sum(counts)
        if lacking := missing(table.schema_arrow, fields):
            _check_counts(table)  # or a damaged one would reject rows without end
            yield from (lacking._replace(line=line) for line in range(1, total + 1))
            return
        line = 1
        sizes = _sizes(table)
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
        return runs(_sizes(table), _row_counts(table), target)


def runs(sizes: list[int], counts: list[int], target: int) -> list[Slice]:
    """Slices of consecutive groups, of so many bytes and rows each, that reach ``target`` bytes."""
    befores = [0, *itertools.accumulate(counts)]
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
        way = steps(schema, name)
        if way is not None:
            # A key of a map is no column of its own.
            found.append(name if all(isinstance(step, int) for step in way) else schema.names[int(way[0])])
    return found


def _check_counts(table: pq.ParquetFile) -> None:
    """Raise ``InputError`` if the row groups do not have the rows that the footer tells of the whole file."""
    counts = _row_counts(table)
    if min(counts, default=0) < 0 or sum(counts) != table.metadata.num_rows:
        told = f"it tells {table.metadata.num_rows:,} rows, its row groups {sum(counts):,}"
        raise InputError(f"the footer is damaged: {told}")


def _row_counts(table: pq.ParquetFile) -> list[int]:
    return [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]


def _sizes(table: pq.ParquetFile) -> list[int]:
    """Return the decompressed bytes of each row group; they only decide how much is read at a time."""
    return [max(0, table.metadata.row_group(i).total_byte_size) for i in range(table.num_row_groups)]


def _batches(
    table: pq.ParquetFile, group: int, count: int, fields: Fields, bytes_: int, line: int, total: int
) -> Iterator[pa.RecordBatch]:
    """Batches of a row group of ``count`` rows and ``bytes_``, whose first row is the range's row ``line``."""
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
    """Return documents of a range of record batches; positions are rows of the file, from 1."""
    line = 1
    with pa.OSFile(file.path) as source:
        batches = _record_batches(source, fields, where)
        while True:
            try:
                batch = next(batches, None)
                lacking = None if batch is None else missing(batch.schema, fields)
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
                yield from documents_of_batch(batch, fields, file.name, line, where.first + line)
            line += batch.num_rows


def cut_arrow(file: InputFile, target: int) -> list[Slice]:
    """Return runs of record batches of about ``target`` bytes of the file; a stream is not cut."""
    with pa.OSFile(file.path) as source:
        if file.size <= target or source.read(len(_FILE)) != _FILE:
            return [WHOLE]
        types = pa.ipc.open_file(source).schema.types
        widths = [kind.bit_width if pa.types.is_primitive(kind) else 1 << 20 for kind in types]
        narrowest = [widths.index(min(widths))] if widths else []
        table = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=narrowest))
        counts = [table.get_batch(i).num_rows for i in range(table.num_record_batches)]
    total = max(sum(counts), 1)
    return runs([file.size * count // total for count in counts], counts, target)


def _record_batches(source: pa.NativeFile, fields: Fields, where: Slice) -> Iterator[pa.RecordBatch]:
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
    end = source.tell()
    source.seek(start)
    # In old streams zeros that pad the last batch look the same; there a missing mark is not always found.
    mark = _MARK + _END if source.read(len(_MARK)) == _MARK else _END
    source.seek(max(start, end - len(mark)))
    if source.read(len(mark)) != mark:
        raise pa.ArrowInvalid("the stream has no end mark, so its writer was cut off")


def _options(schema: pa.Schema, fields: Fields) -> pa.ipc.IpcReadOptions:
    ways = [steps(schema, name) for name in fields.wanted]
    needed = sorted({int(way[0]) for way in ways if way})
    # An empty choice would mean all columns; names stay whole for what is said of a missing one.
    if missing(schema, fields):
        needed = []
    return pa.ipc.IpcReadOptions(included_fields=needed)
