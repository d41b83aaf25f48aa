"""How much of evaluation text the database has word for word: r, the longest common run of tokens, as RETRO has it.

For each evaluation chunk its 10 nearest neighbours in the database are found, with their continuations, and r is the
longest run of tokens that the chunk has in common with one of them, over the tokens of a chunk (arXiv 2112.04426,
section 2.6). Documents of the same id in the database count: they are what is looked for. Only where a store is
compared with itself are a chunk's own documents left out.

Cost: a search, then some 100,000 pairs a second and core (``token_overlap``). Memory: a block of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Excluded, Queries
from retrotool.embed.search_scope import embedded_parts, own_documents, read_part_vectors, searchable_rows
from retrotool.engine.task import Report
from retrotool.index.searching import Database
from retrotool.neighbours.retrieved import read_pieces
from retrotool.neighbours.token_overlap import longest_common
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

NEIGHBOURS = 10
_BLOCK = 1 << 12


@dataclass(frozen=True, slots=True)
class Leaks:
    """Evaluation chunks: their ids and sources, and the tokens that each has in common with one of its neighbours.

    Which neighbour that is (−1: none was found), and the squared distance of the nearest one (inf) are there, too.
    """

    ids: npt.NDArray[np.int64]
    sources: list[str]
    common: npt.NDArray[np.int64]
    neighbours: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]


def find_leaks(
    store: Store, database: Database, *, within: bool, k: int = NEIGHBOURS, report: Report
) -> Iterator[Leaks]:
    """Yield the leaks of all embedded keys of ``store`` in ``database``, in the order of their ids, block by block."""
    tombstones = read_tombstones(store)
    for part in embedded_parts(store, database.encoder):
        rows = searchable_rows(store, part, tombstones)
        vectors = read_part_vectors(store, database.encoder, part)
        chunks = parts.read_chunks(store, part)
        sources = parts.read_documents(store, part, ["source"])["source"].to_pylist()
        own = own_documents(store, part, database.store, database.tombstones, within=True) if within else None
        for start in range(0, len(rows), _BLOCK):
            some = rows[start : start + _BLOCK]
            excluded = Excluded.nothing(len(some)) if own is None else own.take(some)
            best = database.search(Queries(vectors[some].astype(np.float32), excluded), k)
            common, which = _common(database, chunks.tokens[some], chunks.n_tokens[some].astype(np.int64), best.ids)
            neighbours = best.ids[np.arange(len(some)), which]
            documents = chunks.doc[some].tolist()
            yield Leaks(
                parts.chunk_ids(part, some), [sources[i] or "" for i in documents], common, neighbours,
                best.distances[:, 0],
            )  # fmt: skip
            report(len(some))


def _common(
    database: Database, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the longest run that each chunk shares with a neighbour of [q, k], and with which, both int64 [q]."""
    others, n_others = read_pieces(database.store, database.tombstones, ids.ravel()).joined()
    k = ids.shape[1]
    found = longest_common(np.repeat(tokens, k, axis=0), np.repeat(n_tokens, k), others, n_others)
    length = found.length.reshape(-1, k)
    which = length.argmax(axis=1)
    return length[np.arange(len(length)), which], which
