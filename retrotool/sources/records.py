"""What a source gives: documents, and rows set aside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

MAX_ROW_BYTES = 64 << 20
"""A longer line or text is set aside."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Where in a row to find what: the text, the id, and the fields to keep as columns."""

    text: str = "text"
    id: str = "id"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One document. ``position`` is the byte offset of its line in the (decompressed) input, or its row from 1.

    ``line`` is its line or row from 1, relative to the range read.
    """

    id: str
    text: str
    source: str
    position: int
    line: int
    kept: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that is not chunked; ``line`` is its line or row from 1, relative to the range read (0: the whole file)."""

    line: int
    reason: str


def content_id(text: str) -> str:
    """The id of a document that came without: BLAKE2b-128 of its text in UTF-8, so equal wherever the text is."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def document_of(row: Mapping[str, Any], fields: Fields, source: str, line: int, position: int) -> Document | SetAside:
    """Make a document of a row, or say why not."""
    text = row.get(fields.text)
    if text is None:
        reason = f"{fields.text!r} is null" if fields.text in row else f"no field {fields.text!r}"
        return SetAside(line, reason)
    if not isinstance(text, str):
        return SetAside(line, f"{fields.text!r} is not a string")
    if not text:
        return SetAside(line, f"{fields.text!r} is empty")
    if len(text) > MAX_ROW_BYTES:
        return SetAside(line, f"text of {len(text):,} characters, more than {MAX_ROW_BYTES:,}")
    given = row.get(fields.id)
    if given is None:
        identifier = content_id(text)
    elif isinstance(given, str) and given:
        identifier = given
    elif isinstance(given, int) and not isinstance(given, bool):
        identifier = str(given)
    else:
        return SetAside(line, f"{fields.id!r} is neither a string nor a whole number")
    own = row.get("source")
    try:
        kept = tuple(_as_text(row.get(name)) for name in fields.keep)
    except (TypeError, ValueError) as error:
        return SetAside(line, f"a kept field can't be written: {error}")
    return Document(identifier, text, own if isinstance(own, str) else source, position, line, kept)


def _as_text(value: Any) -> str | None:
    """A kept value as its column holds it: strings as they are, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value, default=str).decode()
