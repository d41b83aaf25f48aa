"""Whether tokens of neighbours in tables are those of neighbours of the row, and of the chunks that they name.

Where the database is the store itself, some rows are compared with the chunks, drawn by the file's own sum, and all
with what was erased. A database elsewhere is not read. Memory: one row group, and some row groups of chunks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store import parts, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.checked import Checked, Ids, check_ids
from retrotool.store.ids import split_id
from retrotool.store.parts import ROW_GROUP
from retrotool.store.tables import ERASED, NO_NEIGHBOUR, NeighbourTable, NeighbourText

_SAMPLED_ROWS = 16


def check_text(checked: Checked, entry: FileEntry, table: NeighbourTable, *, within: bool) -> str:
    """Check the tokens of neighbours that a table has; return their digest."""
    digest, found = hashlib.blake2b(digest_size=32), set[str]()
    drawn = np.random.default_rng(int(entry.sha256[:16], 16)).choice(entry.rows, min(entry.rows, _SAMPLED_ROWS), False)
    for group in range(-(-entry.rows // ROW_GROUP)):
        rows = slice(group * ROW_GROUP, (group + 1) * ROW_GROUP)
        text = tables.read_text(checked.store, entry, [group])
        for values in (text.ids, text.distances, text.n_tokens, text.tokens):
            digest.update(np.ascontiguousarray(values).data)
        found |= _problems_of_text(text, table.ids[rows])
        if within and not found:
            some = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
            found |= _not_of_chunks(checked, entry, text, some)
    checked.problems += [f"{entry.path}: {what}" for what in sorted(found)]
    return digest.hexdigest()


def _problems_of_text(text: NeighbourText, saved: Ids) -> set[str]:
    """What is wrong with tokens of rows whose neighbours are ``saved`` [n, saved], whatever they are of."""
    ids, counts = text.ids, text.n_tokens
    none, length = ids == NO_NEIGHBOUR, text.tokens.shape[3]
    # Those that are no ids never equal one another.
    ordered = np.sort(np.where(ids < 0, ERASED - np.arange(ids.shape[1]), ids), axis=1)
    named = (ids[:, :, None] == saved[:, None, :]).any(axis=2)
    checks = {
        "the id of a text is negative": (ids < ERASED).any(),
        "a text comes after there are none": (none[:, :-1] & ~none[:, 1:]).any(),
        "a row has the text of a neighbour twice": (ordered[:, 1:] == ordered[:, :-1]).any(),
        "a row has the text of a chunk that is not its neighbour": ((ids >= 0) & ~named).any(),
        "a neighbour with a text has no distance, or none has one": ((ids >= 0) != np.isfinite(text.distances)).any(),
        "a text has more tokens than a chunk can": ((counts < 0) | (counts > length)).any(),
        "a neighbour has no tokens, or none has some": ((counts[:, :, 0] > 0) != (ids >= 0)).any(),
        "a continuation has no neighbour": ((counts[:, :, 1] > 0) & (ids < 0)).any(),
        "padding of a text is not zero": (text.tokens * (np.arange(length) >= counts[..., None])).any(),
    }
    return {what for what, found in checks.items() if found}


def _not_of_chunks(checked: Checked, entry: FileEntry, text: NeighbourText, rows: Ids) -> set[str]:
    """What is wrong with the text of chunks of the store itself; tokens of some rows are looked at."""
    mine = text.ids >= 0
    follows = mine & (text.n_tokens[:, :, 1] > 0)
    ids, following = text.ids[mine], text.ids[follows] + 1
    if not (check_ids(checked, ids, entry.path) and check_ids(checked, following, entry.path)):
        return set()
    found: set[str] = set()
    if checked.erased().contains(ids).any() or checked.erased().contains(following).any():
        found.add("it has tokens of erased chunks")
    for row, place in np.argwhere(mine[rows]).tolist():
        near = rows[row], place
        if not _has_tokens(checked, int(text.ids[near]), text.tokens[near], text.n_tokens[near]):
            found.add("tokens are not those of the chunks")
    return found


def _has_tokens(checked: Checked, chunk: int, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> bool:
    """Whether tokens [2, chunk_length] are those of a chunk and of what follows it; of erased ones none are known."""
    part, row = split_id(chunk)
    if checked.whole("chunks", part) is None:
        return True
    for place in (0, 1):
        if not counts[place]:
            continue
        chunks = parts.read_chunks(checked.store, part, [(row + place) // ROW_GROUP])
        at = (row + place) % ROW_GROUP
        if place and chunks.index[at] == 0:
            return False
        if chunks.n_tokens[at] and not (
            chunks.n_tokens[at] == counts[place] and (chunks.tokens[at] == tokens[place]).all()
        ):
            return False
    return True
