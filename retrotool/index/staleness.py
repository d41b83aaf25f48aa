"""Whether vectors that were added since an index was trained still fit its training.

Each shard says in the log how far the vectors of each of its parts are from their centroids and codes, on average, and
how uneven its lists are. Parts that the training saw are held against those that it did not see. Nothing is read but
the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.index.index_records import ShardRecord, shards, training_record
from retrotool.store.state import State

Fits = npt.NDArray[np.float64]
"""Vectors of parts, and their mean squared distances to centroids and to codes, [n, 3]."""
_WORSE = 1.15
"""A squared distance so many times that of the training: lists or codes are of other text."""
_UNEVEN = 2.0
_GROWN = 4.0
_ENOUGH = 1000
"""New vectors below which an average says nothing."""


@dataclass(frozen=True, slots=True)
class Drift:
    """``new`` vectors of ``vectors`` came after the training.

    ``error`` and ``code_error`` are their mean squared distances to centroids and codes, relative to those of the
    others. ``due``: why to train anew, "" if there is no reason.
    """

    new: int
    vectors: int
    error: float = 1.0
    code_error: float = 1.0
    imbalance: float = 1.0
    grown: float = 1.0
    due: str = ""


def drift(state: State, name: str, generation: int | None = None) -> Drift:
    """How far what an index holds has come from what it was trained on."""
    trained = training_record(state, name, generation)
    entries = list(shards(state, name, generation).values())
    vectors = sum(entry.rows for entry in entries)
    if trained is None:
        return Drift(0, vectors)
    seen, records = trained.parts, [ShardRecord.of(entry) for entry in entries]
    fits = [(part in seen, *fit) for one in records for part, fit in zip(one.parts, one.fit, strict=True)]
    table = np.array(fits, np.float64).reshape(-1, 4)
    old, new = table[table[:, 0] == 1, 1:], table[table[:, 0] == 0, 1:]
    found = Drift(
        int(new[:, 0].sum()),
        vectors,
        _ratio(old, new, 1, trained.error),
        _ratio(old, new, 2, trained.code_error),
        _imbalance(records, [entry.rows for entry in entries]),
        vectors / trained.held if trained.held else 1.0,
    )
    # An exact index has nothing to fit.
    return replace(found, due=_due(found, trained.imbalance)) if trained.error else found


def _due(found: Drift, imbalance: float) -> str:
    if found.new < _ENOUGH:
        return ""
    if found.error > _WORSE:
        return f"new vectors are {found.error:.2f} times as far from their centroids"
    if found.code_error > _WORSE:
        return f"new vectors are {found.code_error:.2f} times as far from their codes"
    if found.imbalance > _UNEVEN * max(imbalance, 1.0):
        return f"lists have become uneven: {found.imbalance:.1f} after {imbalance:.1f}"
    if found.grown > _GROWN:
        return f"there are {found.grown:.1f} times as many vectors as when it was trained"
    return ""


def _imbalance(records: Sequence[ShardRecord], vectors: Sequence[int]) -> float:
    """That of shards, each counted by its vectors."""
    pairs = zip(records, vectors, strict=True)
    known = [(one.imbalance, rows) for one, rows in pairs if one.imbalance is not None and rows]
    return float(np.average([v for v, _ in known], weights=[n for _, n in known])) if known else 1.0


def _ratio(old: Fits, new: Fits, column: int, sample: float) -> float:
    """How many times as large it is for ``new`` as for ``old``; without these, as for the training's sample."""
    before = np.average(old[:, column], weights=old[:, 0]) if old[:, 0].sum() else sample
    return float(np.average(new[:, column], weights=new[:, 0]) / before) if before and new[:, 0].sum() else 1.0
