"""Measure the search for terms and personal data in text: MB per second on one core, compared with RE2 alone.

    python benchmarks/text_selectors.py [FILE.jsonl[.zst] ...] [--store STORE]

Text is cut into chunks of 280 bytes, in blocks of 32,768 chunks, without a store and without decoding.
``--store``: a scan as in a purge, on all cores: reading, decoding, RE2 and writing the results. A copy of the
store, made of hard links, is scanned for patterns without a match.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import zstandard
from machine import describe

from retrotool import engine
from retrotool.purge.select import Selectors
from retrotool.purge.selectors.patterns import compiled, find_all
from retrotool.purge.selectors.pii import KINDS, PersonalData
from retrotool.purge.selectors.selector import BlockHits, Decoder, Offsets, TextBlock, text_blocks
from retrotool.purge.selectors.terms import TermMatcher
from retrotool.store.folding import writing
from retrotool.store.parts import Chunks
from retrotool.store.store import Store

CHUNK, ROWS = 280, 1 << 15


class Given:
    """Replaces the decoder of a lossless tokenizer."""

    lossless = True

    def __init__(self, starts: Offsets, text: bytes) -> None:
        self._decoded = starts, memoryview(text)

    def __call__(self, _: Chunks) -> tuple[Offsets, memoryview]:
        return self._decoded


def block_of(documents: list[bytes]) -> TextBlock:
    sizes = np.array([max(-(-len(text) // CHUNK), 1) for text in documents])
    first = np.concatenate([[0], np.cumsum(sizes)])
    index = np.arange(first[-1]) - np.repeat(first[:-1], sizes)
    base = np.concatenate([[0], np.cumsum([len(text) for text in documents])])
    starts = np.append(np.minimum(np.repeat(base[:-1], sizes) + CHUNK * index, np.repeat(base[1:], sizes)), base[-1])
    n = len(index)
    doc = np.repeat(np.arange(len(documents)), sizes).astype(np.int32)
    chunks = Chunks(0, doc, index.astype(np.int32), np.full(n, 64, np.int32), np.zeros((n, 1)), np.ones(n, np.bool_))
    return TextBlock(chunks, 0, first, cast(Decoder, Given(starts, b"".join(documents))))


def documents_in(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            data = zstandard.ZstdDecompressor().stream_reader(file).read() if path.suffix == ".zst" else file.read()
        for line in data.splitlines():
            yield orjson.loads(line)["text"].encode()


def blocks(documents: list[bytes]) -> list[TextBlock]:
    made: list[TextBlock] = []
    waiting: list[bytes] = []
    size = 0
    for text in documents:
        waiting.append(text)
        size += len(text)
        if size > ROWS * CHUNK:
            made.append(block_of(waiting))
            waiting, size = [], 0
    return [*made, block_of(waiting)]


def measure(name: str, find: Callable[[TextBlock], Any], some: list[TextBlock]) -> None:
    size = sum(len(block.text) for block in some)
    began = time.process_time()
    found = [find(block) for block in some]
    took = time.process_time() - began
    print(f"{name:44} {size / took / 1e6:7.0f} MB/s  {sum(map(len, found)):9,} rows hit")


def terms_of(documents: list[bytes], count: int, rare: bool) -> list[str]:
    """Return terms of one to three words of the text, rare ones or any."""
    words = Counter(itertools.chain.from_iterable(text.split() for text in documents))
    known = [w for w, n in words.items() if w.isalpha() and w.isascii() and (n < 3 or not rare)]
    rng = np.random.default_rng(1)
    return [b" ".join(known[i] for i in rng.integers(0, len(known), rng.integers(1, 4))).decode() for _ in range(count)]


def by_pattern(pattern: str) -> Callable[[TextBlock], BlockHits]:
    one = compiled(pattern)
    return lambda block: BlockHits.touched(block, find_all(one, block.text, itertools.pairwise(block.borders.tolist())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    if arguments.store:
        print(describe())
        scan_store(arguments.store)
    if arguments.files:
        measure_all(list(documents_in(arguments.files)))


def scan_store(source: Path) -> None:
    """Scan a store for patterns as a purge does, and print the rate."""
    with tempfile.TemporaryDirectory(dir=source.absolute().parent) as folder:
        store = Store.open(shutil.copytree(source, Path(folder) / "store", copy_function=os.link))
        decoder = Decoder(store)
        size = sum(len(block.text) for part in store.state.parts() for block in text_blocks(store, decoder, part))
        for number in range(4):
            stage = Selectors(pattern=f"[a-z]+@zqj{number}", allow_lossy=True).read(store).scan
            assert stage is not None
            start = time.perf_counter()
            stage.open(store)
            ready = time.perf_counter() - start
            start, spent = time.perf_counter(), time.process_time()
            with writing(store) as run:
                engine.execute(stage, store, run)
            seconds = time.perf_counter() - start
            if number:  # the first also loads what it needs
                print(
                    f"a store of {size / 1e6:.0f} MB of text: {size / seconds / 1e6:.0f} MB/s, {seconds:.2f} s, "
                    f"{time.process_time() - spent:.2f} s of processors; without the {ready:.2f} s that getting ready "
                    f"takes {size / (seconds - ready) / 1e6:.0f} MB/s"
                )


def measure_all(documents: list[bytes]) -> None:
    """Measure every selector on documents, without a store."""
    some = blocks(documents)
    ascii_only = blocks([text for text in documents if text.isascii()])
    print(describe())
    print(f"{len(documents):,} documents, {sum(map(len, documents)) / 1e6:.0f} MB")
    measure("a pattern that is nowhere", by_pattern("[a-z]+@zqj"), some)
    measure(r"a pattern that is often: \b[Ee]rrors?\b", by_pattern(r"\b[Ee]rrors?\b"), some)
    for kind in KINDS:
        measure(f"personal data: {kind}", PersonalData((kind,)).matcher(), some)
    measure("personal data: all", PersonalData(KINDS).matcher(), some)
    for count in (100, 10_000, 100_000):
        measure(f"{count:,} terms of rare words", TermMatcher(terms_of(documents, count, rare=True)), some)
    measure("10,000 terms of any words", TermMatcher(terms_of(documents, 10_000, rare=False)), some)
    measure("10,000 terms of rare words, ASCII", TermMatcher(terms_of(documents, 10_000, rare=True)), ascii_only)
    cyrillic = blocks([text.translate(bytes(range(256))).decode().translate(CYRILLIC).encode() for text in documents])
    measure("10,000 terms, Cyrillic", TermMatcher(terms_of(documents, 10_000, rare=True)), cyrillic)


CYRILLIC = {c: chr(0x430 + (c | 32) - 97) for c in range(65, 123) if chr(c).isalpha()}


if __name__ == "__main__":
    main()
