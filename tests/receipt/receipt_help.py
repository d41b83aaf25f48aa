"""A store with four documents to purge, in every kind of file that can hold something of them."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

from conftest import make_rows, write_jsonl

from retrotool import api
from retrotool.receipt.run import Receipt
from retrotool.sources import Fields


def words(seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=9)) for _ in range(60))


NAMES = tuple(f"secret-document-{i}" for i in range(4))
TEXTS = tuple(words(seed) for seed in range(4))
REASON = 'request <17> & "more"'


def build(folder: Path, encoder: Path) -> Path:
    """A store of several parts, with embeddings, an index, neighbours, their texts, and an input that was rejected."""
    rows = make_rows(60)
    for at, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        rows.insert(5 + 14 * at, {"id": name, "text": text, "source": "secret source", "year": 1})
    rows.append({"id": "broken", "text": 3, "note": TEXTS[0]})
    source = write_jsonl(folder / "c.jsonl", rows)
    api.chunk(folder / "store", [str(source)], tokenizer=str(encoder), part_size=60, fields=Fields(keep=("year",)))
    api.embed(folder / "store", encoder=str(encoder))
    api.index(folder / "store")
    api.neighbours(folder / "store", materialise=True)
    return folder / "store"


def purge(store: Path, *, erase: bool = False) -> str:
    return api.purge(store, api.Selectors(document=NAMES), reason=REASON, who="somebody", erase=erase).purge


def verified(store: Path, purge: str) -> api.VerifiedPurge:
    out = store.parent / "out"
    out.mkdir(exist_ok=True)
    return api.verify_purge(store, purge, out=out)


def receipt(store: Path, purge: str) -> Receipt:
    return verified(store, purge).receipt


def fields(found: api.VerifiedPurge) -> dict[str, object]:
    read: dict[str, object] = json.loads(Path(found.json).read_text())
    return read
