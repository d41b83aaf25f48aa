"""Selectors without a scan of text: ids, expressions over document columns, repeated chunks.

Ids: chunk ids read nothing, document ids the keys of all documents.

Expressions, such as ``source = 'news' and (year >= 2020 or license is null)``:

- Operators are ``= != < <= > >=``, ``like`` (``%`` and ``_``), ``in (...)``, ``is [not] null``, ``and``,
  ``or``, ``not`` and parentheses.
- A column is compared as text with ``'text'``, and as a number with a number; other values are then null. As
  in SQL, a comparison with null, also negated, selects nothing.
- They are parsed here rather than by a database, so they can reach nothing but columns.
- Cost: reading the columns of all documents.

Repeated chunks (``--duplicates``) have exactly the same tokens as a chunk with a lower id.

- Not compared: purged and erased chunks, values of key-value records, and chunks of fewer than ``shortest``
  tokens, because unrelated documents end in the same few tokens.
- Cost: all tokens are read and hashed (BLAKE2b-128), and ``chunk.hash_partitions`` compares the hashes: 0.6
  to 1 µs per chunk, and the sort. Memory: about 80 bytes times ``rows``, 8,192 chunks, and 8 bytes per
  duplicate. Scratch: 24 bytes per chunk beyond ``rows`` chunks, in the system's temporary folder.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import hash_partitions
from retrotool.chunk.chunk_plan import chunks_of
from retrotool.chunk.chunker import id_hash
from retrotool.engine.task import Report
from retrotool.errors import UsageError
from retrotool.purge.selectors.selector import GivenValue
from retrotool.store import parts
from retrotool.store.parts import Chunks, Ids, parse_id, split_id
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d+)?)|(?P<comparison><=|>=|!=|<>|=|<|>)|(?P<mark>[(),])"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_.-]*)|\"(?P<quoted>[^\"]+)\")"
)
_COMPARE = {
    "=": pc.equal, "!=": pc.not_equal, "<>": pc.not_equal, "<": pc.less, "<=": pc.less_equal,
    ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
_KEYWORDS = ("and", "or", "not", "in", "is", "null", "like")
_DEPTH = 50
_HIDDEN = ("key", "text_hash", "first_row")
_ADVICE = "Write for example: --where \"source = 'news' and (year >= 2020 or license is null)\""


class Where:
    """A parsed expression; ``columns`` are the names it uses. ``UsageError`` for a syntax error."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._tokens = _tokenize(expression)
        self._table: Any = None
        self._place = self._depth = 0
        self.columns = sorted({text for kind, text, _ in self._tokens if kind == "column"})
        if not self._tokens:
            raise UsageError("--where: the expression is empty", _ADVICE)
        if not self.columns:
            raise UsageError(f"--where: {expression!r} names no column", _ADVICE)

    def check(self, names: Sequence[str]) -> None:
        """Raise ``UsageError`` if a column is not among ``names``, or the expression is malformed."""
        known = [name for name in names if name not in _HIDDEN]
        for column in self.columns:
            if column not in known:
                raise UsageError(
                    f"--where: documents have no column {column!r}; they have: {', '.join(known)}", _ADVICE
                )
        self.mask(pa.table({name: pa.array([], pa.string()) for name in self.columns}))

    def mask(self, table: pa.Table) -> pa.Array:
        """Return which rows match: boolean, without nulls."""
        self._table, self._place, self._depth = table, 0, 0
        result = self._either()
        if self._place < len(self._tokens):
            raise self._error("the end")
        return pc.fill_null(result, False)

    def _either(self) -> Any:
        return self._joined("or", pc.or_kleene, lambda: self._joined("and", pc.and_kleene, self._one))

    def _joined(self, kind: str, join: Callable[[Any, Any], Any], operand: Callable[[], Any]) -> Any:
        result = operand()
        while self._accept(kind):
            result = join(result, operand())
        return result

    def _one(self) -> Any:
        self._depth += 1
        if self._depth > _DEPTH:
            raise self._error(f"a nesting of at most {_DEPTH}")
        if self._accept("not"):
            result = pc.invert(self._one())
        elif self._accept("("):
            result = self._either()
            self._next("')'", ")")
        else:
            result = self._comparison()
        self._depth -= 1
        return result

    def _comparison(self) -> Any:
        column = self._table[self._next("a column", "column")]
        if self._accept("is"):
            negative = self._accept("not")
            self._next("null", "null")
            return column.is_valid() if negative else column.is_null()
        negative = self._accept("not")
        if self._accept("in"):
            self._next("'('", "(")
            result = self._joined(",", pc.or_kleene, lambda: _compare(column, "=", self._literal()))
            self._next("')'", ")")
        elif self._accept("like"):
            pattern = self._next("a text in '...'", "text")
            result = pc.match_like(column.cast(pa.string()), pattern[1:-1].replace("''", "'"))
        elif negative:
            raise self._error("in or like")
        else:
            result = _compare(column, self._next("a comparison", "comparison"), self._literal())
        return pc.invert(result) if negative else result

    def _literal(self) -> str | float:
        text = self._next("a number, or a text in '...'", "number", "text")
        return text[1:-1].replace("''", "'") if text[0] == "'" else float(text)

    def _next(self, wanted: str, *kinds: str) -> str:
        if not any(map(self._accept, kinds)):
            raise self._error(wanted)
        return self._tokens[self._place - 1][1]

    def _accept(self, kind: str) -> bool:
        """Take the next token if it is of a kind, and return whether it was."""
        accepted = self._place < len(self._tokens) and self._tokens[self._place][0] == kind
        self._place += accepted
        return accepted

    def _error(self, wanted: str) -> UsageError:
        at = self._tokens[self._place][2] if self._place < len(self._tokens) else len(self._expression)
        return UsageError(f"--where: expected {wanted} at character {at + 1}", _ADVICE)


def _tokenize(expression: str) -> list[tuple[str, str, int]]:
    """Return (kind, text, offset) of each token; the kind of a keyword or mark is its text."""
    tokens = []
    place = 0
    while rest := expression[place:].lstrip():
        match = _TOKEN.match(expression, place)
        place = len(expression) - len(rest)
        if match is None:
            raise UsageError(f"--where: unexpected character {place + 1}", _ADVICE)
        kind, text = str(match.lastgroup), match[str(match.lastgroup)]
        if kind in ("word", "quoted"):
            kind = text.lower() if kind == "word" and text.lower() in _KEYWORDS else "column"
        tokens.append((text if kind == "mark" else kind, text, place))
        place = match.end()
    return tokens


def _compare(column: Any, operator: str, value: str | float) -> Any:
    if isinstance(value, str):
        return _COMPARE[operator](column.cast(pa.string()), value)
    numbers = column
    if pa.types.is_string(column.type):
        numeric = pc.match_substring_regex(column, r"^\s*-?\d+(\.\d+)?([eE][-+]?\d+)?\s*$")
        numbers = pc.if_else(numeric, pc.utf8_trim_whitespace(column), None)
    return _COMPARE[operator](numbers.cast(pa.float64()), value)


SHORTEST = 8
"""The least number of tokens of a duplicate."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A selector that is looked up.

    ``kind`` is "chunk" or "document", with ids as ``values``; "where", with one expression; or "duplicates",
    without values.
    """

    kind: str
    values: tuple[GivenValue, ...] = ()

    def literal(self) -> dict[str, Any]:
        """Return its values, as JSON."""
        return {"values": [value.text for value in self.values]}

    def select(self, store: Store, *, missing_ok: bool, report: Report) -> Ids:
        """Return chunk ids, ascending; ``UsageError`` for unknown ids, but of documents if ``missing_ok``."""
        if self.kind == "chunk":
            return select_ids(store, self.values)
        if self.kind == "document":
            return select_documents(store, self.values, missing_ok=missing_ok, report=report)
        if self.kind == "duplicates":
            return select_duplicates(store, report)
        return select_where(store, self.values[0].text, report)


def select_ids(store: Store, values: Sequence[GivenValue]) -> Ids:
    """Parse chunk ids; ``UsageError`` names the first that is not a chunk of the store."""
    found = []
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.all_parts()}
    for value in values:
        text = value.text.strip()
        if (chunk := parse_id(text)) is None:
            raise value.error(f"{text[:40]!r} is not a chunk id")
        part, row = split_id(chunk)
        if row >= sizes.get(part, 0):
            raise value.error(f"the store has no chunk {text}")
        found.append(chunk)
    return np.unique(np.array(found, np.int64))


def select_documents(
    store: Store, names: Sequence[GivenValue], *, missing_ok: bool = False, report: Report = lambda _: None
) -> Ids:
    """Return the chunks of documents, given by id; ``UsageError`` names the first unknown one."""
    wanted = {name.text: name for name in reversed(names)}
    keys = pa.array(map(id_hash, wanted), pa.binary())
    seen = np.zeros(len(keys), np.bool_)
    found: list[Ids] = []
    for part in store.state.all_parts():
        place = pc.index_in(parts.read_documents(store, part, ["key"])["key"].cast(pa.binary()), value_set=keys)
        hit = place.is_valid()
        seen[place.filter(hit).to_numpy()] = True
        found.append(chunks_of(store, part, np.flatnonzero(hit.to_numpy())))
        report(1)
    if not (seen.all() or missing_ok):
        unknown = {text for text, is_known in zip(wanted, seen, strict=True) if not is_known}
        name = next(name for name in names if name.text in unknown)
        others = f", nor {len(unknown) - 1:,} more of these" if len(unknown) > 1 else ""
        raise name.error(
            f"the store has no document {name.text[:100]!r}{others}",
            "Nothing was purged. Leave out unknown ids and run the command again.",
        )
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def select_where(store: Store, expression: str, report: Report = lambda _: None) -> Ids:
    """Return the chunks of the documents for which an expression over their columns is true."""
    where = Where(expression)
    found: list[Ids] = []
    files = (parts.part_entry(store, "documents", part) for part in store.state.all_parts())
    names = (parts.read_parquet(store, entry, row_groups=[]).schema.names for entry in files)
    where.check(list(dict.fromkeys(itertools.chain.from_iterable(names))))
    for part in store.state.all_parts():
        table = parts.read_documents(store, part)
        for column in where.columns:
            if column not in table.schema.names:  # only in other parts
                table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        mask = pc.and_(where.mask(table), table["id"].is_valid())  # erased documents have no id
        found.append(chunks_of(store, part, np.flatnonzero(mask.to_numpy())))
        report(1)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def select_duplicates(
    store: Store, report: Report = lambda _: None, *, shortest: int = SHORTEST, rows: int = hash_partitions.ROWS
) -> Ids:
    """Return the chunks that repeat an earlier one, int64, ascending; calls ``report`` with 1 per part.

    ``rows``: how many hashes are held in memory. ``StorageError`` if the scratch file does not fit on the
    disk.
    """
    tombstones = read_tombstones(store)
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.all_parts()}
    with hash_partitions.HashPartitions(sum(sizes.values()), rows) as partitions:
        for part, total in sizes.items():
            purged = tombstones.rows(part)
            for first in range(0, total, parts.ROW_GROUP):
                chunks = parts.read_chunks(store, part, [first // parts.ROW_GROUP])
                wanted = (chunks.n_tokens >= shortest) & chunks.key
                low, high = np.searchsorted(purged, [first, first + len(chunks)])
                wanted[purged[low:high] - first] = False
                of_block = np.flatnonzero(wanted)
                places = parts.chunk_ids(part, first + of_block)
                partitions.add(hash_partitions.records_of(token_hashes(chunks, of_block), places))
            report(1)
        found = list(partitions.repeats())
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def token_hashes(chunks: Chunks, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Hash the tokens of some rows [r], without padding, with BLAKE2b-128: [r, 2]."""
    data = chunks.tokens.tobytes()
    width = chunks.tokens.shape[1] * chunks.tokens.itemsize
    begin = rows * width
    end = begin + chunks.n_tokens[rows] * chunks.tokens.itemsize
    hashed = [
        hashlib.blake2b(data[low:high], digest_size=parts.HASH_BYTES).digest()
        for low, high in zip(begin.tolist(), end.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashed), ">u8").reshape(-1, 2).astype(np.uint64)
