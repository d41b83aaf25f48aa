"""Documents that the store has of an input, so that reading a changed input again adds only what is new.

A document is known if an earlier plan read one with the same id and the same text from this input. Memory: 32 bytes
for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import parts_of_plan
from retrotool.store import parts, schemas
from retrotool.store.restored import standing_purges
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

_HASHES = np.dtype(f"S{2 * schemas.HASH_BYTES}")


class KnownDocuments:
    """The documents of the input ``name`` that ``plans`` read, by their keys and text hashes.

    Documents that are erased, also in part, are unknown: the block list keeps them out. ``without``: so are those of
    which every chunk is in it, as purged documents are where they may be added again.
    """

    def __init__(self, store: Store, name: str, plans: Sequence[str], without: Tombstones | None = None) -> None:
        live = set(store.state.parts())
        found = [np.zeros(0, _HASHES)]
        for part in (part for plan in plans for part in parts_of_plan(store.state, plan) if part in live):
            table = parts.read_documents(store, part, ["key", "text_hash", "input"])
            wanted = pc.and_(pc.equal(table["input"], name), pc.is_valid(table["text_hash"]))
            doc = np.flatnonzero(wanted.fill_null(False).to_numpy())
            if without is not None:
                doc = np.setdiff1d(doc, documents_within(store, part, without), assume_unique=True)
            hashes = [parts.from_fixed_binary(table[column], np.dtype(np.uint8)) for column in ("key", "text_hash")]
            found.append(np.hstack(hashes)[doc].view(_HASHES).reshape(-1))
        self._sorted = np.sort(np.concatenate(found))

    def hold(self, hashes: Sequence[tuple[bytes, bytes]]) -> npt.NDArray[np.bool_]:
        """Which documents, given by key and text hash [n], are known."""
        wanted = np.frombuffer(b"".join(itertools.chain.from_iterable(hashes)), _HASHES)
        place = np.searchsorted(self._sorted, wanted)
        known = np.zeros(len(wanted), np.bool_)
        inside = place < len(self._sorted)
        known[inside] = self._sorted[place[inside]] == wanted[inside]
        return known


def chunks_of_purges(store: Store) -> Tombstones:
    """Chunks that were purged: those of documents that repeat are tombstones too, but their ids stay taken."""
    ids = [read_tombstones(store, purge).ids for purge in standing_purges(store.state)]
    return Tombstones(np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64))


def documents_within(store: Store, part: int, chunks: Tombstones) -> npt.NDArray[np.int64]:
    """The docs of a part of which every chunk is in ``chunks``, ascending."""
    rows = chunks.rows(part)
    if not len(rows):
        return rows
    table = parts.read_documents(store, part, ["first_row", "n_chunks"])
    first, n_chunks = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    return np.flatnonzero(np.searchsorted(rows, first + n_chunks) - np.searchsorted(rows, first) == n_chunks)
