"""Whether materialised neighbours are what they say: of their tables, and with the tokens of the chunks they name.

Where the database is the store itself, some rows are held against the chunks, drawn by the file's own sum, and all
against what was erased. A database elsewhere is not looked at. Memory: one file, and some row groups of chunks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store import parts, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.checked import Checked, Ids, check_ids
from retrotool.store.digest import lines_digest
from retrotool.store.materialised import ERASED, Materialised, read_materialised
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.paths import FileName
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.verify_references import slot_of

_SAMPLED_ROWS = 16


def check_materialised(checked: Checked) -> str:
    """Materialised files are what they should be; their digest."""
    lines = []
    for name in checked.store.state.names("materialised"):
        for slot in checked.store.state.group("materialised", name):
            entry = checked.store.state.file("materialised", slot, name)
            if entry is None or entry.path in checked.broken:
                continue
            with checked.noting(entry.path):
                digest, found = _check_file(checked, entry, int(slot))
                lines.append(f"{slot_of(entry)} {digest}")
                checked.problems += [f"{entry.path}: {what}" for what in sorted(found)]
    return lines_digest(lines) if lines else ""


def _check_file(checked: Checked, entry: FileEntry, part: int) -> tuple[str, set[str]]:
    """The digest of a file's values, and what is wrong with it."""
    chunks = checked.whole("chunks", part)
    if chunks is not None and chunks.rows != entry.rows:
        return "", {f"{entry.rows:,} rows are not those of its part"}
    key = None if chunks is None else parts.read_key(checked.store, part)
    digest, found = hashlib.blake2b(digest_size=32), set[str]()
    drawn = np.random.default_rng(int(entry.sha256[:16], 16)).choice(entry.rows, min(entry.rows, _SAMPLED_ROWS), False)
    for group in range(-(-entry.rows // ROW_GROUP)):
        rows = slice(group * ROW_GROUP, (group + 1) * ROW_GROUP)
        stored = read_materialised(checked.store, entry, [group])
        for values in (stored.ids, stored.databases, stored.n_tokens, stored.tokens):
            digest.update(np.ascontiguousarray(values).data)
        found |= _problems_of_rows(stored)
        if key is not None and (stored.ids[~key[rows]] != NO_NEIGHBOUR).any():
            found.add("a chunk that is no key has neighbours")
        if not found:
            found |= _not_of_tables(checked, entry, part, group, stored)
            some = drawn[(drawn >= rows.start) & (drawn < rows.stop)] - rows.start
            found |= _not_of_chunks(checked, entry, stored, some)
    return digest.hexdigest(), found


def _problems_of_rows(stored: Materialised) -> set[str]:
    """What is wrong with rows, whatever they are of."""
    ids, counts = stored.ids, stored.n_tokens
    none, length = ids == NO_NEIGHBOUR, stored.tokens.shape[3]
    # Those that are no ids never equal one another.
    ordered = np.sort(np.where(ids < 0, ERASED - np.arange(ids.shape[1]), (ids << 8) + stored.databases), axis=1)
    checks = {
        "an id is negative": (ids < ERASED).any(),
        "a neighbour comes after there are none": (none[:, :-1] & ~none[:, 1:]).any(),
        "a row names a neighbour twice": (ordered[:, 1:] == ordered[:, :-1]).any(),
        "a chunk has more tokens than it can": ((counts < 0) | (counts > length)).any(),
        "a neighbour has no tokens, or none has some": ((counts[:, :, 0] > 0) != (ids >= 0)).any(),
        "a continuation has no neighbour": ((counts[:, :, 1] > 0) & (ids < 0)).any(),
        "padding is not zero": (stored.tokens * (np.arange(length) >= counts[..., None])).any(),
    }
    return {what for what, found in checks.items() if found}


def _not_of_tables(checked: Checked, entry: FileEntry, part: int, group: int, stored: Materialised) -> set[str]:
    """Whether neighbours are others than those of the tables that a row group is of, where these are still there."""
    for number, made in enumerate((entry.about or {}).get("tables", ())):
        table = checked.whole("neighbours", part, FileName.parse(made).name)
        if table is None or tables.made_as(table) != made or table.rows != entry.rows:
            continue
        saved = tables.read_table(checked.store, table, [group]).ids
        mine = (stored.databases == number) & (stored.ids >= 0)
        for column in range(stored.ids.shape[1]):
            if (mine[:, column] & ~(saved == stored.ids[:, column, None]).any(axis=1)).any():
                return {"a neighbour is not one of its table"}
    return set()


def _not_of_chunks(checked: Checked, entry: FileEntry, stored: Materialised, rows: Ids) -> set[str]:
    """What is wrong with neighbours that are chunks of the store itself; tokens of some rows are looked at."""
    found: set[str] = set()
    for number, database in enumerate((entry.about or {}).get("databases", ())):
        if not database["within"]:
            continue
        mine = (stored.databases == number) & (stored.ids >= 0)
        follows = mine & (stored.n_tokens[:, :, 1] > 0)
        ids, following = stored.ids[mine], stored.ids[follows] + 1
        if not (check_ids(checked, ids, entry.path) and check_ids(checked, following, entry.path)):
            return found
        if not checked.are_keys(ids).all():
            found.add("a neighbour is no key")
        if checked.erased().contains(ids).any() or checked.erased().contains(following).any():
            found.add("it holds tokens of erased chunks")
        for row, place in np.argwhere(mine[rows]).tolist():
            near = rows[row], place
            if not _has_tokens(checked, int(stored.ids[near]), stored.tokens[near], stored.n_tokens[near]):
                found.add("tokens are not those of the chunks")
    return found


def _has_tokens(checked: Checked, chunk: int, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> bool:
    """Whether tokens [2, chunk_length] are those of a chunk and of what follows it; of erased ones none are known."""
    part, row = chunk >> PART_SHIFT, chunk & ((1 << PART_SHIFT) - 1)
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
