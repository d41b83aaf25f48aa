"""What chunks add to the totals of a store: chunks, documents and tokens, by part.

Cost: the columns ``doc`` and ``n_tokens`` of the chunks of each part concerned.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np

from retrotool.store import parts
from retrotool.store.parts import Ids, rows_by_part
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones


@dataclass(frozen=True, slots=True)
class Weight:
    """What some chunks add to the totals of a store or take from them, by their names in records."""

    chunks: int = 0
    documents: int = 0
    tokens: int = 0

    def __add__(self, other: Weight) -> Weight:
        return Weight(self.chunks + other.chunks, self.documents + other.documents, self.tokens + other.tokens)


Weights = Mapping[int, Weight]  # by part


def weight_of(weights: Weights, numbers: Container[int] | None = None) -> Weight:
    """Return the sum of weights of the parts ``numbers``, or of all."""
    return sum((weight for part, weight in weights.items() if numbers is None or part in numbers), Weight())


def weigh_chunks(store: Store, chunks: Ids, others: Tombstones) -> tuple[Ids, Weights]:
    """Return the ``chunks`` that are neither erased nor in ``others``, ascending, and their weights.

    A document counts if its only live chunks, besides ``others``, are among them.
    """
    live = [np.zeros(0, np.int64)]
    weights = {}
    for part, rows in rows_by_part(chunks[~others.contains(chunks)]):
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "n_tokens"])
        doc, n_tokens = table["doc"].to_numpy(), table["n_tokens"].to_numpy()
        mine = rows[n_tokens[rows] > 0]
        alive = n_tokens > 0
        alive[others.rows(part)] = False
        had = np.bincount(doc[alive], minlength=int(doc[-1]) + 1)
        # All live chunks of a document that ends are among these.
        ended = int(((had > 0) & (np.bincount(doc[mine], minlength=len(had)) == had)).sum())
        weights[part] = Weight(len(mine), ended, int(n_tokens[mine].sum()))
        live.append(parts.chunk_ids(part, mine))
    return np.concatenate(live), weights
