"""From an input file, or a slice of one, to documents and rows set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from retrotool.errors import InputError
from retrotool.sources import arrow, csv_rows, json_array, lines, parquet, text, tokens, warc
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, SetAside

Rows = Iterator[Document | SetAside]


@dataclass(frozen=True, slots=True)
class Format:
    """How files of a format are read, and cut into slices of about ``target`` bytes of text, if they can be."""

    read: Callable[[InputFile, Fields, Slice], Rows]
    cut: Callable[[InputFile, Fields, int], list[Slice]] | None = None


FORMATS = {
    "arrow": Format(arrow.read_arrow, arrow.cut_arrow),
    "csv": Format(csv_rows.read),
    "json": Format(json_array.read),
    "jsonl": Format(lines.read_jsonl, lines.cut),
    "parquet": Format(parquet.read_parquet, parquet.cut_parquet),
    "tokens": Format(tokens.read_tokens, tokens.cut_tokens),
    "tsv": Format(csv_rows.read),
    "txt": Format(text.read, text.cut),
    "warc": Format(warc.read),
}


def read(file: InputFile, fields: Fields, where: Slice = WHOLE) -> Rows:
    """Read a file, or a slice of it; every row comes out once.

    Raises ``OSError`` if the system can't give the file, or stops giving it.
    """
    try:
        if file.size == 0:
            yield SetAside(0, "the file is empty")
        else:
            yield from FORMATS[file.base].read(file, fields, where)
    except InputError as error:
        yield SetAside(error.position, str(error), damage=True)
    except (OSError, pa.ArrowException) as error:
        # What the system refuses now it may give later; what the content lacks it will lack again.
        if getattr(error, "errno", None) is not None:
            raise
        yield SetAside(0, f"can't be read: {str(error).splitlines()[0]}", damage=True)


def check(file: InputFile, fields: Fields) -> None:
    """``UsageError`` if ``fields`` does not say what reading a file needs."""
    if file.base == "tokens":
        tokens.check_tokens(file, fields)


def cut(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """The slices of a file, in order, of about ``target`` bytes of text; the whole file where it can't be cut."""
    cutter = FORMATS[file.base].cut
    return [WHOLE] if cutter is None else cutter(file, fields, target)
