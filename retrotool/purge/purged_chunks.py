"""The chunks that purges name, what is left of them in the store, and other documents with the same text.

A purge takes the chunks that were selected and no other live document. What happens to another document with
the same text depends on its state:

* Live, because repeats were kept: it stays. If the selected document was rejected as its repeat, the purge
  takes nothing that is live, so it reports the other one (``find_same_text``).
* Rejected as a repeat by a finished ``chunk``, so no reader returns it: the erase takes it too
  (``find_copies``, by id or text). The purge names it before anything is rewritten, because it can't be found
  afterwards.
* Committed by an unfinished ``chunk``: the purge takes it (``find_in_open_plans``) by what it blocks: id,
  text or tokens. The ``chunk`` would not reject it as a repeat of a purged document.
* Not committed yet: the block list keeps it out.

So the tombstones of a purge are exactly what its erase, undo and receipt cover. After an undo, chunks that
another purge or a finished ``chunk`` names stay tombstones.

Cost:

* ``find_same_text``: nothing unless a selected chunk was rejected; then the text hashes of all documents, 16
  bytes each.
* ``find_copies``: the hashes of ids and texts of all documents of parts with repeats.
* ``find_in_open_plans``: 3 µs per document of open plans, and 1 ns per byte of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.chunk_plan import chunks_of, documents_within, open_plans, parts_of_plan, unfinished_plans
from retrotool.cli.command_lines import command_line
from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError, UsageError, listed
from retrotool.ranges import expand_ranges
from retrotool.store import parts, tombstones
from retrotool.store.blocked import Blocked, Hashes, blocked_documents
from retrotool.store.log import FileEntry
from retrotool.store.parts import Ids, rows_by_part
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.sums import with_sums
from retrotool.store.tombstones import PREFIX, Record, Tombstones, named_chunks, read_tombstones, standing_purges
from retrotool.store.weights import Weights, weight_of

NAMED = 3
_LISTED = 20


@dataclass(frozen=True, slots=True)
class SameText:
    """The number of ``documents``, and the ids of the ``first`` few; ids must not get into the log."""

    documents: int
    first: tuple[str, ...]


def find_purge(store: Store, purge: str) -> tuple[str, Record]:
    """Return the id and record of a purge; "last" is the newest one that was not undone.

    ``UsageError`` if it does not exist or was undone.
    """
    standing = standing_purges(store.state)
    known = sorted(standing, key=lambda one: int(standing[one]["commit"]))  # the newest last
    if purge == "last" and known:
        purge = known[-1]
    if purge in standing:
        return purge, standing[purge]
    listing = command_line("purge", store)
    if record := store.state.records.get(PREFIX + purge):
        undone = f"the purge {purge!r} was undone by commit {record['undone']}: its chunks are not purged"
        raise UsageError(undone, f"List purges: {listing}")
    advice = f"List them: {listing}"
    if known:
        have = f"it has: {listed(known[-_LISTED:], len(known))}"
    elif store.state.with_prefix(PREFIX):
        have = "all of its purges were undone"
    else:
        have, advice = "nothing was purged from it", "To see how to purge: retrotool purge --help"
    wanted = "last purge" if purge == "last" else f"purge {purge!r}"
    raise UsageError(f"{store.place} has no {wanted}; {have}", advice)


@contextmanager
def withdrawn(store: Store, entries: Sequence[FileEntry]) -> Iterator[None]:
    """Remove the files of ``entries`` at once if their commit fails: some of them quote what was purged.

    They stay if the log can't be read after the error, because the commit may have been made; clean-up
    decides.
    """
    try:
        yield
    except (ConflictError, CorruptError, ErasedError, LostRunError):
        with suppress(CorruptError):
            state = store.refresh()
            gone = [one.path for one in entries if not state.has(one.path)]
            store.storage.delete(path for one in gone for path in with_sums(one))
        raise


def has_any(store: Store, purge: str, chunks: Tombstones) -> bool:
    """Return whether a purge has any of ``chunks``; its file is read only if that is possible."""
    return tombstones.may_name(store, purge, chunks) and bool(chunks.contains(read_tombstones(store, purge).ids).any())


def count_rows(store: Store) -> int:
    """Count all chunks that the parts of a store ever had."""
    return sum(parts.part_entry(store, "chunks", part).rows for part in store.state.all_parts())


def unerased(store: Store, chunks: Ids) -> Ids:
    """Return the ``chunks`` that still have tokens; both ascending."""
    found = [np.zeros(0, np.int64)]
    for part, rows in rows_by_part(chunks):
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])
        found.append(parts.chunk_ids(part, rows[table["n_tokens"].to_numpy()[rows] > 0]))
    return np.concatenate(found)


def documents_of(store: Store, chunks: Ids, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield each part that has any of ``chunks``, and a table of the documents that these belong to.

    It has ``columns`` and ``first_row`` of each document, its number ``doc``, and how many ``chunks`` it has.
    """
    for part, rows in rows_by_part(chunks):
        table = parts.read_documents(store, part, ["first_row", *columns])
        places = np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1
        doc, count = np.unique(places, return_counts=True)
        some = table.take(pa.array(doc))
        yield part, some.append_column("doc", pa.array(doc)).append_column("chunks", pa.array(count))


def totals_after(state: State, weights: Weights, sign: int) -> dict[str, Any]:
    """Return the records to write when chunks of these weights leave a store (``sign`` −1) or come back (1).

    Chunks of pending parts do not count in the totals, but in the record of their plan.
    """
    live = asdict(weight_of(weights, set(filter(state.is_live, weights))))
    totals = {name: n + sign * live.get(name, 0) for name, n in state.records["totals"].items()}
    records: dict[str, Any] = {"totals": totals}
    for plan_id in unfinished_plans(state):
        purged = asdict(weight_of(weights, parts_of_plan(state, plan_id)))
        if any(purged.values()):
            record = state.records[name := f"plan:{plan_id}"]
            before = record.get("purged", {})
            records[name] = {**record, "purged": {key: before.get(key, 0) - sign * n for key, n in purged.items()}}
    return records


def erased_purges(store: Store, erased: Tombstones) -> list[str]:
    """Return the ids of purges not yet marked as erased whose chunks all are, once ``erased`` ones are.

    Chunks erased by other purges count.
    """
    records = standing_purges(store.state)
    waiting = {purge: read_tombstones(store, purge).ids for purge, r in records.items() if not r["erased"]}
    left = Tombstones(np.setdiff1d(named_chunks(store, waiting), erased.ids))
    done = [purge for purge, record in records.items() if record["erased"] and tombstones.may_name(store, purge, left)]
    gone = Tombstones(np.union1d(erased.ids, named_chunks(store, done)))
    return [purge for purge, chunks in waiting.items() if gone.contains(chunks).all()]


def find_copies(store: Store, chunks: Ids) -> tuple[Ids, int]:
    """Return the chunks, and the number, of rejected documents that repeat one of ``chunks`` by id or text.

    Rejected documents are tombstones named by a finished plan.
    """
    repeats = tombstones.read_rejected(store)
    if not len(repeats) or not len(chunks):
        return np.zeros(0, np.int64), 0
    wanted = {name: values_of(store, chunks, name) for name in ("key", "text_hash")}
    found = [np.zeros(0, np.int64)]
    for part in repeats.parts():
        docs = [documents_with(store, part, name, values) for name, values in wanted.items()]
        found.append(chunks_of(store, part, np.union1d(*docs)))
    ids = np.concatenate(found)
    copies = ids[repeats.contains(ids) & ~Tombstones(chunks).contains(ids)]
    return copies, sum(table.num_rows for _, table in documents_of(store, copies, []))


def parts_of_open_plans(store: Store) -> list[int]:
    """Return the parts of unfinished plans that do not admit purged documents."""
    state = store.state
    plans = [plan_id for plan_id, _, plan in open_plans(store) if not plan.allow_purged]
    return [part for plan_id in plans for part in parts_of_plan(state, plan_id)]


def find_in_open_plans(store: Store, numbers: Sequence[int], chunks: Ids, hashes: Hashes, whole: Hashes) -> Ids:
    """Return the chunks in parts ``numbers`` that a purge of ``chunks`` blocks by ``hashes``, ascending.

    Documents with some chunks selected or purged and some not were selected chunk by chunk. Their own hashes
    are among ``hashes``, so they are blocked by those of wholly purged documents only, ``whole``.
    """
    several, those = (Blocked(store.identity.secret, some) for some in (hashes, whole))
    purged = Tombstones(np.union1d(read_tombstones(store).ids, chunks))
    found = [np.zeros(0, np.int64)]
    for part in numbers if len(hashes) else ():
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks"])
        table = table.filter(pc.and_(pc.is_valid(table["id"]), pc.is_valid(table["text_hash"])))
        first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
        rows = purged.rows(part)
        n_purged = np.searchsorted(rows, first + count) - np.searchsorted(rows, first)
        partly, entry = (n_purged > 0) & (n_purged < count), parts.part_entry(store, "chunks", part)
        for blocked, which in ((several, ~partly), (those, partly)):
            some = table.filter(pa.array(which))
            alike = blocked_documents(store, blocked, entry, some)
            first, count = (some[name].to_numpy()[alike] for name in ("first_row", "n_chunks"))
            found.append(parts.chunk_ids(part, expand_ranges(first, count)))
    return np.unique(np.concatenate(found))


def documents_with(store: Store, part: int, column: str, values: pa.Array) -> Ids:
    """Return the documents of a part that have one of ``values`` in a column of hashes, ascending."""
    hashes = parts.read_documents(store, part, [column])[column].cast(pa.binary())
    return np.flatnonzero(pc.is_in(hashes, value_set=values).to_numpy())


def values_of(store: Store, chunks: Ids, column: str) -> pa.Array:
    """Return a column of the documents that have any of ``chunks``, without nulls."""
    several = (table[column].drop_null().cast(pa.binary()) for _, table in documents_of(store, chunks, [column]))
    return pa.concat_arrays([pa.array([], pa.binary()), *(one.combine_chunks() for one in several)])


def find_same_text(store: Store, chunks: Ids) -> SameText:
    """Find live documents with the text of a rejected one among ``chunks``."""
    texts = values_of(store, np.intersect1d(chunks, tombstones.read_rejected(store).ids), "text_hash")
    if not len(texts):
        return SameText(0, ())
    gone = Tombstones(np.union1d(read_tombstones(store).ids, chunks))
    count = 0
    named: list[str] = []
    for part in store.state.all_parts():
        docs = documents_with(store, part, "text_hash", texts)
        if len(live := np.setdiff1d(docs, documents_within(store, part, gone)) if len(docs) else docs):
            count += len(live)
            names = parts.read_documents(store, part, ["id"])["id"]
            named += names.take(pa.array(live[: NAMED - len(named)])).to_pylist()
    return SameText(count, tuple(named))
