"""How fast a store is searched for what a purge left, with 10,000 needles.

    python benchmarks/residue.py [--megabytes 64] [--needles 10000]
    python benchmarks/residue.py --leftovers [FILE ...]

``--leftovers``: how likely it is that a piece of erased text of so many characters is noticed, wherever it begins, by
the needles that an erase keeps as keyed hashes. The text is the tutorial's articles, or that of files, each a document,
in a store of its own; and of how many whole chunks, ids and vectors a needle is kept.

The rest: makes files of random bytes and of words, and needles of all kinds that are not in them, plain and as keyed
hashes (of which as many are made that so many can be kept). Each is searched in two threads, as ``scan`` does. Rates
are given by the clock, and by the time of the processors that it took, which other processes do not change.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from machine import describe

from retrotool import api
from retrotool.purge.decode import folded
from retrotool.purge.matching import KINDS, Matcher, Needles, sampled_heads
from retrotool.purge.needles import TEXT_BYTES, make_needles
from retrotool.purge.residue import scan
from retrotool.store.store import Store

LENGTHS = {"tokens": 16, "text": 24, "vector16": 16, "vector32": 32}
SHARES = {"tokens": 0.35, "text": 0.45, "vector16": 0.1, "vector32": 0.095}
FILES = 4
PIECES = (40, 60, 80, 100, 120, 150, 200, 300)
TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"


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


def articles() -> Iterator[tuple[str, str]]:
    """Name and text of each of the tutorial's documents."""
    _, told, _ = TUTORIAL.read_text("utf-8").split('"""', 2)
    for article in told.strip().split("\n\n"):
        name, _, text = article.partition(": ")
        yield name.split()[0], " ".join(text.split())


def leftovers(documents: list[tuple[str, str]]) -> None:
    """Print the chance to notice a piece of each length, and of how many victims nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        source, root = Path(folder) / "documents.jsonl", Path(folder) / "store"
        lines = [json.dumps({"id": name, "text": text}) for name, text in documents]
        source.write_text("\n".join([*lines, json.dumps({"id": "left", "text": "Somebody who stays."})]))
        api.chunk(root, [str(source)])
        api.embed(root)
        store = Store.open(root)
        rows = sum(entry.rows for part in store.state.parts() if (entry := store.state.part_file("chunks", part)))
        kept = make_needles(store, np.arange(rows - 1)).hashed("00" * 32, b"salt")
    text = Matcher(kept, ("text",))
    seen, all_pieces = dict.fromkeys(PIECES, 0), dict.fromkeys(PIECES, 0)
    for _, said in documents:
        data = said.encode()
        # Where each byte comes to lie when the text is folded.
        place = np.cumsum([0, *(len(folded(data[i : i + 1])) for i in range(len(data)))])
        found = np.unique([at for at, _ in text.runs(folded(data))]).astype(np.int64)
        for size in PIECES:
            low, high = place[: max(len(place) - size, 0)], place[size:]
            next_ = np.append(found, np.iinfo(np.int64).max)[np.searchsorted(found, low)]
            seen[size] += int((next_ <= high - TEXT_BYTES).sum())
            all_pieces[size] += len(low)
    print(f"{len(documents)} documents, {rows - 1} chunks, {len(kept):,} needles")
    for size in PIECES:
        print(f"{size:>4} characters: {seen[size] / max(all_pieces[size], 1):.1%} of {all_pieces[size]:,} are noticed")
    print("without any, by kind:", {kind: n for kind, n in kept.lacking.items() if kind != "whole"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--needles", type=int, default=10_000)
    parser.add_argument("--leftovers", nargs="*", metavar="FILE", default=None)
    arguments = parser.parse_args()
    print(describe())
    if arguments.leftovers is not None:
        named = [(name, re.sub(r"\s+", " ", Path(name).read_text("utf-8"))) for name in arguments.leftovers]
        leftovers(named or list(articles()))
        return
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
