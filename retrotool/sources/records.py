"""What a source gives: documents and rejected rows; and where in a row they are found."""

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
TOKEN_BYTES = 4
"""What a token id counts against ``Fields.max_document``."""
EXCERPT_CHARACTERS = 120
_MOST_COLUMNS_NAMED = 12
_QUOTED = re.compile(r"""(?<!\w)[bu]?(?:(['"`]).*\1|['"`].*)""")


@dataclass(frozen=True, slots=True)
class Fields:
    """How rows are read.

    ``text``, ``id`` and ``keep`` name fields; a dotted name leads into objects, unless a field has the whole name.
    With ``key`` and ``value`` (both or none) a row is a key-value record and ``text`` is not read. ``tokens`` names the
    field of token ids in rows that are tokenised already. ``separator`` cuts ``.txt`` files into documents.
    ``token_dtype`` and ``end_of_document`` describe plain token files. ``max_document`` is in bytes of UTF-8: what is
    longer is rejected.
    """

    text: str = "text"
    id: str = "id"
    keep: tuple[str, ...] = ()
    key: str | None = None
    value: str | None = None
    tokens: str | None = None
    separator: str | None = None
    token_dtype: str | None = None
    end_of_document: int | None = None
    max_document: int = MAX_DOCUMENT_BYTES

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
        """The settings that decide which documents the rows of an input of format ``base`` are, without compression.

        Two runs for which they differ read the same bytes as different inputs. What is kept beside a document, and
        the limit on its size, change nothing about which document a row is; neither is among them.
        """
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
    """One document.

    ``position`` is the byte offset of its line in the (decompressed) input, or its row from 1 (``inputs.IN_BYTES`` has
    the formats with offsets). ``line`` is its line or row from 1, relative to the range read. ``value`` is there for a
    key-value record, whose key is ``text``; ``tokens`` (a 1-d integer array) for one that is tokenised already, whose
    ``text`` is empty.
    """

    id: str
    text: str
    source: str
    position: int
    line: int
    kept: tuple[str | None, ...] = ()
    value: str | None = None
    tokens: npt.NDArray[Any] | None = None


class Rejected(NamedTuple):
    """A row that is not chunked.

    ``line`` is its line or row from 1, relative to the range read (0: the whole file); ``offset`` the byte offset of
    its line in the (decompressed) input, -1 where rows have none. ``damage``: the file is broken here, and what
    followed is lost until it is repaired. What the input says stands in ``excerpt`` alone, as an erase leaves reasons.
    """

    line: int
    reason: str
    offset: int = -1
    excerpt: str = ""
    damage: bool = False


class BadRow(Exception):  # noqa: N818 - it is a verdict about a row, not a failure
    """Why a row is no document; with an excerpt where another one than the row's beginning shows it."""

    def __init__(self, reason: str, excerpt: str = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def excerpt(data: bytes | str) -> str:
    """The beginning of a row, safe to print: control characters and broken UTF-8 escaped."""
    text = data[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace") if isinstance(data, bytes) else data
    text = text[:EXCERPT_CHARACTERS]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason_of(error: BaseException) -> str:
    """What a library's exception says, in a line, without what it quotes: that may be of the input."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start:,}"
    return _QUOTED.sub("…", (str(error).splitlines() or [""])[0])


def no_column(name: str | None, there: int) -> str:
    """The reason where a column is not ``there`` among so many."""
    return f"no column {name!r} among {there:,}"


def column_names(names: Sequence[str]) -> str:
    """The first columns of a table, or fields of a row, as an excerpt: without a header they are a row's values."""
    return excerpt(", ".join(names[:_MOST_COLUMNS_NAMED]) + (", ..." if len(names) > _MOST_COLUMNS_NAMED else ""))


def content_hash(text: str, value: str | None = None, tokens: npt.NDArray[Any] | None = None) -> bytes:
    """BLAKE2b-128 of what a document says, whatever its id.

    Of a text its UTF-8; of a key-value record the length of the key in characters, a space, the key and the value; of
    one that came as tokens these as little-endian uint32.
    """
    if tokens is not None:
        return hashlib.blake2b(tokens.astype("<u4", copy=False).data, digest_size=16).digest()
    said = text if value is None else f"{len(text)} {text}{value}"
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field, None if there is none; ``a.b`` is field b of the object in field a."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for step in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value


Maker = Callable[[Mapping[str, Any], int, int, int], Document | Rejected]
"""From a row, its line, position and offset to a document, or why it is none."""


def maker(fields: Fields, source: str) -> Maker:
    """``document_of`` for rows of one input; quick for what most rows are: a text and an id, nothing kept."""
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
    """A rejected row with its beginning as excerpt, unless it has one; a document as it is."""
    if isinstance(found, Document) or found.excerpt:
        return found
    return found._replace(excerpt=excerpt(beginning))


def document_of(
    row: Mapping[str, Any], fields: Fields, source: str, line: int, position: int, offset: int = -1
) -> Document | Rejected:
    """Make a document of a row, or say why not."""
    try:
        return _document(row, fields, source, line, position)
    except BadRow as bad:
        return Rejected(line, str(bad), offset, bad.excerpt)


def _document(row: Mapping[str, Any], fields: Fields, source: str, line: int, position: int) -> Document:
    tokens = value = None
    if fields.tokens is not None:
        text = ""
        tokens = _tokens(row, fields.tokens, fields.max_document)
    elif fields.key is not None and fields.value is not None:
        text = _text(row, fields.key, fields.max_document)
        value = _text(row, fields.value, fields.max_document)
    else:
        text = _text(row, fields.text, fields.max_document)
    given = find(row, fields.id)
    if given is None:
        identifier = content_hash(text, value, tokens).hex()
    elif isinstance(given, str) and given:
        identifier = given
    elif isinstance(given, int) and not isinstance(given, bool):
        identifier = str(given)
    else:
        raise BadRow(f"{fields.id!r} is neither a string nor a whole number")
    own = row.get("source")
    try:
        kept = tuple(as_text(find(row, name)) for name in fields.keep) if fields.keep else ()
    except (TypeError, ValueError) as error:
        raise BadRow(f"a kept field can't be written: {reason_of(error)}") from error
    return Document(identifier, text, own if isinstance(own, str) else source, position, line, kept, value, tokens)


def _text(row: Mapping[str, Any], name: str, limit: int) -> str:
    text = find(row, name)
    if isinstance(text, str) and text:
        # A character has up to four bytes: only long texts must be measured.
        if len(text) * 4 > limit and (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
            raise BadRow(f"{name!r} has {size:,} bytes, more than --max-document {limit:,}")
        return text
    if text is None:
        raise _no_value(row, name)
    raise BadRow(f"{name!r} is empty" if text == "" else f"{name!r} is not a string")


def _no_value(row: Mapping[str, Any], name: str) -> BadRow:
    return BadRow(f"{name!r} is null") if name in row else BadRow(f"no field {name!r}", column_names(list(row)))


def too_many_tokens(name: str, count: int, limit: int) -> str | None:
    """Why a field with so many token ids is over the limit, or None."""
    if count * TOKEN_BYTES <= limit:
        return None
    return f"{name!r} has {count * TOKEN_BYTES:,} bytes of token ids, more than --max-document {limit:,}"


def _tokens(row: Mapping[str, Any], name: str, limit: int) -> npt.NDArray[Any]:
    values = find(row, name)
    if values is None:
        raise _no_value(row, name)
    if isinstance(values, list) and (too_many := too_many_tokens(name, len(values), limit)):
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


def as_text(value: Any) -> str | None:
    """A kept value as its column holds it: strings as they are, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value, default=str).decode()
