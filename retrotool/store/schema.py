"""What the JSON in a store must look like. It is checked when it is read, before it is used.

Checksums find accidents, but a person who can write the store can also write valid checksums. So JSON that
does not match its *spec* is a ``CorruptError`` with the file, the field, what was found and what is expected.
Other fields are ignored: a newer version may have added them. A spec is plain Python:

    str, bool, float            a value of this type; a float is finite, and may be written as an integer
    a range                     an integer in it
    a pattern                   a string that matches it as a whole
    a frozenset                 one of its values
    [spec]                      a list of such values
    (spec, spec)                a list of this length
    {"a": spec, "b?": spec}     an object with a field ``a``, and optionally ``b``
    {pattern: spec}             an object whose field names match the pattern, with such values
    Keyed({"a:": spec}, names)  an object whose field names, up to the first colon, choose the spec
    Maybe(spec)                 null, or such a value
    a function                  the spec it returns for the value

Values in the same place are checked together: the 150,000 files of a checkpoint take 0.1 s. What is written
is checked, too (``log.append``): a store that its own readers refuse would be lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from types import FunctionType
from typing import Any

import orjson

from retrotool.errors import CorruptError

Spec = Any
DEEPEST = 32  # levels of nesting that JSON may have, so that recursion does not run out of stack


@dataclass(frozen=True, slots=True)
class Maybe:
    """Null, or a value that fits ``spec``."""

    spec: Spec


@dataclass(frozen=True, slots=True)
class Keyed:
    """An object whose field names match ``names``; ``specs`` are by field name up to the first colon."""

    specs: dict[str, Spec]
    names: re.Pattern[str]


class _UnfitError(ValueError):
    """A value that is not ``due``; ``path`` leads to it from the place where the error was last caught."""

    def __init__(self, due: str) -> None:
        super().__init__(due)
        self.path = ""

    def under(self, name: str) -> _UnfitError:
        self.path = name + self.path
        return self


def load(data: bytes, spec: Spec, where: str) -> Any:
    """Parse JSON that fits ``spec``, else raise a ``CorruptError`` that names ``where`` and the field."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"{where} is not JSON: {error}") from error
    if data.count(b"{") + data.count(b"[") > DEEPEST and _is_deep(value):
        raise CorruptError(f"{where} is nested more than {DEEPEST} levels deep")
    check_value(value, spec, where)
    return value


def check_value(value: Any, spec: Spec, where: str) -> None:
    """Check that a value fits ``spec``, else raise a ``CorruptError`` that names ``where`` and the field."""
    try:
        _check([value], spec)
    except _UnfitError as error:
        raise CorruptError(f"{where}: {error.path.lstrip('.') or 'it'} {error}") from None


def _is_deep(value: Any) -> bool:
    """Return whether JSON is nested too deep. orjson refuses 255 levels, five times as fast as a loop."""
    for _ in range(254 - DEEPEST):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


def _check(values: Sequence[Any], spec: Spec) -> None:
    if values:
        _CHECKS[type(spec)](values, spec)


def _demand(values: Sequence[Any], types: Collection[type], fits: Callable[[Any], object] | None, due: str) -> None:
    """Raise the error for the first value that does not fit."""
    found = next((one for one in values if type(one) not in types or (fits is not None and not fits(one))), None)
    shown = "a list" if type(found) is list else "an object" if type(found) is dict else orjson.dumps(found).decode()
    raise _UnfitError(f"is {shown if len(shown) < 80 else f'{shown[:80]}…'}, not {due}")


def _plain(values: Sequence[Any], spec: type) -> None:
    types, fits, due = _TYPES[spec]
    if not types.issuperset(map(type, values)) or (fits is not None and not all(map(fits, values))):
        _demand(values, types, fits, due)


def _in_range(values: Sequence[Any], spec: range) -> None:
    if not (_INT.issuperset(map(type, values)) and min(values) in spec and max(values) in spec):
        _demand(values, _INT, spec.__contains__, f"an integer from {spec.start} to {spec.stop - 1}")


def _matching(values: Sequence[Any], spec: re.Pattern[str]) -> None:
    if not (_STR.issuperset(map(type, values)) and all(map(spec.fullmatch, values))):
        _demand(values, _STR, spec.fullmatch, f"text of the form {spec.pattern}")


def _one_of(values: Sequence[Any], spec: frozenset[Any]) -> None:
    types = {type(value) for value in spec}
    if not (types.issuperset(map(type, values)) and spec.issuperset(values)):
        _demand(values, types, spec.__contains__, f"one of {', '.join(map(str, sorted(spec)))}")


def _each(values: Sequence[Any], spec: list[Spec]) -> None:
    if not _LIST.issuperset(map(type, values)):
        _demand(values, _LIST, None, "a list")
    inner = list(chain.from_iterable(values))
    _inside(values, inner, spec[0], range(len(inner)))


def _so_many(values: Sequence[Any], spec: tuple[Spec, ...]) -> None:
    n = len(spec)
    if not (_LIST.issuperset(map(type, values)) and {n}.issuperset(map(len, values))):
        _demand(values, _LIST, lambda value: len(value) == n, f"a list of {n}")
    for place, one in enumerate(spec):
        _at(f"[{place}]", list(map(itemgetter(place), values)), one)


def _fields(values: Sequence[Any], spec: dict[Any, Spec]) -> None:
    if not _DICT.issuperset(map(type, values)):
        _demand(values, _DICT, None, "an object")
    for name, one in spec.items():
        if type(name) is not str:
            _named(values, name, one)
        elif name[-1] == "?":
            key = name[:-1]
            _at(f".{key}", [value[key] for value in values if key in value], one)
        else:
            try:
                found = list(map(itemgetter(name), values))
            except KeyError:
                raise _UnfitError("is missing").under(f".{name}") from None
            _at(f".{name}", found, one)


def _at(name: str, values: Sequence[Any], spec: Spec) -> None:
    try:
        _check(values, spec)
    except _UnfitError as error:
        raise error.under(name) from None


def _named(values: Sequence[dict[str, Any]], names: re.Pattern[str], spec: Spec) -> None:
    keys = list(chain.from_iterable(values))
    _at(" (a name)", keys, names)
    _inside(values, list(chain.from_iterable(map(dict.values, values))), spec, keys)


def _keyed(values: Sequence[Any], spec: Keyed) -> None:
    if not _DICT.issuperset(map(type, values)):
        _demand(values, _DICT, None, "an object")
    for value in values:
        alike: dict[str, dict[str, Any]] = {}
        for key, one in value.items():
            head, colon, _ = key.partition(":")
            alike.setdefault(head + colon, {})[key] = one
        for head in alike.keys() & spec.specs.keys():
            _named([alike[head]], spec.names, spec.specs[head])


def _inside(outer: Sequence[Any], inner: list[Any], spec: Spec, names: Iterable[object]) -> None:
    """Check the items of lists or objects; if one does not fit, check them one by one to name its place."""
    try:
        _check(inner, spec)
    except _UnfitError:
        for name, one in zip(names, inner, strict=True) if len(outer) == 1 else ():
            _at(f"[{name}]", [one], spec)
        raise


def _unless_null(values: Sequence[Any], spec: Maybe) -> None:
    _check([value for value in values if value is not None], spec.spec)


def _chosen(values: Sequence[Any], spec: Callable[[Any], Spec]) -> None:
    chosen: dict[int, tuple[Spec, list[Any]]] = {}
    for value in values:
        one = spec(value)
        chosen.setdefault(id(one), (one, []))[1].append(value)
    for one, some in chosen.values():
        _check(some, one)


_INT, _STR, _LIST, _DICT = frozenset((int,)), frozenset((str,)), frozenset((list,)), frozenset((dict,))
_TYPES: dict[type, tuple[frozenset[type], Callable[[Any], object] | None, str]] = {
    str: (_STR, None, "text"),
    bool: (frozenset((bool,)), None, "true or false"),
    float: (frozenset((int, float)), math.isfinite, "a number"),
}
_CHECKS: dict[type, Callable[[Sequence[Any], Any], None]] = {
    type: _plain, range: _in_range, re.Pattern: _matching, frozenset: _one_of, list: _each, tuple: _so_many,
    dict: _fields, Keyed: _keyed, Maybe: _unless_null, FunctionType: _chosen,
}  # fmt: skip
