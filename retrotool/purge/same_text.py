"""The same text in other documents than those that a purge selects.

A purge takes the chunks that were selected, and no live document besides. Of an equal text, in another document, the
rule depends on where that document is:

* It is live, as repeats were kept: it stays, as nobody selected it. If the selected one was set aside as its repeat,
  the purge reports it (``find_same_text``), as nothing else would be taken then.
* It was set aside as a repeat by a ``chunk`` that is finished, so no reader returns it: the erase takes it, too
  (``find_copies``, by id or text). The purge names it before anything is rewritten, as its original, of which it is
  known, is gone after that.
* A ``chunk`` that is not finished has committed it: the purge names it when that is finished
  (``retrotool.chunk.reapply_purges``), by the block list: id, text or tokens.
* A ``chunk`` has read it, and not committed it, or reads it later: the block list keeps it out.

There is no other place where a document can be. So the tombstones of a purge are all that its erase takes, and its undo
and receipt are of; what another purge, or a finished ``chunk``, names besides stays a tombstone after an undo.

Cost of ``find_same_text``: nothing, unless a selected chunk was set aside; then one read of the hashes of all
documents, 16 bytes each, one part at a time, and of the documents of the parts that have the text. Of ``find_copies``:
the hashes of ids and texts of all documents of parts with repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.purge.purged_chunks import Ids, in_store
from retrotool.store import parts
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

NAMED = 3


@dataclass(frozen=True, slots=True)
class SameText:
    """How many documents there are, and the ids of the first few: they name documents, so keep them out of the log."""

    documents: int
    first: tuple[str, ...]


NO_TEXT = SameText(0, ())


def set_aside(store: Store) -> Ids:
    """The chunks that plans made tombstones: of documents that repeat, and of parts that were taken back; ascending."""
    plans = set(store.state.with_prefix("plan:"))
    found = [
        read_tombstones(store, slot).ids
        for slot in store.state.group("tombstones")
        if slot.partition(".")[0] in plans  # the others are of purges
    ]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def find_copies(store: Store, chunks: Ids) -> tuple[Ids, int]:
    """Chunks of documents that are tombstones because they repeat one of ``chunks``, by id or text, and how many.

    Of those that a plan set aside all chunks are tombstones; what is erased already has neither id nor hash.
    """
    repeats = Tombstones(in_store(store, set_aside(store)))
    if not len(repeats) or not len(chunks):
        return np.zeros(0, np.int64), 0
    wanted = {name: values_of(store, chunks, name) for name in ("key", "text_hash")}
    selected = Tombstones(chunks)
    found = [np.zeros(0, np.int64)]
    copied = 0
    for part in repeats.parts():
        table = parts.read_documents(store, part, ["key", "text_hash", "first_row", "n_chunks"])
        alike = [pc.is_in(table[name].cast(pa.binary()), value_set=values) for name, values in wanted.items()]
        places = table.filter(pc.or_(*alike))
        if not places.num_rows:
            continue
        first, count = places["first_row"].to_numpy(), places["n_chunks"].to_numpy()
        rows = repeats.rows(part)
        repeating = np.searchsorted(rows, first + count) > np.searchsorted(rows, first)
        first, count = first[repeating], count[repeating]
        ids = parts.chunk_ids(part, parts.rows_of_documents(first, count))
        more = ~selected.contains(ids)
        found.append(ids[more])
        copied += len(np.unique(np.repeat(np.arange(len(count)), count)[more]))
    return np.unique(np.concatenate(found)), copied


def values_of(store: Store, chunks: Ids, column: str) -> pa.Array:
    """A column of the documents that have any of ``chunks``, without nulls."""
    found = [pa.array([], pa.binary())]
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        table = parts.read_documents(store, part, ["first_row", column])
        rows = chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)
        docs = np.unique(np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1)
        values = table[column].take(pa.array(docs)).drop_null().cast(pa.binary())
        found += values.chunks
    return pa.concat_arrays(found)


def find_same_text(store: Store, chunks: Ids) -> SameText:
    """The documents with a live chunk beside ``chunks`` and the text of one of these that was set aside."""
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
        live = same.filter(pa.array(n_gone < same["n_chunks"].to_numpy()))
        count += live.num_rows
        named += live["id"].slice(0, NAMED - len(named)).to_pylist()
    return SameText(count, tuple(named))
