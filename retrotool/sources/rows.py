"""From a batch of an Arrow table to documents, a few MiB at a time.

A batch is cut into windows by the bytes of its texts, so that a batch of any size costs no more memory than a window
and the longest document. Columns become Python values one by one, and rows of them documents as in any other format.

``column`` follows a dotted name into structs and maps. ``plain`` unwraps dictionaries, run ends and extension types
and gives text, which Parquet files do not check, as bytes. ``values`` makes Python values; one that Python can't have
(broken UTF-8, a time far off) rejects its own row only. ``token_rows`` gives lists of numbers as views of one array.

Cost: about 2 µs a row over the copy of its text, more for key-value records, token ids and kept fields, and BLAKE2b
of the text where rows have no id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
)

WINDOW_BYTES = 8 << 20
WINDOW_ROWS = 4096
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
        decoded: npt.NDArray[np.int64] = inner[places]
        return decoded
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
    """Return the documents of a window, whose columns become Python's values all at once."""
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
