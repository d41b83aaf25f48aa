"""Erasing in materialised neighbours: slots of what is erased are zeroed, rows stay.

A file holds chunks of the databases that its entry in the log names. Where one of them is the store that is erased in,
the tokens of victims go, as neighbours (their id becomes −2: the reader takes the row from the table) and as
continuations; where the file's own rows are victims, all of the row.

Cost: reading the ids of every file, and writing those that hold a victim. Memory: one row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.store import materialised
from retrotool.store.atomic import FileEntry
from retrotool.store.materialised import ERASED, Materialised
from retrotool.store.parts import ROW_GROUP
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import Tombstones

Rows = npt.NDArray[np.int64]


def databases_within(entry: FileEntry) -> list[int]:
    """Numbers of a file's databases that are the store which it lies in."""
    return [number for number, told in enumerate(_databases(entry)) if told["within"]]


def _databases(entry: FileEntry) -> list[dict[str, Any]]:
    return list((entry.about or {}).get("databases", ()))


def holds(store: Store, entry: FileEntry, victims: Tombstones, databases: list[int], rows: Rows) -> bool:
    """Whether a file holds any of ``victims``, chunks of ``databases``, or anything in ``rows`` of its own."""
    if not (databases or len(rows)):
        return False
    for group in range(-(-entry.rows // ROW_GROUP)):
        stored = materialised.read_materialised(store, entry, [group], tokens=False)
        whole, following = _hits(stored, victims, databases)
        mine = _of_group(rows, group)
        if whole.any() or following.any() or (stored.ids[mine] != NO_NEIGHBOUR).any():
            return True
    return False


def rewrite(
    store: Store, entry: FileEntry, name: FileName, victims: Tombstones, databases: list[int], rows: Rows
) -> FileEntry:
    """Write a file again without what ``holds`` looks for."""
    own = store.identity

    def groups() -> Iterator[Materialised]:
        for group in range(-(-entry.rows // ROW_GROUP)):
            stored = materialised.read_materialised(store, entry, [group])
            whole, following = _hits(stored, victims, databases)
            ids, which, n_tokens, tokens = (
                np.array(values) for values in (stored.ids, stored.databases, stored.n_tokens, stored.tokens)
            )
            mine = _of_group(rows, group)
            ids[whole], which[whole] = ERASED, 0
            ids[mine], which[mine] = NO_NEIGHBOUR, 0
            whole[mine] = True
            n_tokens[whole], tokens[whole] = 0, 0
            n_tokens[:, :, 1][following], tokens[:, :, 1][following] = 0, 0
            yield Materialised(ids, which, n_tokens, tokens)

    about = entry.about or {}
    return materialised.write_materialised(
        store.root, name, int(about["k"]), own.chunk_length * own.tokenizer.token_bytes, groups(), about=about
    )


def _hits(
    stored: Materialised, victims: Tombstones, databases: list[int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which slots have a victim for a neighbour, and which have one for a continuation, bool [n, k] each."""
    of = np.isin(stored.databases, databases) & (stored.ids > NO_NEIGHBOUR)
    return of & victims.contains(stored.ids), of & victims.contains(stored.ids + 1) & (stored.n_tokens[:, :, 1] > 0)


def _of_group(rows: Rows, group: int) -> Rows:
    low, high = np.searchsorted(rows, [group * ROW_GROUP, (group + 1) * ROW_GROUP])
    return rows[low:high] - group * ROW_GROUP


def digest(ids: Rows) -> str:
    """Stands for ids in the name of a task."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
