"""``undo``: undo a purge in one commit, as long as none of its chunks was erased.

The commit removes the purge's tombstones, block list and selector file from the state. A list of its chunks
stays in ``undone/``, because readers on an older view still exclude them. Chunks that another purge names or
a ``chunk`` rejected stay tombstones.

The purge of documents that a ``chunk`` replaced is undone by restoring them and purging, in the same commit,
the documents that have their ids now. That is a purge of its own, which can be undone too.

Embeddings and indexes still have the chunks: a search only skips purged ones. Neighbours found while the
purge was in effect lack them. ``neighbours`` finds these tables by the commits between which it was
(``store.tombstones``); the result names the commands.

A purge can't be undone where vectors were made elsewhere without its chunks: a search would return them by
vectors of zeros.

Cost: the chunk lengths of the parts concerned, the ids of all documents, to find documents added again since,
and vectors made elsewhere of the chunks. Memory: one part, and the tombstones.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrotool.chunk.chunk_plan import chunks_of
from retrotool.chunk.deduplicate import replaced_record
from retrotool.cli import output
from retrotool.cli.command_lines import command_line, neighbours_command, table_command
from retrotool.embed.search_scope import find_documents, read_part_vectors
from retrotool.errors import ConflictError, UsageError
from retrotool.neighbours.dependents import dependents
from retrotool.neighbours.stage import table_record
from retrotool.purge import purged_chunks
from retrotool.purge.select import signed
from retrotool.ranges import consecutive_ranges
from retrotool.store import parts, tombstones
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.parts import Ids, distinct_parts, rows_by_part
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import KEPT, PREFIX, Record, Tombstones, named_chunks, read_tombstones, standing_purges
from retrotool.store.weights import Weight, weigh_chunks, weight_of


@dataclass(frozen=True, slots=True)
class UndoResult:
    """What ``undo`` did: ``chunks``, whole ``documents`` and ``tokens`` that are live again.

    * ``still_purged``: its other chunks: the purges ``named_by`` name them, or they repeat others.
    * ``repeats``: documents whose id another live document has, which was added since.
    * ``outdated``: documents that had replaced them, and are purged by ``outdated_purge`` ("": none) instead.
    * ``next``: commands that update neighbours which may have been found while the purge was in effect, here
      and in stores that use this one.
    """

    purge: str
    chunks: int
    documents: int
    tokens: int
    still_purged: int
    commit: int
    named_by: tuple[str, ...] = ()
    repeats: int = 0
    outdated: int = 0
    outdated_purge: str = ""
    next: tuple[str, ...] = ()


def undo(root: str | Path, purge: str, *, reason: str, who: str | None = None) -> UndoResult:
    """Undo a purge. ``UsageError`` if it does not exist, was undone before, or its erase was begun.

    ``reason`` and ``who`` (None: the user of this process) stay in the log.
    """
    who = signed(reason, who)
    store = Store.open(root)
    with writing(store) as run:  # also removes files that a killed undo left
        purge, _ = purged_chunks.find_purge(store, purge)
        done = retry_overtaken(lambda: commit_undo(store, run, purge, reason, who), store.renew)
    store.refresh()
    return replace(done, next=tuple(_refills(store)))


def _refills(store: Store) -> list[str]:
    """Return the commands that update neighbours which lack undone chunks, or may."""
    found = []
    for table in store.state.names("neighbours"):
        entries = store.state.group("neighbours", table).entries()
        commits = {int((entry.about or {})["commit"]) for entry in entries}
        record = table_record(store, table)
        if not record["within"]:
            # Rows of purged chunks may be empty.
            found.append(neighbours_command(record["uri"], store.place, table, record))
        elif any(tombstones.missed_spans(store.state, commit) for commit in commits):
            found.append(table_command(store, table, store))
    return [*found, *(one.command for one in dependents(store))]


def _restorable(store: Store, purge: str, record: Record) -> Ids:
    """Return the chunks of a purge; ``UsageError`` if its erase was begun."""
    if record["erased"]:
        again = f"{command_line('chunk', store)} INPUT... --allow-purged"
        raise UsageError(f"purge {purge} is erased, so it can't be undone", f"Add its input again: {again}")
    own = read_tombstones(store, purge).ids
    named = named_chunks(store, [other for other in standing_purges(store.state) if other != purge])
    if len(np.setdiff1d(own, np.union1d(purged_chunks.unerased(store, own), named))):
        advice = f"Finish it: {command_line('erase', store)} {purge}"
        raise UsageError(f"an erase of purge {purge} was begun, so some of its chunks can't be restored", advice)
    return own


def _check_vectors(store: Store, purge: str, chunks: Ids) -> None:
    """Raise ``UsageError`` if vectors that were made elsewhere lack some of ``chunks``, purged by then."""
    for name in store.state.names("embeddings"):
        lacking = 0
        for part, rows in rows_by_part(chunks) if store.state.records[f"encoder:{name}"].get("foreign") else ():
            if store.state.part_file("embeddings", part, name) is not None:
                vectors = read_part_vectors(store, name, part)[rows[parts.read_embedded(store, part)[rows]]]
                lacking += len(vectors) - int(vectors.any(axis=1).sum())
        if lacking:
            raise UsageError(
                f"purge {purge} can't be undone: {output.count(lacking, 'chunk')} of it had no vectors in the files "
                f"that were given for {name}",
                f"Add the input again, and vectors for that: {command_line('chunk', store)} INPUT... --allow-purged",
            )


def commit_undo(store: Store, run: Run, purge: str, reason: str, who: str) -> UndoResult:
    """Undo a purge of the store's view in one commit; return the result without the ``next`` commands.

    ``UsageError`` if the purge does not exist or its erase was begun; ``ConflictError`` if another purge was
    committed, erased or undone since the view.
    """
    before, (_, record) = store.state, purged_chunks.find_purge(store, purge)
    own, standing = _restorable(store, purge, record), standing_purges(before)
    others = [slot for slot in before.group("tombstones") if slot != purge]
    after = Tombstones(named_chunks(store, others))
    live, weights = weigh_chunks(store, own, after)
    _check_vectors(store, purge, live)
    left = Tombstones(np.setdiff1d(own, live))
    named_by = tuple(slot for slot in others if slot in standing and purged_chunks.has_any(store, slot, left))
    keys, repeats, outdated = purged_chunks.values_of(store, live, "key"), 0, own[:0]
    if len(keys) and "plan" in record:
        docs = ((part, purged_chunks.documents_with(store, part, "key", keys)) for part in before.parts())
        theirs = [outdated, *(chunks_of(store, part, some) for part, some in docs)]
        outdated = np.setdiff1d(np.concatenate(theirs), own)
    elif len(keys):
        found = find_documents(store, pa.chunked_array([keys]), after)
        if found.repeats is not None and found.document is not None:
            repeats = len(np.intersect1d(found.document, found.repeats.document))
    outdated, lost = weigh_chunks(store, outdated, after)
    weight, less = weight_of(weights), weight_of(lost)
    total = dict(weights)
    for part, one in lost.items():
        total[part] = total.get(part, Weight()) + Weight(-one.chunks, -one.documents, -one.tokens)
    touched = distinct_parts(own)
    reads = [entry.path for part in touched if (entry := before.part_file("chunks", part)) is not None]
    add: list[FileEntry] = []
    new = "p" + secrets.token_hex(4) if len(outdated) else ""

    def build(state: State) -> Draft:
        purges = tombstones.tombstone_paths(before)
        if tombstones.tombstone_paths(state) != purges or state.records[PREFIX + purge] != record:
            raise ConflictError("another purge was committed, or undone, concurrently", "Run the same command again.")
        gone = [state.file(kind, purge) for kind in ("tombstones", "blocked", "selectors")]
        undone = {
            **record, "undone": state.number + 1, "undone_by": who, "undone_reason": reason,
            "parts": consecutive_ranges(touched), "repeats": repeats,
        }  # fmt: skip
        records = {PREFIX + purge: undone, **purged_chunks.totals_after(state, total, 1)}
        if new:
            records[PREFIX + new] = replaced_record(state, record["plan"], less, reason, who)
        return Draft(
            "undo", {"purge": purge, "reason": reason, "who": who, **asdict(weight)}, reads=tuple(reads),
            add=tuple(add), remove=tuple(entry.path for entry in gone if entry is not None), records=records,
        )  # fmt: skip

    with purged_chunks.withdrawn(store, add):
        add.append(tombstones.write_tombstones(store, FileName.new(run.id, KEPT, purge, "parquet"), own))
        if new:
            name = FileName.new(run.id, "tombstones", new, "parquet")
            add.append(tombstones.write_tombstones(store, name, outdated))
        state = store.commit(run, build)
    return UndoResult(
        purge, **asdict(weight), still_purged=len(own) - len(live), commit=int(state.records[PREFIX + purge]["undone"]),
        named_by=named_by, repeats=repeats, outdated=less.documents, outdated_purge=new,
    )  # fmt: skip
