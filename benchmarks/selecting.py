"""Measure the search of a store for copies of chunks, evaluation text and duplicates, on one core.

    python benchmarks/selecting.py STORE [--given 1 100 10000] [--evaluation STORE] [--planted 5000]

Copies are searched of this many chunks of STORE, drawn at random and consecutive. Blocks are read as
``purge`` reads them; STORE is not changed. Seconds are CPU time, so other load on the machine counts little.
Text counts as 250 bytes per chunk, though none is decoded.

``--planted``: this many full chunks of real text are planted between two other real texts: verbatim, starting
1 to 63 tokens into a chunk, and with one of 64 tokens changed. Prints the share of these places, and of the
chunks with 16 or more of their tokens, that are selected.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from machine import describe

from retrotool.purge.selectors.contaminates import Contaminates
from retrotool.purge.selectors.copies import NearDuplicates
from retrotool.purge.selectors.lookup import select_duplicates
from retrotool.purge.selectors.selector import Decoder, Matcher, TextBlock, text_blocks
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store

CHUNK_BYTES = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--given", type=int, nargs="*", default=[1, 100, 10_000])
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--planted", type=int, default=5000)
    arguments = parser.parse_args()
    print(describe())
    store = Store.open(arguments.store)
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    ids = np.concatenate([parts.chunk_ids(part, np.arange(rows)) for part, rows in sizes.items()])
    print(f"{len(ids):,} chunks in {len(sizes)} parts")
    rng = np.random.default_rng(0)
    scan(store, None, "read only")
    for number in arguments.given:
        first = int(rng.integers(max(len(ids) - number, 0) + 1))
        drawn = {"drawn at random": rng.choice(ids, min(number, len(ids)), replace=False)}
        if number > 1:
            drawn["in a row"] = ids[first : first + number]
        for how, given in drawn.items():
            start = time.process_time()
            matcher = NearDuplicates(tuple(given.tolist())).open(store)
            name = f"near duplicates of {number:,} {how}"
            print(f"{name}: prepared in {time.process_time() - start:.2f} s")
            found = scan(store, matcher, name)
            assert np.isin(given, found).all(), "each is a copy of itself"
    if arguments.evaluation is not None:
        start = time.process_time()
        contaminated = Contaminates(str(arguments.evaluation)).open(store)
        print(f"evaluation text: prepared in {time.process_time() - start:.2f} s")
        scan(store, contaminated, "evaluation text")
    planted(store, arguments.planted)
    start = time.process_time()
    duplicates = select_duplicates(store)
    report("duplicates, with reading", len(ids), time.process_time() - start)
    print(f"  {len(duplicates):,} chunks selected")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB")


def planted(store: Store, number: int) -> None:
    rng = np.random.default_rng(1)
    part = max(store.state.parts(), key=lambda one: parts.part_entry(store, "chunks", one).rows)
    chunks = parts.read_chunks(store, part)
    length = chunks.tokens.shape[1]
    drawn = rng.choice(np.flatnonzero(chunks.n_tokens == length), 3 * number, replace=False).reshape(3, -1)
    before, given, after = (chunks.tokens[rows] for rows in drawn)
    matcher = NearDuplicates(tuple(parts.chunk_ids(part, drawn[1]).tolist())).open(store)
    for name, most, changed in (
        ("verbatim", 1, False),
        ("shifted", length, False),
        ("shifted, one changed", length, True),
    ):
        shift = rng.integers(0 if most == 1 else 1, most, number)
        copies = given.copy()
        if changed:
            copies[np.arange(number), rng.integers(0, length, number)] ^= 1
        # Three chunks per document: the end of a real one, the copy, and the beginning of another real one.
        table = np.zeros((number, 3 * length), chunks.tokens.dtype)
        for row, by in enumerate(shift.tolist()):
            table[row, :by], table[row, by : by + length] = before[row, :by], copies[row]
            table[row, by + length : by + 2 * length] = after[row]
        full = np.full(3 * number, length, np.int32)
        full[2::3] = shift
        doc, index = np.divmod(np.arange(3 * number, dtype=np.int32), np.int32(3))
        some = Chunks(0, doc, index, full, table.reshape(-1, length), np.ones(3 * number, np.bool_))
        block = TextBlock(some, 0, np.arange(0, 3 * number + 1, 3), Decoder(store))
        found = np.zeros(3 * number, np.bool_)
        found[matcher(block).rows] = True
        held = np.stack([length - shift, shift, np.zeros_like(shift)], axis=1).ravel()
        places = found.reshape(-1, 3)[:, :2].any(axis=1).mean()
        print(f"planted, {name}: {places:.2%} of {number:,} places, {found[held >= 16].mean():.2%} of their chunks")


def scan(store: Store, matcher: Matcher | None, name: str) -> np.ndarray:
    """Scan all blocks, print the time of reading and matching, and return the ids found."""
    decoder = Decoder(store)
    chunks, reading, matching = 0, 0.0, 0.0
    found = [np.zeros(0, np.int64)]
    for part in store.state.parts():
        start = time.process_time()
        for block in text_blocks(store, decoder, part):
            middle = time.process_time()
            if matcher is not None:
                found.append(parts.chunk_ids(part, block.first + matcher(block).rows))
            end = time.process_time()
            reading, matching, chunks = reading + middle - start, matching + end - middle, chunks + len(block)
            start = end
    selected = np.unique(np.concatenate(found))
    report(f"{name}, with reading", chunks, reading + matching)
    if matcher is not None:
        report(f"{name}, without", chunks, matching)
        print(f"  {len(selected):,} chunks selected")
    return selected


def report(name: str, chunks: int, seconds: float) -> None:
    print(f"  {name}: {chunks / seconds:,.0f} chunks/s, {chunks * CHUNK_BYTES / seconds / 1e6:,.0f} MB/s of text")


if __name__ == "__main__":
    main()
