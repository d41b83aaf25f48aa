"""The text that a model is evaluated on: random chunks of a store, what is before them, and their neighbours.

Only live chunks are read, and purged neighbours are masked. A chunk after a purged one follows the live one
before it. Cost: three columns of all documents; then a read of each row group that has a chunk that the model
reads, of chunks and of every table, and the neighbours' chunks (``neighbours.retrieved``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.cli.command_lines import COMPARED, command_line
from retrotool.errors import UsageError
from retrotool.evaluate.bits_per_byte import Floats, Ints
from retrotool.evaluate.language_models import DocumentChunks
from retrotool.neighbours.retrieved import Pieces
from retrotool.neighbours.table_reader import Found, NeighbourReader, NeighbourTokens
from retrotool.neighbours.token_overlap import longest_common
from retrotool.store import parts
from retrotool.store.neighbour_tables import NO_NEIGHBOUR
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import Tokenizer
from retrotool.train.dataset import permutation


@dataclass(frozen=True, slots=True)
class DrawnDocument:
    """A document: its source, the rows of its chunks in its part, and which to score."""

    part: int
    source: str
    first_row: int
    n_chunks: int
    scored: Ids  # ascending, of its live chunks


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """n chunks of some documents, s of which are scored, and for each table the neighbours of each chunk."""

    chunks: DocumentChunks
    n_bytes: Ints  # [s], of the UTF-8 text of the tokens
    document: Ids  # [s]: id of the first live chunk of each chunk's document
    source: npt.NDArray[Any]  # [s]
    near: list[NeighbourTokens]


def draw_chunks(store: Store, limit: int | None, seed: int) -> tuple[Iterator[DrawnDocument], int, int]:
    """Draw up to ``limit`` live chunks, each as likely as any other.

    Returns their documents in the order of the store, the number of chunks drawn, and that of all live ones.
    Raises ``UsageError`` if there are none.
    """
    tombstones, tables = read_tombstones(store), list[pa.Table]()
    for part in store.state.parts():
        table = parts.read_documents(store, part, ["source", "first_row", "n_chunks"])
        first, rows = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        purged = tombstones.rows(part)
        live = rows - np.searchsorted(purged, first + rows) + np.searchsorted(purged, first)
        columns = [pa.array(np.full(len(first), part)), *table.columns, pa.array(live)]
        tables.append(pa.table(columns, [*DrawnDocument.__slots__[:4], "live"]))
    ends = np.cumsum(pa.concat_tables(tables)["live"].to_numpy()) if tables else np.zeros(0, np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        advice = f"Chunk some text: {command_line('chunk', store.place)} INPUT..."
        raise UsageError(f"{store.place} has no live chunk to evaluate on", advice)
    chosen = np.arange(total) if limit is None else draw(total, min(limit, total), seed)
    counts = np.diff(np.searchsorted(chosen, ends), prepend=0)
    has_any = np.flatnonzero(counts)
    documents, counts = pa.concat_tables(tables).take(pa.array(has_any)), counts[has_any]
    first_live, begins = ends[has_any] - documents["live"].to_numpy(), np.cumsum(counts) - counts

    def drawn() -> Iterator[DrawnDocument]:
        rows = (row for batch in documents.drop(["live"]).to_batches(ROW_GROUP) for row in batch.to_pylist())
        for row, first, begin, count in zip(rows, first_live, begins, counts, strict=True):
            yield DrawnDocument(**row, scored=chosen[begin : begin + count] - first)

    return drawn(), len(chosen), total


def draw(n: int, count: int, seed: int) -> Ids:
    """Draw ``count`` different numbers from 0 to n − 1, ascending, each set as likely as any other."""
    if 2 * count > n:
        return np.sort(permutation(n, seed)[:count])
    generator, found = np.random.PCG64(np.random.SeedSequence((seed,))), np.zeros(0, np.int64)
    while len(found) < count:
        drawn = (generator.random_raw(count - len(found)) % np.uint64(n)).astype(np.int64)
        found = np.unique(np.concatenate([found, drawn]))
    return found


def read_passages(
    store: Store, tokenizer: Tokenizer, readers: Sequence[NeighbourReader], some: Sequence[DrawnDocument],
    k: int, before: int, reach: int,
) -> EvaluationText:  # fmt: skip
    """Read the chunks to score of some documents, with up to ``before`` live ones before each.

    k neighbours are read of up to ``reach`` chunks before each, at most ``before``, and k or ``COMPARED`` of
    itself, or all that a table has saved.
    """
    tombstones, columns = read_tombstones(store), list[tuple[npt.NDArray[Any], ...]]()
    for one in some:
        live = parts.chunk_ids(one.part, one.first_row + np.arange(one.n_chunks))
        live = live[~tombstones.contains(live)]
        places = _with_earlier(one.scored, before)
        begins = np.diff(places, prepend=-2) > 1  # passages, with chunks between them that are not read
        masks = np.isin(places, one.scored), np.isin(places, _with_earlier(one.scored, reach))
        columns.append((live[places], begins, *masks, np.full(len(places), live[0])))
    ids, begins, is_scored, is_wanted, document = map(np.concatenate, zip(*columns, strict=True))
    texts, near = list[tuple[npt.NDArray[Any], ...]](), [list[Found]() for _ in readers]
    for places, chunks, rows in parts.read_groups_of(store, ids):  # in order, as ids ascend
        texts.append((chunks.tokens[rows], chunks.n_tokens[rows].astype(np.int64)))
        group = int(parts.row_of(ids[places])[0]) // ROW_GROUP
        for reader, found in zip(readers, near, strict=True):
            near_rows = reader.read(chunks.part, min(max(k, COMPARED), reader.saved), [group]).take(rows)
            counts = np.where(is_scored[places], COMPARED, 0)
            counts = np.maximum(counts, np.where(is_wanted[places], k, 0))
            more = np.arange(near_rows.ids.shape[1]) >= counts[:, None]
            near_rows.ids[more], near_rows.databases[more] = NO_NEIGHBOUR, 0
            found.append(near_rows)
    tokens, n_tokens = map(np.concatenate, zip(*texts, strict=True))
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    text = tokenizer.decode(tokens[is_scored], n_tokens[is_scored])
    sources = np.array([one.source or "" for one in some], np.object_)
    source = sources.repeat([len(one.scored) for one in some])
    return EvaluationText(
        DocumentChunks(tokens, n_tokens, first, is_scored), pc.binary_length(text).to_numpy(), document[is_scored],
        source, [reader.tokens(Found.joined(found)) for reader, found in zip(readers, near, strict=True)],
    )  # fmt: skip


def _with_earlier(places: Ids, before: int) -> Ids:
    """Return ``places`` and up to ``before`` before each, ascending."""
    near = np.unique(places[:, None] - np.arange(before + 1))
    return near[near >= 0]


def measure_copied(chunks: DocumentChunks, near: NeighbourTokens, k: int) -> Floats:
    """Return the longest run of each scored chunk in its neighbours, as a share of the chunk, float64 [s].

    These are ``COMPARED`` of its own, and the k neighbours of the chunk before, which a model is given.
    """
    own, given, at = near.nearest(COMPARED), near.nearest(k), np.flatnonzero(chunks.scored)
    is_given = (at > chunks.first[at])[:, None, None]
    tokens = np.concatenate([own.tokens[at], given.tokens[at - 1]], axis=1)
    n_tokens = np.concatenate([own.n_tokens[at], given.n_tokens[at - 1] * is_given], axis=1).astype(np.int64)
    n, many = n_tokens.shape[:2]
    pieces, each = Pieces(tokens.reshape(n * many, 2, -1), n_tokens.reshape(n * many, 2)), at.repeat(many)
    runs = longest_common(chunks.tokens[each], chunks.n_tokens[each], *pieces.joined())
    return np.asarray(runs.length.reshape(n, many).max(axis=1) / chunks.n_tokens[at])
