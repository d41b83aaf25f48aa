"""The text that a model is evaluated on: random documents of a store, and the neighbours of their chunks.

Only live chunks are read, and purged neighbours are masked. A chunk after a purged one follows the live one
before it. Cost: three columns of all documents; then a read of each row group that has a chosen chunk, of
chunks and of every table, and the neighbours' chunks (``neighbours.retrieved``).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones
from retrotool.tokenizers import stored_tokenizer
from retrotool.train.dataset import permutation


@dataclass(frozen=True, slots=True)
class DrawnDocument:
    """A document: its source, the rows of its chunks in its part, and how many live ones to score."""

    part: int
    source: str
    first_row: int
    n_chunks: int
    live: int


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """n chunks of some documents, and for each table the neighbours of each chunk."""

    chunks: DocumentChunks
    n_bytes: Ints  # [n], of the UTF-8 text of the tokens
    document: Ids  # [n]: id of the first live chunk of each chunk's document
    source: npt.NDArray[Any]  # [n]
    near: list[NeighbourTokens]


def draw_documents(store: Store, limit: int | None, seed: int) -> tuple[list[DrawnDocument], int]:
    """Draw documents with at most ``limit`` chunks in all, of the last one drawn the first chunks only.

    Returns them in the order of the store, with the number of live chunks in the store. Raises ``UsageError``
    if it has none.
    """
    tombstones, tables = read_tombstones(store), list[pa.Table]()
    for part in store.state.parts():
        table = parts.read_documents(store, part, ["source", "first_row", "n_chunks"])
        first, rows = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        purged = tombstones.rows(part)
        live = rows - np.searchsorted(purged, first + rows) + np.searchsorted(purged, first)
        columns = [pa.array(np.full(len(first), part)), *table.columns, pa.array(live)]
        tables.append(pa.table(columns, list(DrawnDocument.__slots__)).filter(pa.array(live > 0)))
    total = sum(pc.sum(table["live"]).as_py() or 0 for table in tables)
    if not total:
        advice = f"Chunk some text: {command_line('chunk', store.place)} INPUT..."
        raise UsageError(f"{store.place} has no live chunk to evaluate on", advice)
    documents = pa.concat_tables(tables)
    order, live = np.arange(documents.num_rows), documents["live"].to_numpy().copy()
    if limit is not None and limit < total:
        order = permutation(len(live), seed)
        order = order[: int(np.searchsorted(np.cumsum(live[order]), limit)) + 1]
        live[order[-1]] = limit - live[order[:-1]].sum()
    documents = documents.set_column(4, "live", pa.array(live)).take(pa.array(np.sort(order)))
    return [DrawnDocument(**row) for row in documents.to_pylist()], total


def read_documents_with_neighbours(
    store: Store, readers: Sequence[NeighbourReader], documents: Sequence[DrawnDocument], k: int
) -> EvaluationText:
    """Read the chunks of some documents with up to k neighbours of each, or all that a table has saved."""
    tombstones, ids = read_tombstones(store), np.zeros(0, np.int64)
    for one in documents:
        rows = parts.chunk_ids(one.part, one.first_row + np.arange(one.n_chunks))
        ids = np.append(ids, rows[~tombstones.contains(rows)][: one.live])
    texts, near = list[tuple[npt.NDArray[Any], ...]](), [list[Found]() for _ in readers]
    for places, chunks, rows in parts.read_groups_of(store, ids):  # in order, as ids ascend
        texts.append((chunks.tokens[rows], chunks.n_tokens[rows].astype(np.int64)))
        group = int(parts.row_of(ids[places])[0]) // ROW_GROUP
        for reader, found in zip(readers, near, strict=True):
            found.append(reader.read(chunks.part, min(k, reader.saved), [group]).take(rows))
    tokens, n_tokens = map(np.concatenate, zip(*texts, strict=True))
    live = np.array([one.live for one in documents])
    first = np.repeat(np.cumsum(live) - live, live)
    n_bytes = pc.binary_length(stored_tokenizer(store).decode(tokens, n_tokens)).to_numpy()
    source = np.repeat(np.array([one.source or "" for one in documents], np.object_), live)
    read = [reader.tokens(Found.joined(found)) for reader, found in zip(readers, near, strict=True)]
    return EvaluationText(DocumentChunks(tokens, n_tokens, first), n_bytes, ids[first], source, read)


def measure_copied(chunks: DocumentChunks, near: NeighbourTokens, k: int) -> Floats:
    """Return the longest run of each chunk in its neighbours, as a share of the chunk, float64 [n].

    These are ``COMPARED`` of its own, and the k neighbours of the chunk before, which a model is given.
    """
    own, given, at = near.nearest(COMPARED), near.nearest(k), np.arange(len(chunks.tokens))
    is_given = (at > chunks.first)[:, None, None]
    tokens = np.concatenate([own.tokens, given.tokens[at - 1]], axis=1)
    n_tokens = np.concatenate([own.n_tokens, given.n_tokens[at - 1] * is_given], axis=1).astype(np.int64)
    n, many = n_tokens.shape[:2]
    pieces, each = Pieces(tokens.reshape(n * many, 2, -1), n_tokens.reshape(n * many, 2)), at.repeat(many)
    runs = longest_common(chunks.tokens[each], chunks.n_tokens[each], *pieces.joined())
    return np.asarray(runs.length.reshape(n, many).max(axis=1) / chunks.n_tokens)
