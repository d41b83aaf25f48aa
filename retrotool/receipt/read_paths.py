"""Check that purged chunks are not returned by any read path.

Each path is exercised through the same entry point as its command or class:

- ``Reader``: chunks, documents, embeddings and continuations;
- searches with every index, and exact ones over the parts of the purged chunks;
- every neighbour table: the reader that ``inspect`` and ``export`` share, ``RetroDataset``, an export,
  ``inspect``;
- ``leakage`` with every index.

Search queries are the vectors of purged chunks, or once these are erased, those of the nearest rows that have
one.

Cost: the chunks of the parts concerned, and reading every neighbour table three times. Memory: some thousand
rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries
from retrotool.chunk.chunk_plan import documents_within
from retrotool.embed.search_scope import embedded_parts, read_part_vectors
from retrotool.errors import ErasedError, RetrotoolError, StoreNotFoundError, UsageError
from retrotool.export.run import open_tables, read_blocks
from retrotool.index.searching import Database, ExactDatabase
from retrotool.inspect.run import Choice, inspect
from retrotool.leakage.run import find_leaks
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.neighbours.token_overlap import LONGEST
from retrotool.ranges import spread
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.parts import ROW_GROUP, Ids, chunk_ids, split_id
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.train.dataset import RetroDataset

_QUERIES, _NEAREST, _BESIDE = 1000, 100, 200
_ASKED, _INSPECTED = 100, 200
_SLOTS, _BATCH = 16, 64  # chunks of a training sequence, and sequences of a batch
_NONE = -1  # stands for a requested chunk that was not returned

Returned = Iterator[Ids]
"""Ids [n] or [n, k] that a read path returned for n rows, ``_NONE`` where it returned nothing."""


@dataclass(frozen=True, slots=True)
class ReadPath:
    """A way to read a store: ``rows`` were read, and purged chunks ``found`` among them.

    ``note``: why the path could not be checked; ``broken``: because a file of the store is damaged.
    """

    name: str
    rows: int
    found: int
    note: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True)
class _Purged:
    """Purged ``chunks`` of a store; ``reader`` is on the newest commit."""

    store: Store
    reader: Reader
    chunks: Tombstones


def read_paths(store: Store, chunks: Tombstones) -> list[Callable[[], ReadPath]]:
    """Return a function per read path of a store that checks it; ``chunks`` are purged."""
    it = _Purged(store, Reader(store), chunks)
    paths = [("chunks", partial(_chunks, it)), ("documents", partial(_documents, it))]
    names = {
        "embeddings": store.state.names("embeddings"),
        "index": store.state.names("index"),
        "neighbours": sorted(store.state.with_prefix("neighbours:")),
    }
    for kind, several in _PATHS.items():
        for name in names[kind]:
            paths += [(f"{what} {name}", partial(read, it, name)) for what, read in several.items()]
    return [partial(_check_path, it.chunks, name, read) for name, read in paths]


def _check_path(purged: Tombstones, name: str, read: Callable[[], Returned]) -> ReadPath:
    rows = found = 0
    try:
        for ids in read():
            rows, found = rows + len(ids), found + int(purged.contains(ids).sum())
    except (UsageError, StoreNotFoundError) as error:
        return ReadPath(name, 0, 0, str(error))
    except ErasedError:
        raise  # not damage: another process replaced the file
    except (RetrotoolError, FileNotFoundError) as error:
        return ReadPath(name, 0, 0, f"can't be read: {error}", broken=True)
    return ReadPath(name, rows, found)


def _answer(chunk: int, ask: Callable[[], object]) -> Ids:
    """Return the chunk id unless ``ask`` refuses it with ``UsageError``."""
    try:
        ask()
    except UsageError:
        return np.array([_NONE])
    return np.array([chunk])


def _chunks(it: _Purged) -> Returned:
    """Read chunks by id, in lists of parts, with tokens and text, and as continuations."""
    reader, ids = it.reader, it.chunks.ids
    yield np.where(reader.is_live(ids), ids, _NONE)
    for part in it.chunks.parts():
        yield reader.chunk_ids(part)
    some = ids[spread(len(ids), _QUERIES)]
    yield np.where(reader.tokens(some).any(axis=1), some, _NONE)
    for chunk in some.tolist():
        following = reader.continuation(chunk - 1) if split_id(chunk)[1] else None
        yield np.array([_NONE if following is None else following.id])
        yield _answer(chunk, partial(reader.chunk, chunk))


def _documents(it: _Purged) -> Returned:
    """Look up wholly purged documents by id, unless their ids are erased."""
    for part in it.chunks.parts():
        names = parts.read_documents(it.store, part, ["id"])["id"]
        whole = documents_within(it.store, part, it.chunks)
        named = names.take(whole).drop_null()
        for name in named.take(spread(len(named), _QUERIES)).to_pylist():
            try:
                yield np.array([it.reader.document(name)], np.int64)
            except UsageError:
                yield np.array([_NONE])


def _embeddings(it: _Purged, name: str) -> Returned:
    for part in set(it.chunks.parts()).intersection(embedded_parts(it.store, name)):
        mine = it.chunks.rows(part)
        yield np.where(it.reader.embeddings(part, name)[mine].any(axis=1), chunk_ids(part, mine), _NONE)


def _search(it: _Purged, name: str) -> Returned:
    database = it.reader.database(name)
    for queries in _queries(it, database.encoder):
        yield database.search(queries, _NEAREST).ids


def _exact(it: _Purged, name: str) -> Returned:
    for queries in _queries(it, name):
        yield ExactDatabase(it.store, name).search(queries, _NEAREST, only=it.chunks.parts()).ids


def _queries(it: _Purged, encoder: str) -> Iterator[Queries]:
    """Yield vectors of some purged chunks, else of the nearest rows that have one, else of any rows."""
    found: list[npt.NDArray[np.float16]] = []
    for chunk in it.chunks.ids[spread(len(it.chunks), _QUERIES)].tolist():
        part, row = split_id(chunk)
        if it.store.state.part_file("embeddings", part, encoder) is not None:
            matrix = read_part_vectors(it.store, encoder, part)
            low = max(0, row - _BESIDE)
            full = low + np.flatnonzero(matrix[low : row + _BESIDE + 1].any(axis=1))
            if len(full):
                found.append(matrix[full[np.argmin(np.abs(full - row))]])
    for part in embedded_parts(it.store, encoder) if not found else []:
        matrix = read_part_vectors(it.store, encoder, part)
        found += list(matrix[np.flatnonzero(np.asarray(matrix).any(axis=1))[:_BESIDE]])
        if found:
            break
    if found:
        yield Queries.plain(np.stack(found).astype(np.float32))


def _leakage(it: _Purged, name: str) -> Returned:
    """Compare the first chunks of the store with their nearest neighbours in it."""
    if it.store.identity.chunk_length > LONGEST:
        raise UsageError(f"chunks of more than {LONGEST} tokens can't be compared")
    blocks = find_leaks(it.store, Database(it.store, name), within=True, report=lambda _: None)
    for leaks in itertools.islice(blocks, 1):
        yield np.column_stack([leaks["chunk"], leaks["neighbour"]])


def _own(reader: NeighbourReader, ids: Ids, databases: npt.NDArray[np.integer]) -> Ids:
    """Return the neighbours that are chunks of the store itself, ``_NONE`` for others."""
    within = [number for number, member in enumerate(reader.members) if member.within]
    return np.where(np.isin(databases, within), ids, _NONE)


def _neighbours(it: _Purged, name: str) -> Returned:
    """Read all saved neighbours of a table, then the neighbours of purged chunks."""
    table = NeighbourReader(it.store, name)
    for part in table.parts():
        size = parts.part_entry(it.store, "chunks", part).rows
        for group in range(-(-size // ROW_GROUP)):
            near = table.read(part, table.saved, [group])
            yield _own(table, near.ids, near.databases)
    for chunk in it.chunks.ids[spread(len(it.chunks), _ASKED)].tolist():
        yield _answer(chunk, partial(it.reader.neighbour_places, chunk, name))


def _dataset(it: _Purged, name: str) -> Returned:
    """Read an epoch as a training loop does: chunks and neighbours."""
    store = it.store
    dataset = RetroDataset(
        store.place, name, _SLOTS * store.identity.chunk_length, batch_size=_BATCH, shuffle=False, rank=0, world_size=1
    )
    table = NeighbourReader(store, name)
    for batch in dataset:
        ids, near = batch["chunk_ids"].numpy(), batch["neighbour_ids"].numpy()
        own = _own(table, near, batch["neighbour_databases"].numpy())
        returned = np.column_stack([ids.reshape(-1), own.reshape(ids.size, -1)])
        yield returned[(returned >= 0).any(axis=1)]


def _export(it: _Purged, name: str) -> Returned:
    reader, k = open_tables(it.store, name)
    for block, _, _ in read_blocks(reader, k):
        yield np.column_stack([block.ids, _own(reader, block.found.ids, block.found.databases)])


def _inspect(it: _Purged, name: str) -> Returned:
    """Show purged chunks, which must be refused, then random chunks with their neighbours."""
    store = it.store
    for chunk in it.chunks.ids[spread(len(it.chunks), _ASKED // 10)].tolist():
        yield _answer(chunk, partial(inspect, store.place, Choice(chunk=chunk), table=name))
    tombstones = read_tombstones(store)
    if all(len(tombstones.rows(part)) == parts.part_entry(store, "chunks", part).rows for part in store.state.parts()):
        return
    for shown in inspect(store.place, Choice(random=_INSPECTED), table=name).chunks:
        yield np.array([[shown.id, *(near.id for near in shown.neighbours if near.database == store.place)]])


_PATHS: dict[str, dict[str, Callable[[_Purged, str], Returned]]] = {
    "embeddings": {"embeddings": _embeddings, "exact search": _exact},
    "index": {"search": _search, "leakage": _leakage},
    "neighbours": {"neighbours": _neighbours, "dataset": _dataset, "export": _export, "inspect": _inspect},
}
