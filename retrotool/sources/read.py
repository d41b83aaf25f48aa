"""From an input file, or a byte range of one, to documents and rows set aside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from retrotool.errors import InputError
from retrotool.sources import lines, tables
from retrotool.sources.files import InputFile
from retrotool.sources.records import MAX_ROW_BYTES, Document, Fields, SetAside


def read(file: InputFile, fields: Fields, start: int = 0, end: int | None = None) -> Iterator[Document | SetAside]:
    """Read a file, or the lines that begin in [``start``, ``end``) of a splittable one; every row comes out once.

    Raises ``OSError`` if the system can't give the file, or stops giving it.
    """
    try:
        if file.size == 0:
            yield SetAside(0, "the file is empty")
        elif file.format == "txt":
            yield _read_text(file, fields)
        elif file.format == "parquet":
            yield from tables.read_parquet(Path(file.path), file.name, fields)
        else:
            yield from lines.read_lines(Path(file.path), file.format, file.name, fields, start, end)
    except InputError as error:
        yield SetAside(error.position, str(error))
    except (OSError, pa.ArrowException) as error:
        # What the system refuses now it may give later; what the content lacks it will lack again.
        if getattr(error, "errno", None) is not None:
            raise
        yield SetAside(0, f"can't be read: {str(error).splitlines()[0]}")


def _read_text(file: InputFile, fields: Fields) -> Document | SetAside:
    """A ``.txt`` file is one document; its id is its name."""
    if file.size > MAX_ROW_BYTES:
        return SetAside(0, f"text of {file.size:,} bytes, more than {MAX_ROW_BYTES:,}")
    try:
        text = Path(file.path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return SetAside(0, f"invalid UTF-8 at byte {error.start:,}")
    folder = file.name.rpartition("/")[0]
    kept: tuple[Any, ...] = (None,) * len(fields.keep)
    return Document(file.name, text, folder or file.name, 0, 0, kept)
