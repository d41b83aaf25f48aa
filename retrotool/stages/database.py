"""A store seen as a database to search: what of it can be searched, its index, and where its documents are.

Shared by ``index`` (recall), ``neighbours`` and ``search``. Vectors are memory-mapped; shards are opened one after
another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann import lists
from retrotool.ann.lists import Ids, InvertedLists
from retrotool.ann.search import Best, Queries, search
from retrotool.errors import CorruptError, UsageError
from retrotool.store import parts, vectors
from retrotool.store.parts import Chunks
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones


def pick_encoder(store: Store, name: str | None = None) -> str:
    """The encoder to use: ``name``, or the only one the store has embeddings of; ``UsageError`` otherwise."""
    names = store.state.names("embeddings")
    if not names:
        raise UsageError("the store has no embeddings", f"Make them with: retrotool embed {store.root}")
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise UsageError(f"the store has embeddings of {', '.join(names)}", "Choose one with --encoder.")
    if name not in names:
        raise UsageError(f"the store has no embeddings of {name!r}, but of {', '.join(names)}", "Choose one of these.")
    return name


def embedded_parts(store: Store, encoder: str) -> list[int]:
    """Numbers of the parts that have embeddings, ascending."""
    return [int(slot) for slot in store.state.group("embeddings", encoder)]


def read_part_vectors(store: Store, encoder: str, part: int) -> npt.NDArray[np.float16]:
    """A part's embeddings, float16 [n, d], memory-mapped."""
    return vectors.read_vectors(store, parts.part_entry(store, "embeddings", part, encoder))


def living(chunks: Chunks, tombstones: Tombstones) -> npt.NDArray[np.bool_]:
    """Which rows of a part are neither erased nor purged, bool [n]; values of key-value records are among them."""
    alive: npt.NDArray[np.bool_] = chunks.n_tokens > 0
    alive[tombstones.rows(chunks.part)] = False
    return alive


def searchable_rows(store: Store, part: int, tombstones: Tombstones) -> npt.NDArray[np.int64]:
    """Rows of a part that are searched by and for, ascending: those that have a vector and are not purged."""
    searchable = parts.read_embedded(store, part)
    searchable[tombstones.rows(part)] = False
    return np.flatnonzero(searchable)


def count_keys(store: Store, part: int) -> int:
    """How many rows of a part are keys, erased and purged ones too; the log knows, no file is read."""
    return parts.n_keys(parts.part_entry(store, "chunks", part))


def document_intervals(store: Store, part: int) -> tuple[Ids, Ids]:
    """First and last chunk id of each row's own document, int64 [n] each."""
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    ids = parts.chunk_ids(part, first)
    return np.repeat(ids, count), np.repeat(ids + count - 1, count)


def same_documents(queries: Store, part: int, database: Store) -> tuple[Ids, Ids]:
    """For each row of a part of ``queries``, the interval of chunk ids of the document of the same id in ``database``.

    First and last int64 [n] each; first > last where there is none. Joined through the ``keys/`` files.
    """
    documents = parts.read_documents(queries, part, ["key", "n_chunks"])
    keys = documents["key"].cast(pa.binary()).combine_chunks()
    first, last = np.zeros(len(keys), np.int64), np.full(len(keys), -1, np.int64)
    for other in database.state.parts():
        table = parts.read_parquet(database, parts.part_entry(database, "keys", other), ["key", "doc"])
        place = pc.index_in(keys, value_set=table["key"].cast(pa.binary()).combine_chunks())
        hits = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
        if not len(hits):
            continue
        found = table["doc"].to_numpy()[place.take(pa.array(hits)).to_numpy()]
        theirs = parts.read_documents(database, other, ["first_row", "n_chunks"]).take(pa.array(found))
        low = parts.chunk_ids(other, theirs["first_row"].to_numpy())
        high = low + theirs["n_chunks"].to_numpy() - 1
        # Of a document that is there more than once all but the first are tombstones.
        new = first[hits] > last[hits]
        first[hits[new]], last[hits[new]] = low[new], high[new]
    count = documents["n_chunks"].to_numpy()
    return np.repeat(first, count), np.repeat(last, count)


class Database:
    """An indexed store, open for search. ``record`` is the index's record, see ``docs/format.md``."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        record: dict[str, Any] | None = store.state.records.get(f"index:{name}")
        if record is None:
            have = ", ".join(store.state.with_prefix("index:"))
            found = f"it has: {have}" if have else "it has none"
            make = f"retrotool index {store.root}" + (f" --name {name}" if name != "main" else "")
            raise UsageError(f"the store {store.root} has no index {name!r}; {found}", f"Make it with: {make}")
        self.record = record
        self.encoder = str(record["encoder"])
        self.nprobe = int(record["nprobe"])
        self.tombstones = read_tombstones(store)

    def shards(self) -> Iterator[InvertedLists]:
        """The index's shards, one after another, memory-mapped; ``CorruptError`` names one that is broken."""
        yield from read_shards(self.store, self.name)

    def search(self, queries: Queries, k: int) -> Best:
        """The k nearest living keys of each query."""
        best = Best(len(queries.vectors), k)
        for shard in self.shards():
            search(shard, queries, self.nprobe, self.tombstones.contains, best)
        return best


def read_shards(store: Store, name: str) -> Iterator[InvertedLists]:
    """The shards of an index, one after another."""
    group = store.state.group("index", name)
    for slot in group:
        entry = group.get(slot)
        if slot.startswith("shard-") and entry is not None:
            shard = lists.read(store.path(entry))
            if len(shard) != entry.rows:
                raise CorruptError(
                    f"{store.root / entry.path} holds {len(shard):,} vectors, the log says {entry.rows:,}",
                    f"See what else is wrong: retrotool verify {store.root}",
                )
            yield shard
