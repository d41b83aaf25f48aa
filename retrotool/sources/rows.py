"""From a batch of table rows to documents, a few MiB at a time.

A batch is cut into windows by the bytes of its texts, so that a batch of any size costs no more memory than a window
and the longest document. Columns become Python values one by one and are zipped; a row that is out of the ordinary
goes through ``document_of``, which knows why.

Cost: about 2.5 µs a row over the copy of its text, twice that for key-value records and token ids, and BLAKE2b of
the text where rows have no id.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.sources import columns
from retrotool.sources.columns import Unreadable
from retrotool.sources.records import (
    TOKEN_BYTES,
    Document,
    Fields,
    SetAside,
    as_text,
    column_names,
    content_id,
    document_of,
    no_column,
    told,
    too_many_tokens,
)

WINDOW_BYTES = 8 << 20
WINDOW_ROWS = 4096

_document = partial(tuple.__new__, Document)
"""``Document._make`` in a third of its time."""


def needed(fields: Fields) -> list[str]:
    """Names of the fields that must be there."""
    if fields.tokens is not None:
        return [fields.tokens]
    if fields.key is not None and fields.value is not None:
        return [fields.key, fields.value]
    return [fields.text]


def wanted(fields: Fields) -> list[str]:
    """Names of the fields that are read, each once."""
    return list(dict.fromkeys([*needed(fields), fields.id, "source", *fields.keep]))


def missing(schema: pa.Schema, fields: Fields) -> SetAside | None:
    """Why no row of a table can be a document, for a row without a number, or None."""
    for name in needed(fields):
        if columns.steps(schema, name) is None:
            return SetAside(0, no_column(name, len(schema.names)), excerpt=column_names(schema.names))
    return None


def rows_of(
    batch: pa.RecordBatch, fields: Fields, source: str, line: int, position: int
) -> Iterator[Document | SetAside]:
    """Documents of a batch; its first row has ``line`` in what is read, and ``position`` in the file, both from 1."""
    arrays = {}
    for name in wanted(fields):
        if (array := columns.column(batch, name)) is not None:
            arrays[name] = columns.plain(array)
    for start, end in windows(arrays, batch.num_rows):
        window = {name: array.slice(start, end - start) for name, array in arrays.items()}
        yield from _window(window, end - start, fields, source, line + start, position + start)


def windows(arrays: dict[str, pa.Array], rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about ``WINDOW_BYTES`` of text."""
    total = np.zeros(rows, np.int64)
    for array in arrays.values():
        total += columns.lengths(array)
    ends = total.cumsum()
    start, before = 0, 0
    while start < rows:
        end = int(np.searchsorted(ends, before + WINDOW_BYTES, side="right"))
        end = min(max(end, start + 1), start + WINDOW_ROWS, rows)
        yield start, end
        start, before = end, int(ends[end - 1])


def _window(
    arrays: dict[str, pa.Array], rows: int, fields: Fields, source: str, line: int, position: int
) -> list[Document | SetAside]:
    """Documents of a window, all at once."""
    too_long: dict[int, str] = {}
    lists: dict[str, list[Any]] = {}
    for name, array in arrays.items():
        if name in needed(fields):
            array, over = _limited(array, name, fields)
            too_long.update(over)
        lists[name] = columns.token_rows(array) if name == fields.tokens else columns.values(array)

    def slow(i: int) -> Document | SetAside:
        row = {name: column[i] for name, column in lists.items()}
        if i in too_long:
            return SetAside(line + i, too_long[i])
        if bad := next((value for value in row.values() if isinstance(value, Unreadable)), None):
            return SetAside(line + i, bad.reason)
        return document_of(row, fields, source, line + i, position + i)

    if fields.tokens is not None or fields.key is not None:
        return [slow(i) for i in range(rows)]
    texts = lists[fields.text]
    odd = _odd(texts, empty=False)
    identifiers = lists.get(fields.id, [None] * rows)
    if fields.id in arrays and pa.types.is_integer(arrays[fields.id].type):
        identifiers = [None if value is None else str(value) for value in identifiers]
    if odd_ids := _odd(identifiers, empty=False):
        odd |= {i for i in odd_ids if identifiers[i] is not None}
        named = enumerate(identifiers)
        identifiers = [content_id(texts[i]) if own is None and i not in odd else own for i, own in named]
    sources, kept = [source] * rows, [[None] * rows for _ in fields.keep]
    if "source" in lists:
        sources = lists["source"]
        if odd_sources := _odd(sources, empty=True):
            odd |= {i for i in odd_sources if isinstance(sources[i], Unreadable)}
            sources = [own if isinstance(own, str) else source for own in sources]
    for place, name in enumerate(fields.keep):
        if name in lists:
            kept[place] = [_kept(value) for value in lists[name]]
            odd |= {i for i, value in enumerate(kept[place]) if isinstance(value, Unreadable)}
    tuples = zip(*kept, strict=True) if kept else [()] * rows
    lines, positions, nothing = range(line, line + rows), range(position, position + rows), [None] * rows
    made = zip(identifiers, texts, sources, positions, lines, tuples, nothing, nothing, strict=True)
    found: list[Document | SetAside] = list(map(_document, made))
    for i in odd:
        found[i] = slow(i)
    return found


def _odd(values: list[Any], *, empty: bool) -> set[int]:
    """Places of what is no string, or without ``empty`` an empty one; most often none, found at C's speed."""
    if set(map(type, values)) <= {str} and (empty or all(values)):
        return set()
    return {i for i, value in enumerate(values) if value.__class__ is not str or not (value or empty)}


def _kept(value: Any) -> Any:
    """A kept value as its column holds it, or the mark of one that can't be written."""
    if value is None or isinstance(value, str | Unreadable):
        return value
    try:
        return as_text(value)
    except (TypeError, ValueError) as error:
        return Unreadable(f"a kept field can't be written: {told(error)}")


def _limited(array: pa.Array, name: str, fields: Fields) -> tuple[pa.Array, dict[int, str]]:
    """A column without the values over the limit, which are not even decoded, and what is to be said of them."""
    limit = fields.max_document
    sizes: npt.NDArray[np.int64] = columns.lengths(array)
    if columns.is_list(array.type):
        sizes = sizes // 8 * TOKEN_BYTES
    over = sizes > limit
    if not over.any():
        return array, {}
    reasons = {}
    for i in np.flatnonzero(over).tolist():
        too_many = too_many_tokens(name, int(sizes[i]) // TOKEN_BYTES, limit) if name == fields.tokens else None
        reasons[i] = too_many or f"{name!r} has {sizes[i]:,} bytes, more than --max-document {limit:,}"
    # A null place in ``take`` is a null, whatever the type, and copies nothing.
    return array.take(pa.array(np.arange(len(array)), mask=over)), reasons
