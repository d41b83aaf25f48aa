"""Check the first rows of inputs before anything is written: required fields, and whether a row can be read.

The schema or header of a table decides which fields it has; of JSON, the first ``ROWS`` rows, or ``TEXT``
characters of text. Up to ``2 * FILES`` inputs are opened: the first of each format in each folder, and others
spread over all. Usually one row of each is read, about a millisecond.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrotool.errors import UsageError
from retrotool.sources import columnar, csv_rows, json_array, lines, warc
from retrotool.sources.inputs import WHOLE, InputFile
from retrotool.sources.read import cut_input, is_damage, read_input
from retrotool.sources.records import Document, Fields, Rejected, column_names, find

ROWS, TEXT, FILES = 1000, 8 << 20, 64
NO_FIELDS = ("txt", "html", "tokens")  # formats whose documents have no fields
_DEEPEST = 8  # levels of objects whose fields are named


def check_heads(files: Sequence[InputFile], fields: Fields, *, require_id: bool = False) -> list[str]:
    """Return the fields to keep that no input's first rows have.

    Raises ``UsageError`` if an input lacks a required field, or if no input has a readable row.
    """
    firsts = {(Path(file.path).parent, file.format): file for file in reversed(files)}.values()
    looked_at = [file for several in (files, list(firsts)) for file in several[:: -(-len(several) // FILES) or 1]]
    options = ("--text-field",) if fields.required == [fields.text] else ("--key-field", "--value-field")
    named = dict(zip(fields.required, ("--tokens-field",) if fields.tokens else options, strict=True))
    named |= {fields.id: "--id-field"} if require_id else {}
    absent, decided = list(fields.keep), True
    for file in dict.fromkeys(looked_at):
        lacking, texts, read = _head(file, fields, [*named, *fields.keep])
        for name in (name for name in named if name in lacking):
            raise _no_field(file, name, named[name], texts, read, is_only=len(files) == 1)
        absent = [name for name in absent if not texts or name in lacking]
        decided &= bool(texts) and file.base in ("csv", "tsv", "parquet", "arrow")
    if len(set(looked_at)) == len(files):
        _check_readable(files, fields)
        if absent and decided:
            raise UsageError(f"--keep {absent[0]}: no input has this field", f"Fields: {column_names(list(texts))}.")
    return absent


def _head(file: InputFile, fields: Fields, wanted: list[str]) -> tuple[list[str], Counter[str], int]:
    """Return the fields that an input lacks, the text in those that it has, and how many rows were read."""
    lacking, texts, read = wanted, Counter[str](), 0
    rows: Iterable[Mapping[str, Any]] = ()
    try:
        if file.base in ("parquet", "arrow"):
            lacking, rows = columnar.head_of_table(file, wanted)
        elif file.base not in NO_FIELDS:
            rows = itertools.islice(_rows(file, fields), ROWS)
        for read, row in enumerate(rows, 1):  # noqa: B007
            lacking = [name for name in lacking if not _has(row, name)]
            texts.update(dict(_texts(row)))
            if not lacking or texts.total() > TEXT:
                break
    except Exception as error:
        if not is_damage(error):
            raise
    return (lacking if texts else []), texts, read


def _rows(file: InputFile, fields: Fields) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an input as objects; of a table with a header, first one without values."""
    limit = lines.line_limit(fields)
    if file.base == "warc":
        yield dict.fromkeys(warc.FIELDS)
    elif file.base == "jsonl" or (file.base == "json" and json_array.is_lines(file, limit)):
        rows = (lines.parse_row(line.data) for line in lines.read_lines(file, WHOLE, limit) if line.data is not None)
        yield from (row for row in rows if not isinstance(row, str))
    else:
        with contextlib.closing(file.blocks()) as stream:
            if file.base == "json":
                yield from (row for row in json_array.elements(stream, limit) if isinstance(row, dict))
                return
            records = csv_rows.csv_records(stream, csv_rows.DELIMITERS[file.base], limit)
            names = next(records).fields
            yield dict.fromkeys(names)
            yield from (dict(zip(names, record.fields, strict=False)) for record in records)


def _has(row: Mapping[str, Any], name: str) -> bool:
    parent, _, last = name.rpartition(".")
    above = find(row, parent) if parent else None
    return name in row or (isinstance(above, Mapping) and last in above)


def _texts(row: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, int]]:
    """Yield the dotted name of each field, and the characters of its text."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            yield from _texts(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, len(value) if isinstance(value, str) else 0


def _no_field(file: InputFile, name: str, option: str, texts: Counter[str], read: int, *, is_only: bool) -> UsageError:
    likely = difflib.get_close_matches(name, list(texts), 1)
    if option == "--text-field":
        likely = [longest for longest, size in texts.most_common(1) if size] or likely
    advice = f"Name it: {option} {shlex.quote(likely[0])}" if likely else f"Name it with {option}"
    ways = [f"leave {option} out to use a hash of the text"] if option == "--id-field" else []
    ways += [] if is_only else [f"leave this input out with --exclude {shlex.quote(glob.escape(file.name))}"]
    which = f"none of the first {read:,} rows" if read == ROWS or texts.total() > TEXT else "no row"
    return UsageError(
        f"{which} of {file.path} has {name!r}. It has: {column_names(list(texts))}",
        f"{', or '.join([advice, *ways])}. Nothing was changed.",
    )


def _check_readable(files: Sequence[InputFile], fields: Fields) -> None:
    first: tuple[InputFile, Rejected] | None = None
    for file in files:
        with contextlib.closing(read_input(file, fields)) as stream:
            for number, row in enumerate(stream, 1):
                if isinstance(row, Document) or number == ROWS:
                    return
                if row.damage and len(cut_input(file, fields, file.size // FILES + 1)) > 1:
                    return  # other slices may be readable
                first = first or (file, row)
    if first is not None:
        file, row = first
        where = file.path + (f", line {row.line:,}" if row.line else "")
        advice = "Name its encoding, such as --encoding latin-1. " if "invalid UTF-8" in row.reason else ""
        which = "the input" if len(files) == 1 else f"any of {len(files):,} inputs"
        raise UsageError(f"no row of {which} can be read. {where}: {row.reason}", f"{advice}Nothing was changed.")
