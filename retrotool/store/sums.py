"""Checksums of blocks, so that reading a few rows of a large mapped file notices a flipped bit.

Beside every embeddings and index file is one with the suffix ``.xxh3``: the XXH3-64 of each 16 KiB of the
file, as little-endian uint64. A process checks a block on its first access (``retrotool.store.vectors``);
later ones cost a bitmap lookup. Parquet pages have their own checksums. The log has only the SHA-256 of the
whole file, which ``verify`` checks.

Cost with 16 KiB blocks (``benchmarks/block_sums.py``): 3 µs for the first row of a block, and 0.05 % of the
file's size. Smaller blocks cost more per byte; larger ones make the first row slower.
"""

from __future__ import annotations

import sys
from array import array

import xxhash

SUMS = ".xxh3"
BLOCK = 1 << 14
SUM_DTYPE = "<u8"
_SUMMED = (".npy", ".faiss")
sum_of = xxhash.xxh3_64_intdigest


def has_sums(path: str) -> bool:
    """Return whether the file has block sums beside it."""
    return path.endswith(_SUMMED)


def with_sums(path: str) -> tuple[str, ...]:
    """Return the path of a file, and that of its sums if it has some."""
    return (path, path + SUMS) if has_sums(path) else (path,)


def without_sums(path: str) -> str:
    """Return the file's path for the path of its sums, and any other path unchanged."""
    own = path.removesuffix(SUMS)
    return own if has_sums(own) else path


def size_of_sums(size: int) -> int:
    """Return the size of the sums of a file of ``size`` bytes."""
    return 8 * -(-size // BLOCK)


class BlockSums:
    """Computes the sums of a file while it is written."""

    def __init__(self) -> None:
        self._sums = array("Q")
        self._begun = bytearray()  # less than a block

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        start = -len(self._begun) % BLOCK
        self._begun += data[:start]
        if len(self._begun) == BLOCK:
            self._close()
        stop = start + (len(data) - start) // BLOCK * BLOCK
        self._sums.extend(sum_of(data[place : place + BLOCK]) for place in range(start, stop, BLOCK))
        self._begun += data[max(start, stop) :]

    def _close(self) -> None:
        self._sums.append(sum_of(self._begun))
        self._begun.clear()

    def content(self) -> bytes:
        """Return the sums, after the last bytes were added."""
        if self._begun:
            self._close()
        if sys.byteorder == "big":
            self._sums.byteswap()
        return self._sums.tobytes()
