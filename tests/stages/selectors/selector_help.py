"""Blocks and stores of given tokens, to hold selectors against."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrotool import api
from retrotool.purge.selectors import ngrams
from retrotool.purge.selectors.selector import Decoder, Matcher, TextBlock, text_blocks
from retrotool.sources import Fields
from retrotool.store import parts
from retrotool.store.parts import Chunks
from retrotool.store.store import Store

GRAM_HASHES = ngrams.gram_hashes


def weak_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Of 32 bits three are left: nearly everything collides."""
    return GRAM_HASHES(tokens, n) & np.uint32(0x80000003)


def block_of(documents: Sequence[Sequence[int]], length: int, erased: Sequence[int] = ()) -> TextBlock:
    """Documents of tokens in chunks of ``length``; of the rows ``erased`` nothing is left."""
    rows = [
        (doc, index, list(tokens[start : start + length]))
        for doc, tokens in enumerate(documents)
        for index, start in enumerate(range(0, len(tokens), length))
    ]
    table = np.zeros((len(rows), length), np.uint16)
    counts = np.zeros(len(rows), np.int32)
    for row, (_, _, some) in enumerate(rows):
        if row not in erased:
            table[row, : len(some)], counts[row] = some, len(some)
    doc, index = (np.array([row[i] for row in rows], np.int32) for i in (0, 1))
    chunks = Chunks(0, doc, index, counts, table, np.ones(len(rows), np.bool_))
    starts = np.append(np.flatnonzero(np.diff(doc, prepend=-1)), len(rows)).astype(np.int64)
    return TextBlock(chunks, 0, starts, None)  # type: ignore[arg-type]  # no text is asked for


def store_of(
    root: Path, tokenizer: Path, *inputs: Sequence[Sequence[int]], part_size: int = 1000, chunk_length: int = 64
) -> Store:
    """A store of documents of tokens, of one plan for each of ``inputs``; repeated ones are kept."""
    for number, documents in enumerate(inputs):
        of = f"{number}:" if number else ""
        lines = [json.dumps({"tokens": list(map(int, row)), "id": f"{of}{i}"}) for i, row in enumerate(documents)]
        source = root.parent / f"{root.name}-{zlib.crc32(repr(lines).encode()):x}.jsonl"
        source.write_text("".join(f"{line}\n" for line in lines))
        api.chunk(
            root, [str(source)], tokenizer=str(tokenizer), chunk_length=chunk_length, part_size=part_size,
            duplicates="keep", fields=Fields(tokens="tokens", id="id"),
        )  # fmt: skip
    return Store.open(root)


def scanned(store: Store, matcher: Matcher, rows: int = 1 << 15) -> list[int]:
    """Chunk ids that a matcher means in all of a store."""
    decoder: Any = Decoder(store)
    found: set[int] = set()
    for part in store.state.parts():
        for block in text_blocks(store, decoder, part, rows):
            found |= set(parts.chunk_ids(part, block.first + matcher(block).rows).tolist())
    return sorted(found)


def purge(store: Store, *ids: int, erase: bool = False) -> Store:
    """Purge some chunks."""
    listed = Path(store.place).parent / "purged-ids"
    listed.write_text("".join(f"{i}\n" for i in ids))
    api.purge(store.place, api.Selectors(chunk=Path(listed)), reason="test", erase=erase)
    return Store.open(store.place)


def random_tokens(seed: int, n: int, vocabulary: int = 2000) -> list[int]:
    """So many different-looking tokens."""
    return np.random.default_rng(seed).integers(0, vocabulary, n).tolist()
