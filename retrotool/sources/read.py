"""Read an input file, or a slice of it, as documents and rejected rows.

``InputError`` from a reader, and any library's exception for damaged content, becomes one rejected row, so
that no file can stop the work on others. Other exceptions are not the file's fault: ``OSError`` of the
system, out of memory, and ``UsageError`` for options that contradict the file.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pyarrow as pa

from retrotool.errors import InputError, RetrotoolError
from retrotool.sources import columnar, csv_rows, json_array, lines, tokens, warc
from retrotool.sources.inputs import WHOLE, InputFile, Slice
from retrotool.sources.records import Document, Fields, Rejected, reason_of

READERS: dict[str, Callable[[InputFile, Fields, Slice], Iterator[Document | Rejected]]] = {
    "arrow": columnar.read_arrow_file, "csv": csv_rows.read_csv, "html": warc.read_html, "json": json_array.read_json,
    "jsonl": lines.read_jsonl, "parquet": columnar.read_parquet_file, "tokens": tokens.read_tokens,
    "tsv": csv_rows.read_csv, "txt": lines.read_txt, "warc": warc.read_warc,
}  # fmt: skip
CUTTERS: dict[str, Callable[[InputFile, int], list[Slice]]] = {  # into slices of about so many bytes of text
    "arrow": columnar.cut_arrow, "jsonl": lines.cut_byte_ranges, "parquet": columnar.cut_parquet,
    "tokens": tokens.cut_tokens, "txt": lines.cut_byte_ranges,
}  # fmt: skip


def read_input(file: InputFile, fields: Fields, where: Slice = WHOLE) -> Generator[Document | Rejected]:
    """Yield every row of a file, or a slice of it, once; raise ``OSError`` if the system can't read it."""
    try:
        if file.size == 0:
            yield Rejected(0, "the file is empty")
        else:
            rows = READERS[file.base](file, fields, where)
            yield from (_named(row, file.encoding) for row in rows) if file.encoding else rows
    except InputError as error:
        yield Rejected(error.position, str(error), excerpt=error.excerpt, damage=True)
    except Exception as error:
        if not is_damage(error):
            raise
        kind, reason = type(error).__name__, reason_of(error)
        if not isinstance(error, OSError | pa.ArrowException):  # whose messages are sentences
            reason = f"{kind}: {reason}" if reason else kind
        yield Rejected(0, f"can't be read: {reason or kind}", damage=True)


def _named(row: Document | Rejected, encoding: str) -> Document | Rejected:
    """Name the encoding in the reason of a rejection; its places count in UTF-8."""
    if isinstance(row, Document):
        return row
    return row._replace(reason=row.reason.replace("invalid UTF-8", f"invalid {encoding}"))


def check_input(file: InputFile, fields: Fields, *, keep_end: bool = True) -> None:
    """Raise ``UsageError`` if ``fields`` lack what a file needs or contradict it, or a package lacks."""
    if file.base in ("html", "warc"):
        warc.check_extra(file)
    if file.base != "tokens" or file.size == 0:
        return
    try:
        tokens.check_tokens(file, fields)
        if not keep_end and fields.end_of_document is None:
            tokens.check_ends(file, fields)
    except Exception as error:
        if not is_damage(error):
            raise


def cut_input(file: InputFile, fields: Fields, target: int, stream_slices: int = 1) -> list[Slice]:
    """Return a file's slices of about ``target`` bytes of text, in order.

    An archive that can only be read from its beginning has at most ``stream_slices``.
    """
    cutter = CUTTERS.get(file.base)
    is_one = bool(file.encoding) or (file.base == "txt" and not fields.separator)
    if cutter is None or file.size == 0 or is_one:
        return [WHOLE]
    try:
        slices = cutter(file, target)
        if len(slices) == 1 and file.compression and file.base in ("jsonl", "txt"):
            return lines.cut_stream(file, stream_slices)
        return slices
    except Exception as error:
        if not is_damage(error):
            raise
        return [WHOLE]  # reading it reports what is wrong


def is_damage(error: Exception) -> bool:
    """Return whether an exception is about content; what the system refuses now, it may allow later."""
    if isinstance(error, RetrotoolError):
        return isinstance(error, InputError)
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
