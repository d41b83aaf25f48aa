"""Sums of blocks, so that reading a few rows of a large mapped file notices a flipped bit.

Beside every file of embeddings and of an index lies one with the same name and ``.xxh3`` behind it: the XXH3-64 of each
16 KiB of the file, as little-endian uint64. A block is checked when it is first touched, once a process
(``retrotool.store.vectors``); then a look-up in a bitmap is all it costs. Parquet has sums of its own, in its pages.
The SHA-256 of the whole file, which ``verify`` checks, is in the log; the sums of blocks are not.

16 KiB, as measured (``benchmarks/block_sums.py``): a row that is read first costs 3 µs for its block, and the sums are
0.05 % of the file. Smaller blocks cost more by the byte and have more sums, larger ones make the first row dearer.
"""

from __future__ import annotations

import sys
from array import array

import xxhash

SUMS = ".xxh3"
"""What stands behind the name of a file in that of its sums."""
BLOCK = 1 << 14
SUM_DTYPE = "<u8"
_SUMMED = (".npy", ".faiss")


def has_sums(path: str) -> bool:
    """Whether a file has sums beside it."""
    return path.endswith(_SUMMED)


def with_sums(path: str) -> tuple[str, ...]:
    """The path of a file, and that of its sums if it has some."""
    return (path, path + SUMS) if has_sums(path) else (path,)


def without_sums(path: str) -> str:
    """The path of the file that one of sums is beside; any other path as it is."""
    own = path.removesuffix(SUMS)
    return own if has_sums(own) else path


def size_of_sums(size: int) -> int:
    """Bytes of the sums of a file of ``size`` bytes."""
    return 8 * -(-size // BLOCK)


def sum_of(block: memoryview) -> int:
    """The sum of a block."""
    return xxhash.xxh3_64_intdigest(block)


class BlockSums:
    """Makes the sums of a file while it is written."""

    def __init__(self) -> None:
        self._sums = array("Q")
        self._begun = xxhash.xxh3_64()
        self._length = 0

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        start = 0
        while start < len(data):
            piece = data[start : start + BLOCK - self._length]
            start += len(piece)
            if len(piece) == BLOCK:
                self._sums.append(sum_of(piece))
                continue
            self._begun.update(piece)
            self._length += len(piece)
            if self._length == BLOCK:
                self._close()

    def _close(self) -> None:
        self._sums.append(self._begun.intdigest())
        self._begun.reset()
        self._length = 0

    def content(self) -> bytes:
        """The sums, when all was taken in."""
        if self._length:
            self._close()
        if sys.byteorder == "big":
            self._sums.byteswap()
        return self._sums.tobytes()
