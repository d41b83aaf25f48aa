"""Expressions over document columns, such as ``source = 'news' and (year >= 2020 or license is null)``.

Comparisons (``= != < <= > >=``), ``like`` (``%`` and ``_``), ``in (...)``, ``is [not] null``, ``and``, ``or``,
``not``, parentheses. A column is compared as text with ``'text'`` and as a number with a number; values that are no
number are then null. As in SQL, a comparison with a null is neither true nor false, and so is its ``not``: it selects
nothing. It is parsed here rather than handed to a database because nothing but
columns must be reachable from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrotool.errors import UsageError

_TOKEN = re.compile(
    r"(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d+)?)|(?P<operator><=|>=|!=|<>|=|<|>|\(|\)|,)"
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
    """A parsed expression; ``columns`` are the names it uses. ``UsageError`` says where it can't be read."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._tokens = _tokenize(expression)
        self._place = 0
        self._table: pa.Table | None = None
        self.columns = sorted({text for kind, text, _ in self._tokens if kind == "column"})
        if not self._tokens:
            raise UsageError("the expression is empty", _ADVICE)
        if not self.columns:
            raise UsageError(f"the expression {expression!r} names no column", _ADVICE)

    def check(self, names: Sequence[str]) -> None:
        """``UsageError`` if a column is not among ``names``, or the expression is malformed."""
        known = [name for name in names if name not in _HIDDEN]
        for column in self.columns:
            if column not in known:
                raise UsageError(f"documents have no column {column!r}; they have: {', '.join(known)}", _ADVICE)
        self.mask(pa.table({name: pa.array([], pa.string()) for name in self.columns}))

    def mask(self, table: pa.Table) -> pa.Array:
        """Which rows match: boolean, without nulls."""
        self._table, self._place, self._depth = table, 0, 0
        result = self._either()
        if self._place < len(self._tokens):
            raise self._error("the end")
        return pc.fill_null(result, False)

    def _either(self) -> Any:
        result = self._both()
        while self._accept("or"):
            result = pc.or_kleene(result, self._both())
        return result

    def _both(self) -> Any:
        result = self._one()
        while self._accept("and"):
            result = pc.and_kleene(result, self._one())
        return result

    def _one(self) -> Any:
        self._depth += 1
        if self._depth > _DEPTH:
            raise self._error(f"a nesting of at most {_DEPTH}")
        try:
            return self._nested()
        finally:
            self._depth -= 1

    def _nested(self) -> Any:
        if self._accept("not"):
            return pc.invert(self._one())
        if self._accept("("):
            result = self._either()
            if not self._accept(")"):
                raise self._error("')'")
            return result
        return self._comparison()

    def _comparison(self) -> Any:
        kind, name, _ = self._next("a column")
        if kind != "column" or self._table is None:
            self._place -= 1
            raise self._error("a column")
        column = self._table[name]
        if self._accept("is"):
            negative = self._accept("not")
            if not self._accept("null"):
                raise self._error("null")
            return column.is_valid() if negative else column.is_null()
        negative = self._accept("not")
        if self._accept("in"):
            result = self._in(column)
        elif self._accept("like"):
            result = pc.match_like(column.cast(pa.string()), self._literal(str))
        elif negative:
            raise self._error("in or like")
        else:
            kind, operator, _ = self._next("a comparison")
            if operator not in _COMPARE or kind != "operator":
                self._place -= 1
                raise self._error("a comparison")
            result = _compare(column, operator, self._literal())
        return pc.invert(result) if negative else result

    def _in(self, column: Any) -> Any:
        if not self._accept("("):
            raise self._error("'('")
        result = _compare(column, "=", self._literal())
        while self._accept(","):
            result = pc.or_kleene(result, _compare(column, "=", self._literal()))
        if not self._accept(")"):
            raise self._error("')'")
        return result

    def _literal(self, *kinds: type) -> str | float:
        kind, text, _ = self._next("a value")
        if kind == "text":
            return text[1:-1].replace("''", "'")
        if kind == "number" and str not in kinds:
            return float(text)
        self._place -= 1
        raise self._error("a text in '...'" if kinds else "a number, or a text in '...'")

    def _next(self, wanted: str) -> tuple[str, str, int]:
        if self._place >= len(self._tokens):
            raise self._error(wanted)
        self._place += 1
        return self._tokens[self._place - 1]

    def _accept(self, word: str) -> bool:
        """Whether the next token is this keyword or operator, which is then taken."""
        accepted = self._place < len(self._tokens) and self._tokens[self._place][:2] in (
            ("keyword", word), ("operator", word),
        )  # fmt: skip
        self._place += accepted
        return accepted

    def _error(self, wanted: str) -> UsageError:
        at = self._tokens[self._place][2] if self._place < len(self._tokens) else len(self._expression)
        return UsageError(f"the expression breaks at character {at + 1}: {wanted} was expected", _ADVICE)


def _tokenize(expression: str) -> list[tuple[str, str, int]]:
    """(kind, text, offset) of each token."""
    tokens = []
    place = 0
    while expression[place:].strip():
        place += len(expression[place:]) - len(expression[place:].lstrip())
        match = _TOKEN.match(expression, place)
        if match is None:
            raise UsageError(f"the expression can't be read at character {place + 1}", _ADVICE)
        kind, text = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "word":
            kind, text = ("keyword", text.lower()) if text.lower() in _KEYWORDS else ("column", text)
        tokens.append(("column" if kind == "quoted" else kind, text, place))
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
