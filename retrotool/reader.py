"""Reading a store: ``retrotool.open(path)`` returns a ``Reader`` of one commit, until ``refresh()``.

Purged chunks are never returned. Chunks are read by row group (8,192 chunks) and the last few are cached, so
reading neighbours in order is fast. Nothing is written.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann.excluded import Queries
from retrotool.cli.command_lines import SHOWN, table_command
from retrotool.embed.search_scope import live_rows, pick_encoder, read_part_vectors
from retrotool.embed.store_encoder import load_encoder
from retrotool.encoder import Encoder
from retrotool.errors import UsageError
from retrotool.index.searching import Database, Point
from retrotool.neighbours.stage import members_of
from retrotool.neighbours.table_reader import Found, NeighbourReader
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Chunks, split_id
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import stored_tokenizer

_KEPT_ROW_GROUPS = 64
_KEPT_PARTS = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """A live chunk."""

    id: int
    document: str
    index: int  # its position in the document, from 0
    tokens: npt.NDArray[Any]  # without padding
    text: str
    key: bool = True  # False: of the value of a key-value record, which is never searched

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A chunk near another; for key-value records it is the key, continued by the value's first chunk."""

    id: int
    distance: float  # squared L2
    chunk: Chunk
    continuation: Chunk | None  # the next chunk of its document
    database: str  # the store of both chunks


class Reader:
    """A store opened for reading at one commit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.path = store.place
        self.chunk_length = store.identity.chunk_length  # tokens per chunk
        self._open_view()

    def _open_view(self) -> None:
        store = self._store
        self._tombstones = read_tombstones(store)
        self.tokenizer = stored_tokenizer(store)
        # The caches belong to the view: a new commit may have other files.
        self._row_group = lru_cache(_KEPT_ROW_GROUPS)(lambda part, group: parts.read_chunks(store, part, [group]))
        self._documents = lru_cache(_KEPT_PARTS)(
            lambda part: parts.read_documents(store, part, ["id", "key", "first_row", "n_chunks"])
        )
        self._neighbour_rows = lru_cache(_KEPT_ROW_GROUPS)(self._read_neighbours)
        self._tables = lru_cache(None)(self._open_tables)
        self._database = lru_cache(None)(partial(Database, store))

    @property
    def commit(self) -> int:
        """Number of the commit that this reader sees (−1: none)."""
        return self._store.state.number

    def refresh(self) -> int:
        """Move to the newest commit and return its number."""
        self._store.refresh()
        self._open_view()
        return self.commit

    def parts(self) -> list[int]:
        """Return the numbers of all parts, ascending."""
        return self._store.state.parts()

    def is_live(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which ids are chunks of the store that are neither purged nor erased: bool [n]."""
        return self._which(ids, lambda chunks, row: bool(chunks.n_tokens[row] > 0))

    def is_searchable(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which ids can have and be neighbours: live chunks that are keys, bool [n]."""
        return self._which(ids, lambda chunks, row: bool(chunks.between(row, row + 1).embedded[0]))

    def _which(
        self, ids: Sequence[int] | npt.NDArray[np.int64], fits: Callable[[Chunks, int], bool]
    ) -> npt.NDArray[np.bool_]:
        """Return which ids are chunks that are not purged and that ``fits`` accepts: bool [n]."""
        numbers = _ids(ids)
        good = ~self._tombstones.contains(numbers) & (numbers >= 0)
        for i in np.flatnonzero(good):
            part, row = split_id(int(numbers[i]))
            live = self._store.state.is_live(part)
            good[i] = live and row < parts.part_entry(self._store, "chunks", part).rows and fits(*self._row(part, row))
        return good

    def _row(self, part: int, row: int) -> tuple[Chunks, int]:
        return self._row_group(part, row // ROW_GROUP), row % ROW_GROUP

    def chunk(self, chunk_id: int) -> Chunk:
        """Return a chunk; ``UsageError`` if it does not exist or was purged."""
        found = self._find(int(chunk_id))
        if found is None:
            raise UsageError(f"the store has no chunk {chunk_id}, or it was purged")
        return found

    def _find(self, chunk_id: int) -> Chunk | None:
        if not self.is_live([chunk_id])[0]:
            return None
        part, row = split_id(chunk_id)
        chunks, place = self._row(part, row)
        n = int(chunks.n_tokens[place])
        document = self._documents(part)["id"][int(chunks.doc[place])].as_py()
        text = self.tokenizer.decode_text(chunks.tokens[place : place + 1], chunks.n_tokens[place : place + 1])[0]
        return Chunk(
            chunk_id, document, int(chunks.index[place]), chunks.tokens[place, :n], text, bool(chunks.key[place])
        )

    def continuation(self, chunk_id: int) -> Chunk | None:
        """Return the next live chunk of the document; None at its end, or if its key was purged."""
        following = self._find(chunk_id + 1)
        if following is None or following.index == 0:
            return None
        # A document's chunks have consecutive ids, and the key is the first.
        whole = following.key or self.is_live([following.id - following.index])[0]
        return following if whole else None

    def tokens(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the tokens of chunks, [n, chunk_length], zero-padded; zero for missing or purged chunks."""
        numbers = _ids(ids)
        out = np.zeros((len(numbers), self.chunk_length), parts.token_dtype(self._store.identity.tokenizer.token_bytes))
        for i in np.flatnonzero(self.is_live(numbers)):
            chunks, place = self._row(*split_id(int(numbers[i])))
            out[i] = chunks.tokens[place]
        return out

    def text(self, tokens: npt.NDArray[Any]) -> str:
        """Return the text of token ids, [n], without padding."""
        row = np.asarray(tokens).reshape(1, -1)
        return self.tokenizer.decode_text(row, np.array([row.shape[1]]))[0]

    def document(self, name: str) -> list[int]:
        """Return the ids of a document's live chunks, in order; ``UsageError`` without any.

        If several documents have this id (``chunk --duplicates keep``), the first live one is returned.
        """
        key = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=parts.HASH_BYTES).digest()
        for part in self.parts():
            table = self._documents(part)
            for row in table.filter(pc.equal(table["key"], pa.scalar(key, table["key"].type))).to_pylist():
                ids = parts.chunk_ids(part, np.arange(row["first_row"], row["first_row"] + row["n_chunks"]))
                alive = ids[self.is_live(ids)]
                if len(alive):
                    return [int(i) for i in alive]
        raise UsageError(f"the store has no document {name!r}, or it was purged or rejected as a repeat")

    def chunk_ids(self, part: int) -> npt.NDArray[np.int64]:
        """Return the ids of a part's live chunks, ascending; not all need be keys (``is_searchable``)."""
        self._check_live(part)
        rows = np.flatnonzero(live_rows(parts.read_chunks(self._store, part), self._tombstones))
        return parts.chunk_ids(part, rows)

    def _check_live(self, part: int) -> None:
        if not self._store.state.is_live(part):
            raise UsageError(f"the store has no part {part}, or its chunk command has not finished")

    def embeddings(self, part: int, encoder: str | None = None) -> npt.NDArray[np.float16]:
        """Return a part's embeddings by row, float16 [n, d]; zero for purged rows and for values."""
        self._check_live(part)
        matrix = read_part_vectors(self._store, pick_encoder(self._store, encoder), part)
        purged = self._tombstones.rows(part)
        if not len(purged):
            return matrix[:]
        copy = np.array(matrix)
        copy[purged] = 0
        return copy

    def neighbour_ids(self, chunk_id: int, name: str = "main", k: int | None = None) -> list[tuple[int, float]]:
        """Return (id, distance) of a chunk's live neighbours, nearest first; k defaults to the table's.

        ``UsageError`` for a mixture, in which ids alone are ambiguous: use ``neighbour_places``.
        """
        if len(members_of(self._store, name)) > 1:
            raise UsageError(
                f"the neighbours {name!r} come from several databases, so ids alone are ambiguous",
                "Use neighbour_places(), which returns the database of each, or neighbours().",
            )
        return [(i, distance) for _, i, distance in self.neighbour_places(chunk_id, name, k)]

    def neighbour_places(self, chunk_id: int, name: str = "main", k: int | None = None) -> list[tuple[str, int, float]]:
        """Return (database, id, distance) of live neighbours, by distance (mixtures: distance / weight)."""
        return [(database.path, i, distance) for database, i, distance in self._near(chunk_id, name, k)]

    def neighbours(self, chunk_id: int, name: str = "main", k: int | None = None) -> list[Neighbour]:
        """Return a chunk's live neighbours with their continuations, ordered as by ``neighbour_places``."""
        return [database.neighbour(i, distance) for database, i, distance in self._near(chunk_id, name, k)]

    def _near(self, chunk_id: int, name: str, k: int | None) -> list[tuple[Reader, int, float]]:
        reader, databases = self._tables(name)
        if not self.is_live([chunk_id])[0]:
            raise UsageError(f"the store has no chunk {chunk_id}, or it was purged")
        part, row = split_id(chunk_id)
        found, row = self._neighbour_rows(name, part, row // ROW_GROUP), row % ROW_GROUP
        near = np.flatnonzero(found.ids[row] != NO_NEIGHBOUR)[: reader.k if k is None else k]
        return [
            (databases[found.databases[row, i]], int(found.ids[row, i]), float(found.distances[row, i])) for i in near
        ]

    def neighbour(self, chunk_id: int, distance: float) -> Neighbour:
        """Return a chunk of this store as a neighbour at ``distance``."""
        return Neighbour(chunk_id, distance, self.chunk(chunk_id), self.continuation(chunk_id), self.path)

    def _open_tables(self, name: str) -> tuple[NeighbourReader, list[Reader]]:
        reader = NeighbourReader(self._store, name)
        return reader, [self if member.within else Reader(member.store) for member in reader.members]

    def _read_neighbours(self, name: str, part: int, group: int) -> Found:
        """Read all saved neighbours of the rows of a row group, [rows, saved]."""
        reader, _ = self._tables(name)
        for member in reader.members:
            if self._store.state.part_file("neighbours", part, member.table) is None:
                raise UsageError(
                    f"part {part} has no neighbours {member.table!r} yet",
                    f"Compute them: {table_command(self._store, member.table, member.store)}",
                )
        return reader.read(part, sys.maxsize, [group])

    def search(
        self,
        text: str | npt.NDArray[Any],
        k: int = SHOWN,
        index: str | None = None,
        encoder: Encoder | None = None,
        *,
        nprobe: int | None = None,
        rerank: int | None = None,
        allow_missing: bool = False,
    ) -> list[Neighbour]:
        """Return the k live keys nearest to a text, or to a vector [d] of the index's encoder.

        ``encoder`` can be loaded once for several searches. ``nprobe`` (lists to probe) and ``rerank``
        (candidates for 10 neighbours) override the index's operating point; ``allow_missing`` is as for
        ``database``.
        """
        database = self.database(index, allow_missing=allow_missing)
        if isinstance(text, str):
            loaded = encoder or self.load_encoder(index)
            if not text.strip():
                raise UsageError("the text to search for is empty")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError("the text to search for is not Unicode")
            vector = loaded.embed(loaded.tokenize_query(text)).astype(np.float32)
        else:
            vector, d = np.asarray(text, np.float32).reshape(1, -1), database.trained.d
            if vector.shape[1] != d or not np.isfinite(vector).all():
                raise UsageError(f"not a finite vector of {d} dimensions, as encoder {database.encoder!r} has")
        own = database.point
        best = database.search(Queries.plain(vector), k, Point(nprobe or own.nprobe, rerank or own.depth))
        return [self.neighbour(int(i), float(d)) for i, d in zip(best.ids[0], best.distances[0], strict=True) if i >= 0]

    def database(self, index: str | None = None, *, allow_missing: bool = False) -> Database:
        """Open an index of the store, once; ``allow_missing`` skips its broken shards, which it lists."""
        return self._database(index, allow_missing=allow_missing)

    def load_encoder(self, index: str | None = None, device: str = "auto") -> Encoder:
        """Load the encoder of an index; ``UsageError`` if it is unavailable or has changed."""
        return load_encoder(self._store, self.database(index).encoder, device)


def _ids(ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return chunk ids as int64 [n]; −1, which is not an id, for numbers that int64 can't hold."""
    try:
        return np.asarray(ids, np.int64).reshape(-1)
    except OverflowError:
        return np.array([i if 0 <= i < 1 << 63 else -1 for i in map(int, ids)], np.int64)


def open_store(path: str | Path) -> Reader:
    """Open a store for reading; ``StoreNotFoundError`` if it does not exist."""
    return Reader(Store.open(path))
