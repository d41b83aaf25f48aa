"""The same text in other documents than those that a purge selects.

A purge takes the chunks that were selected, and no live document besides. Of an equal text, in another document, the
rule depends on where that document is:

* It is live, as repeats were kept: it stays, as nobody selected it. If the selected one was set aside as its repeat,
  the purge reports it (``find_same_text``), as nothing else would be taken then.
* It was set aside as a repeat by a ``chunk`` that is finished, so no reader returns it: the erase takes it, too
  (``find_copies``, by id or text). The purge names it before anything is rewritten, as its original, of which it is
  known, is gone after that.
* A ``chunk`` that is not finished has committed it: the purge takes it (``find_in_open_plans``), by what the purge
  blocks: id, text or tokens. It would be set aside as a repeat otherwise, but what is purged holds no text back.
* A ``chunk`` has read it, and not committed it, or reads it later: the block list keeps it out.

There is no other place where a document can be. So the tombstones of a purge are all that its erase takes, and its undo
and receipt are of; what another purge, or a finished ``chunk``, names besides stays a tombstone after an undo.

Cost of ``find_same_text``: nothing, unless a selected chunk was set aside; then one read of the hashes of all
documents, 16 bytes each, one part at a time, and of the documents of the parts that have the text. Of ``find_copies``:
the hashes of ids and texts of all documents of parts with repeats. Of ``find_in_open_plans``: ids, hashes, places and
tokens of the documents of open plans, part by part, 3 µs each and 1 ns a byte of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import open_plans, parts_of_plan
from retrotool.purge.purged_chunks import Ids
from retrotool.store import parts
from retrotool.store.blocked import Blocked, Hashes, blocked_documents
from retrotool.store.parts import PART_SHIFT
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_set_aside, read_tombstones

NAMED = 3


@dataclass(frozen=True, slots=True)
class SameText:
    """How many documents there are, and the ids of the first few: they name documents, so keep them out of the log."""

    documents: int
    first: tuple[str, ...]


NO_TEXT = SameText(0, ())


def find_copies(store: Store, chunks: Ids) -> tuple[Ids, int]:
    """Chunks of documents that are tombstones because they repeat one of ``chunks``, by id or text, and how many.

    Of those that a plan set aside all chunks are tombstones; what is erased already has neither id nor hash.
    """
    repeats = read_set_aside(store)
    if not len(repeats) or not len(chunks):
        return np.zeros(0, np.int64), 0
    wanted = {name: values_of(store, chunks, name) for name in ("key", "text_hash")}
    selected, gone = Tombstones(chunks), read_tombstones(store)
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
        more = gone.contains(ids) & ~selected.contains(ids)
        found.append(ids[more])
        copied += len(np.unique(np.repeat(np.arange(len(count)), count)[more]))
    return np.unique(np.concatenate(found)), copied


def parts_of_open_plans(store: Store) -> list[int]:
    """Parts of plans that are not finished, and do not let in what was purged."""
    state = store.state
    plans = [plan_id for plan_id, _, plan in open_plans(store) if not plan.allow_purged]
    return [part for plan_id in plans for part in parts_of_plan(state, plan_id)]


def find_in_open_plans(store: Store, numbers: Sequence[int], chunks: Ids, hashes: Hashes) -> Ids:
    """Chunks of documents of some parts of open plans that a purge of ``chunks`` blocks by ``hashes``, ascending.

    Not of documents of which some chunks are selected or purged, and some are not: these were selected chunk by chunk.
    """
    several = Blocked(store.identity.secret, hashes)
    purged = Tombstones(np.union1d(read_tombstones(store).ids, chunks))
    found = [np.zeros(0, np.int64)]
    for part in numbers if len(hashes) else ():
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks"])
        table = table.filter(pc.and_(pc.is_valid(table["id"]), pc.is_valid(table["text_hash"])))
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        rows = purged.rows(part)
        n_purged = np.searchsorted(rows, first + count) - np.searchsorted(rows, first)
        table = table.filter(pa.array((n_purged == 0) | (n_purged == count)))
        alike = blocked_documents(store, several, parts.part_entry(store, "chunks", part), table)
        first, count = (table[name].to_numpy()[alike] for name in ("first_row", "n_chunks"))
        found.append(parts.chunk_ids(part, parts.rows_of_documents(first, count)))
    return np.concatenate(found)


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
    aside = np.intersect1d(chunks, read_set_aside(store).ids)
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
