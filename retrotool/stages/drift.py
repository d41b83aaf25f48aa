"""Whether vectors that were added since an index was trained still fit its training.

Each shard says in the log how far its vectors are from their centroids and codes, on average, and how uneven its lists
are. Shards of parts that the training saw are held against those that it did not see. Nothing is read but the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrotool.stages.index_files import parts_of, shards, trained_entry
from retrotool.store.atomic import FileEntry
from retrotool.store.state import State

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


def ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, last] of what is consecutive: a few for the log."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def trained_on(entry: FileEntry) -> set[int]:
    """Parts that a training drew its sample from."""
    return {part for first, last in (entry.about or {}).get("trained_parts", []) for part in range(first, last + 1)}


def drift(state: State, name: str, generation: int | None = None) -> Drift:
    """How far what an index holds has come from what it was trained on."""
    entry = trained_entry(state, name, generation)
    entries = list(shards(state, name, generation).values())
    vectors = sum(entry.rows for entry in entries)
    if entry is None:
        return Drift(0, vectors)
    about, seen = entry.about or {}, trained_on(entry)
    old = [one for one in entries if seen.issuperset(parts_of(one))]
    new = [one for one in entries if not seen.issuperset(parts_of(one))]
    added = sum(one.rows for one in new)
    grown = vectors / about["vectors"] if about.get("vectors") else 1.0
    if not _measured(entries):  # exact: nothing to fit
        return Drift(added, vectors, grown=grown)
    error, code_error = (_ratio(old, new, about, key) for key in ("error", "code_error"))
    found = Drift(added, vectors, error, code_error, _mean(entries, "imbalance"), grown)
    return replace(found, due=_due(found, float(about.get("imbalance", 1.0))))


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


def _measured(entries: Iterable[FileEntry]) -> bool:
    return any("error" in (entry.about or {}) for entry in entries)


def _mean(entries: Sequence[FileEntry], key: str) -> float:
    """The mean over the vectors of some shards."""
    known = [
        (float(entry.about[key]), entry.rows) for entry in entries if entry.about and key in entry.about and entry.rows
    ]
    return float(np.average([v for v, _ in known], weights=[n for _, n in known])) if known else 1.0


def _ratio(old: Sequence[FileEntry], new: Sequence[FileEntry], about: Mapping[str, Any], key: str) -> float:
    """How many times as large it is for ``new`` as for parts that the training saw, or its sample, which fits best."""
    before = _mean(old, key) if _measured(old) else float(about.get(key, 0.0))
    return _mean(new, key) / before if before and _measured(new) else 1.0
