"""What a training loop should read, chunk by chunk from ``retrotool.open``; and large stores made by code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from conftest import make_rows, write_jsonl

import retrotool.reader
from retrotool import api
from retrotool.neighbours.retrieved import read_text_of
from retrotool.store import neighbour_tables, parts
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.neighbour_tables import NeighbourTable
from retrotool.store.paths import FileName, part_slot
from retrotool.store.state import State
from retrotool.store.storage import storage_at
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones
from retrotool.tokenizers import Tokenizer, find_tokenizer

Item = dict[str, torch.Tensor]
Options = dict[str, Any]


def dataset_of(store: Path, **options: Any) -> retrotool.RetroDataset:
    """Long sequences, so that a small store has several windows of few of them."""
    return retrotool.RetroDataset(store, sequence_length=64 * 128, shuffle_blocks=2, **options)


def flat(batches: Iterable[Item]) -> list[Item]:
    """The sequences of batches, one by one."""
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


def slots(items: Iterable[Item]) -> list[tuple[int, ...]]:
    """The chunk ids of sequences."""
    return [tuple(item["chunk_ids"].tolist()) for item in items]


def same(one: list[Item], other: list[Item], *, but: tuple[str, ...] = ("cursor",)) -> bool:
    """Whether two lists of sequences are equal, bit for bit."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if key not in but)
        for a, b in zip(one, other, strict=True)
    )


def laid_out(store: Path, size: int, *, packed: bool) -> list[list[int]]:
    """Chunk ids in the slots of all sequences, in the order of the store; for parts of one block."""
    reader = retrotool.open(store)
    found = []
    for part in reader.parts():
        runs: list[list[int]] = []
        document = None
        for i in reader.chunk_ids(part).tolist():
            if not runs or (not packed and reader.chunk(i).document != document):
                runs.append([])
            document = reader.chunk(i).document
            runs[-1].append(i)
        for run in runs:
            for start in range(0, len(run), size):
                some = run[start : start + size]
                found.append(some + [-1] * (size - len(some)))
    return found


def expected(reader: retrotool.reader.Reader, ids: list[int], k: int, name: str) -> dict[str, list[Any]]:
    """What a sequence of these chunks (−1: empty slot) must be, as lists; without documents and cursor."""
    length = reader.chunk_length
    found: dict[str, list[Any]] = {key: [] for key in ("tokens", "loss_mask", "neighbours", "neighbour_mask", "ids")}

    def padded(chunk: Any) -> tuple[list[int], list[bool]]:
        tokens = [] if chunk is None else chunk.tokens.tolist()
        return tokens + [0] * (length - len(tokens)), [True] * len(tokens) + [False] * (length - len(tokens))

    for i in ids:
        tokens, mask = padded(None if i < 0 else reader.chunk(i))
        found["tokens"] += tokens
        found["loss_mask"] += mask
        near = [] if i < 0 else reader.neighbours(i, name, k)
        for place in range(k):
            n, f = (near[place].chunk, near[place].continuation) if place < len(near) else (None, None)
            (n_tokens, n_mask), (f_tokens, f_mask) = padded(n), padded(f)
            found["neighbours"].append(n_tokens + f_tokens)
            found["neighbour_mask"].append(n_mask + f_mask)
            found["ids"].append(near[place].id if place < len(near) else -1)
    return found


def check_items(store: Path, items: Iterable[Item], k: int = 2, name: str = "main") -> None:
    """Hold sequences against ``retrotool.open``, and their document numbers against the documents."""
    reader = retrotool.open(store)
    for item in items:
        _check_item(reader, item, k, name)


def _check_item(reader: retrotool.reader.Reader, item: Item, k: int, name: str) -> None:
    ids = item["chunk_ids"].tolist()
    right = expected(reader, ids, k, name)
    assert item["tokens"].tolist() == right["tokens"]
    assert item["loss_mask"].tolist() == right["loss_mask"]
    assert item["neighbours"].flatten(0, 1).tolist() == right["neighbours"]
    assert item["neighbour_mask"].flatten(0, 1).tolist() == right["neighbour_mask"]
    assert item["neighbour_ids"].flatten().tolist() == right["ids"]
    names = [reader.chunk(i).document if i >= 0 else None for i in ids]
    numbers = item["documents"].tolist()
    assert [number < 0 for number in numbers] == [i < 0 for i in ids]
    pairs = set(zip(names, numbers, strict=True))
    assert len(pairs) == len(set(names)) == len(set(numbers))


def purge(store: Path, *documents: str, erase: bool = False) -> None:
    names = store.parent / "names"
    names.write_text("".join(f"{name}\n" for name in documents))
    api.purge(store, api.Selectors(document=Path(names)), reason="test", erase=erase)


def chunk(store: Path, model: Path, rows: list[dict[str, Any]], part_size: int = 100) -> Path:
    source = write_jsonl(store.parent / f"{store.name}-{rows[0]['id']}.jsonl", rows)
    api.chunk(store, [str(source)], tokenizer=str(model), part_size=part_size)
    api.embed(store, encoder=str(model))
    return store


def two_stores(folder: Path, model: Path) -> tuple[Path, Path]:
    """A database, and a training store with neighbours ``main`` in it."""
    database = chunk(folder / "database", model, make_rows(60))
    api.index(database)
    training = chunk(folder / "training", model, make_rows(40, first=50))
    api.neighbours(database, queries=training, materialise=True)
    return database, training


def make_large(
    root: Path, model: Path, rows: list[int], *, k: int = 2, saved: int = 5, seed: int = 0, text: bool = False
) -> Path:
    """A store of parts of so many chunks, random tokens in documents of 1 to 40 chunks, and random neighbours."""
    rng = np.random.default_rng(seed)
    file = find_tokenizer(str(model))
    vocabulary = Tokenizer(file).vocabulary
    store = Store.create(root, TokenizerIdentity.of("tiny", file.content, vocabulary, False), file.content, 64)
    with Run(storage_at(root)) as run:
        add = []
        for number, n in enumerate(rows):
            add += _large_part(store, run, number, n, rows, rng, saved)
        record = {
            "database": store.identity.uuid, "uri": str(root.absolute()), "within": True, "index": "", "encoder": "e",
            "saved": saved, "k": k,
        }  # fmt: skip
        totals = {"documents": 0, "chunks": sum(rows), "tokens": 64 * sum(rows), "rejected": 0}
        records = {"parts": len(rows), "totals": totals, "neighbours:main": record}
        store.commit(run, lambda _: Draft("chunk", add=tuple(add), records=records))
        if text:
            store.commit(run, lambda state: _with_text(store, run, state, k))
    return root


def _with_text(store: Store, run: Run, state: State, k: int) -> Draft:
    """The commit that gives the tables of a large store the tokens of neighbours."""
    old, add = state.group("neighbours", "main").entries(), []
    for entry in old:
        name, table = FileName.parse(entry.path), neighbour_tables.read_table(store, entry)
        add.append(
            neighbour_tables.write_table(
                store, FileName.new(run.id, name.kind, name.slot, name.extension, name.name), table,
                database=store.identity.uuid, commit=0, uri="", about={**entry.about, "text": k},
                text=read_text_of(store, Tombstones(np.zeros(0, np.int64)), table, k),
            )
        )  # fmt: skip
    return Draft("neighbours", add=tuple(add), remove=tuple(entry.path for entry in old))


def _large_part(
    store: Store, run: Run, number: int, n: int, rows: list[int], rng: np.random.Generator, saved: int
) -> Iterator[Any]:
    sizes = []
    while (left := n - sum(sizes)) > 0:
        sizes.append(min(left, int(rng.integers(1, 41))))
    first = np.cumsum(sizes) - sizes
    names = [f"{number}-{i}" for i in range(len(sizes))]
    hashes = [hashlib.blake2b(name.encode(), digest_size=parts.HASH_BYTES).digest() for name in names]
    columns = {
        "id": names, "key": hashes, "text_hash": hashes,
        "source": ["code"] * len(sizes), "first_row": first, "n_chunks": sizes, "n_tokens": [64 * s for s in sizes],
        "input": ["code"] * len(sizes), "position": range(len(sizes)),
    }  # fmt: skip
    documents = pa.table(columns, schema=parts.documents_schema(()))
    doc = np.repeat(np.arange(len(sizes)), sizes)
    tokens = rng.integers(1, store.identity.tokenizer.vocabulary, (n, 64)).astype(
        parts.token_dtype(store.identity.tokenizer.token_bytes)
    )
    chunks = parts.chunks_table(doc, np.arange(n) - first[doc], np.full(n, 64), tokens)
    for kind, table in {"documents": documents, "chunks": chunks}.items():
        yield parts.write_parquet(store, FileName.new(run.id, kind, part_slot(number), "parquet"), table)
    part = rng.integers(0, len(rows), (n, saved))
    ids = (part.astype(np.int64) << 32) + rng.integers(0, np.array(rows)[part])
    distances = np.sort(rng.random((n, saved), np.float32), axis=1)
    name = FileName.new(run.id, "neighbours", part_slot(number), "parquet", "main")
    searched = [[0, len(rows) - 1]]
    about = {"version": "", "index": "", "encoder": "e", "commit": 0, "head": "", "purges": "", "searched": searched}
    yield neighbour_tables.write_table(
        store, name, NeighbourTable(ids, distances), database=store.identity.uuid, commit=0, uri="", about=about
    )
