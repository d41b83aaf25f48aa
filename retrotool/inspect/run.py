"""``inspect``: chunks beside their neighbours, for people to read; as a result, and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrotool.cli import pages
from retrotool.cli.command_lines import table_command
from retrotool.cli.result_file import check_file
from retrotool.embed.search_scope import SearchableRows
from retrotool.engine.progress import counting
from retrotool.errors import ErasedError, UsageError
from retrotool.index.generations import index_key
from retrotool.inspect.inspected_rows import MARKED_FROM, InspectedChunk, Inspector
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

_ATTEMPTS = 3
"""How often it begins, when other processes erase what it reads."""

_BINS = 8

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which chunks: one by its id, the keys of a document, or random ones by a seed. One of the three is given."""

    chunk: int | None = None
    document: str | None = None
    random: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TableRead:
    """A table that neighbours were read of, and the database that they are chunks of.

    ``index`` is "" for exact search; ``recall_at_10`` is what was measured of it, None: nothing. ``comparable``:
    whether tokens of the database can be compared with those of the query store.
    """

    name: str
    database: str
    weight: float
    index: str
    encoder: str
    recall_at_10: float | None
    comparable: bool


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What ``inspect`` shows: ``shown`` chunks, ``without`` neighbours or with some, ``neighbours`` in all.

    ``marked`` chunks have a run of ``marked_from`` tokens or more in common with a neighbour. ``histogram`` counts
    chunks by r, of their longest run, in eighths; r = 1 is with the last.
    """

    store: str
    commit: int
    name: str
    chosen: str
    k: int
    tables: tuple[TableRead, ...]
    chunk_length: int
    marked_from: int
    shown: int = 0
    neighbours: int = 0
    without: int = 0
    marked: int = 0
    farthest: float = 0.0
    histogram: tuple[int, ...] = (0,) * _BINS
    chunks: tuple[InspectedChunk, ...] = ()
    page: str = ""

    def adding(self, block: Sequence[InspectedChunk]) -> InspectResult:
        """Return the result with the figures of more chunks; the chunks themselves are not kept."""
        histogram = list(self.histogram)
        for chunk in block:
            if chunk.neighbours:
                histogram[min(int(chunk.longest_run() * _BINS / self.chunk_length), _BINS - 1)] += 1
        distances = [near.distance for chunk in block for near in chunk.neighbours]
        return replace(
            self,
            shown=self.shown + len(block),
            neighbours=self.neighbours + len(distances),
            without=self.without + sum(not chunk.neighbours for chunk in block),
            marked=self.marked + sum(chunk.longest_run() >= self.marked_from for chunk in block),
            farthest=max(self.farthest, *distances) if distances else self.farthest,
            histogram=tuple(histogram),
        )


def inspect(
    root: str | Path,
    choice: Choice,
    *,
    name: str = "main",
    k: int | None = None,
    page: str | Path | None = None,
    keep: bool = True,
) -> InspectResult:
    """Show chunks of the query store ``root`` with their ``k`` nearest neighbours (default: the table's) in ``name``.

    ``page``: write them as HTML, too, block by block. ``keep`` False: the result has the figures, but not the chunks,
    so that memory does not grow with their number. The store is not changed.
    """
    if page is not None:
        check_file("--html", page)
    if [choice.chunk, choice.document, choice.random].count(None) != 2:
        raise UsageError("give one of --chunk, --document and --random")
    if choice.random is not None and choice.random < 1:
        raise UsageError(f"--random {choice.random}: it is a number of chunks")
    for attempt in range(_ATTEMPTS):
        try:
            return _inspect(Store.open(root), choice, name, k, page, keep)
        except ErasedError:  # another command put other files in place of those that were being read
            if attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _inspect(
    store: Store, choice: Choice, name: str, k: int | None, page: str | Path | None, keep: bool
) -> InspectResult:
    neighbours = NeighbourReader(store, name)
    if k is not None and not 1 <= k <= neighbours.saved:
        raise UsageError(f"-k {k}: the neighbours {name!r} have {neighbours.saved:,} saved")
    ids, chosen = _choose(store, neighbours, choice)
    inspector = Inspector(neighbours, k)
    result = InspectResult(
        str(store.root), store.state.number, name, chosen, neighbours.k if k is None else k,
        tuple(_tables(neighbours, inspector)), store.identity.chunk_length, MARKED_FROM, page=str(page or ""),
    )  # fmt: skip
    blocks = _Blocks(inspector, ids, result, keep)
    if page is None:
        for _ in blocks:
            pass
    else:
        pages.write_page(page, "inspect.html", blocks=blocks)
    return replace(blocks.result, chunks=tuple(blocks.kept))


class _Blocks:
    """Chunks block by block, as they are found. Their figures are added to ``result`` one block at a time."""

    def __init__(self, inspector: Inspector, ids: Ids, result: InspectResult, keep: bool) -> None:
        self._inspector, self._ids, self._keep = inspector, ids, keep
        self.result = result
        self.kept: list[InspectedChunk] = []

    def __iter__(self) -> Iterator[list[InspectedChunk]]:
        with counting("inspect", "chunk", len(self._ids)) as report:
            for block in self._inspector.blocks(self._ids):
                self.result = self.result.adding(block)
                if self._keep:
                    self.kept += block
                yield block
                report(len(block))


def _tables(reader: NeighbourReader, inspector: Inspector) -> Iterator[TableRead]:
    for (table, weight), database, comparable in zip(
        reader.tables, reader.databases, inspector.comparable, strict=True
    ):
        record = reader.store.state.records[f"neighbours:{table}"]
        measured = database.state.records.get(index_key(record["index"]), {}).get("recall_at_10")
        recall = None if measured is None else float(measured)
        yield TableRead(
            table, str(database.root), weight, str(record["index"]), str(record["encoder"]), recall, comparable
        )


def _choose(store: Store, reader: NeighbourReader, choice: Choice) -> tuple[Ids, str]:
    """Ids of the chunks, ascending, and in words which they are."""
    if choice.random is not None:
        return _draw(store, reader, choice.random, choice.seed)
    view = Reader(store)
    if choice.chunk is not None:
        found, words = [_check_chunk(store, view, choice.chunk)], f"chunk {choice.chunk}"
    else:
        document = str(choice.document)
        found = [i for i in view.document(document) if view.is_searchable([i])[0]]
        words = f"document {document}"
        if not found:
            raise UsageError(f"the document {document!r} has no key left: what it has are values of a purged one")
    have = set(reader.parts())
    for chunk in found:
        if chunk >> PART_SHIFT not in have:
            raise UsageError(
                f"part {chunk >> PART_SHIFT} of {store.root}, which has chunk {chunk}, has no neighbours "
                f"{reader.name!r} yet",
                "\n".join(f"Compute them: {command}" for command in _commands(store, reader)),
            )
    return np.array(found, np.int64), words


def _check_chunk(store: Store, view: Reader, chunk: int) -> int:
    if view.is_living([chunk])[0]:
        return chunk
    if 0 <= chunk < 1 << 63 and read_tombstones(store).contains(np.array([chunk]))[0]:
        raise UsageError(f"chunk {chunk} was purged")
    known = store.state.parts()
    if not known:
        raise UsageError(f"{store.root} has no chunks", f"Chunk documents: retrotool chunk {store.root} INPUT...")
    last = int(parts.chunk_ids(known[-1], np.array([parts.part_entry(store, "chunks", known[-1]).rows - 1]))[0])
    raise UsageError(f"the store has no chunk {chunk}", f"Ids are part << 32 | row; the last one is {last}.")


def _draw(store: Store, reader: NeighbourReader, size: int, seed: int) -> tuple[Ids, str]:
    rows = SearchableRows(store, reader.parts(), read_tombstones(store))
    total = sum(rows.counts.values())
    if not total:
        raise UsageError(
            f"{store.root} has no chunk with neighbours {reader.name!r}",
            "\n".join(f"Compute them: {command}" for command in _commands(store, reader)),
        )
    drawn = [parts.chunk_ids(part, some) for part, some in rows.draw(min(size, total), seed)]
    chunks = "chunk" if min(size, total) == 1 else "chunks"
    words = f"{size:,} random {chunks} of {total:,}, seed {seed}" if size < total else f"all {total:,} {chunks}"
    return np.concatenate(drawn), words


def _commands(store: Store, reader: NeighbourReader) -> Iterator[str]:
    """The commands that compute what the reader's tables lack."""
    for member in reader.members:
        yield table_command(store, member.table, member.store)
