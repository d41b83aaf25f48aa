"""Plain text: a file is a document, or documents stand between separators.

A whole file's id is its name. Documents between separators have ids made of their text, and their byte offset as
position; those of nothing but white space are no documents, as blank lines are none in JSON lines. A document over
``Fields.max_document`` is never held in memory. Only separated text can be cut into slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from retrotool.sources import lines, streams
from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.lines import BOM, HEAD_BYTES, Line
from retrotool.sources.records import Document, Fields, SetAside, content_id, excerpt
from retrotool.sources.streams import BrokenStream


def read(file: InputFile, fields: Fields, where: Slice) -> Iterator[Document | SetAside]:
    """The documents of a file of text."""
    if not fields.separator:
        yield _whole(file, fields)
        return
    for piece in lines.lines_of(file, where, fields.max_document, fields.separator.encode()):
        if piece.data is None or (piece.data and not piece.data.isspace()):
            yield _document(piece, file, fields)


def cut(file: InputFile, fields: Fields, target: int) -> list[Slice]:
    """Slices of about ``target`` bytes of text, if a separator makes documents of the file's pieces."""
    return lines.cut(file, fields, target) if fields.separator else [WHOLE]


def _whole(file: InputFile, fields: Fields) -> Document | SetAside:
    held: list[bytes] = []
    size = 0
    try:
        with contextlib.closing(streams.blocks(Path(file.path), file.compression)) as stream:
            for block in stream:
                size += len(block)
                if size <= fields.max_document + len(BOM) or not held:
                    held.append(block)
    except BrokenStream as error:
        begin = excerpt(held[0]) if held else ""
        return SetAside(0, f"broken off after {size:,} bytes: {error}", 0, begin, damage=True)
    data = b"".join(held)
    whole = Line(0, 0, data.removeprefix(BOM) if len(data) == size else None, data[:HEAD_BYTES], size)
    return _document(whole, file, fields)


def _document(piece: Line, file: InputFile, fields: Fields) -> Document | SetAside:
    """The document of a piece of text; number 0 is the whole file."""
    data = piece.data
    if data is None or len(data) > fields.max_document:
        reason = f"text has {piece.size:,} bytes, more than --max-document {fields.max_document:,}"
        return SetAside(piece.number, reason, piece.offset, excerpt(piece.head or data or b""))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return SetAside(piece.number, f"invalid UTF-8 at byte {error.start:,}", piece.offset, excerpt(data))
    folder = file.name.rpartition("/")[0]
    kept = (None,) * len(fields.keep)
    name = content_id(text) if piece.number else file.name
    return Document(name, text, folder or file.name, piece.offset, piece.number, kept)
