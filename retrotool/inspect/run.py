"""``inspect``: chunks beside their neighbours, as a result object and as an HTML page.

For each chunk and each neighbour with its continuation, ``token_overlap`` finds the longest common run of
tokens, and the texts are cut around it. Chunks of different tokenizers, or of more than 64 tokens, are shown
without a run.

Cost: per block, each row group and documents file that holds a neighbour is read once; about 20,000
neighbours per second and core. Memory: about 9 kB per neighbour.
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
        return self._cut(self.text, self.common.text if self.common else None)

    def marked_continuation(self) -> Split:
        """Return the continuation cut like the text, empty without one."""
        return self._cut(self.continuation or "", self.common.continuation if self.common else None)

    def marked_chunk(self) -> Split:
        """Return the text of the chunk cut like that of the neighbour; without a marked run it is empty."""
        return self._cut("", self.common.chunk if self.common else None)

    def _cut(self, text: str, split: Split | None) -> Split:
        if self.common is None or not self.common.marked or split is None or not split.run:
            return Split(text, "", "")
        if not (run := split.run.strip()):
            return split
        before, _, after = split.run.partition(run)
        return Split(split.before + before, run, after + split.after)


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
        runs = [(rank, near.marked_chunk()) for rank, near in enumerate(self.neighbours, 1)]
        spans = [(rank, len(run.before), len(run.before + run.run)) for rank, run in runs if run.run]
        cuts = sorted({0, len(self.text), *(cut for _, low, high in spans for cut in (low, high))})
        for low, high in pairwise(cuts):
            yield self.text[low:high], tuple(rank for rank, start, stop in spans if start <= low and high <= stop)


_Place = tuple[str, str, int, int]  # id and source of a chunk's document, position in it, chunks of the document


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


def _read_chunks(reader: NeighbourReader, k: int, tables: Sequence[TableRead], ids: Ids) -> Iterator[InspectedChunk]:
    """Yield some chunks, whose ids ascend, with their neighbours."""
    store, found = reader.store, list[tuple[Any, ...]]()
    for part, rows in rows_by_part(ids):
        groups, some = _row_groups(rows)
        chunks = parts.read_chunks(store, part, groups)
        near_of = reader.read(part, k, groups) if k else Found.nothing(len(chunks), 0)
        own = chunks.tokens[some], chunks.n_tokens[some].astype(np.int64), chunks.key[some]
        found.append((*own, near_of.ids[some], near_of.distances[some], near_of.databases[some]))
    tokens, n_tokens, key, *columns = (np.concatenate(column) for column in zip(*found, strict=True))
    all_ids, distances, which = (column.ravel() for column in columns)
    near = dict[int, InspectedNeighbour]()
    for number, (member, table) in enumerate(zip(reader.members, tables, strict=True)):
        mine = np.flatnonzero((which == number) & (all_ids != NO_NEIGHBOUR))
        pieces = read_pieces(member.store, member.tombstones, all_ids[mine])
        rows = mine // k
        runs = _runs(store, tokens[rows], n_tokens[rows], pieces) if table.comparable else [None] * len(mine)
        tokenizer = stored_tokenizer(member.store)
        texts, following = (
            tokenizer.decode_text(pieces.tokens[:, piece], pieces.n_tokens[:, piece]) for piece in (0, 1)
        )
        for i, (at, place) in enumerate(zip(mine.tolist(), _find_places(member.store, all_ids[mine]), strict=True)):
            near[at] = InspectedNeighbour(
                int(all_ids[at]), float(distances[at]), *place, table.database, texts[i],
                following[i] if pieces.n_tokens[i, 1] else None, runs[i],
            )  # fmt: skip
    texts_of_chunks = stored_tokenizer(store).decode_text(tokens, n_tokens)
    for i, (chunk, place) in enumerate(zip(ids.tolist(), _find_places(store, ids), strict=True)):
        own_near = tuple(near[j] for j in range(i * k, (i + 1) * k) if j in near)
        yield InspectedChunk(chunk, *place, int(n_tokens[i]), bool(key[i]), texts_of_chunks[i], own_near)


def _runs(store: Store, tokens: npt.NDArray[Any], n_tokens: Ids, pieces: Pieces) -> list[CommonRun]:
    """Return what each of n chunks has in common with a neighbour."""
    found = longest_common(tokens, n_tokens, *pieces.joined())
    start, other, length, n_first = found.start, found.other, found.length, pieces.n_tokens[:, 0]
    stop, split = other + length, stored_tokenizer(store)
    chunks = split_texts(split, tokens, n_tokens, start, start + length)
    texts = split_texts(split, pieces.tokens[:, 0], n_first, other, np.minimum(stop, n_first))
    n_next, begin = pieces.n_tokens[:, 1], np.maximum(other - n_first, 0)
    following = split_texts(split, pieces.tokens[:, 1], n_next, begin, stop - n_first)
    return [
        CommonRun(
            n, n / store.identity.chunk_length, int(start[i]), int(other[i]), n >= MARKED_FROM, chunks[i], texts[i],
            following[i] if n_next[i] else None,
        )
        for i, n in enumerate(length.tolist())
    ]  # fmt: skip


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
    shown: int
    neighbours: int
    without: int
    marked: int  # chunks that share a run of ``marked_from`` tokens or more with a neighbour
    farthest: float
    histogram: tuple[int, ...]  # chunks by the r of their longest run, in eighths; the last has r = 1
    chunks: tuple[InspectedChunk, ...]
    page: str = ""


def inspect(
    root: str | Path, choice: Choice, *, table: str | None = None, k: int | None = None, page: str | Path | None = None
) -> InspectResult:
    """Show chunks of the query store ``root`` with their ``k`` nearest neighbours (default: the table's k).

    ``table`` is by default main, or the only one. ``page``: also write them as HTML to this file.
    """
    if page is not None:
        check_file("--html", page)
    if [choice.chunk, choice.document, choice.random].count(None) < 2:
        raise UsageError("give one of --chunk, --document and --random")
    if choice.random is not None and choice.random < 1:
        raise UsageError(f"--random {choice.random} is less than 1")
    result = retry_overtaken(lambda: _inspect(Store.open(root), choice, table, k))
    if page is not None:
        result = replace(result, page=str(page))
        pages.write_page(page, "inspect.html", result=result)
    return result


def _inspect(store: Store, choice: Choice, table: str | None, k: int | None) -> InspectResult:
    has_any = table is not None or store.state.with_prefix("neighbours:")
    reader = NeighbourReader(store, table if has_any else "")
    k = reader.choose_k(k) if has_any else 0
    ids, chosen = _choose(store, reader, choice)
    length, tables, chunks = store.identity.chunk_length, list[TableRead](), list[InspectedChunk]()
    for member in reader.members:
        record = store.state.records[f"neighbours:{member.table}"]
        index = index_record(member.store.state, record["index"])
        same_tokenizer = member.store.identity.tokenizer.sha256 == store.identity.tokenizer.sha256
        tables.append(TableRead(
            member.table, member.store.place, member.weight, str(record["index"]), str(record["encoder"]),
            None if index is None else index.recall_at_10, same_tokenizer and length <= LONGEST,
        ))  # fmt: skip
    size = max(_BLOCK // max(k, 1), 1)
    with counting("inspect", "chunk", len(ids)) as report:
        for start in range(0, len(ids), size):
            chunks += _read_chunks(reader, k, tables, ids[start : start + size])
            report(len(chunks) - start)
    histogram, distances = [0] * _BINS, [near.distance for chunk in chunks for near in chunk.neighbours]
    for chunk in chunks:
        if chunk.neighbours:
            histogram[min(int(chunk.longest_run() * _BINS / length), _BINS - 1)] += 1
    return InspectResult(
        store.place, store.state.number, reader.name, chosen, k, tuple(tables), length, MARKED_FROM, len(chunks),
        neighbours=len(distances), without=sum(not chunk.neighbours for chunk in chunks),
        marked=sum(chunk.longest_run() >= MARKED_FROM for chunk in chunks), farthest=max(distances, default=0.0),
        histogram=tuple(histogram), chunks=tuple(chunks),
    )  # fmt: skip


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
        raise UsageError(f"chunk {format_id(chunk)} is not live: it was purged, or is a duplicate")
    known = store.state.parts()
    if not known:
        advice = f"Chunk documents: {command_line('chunk', store.place)} INPUT..."
        raise UsageError(f"{store.place} has no chunks", advice)
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
