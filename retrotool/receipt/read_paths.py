"""Check that purged chunks are not returned by any read path.

Each path is taken through the door that its command or class uses: chunks, documents, embeddings and continuations by
``Reader``, searches by every index and without one, every table of neighbours by the reader that ``inspect`` and
``export`` share, by ``RetroDataset``, by an export and by ``inspect``, and every index by ``leakage``.

Queries of searches are the chunks' own vectors as long as they are there, and then those of the nearest rows that have
one: at most 1,000. Exact searches look through the parts of the purged chunks. ``inspect`` shows 200 random chunks,
and ``leakage`` measures the first block of the store against itself.

Cost: the chunks of the parts concerned, and three readings of every table of neighbours. Memory: some thousand rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries
from retrotool.embed.search_scope import embedded_parts, read_part_vectors
from retrotool.engine.task import Report
from retrotool.errors import RetrotoolError, StoreNotFoundError, UsageError
from retrotool.export.tables import open_tables, read_blocks
from retrotool.index.exact import ExactDatabase
from retrotool.index.searching import Database
from retrotool.inspect.run import Choice, inspect
from retrotool.leakage.measure import find_leaks
from retrotool.neighbours.table_reader import Found, NeighbourReader
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.ids import part_of, split_id
from retrotool.store.parts import ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.train.dataset import RetroDataset

_QUERIES, _NEAREST, _BESIDE = 1000, 100, 200
_ASKED, _INSPECTED = 100, 200
_SLOTS, _BATCH = 16, 64
"""Chunks of a training sequence, and sequences of a batch."""
_LEAKAGE_CHUNK = 64
"""Tokens of the longest chunks that ``leakage`` compares."""

Ids = npt.NDArray[np.int64]
Counts = tuple[int, int]
"""How many rows were looked at, and how many times a purged chunk was among them."""


@dataclass(frozen=True, slots=True)
class ReadPath:
    """A way to read a store: ``rows`` were looked at, and a purged chunk was ``found`` among them so many times.

    ``note``: why the path could not be taken; ``broken``: because a file of the store is not what it should be.
    """

    name: str
    rows: int
    found: int
    note: str = ""
    broken: bool = False


def check_read_paths(store: Store, chunks: Ids, report: Report = lambda _: None) -> tuple[ReadPath, ...]:
    """Take every read path of a store; ``chunks`` are purged ids, ascending. ``report`` is called with 1 after each."""
    found = []
    for path in _paths(store, Tombstones(chunks)):
        found.append(path())
        report(1)
    return tuple(found)


def count_read_paths(store: Store) -> int:
    """Return how many read paths a store has."""
    return sum(1 for _ in _paths(store, Tombstones(np.zeros(0, np.int64))))


def _paths(store: Store, purged: Tombstones) -> Iterator[Callable[[], ReadPath]]:
    reader = Reader(store)
    ways: list[tuple[str, Callable[[], Counts]]] = [
        ("chunks", partial(_chunks, reader, purged)),
        ("documents", partial(_documents, reader, store, purged)),
    ]
    for name in store.state.names("embeddings"):
        ways.append((f"embeddings {name}", partial(_embeddings, reader, store, name, purged)))
        ways.append((f"exact search {name}", partial(_exact, store, name, purged)))
    for name in store.state.names("index"):
        ways.append((f"search {name}", partial(_search, reader, store, name, purged)))
        ways.append((f"leakage {name}", partial(_leakage, store, name, purged)))
    for name in sorted(store.state.with_prefix("neighbours:")):
        ways.append((f"neighbours {name}", partial(_neighbours, reader, store, name, purged)))
        for what, way in (("dataset", _dataset), ("export", _export), ("inspect", _inspect)):
            ways.append((f"{what} {name}", partial(way, store, name, purged)))
    return (partial(_taken, name, way) for name, way in ways)


def _taken(name: str, way: Callable[[], Counts]) -> ReadPath:
    """Take a path that may not be there: as the database of a table is elsewhere now, or a file is damaged."""
    try:
        return ReadPath(name, *way())
    except (UsageError, StoreNotFoundError) as error:
        return ReadPath(name, 0, 0, str(error))
    except (RetrotoolError, FileNotFoundError) as error:
        return ReadPath(name, 0, 0, f"can't be read: {error}", broken=True)


def _answers(ask: Callable[[], object]) -> bool:
    """Whether a question about a purged chunk is answered, and not refused as a wrong one."""
    try:
        ask()
    except UsageError:
        return False
    return True


def _chunks(reader: Reader, purged: Tombstones) -> Counts:
    """By their ids, in the lists of their parts, with tokens and text, and as what follows the chunk before."""
    present = set(reader.parts())
    ids = purged.ids[np.isin(part_of(purged.ids), list(present))]
    rows, found = len(ids), int(reader.is_living(ids).sum())
    for part in present.intersection(purged.parts()):
        listed = reader.chunk_ids(part)
        rows, found = rows + len(listed), found + int(purged.contains(listed).sum())
    some = _some(ids, _QUERIES)
    rows, found = rows + len(some), found + int(reader.tokens(some).any(axis=1).sum())
    for chunk in some.tolist():
        following = reader.continuation(chunk - 1) if split_id(chunk)[1] else None
        found += (following is not None and following.id == chunk) + _answers(partial(reader.chunk, chunk))
        rows += 2
    return rows, found


def _documents(reader: Reader, store: Store, purged: Tombstones) -> Counts:
    """By the ids of documents that have none but purged chunks, as long as these ids are there."""
    rows = found = 0
    for part in set(purged.parts()).intersection(reader.parts()):
        table = parts.read_documents(store, part, ["id", "first_row", "n_chunks"])
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        mine = purged.rows(part)
        whole = np.searchsorted(mine, first + count) - np.searchsorted(mine, first) == count
        places = np.flatnonzero(whole & (count > 0) & table["id"].is_valid().to_numpy())
        for name in table["id"].take(_some(places, _QUERIES)).to_pylist():
            try:
                ids = reader.document(name)
            except UsageError:
                ids = []
            rows, found = rows + 1, found + int(purged.contains(np.array(ids, np.int64)).any())
    return rows, found


def _embeddings(reader: Reader, store: Store, name: str, purged: Tombstones) -> Counts:
    rows = found = 0
    for part in set(purged.parts()).intersection(embedded_parts(store, name)):
        mine = purged.rows(part)
        rows, found = rows + len(mine), found + int(reader.embeddings(part, name)[mine].any(axis=1).sum())
    return rows, found


def _search(reader: Reader, store: Store, name: str, purged: Tombstones) -> Counts:
    database = reader.database(name)
    queries = _queries(store, database.encoder, purged)
    if queries is None:
        return 0, 0
    return len(queries), int(purged.contains(database.search(queries, _NEAREST).ids).sum())


def _exact(store: Store, name: str, purged: Tombstones) -> Counts:
    queries = _queries(store, name, purged)
    if queries is None:
        return 0, 0
    best = ExactDatabase(store, name).search(queries, _NEAREST, only=purged.parts())
    return len(queries), int(purged.contains(best.ids).sum())


def _queries(store: Store, encoder: str, purged: Tombstones) -> Queries | None:
    """Vectors of some purged chunks, or of the rows nearest to them that have one, or of any; None: there are none."""
    found: list[npt.NDArray[np.float16]] = []
    for chunk in _some(purged.ids, _QUERIES).tolist():
        part, row = split_id(chunk)
        if store.state.part_file("embeddings", part, encoder) is not None:
            matrix = read_part_vectors(store, encoder, part)
            low = max(0, row - _BESIDE)
            full = low + np.flatnonzero(matrix[low : row + _BESIDE + 1].any(axis=1))
            if len(full):
                found.append(matrix[full[np.argmin(np.abs(full - row))]])
    for part in embedded_parts(store, encoder) if not found else []:
        matrix = read_part_vectors(store, encoder, part)
        found += list(matrix[np.flatnonzero(matrix.any(axis=1))[:_BESIDE]])
        if found:
            break
    return Queries.plain(np.stack(found).astype(np.float32)) if found else None


def _leakage(store: Store, name: str, purged: Tombstones) -> Counts:
    """The chunks of the store's first parts compared with their nearest neighbours in it."""
    if store.identity.chunk_length > _LEAKAGE_CHUNK:
        raise UsageError(f"chunks of more than {_LEAKAGE_CHUNK} tokens can't be compared")
    blocks = find_leaks(store, Database(store, name), within=True, report=lambda _: None)
    rows = found = 0
    for leaks in itertools.islice(blocks, 1):
        rows += len(leaks.ids)
        found += int(purged.contains(leaks.ids).sum()) + int(purged.contains(leaks.neighbours).sum())
    return rows, found


def _within(reader: NeighbourReader) -> list[int]:
    """Numbers of the databases of a table that are the store itself."""
    return [number for number, member in enumerate(reader.members) if member.within]


def _count_neighbours(near: Found, within: Iterable[int], purged: Tombstones) -> int:
    return sum(int(purged.contains(np.where(near.is_of(i), near.ids, NO_NEIGHBOUR)).sum()) for i in within)


def _neighbours(reader: Reader, store: Store, name: str, purged: Tombstones) -> Counts:
    """All that a table has of each row, as many as were saved; and the neighbours of purged chunks."""
    table = NeighbourReader(store, name)
    within, rows, found = _within(table), 0, 0
    for part in table.parts():
        size = parts.part_entry(store, "chunks", part).rows
        for group in range(-(-size // ROW_GROUP)):
            near = table.read(part, table.saved, [group])
            rows, found = rows + len(near.ids), found + _count_neighbours(near, within, purged)
    for chunk in _some(purged.ids, _ASKED).tolist():
        rows, found = rows + 1, found + _answers(partial(reader.neighbour_places, chunk, name))
    return rows, found


def _dataset(store: Store, name: str, purged: Tombstones) -> Counts:
    """What a training loop gets in an epoch: chunks, and neighbours."""
    dataset = RetroDataset(
        store.root, name, _SLOTS * store.identity.chunk_length, batch_size=_BATCH, shuffle=False, rank=0, world_size=1
    )
    within = _within(NeighbourReader(store, name))
    rows = found = 0
    for batch in dataset:
        ids, near = batch["chunk_ids"].numpy(), batch["neighbour_ids"].numpy()
        own = np.isin(batch["neighbour_databases"].numpy(), within)
        rows += int((ids >= 0).sum())
        found += int(purged.contains(ids).sum()) + int((purged.contains(near) & own).sum())
    return rows, found


def _export(store: Store, name: str, purged: Tombstones) -> Counts:
    opened = open_tables(store, name)
    within, rows, found = _within(opened.reader), 0, 0
    for block, _ in read_blocks(opened):
        rows += len(block)
        found += int(purged.contains(block.ids).sum()) + _count_neighbours(block.found, within, purged)
    return rows, found


def _inspect(store: Store, name: str, purged: Tombstones) -> Counts:
    """Random chunks with their neighbours; and the purged chunks, which it must refuse to show."""
    rows = found = 0
    for chunk in _some(purged.ids, _ASKED // 10).tolist():
        rows, found = rows + 1, found + _answers(partial(inspect, store.root, Choice(chunk=chunk), name=name))
    own, tombstones = str(store.root), read_tombstones(store)
    if all(len(tombstones.rows(part)) == parts.part_entry(store, "chunks", part).rows for part in store.state.parts()):
        return rows, found
    for shown in inspect(store.root, Choice(random=_INSPECTED), name=name).chunks:
        near = [one.id for one in shown.neighbours if one.database == own]
        rows, found = rows + 1, found + int(purged.contains(np.array([shown.id, *near], np.int64)).sum())
    return rows, found


def _some(ids: Ids, most: int) -> Ids:
    """At most so many, from all over them."""
    return ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), most)).astype(np.int64))] if len(ids) else ids
