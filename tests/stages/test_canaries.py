"""A thousand canaries: every one is found before an erase, in each place that has it, and none is after.

The scan here knows the canaries from outside, not from the store: strings, token runs and vectors are made here, by
the tokenizer and from the files as numpy reads them. It must find them before, or finding none after would say nothing.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from tokenizers import Tokenizer

import retrotool
from retrotool import api
from retrotool.purge.matching import Needles
from retrotool.purge.residue import CHUNK, Finding, scan

CANARIES, BROKEN = 1000, 10


def words(seed: int) -> str:
    draw = random.Random(seed)
    return "canary " + " ".join("".join(draw.choices(string.ascii_lowercase, k=12)) for _ in range(4))


def corpus(folder: Path) -> tuple[Path, list[str]]:
    """Documents of a canary each, others between them, and rows that can't be read and have some canaries, too."""
    texts = [words(seed) for seed in range(CANARIES)]
    rows: list[dict[str, object]] = []
    for number, (text, row) in enumerate(zip(texts, make_rows(CANARIES, words=40), strict=True)):
        rows += [{**row, "id": f"c-{number}", "text": text}, row]
    rows += [{"id": f"broken-{number}", "text": 3, "note": texts[number]} for number in range(BROKEN)]
    return write_jsonl(folder / "c.jsonl", rows), texts


def needles_of(texts: list[str], tokenizer: Path, vectors: list[np.ndarray], chunks: list[int]) -> Needles:
    """Of each canary 24 letters, 8 tokens, and 8 numbers of its vector."""
    encode = Tokenizer.from_file(str(tokenizer))
    encode.no_padding()
    encode.no_truncation()
    found: list[tuple[str, bytes]] = []
    for text in texts:
        found.append(("text", "".join(text.split()[1:3]).encode()))
        found.append(("tokens", np.array(encode.encode(text, add_special_tokens=False).ids[8:16], "<u2").tobytes()))
    found += [("vector16", vector[:8].astype("<f2").tobytes()) for vector in vectors]
    return Needles.plain(found, chunks)


def by_place(found: list[Finding]) -> dict[tuple[str, str], int]:
    """How many different needles of each kind were found in each kind of file."""
    seen = {(finding.path.split("/")[0], finding.kind, finding.number) for finding in found}
    return Counter((folder, kind) for folder, kind, _ in seen)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_thousand_canaries(lossless: bool, tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path) -> None:
    source, texts = corpus(tmp_path)
    store = tmp_path / "store"
    tokenizer = byte_level_tokenizer if lossless else tiny_encoder / "tokenizer.json"
    api.chunk(store, [str(source)], tokenizer=str(tokenizer if lossless else tiny_encoder), part_size=2000)
    if not lossless:  # the encoder reads its own tokens
        api.embed(store, encoder=str(tiny_encoder))
        api.index(store)
        api.neighbours(store, materialise=True)
    reader = retrotool.open(store)
    assert len(reader.parts()) > 1
    chunks = [chunk for number in range(CANARIES) for chunk in reader.document(f"c-{number}")]
    assert len(chunks) == CANARIES
    embeddings = {} if lossless else {part: reader.embeddings(part) for part in reader.parts()}
    vectors = [] if lossless else [embeddings[chunk >> 32][chunk & 0xFFFFFFFF] for chunk in chunks]
    needles = needles_of(texts, tokenizer, vectors, chunks)
    # Selected by what they say, whatever they are called.
    purge = api.purge(store, api.Selectors(pattern="canary ?[a-z]{12}", allow_lossy=not lossless), reason="canaries")
    assert (purge.chunks, purge.documents) == (CANARIES, CANARIES)
    before = by_place(scan(store, needles))
    expected = {("chunks", "tokens"): CANARIES, ("quarantine", "text"): BROKEN}
    if not lossless:
        expected |= {("embeddings", "vector16"): CANARIES, ("index", "vector16"): CANARIES, ("index", CHUNK): CANARIES}
        assert before[("materialised", "tokens")] > CANARIES // 4
    assert {place: before[place] for place in expected} == expected
    api.erase(store, [purge.purge])
    assert scan(store, needles) == []
    assert api.verify(store).ok
    receipt = api.verify_purge(store, purge.purge, out=tmp_path).receipt
    assert receipt.ok, receipt.problems
    assert receipt.searched is not None
    assert receipt.searched.without.get("id", 0) == 0
