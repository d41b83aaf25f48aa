"""Reading a store without retrotool's own code, as docs/format.md says: pyarrow, numpy and the list of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from retrotool.info.run import info
from retrotool.store.storage import storage_at


@dataclass(frozen=True)
class Plain:
    """All rows of a store, one array each: chunk ids, document ids, live keys or not, vectors float32."""

    ids: np.ndarray[Any, Any]
    documents: np.ndarray[Any, Any]
    live: np.ndarray[Any, Any]
    vectors: np.ndarray[Any, Any]


def at(store: Path, path: str) -> Path:
    """A file with the bytes of one of a store, which may be in memory."""
    return storage_at(store).local(path)


def read_plain(store: Path, encoder: str = "tiny", purged: frozenset[int] = frozenset()) -> Plain:
    ids, documents, live, vectors = [], [], [], []
    for part in info(store).parts:
        names = pq.read_table(at(store, part["documents"]["path"]))["id"].to_pylist()
        chunks = pq.read_table(at(store, part["chunks"]["path"]))
        numbers = (part["part"] << 32) + np.arange(chunks.num_rows)
        ids.append(numbers)
        documents += [names[doc] for doc in chunks["doc"].to_pylist()]
        alive = (chunks["n_tokens"].to_numpy() > 0) & ~np.isin(numbers, list(purged))
        live.append(alive & chunks["key"].to_numpy() if "key" in chunks.column_names else alive)
        vectors.append(np.load(at(store, part["embeddings"][encoder]["path"])).astype(np.float32))
    return Plain(np.concatenate(ids), np.array(documents, object), np.concatenate(live), np.concatenate(vectors))


def brute_force(queries: Plain, database: Plain, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and squared distances of the k nearest live keys of other documents, [n, k]; −1 and inf: none."""
    distances = ((queries.vectors[:, None, :] - database.vectors[None, :, :]) ** 2).sum(-1)
    distances[queries.documents[:, None] == database.documents[None, :]] = np.inf
    distances[:, ~database.live] = np.inf
    distances[~queries.live] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(distances, order, 1)
    return np.where(np.isinf(best), -1, database.ids[order]), best


def saved_neighbours(store: Path, name: str = "main") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and distances of all tables, as they are stored."""
    tables = [pq.read_table(at(store, part["neighbours"][name]["path"])) for part in info(store).parts]
    ids, distances = (
        np.array([row for t in tables for row in t[column].to_pylist()]) for column in ("ids", "distances")
    )
    return ids, distances
