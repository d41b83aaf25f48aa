"""What the JSON in a store must look like. It is checked when it is read, before anything is made of it.

Sums find accidents. Whoever can write the store can write right sums as well, so a file that is not what a *spec* says
is a ``CorruptError`` that names the file and the field, what was found and what is due. Fields that a spec does not
name are ignored: a newer version may have added them. A spec is plain Python:

    str, bool, float            a value of this type; a float is finite, and may be written as an integer
    a range                     an integer in it
    a pattern                   a string that it matches as a whole
    a frozenset                 one of these values
    [spec]                      a list of such
    (spec, spec)                a list of so many
    {"a": spec, "b?": spec}     an object with a field ``a``, and perhaps ``b``
    {pattern: spec}             an object whose fields all have such names, and are such
    Keyed({"a:": spec}, names)  an object; what a field is follows from its name, up to the first colon
    Maybe(spec)                 null, or such
    a function                  what it returns for the value

Values of one place are checked together: the 150,000 files of a checkpoint take 0.1 s. What is written is checked, too
(``log.append``): a store that its own readers refuse would be lost.
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
DEEPEST = 32
"""How deep JSON may be nested: what follows it must not run out of stack."""


@dataclass(frozen=True, slots=True)
class Maybe:
    """Null, or what ``spec`` says."""

    spec: Spec


@dataclass(frozen=True, slots=True)
class Keyed:
    """An object; ``specs`` are those of its fields, by their names up to the first colon, which match ``names``."""

    specs: dict[str, Spec]
    names: re.Pattern[str]


class _UnfitError(ValueError):
    """A value is not ``due``; ``path`` leads to it from where it was caught last."""

    def __init__(self, due: str) -> None:
        super().__init__(due)
        self.path = ""

    def under(self, name: str) -> _UnfitError:
        self.path = name + self.path
        return self


def load(data: bytes, spec: Spec, where: str) -> Any:
    """Parse JSON that must be as ``spec`` says; a ``CorruptError`` names ``where``, and the field."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"{where} is no JSON: {error}") from error
    if data.count(b"{") + data.count(b"[") > DEEPEST and _is_deep(value):
        raise CorruptError(f"{where} is nested more than {DEEPEST} deep")
    check_value(value, spec, where)
    return value


def check_value(value: Any, spec: Spec, where: str) -> None:
    """``CorruptError`` that names ``where``, and the field, if a value is not as ``spec`` says."""
    try:
        _check([value], spec)
    except _UnfitError as error:
        raise CorruptError(f"{where}: {error.path.lstrip('.') or 'it'} {error}") from None


def _is_deep(value: Any) -> bool:
    """Whether JSON is nested too deep: orjson, which refuses more than 254 levels, sees that five times as fast."""
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
    """Say which of some values, not all of which are ``due``, is not."""
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
    """Check what lists or objects hold; what does not fit is looked for again, one by one, to name its place."""
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
