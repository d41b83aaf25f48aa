"""Chunks and their neighbours to look at: texts, where they are from, and what they have in common word for word.

Of a chunk and a neighbour with its continuation the longest common run of tokens is found (``token_overlap``), and
the texts are cut around it. Chunks in different tokens can't be compared, nor chunks of more than 64 tokens.

Cost: the row groups and documents that hold the neighbours of a block, each once a block; some 20,000 neighbours a
second and core. Memory: a block with its texts, some 9 kB a neighbour, whatever the number of chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.table_reader import NeighbourReader, row_groups_of
from retrotool.neighbours.token_overlap import longest_common
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.store import Store
from retrotool.tokenizers import stored_tokenizer
from retrotool.tokenizers.split import Split, split_texts

MARKED_FROM = 5
"""Tokens from which a common run is marked. Of chunks that have nothing to do with one another, taken from manuals, one
pair in three has a run of 2 tokens ("in the"), 5 % of 3, 1.2 % of 4 ("on the command line"), and 0.6 % of 5."""
_LONGEST = 64
_BLOCK = 1 << 13
"""Neighbours that are read at once."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CommonRun:
    """The longest run of tokens that a chunk has in common with a neighbour and its continuation.

    It begins at token ``start`` of the chunk and ``start_in_neighbour`` of the neighbour and its continuation, one
    after the other. ``r`` is ``tokens`` over the tokens of a whole chunk. The texts of ``chunk``, neighbour (``text``)
    and ``continuation`` are cut around it; the continuation is None if there is none. ``marked``: long enough to
    mean something.
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
    """A neighbour; ``distance`` is squared L2, ``index`` its place among the ``of`` chunks of its document, from 0.

    ``database`` is the directory of the store that it is a chunk of. ``common`` is None if tokens can't be compared.
    """

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
        """Return the text cut around the run, if that is marked: otherwise all of it comes before an empty run."""
        return self._cut(self.text, self.common.text if self.common is not None else None)

    def marked_continuation(self) -> Split:
        """Return the continuation, cut like the text; empty if there is none."""
        return self._cut(self.continuation or "", self.common.continuation if self.common is not None else None)

    def _cut(self, text: str, split: Split | None) -> Split:
        marked = self.common is not None and self.common.marked
        return _trimmed(split) if marked and split is not None and split.run else Split(text, "", "")


@dataclass(frozen=True, slots=True)
class InspectedChunk:
    """A chunk with its neighbours, nearest first. ``key`` is False for a value of a key-value record: it has none."""

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
        """Return the tokens of the longest run in common with a neighbour; 0 where none can be compared."""
        return max((near.common.tokens for near in self.neighbours if near.common is not None), default=0)

    def why_none(self) -> str:
        """Return why there are no neighbours, as a sentence."""
        if not self.key:
            return f"No key: a value of a key-value record is never searched. Its key is chunk {self.id - self.index}."
        return "No neighbours: none was found, or those that were saved are purged."

    def segments(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the text in pieces, each with the ranks, from 1, of the neighbours whose marked run it is part of."""
        spans = list(self._spans())
        cuts = sorted({0, len(self.text), *(cut for _, low, high in spans for cut in (low, high))})
        for low, high in pairwise(cuts):
            yield self.text[low:high], tuple(rank for rank, start, stop in spans if start <= low and high <= stop)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        for rank, near in enumerate(self.neighbours, 1):
            if near.common is not None and near.common.marked and near.common.chunk.run:
                split = _trimmed(near.common.chunk)
                yield rank, len(split.before), len(split.before) + len(split.run)


@dataclass(frozen=True, slots=True)
class _Places:
    """Documents and sources of chunks, their places in their documents, and how many chunks these have."""

    documents: list[str]
    sources: list[str]
    index: list[int]
    of: list[int]


@dataclass(frozen=True, slots=True)
class _Block:
    """Chunks [n], their ``tokens`` [n, chunk_length]; ``ids``, ``distances``, ``databases`` of neighbours [n, k]."""

    chunks: Ids
    tokens: npt.NDArray[Any]
    n_tokens: Ids
    key: npt.NDArray[np.bool_]
    ids: Ids
    distances: npt.NDArray[np.float32]
    databases: npt.NDArray[np.uint8]


class Inspector:
    """Chunks of a query store with the ``k`` nearest neighbours (default: the table's) that a reader gives of them."""

    def __init__(self, reader: NeighbourReader, k: int | None = None) -> None:
        self._reader, self._k = reader, k
        self._store = reader.store
        self._tokenizer = stored_tokenizer(reader.store)
        own = reader.store.identity
        known = {own.tokenizer.sha256: self._tokenizer}
        self._tokenizers = []
        for database in reader.databases:
            sha256 = database.identity.tokenizer.sha256
            if sha256 not in known:
                known[sha256] = stored_tokenizer(database)
            self._tokenizers.append(known[sha256])
        self.comparable = tuple(
            tokenizer is self._tokenizer and own.chunk_length <= _LONGEST for tokenizer in self._tokenizers
        )
        """Of each database, whether its chunks can be compared with those of the query store token by token."""

    def blocks(self, ids: Ids) -> Iterator[list[InspectedChunk]]:
        """Yield the live chunks ``ids``, ascending, of parts that the reader has, some of them at a time."""
        size = max(_BLOCK // (self._k or self._reader.k), 1)
        for start in range(0, len(ids), size):
            yield self._inspect(self._read(ids[start : start + size]))

    def _read(self, ids: Ids) -> _Block:
        found: list[tuple[Any, ...]] = []
        numbers = ids >> PART_SHIFT
        for part in np.unique(numbers).tolist():
            rows = ids[numbers == part] - (part << PART_SHIFT)
            groups = row_groups_of(rows)
            place = _places_in(rows, groups)
            chunks = parts.read_chunks(self._store, part, groups)
            near = self._reader.read(part, self._k, groups)
            found.append((
                chunks.tokens[place], chunks.n_tokens[place].astype(np.int64), chunks.key[place],
                near.ids[place], near.distances[place], near.databases[place],
            ))  # fmt: skip
        return _Block(ids, *(np.concatenate(column) for column in zip(*found, strict=True)))

    def _inspect(self, block: _Block) -> list[InspectedChunk]:
        k = block.ids.shape[1]
        near: list[InspectedNeighbour | None] = [None] * block.ids.size
        for number in range(len(self._tokenizers)):
            of_it = (block.databases.ravel() == number) & (block.ids.ravel() != NO_NEIGHBOUR)
            self._describe(block, number, np.flatnonzero(of_it), near)
        places = _find_places(self._store, block.chunks)
        texts = self._tokenizer.decode_text(block.tokens, block.n_tokens)
        return [
            InspectedChunk(
                chunk, places.documents[i], places.sources[i], places.index[i], places.of[i], int(block.n_tokens[i]),
                bool(block.key[i]), texts[i], tuple(one for one in near[i * k : (i + 1) * k] if one is not None),
            )
            for i, chunk in enumerate(block.chunks.tolist())
        ]  # fmt: skip

    def _describe(self, block: _Block, number: int, some: Ids, near: list[InspectedNeighbour | None]) -> None:
        """Fill in neighbours: those at the places ``some`` of the raveled [n, k] are of database ``number``."""
        ids = block.ids.ravel()[some]
        pieces = self._reader.pieces_of(number, ids)
        database = self._reader.databases[number]
        places = _find_places(database, ids)
        distances = block.distances.ravel()[some].tolist()
        tokenizer, name = self._tokenizers[number], str(database.root)
        texts, following = (
            tokenizer.decode_text(pieces.tokens[:, piece], pieces.n_tokens[:, piece]) for piece in (0, 1)
        )
        runs = self._runs(block, some // block.ids.shape[1], pieces) if self.comparable[number] else None
        for i, at in enumerate(some.tolist()):
            near[at] = InspectedNeighbour(
                int(ids[i]), distances[i], places.documents[i], places.sources[i], places.index[i], places.of[i], name,
                texts[i], following[i] if pieces.n_tokens[i, 1] else None, runs[i] if runs is not None else None,
            )  # fmt: skip

    def _runs(self, block: _Block, rows: Ids, pieces: Pieces) -> list[CommonRun]:
        """What the chunks at ``rows`` of a block have in common with the pieces, one each."""
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


def _trimmed(split: Split) -> Split:
    """Move white space at the ends of a run out of it, unless there is nothing else in it."""
    run = split.run.strip()
    if not run or run == split.run:
        return split
    low = len(split.run) - len(split.run.lstrip())
    return Split(split.before + split.run[:low], run, split.run[low + len(run) :] + split.after)


def _places_in(rows: Ids, groups: list[int]) -> Ids:
    """Where rows of a part are in what is read of the row groups that hold them, which are ascending."""
    return np.searchsorted(groups, rows // ROW_GROUP).astype(np.int64) * ROW_GROUP + rows % ROW_GROUP


def _find_places(store: Store, ids: Ids) -> _Places:
    """Return the places of live chunks [n], in any order."""
    found = _Places([""] * len(ids), [""] * len(ids), [0] * len(ids), [0] * len(ids))
    numbers = ids >> PART_SHIFT
    for part in np.unique(numbers).tolist():
        some = np.flatnonzero(numbers == part)
        rows = ids[some] - (part << PART_SHIFT)
        groups = row_groups_of(rows)
        entry = parts.part_entry(store, "chunks", part)
        chunks = parts.read_parquet(store, entry, ["doc", "index"], groups).take(_places_in(rows, groups))
        documents = parts.read_documents(store, part, ["id", "source", "n_chunks"]).take(chunks["doc"])
        columns = [documents["id"], documents["source"], chunks["index"], documents["n_chunks"]]
        for at, name, source, index, of in zip(some.tolist(), *(c.to_pylist() for c in columns), strict=True):
            found.documents[at], found.sources[at] = name, source or ""
            found.index[at], found.of[at] = index, of
    return found
