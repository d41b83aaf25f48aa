"""Purging what a plan has of purged documents under this or another name, before it is finished.

A unit of ``chunk`` leaves out what is on the block list, and its commit looks again. What is purged after that may have
living copies in the plan: they would have been set aside as repeats of it, but what is purged, or erased, holds no text
back. So before a plan is finished, whatever is done with its repeats, living documents of it that the block list names
are purged, too: in a purge of their own for each that keeps them from coming back, which has the same selector, reason
and who, and says after which it was made. It is a purge like any other: it can be erased, verified and taken back. An
erase of the one before takes it along (``with_those_after``), and so does the same purge with ``--erase``.

Documents of which a chunk is a tombstone stay as they are: somebody has looked at them, chunk by chunk.

Cost: nothing, as long as nothing was purged since the plan was committed. Else ids, hashes, places and tokens of the
plan's documents are read, part by part, and looked up, 3 µs each and 1 ns a byte of tokens. Memory: one part's, 16
bytes a hash of these purges, and 64 bytes a document and 8 a chunk that is found.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.chunk.chunk_plan import parts_of, read_plan
from retrotool.errors import ConflictError, ErasedError, LostRunError
from retrotool.store import blocked, disk, parts, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import Blocked, Hashes
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.restored import standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, write_tombstones

AFTER, PLAN = "after", "plan"
"""What the record of such a purge has besides: the purge that it was made after, and the plan."""


Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Found:
    """Documents that one purge keeps from coming back: their chunks, their hashes, and what they hold."""

    chunks: list[Ids] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0

    def counts(self) -> dict[str, int]:
        """What they take from the totals."""
        return {"chunks": sum(map(len, self.chunks)), "documents": self.documents, "tokens": self.tokens}


def purge_again(store: Store, run: Run, plan_id: str) -> None:
    """Purge the living documents of a plan that were purged before; ``store`` is then at a state that has none.

    Nothing if the plan lets in what was purged, or is finished.
    """
    while True:
        state = store.refresh()
        entry = state.file("plans", plan_id)
        if entry is None:
            return
        lists = _lists(store, plan_id)
        if not lists or read_plan(store, entry).allow_purged:
            return
        try:
            found = _find(store, plan_id, lists)
        except ErasedError:
            continue  # something was erased meanwhile: look again
        if not found:
            return
        try:
            _commit(store, run, plan_id, entry, found)
        except ConflictError:
            continue  # chunks were purged, or the plan was finished, meanwhile


def with_those_after(state: State, purges: Iterable[str]) -> list[str]:
    """Some purges, and those that were made after any of them as a plan had more of the same."""
    wanted = dict.fromkeys(purges)
    records = standing_purges(state)
    return list(wanted | dict.fromkeys(purge for purge, record in records.items() if record.get(AFTER) in wanted))


def _lists(store: Store, plan_id: str) -> dict[str, Hashes]:
    """By their purges, the hashes that came onto the block list since a plan was committed, oldest first."""
    state = store.state
    group, records = state.group("blocked"), standing_purges(state)
    begun = int(state.records[f"plan:{plan_id}"]["order"])
    newer = {
        purge: entry
        for purge in sorted(group, key=lambda purge: int(records[purge]["commit"]))
        if records[purge]["commit"] > begun
        # What such purges name is gone already, and no more than that was asked for.
        and AFTER not in records[purge]
        and (entry := group.get(purge)) is not None
    }
    return {purge: blocked.read_hashes(store, entry) for purge, entry in newer.items()}


def _find(store: Store, plan_id: str, lists: Mapping[str, Hashes]) -> dict[str, _Found]:
    """What each purge keeps from coming back, of the documents of a plan that are whole; none is told twice."""
    secret = store.identity.secret
    every = Blocked(secret, np.unique(np.concatenate(list(lists.values()))))
    tombstones = read_tombstones(store)
    found: dict[str, _Found] = {}
    for part in parts_of(store.state, plan_id):
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks", "n_tokens"])
        table = table.filter(pa.array(_are_whole(table, tombstones.rows(part))))
        tokens = blocked.stored_tokens(store, parts.part_entry(store, "chunks", part), table)
        held = _held(every, table, tokens)
        table, tokens = table.filter(pa.array(held)), tokens[held]
        for purge, hashes in lists.items():
            if not table.num_rows:
                break
            mine = _held(Blocked(secret, hashes), table, tokens)
            if mine.any():
                _add(found.setdefault(purge, _Found()), secret, part, table.filter(pa.array(mine)), tokens[mine])
                table, tokens = table.filter(pa.array(~mine)), tokens[~mine]
    return found


def _are_whole(table: pa.Table, rows: Ids) -> npt.NDArray[np.bool_]:
    first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    whole: npt.NDArray[np.bool_] = np.searchsorted(rows, first) == np.searchsorted(rows, first + count)
    return whole


def _held(several: Blocked, table: pa.Table, tokens: Hashes) -> npt.NDArray[np.bool_]:
    texts = parts.from_fixed_binary(table["text_hash"], np.dtype(np.uint8))
    return several.holds(table["id"].to_pylist(), texts) | several.contains(tokens)


def _add(found: _Found, secret: str, part: int, table: pa.Table, tokens: Hashes) -> None:
    rows = parts.rows_of_documents(table["first_row"].to_numpy(), table["n_chunks"].to_numpy())
    found.chunks.append(parts.chunk_ids(part, rows))
    found.hashes.append(blocked.id_hashes(secret, table["id"].to_pylist()))
    found.hashes.append(blocked.keyed_texts(secret, table["text_hash"].to_pylist()))
    found.hashes.append(tokens)
    found.documents += table.num_rows
    found.tokens += int(table["n_tokens"].to_numpy().sum())


def _commit(store: Store, run: Run, plan_id: str, plan: FileEntry, found: Mapping[str, _Found]) -> None:
    """Commit a purge for each of ``found``; ``ConflictError`` if chunks were purged, or the plan changed, meanwhile."""
    seen = list(store.state.group("tombstones"))
    made = {"p" + secrets.token_hex(4): after for after in found}
    add: list[FileEntry] = []
    try:
        for purge, after in made.items():
            files = {kind: FileName.new(run.id, kind, purge, "parquet") for kind in ("tombstones", "blocked")}
            chunks, hashes = np.concatenate(found[after].chunks), np.concatenate(found[after].hashes)
            add.append(write_tombstones(store.root, files["tombstones"], chunks))
            add.append(blocked.write_blocked(store.root, files["blocked"], hashes))

        def build(state: State) -> Draft:
            if list(state.group("tombstones")) != seen or not state.has(plan.path):
                raise ConflictError("chunks were purged while a plan was looked at", "Run the same command again.")
            records: dict[str, Any] = {}
            totals, progress = state.records["totals"], state.records[f"plan:{plan_id}"]
            for purge, after in made.items():
                counts, of = found[after].counts(), state.records[f"purge:{after}"]
                same = {name: of.get(name, "") for name in ("selector", "hash", "reason", "who")}
                record = {**counts, **same, "commit": state.number + 1, "erased": False, AFTER: after, PLAN: plan_id}
                records[f"purge:{purge}"] = record
                totals = {name: n - counts.get(name, 0) for name, n in totals.items()}
                left = {name: progress[name] - n for name, n in counts.items()}
                progress = {**progress, **left, "blocked": progress["blocked"] + counts["documents"]}
            records |= {"totals": totals, f"plan:{plan_id}": progress}
            return Draft("purge", {"plan": plan_id}, add=tuple(add), records=records)

        store.commit(run, build)
    except (ConflictError, LostRunError):
        for entry in add:
            disk.unlink(paths.inside(store.root, entry.path))
        raise
