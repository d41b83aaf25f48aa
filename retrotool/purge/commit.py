"""``purge``: weighing what was selected, and making it tombstones, in one commit.

What can be asked for is in ``stages.selection``. The commit costs what is purged, not what is stored; it also adds to
the block list, so that what is purged does not come back with its input.

An erase also takes what a ``chunk`` set aside because it repeats a purged document (``find_copies``): nobody could
select it by its text any more, and it is the same text. That reads the documents of all parts with repeats.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import write_json
from retrotool.errors import ConflictError, LostRunError
from retrotool.purge.selection import Asked, Chosen, Ids, rows_of
from retrotool.purge.selectors.scan import scan_files
from retrotool.store import blocked, disk, parts, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import Hashes, read_blocked
from retrotool.store.log import Draft
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName
from retrotool.store.restored import standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, may_name, read_tombstones, write_tombstones


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``asked`` for matched, as ``chosen`` says in more detail.

    ``chunks`` are all ids, sorted, and ``living`` those that were not purged before; ``documents`` and ``tokens``
    count what these take from the totals. ``blocked`` are the hashes that keep what is purged from coming back, and
    ``newly_blocked`` says how many of them the store has not yet. ``state`` is the state that was searched.

    For an erase ``copies`` are the chunks, and ``copied`` the number, of documents that repeat one selected and are
    tombstones for that; ``unerased`` counts the chunks of all that still have tokens.
    """

    asked: Asked
    chosen: Chosen
    chunks: Ids
    living: Ids
    documents: int
    tokens: int
    blocked: Hashes
    newly_blocked: int
    state: State
    copies: Ids
    copied: int = 0
    unerased: int = 0


def same_selector(store: Store, asked: Asked) -> dict[str, bool]:
    """Purges that asked for the same before, and were not taken back; and whether they are erased."""
    wanted = (asked.kind, store.identity.keyed_hash(asked.literal))
    records = standing_purges(store.state)
    return {p: r["erased"] for p, r in records.items() if (r["selector"], r["hash"]) == wanted}


def in_store(store: Store, chunks: Ids) -> Ids:
    """Those of ``chunks`` whose part the store has: a ``chunk`` may have taken parts back after they were purged."""
    there: Ids = chunks[np.isin(chunks >> PART_SHIFT, store.state.parts())]
    return there


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
        ids = parts.chunk_ids(part, rows_of(first, count))
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


def weigh(
    store: Store, asked: Asked, chosen: Chosen, more: Ids | None = None, copies: Ids | None = None, copied: int = 0
) -> Selection:
    """Find out what chosen chunks, and ``more``, would take from the store.

    ``copies`` (None: nothing is erased): see ``Selection``.
    """
    tombstones = read_tombstones(store)
    chunks = in_store(store, chosen.chunks if more is None else np.union1d(chosen.chunks, more))
    fresh = chunks[~tombstones.contains(chunks)]
    living: list[Ids] = []
    documents = tokens = 0
    for part in np.unique(fresh >> PART_SHIFT).tolist():
        rows = fresh[fresh >> PART_SHIFT == part] - (part << PART_SHIFT)
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "n_tokens"])
        doc, n_tokens = table["doc"].to_numpy(), table["n_tokens"].to_numpy()
        rows = rows[n_tokens[rows] > 0]
        tokens += int(n_tokens[rows].sum())
        documents += documents_ended(doc, n_tokens, tombstones.rows(part), rows)
        living.append(parts.chunk_ids(part, rows))
    ids = np.concatenate(living) if living else np.zeros(0, np.int64)
    hashes = _hashes_to_block(store, chunks)
    new = len(read_blocked(store).lacks(hashes))
    none = np.zeros(0, np.int64)
    unerased = 0 if copies is None else count_unerased(store, np.union1d(chunks, copies))
    return Selection(
        asked, chosen, chunks, ids, documents, tokens, hashes, new, store.state,
        none if copies is None else copies, copied, unerased,
    )  # fmt: skip


def count_rows(store: Store) -> int:
    """All chunks that the parts of a store ever had."""
    state = store.state
    return sum(entry.rows for part in state.parts() if (entry := state.part_file("chunks", part)) is not None)


def count_unerased(store: Store, chunks: Ids) -> int:
    """How many of some chunks still have tokens."""
    count = 0
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        n_tokens = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])["n_tokens"]
        count += int((n_tokens.to_numpy()[chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)] > 0).sum())
    return count


def _hashes_to_block(store: Store, chunks: Ids) -> Hashes:
    """What a purge of ``chunks`` blocks: ids of documents purged as a whole then; texts and tokens of all it touches.

    Chunks of earlier purges count as purged, those of documents that repeat do not. What is erased can't be hashed.
    Reads all row groups of chunks that hold a document that it touches.
    """
    purges = [read_tombstones(store, purge).ids for purge in standing_purges(store.state)]
    purged = Tombstones(np.unique(np.concatenate([chunks, *purges])))
    secret = store.identity.secret
    found = [np.zeros(0, blocked.HASH)]
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks"])
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        gone = np.zeros(parts.part_entry(store, "chunks", part).rows, np.int64)
        gone[purged.rows(part)] = 1
        rows = chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)
        docs = np.unique(np.searchsorted(first, rows, side="right") - 1)
        whole = docs[np.add.reduceat(gone, first)[docs] == count[docs]]
        for column, of, hashed in (("id", whole, blocked.id_hashes), ("text_hash", docs, blocked.keyed_texts)):
            found.append(hashed(secret, table[column].take(pa.array(of)).drop_null().to_pylist()))
        tokens = blocked.stored_tokens(store, parts.part_entry(store, "chunks", part), table.take(pa.array(docs)))
        found.append(tokens[tokens != b""])
    return np.unique(np.concatenate(found))


def documents_ended(doc: npt.NDArray[Any], n_tokens: npt.NDArray[Any], before: Ids, rows: Ids) -> int:
    """How many documents of a part have their last living chunk among ``rows``."""
    alive = n_tokens > 0
    alive[before] = False
    left = alive.copy()
    left[rows] = False
    size = int(doc[-1]) + 1 if len(doc) else 0
    had, has = np.bincount(doc[alive], minlength=size), np.bincount(doc[left], minlength=size)
    return int(((had > 0) & (has == 0)).sum())


COPIES = ".copies"
"""What the slot of a purge's tombstones has behind its id where they are the copies that are erased with it."""


def tombstones_of(store: Store, purge: str) -> Ids:
    """The chunks of a purge, and the copies that are erased with it."""
    return np.union1d(read_tombstones(store, purge).ids, read_tombstones(store, purge + COPIES).ids)


def has_any(store: Store, purge: str, chunks: Tombstones) -> bool:
    """Whether a purge, or the copies that are erased with it, has any of ``chunks``; reads what may only."""
    if not may_name(store, (purge, purge + COPIES), chunks):
        return False
    return bool(chunks.contains(tombstones_of(store, purge)).any())


def commit_purge(store: Store, run: Run, selection: Selection, reason: str, who: str) -> str:
    """Make the chunks of a selection tombstones, also those that other purges had, and block what they were of.

    Returns the purge's id. ``ConflictError`` if another purge was committed since the selection was made. Copies are
    written down too, though they are tombstones already: once their originals are erased nothing else tells them.
    What was scanned for it goes.
    """
    asked = selection.asked
    scan = asked.scan.scan(store) if asked.scan else None
    purge = "p" + secrets.token_hex(4)
    seen = list(selection.state.group("tombstones"))
    add: list[FileEntry] = []

    def build(state: State) -> Draft:
        if list(state.group("tombstones")) != seen:
            raise ConflictError("another purge was committed while this one selected", "Run the same command again.")
        counts = {"chunks": len(selection.living), "documents": selection.documents, "tokens": selection.tokens}
        totals = {name: n - counts.get(name, 0) for name, n in state.records["totals"].items()}
        hashed = store.identity.keyed_hash(asked.literal)
        selector = {"selector": asked.kind, "hash": hashed, "reason": reason, "who": who}
        record = {**counts, **selector, "commit": state.number + 1, "erased": False}
        records = {f"purge:{purge}": record, "totals": totals}
        gone = scan_files(state, scan) if scan else []
        return Draft("purge", selector, add=tuple(add), remove=tuple(gone), records=records)

    try:
        _write_purge(store, run, purge, selection, add)
        store.commit(run, build)
    except (ConflictError, LostRunError):
        for entry in add:  # one of them has the selector's text: it must not wait for the next clean-up
            disk.unlink(paths.inside(store.root, entry.path))
        raise
    return purge


def _write_purge(store: Store, run: Run, purge: str, selection: Selection, add: list[FileEntry]) -> None:
    """Write the files of a purge, and note them in ``add``."""
    root = store.root
    add.append(write_tombstones(root, FileName.new(run.id, "tombstones", purge, "parquet"), selection.chunks))
    if len(selection.copies):
        name = FileName.new(run.id, "tombstones", purge + COPIES, "parquet")
        add.append(write_tombstones(root, name, selection.copies))
    if len(selection.blocked):
        add.append(blocked.write_blocked(root, FileName.new(run.id, "blocked", purge, "parquet"), selection.blocked))
    # Last: it must not stay if another can't be written.
    literal = {"kind": selection.asked.kind, "literal": selection.asked.literal}
    add.append(write_json(root, FileName.new(run.id, "selectors", purge, "json"), literal, 1))


def erased_purges(store: Store, erased: Tombstones) -> list[str]:
    """Ids of the purges that are not known to be erased and of which nothing is left once ``erased`` chunks are.

    What other purges erased counts, and so does what left the store with its part.
    """
    records = standing_purges(store.state)
    waiting = {purge: in_store(store, tombstones_of(store, purge)) for purge, r in records.items() if not r["erased"]}
    left = Tombstones(np.setdiff1d(np.concatenate([np.zeros(0, np.int64), *waiting.values()]), erased.ids))
    before = [
        tombstones_of(store, purge)
        for purge, record in records.items()
        if record["erased"] and may_name(store, (purge, purge + COPIES), left)
    ]
    gone = Tombstones(np.unique(np.concatenate([erased.ids, *before])))
    return [purge for purge, chunks in waiting.items() if gone.contains(chunks).all()]
