"""The longest run of tokens that two pieces of text have in common, for many pairs at once.

It is the longest common substring *s* of a chunk and a neighbour with its continuation, by whose share |s| / 64 RETRO
tells apart what a model has learnt from what it has copied (arXiv 2112.04426, section 2.6). Exact: for every way to lay
the shorter piece along the longer one (a diagonal), the tokens that agree are the bits of a word, and the longest run
of ones in a word is found in 6 steps, as ``x & x >> 1`` leaves the runs one shorter.

Cost: one comparison for each token of one and of the other piece, 64 × 191 for chunks of 64 and pieces of 128; some
100,000 pairs a second and core. Memory: ``_BLOCK`` pairs at a time, 12 kB each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]
Lengths = npt.NDArray[np.int64]

_BLOCK = 256
_WORD = 64
_STEPS = (32, 16, 8, 4, 2, 1)
_NO_TOKEN, _NO_OTHER = -1, -2
"""In place of what is no token: they equal nothing, each other neither."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of each pair the common run's ``length``, and where it ``start``s in the one and the ``other``, all int64 [n].

    Of several runs of that length one is named. Where nothing is common all are 0.
    """

    length: Lengths
    start: Lengths
    other: Lengths


def longest_common(one: Tokens, n_one: Lengths, other: Tokens, n_other: Lengths) -> Overlap:
    """Longest common runs of tokens of ``one`` [n, w ≤ 64] and ``other`` [n, m], of which so many count in each row."""
    if one.shape[1] > _WORD:
        raise ValueError(f"pieces of {one.shape[1]} tokens; a word has {_WORD} bits")
    n, width = one.shape
    found = Overlap(*(np.zeros(n, np.int64) for _ in range(3)))
    for low in range(0, n, _BLOCK):
        some = slice(low, low + _BLOCK)
        left = np.where(np.arange(width) < n_one[some, None], one[some].astype(np.int32), _NO_TOKEN)
        bits = _agreement(left, other[some].astype(np.int32), n_other[some])
        length, diagonal, start = _longest_run(bits)
        found.length[some], found.start[some] = length, start
        found.other[some] = np.where(length > 0, diagonal - (width - 1) + start, 0)
    return found


def _agreement(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32], n_other: Lengths) -> npt.NDArray[np.uint64]:
    """Words [n, m + w − 1]: bit i of word d tells whether token i of the one is token d − (w − 1) + i of the other."""
    n, width = one.shape
    m = other.shape[1]
    wide = np.full((n, m + 2 * (width - 1)), _NO_OTHER, np.int32)
    wide[:, width - 1 : width - 1 + m] = np.where(np.arange(m) < n_other[:, None], other, _NO_OTHER)
    laid = np.lib.stride_tricks.sliding_window_view(wide, width, axis=1)
    same = np.zeros((n, laid.shape[1], _WORD), np.bool_)
    np.equal(laid, one[:, None], out=same[:, :, :width])
    return np.packbits(same, axis=2, bitorder="little").view("<u8")[:, :, 0]


def _longest_run(words: npt.NDArray[np.uint64]) -> tuple[Lengths, Lengths, Lengths]:
    """For each row of words [n, d] the longest run of ones in one of them: its length, the word, the first bit."""
    runs = {1: words}  # bit i of runs[k]: k ones begin at i
    for step in (1, 2, 4, 8, 16):
        runs[2 * step] = runs[step] & (runs[step] >> np.uint64(step))
    whole = runs[32] & (runs[32] >> np.uint64(32))
    length = np.zeros(len(words), np.int64)
    current = np.full_like(words, ~np.uint64(0))
    for step in _STEPS:
        # Where current has a bit, ``length`` ones begin; are there ``step`` more behind them?
        shift = length.astype(np.uint64)[:, None]
        longer = current & np.where(shift < _WORD, runs[step] >> np.minimum(shift, np.uint64(_WORD - 1)), np.uint64(0))
        some: npt.NDArray[np.bool_] = np.any(longer, axis=1)
        current = np.where(some[:, None], longer, current)
        length += step * some
    full: npt.NDArray[np.bool_] = np.any(whole, axis=1)
    current = np.where(full[:, None], whole, current)
    length = np.where(full, _WORD, length)
    word = (current != 0).argmax(axis=1)
    chosen = current[np.arange(len(words)), word]
    first = np.log2((chosen & (~chosen + np.uint64(1))).astype(np.float64), where=length > 0, out=np.zeros(len(words)))
    return length, np.where(length > 0, word, 0), np.where(length > 0, first, 0).astype(np.int64)
