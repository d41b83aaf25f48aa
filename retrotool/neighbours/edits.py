"""``neighbours --edit``: set and ban neighbours by a file of JSON lines, for readers to overlay on the table.

A line is checked against the live chunks of both stores, and gets distances from their stored vectors. If one
is wrong, none is applied. The new edits replace the file of the earlier ones, which they include.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Excluded
from retrotool.embed import search_scope
from retrotool.errors import CorruptError, UsageError
from retrotool.index.searching import Vectors
from retrotool.neighbours.stage import database_of
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.neighbour_tables import BANNED, ENTRY, EVERY, NO_NEIGHBOUR, commit_edits, read_edits
from retrotool.store.parts import Ids, distinct_parts, format_id, parse_id, part_entry, split_id
from retrotool.store.schema import check_value, load
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones

_UNCHANGED = "Nothing was changed."
_FORM = 'Give a "chunk" (for all rows none) and one of "neighbours": ["0:3", ...], "ban": ["0:3", ...], "reset": true.'
_ID = re.compile("[0-9]{1,9}:[0-9]{1,9}|[0-9]{1,18}")
_EDITS = {
    "neighbours": {"chunk": _ID, "neighbours": [_ID]},
    "ban": {"chunk?": _ID, "ban": [_ID]},
    "reset": {"chunk?": _ID, "reset": frozenset((True,))},
}


_FEW_PARTS = 8  # whose documents are kept in memory: 16 MB for a million chunks


@dataclass(frozen=True, slots=True)
class EditResult:
    """Result of ``edit_neighbours``: the table now has ``rows`` that are set, and ``bans``."""

    commit: int
    rows: int
    bans: int


def edit_neighbours(root: str | Path, file: str | Path, *, name: str = "main") -> EditResult:
    """Set and ban neighbours in a table of the store ``root``, by the JSON lines of ``file``, in order.

    ``UsageError`` names the first line that can't be applied; nothing is changed then.
    """
    store = Store.open(root)
    try:
        text = Path(file).read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", _UNCHANGED) from error
    lines = [EditLine.parse(f"{file}, line {number:,}", line) for number, line in enumerate(text, 1) if line.strip()]
    if not lines:
        raise UsageError(f"{file} is empty", _FORM)
    with writing(store) as run:
        retry_overtaken(lambda: _apply(store, run, name, lines), store.renew)
    (entry,) = store.state.group("edits", name).entries()
    return EditResult(store.state.number, **(entry.about or {}))


@dataclass(frozen=True, slots=True)
class EditLine:
    """A line of a file of edits; ``ids`` are the neighbours to set or ban, for a ``chunk`` or ``EVERY``."""

    where: str  # file and line
    chunk: int
    action: str
    ids: tuple[int, ...] = ()

    @classmethod
    def parse(cls, where: str, text: bytes) -> EditLine:
        """Read a line; raise ``UsageError`` if it is not an edit."""
        try:
            line = load(text, {}, where)
            action = next((name for name in line if name != "chunk"), "")
            if action not in _EDITS or line.keys() - {"chunk", action}:
                raise UsageError(f'{where} is not an object with one of "neighbours", "ban" and "reset"', _FORM)
            check_value(line, _EDITS[action], where)
        except CorruptError as error:
            raise UsageError(str(error), _FORM) from None
        ids = [parse_id(one) or 0 for one in (line.get("chunk", "0"), *(line[action] if action != "reset" else ()))]
        return cls(where, ids[0] if "chunk" in line else EVERY, action, tuple(ids[1:]))

    def refuse(self, why: str) -> NoReturn:
        """Raise ``UsageError``."""
        raise UsageError(f"{self.where}: {why}", _UNCHANGED)


def _apply(store: Store, run: Run, table: str, lines: Sequence[EditLine]) -> None:
    """Add the lines to the edits of a table and commit them."""
    database, record = database_of(store, table)
    within, saved = bool(record["within"]), int(record["saved"])
    ours, theirs = (_LiveChunks(place, str(record["encoder"])) for place in (store, database))
    own_of = lru_cache(_FEW_PARTS)(
        lambda part: search_scope.own_documents(store, part, database, theirs.purged, within=within)
    )
    rows: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for chunk, near, distance in read_edits(store, table).tolist():
        rows[chunk].append((near, distance))
    for line in lines:
        vectors = [theirs.vector(one, line) for one in line.ids]
        if line.action == "reset":
            rows.pop(line.chunk, None)
            continue
        if line.chunk != EVERY:
            asked = ours.vector(line.chunk, line)
        if line.action == "ban":
            rows[line.chunk] += [(one, BANNED) for one in line.ids]
            continue
        if len(line.ids) > saved:
            line.refuse(f"{len(line.ids):,} neighbours, the table has {saved:,}")
        if len(set(line.ids)) < len(line.ids):
            line.refuse("a neighbour occurs twice")
        part, row = split_id(line.chunk)
        for near in _in_document(own_of(part).take(np.array([row])), np.array(line.ids, np.int64)):
            line.refuse(f"{format_id(int(near))} is in the same document as {format_id(line.chunk)}")
        distances = [float(((vector - asked) ** 2).sum()) for vector in vectors]
        rows[line.chunk] = [(NO_NEIGHBOUR, BANNED), *zip(line.ids, distances, strict=True)]
    edits = [(chunk, *one) for chunk in sorted(rows) for one in dict.fromkeys(rows[chunk])]
    named = {chunk for chunk, near, _ in edits for chunk in (chunk, near if within else EVERY)} - {EVERY, NO_NEIGHBOUR}
    reads = [part_entry(store, "chunks", part).path for part in distinct_parts(np.array(sorted(named), np.int64))]
    commit_edits(store, run, table, np.array(edits, ENTRY), reads)


def _in_document(own: Excluded, near: Ids) -> Ids:
    found = (own.first <= near) & (near <= own.last)
    if own.repeats is not None:
        found |= own.repeats.documents(near) == own.document
    return near[found]


class _LiveChunks:
    def __init__(self, store: Store, encoder: str) -> None:
        self._store, self._encoder = store, encoder
        self.purged, self._vectors = read_tombstones(store), Vectors(store, encoder)

    def vector(self, chunk: int, line: EditLine) -> npt.NDArray[np.float64]:
        """Return the vector of a chunk, [1, d]; refuse the line if it is not live or has none."""
        (part, row), ids, state = split_id(chunk), np.array([chunk]), self._store.state
        place, name = self._store.place, format_id(chunk)
        if not state.is_live(part) or row >= part_entry(self._store, "chunks", part).rows:
            line.refuse(f"{place} has no chunk {name}")
        if self.purged.contains(ids).any():
            line.refuse(f"chunk {name} of {place} is not live: it was purged, or is a duplicate")
        has_vectors = state.part_file("embeddings", part, self._encoder) is not None
        if not has_vectors or not (vector := self._vectors(ids)).any():
            line.refuse(f"chunk {name} of {place} has no vector of the encoder {self._encoder!r}")
        return vector.astype(np.float64)
