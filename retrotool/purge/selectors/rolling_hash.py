"""Hashes of all n-grams of a run of tokens at once, and which chunks follow one another in such a run.

A hash is made of those of two halves by multiplying and adding, 32 bits wide as processors do many of these at a time:
for n tokens there are log2(n) steps, and one more for every other bit of n. Hashes only say where to look: many grams
share one, so tokens have to be compared where hashes are equal.

Cost: 1 to 2 ns a token if some 64,000 are given at a time, which stay in the cache. Memory: 16 bytes a token.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from retrotool.store.parts import Chunks

Tokens = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]

Number = TypeVar("Number", bound=np.integer[Any])

HASH_BITS = 32
_ODD = np.array([0x9E3779B1, 0xD6E8FEB7, 0xA0761D65, 0xE7037ED1, 0x8EBC6AF1, 0x589965CD, 0x1D8E4E27, 0xEB44ACCB], "<u4")
"""Random odd numbers to multiply by."""


def gram_hashes(tokens: Tokens, n: int) -> Hashes:
    """A hash of the ``n`` tokens from each place on, uint32 [t − n + 1] (none if there are fewer)."""
    if len(tokens) < n:
        return np.zeros(0, np.uint32)
    power: Hashes = tokens.astype(np.uint32) * _ODD[0]  # of ``size`` tokens, a power of two
    joined: Hashes | None = None
    have, size = 0, 1
    while True:
        if n & size:
            # Multiplied by another number than in the powers: else a gram of two halves would hash as these swapped.
            joined = power if joined is None else _followed(joined, power[have:], _ODD[7])
            have += size
        if 2 * size > n:
            assert joined is not None
            hashes: Hashes = joined[: len(tokens) - n + 1]
            return hashes
        power = _followed(power, power[size:], _ODD[1 + (size.bit_length() - 1) % 6])
        size *= 2


def _followed(one: Hashes, other: Hashes, factor: np.uint32) -> Hashes:
    hashes: Hashes = one[: len(other)] * factor
    hashes += other
    return hashes


def follows(chunks: Chunks, n_tokens: npt.NDArray[np.integer]) -> Flags:
    """Which rows [n] are followed by more of the same text, both with tokens: bool [n], the last False.

    A value is not the same text as its key.
    """
    follow = np.zeros(len(chunks), np.bool_)
    follow[:-1] = (chunks.doc[1:] == chunks.doc[:-1]) & (chunks.key[1:] == chunks.key[:-1])
    follow[:-1] &= (n_tokens[1:] > 0) & (n_tokens[:-1] > 0)
    return follow


def reach(n_tokens: npt.NDArray[np.integer], follow: Flags, length: int) -> Ints:
    """How many tokens stand in a row from the first of each chunk on, int64 [n]: full chunks go on in the next one."""
    total = np.cumsum(n_tokens, dtype=np.int64)
    ends = np.flatnonzero(~(follow & (n_tokens == length)))
    last = ends[np.searchsorted(ends, np.arange(len(n_tokens)))]
    tokens: Ints = total[last] - total + n_tokens
    return tokens


def distinct(numbers: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Each number once, ascending: by sorting, which is several times as fast as ``np.unique``, which hashes."""
    numbers = np.sort(numbers)
    new = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return numbers[new]


def distinct_rows(rows: npt.NDArray[np.unsignedinteger]) -> tuple[Ints, Ints]:
    """Of rows [g, n] one of each that differs, and which of these each row equals: places int64 [d] and [g]."""
    padded = np.zeros((len(rows), -(-rows.shape[1] * rows.itemsize // 8) * 8), np.uint8)
    padded[:, : rows.shape[1] * rows.itemsize] = np.ascontiguousarray(rows).view(np.uint8)
    words = padded.view(np.uint64)
    order = np.lexsort(words.T)
    new = np.ones(len(rows), np.bool_)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    which = np.empty(len(rows), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


def ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """The numbers in all of [first, last), [r], one range after another, with the range of each: (range, number)."""
    count = last - first
    of = np.repeat(np.arange(len(count)), count)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count) + first[of]
