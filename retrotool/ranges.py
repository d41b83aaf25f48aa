"""Ranges of integers as arrays, and as [first, last] for the log; membership in numbers; runs of items."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
T = TypeVar("T")


def positions_within(lengths: Int64s) -> Int64s:
    """Return 0, 1, … length − 1 for each of ``lengths`` [n]: int64 [sum of lengths]."""
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def expand_ranges(starts: Int64s, lengths: Int64s) -> Int64s:
    """Return ``lengths`` [n] consecutive numbers from each of ``starts`` [n] on: int64 [sum of lengths]."""
    return positions_within(lengths) + np.repeat(starts, lengths)


def pairs_of_ranges(first: Int64s, last: Int64s) -> tuple[Int64s, Int64s]:
    """Return the numbers in all ranges [first, last), [r], as (range, number), int64 each."""
    count = last - first
    return np.repeat(np.arange(len(count)), count), expand_ranges(first, count)


def as_slice(numbers: Int64s) -> Int64s | slice:
    """Return ascending ``numbers`` as a slice, which needs no copy, if they are consecutive."""
    is_run = len(numbers) > 0 and int(numbers[-1] - numbers[0]) == len(numbers) - 1
    return slice(int(numbers[0]), int(numbers[-1]) + 1) if is_run else numbers


def in_steps(numbers: Int64s, size: int) -> Iterator[Int64s]:
    """Yield up to ``size`` of ``numbers`` [n] at a time, in order."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def spread(n: int, most: int) -> Int64s:
    """Return up to ``most`` numbers evenly spaced below ``n``, ascending: int64."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def is_in(values: npt.NDArray[Any], ascending: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which of ``values``, of any shape, are in ``ascending`` [n]: bool, by binary search."""
    if not len(ascending):
        return np.zeros(values.shape, np.bool_)
    return np.asarray(ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values)


def consecutive_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Return the ranges [first, last] of consecutive numbers in ascending ``numbers``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def within(spans: Iterable[Sequence[int]], numbers: Iterable[int]) -> set[int]:
    """Return those of ``numbers`` that are in any [first, last] of ``spans``, which may be much longer."""
    ascending, found, low = sorted(numbers), set[int](), 0
    for first, last in sorted(spans, key=tuple):
        low, high = max(low, bisect_left(ascending, first)), bisect_right(ascending, last)
        found.update(ascending[low:high])
        low = max(low, high)
    return found


def runs_up_to(most: int, items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield runs of consecutive items, of up to ``most`` in all by ``size``; a larger item is alone."""
    run, held = list[T](), 0
    for item in items:
        room = size(item)
        if run and held + room > most:
            yield run
            run, held = [], 0
        run.append(item)
        held += room
    if run:
        yield run
