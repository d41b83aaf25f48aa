"""Expressions that pick documents by their columns, for ``purge`` and for reading.

They are written like ``source = 'news' and (year >= 2020 or license is null)``.

- Operators are ``= != < <= > >=``, ``like`` (``%`` and ``_``), ``in (...)``, ``is [not] null``, ``and``,
  ``or``, ``not`` and parentheses.
- A column is compared as text with ``'text'``, and as a number with a number; other values are then null. As
  in SQL, a comparison with null, also negated, selects nothing.
- They are parsed here rather than by a database, so they can reach nothing but columns.
- Cost: reading the columns that are named of all documents.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.errors import UsageError, listed
from retrotool.store import parts
from retrotool.store.parts import Bools
from retrotool.store.store import Store

_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d+)?)|(?P<comparison><=|>=|!=|<>|=|<|>)|(?P<mark>[(),])"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_.-]*)|\"(?P<quoted>[^\"]+)\"|(?P<other>\S)"
)
_COMPARE = {
    "=": pc.equal, "!=": pc.not_equal, "<>": pc.not_equal, "<": pc.less, "<=": pc.less_equal,
    ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
_KEYWORDS = ("and", "or", "not", "in", "is", "null", "like")
_DEPTH = 50
_LISTED = 8  # sources that an error names
HIDDEN = ("key", "text_hash", "first_row")
_ADVICE = "Write for example: --where \"source = 'news' and (year >= 2020 or license is null)\""


class Where:
    """A parsed expression; ``columns`` are the names it uses. ``UsageError`` for a syntax error."""

    @classmethod
    def checked(cls, store: Store, expression: str) -> Where:
        """Parse an expression; ``UsageError`` if it is malformed or the store's documents lack a column."""
        found, names = cls(expression), dict[str, None]()
        for part in store.state.all_parts():
            if set(found.columns) <= names.keys():
                break
            names |= dict.fromkeys(parts.read_schema(store, parts.part_entry(store, "documents", part)).names)
        found.check(names)
        return found

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

    def check(self, names: Iterable[str]) -> None:
        """Raise ``UsageError`` if a column is not among ``names``, or the expression is malformed."""
        known = [name for name in names if name not in HIDDEN]
        for column in self.columns:
            if column not in known:
                have = ", ".join(known)
                raise UsageError(f"--where: documents have no column {column!r}; they have: {have}", _ADVICE)
        self.mask(pa.table({}))

    def mask(self, table: pa.Table) -> pa.Array:
        """Return which rows match: boolean, without nulls. Columns that the table lacks are null."""
        for column in self.columns:
            if column not in table.schema.names:  # only in other parts
                table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        self._table, self._place, self._depth = table, 0, 0
        result = self._either()
        if self._place < len(self._tokens):
            raise self._error("the end")
        return pc.fill_null(result, False)

    def rows(self, store: Store, part: int) -> Bools:
        """Read which documents of a part match and are not erased: bool [n]."""
        entry, named = parts.part_entry(store, "documents", part), set(self.columns) - {"id"}
        table = parts.read_parquet(store, entry, ["id"], optional=sorted(named))
        return np.asarray(pc.and_(self.mask(table), table["id"].is_valid()).to_numpy())

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


def with_sources(store: Store, where: str | None, sources: Sequence[str]) -> str | None:
    """Return an expression for documents with any of ``sources`` (empty: all) for which ``where`` is true.

    ``UsageError`` for a source that no document has or had.
    """
    if where is not None:
        Where(where).mask(pa.table({}))  # offsets in errors are those in ``where``
    missing, known = dict.fromkeys(sources), dict[str, None]()
    for part in store.state.parts() if sources else ():
        known |= dict.fromkeys(parts.read_documents(store, part, ["source"])["source"].unique().drop_null().to_pylist())
        if not (missing := {name: None for name in missing if name not in known}):
            break
    if missing:
        have = f"The sources are: {listed(sorted(known)[:_LISTED], len(known))}. " if known else ""
        command = shlex.join(["retrotool", "info", store.place, "--sources"])
        raise UsageError(f"{store.place}: no document has the source {next(iter(missing))!r}", f"{have}List: {command}")
    quoted = ", ".join("'" + source.replace("'", "''") + "'" for source in sources)
    either = [f"source in ({quoted})"] if quoted else []
    return " and ".join([*either, *([f"({where})"] if where is not None else [])]) or None


def _tokenize(expression: str) -> list[tuple[str, str, int]]:
    """Return (kind, text, offset) of each token; the kind of a keyword or mark is its text."""
    tokens = []
    for match in _TOKEN.finditer(expression):
        kind, text = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "other":
            raise UsageError(f"--where: unexpected character {match.start() + 1}", _ADVICE)
        if kind in ("word", "quoted"):
            kind = text.lower() if kind == "word" and text.lower() in _KEYWORDS else "column"
        tokens.append((text if kind == "mark" else kind, text, match.start()))
    return tokens


def _compare(column: Any, operator: str, value: str | float) -> Any:
    if isinstance(value, str):
        return _COMPARE[operator](column.cast(pa.string()), value)
    numbers = column
    if pa.types.is_string(column.type):
        numeric = pc.match_substring_regex(column, r"^\s*-?\d+(\.\d+)?([eE][-+]?\d+)?\s*$")
        numbers = pc.if_else(numeric, pc.utf8_trim_whitespace(column), None)
    return _COMPARE[operator](numbers.cast(pa.float64()), value)
