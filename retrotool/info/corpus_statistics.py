"""The shape of a corpus for ``info``: how long its documents are, and how much comes from which source.

Reads three columns of the documents files, about ten bytes a document. Of a store of more than ``READ_DOCUMENTS``
documents only parts spread evenly over it are read, and the counts scaled; ``share`` says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones

READ_DOCUMENTS = 20_000_000
LARGEST_SOURCES = 1000


@dataclass(frozen=True, slots=True)
class Shape:
    """Living documents by length and by source; ``share`` of them was looked at, the counts are of all, scaled.

    ``lengths`` are rows {tokens, documents}: so many have at least ``tokens`` and less than twice that. ``sources`` are
    rows {source, documents, chunks, tokens}, most tokens first, at most a thousand.
    """

    lengths: tuple[dict[str, int], ...] = ()
    sources: tuple[dict[str, Any], ...] = ()
    share: float = 1.0


def shape_of(store: Store, tombstones: Tombstones, read_documents: int = READ_DOCUMENTS) -> Shape:
    """Count the living documents of a store by length and source."""
    entries = [(part, parts.part_entry(store, "documents", part)) for part in store.state.parts()]
    total = sum(entry.rows for _, entry in entries)
    if not total:
        return Shape()
    step = -(-total // read_documents)
    chosen = entries[::step]
    share = sum(entry.rows for _, entry in chosen) / total
    lengths = np.zeros(64, np.int64)
    sources: dict[str, npt.NDArray[np.int64]] = {}
    for part, entry in chosen:
        table = parts.read_parquet(store, entry, ["source", "first_row", "n_chunks", "n_tokens"])
        table = _living(table, tombstones, part)
        n_tokens = table["n_tokens"].to_numpy()
        lengths += np.bincount(np.log2(np.maximum(n_tokens, 1)).astype(np.int64), minlength=64)[:64]
        grouped = table.group_by("source", use_threads=False)
        for row in grouped.aggregate([("n_tokens", "count"), ("n_chunks", "sum"), ("n_tokens", "sum")]).to_pylist():
            found = np.array([row["n_tokens_count"], row["n_chunks_sum"], row["n_tokens_sum"]])
            sources[row["source"]] = sources.get(row["source"], 0) + found
    largest = Counter({source: int(counts[2]) for source, counts in sources.items()}).most_common(LARGEST_SOURCES)
    return Shape(
        tuple({"tokens": 2**i, "documents": round(n / share)} for i, n in enumerate(lengths.tolist()) if n),
        tuple(_source(source, sources[source] / share) for source, _ in largest),
        share,
    )


def _source(source: str, counts: npt.NDArray[Any]) -> dict[str, Any]:
    names = ("documents", "chunks", "tokens")
    return {"source": source, **{name: round(n) for name, n in zip(names, counts.tolist(), strict=True)}}


def _living(table: pa.Table, tombstones: Tombstones, part: int) -> pa.Table:
    """Rows of documents that are neither erased nor wholly purged."""
    n_chunks = table["n_chunks"].to_numpy()
    alive = table["source"].is_valid().to_numpy(zero_copy_only=False)
    purged = tombstones.rows(part)
    if len(purged):
        first = table["first_row"].to_numpy()
        gone = np.searchsorted(purged, first + n_chunks) - np.searchsorted(purged, first)
        alive &= gone < n_chunks
    return table.filter(pa.array(alive))
