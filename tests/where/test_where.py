"""``--where``: expressions mean what a naive reading says, and nothing but columns can be reached from them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from retrotool import api
from retrotool.errors import UsageError
from retrotool.sources import Fields
from retrotool.store.expressions import Where

SCHEMA = pa.schema([("a", pa.string()), ("b-c.d", pa.string()), ("odd name", pa.string()), ("n", pa.int64())])
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<>": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
NUMBER = re.compile(r"\s*-?\d+(\.\d+)?([eE][-+]?\d+)?\s*", re.ASCII)
Row = dict[str, Any]


@dataclass
class Expression:
    """A text, and what it says of a row; ``binding`` is 0 for what needs no parentheses, 1 for and, 2 for or."""

    text: str
    holds: Callable[[Row], bool]
    binding: int = 0

    def within(self, binding: int) -> str:
        return f"({self.text})" if self.binding > binding else self.text


def negated(truth: bool | None) -> bool | None:
    return None if truth is None else not truth


def every(truths: list[bool | None]) -> bool | None:
    return False if False in truths else None if None in truths else True


def some(truths: list[bool | None]) -> bool | None:
    return negated(every([negated(truth) for truth in truths]))


def compare(value: Any, name: str, literal: str | float) -> bool | None:
    """Text with text, numbers with numbers; of a null, or what is no number, nothing is known."""
    if value is None:
        return None
    if isinstance(literal, str):
        return OPERATORS[name](str(value), literal)
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        return None
    return OPERATORS[name](float(value), literal)


def like(value: Any, pattern: str) -> bool | None:
    regex = "".join({"%": ".*", "_": "."}.get(c, re.escape(c)) for c in pattern)
    return None if value is None else re.fullmatch(regex, str(value), re.DOTALL) is not None


def quote(literal: str | float) -> str:
    return "'" + literal.replace("'", "''") + "'" if isinstance(literal, str) else str(literal)


def spell(draw: st.DrawFn, word: str) -> str:
    return draw(st.sampled_from([word, word.upper(), word.title()]))


words = st.sampled_from(
    ["", "x", "X", "it's", "10", "9", "-3.5", " 7 ", "1e2", "1e999", "a%b", "aab", "é", "10x", "inf"]
)
values = st.none() | words | st.text("ax%_'1 \n", max_size=4)
numbers = st.integers(-12, 12) | st.sampled_from([2.5, -3.5, 100.0, 0.1])
literals = words | st.text("ax%_'1 \n", max_size=4) | numbers
rows = st.lists(
    st.fixed_dictionaries(
        {"a": values, "b-c.d": values, "odd name": values, "n": st.none() | st.integers(-12, 2**40)}
    ),
    max_size=8,
)  # fmt: skip


@st.composite
def comparisons(draw: st.DrawFn) -> Expression:
    name = draw(st.sampled_from(SCHEMA.names))
    column = f'"{name}"' if " " in name or draw(st.booleans()) else name
    kind = draw(st.sampled_from(["compare", "in", "like", "null"]))
    negative = kind != "compare" and draw(st.booleans())
    no = spell(draw, "not") + " " if negative else ""
    if kind == "compare":
        sign, literal = draw(st.sampled_from(list(OPERATORS))), draw(literals)
        blank = draw(st.sampled_from(["", " ", " \n\t"]))
        return Expression(
            f"{column}{blank}{sign}{blank}{quote(literal)}", lambda row: compare(row[name], sign, literal)
        )
    if kind == "null":
        text = f"{column} {spell(draw, 'is')} {no}{spell(draw, 'null')}"
        return Expression(text, lambda row: (row[name] is None) != negative)
    if kind == "like":
        pattern = draw(literals.filter(lambda literal: isinstance(literal, str)))
        text = f"{column} {no}{spell(draw, 'like')} {quote(pattern)}"
        return Expression(text, lambda row: negated(like(row[name], pattern)) if negative else like(row[name], pattern))
    choices = draw(st.lists(literals, min_size=1, max_size=4))
    text = f"{column} {no}{spell(draw, 'in')} ({', '.join(map(quote, choices))})"

    def holds(row: dict[str, Any]) -> bool | None:
        found = some([compare(row[name], "=", choice) for choice in choices])
        return negated(found) if negative else found

    return Expression(text, holds)


def all_of(parts: list[Expression]) -> Expression:
    return Expression(
        " and ".join(part.within(1) for part in parts), lambda row: every([p.holds(row) for p in parts]), 1
    )


def any_of(parts: list[Expression]) -> Expression:
    return Expression(" OR ".join(part.text for part in parts), lambda row: some([p.holds(row) for p in parts]), 2)


def combined(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        inner.map(lambda part: Expression(f"not {part.within(0)}", lambda row: negated(part.holds(row)))),
        inner.map(lambda part: Expression(f"({part.text})", part.holds)),
        several.map(all_of),
        several.map(any_of),
    )


@given(st.recursive(comparisons(), combined, max_leaves=8), rows)
def test_an_expression_matches_the_rows_that_a_naive_reading_matches(expression, rows):
    where = Where(expression.text)
    where.check(SCHEMA.names)
    found = where.mask(pa.Table.from_pylist(rows, SCHEMA)).to_pylist()
    assert found == [bool(expression.holds(row)) for row in rows], expression.text


TABLE = pa.table({"a": ["x", None, "5", "é'"], "n": pa.array([1, None, 5, 100], pa.int64())})


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a = 'x'", [1, 0, 0, 0]),
        ("a != 'x'", [0, 0, 1, 1]),  # a null matches nothing
        ("not a = 'x'", [0, 0, 1, 1]),  # nor does its negation
        ("a not in ('x')", [0, 0, 1, 1]),
        ("not a > 2", [0, 0, 0, 0]),  # only '5' is a number
        ("a = 'x' or not a is null", [1, 0, 1, 1]),
        ("a is null", [0, 1, 0, 0]),
        ("a = 5", [0, 0, 1, 0]),
        ("a = '5.0'", [0, 0, 0, 0]),
        ("a = 5.0", [0, 0, 1, 0]),
        ("n > 5", [0, 0, 0, 1]),
        ("n > '5'", [0, 0, 0, 0]),  # as text, '100' is less than '5'
        ("a = 'é'''", [0, 0, 0, 1]),
        ("a = 'x' or a = '5' and n = 1", [1, 0, 0, 0]),  # and binds closer than or
        ("(a = 'x' or a = '5') and n = 1", [1, 0, 0, 0]),
        ("a='x'or n=5and n>-1", [1, 0, 1, 0]),
    ],
)
def test_text_numbers_nulls_and_precedence(expression, expected):
    assert Where(expression).mask(TABLE).to_pylist() == [bool(hit) for hit in expected]


ERRORS = [
    ("a", 2), ("a =", 4), ("a = ", 5), ("  = a", 3), ("(a = 1", 7), ("a = 1)", 6), ("a = 1 n = 2", 7), ("a = 1,", 6),
    ("a in 'x'", 6), ("a in ()", 7), ("a in ('x' 'y')", 11), ("a in ('x',)", 11), ("a in ('x'", 10),
    ("a is x", 6), ("a is not 5", 10), ("a like 5", 8), ("a not = 5", 7), ("a not null", 7), ("a and n", 3),
    ("not and a", 5), ("a = 1 or", 9), ("a = 1 or or n = 1", 10), ("a = 1 and (n = 2 or", 20), ("a = n", 5),
    ("a = 'x", 5), ("a = 'it's'", 10), ('a = "x"', 5), ("a = x", 5), ("a == 1", 4), ("a = 1e5", 6), ("a = 1.5.2", 8),
    ("a = .5", 5), ("a = +5", 5), ("a = $1", 5), ("a = ;", 5), ("a =   ;", 7), ("a = `x`", 5), ("a = 1 \0", 7),
    ("a = 'é' é", 9), ('"a = 1', 1), ('a = 1 or "" = 1', 10),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "character"), ERRORS, ids=[text for text, _ in ERRORS])
def test_errors_name_the_character(expression, character):
    with pytest.raises(UsageError, match=rf"character {character}\b") as error:
        Where(expression).mask(TABLE)
    assert "--where" in error.value.advice


@pytest.mark.parametrize("expression", ["", "   ", "1 = 1", "'a' = 'a'", "()", "not", "null is null"])
def test_an_expression_must_name_a_column(expression):
    with pytest.raises(UsageError, match=r"is empty|names no column"):
        Where(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "a = 'x'; drop table documents",
        "a = 'x' -- and nothing else",
        "a = 'x' /* and */ or 1 = 1",
        "a = 'x' or 1 = 1",
        "a = 'x' or true",
        "a = (select secret from store)",
        "a = 'x' union select 1",
        "read_text('/etc/passwd') = 'x'",
        "a = read_text('/etc/passwd')",
        "a in (select id from 'other.parquet')",
        "'/etc/passwd' = a",
        "a.b.c.__class__ = 'x'",
        "__import__('os').system('true') = 0",
        "a = 'x' or exists(a)",
        "pg_sleep(10) = 0",
    ],
)
def test_nothing_but_columns_can_be_reached(expression):
    with pytest.raises(UsageError):
        where = Where(expression)
        where.check(TABLE.column_names)
        where.mask(TABLE)


@pytest.mark.parametrize("column", ["key", "text_hash", "first_row", "missing", "A"])
def test_columns_that_are_not_there_are_named_with_those_that_are(column):
    with pytest.raises(UsageError, match=f"no column '{column}'; they have: id, source$"):
        Where(f"{column} = 'x'").check(["id", "key", "text_hash", "source", "first_row"])


@pytest.mark.parametrize("deep", ["(" * 9000 + "a = 1" + ")" * 9000, "not " * 9000 + "a = 1"])
def test_too_deep_an_expression_is_an_error_of_ours(deep):
    with pytest.raises(UsageError, match="character"):
        Where(deep).mask(TABLE)


def test_nesting_and_length_have_room():
    assert Where("not (" * 20 + "n = 5" + ")" * 20).mask(TABLE).to_pylist() == [False, False, True, False]
    assert Where(" or ".join(f"n = {i}" for i in range(3000))).mask(TABLE).to_pylist() == [True, False, True, True]


def test_a_column_that_only_some_parts_have_is_null_in_the_others(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", make_rows(4))
    second = write_jsonl(tmp_path / "second.jsonl", make_rows(3, first=4))
    api.chunk(tmp_path / "store", [str(first)])
    api.chunk(tmp_path / "store", [str(second)], fields=Fields(keep=("year",)))

    def documents(expression: str) -> int:
        return api.purge(tmp_path / "store", api.Selectors(where=expression), reason="test", dry_run=True).documents

    assert documents("year >= 2000") == 3
    assert documents("year is null") == 4
    assert documents("year is null and source = 'a'") == 2
    assert documents("year = 2005 or id = 'doc-0'") == 2
    with pytest.raises(UsageError, match="no column 'years'"):
        documents("years = 2000")
