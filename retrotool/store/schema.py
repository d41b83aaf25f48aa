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
from collections.abc import Callable, Iterable, Sequence
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
    """A value does not fit; the message begins with the path to it."""


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
        _check([value], spec, "")
    except _UnfitError as error:
        raise CorruptError(f"{where}: {error}") from None


def _is_deep(value: Any) -> bool:
    """Return whether JSON is nested too deep. orjson refuses 255 levels, five times as fast as a loop."""
    for _ in range(254 - DEEPEST):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


def _check(values: Sequence[Any], spec: Spec, path: str) -> None:
    if not values:
        return
    if isinstance(spec, Maybe):
        _check([value for value in values if value is not None], spec.spec, path)
        return
    if isinstance(spec, FunctionType):
        _chosen(values, spec, path)
        return
    types, fits, due = _demands(spec)
    if not (types.issuperset(map(type, values)) and (fits is None or all(map(fits, values)))):
        found = next(one for one in values if type(one) not in types or (fits is not None and not fits(one)))
        shown = _shown(found)
        shown = shown if len(shown) < 80 else f"{shown[:80]}…"
        raise _UnfitError(f"{path.lstrip('.') or 'it'} is {shown}, not {due}")
    if inner := _INNER.get(type(spec)):
        inner(values, spec, path)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return orjson.dumps(value).decode()


def _demands(spec: Spec) -> tuple[frozenset[type], Callable[[Any], object] | None, str]:
    """Return the types of values that fit, a test that they pass (None: none), and what they are called."""
    match spec:
        case range():
            return _INT, spec.__contains__, f"an integer from {spec.start} to {spec.stop - 1}"
        case re.Pattern():
            return _STR, spec.fullmatch, f"text of the form {spec.pattern}"
        case frozenset():
            return frozenset(map(type, spec)), spec.__contains__, f"one of {', '.join(map(str, sorted(spec)))}"
        case list():
            return _LIST, None, "a list"
        case tuple():
            return _LIST, lambda value: len(value) == len(spec), f"a list of {len(spec)}"
        case dict() | Keyed():
            return _DICT, None, "an object"
    return _TYPES[spec]


def _each(values: Sequence[Any], spec: list[Spec], path: str) -> None:
    inner = list(chain.from_iterable(values))
    _inside(values, inner, spec[0], path, range(len(inner)))


def _so_many(values: Sequence[Any], spec: tuple[Spec, ...], path: str) -> None:
    for place, one in enumerate(spec):
        _check(list(map(itemgetter(place), values)), one, f"{path}[{place}]")


def _fields(values: Sequence[Any], spec: dict[Any, Spec], path: str) -> None:
    for name, one in spec.items():
        if type(name) is not str:
            _named(values, name, one, path)
        elif name[-1] == "?":
            key = name[:-1]
            _check([value[key] for value in values if key in value], one, f"{path}.{key}")
        else:
            try:
                found = list(map(itemgetter(name), values))
            except KeyError:
                raise _UnfitError(f"{path}.{name} is missing".lstrip(".")) from None
            _check(found, one, f"{path}.{name}")


def _named(values: Sequence[dict[str, Any]], names: re.Pattern[str], spec: Spec, path: str) -> None:
    keys = list(chain.from_iterable(values))
    _check(keys, names, f"{path} (a name)")
    _inside(values, list(chain.from_iterable(map(dict.values, values))), spec, path, keys)


def _keyed(values: Sequence[Any], spec: Keyed, path: str) -> None:
    for value in values:
        alike: dict[str, dict[str, Any]] = {}
        for key, one in value.items():
            head, colon, _ = key.partition(":")
            alike.setdefault(head + colon, {})[key] = one
        for head in alike.keys() & spec.specs.keys():
            _named([alike[head]], spec.names, spec.specs[head], path)


def _inside(outer: Sequence[Any], inner: list[Any], spec: Spec, path: str, names: Iterable[object]) -> None:
    """Check the items of lists or objects; if one does not fit, check them one by one to name its place."""
    try:
        _check(inner, spec, path)
    except _UnfitError:
        for name, one in zip(names, inner, strict=True) if len(outer) == 1 else ():
            _check([one], spec, f"{path}[{name}]")
        raise


def _chosen(values: Sequence[Any], spec: Callable[[Any], Spec], path: str) -> None:
    chosen: dict[int, tuple[Spec, list[Any]]] = {}
    for value in values:
        one = spec(value)
        chosen.setdefault(id(one), (one, []))[1].append(value)
    for one, some in chosen.values():
        _check(some, one, path)


_INT, _STR, _LIST, _DICT = frozenset((int,)), frozenset((str,)), frozenset((list,)), frozenset((dict,))
_TYPES: dict[type, tuple[frozenset[type], Callable[[Any], object] | None, str]] = {
    str: (_STR, None, "text"),
    bool: (frozenset((bool,)), None, "true or false"),
    float: (frozenset((int, float)), math.isfinite, "a number"),
}
_INNER: dict[type, Callable[[Sequence[Any], Any, str], None]] = {
    list: _each, tuple: _so_many, dict: _fields, Keyed: _keyed,
}  # fmt: skip
