"""Stores of plain documents and key-value records, put together with the functions of ``retrotool.store`` alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrotool.store import parts
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, find_tokenizer

LENGTH = 16


@dataclass(frozen=True)
class Written:
    """A plain document (``value`` None), or a record: ``text`` is its key."""

    id: str
    text: str
    value: str | None = None


def pieces(tokens: list[int]) -> list[list[int]]:
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]


def cut(document: Written, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The tokens of each chunk, and whether it is a key."""
    (tokens,) = tokenizer.encode_batch([document.text])
    tokens = list(tokens)
    if document.value is None:
        return [(piece, True) for piece in pieces(tokens)]
    (value,) = tokenizer.encode_batch([document.value])
    return [(tokens[:LENGTH], True), *((piece, False) for piece in pieces(list(value)))]


def make_store(root: Path, model: Path, *contents: list[Written]) -> Path:
    """A store with a part for each list of documents."""
    file = find_tokenizer(str(model))
    tokenizer = Tokenizer(file)
    identity = TokenizerIdentity.of("tiny", file.content, tokenizer.vocabulary, False)
    store = Store.create(root, identity, file.content, LENGTH)
    with Run(store.storage) as run:
        add: list[FileEntry] = []
        totals = {"documents": 0, "chunks": 0, "tokens": 0, "rejected": 0}
        for number, documents in enumerate(contents):
            cuts = [cut(document, tokenizer) for document in documents]
            add += _write_part(store, run, number, documents, cuts)
            totals["documents"] += len(documents)
            totals["chunks"] += sum(map(len, cuts))
            totals["tokens"] += sum(len(tokens) for chunks in cuts for tokens, _ in chunks)
        records = {"parts": len(contents), "totals": totals}
        store.commit(run, lambda _: Draft("chunk", add=tuple(add), records=records))
    return root


def _write_part(
    store: Store, run: Run, number: int, documents: list[Written], cuts: list[list[tuple[list[int], bool]]]
) -> list[FileEntry]:
    sizes = [len(chunks) for chunks in cuts]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    hashes = {name: [_hash(getattr(d, name)) for d in documents] for name in ("id", "text")}
    columns = {
        "id": [d.id for d in documents], "key": hashes["id"], "text_hash": hashes["text"],
        "source": ["test"] * len(documents), "first_row": first, "n_chunks": sizes,
        "n_tokens": [sum(len(tokens) for tokens, _ in chunks) for chunks in cuts],
        "input": ["input"] * len(documents), "position": list(range(len(documents))),
    }  # fmt: skip
    table = pa.table(columns, schema=parts.documents_schema(()))
    rows = [chunk for chunks in cuts for chunk in chunks]
    tokens = np.zeros((len(rows), LENGTH), parts.token_dtype(store.identity.tokenizer.token_bytes))
    for row, (piece, _) in enumerate(rows):
        tokens[row, : len(piece)] = piece
    chunks = parts.chunks_table(
        [doc for doc, size in enumerate(sizes) for _ in range(size)],
        [index for size in sizes for index in range(size)],
        [len(piece) for piece, _ in rows],
        tokens,
        np.array([key for _, key in rows]),
    )
    tables = {"documents": table, "chunks": chunks}
    return [
        parts.write_parquet(store, FileName.new(run.id, kind, part_slot(number), "parquet"), table)
        for kind, table in tables.items()
    ]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=parts.HASH_BYTES).digest()
