"""How fast a store is searched for copies of chunks, for evaluation text and for duplicates, on one core.

    python benchmarks/selecting.py STORE [--victims 1 100 10000] [--evaluation STORE]

Victims are chunks of STORE, drawn at random, and in a row as those of documents are. Its chunks are read in blocks as
``purge`` reads them; nothing is changed. Seconds are those of the processor, so others that use the machine count
little. Text is counted as 250 bytes a chunk, though none is decoded.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from machine import describe

from retrotool.stages.selectors.base import Matcher
from retrotool.stages.selectors.contaminates import Contaminates
from retrotool.stages.selectors.copies import NearDuplicates
from retrotool.stages.selectors.repeats import select_duplicates
from retrotool.stages.selectors.text import Decoder, blocks_of
from retrotool.store import parts
from retrotool.store.store import Store

CHUNK_BYTES = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--victims", type=int, nargs="*", default=[1, 100, 10_000])
    parser.add_argument("--evaluation", type=Path)
    arguments = parser.parse_args()
    print(describe())
    store = Store.open(arguments.store)
    sizes = {part: parts.part_entry(store, "chunks", part).rows for part in store.state.parts()}
    ids = np.concatenate([parts.chunk_ids(part, np.arange(rows)) for part, rows in sizes.items()])
    print(f"{len(ids):,} chunks in {len(sizes)} parts")
    rng = np.random.default_rng(0)
    scan(store, None, "read only")
    for number in arguments.victims:
        first = int(rng.integers(max(len(ids) - number, 0) + 1))
        drawn = {"drawn at random": rng.choice(ids, min(number, len(ids)), replace=False)}
        if number > 1:
            drawn["in a row"] = ids[first : first + number]
        for how, victims in drawn.items():
            start = time.process_time()
            matcher = NearDuplicates(tuple(victims.tolist())).open(store)
            name = f"near duplicates of {number:,} {how}"
            print(f"{name}: made ready in {time.process_time() - start:.2f} s")
            found = scan(store, matcher, name)
            assert np.isin(victims, found).all(), "each is a copy of itself"
    if arguments.evaluation is not None:
        start = time.process_time()
        contaminated = Contaminates(str(arguments.evaluation)).open(store)
        print(f"evaluation text: made ready in {time.process_time() - start:.2f} s")
        scan(store, contaminated, "evaluation text")
    start = time.process_time()
    duplicates = select_duplicates(store)
    tell("duplicates, with reading", len(ids), time.process_time() - start)
    print(f"  {len(duplicates):,} chunks selected")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB")


def scan(store: Store, matcher: Matcher | None, name: str) -> np.ndarray:
    """Look at all blocks, and print how long reading and matching took; the chunk ids that were found."""
    decoder = Decoder(store)
    chunks, reading, matching = 0, 0.0, 0.0
    found = [np.zeros(0, np.int64)]
    for part in store.state.parts():
        start = time.process_time()
        for block in blocks_of(store, decoder, part):
            middle = time.process_time()
            if matcher is not None:
                found.append(parts.chunk_ids(part, block.first + matcher(block).rows))
            end = time.process_time()
            reading, matching, chunks = reading + middle - start, matching + end - middle, chunks + len(block)
            start = end
    selected = np.unique(np.concatenate(found))
    tell(f"{name}, with reading", chunks, reading + matching)
    if matcher is not None:
        tell(f"{name}, without", chunks, matching)
        print(f"  {len(selected):,} chunks selected")
    return selected


def tell(name: str, chunks: int, seconds: float) -> None:
    """Print a rate."""
    print(f"  {name}: {chunks / seconds:,.0f} chunks/s, {chunks * CHUNK_BYTES / seconds / 1e6:,.0f} MB/s of text")


if __name__ == "__main__":
    main()
