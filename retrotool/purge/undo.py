"""``purge --restore``: undo a purge, in one commit, as long as nothing of it was erased.

The purge's tombstones and its block list leave the state, and so does its selector file: nothing needs it any more, and
it may name persons. Which chunks it had is kept (``restored/``): a reader with a view from before still has its
tombstones. What another purge names, or a ``chunk`` set aside, stays a tombstone.

Embeddings and indexes have the chunks, as a purge takes nothing out of them and is masked in a search. Neighbours that
were found while the purge stood lack them: ``neighbours`` finds these tables by the commits between which it stood
(``store.restored``), and the result names the commands.

Cost: the chunks' lengths in the parts that have any, and the ids of all documents, to see whether a document came in
again since. Memory: one part, and the tombstones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrotool.cli.command_lines import neighbours_command, table_command
from retrotool.embed.search_scope import find_documents
from retrotool.errors import ConflictError, LostRunError, UsageError
from retrotool.index.staleness import consecutive_ranges
from retrotool.neighbours.dependents import dependents
from retrotool.purge.erase_run import until_not_overtaken
from retrotool.purge.purged_chunks import Ids, documents_ended
from retrotool.purge.select import signed
from retrotool.store import disk, parts, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.folding import writing
from retrotool.store.ids import distinct_parts
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.restored import PREFIX, is_restored, missed_parts, standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import KEPT, Tombstones, read_tombstones, tombstone_paths, write_tombstones

_NAMED = 20


@dataclass(frozen=True, slots=True)
class Restorable:
    """What taking a purge back gives, on ``state``.

    ``chunks`` are those that the purge has, and ``live`` those that are live again; ``documents`` and ``tokens``
    count what these add to the totals. ``named_by`` are other purges that name some of the rest. ``repeats`` counts the
    documents whose id another live one has: it was let in while this one was purged.
    """

    purge: str
    chunks: Ids
    live: Ids
    documents: int
    tokens: int
    named_by: tuple[str, ...]
    repeats: int
    state: State


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What ``restore`` did: the chunks that are live again, whole ``documents`` and ``tokens`` among them.

    ``still_purged`` chunks of the purge are not, as the purges ``named_by`` name them, or they repeat others.
    ``repeats`` are documents whose id another live document has, which came in since. ``next`` are the commands that
    bring neighbours up to date which were found while the purge stood, or may have been, in stores that use this one.
    """

    purge: str
    chunks: int
    documents: int
    tokens: int
    still_purged: int
    commit: int
    named_by: tuple[str, ...] = ()
    repeats: int = 0
    next: tuple[str, ...] = ()


def restore(root: str | Path, purge: str, *, reason: str, who: str | None = None) -> RestoreResult:
    """Undo the purge ``purge``; ``UsageError`` if there is none, it was undone before, or an erase of it was begun.

    ``reason`` and ``who`` (None: the user of this process) stay in the log.
    """
    who = signed(reason, who)
    store = Store.open(root)
    with writing(store) as run:  # which takes away what one that was killed left of the files

        def attempt() -> RestoreResult:
            found = weigh(store, purge)
            state = commit_restore(store, run, found, reason, who)
            return RestoreResult(
                purge, len(found.live), found.documents, found.tokens, len(found.chunks) - len(found.live),
                int(state.records[PREFIX + purge]["restored"]), found.named_by, found.repeats,
            )  # fmt: skip

        done = until_not_overtaken(store, attempt)
    store.refresh()
    return replace(done, next=tuple(_refills(store)))


def _refills(store: Store) -> list[str]:
    """The commands that bring neighbours up to date which lack something that was undone, or may do."""
    found = []
    for table in store.state.names("neighbours"):
        entries = store.state.group("neighbours", table).entries()
        commits = {(entry.about or {}).get("commit") for entry in entries}
        record = store.state.records[f"neighbours:{table}"]
        if not record.get("within", record["database"] == store.identity.uuid):
            # Its rows of what was purged may be empty.
            found.append(neighbours_command(record["path"], store.root, table, record))
        elif any(missed_parts(store.state, commit) for commit in commits):
            found.append(table_command(store, table, store))
    return [*found, *(one.command for one in dependents(store))]


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
    own = read_tombstones(store, purge).ids
    slots = [slot for slot in store.state.group("tombstones") if slot != purge]
    others = {slot: read_tombstones(store, slot).ids for slot in slots}
    standing = standing_purges(store.state)
    after, of_purges = _joined(others), _joined({s: i for s, i in others.items() if s.partition(".")[0] in standing})
    live: list[Ids] = [np.zeros(0, np.int64)]
    documents = tokens = 0
    keys = [pa.chunked_array([], pa.binary(parts.HASH_BYTES))]
    for part in distinct_parts(own):
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
        live.append(parts.chunk_ids(part, rows))
        keys.append(parts.read_documents(store, part, ["key"])["key"].take(pa.array(np.unique(doc[rows]))))
    again = np.concatenate(live)
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
    touched = distinct_parts(found.chunks)
    reads = [entry.path for part in touched if (entry := found.state.part_file("chunks", part)) is not None]
    add: list[FileEntry] = []

    def build(state: State) -> Draft:
        if tombstone_paths(state) != seen or state.records[PREFIX + purge] != record:
            raise ConflictError("another purge was committed, or taken back, meanwhile", "Run the same command again.")
        gone = [state.file(kind, slot) for kind, slot in _files(purge)]
        counts = {"chunks": len(found.live), "documents": found.documents, "tokens": found.tokens}
        totals = {name: n + counts.get(name, 0) for name, n in state.records["totals"].items()}
        own = distinct_parts(found.chunks)
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
