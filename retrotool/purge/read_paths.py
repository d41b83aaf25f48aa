"""What comes up of some chunks, by every way in which a store is read: for the proof that they are purged.

Each way is gone by the door that its command uses, not by a shorter one: chunks, documents, continuations and
embeddings by ``Reader``; every index by searches; every table of neighbours as ``inspect`` and ``export`` read it, as
a training loop does, and as it is handed over. Cost: the chunks of the parts concerned, and three readings of every
table. Memory: some thousand rows.

Queries of the searches are the chunks' own vectors, or once these are erased those of the living rows beside them: at
most 1,000 an index. Lists of indexes are looked through by ``stages.residue``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries
from retrotool.embed.search_scope import embedded_parts, find_documents, read_part_vectors
from retrotool.errors import RetrotoolError, StoreNotFoundError, UsageError
from retrotool.export.tables import open_tables, read_blocks
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones, read_tombstones
from retrotool.train.training_rows import TrainingReader

_QUERIES, _NEAREST, _BESIDE = 1000, 100, 200
_TABLES = "neighbours:"

Ids = npt.NDArray[np.int64]
Report = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class View:
    """A way to read a store: how many ``rows`` were looked at, and how many times a purged chunk was among them.

    ``note``: why it could not be gone; ``broken``: as a file of the store is not what it should be.
    """

    name: str
    rows: int
    found: int
    note: str = ""
    broken: bool = False


def look(store: Store, chunks: Ids, report: Report = lambda _: None) -> list[View]:
    """Go every way; ``chunks`` are ids, ascending. ``report`` is called with 1 after each of ``ways``."""
    found = []
    for way in _ways(store, Tombstones(chunks)):
        found.append(way())
        report(1)
    return found


def ways(store: Store) -> int:
    """How many ways there are."""
    return sum(1 for _ in _ways(store, Tombstones(np.zeros(0, np.int64))))


def _ways(store: Store, victims: Tombstones) -> Iterator[Callable[[], View]]:
    reader = Reader(store)
    ways: list[tuple[str, Callable[[], tuple[int, int]]]] = [
        ("chunks", partial(_chunks, reader, victims)),
        ("documents", partial(_documents, store, victims)),
    ]
    ways += [
        (f"embeddings {name}", partial(_embeddings, reader, store, name, victims))
        for name in store.state.names("embeddings")
    ]
    ways += [(f"search {name}", partial(_search, reader, store, name, victims)) for name in store.state.names("index")]
    for name in sorted(store.state.with_prefix(_TABLES)):
        for what, way in (("neighbours", _neighbours), ("dataset", _dataset), ("export", _export)):
            ways.append((f"{what} {name}", partial(way, store, name, victims)))
    return (_safely(title, way) for title, way in ways)


def _safely(title: str, way: Callable[[], tuple[int, int]]) -> Callable[[], View]:
    """A way that may not be there: as a database of a table is gone, or a file."""

    def gone() -> View:
        try:
            return View(title, *way())
        except (UsageError, StoreNotFoundError) as error:
            return View(title, 0, 0, str(error))
        except (RetrotoolError, FileNotFoundError) as error:
            return View(title, 0, 0, f"can't be read: {error}", broken=True)

    return gone


def _chunks(reader: Reader, victims: Tombstones) -> tuple[int, int]:
    """By their ids, in the lists of their parts, and as what follows the chunk before."""
    present = set(reader.parts())
    ids = victims.ids[np.isin(victims.ids >> PART_SHIFT, list(present))]
    rows, found = len(ids), int(reader.is_living(ids).sum())
    for part in present.intersection(victims.parts()):
        listed = reader.chunk_ids(part)
        rows, found = rows + len(listed), found + int(victims.contains(listed).sum())
    for chunk in _some(ids).tolist():
        following = reader.continuation(chunk - 1) if chunk & ((1 << PART_SHIFT) - 1) else None
        rows, found = rows + 1, found + (following is not None and following.id == chunk)
    return rows, found


def _documents(store: Store, victims: Tombstones) -> tuple[int, int]:
    """By the ids of the documents that have none but purged chunks, as long as these ids are there."""
    rows = found = 0
    tombstones = read_tombstones(store)
    for part in set(victims.parts()).intersection(store.state.parts()):
        table = parts.read_documents(store, part, ["key", "first_row", "n_chunks"])
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        mine = victims.rows(part)
        whole = np.flatnonzero(np.searchsorted(mine, first + count) - np.searchsorted(mine, first) == count)
        gone = find_documents(store, table["key"].take(whole), tombstones)
        low, high = np.searchsorted(victims.ids, gone.first), np.searchsorted(victims.ids, gone.last, side="right")
        rows, found = rows + len(whole), found + int((high > low).sum())
    return rows, found


def _embeddings(reader: Reader, store: Store, name: str, victims: Tombstones) -> tuple[int, int]:
    rows = found = 0
    for part in set(victims.parts()).intersection(embedded_parts(store, name)):
        mine = victims.rows(part)
        rows, found = rows + len(mine), found + int(reader.embeddings(part, name)[mine].any(axis=1).sum())
    return rows, found


def _search(reader: Reader, store: Store, name: str, victims: Tombstones) -> tuple[int, int]:
    database = reader.database(name)
    queries: list[npt.NDArray[np.float16]] = []
    for chunk in _some(victims.ids).tolist():
        part, row = chunk >> PART_SHIFT, chunk & ((1 << PART_SHIFT) - 1)
        if store.state.part_file("embeddings", part, database.encoder) is not None:
            matrix = read_part_vectors(store, database.encoder, part)
            low = max(0, row - _BESIDE)
            full = low + np.flatnonzero(matrix[low : row + _BESIDE + 1].any(axis=1))
            if len(full):
                queries.append(matrix[full[np.argmin(np.abs(full - row))]])
    if not queries:
        queries = _any_living(reader, store, database.encoder)
    if not queries:
        return 0, 0
    best = database.search(Queries.plain(np.stack(queries).astype(np.float32)), _NEAREST)
    return len(queries), int(victims.contains(best.ids).sum())


def _any_living(reader: Reader, store: Store, encoder: str) -> list[npt.NDArray[np.float16]]:
    """Some vectors of a part that has any."""
    for part in embedded_parts(store, encoder):
        matrix = reader.embeddings(part, encoder)
        full = np.flatnonzero(matrix.any(axis=1))[:_BESIDE]
        if len(full):
            return list(matrix[full])
    return []


def _neighbours(store: Store, name: str, victims: Tombstones) -> tuple[int, int]:
    """All that a table has of each row, as many as were saved."""
    reader = NeighbourReader(store, name)
    within = [number for number, member in enumerate(reader.members) if member.within]
    rows = found = 0
    for part in reader.parts():
        size = parts.part_entry(store, "chunks", part).rows
        for group in range(-(-size // ROW_GROUP)):
            near = reader.read(part, reader.saved, [group])
            rows += len(near.ids)
            found += sum(int(victims.contains(np.where(near.is_of(i), near.ids, NO_NEIGHBOUR)).sum()) for i in within)
    return rows, found


def _dataset(store: Store, name: str, victims: Tombstones) -> tuple[int, int]:
    """What a training loop gets: rows, and neighbours with their text."""
    reader = TrainingReader(str(store.root), name, None)
    members = reader.rows.reader.members
    rows = found = 0
    for part in reader.rows.reader.parts():
        size = parts.part_entry(store, "chunks", part).rows
        for group in range(-(-size // ROW_GROUP)):
            block = reader.read_blocks([(part, group)])
            rows += len(block.ids) - 1
            found += int(victims.contains(block.ids).sum())
            near = block.neighbours
            for number, member in enumerate(members):
                if member.within:
                    found += int(victims.contains(np.where(near.databases == number, near.ids, NO_NEIGHBOUR)).sum())
    return rows, found


def _export(store: Store, name: str, victims: Tombstones) -> tuple[int, int]:
    opened = open_tables(store, name)
    within = [number for number, member in enumerate(opened.reader.members) if member.within]
    rows = found = 0
    for block, _ in read_blocks(opened):
        rows += len(block)
        found += int(victims.contains(block.ids).sum())
        near = block.found
        found += sum(int(victims.contains(np.where(near.is_of(i), near.ids, NO_NEIGHBOUR)).sum()) for i in within)
    return rows, found


def _some(ids: Ids) -> Ids:
    """At most so many, from all over them."""
    return ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), _QUERIES)).astype(np.int64))] if len(ids) else ids
