"""``purge --restore``: taking a purge back, in one commit, as long as nothing of it was erased.

The purge's tombstones and its block list leave the state. Its selector file goes, too: nothing needs it any more, and
it may name persons. Which chunks it had is kept (``restored/``): whoever has a view from before still has its
tombstones. What another purge names, or a ``chunk`` set aside, stays a tombstone.

What was made while the chunks were purged lacks them. Nothing of it is touched here: the record says between which
commits they were purged (``store.restored``), and by that ``index``, ``neighbours`` and ``neighbours --materialise``
find what they have to do again; ``behind`` says which tables these are.

Cost: the chunks' lengths in the parts that have any, and the keys of all documents, to see whether a document was
let in again meanwhile. Memory: one part, and the tombstones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrotool.embed.search_scope import find_documents, is_same_directory, searchable_rows
from retrotool.errors import ConflictError, LostRunError, UsageError
from retrotool.index.staleness import consecutive_ranges
from retrotool.neighbours.stage import database_of, parts_in
from retrotool.purge.purged_chunks import Ids, documents_ended, in_store
from retrotool.store import disk, parts, paths, schemas, tables
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.paths import FileName
from retrotool.store.restored import (
    PREFIX,
    is_restored,
    missed_parts,
    restored_chunks,
    restored_purges,
    standing_purges,
    stands_for_restored,
)
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tables import NO_NEIGHBOUR
from retrotool.store.tombstones import KEPT, Tombstones, read_tombstones, tombstone_paths, write_tombstones

_NAMED = 20


@dataclass(frozen=True, slots=True)
class Restorable:
    """What taking a purge back gives, on ``state``.

    ``chunks`` are those that the purge has, and ``living`` those that are living again; ``documents`` and ``tokens``
    count what these add to the totals. ``named_by`` are other purges that name some of the rest. ``repeats`` counts the
    documents whose id another living one has: it was let in while this one was purged.
    """

    purge: str
    chunks: Ids
    living: Ids
    documents: int
    tokens: int
    named_by: tuple[str, ...]
    repeats: int
    state: State


def check_restorable(store: Store, purge: str) -> None:
    """``UsageError`` if there is no such purge, or it is too late to take it back."""
    state = store.state
    record = state.records.get(PREFIX + purge)
    if record is None:
        have = sorted(standing_purges(state), key=lambda one: -int(state.records[PREFIX + one]["commit"]))
        have = [one for one in have if not state.records[PREFIX + one]["erased"]]
        more = f" and {len(have) - _NAMED:,} more" if len(have) > _NAMED else ""
        raise UsageError(
            f"the store has no purge {purge!r}",
            f"Of its purges it can take back: {', '.join(have[:_NAMED]) or 'none'}{more}. "
            f"What they are: retrotool info {store.root}",
        )
    if record["erased"]:
        raise UsageError(
            f"purge {purge} is erased: nothing of its chunks is left",
            f"What its input still has can be chunked again: retrotool chunk {store.root} INPUT... --allow-purged",
        )
    if is_restored(record):
        raise UsageError(f"purge {purge} was taken back already, by commit {record['restored']}")


def weigh(store: Store, purge: str) -> Restorable:
    """Find out what taking a purge back would give; ``UsageError`` if an erase of it was begun."""
    check_restorable(store, purge)
    own = in_store(store, read_tombstones(store, purge).ids)
    slots = [slot for slot in store.state.group("tombstones") if slot != purge]
    others = {slot: read_tombstones(store, slot).ids for slot in slots}
    standing = standing_purges(store.state)
    after, of_purges = _joined(others), _joined({s: i for s, i in others.items() if s.partition(".")[0] in standing})
    living: list[Ids] = [np.zeros(0, np.int64)]
    documents = tokens = 0
    keys = [pa.chunked_array([], pa.binary(schemas.HASH_BYTES))]
    for part in np.unique(own >> PART_SHIFT).tolist():
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "n_tokens"])
        doc, n_tokens = table["doc"].to_numpy(), table["n_tokens"].to_numpy()
        rows = _rows(own, part)
        if len(np.setdiff1d(rows[n_tokens[rows] == 0], of_purges.rows(part))):
            raise UsageError(
                f"an erase of purge {purge} was begun, so some of its chunks are gone",
                "Finish it: run the same purge again with --erase.",
            )
        rows = np.setdiff1d(rows[n_tokens[rows] > 0], after.rows(part))
        tokens += int(n_tokens[rows].sum())
        documents += documents_ended(doc, n_tokens, after.rows(part), rows)
        living.append(parts.chunk_ids(part, rows))
        keys.append(parts.read_documents(store, part, ["key"])["key"].take(pa.array(np.unique(doc[rows]))))
    again = np.concatenate(living)
    left = np.setdiff1d(own, again)
    named_by = [slot for slot, ids in others.items() if slot in standing and np.isin(left, ids).any()]
    return Restorable(
        purge, own, again, documents, tokens, tuple(named_by), _count_repeats(store, keys, after), store.state
    )


def _joined(several: Mapping[str, Ids]) -> Tombstones:
    return Tombstones(np.unique(np.concatenate([np.zeros(0, np.int64), *several.values()])))


def _rows(ids: Ids, part: int) -> Ids:
    return Tombstones(ids).rows(part)


def _count_repeats(store: Store, keys: list[pa.ChunkedArray], tombstones: Tombstones) -> int:
    """How many of the documents with ``keys`` have an id that several documents have which are not purged."""
    wanted = pa.chunked_array([chunk for some in keys for chunk in some.chunks], keys[0].type)
    if not len(wanted):
        return 0
    found = find_documents(store, wanted, tombstones)
    if found.repeats is None or found.document is None:
        return 0
    return len(np.intersect1d(found.document, found.repeats.document))


def commit_restore(store: Store, run: Run, found: Restorable, reason: str, who: str) -> State:
    """Take a purge back; the state that this made.

    ``ConflictError`` if another purge was committed, erased or taken back since it was weighed.
    """
    purge, record = found.purge, found.state.records[PREFIX + found.purge]
    seen = tombstone_paths(found.state)
    touched = np.unique(found.chunks >> PART_SHIFT).tolist()
    reads = [entry.path for part in touched if (entry := found.state.part_file("chunks", part)) is not None]
    add: list[FileEntry] = []

    def build(state: State) -> Draft:
        if tombstone_paths(state) != seen or state.records[PREFIX + purge] != record:
            raise ConflictError("another purge was committed, or taken back, meanwhile", "Run the same command again.")
        gone = [state.file(kind, slot) for kind, slot in _files(purge)]
        counts = {"chunks": len(found.living), "documents": found.documents, "tokens": found.tokens}
        totals = {name: n + counts.get(name, 0) for name, n in state.records["totals"].items()}
        own = np.unique(found.chunks >> PART_SHIFT).tolist()
        after = {
            **record, "restored": state.number + 1, "restored_by": who, "restored_reason": reason,
            "parts": consecutive_ranges(own), "repeats": found.repeats,
        }  # fmt: skip
        return Draft(
            "restore", {"purge": purge, "reason": reason, "who": who, **counts}, reads=tuple(reads), add=tuple(add),
            remove=tuple(entry.path for entry in gone if entry is not None),
            records={PREFIX + purge: after, "totals": totals},
        )  # fmt: skip

    try:
        add.append(write_tombstones(store.root, FileName.new(run.id, KEPT, purge, "parquet"), found.chunks))
        return store.commit(run, build)
    except (ConflictError, LostRunError):
        for entry in add:
            disk.unlink(paths.inside(store.root, entry.path))
        raise


def _files(purge: str) -> list[tuple[str, str]]:
    """Kind and slot of all that leaves the state with a purge."""
    return [
        ("tombstones", purge),
        ("blocked", purge),
        ("selectors", purge),
    ]


def behind(store: Store, table: str) -> list[int]:
    """Parts whose table ``table`` lacks something that was purged when it was made, and taken back since.

    Of the database, as the log says; or of the store's own chunks, where the database is another store: their rows are
    empty, which is read. ``UsageError`` if the database is not there.
    """
    database, _ = database_of(store, table)
    if not (restored_purges(store.state) or restored_purges(database.state)):
        return []
    within = is_same_directory(store, database)
    again = missed_parts(database.state, None).intersection(database.state.parts())
    found = []
    for part, entry in _tables(store, table):
        commit = (entry.about or {}).get("commit")
        missed = missed_parts(database.state, None if commit is None else int(commit))
        # An index that lacked them was not a place where they were sought.
        missed |= again.difference(parts_in(entry))
        if missed or (not within and _has_empty_rows(store, part, entry)):
            found.append(part)
    return found


def _tables(store: Store, table: str) -> Iterator[tuple[int, FileEntry]]:
    group = store.state.group("neighbours", table)
    for slot in group:
        if (entry := group.get(slot)) is not None:
            yield int(slot), entry


def _has_empty_rows(store: Store, part: int, entry: FileEntry) -> bool:
    """Whether a chunk of a part that was taken back has no neighbours in a table; those that never had any count."""
    if (entry.about or {}).get("restored", "") == stands_for_restored(store.state):
        return False
    rows = [Tombstones(restored_chunks(store, purge)).rows(part) for purge in restored_purges(store.state)]
    if not any(map(len, rows)):
        return False
    again = np.intersect1d(np.concatenate(rows), searchable_rows(store, part, read_tombstones(store)))
    for group in np.unique(again // ROW_GROUP).tolist():
        ids = tables.read_table(store, entry, [group]).ids
        mine = again[again // ROW_GROUP == group] - group * ROW_GROUP
        if (ids[mine] == NO_NEIGHBOUR).all(axis=1).any():
            return True
    return False
