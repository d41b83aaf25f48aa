"""From an input file, or a slice of one, to documents and rejected rows.

Readers raise ``InputError`` where a file breaks off, and libraries all kinds of exceptions where content is damaged.
Here both become one row, so no file can stop the work on others. What remains an exception is not the file's fault:
``OSError`` of the system, memory that ran out, and ``UsageError`` for settings that contradict the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from retrotool.errors import InputError, RetrotoolError, UsageError
from retrotool.sources import columnar, csv_rows, json_array, lines, tokens, warc
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, reason_of

Rows = Iterator[Document | Rejected]


@dataclass(frozen=True, slots=True)
class Format:
    """How files of a format are read, and cut into slices of about ``target`` bytes of text, if they can be."""

    read: Callable[[InputFile, Fields, Slice], Rows]
    cut: Callable[[InputFile, int], list[Slice]] | None = None


FORMATS = {
    "arrow": Format(columnar.read_arrow_file, columnar.cut_arrow),
    "csv": Format(csv_rows.read_csv),
    "json": Format(json_array.read_json),
    "jsonl": Format(lines.read_jsonl, lines.cut_byte_ranges),
    "parquet": Format(columnar.read_parquet_file, columnar.cut_parquet),
    "tokens": Format(tokens.read_tokens, tokens.cut_tokens),
    "tsv": Format(csv_rows.read_csv),
    "txt": Format(lines.read_txt, lines.cut_byte_ranges),
    "warc": Format(warc.read_warc),
}


def read_input(file: InputFile, fields: Fields, where: Slice = WHOLE) -> Rows:
    """Read a file, or a slice of it; every row comes out once.

    Raises ``OSError`` if the system can't give the file, or stops giving it.
    """
    try:
        if file.size == 0:
            yield Rejected(0, "the file is empty")
        else:
            yield from FORMATS[file.base].read(file, fields, where)
    except InputError as error:
        yield Rejected(error.position, str(error), excerpt=error.excerpt, damage=True)
    except Exception as error:
        if not _is_damage(error):
            raise
        yield Rejected(0, f"can't be read: {_reason_of(error)}", damage=True)


def check_fields(fields: Fields) -> None:
    """``UsageError`` if settings contradict one another, whatever is read."""
    if fields.tokens is not None and (fields.key is not None or fields.value is not None):
        raise UsageError(
            "--tokens-field goes with neither --key-field nor --value-field",
            "Of rows that are tokenised already no key-value records are made; give one or the other.",
        )


def check_input(file: InputFile, fields: Fields) -> None:
    """``UsageError`` if ``fields`` does not say what reading a file needs, or contradicts it.

    Of a damaged file nothing is said: reading it will.
    """
    check_fields(fields)
    if file.base != "tokens" or file.size == 0:
        return
    try:
        tokens.check_tokens(file, fields)
    except Exception as error:
        if not _is_damage(error):
            raise


def cut_input(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """The slices of a file, in order, of about ``target`` bytes of text; the whole file where it can't be cut."""
    cutter = FORMATS[file.base].cut
    is_one = file.base == "txt" and not fields.separator
    if cutter is None or file.size == 0 or is_one:
        return [WHOLE]
    try:
        return cutter(file, target)
    except Exception as error:
        if not _is_damage(error):
            raise
        return [WHOLE]  # reading it will say what is wrong


def _is_damage(error: Exception) -> bool:
    """Whether an exception speaks of a file's content.

    What the system refuses now it may give later; what the content lacks it will lack again.
    """
    if isinstance(error, RetrotoolError):
        return isinstance(error, InputError)
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) is None


def _reason_of(error: Exception) -> str:
    """What an exception says, in a line; Arrow's are sentences, of others the name is half of it."""
    first = reason_of(error)
    if isinstance(error, OSError | pa.ArrowException):
        return first or type(error).__name__
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
