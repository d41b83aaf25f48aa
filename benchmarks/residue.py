"""How fast a store is searched for what a purge left, with 10,000 needles.

    python benchmarks/residue.py [--megabytes 64] [--needles 10000]

Makes files of random bytes and of words, and needles of all kinds that are not in them, plain and as keyed hashes (of
which as many are made that so many can be kept). Each is searched in two threads, as ``scan`` does. Rates are given
by the clock, and by the time of the processors that it took, which other processes do not change.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe

from retrotool.stages.matching import KINDS, Needles, sampled_heads
from retrotool.stages.residue import scan

LENGTHS = {"tokens": 16, "text": 24, "vector16": 16, "vector32": 32}
SHARES = {"tokens": 0.35, "text": 0.45, "vector16": 0.1, "vector32": 0.095}
FILES = 4


def words(rng: np.random.Generator, size: int) -> bytes:
    """Random words with some punctuation, and an escape in 800 bytes, as JSON of articles has them."""
    known = [rng.integers(97, 123, int(n), np.uint8).tobytes() for n in rng.integers(2, 10, 5_000)]
    known += [b",", b"."] * 200 + [b'", "', b"\\n"] * 40
    text = b" ".join(known[i] for i in rng.integers(0, len(known), size // 5))
    return text[:size]


def needles(rng: np.random.Generator, count: int, kept: Callable[[Needles], Needles]) -> Needles:
    """``count`` needles that ``kept`` leaves, and some ids."""
    found: list[tuple[str, bytes]] = [("id", b"document-%d" % i) for i in range(count // 200)]
    for kind, share in SHARES.items():
        mine: list[tuple[str, bytes]] = []
        while len(mine) < share * count:
            low, high = (97, 123) if kind == "text" else (0, 256)
            drawn = rng.integers(low, high, (4 * count, LENGTHS[kind]), np.uint8)
            some = kept(Needles.plain([(kind, row.tobytes()) for row in drawn]))
            mine += [(KINDS[some.kinds[i]], some.proofs[i]) for i in range(len(some))]
        found += mine[: int(share * count)]
    return Needles.plain(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--needles", type=int, default=10_000)
    arguments = parser.parse_args()
    print(describe())
    rng = np.random.default_rng(0)
    plain = needles(rng, arguments.needles, lambda some: some)
    hashed = needles(rng, arguments.needles, lambda some: some.of(sampled_heads(some))).hashed("00" * 32, b"salt")
    size = arguments.megabytes * 1_000_000 // FILES
    for what in ("random bytes", "words"):
        with tempfile.TemporaryDirectory() as folder:
            for i in range(FILES):
                content = rng.bytes(size) if what == "random bytes" else words(rng, size)
                (Path(folder) / str(i)).write_bytes(content)
            for form, some in (("plain", plain), ("hashed", hashed)):
                clock, processors = time.perf_counter(), time.process_time()
                found = scan(folder, some)
                clock, processors = time.perf_counter() - clock, time.process_time() - processors
                rates = f"{size * FILES / clock / 1e6:,.0f} MB/s, {size * FILES / processors / 1e6:,.0f} MB/s and core"
                print(f"{what:<14} {form:<7} {len(some):,} needles: {rates}; {len(found)} found")


if __name__ == "__main__":
    main()
