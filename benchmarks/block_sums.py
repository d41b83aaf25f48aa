"""Measure the cost of block sums: sequential reads, and warm and cold look-ups of rows.

    python benchmarks/block_sums.py --rows 200000 --dimension 384

Prints a line of JSON per block size. "floor" is numpy on the same mapped file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retrotool.store import sums, vectors
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store


def best_of(rounds: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(store: Store, entry: FileEntry, rows: int, dimension: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    plain = np.asarray(np.load(Path(store.place) / entry.path, mmap_mode="r"))
    wanted = [np.sort(rng.choice(rows, 100, replace=False)) for _ in range(500)]
    cast = np.random.default_rng(1).normal(size=(dimension, 64)).astype(np.float32)

    def coded(matrix: Any) -> None:
        for start in range(0, rows, 8192):
            _ = (matrix[start : start + 8192].astype(np.float32) @ cast).argmin(axis=1)

    opened = vectors.read_vectors(store, entry)
    _ = opened[:]
    part = vectors.read_vectors(store, entry)
    for one in wanted:
        _ = part[one]
    return {
        "block": sums.BLOCK,
        "sequential_floor_s": best_of(rounds, lambda: coded(plain)),
        "sequential_s": best_of(rounds, lambda: coded(vectors.read_vectors(store, entry))),
        "warm_floor_us": 1e6 / 500 * best_of(rounds, lambda: [plain[one] for one in wanted]),
        "warm_us": 1e6 / 500 * best_of(rounds, lambda: [opened[one] for one in wanted]),
        "warm_partly_us": 1e6 / 500 * best_of(rounds, lambda: [part[one] for one in wanted]),
        "cold_row_us": 1e6 * best_of(rounds, lambda: vectors.read_vectors(store, entry)[np.array([rows // 2])]),
        "open_us": 1e6 * best_of(rounds, lambda: vectors.read_vectors(store, entry)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    matrix = np.random.default_rng(2).normal(size=(asked.rows, asked.dimension)).astype(np.float16)
    for block in (1 << 12, 1 << 14, 1 << 16):
        for module in (sums, vectors):
            module.__dict__["BLOCK"] = block
        with tempfile.TemporaryDirectory() as folder:
            store = Store.create(folder, TokenizerIdentity.of("none", b"{}", 1000, False), b"{}", 64)
            entry = vectors.write_vectors(store, FileName.new("0123abcd", "embeddings", "000000", "npy", "m"), matrix)
            found = measure(store, entry, asked.rows, asked.dimension, asked.rounds)
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
