"""Documents that stay behind with the text of one that a purge selects, where a ``chunk`` had set that one aside.

What is set aside as a repeat is not living, so a purge of it takes nothing, while the document that it repeats gives
the same text. Who asks to have it taken out means that one, too.

Cost: nothing, unless a selected chunk was set aside; then one read of the hashes of all documents, 16 bytes each, one
part at a time, and of the documents of the parts that have the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.purge.commit import in_store, set_aside, values_of
from retrotool.purge.selection import Ids
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

NAMED = 3


@dataclass(frozen=True, slots=True)
class SameText:
    """How many documents there are, and the ids of the first few: they name documents, so keep them out of the log."""

    documents: int
    first: tuple[str, ...]


NO_TEXT = SameText(0, ())


def find_same_text(store: Store, chunks: Ids) -> SameText:
    """The documents with a living chunk beside ``chunks`` and the text of one of these that was set aside."""
    aside = in_store(store, np.intersect1d(chunks, set_aside(store)))
    texts = values_of(store, aside, "text_hash")
    if not len(texts):
        return NO_TEXT
    gone = Tombstones(np.union1d(read_tombstones(store).ids, chunks))
    count = 0
    named: list[str] = []
    for part in store.state.parts():
        hashes = parts.read_documents(store, part, ["text_hash"])["text_hash"]
        docs = np.flatnonzero(pc.is_in(hashes.cast(pa.binary()), value_set=texts).to_numpy())
        if not len(docs):
            continue
        same = parts.read_documents(store, part, ["id", "first_row", "n_chunks"]).take(pa.array(docs))
        first, rows = same["first_row"].to_numpy(), gone.rows(part)
        n_gone = np.searchsorted(rows, first + same["n_chunks"].to_numpy()) - np.searchsorted(rows, first)
        living = same.filter(pa.array(n_gone < same["n_chunks"].to_numpy()))
        count += living.num_rows
        named += living["id"].slice(0, NAMED - len(named)).to_pylist()
    return SameText(count, tuple(named))
