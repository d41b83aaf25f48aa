"""``inspect``: chunks beside their neighbours, as a result object and as an HTML page.

For each chunk and each neighbour with its continuation, ``token_overlap`` finds the longest common run of
tokens, and the texts are cut around it. Chunks of different tokenizers, or of more than 64 tokens, are shown
without a run.

Cost: per block, each row group and documents file that holds a neighbour is read once; about 20,000
neighbours per second and core. Memory: one block with its texts, about 9 kB per neighbour, for any number of
chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.cli import pages
from retrotool.cli.command_lines import command_line
from retrotool.cli.output import count
from retrotool.cli.result_files import check_file
from retrotool.embed.search_scope import SearchableRows
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.index.index_records import index_record
from retrotool.neighbours.retrieved import Pieces, read_pieces
from retrotool.neighbours.table_reader import Found, NeighbourReader
from retrotool.neighbours.token_overlap import LONGEST, longest_common
from retrotool.reader import Reader
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Ids, format_id, join_id, rows_by_part, split_id
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import stored_tokenizer
from retrotool.tokenizers.tokenizer import Split, split_texts

# Shortest common run that is marked. Of pairs of unrelated chunks from manuals, a third share 2 tokens in a
# row, 5 % share 3, 1.2 % share 4 ("on the command line") and 0.6 % share 5.
MARKED_FROM = 5
_BLOCK = 1 << 13  # neighbours per block
_BINS = 8


@dataclass(frozen=True, slots=True)
class CommonRun:
    """The longest run of tokens that a chunk shares with a neighbour and its continuation, joined.

    ``chunk``, ``text`` (the neighbour) and ``continuation`` (None if it has none) are cut around the run.
    """

    tokens: int
    r: float
    start: int
    start_in_neighbour: int
    marked: bool
    chunk: Split
    text: Split
    continuation: Split | None


@dataclass(frozen=True, slots=True)
class InspectedNeighbour:
    """A neighbour, see ``docs/json.md``; ``common`` is None if the tokens can't be compared."""

    id: int
    distance: float
    document: str
    source: str
    index: int
    of: int
    database: str
    text: str
    continuation: str | None
    common: CommonRun | None

    def marked_text(self) -> Split:
        """Return the text cut around the run if that is marked, else with an empty run at the end."""
        return self._cut(self.text, self.common.text if self.common is not None else None)

    def marked_continuation(self) -> Split:
        """Return the continuation cut like the text, empty without one."""
        return self._cut(self.continuation or "", self.common.continuation if self.common is not None else None)

    def _cut(self, text: str, split: Split | None) -> Split:
        marked = self.common is not None and self.common.marked
        return _trimmed(split) if marked and split is not None and split.run else Split(text, "", "")


@dataclass(frozen=True, slots=True)
class InspectedChunk:
    """A chunk with its neighbours, nearest first; values of key-value records (``key`` False) have none."""

    id: int
    document: str
    source: str
    index: int
    of: int
    n_tokens: int
    key: bool
    text: str
    neighbours: tuple[InspectedNeighbour, ...]

    def longest_run(self) -> int:
        """Return the tokens of the longest run in common with a neighbour, 0 without a comparable one."""
        return max((near.common.tokens for near in self.neighbours if near.common is not None), default=0)

    def why_none(self) -> str:
        """Return a sentence on why there are no neighbours."""
        if not self.key:
            key = format_id(self.id - self.index)
            return f"Not a key: values of key-value records are never searched for. Its key is chunk {key}."
        return "No neighbours: none was found, or all that were saved are purged."

    def segments(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield pieces of the text, each with the ranks (from 1) of neighbours whose marked run covers it."""
        spans = list(self._spans())
        cuts = sorted({0, len(self.text), *(cut for _, low, high in spans for cut in (low, high))})
        for low, high in pairwise(cuts):
            yield self.text[low:high], tuple(rank for rank, start, stop in spans if start <= low and high <= stop)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        for rank, near in enumerate(self.neighbours, 1):
            if near.common is not None and near.common.marked and near.common.chunk.run:
                split = _trimmed(near.common.chunk)
                yield rank, len(split.before), len(split.before) + len(split.run)


_Place = tuple[str, str, int, int]  # id and source of a chunk's document, position in it, chunks of the document


@dataclass(frozen=True, slots=True)
class _Block:
    """Chunk ids [n], their ``tokens`` [n, chunk_length], and their neighbours [n, k]."""

    chunks: Ids
    tokens: npt.NDArray[Any]
    n_tokens: Ids
    key: npt.NDArray[np.bool_]
    near: Found


class Inspector:
    """Iterates over blocks of the chunks ``ids``, which are ascending, live, and in parts with tables.

    ``result`` has the figures of the blocks that were read so far, and ``kept`` their chunks, if ``keep``.
    """

    def __init__(self, reader: NeighbourReader, k: int, ids: Ids, result: InspectResult, keep: bool) -> None:
        self._reader, self._k, self._ids, self._keep = reader, k, ids, keep
        self._store, self.result = reader.store, result
        self.kept: list[InspectedChunk] = []
        self._tokenizer = stored_tokenizer(reader.store)
        self._tokenizers = [
            self._tokenizer if _same_tokenizer(self._store, one) else stored_tokenizer(one) for one in reader.databases
        ]

    def __iter__(self) -> Iterator[list[InspectedChunk]]:
        size = max(_BLOCK // max(self._k, 1), 1)
        with counting("inspect", "chunk", len(self._ids)) as report:
            for start in range(0, len(self._ids), size):
                block = self._inspect(self._read(self._ids[start : start + size]))
                self.result = self.result.adding(block)
                if self._keep:
                    self.kept += block
                yield block
                report(len(block))

    def _read(self, ids: Ids) -> _Block:
        found: list[tuple[Any, ...]] = []
        for part, rows in rows_by_part(ids):
            groups, place = _row_groups(rows)
            chunks = parts.read_chunks(self._store, part, groups)
            near = self._reader.read(part, self._k, groups) if self._k else Found.nothing(len(chunks), 0)
            found.append((
                chunks.tokens[place], chunks.n_tokens[place].astype(np.int64), chunks.key[place],
                near.ids[place], near.distances[place], near.databases[place],
            ))  # fmt: skip
        tokens, n_tokens, key, *neighbours = (np.concatenate(column) for column in zip(*found, strict=True))
        return _Block(ids, tokens, n_tokens, key, Found(*neighbours))

    def _inspect(self, block: _Block) -> list[InspectedChunk]:
        k = block.near.ids.shape[1]
        near: list[InspectedNeighbour | None] = [None] * block.near.ids.size
        for number in range(len(self._tokenizers)):
            own = (block.near.databases == number) & (block.near.ids != NO_NEIGHBOUR)
            self._describe(block, number, np.flatnonzero(own), near)
        places = _find_places(self._store, block.chunks)
        texts = self._tokenizer.decode_text(block.tokens, block.n_tokens)
        return [
            InspectedChunk(
                chunk, *place, int(block.n_tokens[i]), bool(block.key[i]), texts[i],
                tuple(one for one in near[i * k : (i + 1) * k] if one is not None),
            )
            for i, (chunk, place) in enumerate(zip(block.chunks.tolist(), places, strict=True))
        ]  # fmt: skip

    def _describe(self, block: _Block, number: int, some: Ids, near: list[InspectedNeighbour | None]) -> None:
        """Set the items ``some`` of the raveled neighbours [n · k], which belong to database ``number``."""
        ids = block.near.ids.ravel()[some]
        member = self._reader.members[number]
        pieces = read_pieces(member.store, member.tombstones, ids)
        places = _find_places(member.store, ids)
        distances = block.near.distances.ravel()[some].tolist()
        tokenizer, name = self._tokenizers[number], member.store.place
        texts, following = (
            tokenizer.decode_text(pieces.tokens[:, piece], pieces.n_tokens[:, piece]) for piece in (0, 1)
        )
        comparable = self.result.tables[number].comparable
        runs = self._runs(block, some // block.near.ids.shape[1], pieces) if comparable else None
        for i, (at, place) in enumerate(zip(some.tolist(), places, strict=True)):
            near[at] = InspectedNeighbour(
                int(ids[i]), distances[i], *place, name, texts[i],
                following[i] if pieces.n_tokens[i, 1] else None, runs[i] if runs is not None else None,
            )  # fmt: skip

    def _runs(self, block: _Block, rows: Ids, pieces: Pieces) -> list[CommonRun]:
        tokens, n_tokens = block.tokens[rows], block.n_tokens[rows]
        found = longest_common(tokens, n_tokens, *pieces.joined())
        n_first = pieces.n_tokens[:, 0]
        stop = found.other + found.length
        split = self._tokenizer
        chunks = split_texts(split, tokens, n_tokens, found.start, found.start + found.length)
        texts = split_texts(split, pieces.tokens[:, 0], n_first, found.other, np.minimum(stop, n_first))
        following = split_texts(
            split, pieces.tokens[:, 1], pieces.n_tokens[:, 1], np.maximum(found.other - n_first, 0), stop - n_first
        )
        length = self._store.identity.chunk_length
        return [
            CommonRun(
                int(found.length[i]), int(found.length[i]) / length, int(found.start[i]), int(found.other[i]),
                bool(found.length[i] >= MARKED_FROM), chunks[i], texts[i],
                following[i] if pieces.n_tokens[i, 1] else None,
            )
            for i in range(len(rows))
        ]  # fmt: skip


def _same_tokenizer(one: Store, other: Store) -> bool:
    return one.identity.tokenizer.sha256 == other.identity.tokenizer.sha256


def _trimmed(split: Split) -> Split:
    if not (run := split.run.strip()):
        return split
    before, _, after = split.run.partition(run)
    return Split(split.before + before, run, after + split.after)


def _row_groups(rows: Ids) -> tuple[list[int], Ids]:
    """Return the ascending row groups that hold ``rows`` of a part, and the position of each row in them."""
    groups, number = np.unique(rows // ROW_GROUP, return_inverse=True)
    return groups.tolist(), number * ROW_GROUP + rows % ROW_GROUP


def _find_places(store: Store, ids: Ids) -> list[_Place]:
    found: dict[int, _Place] = {}
    for part, rows in rows_by_part(np.unique(ids)):
        groups, place = _row_groups(rows)
        entry = parts.part_entry(store, "chunks", part)
        chunks = parts.read_parquet(store, entry, ["doc", "index"], groups).take(place)
        documents = parts.read_documents(store, part, ["id", "source", "n_chunks"]).take(chunks["doc"])
        columns = [documents["id"], documents["source"], chunks["index"], documents["n_chunks"]]
        for row, name, source, index, of in zip(rows.tolist(), *(c.to_pylist() for c in columns), strict=True):
            found[join_id(part, row)] = name, source or "", index, of
    return [found[chunk] for chunk in ids.tolist()]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which chunks to show: one by its id, the keys of a document, or random ones, by default three."""

    chunk: int | None = None
    document: str | None = None
    random: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TableRead:
    """A neighbour table that was read, and its database."""

    name: str
    database: str
    weight: float
    index: str  # "": exact search
    encoder: str
    recall_at_10: float | None  # None: not measured
    comparable: bool  # whether the tokens of the database can be compared with those of the query store


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What ``inspect`` shows: ``shown`` chunks, of which ``without`` have none of the ``neighbours``."""

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
    marked: int = 0  # chunks that share a run of ``marked_from`` tokens or more with a neighbour
    farthest: float = 0.0
    histogram: tuple[int, ...] = (0,) * _BINS  # chunks by the r of their longest run, in eighths; the last has r = 1
    chunks: tuple[InspectedChunk, ...] = ()
    page: str = ""

    def adding(self, block: Sequence[InspectedChunk]) -> InspectResult:
        """Return the result with the figures of ``block`` added; the chunks themselves are not kept."""
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
    table: str | None = None,
    k: int | None = None,
    page: str | Path | None = None,
    keep: bool = True,
) -> InspectResult:
    """Show chunks of the query store ``root`` with their ``k`` nearest neighbours (default: the table's k).

    ``table`` is by default main, or the only one. ``page``: also write them as HTML to this file. ``keep``
    False: the result has the figures only, so that memory does not grow with the number of chunks.
    """
    if page is not None:
        check_file("--html", page)
    if [choice.chunk, choice.document, choice.random].count(None) < 2:
        raise UsageError("give one of --chunk, --document and --random")
    if choice.random is not None and choice.random < 1:
        raise UsageError(f"--random {choice.random} is less than 1")
    return retry_overtaken(lambda: _inspect(Store.open(root), choice, table, k, page, keep))


def _inspect(
    store: Store, choice: Choice, table: str | None, k: int | None, page: str | Path | None, keep: bool
) -> InspectResult:
    has_any = table is not None or store.state.with_prefix("neighbours:")
    neighbours = NeighbourReader(store, table if has_any else "")
    k = neighbours.choose_k(k) if has_any else 0
    ids, chosen = _choose(store, neighbours, choice)
    length, tables = store.identity.chunk_length, []
    for member in neighbours.members:
        record = store.state.records[f"neighbours:{member.table}"]
        index = index_record(member.store.state, record["index"])
        comparable = length <= LONGEST and _same_tokenizer(store, member.store)
        tables.append(TableRead(
            member.table, member.store.place, member.weight, str(record["index"]), str(record["encoder"]),
            None if index is None else index.recall_at_10, comparable,
        ))  # fmt: skip
    result = InspectResult(
        store.place, store.state.number, neighbours.name, chosen, k, tuple(tables), length, MARKED_FROM,
        page=str(page or ""),
    )  # fmt: skip
    blocks = Inspector(neighbours, k, ids, result, keep)
    if page is None:
        for _ in blocks:
            pass
    else:
        pages.write_page(page, "inspect.html", blocks=blocks)
    return replace(blocks.result, chunks=tuple(blocks.kept))


def _choose(store: Store, reader: NeighbourReader, choice: Choice) -> tuple[Ids, str]:
    if choice.chunk is None and choice.document is None:
        return _draw(store, reader, choice.random or 3, choice.seed)
    view = Reader(store)
    if choice.chunk is not None:
        found, words = [_check_chunk(store, view, choice.chunk)], f"chunk {format_id(choice.chunk)}"
    else:
        document = str(choice.document)
        found = [i for i in view.document(document) if view.is_searchable([i])[0]]
        words = f"document {document}"
        if not found:
            raise UsageError(f"the document {document!r} has only values left: its key was purged")
    have = set(reader.parts())
    for chunk in found:
        if (part := split_id(chunk)[0]) not in have:
            raise UsageError(f"part {part} of {store.place} has no neighbours {reader.name!r} yet", reader.advice())
    return np.array(found, np.int64), words


def _check_chunk(store: Store, view: Reader, chunk: int) -> int:
    if view.is_live([chunk])[0]:
        return chunk
    if 0 <= chunk < 1 << 63 and read_tombstones(store).contains(np.array([chunk]))[0]:
        raise UsageError(f"chunk {format_id(chunk)} was purged")
    known = store.state.parts()
    if not known:
        raise UsageError(
            f"{store.place} has no chunks", f"Chunk documents: {command_line('chunk', store.place)} INPUT..."
        )
    last = join_id(known[-1], parts.part_entry(store, "chunks", known[-1]).rows - 1)
    raise UsageError(f"the store has no chunk {format_id(chunk)}", f"Ids are PART:ROW; the last is {format_id(last)}.")


def _draw(store: Store, reader: NeighbourReader, size: int, seed: int) -> tuple[Ids, str]:
    rows = SearchableRows(store, reader.parts(), read_tombstones(store))
    total = sum(rows.counts.values())
    if not total:
        raise UsageError(f"{store.place} has no chunk with neighbours {reader.name!r}", reader.advice())
    drawn = [parts.chunk_ids(part, some) for part, some in rows.draw(min(size, total), seed)]
    random = f"{count(size, 'random chunk')} of {total:,}, seed {seed}"
    return np.concatenate(drawn), random if size < total else f"all {count(total, 'chunk')}"
