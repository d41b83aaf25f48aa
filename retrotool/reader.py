"""Reading a store: ``retrotool.open(path)`` returns a ``Reader`` of one commit, until ``refresh()``.

Purged chunks are never returned. Chunks are read by row group (8,192 chunks) and the last few are cached, so
reading neighbours in order is fast. Nothing is written.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.ann.excluded import Queries
from retrotool.ann.ranking import Best
from retrotool.chunk.chunker import id_hash
from retrotool.cli.command_lines import SHOWN
from retrotool.embed.search_scope import live_rows, pick_encoder, read_part_vectors
from retrotool.embed.store_encoder import load_encoder
from retrotool.encoder import Encoder, Rows
from retrotool.errors import UsageError
from retrotool.index.searching import AllowedChunks, AnyDatabase, Database, ExactDatabase, Point
from retrotool.neighbours.stage import members_of, pick_table
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.store import parts
from retrotool.store.expressions import Where
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Bools, Chunks, Ids, split_id
from retrotool.store.store import Store
from retrotool.store.tombstones import read_rejected, read_tombstones
from retrotool.tokenizers import stored_tokenizer

_KEPT_ROW_GROUPS = 64
_KEPT_PARTS = 8
_QUERIES = 256
_COMPARED = 50_000  # documents among which ids similar to an unknown one are looked for
_EXACT = 1 << 18  # chunks of ``where`` up to which all are compared: reading their vectors takes about a second


@dataclass(frozen=True, slots=True)
class Chunk:
    """A live chunk."""

    id: int
    document: str
    index: int  # its position in the document, from 0
    tokens: npt.NDArray[Any] = field(repr=False, compare=False)  # without padding
    text: str
    key: bool = True  # False: of the value of a key-value record, which is never searched

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class DocumentEntry:
    """A document. ``n_chunks`` and ``n_tokens`` include purged chunks, ``n_tokens`` not those erased.

    ``state`` is "live", "partly purged", "purged", "erased" or "duplicate" (of an earlier document).
    """

    id: str
    source: str
    first_chunk: int
    n_chunks: int
    n_tokens: int
    input: str
    position: int  # in the input: a byte offset, or a row
    state: str
    kept: dict[str, str | None]  # the fields that ``chunk --keep`` kept


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
        self._encoder = lru_cache(None)(partial(load_encoder, store))
        self._open_view()

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.totals.items())
        return f"<Reader of {self.path}: {counts}, commit {self.commit}>"

    def _open_view(self) -> None:
        store = self._store
        self._tombstones, self.tokenizer = read_tombstones(store), stored_tokenizer(store)
        # The caches belong to the view: a new commit may have other files.
        self._row_group = lru_cache(_KEPT_ROW_GROUPS)(lambda part, group: parts.read_chunks(store, part, [group]))
        self._documents = lru_cache(_KEPT_PARTS)(
            lambda part: parts.read_documents(store, part, ["id", "key", "first_row", "n_chunks"])
        )
        self._neighbour_rows = lru_cache(_KEPT_ROW_GROUPS)(
            lambda name, part, group: self._tables(name)[0].read(part, sys.maxsize, [group])
        )
        self._tables = lru_cache(None)(self._open_tables)
        self._database = lru_cache(None)(partial(Database, store))
        self._rejected = lru_cache(None)(partial(read_rejected, store))
        self._restricted = lru_cache(_KEPT_PARTS)(self._restrict)

    @property
    def commit(self) -> int:
        """Number of the commit that this reader sees (−1: none)."""
        return self._store.state.number

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of live documents, chunks and tokens, by these names."""
        counts = self._store.state.records.get("totals", {})
        return {name: int(counts.get(name, 0)) for name in ("documents", "chunks", "tokens")}

    def refresh(self) -> int:
        """Move to the newest commit and return its number; on an error, stay where it was."""
        before = self._store.state
        try:
            self._store.refresh()
            self._open_view()
        except BaseException:
            self._store.state = before
            raise
        return self.commit

    def parts(self) -> list[int]:
        """Return the numbers of all parts, ascending."""
        return self._store.state.parts()

    def is_live(self, ids: Sequence[int] | Ids) -> Bools:
        """Return which ids are chunks of the store that are neither purged nor erased: bool [n]."""
        return self._which(ids, lambda chunks, row: bool(chunks.n_tokens[row] > 0))

    def is_searchable(self, ids: Sequence[int] | Ids) -> Bools:
        """Return which ids can have and be neighbours: live chunks that are keys, bool [n]."""
        return self._which(ids, lambda chunks, row: bool(chunks.between(row, row + 1).embedded[0]))

    def _which(self, ids: Sequence[int] | Ids, fits: Callable[[Chunks, int], bool]) -> Bools:
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

    def tokens(self, ids: Sequence[int] | Ids) -> npt.NDArray[Any]:
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
        for part, place in self._places(name):
            row = self._documents(part).slice(place, 1).to_pylist()[0]
            ids = parts.chunk_ids(part, np.arange(row["first_row"], row["first_row"] + row["n_chunks"]))
            alive = ids[self.is_live(ids)]
            if len(alive):
                return [int(i) for i in alive]
        message = f"the store has no document {name!r}, or it was purged or rejected as a repeat"
        raise UsageError(message, self.did_you_mean(name))

    def _places(self, name: str) -> Iterator[tuple[int, int]]:
        key = id_hash(name)
        for part in self.parts():
            keys = self._documents(part)["key"]
            for place in np.flatnonzero(pc.equal(keys, pa.scalar(key, keys.type)).fill_null(False).to_numpy()):
                yield part, int(place)

    def did_you_mean(self, name: str) -> str:
        """Return a question with live documents' ids that are similar to ``name``; empty without any."""
        near = difflib.get_close_matches(name, (one.id for one in islice(self.documents(), _COMPARED)))
        return f"Did you mean {' or '.join(map(repr, near))}?" if near else ""

    def documents(self, where: str | None = None, *, purged: bool = False) -> Iterator[DocumentEntry]:
        """Return an iterator over live documents by ascending chunk id, reading 8,192 at a time.

        ``where``: those for which this expression over their columns is true, as for ``purge``. ``purged``:
        instead, those that are purged, wholly or in part, and duplicates; erased ones have no id any more.
        """
        wanted = None if where is None else Where.checked(self._store, where)
        states = ("partly purged", "purged", "duplicate") if purged else ("live", "partly purged")
        files = ((part, parts.part_entry(self._store, "documents", part)) for part in self.parts())
        tables = ((part, table) for part, entry in files for table in parts.read_tables(self._store, entry))
        some = ((part, table if wanted is None else table.filter(wanted.mask(table))) for part, table in tables)
        return (one for part, table in some for one in self._describe(part, table) if one.state in states)

    def kept_fields(self) -> list[str]:
        """Return the names of the fields that documents have kept, in any part."""
        entries = (parts.part_entry(self._store, "documents", part) for part in self.parts())
        names = dict.fromkeys(name for one in entries for name in parts.read_schema(self._store, one).names)
        return [name for name in names if name not in parts.RESERVED_COLUMNS]

    def documents_named(self, name: str) -> list[DocumentEntry]:
        """Return the documents of an id, live ones first; also purged ones and duplicates."""
        found = (self._document_at(part, place) for part, place in self._places(name))
        return sorted(found, key=lambda one: one.state not in ("live", "partly purged"))

    def document_of(self, chunk_id: int) -> DocumentEntry:
        """Return the document of a chunk that exists or did; the id of an erased one is empty."""
        part, row = split_id(chunk_id)
        self._check_live(part)
        first = self._documents(part)["first_row"].to_numpy()
        return self._document_at(part, int(np.searchsorted(first, row, side="right")) - 1)

    def _document_at(self, part: int, place: int) -> DocumentEntry:
        return next(self._describe(part, parts.read_documents(self._store, part).slice(place, 1)))

    def _describe(self, part: int, table: pa.Table) -> Iterator[DocumentEntry]:
        first = table["first_row"].to_numpy()
        last = first + table["n_chunks"].to_numpy()
        several = (self._tombstones.rows(part), self._rejected().rows(part))
        counts = [np.searchsorted(rows, last) - np.searchsorted(rows, first) for rows in several]
        for row, purged, repeated in zip(table.to_pylist(), *(one.tolist() for one in counts), strict=True):
            n, name = row["n_chunks"], row["id"] or ""
            whole = "erased" if not name else "duplicate" if repeated == n else "purged"
            state = "live" if not purged else whole if purged == n else "partly purged"
            kept = {name: value for name, value in row.items() if name not in parts.RESERVED_COLUMNS}
            yield DocumentEntry(
                name, row["source"] or "", parts.join_id(part, row["first_row"]), n, row["n_tokens"],
                row["input"] or "", row["position"] or 0, state, kept,
            )  # fmt: skip

    def chunk_ids(self, part: int) -> Ids:
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

    def neighbour_ids(self, chunk_id: int, name: str | None = None, k: int | None = None) -> list[tuple[int, float]]:
        """Return (id, distance) of a chunk's live neighbours, nearest first, as ``neighbours`` does.

        ``UsageError`` for a mixture, in which ids alone are ambiguous: use ``neighbour_places``.
        """
        name = pick_table(self._store, name)
        if len(members_of(self._store, name)) > 1:
            advice = "Use neighbour_places(), which returns the database of each, or neighbours()."
            raise UsageError(f"the neighbours {name!r} come from several databases, so ids alone are ambiguous", advice)
        return [(i, distance) for _, i, distance in self.neighbour_places(chunk_id, name, k)]

    def neighbour_places(
        self, chunk_id: int, name: str | None = None, k: int | None = None
    ) -> list[tuple[str, int, float]]:
        """Return (database, id, distance) of live neighbours, by distance (mixtures: distance / weight)."""
        return [(database.path, i, distance) for database, i, distance in self._near(chunk_id, name, k)]

    def neighbours(self, chunk_id: int, name: str | None = None, k: int | None = None) -> list[Neighbour]:
        """Return a chunk's live neighbours with their continuations, ordered as by ``neighbour_places``.

        ``name``: a table, by default main or the only one. ``k``: at most as many as it has saved, by default
        the table's k.
        """
        return [database.neighbour(i, distance) for database, i, distance in self._near(chunk_id, name, k)]

    def _near(self, chunk_id: int, name: str | None, k: int | None) -> list[tuple[Reader, int, float]]:
        name = pick_table(self._store, name)
        reader, databases = self._tables(name)
        k = reader.choose_k(k)
        if not self.is_live([chunk_id])[0]:
            raise UsageError(f"the store has no chunk {chunk_id}, or it was purged")
        part, row = split_id(chunk_id)
        found, row = self._neighbour_rows(name, part, row // ROW_GROUP), row % ROW_GROUP
        near = np.flatnonzero(found.ids[row] != NO_NEIGHBOUR)[:k]
        return [
            (databases[found.databases[row, i]], int(found.ids[row, i]), float(found.distances[row, i])) for i in near
        ]

    def neighbour(self, chunk_id: int, distance: float) -> Neighbour:
        """Return a chunk of this store as a neighbour at ``distance``."""
        return Neighbour(chunk_id, distance, self.chunk(chunk_id), self.continuation(chunk_id), self.path)

    def _open_tables(self, name: str) -> tuple[NeighbourReader, list[Reader]]:
        reader = NeighbourReader(self._store, name)
        return reader, [self if member.within else Reader(member.store) for member in reader.members]

    def search(
        self,
        text: str | npt.NDArray[Any],
        k: int = SHOWN,
        index: str | None = None,
        encoder: Encoder | None = None,
        **options: Any,
    ) -> list[Neighbour]:
        """Return the k live keys nearest to a text or vector; ``options`` are those of ``search_many``."""
        return self.search_many([text], k, index, encoder, **options)[0]

    def search_many(
        self,
        texts: Sequence[str | npt.NDArray[Any]],
        k: int = SHOWN,
        index: str | None = None,
        encoder: Encoder | None = None,
        *,
        where: str | None = None,
        nprobe: int | None = None,
        rerank: int | None = None,
        allow_missing: bool = False,
    ) -> list[list[Neighbour]]:
        """Return the k live keys nearest to each text, or vector [d] of its encoder; or all if fewer.

        ``encoder``: by default the index's, which is loaded once. ``where``: only chunks of ``documents`` for
        which it is true; up to 262,144 are all compared, unless the operating point is given: ``nprobe``
        (lists to probe) and ``rerank`` (candidates for 10 neighbours), by default the index's.
        ``allow_missing`` is as for ``database``. 256 texts at a time are embedded and searched for.
        """
        database: AnyDatabase = self.database(index, allow_missing=allow_missing)
        if where is not None:
            database = self._restricted(index, where, allow_missing, nprobe is None and rerank is None)
        search: Callable[[Queries, int], Best]
        if isinstance(database, Database):
            point = Point(nprobe or database.point.nprobe, rerank or database.point.depth)
            search = partial(database.search, point=point)
        else:
            search = partial(database.search, only=self.database(index, allow_missing=allow_missing).held())
        found = list[list[Neighbour]]()
        for start in range(0, len(texts), _QUERIES):
            vectors = self._query_vectors(texts[start : start + _QUERIES], index, encoder)
            best = search(Queries.plain(vectors), k)
            for ids, distances in zip(best.ids.tolist(), best.distances.tolist(), strict=True):
                found.append([self.neighbour(i, d) for i, d in zip(ids, distances, strict=True) if i >= 0])
        return found

    def _query_vectors(
        self, texts: Sequence[str | npt.NDArray[Any]], index: str | None, encoder: Encoder | None
    ) -> npt.NDArray[np.float32]:
        d, name = self.database(index).trained.d, self.database(index).encoder
        rows = [np.zeros(d) if isinstance(one, str) else np.asarray(one, np.float32).reshape(-1) for one in texts]
        if any(row.shape != (d,) or not np.isfinite(row).all() for row in rows):
            raise UsageError(f"not a finite vector of {d} dimensions, as encoder {name!r} has")
        found, written = np.array(rows, np.float32), [i for i, one in enumerate(texts) if isinstance(one, str)]
        for text in (str(texts[i]) for i in written):
            if not text.strip():
                raise UsageError("the text to search for is empty")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError("the text to search for is not Unicode")
        if written:
            loaded = encoder or self.load_encoder(index)
            tokens = [loaded.tokenize_query(str(texts[i])) for i in written]
            joined = Rows(np.concatenate([one.ids for one in tokens]), np.concatenate([one.lengths for one in tokens]))
            found[written] = loaded.embed(joined)
        return found

    def _restrict(self, index: str | None, where: str, allow_missing: bool, exact: bool) -> AnyDatabase:
        allowed = AllowedChunks(self._store, Where.checked(self._store, where))
        if exact and allowed.count <= _EXACT:
            return ExactDatabase(self._store, self.database(index).encoder, allows=allowed)
        return Database(self._store, index, allow_missing=allow_missing, allows=allowed)

    def database(self, index: str | None = None, *, allow_missing: bool = False) -> Database:
        """Open an index of the store, once; ``allow_missing`` skips its broken shards, which it lists."""
        return self._database(index, allow_missing=allow_missing)

    def load_encoder(self, index: str | None = None, device: str = "auto") -> Encoder:
        """Load the encoder of an index, once; ``UsageError`` if it is unavailable or has changed."""
        return self._encoder(self.database(index).encoder, device)


def _ids(ids: Sequence[int] | Ids) -> Ids:
    """Return chunk ids as int64 [n]; −1, which is not an id, for numbers that int64 can't hold."""
    try:
        return np.asarray(ids, np.int64).reshape(-1)
    except OverflowError:
        return np.array([i if 0 <= i < 1 << 63 else -1 for i in map(int, ids)], np.int64)


def open_store(path: str | Path) -> Reader:
    """Open a store for reading; ``StoreNotFoundError`` if it does not exist."""
    return Reader(Store.open(path))
