"""Find common runs of tokens in many pairs of texts at once.

The longest common substring *s* of a chunk and a neighbour with its continuation is RETRO's measure of
copying, |s| / 64 (arXiv 2112.04426, section 2.6). The search is exact: for every alignment of the two pieces
(a diagonal), equal tokens are the bits of a word, and ``x & x >> 1`` shortens each run of ones by one.

Cost: about 100,000 pairs per second and core. If only a threshold matters, hashes of short runs, which have
false positives but no false negatives, decide most pairs, seven times as fast. Memory: 12 kB for each of
``_BLOCK`` pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.ranges import in_steps
from retrotool.store.store import Store, check_compatible

Tokens = npt.NDArray[np.integer]
Lengths = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Hashes = npt.NDArray[np.uint32]

GRAM = 8  # tokens of the short runs by which near copies are detected
COPIED = 0.5  # share of a chunk's distinct short runs that a near copy has at least

LONGEST = 64  # tokens of the longest chunks that can be compared: one bit of a word each
_BLOCK = 256
_NO_TOKEN, _NO_OTHER = -1, -2  # padding, which is equal to no token, and not to each other
HASH_BITS, _TABLE_BITS = 32, 12  # of a hash, and of those the ones that are looked up
# Random odd numbers to multiply by.
_ODD = np.array([0x9E3779B1, 0xD6E8FEB7, 0xA0761D65, 0xE7037ED1, 0x8EBC6AF1, 0x589965CD, 0x1D8E4E27, 0xEB44ACCB], "<u4")


@dataclass(frozen=True, slots=True)
class Overlap:
    """For each pair, the common run's ``length`` and its start in both pieces, int64 [n]; 0: none."""

    length: Lengths
    start: Lengths
    other: Lengths


def check_comparable(one: Store, other: Store, advice: str, if_too_long: str = "") -> None:
    """Raise ``UsageError``, with advice, unless chunks of two stores can be compared token by token."""
    check_compatible(one, other, "their tokens can't be compared", advice, lengths=False)
    length = one.identity.chunk_length
    if length > LONGEST:
        raise UsageError(f"{one.place} has chunks of {length} tokens; at most {LONGEST} can be compared", if_too_long)


def longest_common(one: Tokens, n_one: Lengths, other: Tokens, n_other: Lengths) -> Overlap:
    """Find the longest common runs of ``one`` [n, w ≤ 64] and ``other`` [n, m], without their padding."""
    if one.shape[1] > LONGEST:
        raise ValueError(f"pieces of {one.shape[1]} tokens; a word has {LONGEST} bits")
    n, width = one.shape
    found = Overlap(*(np.zeros(n, np.int64) for _ in range(3)))
    for some in _blocks(n):
        bits = _agreement(one[some], n_one[some], other[some], n_other[some])
        length, diagonal, start = _longest_run(bits)
        found.length[some], found.start[some] = length, start
        found.other[some] = np.where(length > 0, diagonal - (width - 1) + start, 0)
    return found


def has_longer_run(one: Tokens, n_one: Lengths, other: Tokens, n_other: Lengths, run: int) -> npt.NDArray[np.bool_]:
    """Return which pairs, as in ``longest_common``, share a run of more than ``run`` tokens, bool [n]."""
    gram = next(size for size in (8, 4, 2, 1) if size <= max(run, 1))
    found = np.zeros(len(one), np.bool_)
    for some in _blocks(len(one)):
        hits = _hits(one[some], n_one[some], other[some], n_other[some], gram)
        # A run of ``run`` + 1 tokens has more than ``run`` - ``gram`` short runs that start right after
        # another.
        found[some] = (hits[:, 1:] & hits[:, :-1]).sum(axis=1) > run - gram if run else hits.any(axis=1)
    for rows in in_steps(np.flatnonzero(found), _BLOCK):
        runs = _runs_in(_agreement(one[rows], n_one[rows], other[rows], n_other[rows]), run + 1)
        found[rows] = (runs != 0).any(axis=1)
    return found


def distinct_grams(one: Tokens, n_one: Lengths) -> Words:
    """Return, per chunk [n, w ≤ 64], a word with a bit where a run of ``GRAM`` tokens occurs first."""
    width = one.shape[1]
    found = np.zeros(len(one), np.uint64)
    for some in _blocks(len(one)):
        grams = _runs_in(_agreement(one[some], n_one[some], one[some], n_one[some]), GRAM)
        # On the main diagonal a chunk equals itself; on earlier ones, runs equal runs that came before.
        found[some] = grams[:, width - 1] & ~np.bitwise_or.reduce(grams[:, : width - 1], axis=1)
    return found


def are_near_copies(
    one: Tokens, n_one: Lengths, distinct: Words, other: Tokens, n_other: Lengths
) -> npt.NDArray[np.bool_]:
    """Return which ``other`` [n, m] have ``COPIED`` of the ``distinct_grams`` of ``one``, bool [n]."""
    wanted = np.ceil(_bits(distinct) * COPIED).astype(np.int64)
    found = np.zeros(len(one), np.bool_)
    for some in _blocks(len(one)):
        hits = _hits(one[some], n_one[some], other[some], n_other[some], GRAM).sum(axis=1)
        found[some] = (wanted[some] > 0) & (hits >= wanted[some])
    for rows in in_steps(np.flatnonzero(found), _BLOCK):
        grams = _runs_in(_agreement(one[rows], n_one[rows], other[rows], n_other[rows]), GRAM)
        found[rows] = _bits(np.bitwise_or.reduce(grams, axis=1) & distinct[rows]) >= wanted[rows]
    return found


def _blocks(n: int) -> Iterator[slice]:
    for low in range(0, n, _BLOCK):
        yield slice(low, min(low + _BLOCK, n))


def _hits(one: Tokens, n_one: Lengths, other: Tokens, n_other: Lengths, gram: int) -> npt.NDArray[np.bool_]:
    """Return where in ``other`` runs of ``gram`` tokens start that ``one`` may have, [n, m − gram + 1]."""
    row = np.arange(len(one), dtype=np.int32)[:, None] << _TABLE_BITS
    shift = np.uint32(HASH_BITS - _TABLE_BITS)
    held, asked = (row + (gram_hashes(tokens, gram) >> shift).astype(np.int32) for tokens in (one, other))
    table = np.zeros(len(one) << _TABLE_BITS, np.bool_)
    table[held[np.arange(held.shape[1]) <= n_one[:, None] - gram]] = True
    hits: npt.NDArray[np.bool_] = table[asked]
    hits &= np.arange(asked.shape[1]) <= n_other[:, None] - gram
    return hits


def gram_hashes(tokens: Tokens, n: int) -> Hashes:
    """Hash the ``n`` tokens from each position on, uint32 [..., t − n + 1] (empty if there are fewer)."""
    length = tokens.shape[-1]
    power: Hashes = tokens.astype(np.uint32) * _ODD[0]  # of ``size`` tokens, a power of two
    if length < n:
        return power[..., :0]
    joined: Hashes | None = None
    have, size = 0, 1
    while True:
        if n & size:
            # Another factor than in the powers: else swapping the halves of a gram would not change its hash.
            joined = power if joined is None else _followed(joined, power[..., have:], _ODD[7])
            have += size
        if 2 * size > n:
            assert joined is not None
            return joined[..., : length - n + 1]
        power = _followed(power, power[..., size:], _ODD[1 + (size.bit_length() - 1) % 6])
        size *= 2


def _followed(one: Hashes, other: Hashes, factor: np.uint32) -> Hashes:
    hashes: Hashes = one[..., : other.shape[-1]] * factor
    hashes += other
    return hashes


def _runs_in(words: Words, length: int) -> Words:
    """Return a bit in each word where ``length`` ones in a row start."""
    if length > LONGEST:
        return np.zeros_like(words)
    size = 1
    while size < length:
        more = min(size, length - size)
        words, size = words & (words >> np.uint64(more)), size + more
    return words


def _bits(words: Words) -> Lengths:
    ones = np.unpackbits(words.astype("<u8").view(np.uint8).reshape(len(words), 8), axis=1)
    return np.asarray(ones.sum(axis=1, dtype=np.int64))


def _agreement(one: Tokens, n_one: Lengths, other: Tokens, n_other: Lengths) -> Words:
    """Return words [n, m + w − 1]: bit i of word d is set if one[i] == other[d − (w − 1) + i]."""
    n, width = one.shape
    m = other.shape[1]
    left = np.where(np.arange(width) < n_one[:, None], one.astype(np.int32), _NO_TOKEN)
    wide = np.full((n, m + 2 * (width - 1)), _NO_OTHER, np.int32)
    wide[:, width - 1 : width - 1 + m] = np.where(np.arange(m) < n_other[:, None], other.astype(np.int32), _NO_OTHER)
    laid = np.lib.stride_tricks.sliding_window_view(wide, width, axis=1)
    same = np.zeros((n, laid.shape[1], LONGEST), np.bool_)
    np.equal(laid, left[:, None], out=same[:, :, :width])
    return np.asarray(np.packbits(same, axis=2, bitorder="little").view("<u8")[:, :, 0])


def _longest_run(words: Words) -> tuple[Lengths, Lengths, Lengths]:
    """Find the longest run of ones in each row of words [n, d]: its length, word and first bit."""
    runs = {1: words}  # bit i of runs[k]: k ones begin at i
    for step in (1, 2, 4, 8, 16):
        runs[2 * step] = runs[step] & (runs[step] >> np.uint64(step))
    length = np.zeros(len(words), np.int64)
    current = np.full_like(words, ~np.uint64(0))
    for step in (32, 16, 8, 4, 2, 1, 1):  # together the bits of a word
        # A bit in current starts ``length`` ones; keep those that are followed by ``step`` more.
        longer = current & (runs[step] >> length.astype(np.uint64)[:, None])
        some: npt.NDArray[np.bool_] = np.any(longer, axis=1)
        current = np.where(some[:, None], longer, current)
        length += step * some
    word = (current != 0).argmax(axis=1)
    chosen = current[np.arange(len(words)), word]
    first = np.log2((chosen & (~chosen + np.uint64(1))).astype(np.float64), where=length > 0, out=np.zeros(len(words)))
    return length, np.where(length > 0, word, 0), np.where(length > 0, first, 0).astype(np.int64)
