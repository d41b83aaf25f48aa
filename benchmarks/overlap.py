"""Measure longest common runs of tokens in pairs per second, compared with difflib.

    python benchmarks/overlap.py STORE [--pairs 200000]

Pairs are chunks of STORE, each with another chunk and its continuation. STORE is not changed.
"""

from __future__ import annotations

import argparse
import time
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from machine import describe

from retrotool.neighbours.retrieved import read_pieces
from retrotool.neighbours.token_overlap import longest_common
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

FEW = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--pairs", type=int, default=200_000)
    arguments = parser.parse_args()
    print(describe())
    store = Store.open(arguments.store)
    rng = np.random.default_rng(0)
    ids = np.concatenate([(part << 32) + np.arange(parts_rows(store, part)) for part in store.state.parts()])
    some = rng.choice(ids, (2, arguments.pairs))
    start = time.perf_counter()
    one, other = (read_pieces(store, read_tombstones(store), np.sort(which)) for which in some)
    seconds = time.perf_counter() - start
    print(f"pieces read: {2 * arguments.pairs / seconds:,.0f} a second, in the order of their ids")
    joined, counts = other.joined()
    start = time.perf_counter()
    found = longest_common(one.tokens[:, 0], one.n_tokens[:, 0], joined, counts)
    rate = arguments.pairs / (time.perf_counter() - start)
    pairs = [(one.tokens[i, 0, : one.n_tokens[i, 0]].tolist(), joined[i, : counts[i]].tolist()) for i in range(FEW)]
    start = time.perf_counter()
    true = [SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size for a, b in pairs]
    plain = FEW / (time.perf_counter() - start)
    assert true == found.length[:FEW].tolist()
    print(f"longest common runs: {rate:,.0f} pairs a second on one core; difflib {plain:,.0f}: {rate / plain:.0f} x")


def parts_rows(store: Store, part: int) -> int:
    entry = store.state.part_file("chunks", part)
    return 0 if entry is None else entry.rows


if __name__ == "__main__":
    main()
