"""Documents and rejected rows, and how to find a document in a row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

MAX_DOCUMENT_BYTES = 64 << 20
TOKEN_BYTES = 4  # that a token id counts in ``Fields.max_document``
EXCERPT_CHARACTERS = 120
_MOST_COLUMNS_NAMED = 12
_QUOTED = re.compile(r"""(?<!\w)[bu]?(?:(['"`]).*\1|['"`].*)""")


@dataclass(frozen=True, slots=True)
class Fields:
    """How rows are read. A dotted name is a field of an object, unless a field has the whole name."""

    text: str = "text"
    id: str = "id"
    keep: tuple[str, ...] = ()
    key: str | None = None  # with ``value``: rows are key-value records, and ``text`` is not read
    value: str | None = None
    tokens: str | None = None  # field of token ids in tokenised rows
    separator: str | None = None  # between documents in ``.txt`` files
    token_dtype: str | None = None  # of plain token files
    end_of_document: int | None = None  # in plain token files
    max_document: int = MAX_DOCUMENT_BYTES  # bytes of UTF-8

    @property
    def required(self) -> list[str]:
        """Names of the fields that a row must have."""
        if self.tokens is not None:
            return [self.tokens]
        if self.key is not None and self.value is not None:
            return [self.key, self.value]
        return [self.text]

    @property
    def wanted(self) -> list[str]:
        """Names of the fields that are read, each once."""
        return list(dict.fromkeys([*self.required, self.id, "source", *self.keep]))

    def reading(self, base: str) -> tuple[object, ...]:
        """Return the settings that decide which documents the rows of an input of format ``base`` are."""
        if base == "html":
            return ()
        if base == "txt":
            return ("separator", self.separator or None)
        if base == "tokens":
            return ("token_dtype", self.token_dtype, "end_of_document", self.end_of_document)
        if self.tokens is not None:
            return ("tokens", self.tokens, "id", self.id)
        if self.key is not None:
            return ("key", self.key, "value", self.value, "id", self.id)
        return ("text", self.text, "id", self.id)


class Document(NamedTuple):
    """One document. A key-value record has its key in ``text``; a tokenised document has no ``text``."""

    id: str
    text: str
    source: str
    position: int  # byte offset of its line in the decompressed input (``inputs.IN_BYTES``), or row from 1
    line: int  # line or row in the range read, from 1
    kept: tuple[str | None, ...] = ()
    value: str | None = None
    tokens: npt.NDArray[Any] | None = None  # integers, one-dimensional


class Rejected(NamedTuple):
    """A row that is not chunked. Only ``excerpt`` may quote the input, because an erase keeps reasons."""

    line: int  # line or row in the range read, from 1; 0: the whole file
    reason: str
    offset: int = -1  # byte offset of its line in the decompressed input
    excerpt: str = ""
    damage: bool = False  # the rest of the file is lost until it is repaired


class BadRow(Exception):  # noqa: N818 - about a row, not a failure
    """Why a row is not a document, with an excerpt if the row's beginning does not show it."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def excerpt(data: bytes | str) -> str:
    """Return the beginning of a row with control characters and broken UTF-8 escaped."""
    text = data[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data
    text = text[:EXCERPT_CHARACTERS]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason_of(error: BaseException) -> str:
    """Return the first line of an exception's message, without what it quotes, which may be input."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start:,}"
    return _QUOTED.sub("…", (str(error).splitlines() or [""])[0])


def no_column(name: str | None, there: int) -> str:
    """Return the reason for a missing column of a table with ``there`` columns."""
    return f"no column {name!r} among {there:,}"


def column_names(names: Sequence[str]) -> str:
    """Return the first names as an excerpt: without a header row, they are data."""
    return excerpt(", ".join(names[:_MOST_COLUMNS_NAMED]) + (", ..." if len(names) > _MOST_COLUMNS_NAMED else ""))


def content_hash(text: str, value: str | None = None, tokens: npt.NDArray[Any] | None = None) -> bytes:
    """Return BLAKE2b-128 of a document's content, without its id."""
    if tokens is not None:
        return hashlib.blake2b(tokens.astype("<u4", copy=False).data, digest_size=16).digest()
    content = text if value is None else f"{len(text)} {text}{value}"
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None; ``a.b`` is field b of the object in field a."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for step in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value


def maker(fields: Fields, source: str) -> Callable[[Mapping[str, Any], int, int, int], Document | Rejected]:
    """Return ``document_of`` by row, line, position and offset, with a fast path for texts with ids."""
    text_name, id_name, limit = fields.text, fields.id, fields.max_document // 4
    plain = not fields.keep and fields.key is None and fields.tokens is None and "." not in text_name + id_name

    def make(row: Mapping[str, Any], line: int, position: int, offset: int) -> Document | Rejected:
        if plain:
            text, identifier = row.get(text_name), row.get(id_name)
            if type(identifier) is int:
                identifier = str(identifier)
            if type(text) is str and type(identifier) is str and identifier and 0 < len(text) <= limit:
                own = row.get("source")
                return Document(identifier, text, own if type(own) is str else source, position, line)
        return document_of(row, fields, source, line, position, offset)

    return make


def with_excerpt(found: Document | Rejected, beginning: bytes) -> Document | Rejected:
    """Add the beginning of a rejected row as its excerpt, unless it has one."""
    if isinstance(found, Document) or found.excerpt:
        return found
    return found._replace(excerpt=excerpt(beginning))


def document_of(
    row: Mapping[str, Any], fields: Fields, source: str, line: int, position: int, offset: int = -1
) -> Document | Rejected:
    """Make a document of a row, or reject it."""
    try:
        return _document(row, fields, source, line, position)
    except BadRow as bad:
        return Rejected(line, str(bad), offset, bad.excerpt)


def _document(row: Mapping[str, Any], fields: Fields, source: str, line: int, position: int) -> Document:
    tokens = value = None
    if fields.tokens is not None:
        text, tokens = "", _tokens(row, fields.tokens, fields.max_document)
    elif fields.key is not None and fields.value is not None:
        text, value = (_text(row, name, fields.max_document) for name in fields.required)
    else:
        text = _text(row, fields.text, fields.max_document)
    given = find(row, fields.id)
    if given is None:
        identifier = content_hash(text, value, tokens).hex()
    elif type(given) in (str, int) and given != "":
        identifier = str(given)
    else:
        raise BadRow(f"{fields.id!r} is neither a string nor a whole number")
    own = row.get("source")
    try:
        kept = tuple(_kept(find(row, name)) for name in fields.keep)
    except (TypeError, ValueError) as error:
        raise BadRow(f"a kept field can't be written: {reason_of(error)}") from error
    return Document(identifier, text, own if isinstance(own, str) else source, position, line, kept, value, tokens)


def _text(row: Mapping[str, Any], name: str, limit: int) -> str:
    text = find(row, name)
    if isinstance(text, str) and text:
        # A character has up to four bytes, so short texts need not be measured.
        if len(text) * 4 > limit and (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
            raise BadRow(f"{name!r} has {size:,} bytes, more than --max-document {limit:,}")
        return text
    if text is None:
        raise _no_value(row, name)
    raise BadRow(f"{name!r} is empty" if text == "" else f"{name!r} is not a string")


def _no_value(row: Mapping[str, Any], name: str) -> BadRow:
    return BadRow(f"{name!r} is null") if name in row else BadRow(f"no field {name!r}", column_names(list(row)))


def too_many_tokens(count: int, limit: int) -> str | None:
    """Return why a field with ``count`` token ids is over the limit, or None."""
    if count * TOKEN_BYTES <= limit:
        return None
    return f"{count:,} tokens, {TOKEN_BYTES} bytes each, are more than --max-document {limit:,}"


def _tokens(row: Mapping[str, Any], name: str, limit: int) -> npt.NDArray[Any]:
    values = find(row, name)
    if values is None:
        raise _no_value(row, name)
    if isinstance(values, list) and (too_many := too_many_tokens(len(values), limit)):
        raise BadRow(too_many)
    try:
        tokens = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"{name!r} is not a list of token ids") from error
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise BadRow(f"{name!r} is not a list of token ids")
    if not tokens.size:
        raise BadRow(f"{name!r} is empty")
    if int(tokens.min()) < 0:
        raise BadRow(f"{name!r} has a negative token id")
    return tokens


def _kept(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value, default=str).decode()
