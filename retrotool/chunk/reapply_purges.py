"""Purging what an open plan has of purged documents, before the plan is finished.

A unit of ``chunk`` leaves out what is on the block list, and its commit looks again. What is purged after that may have
live copies in the plan: they would have been set aside as repeats of it, but what is purged, or erased, holds no text
back. So before a plan is finished, whatever is done with its repeats, each purge that was made since the plan was
begun gets the live documents of the plan that its part of the block list names: the purge names them from then on, so
that an erase, an undo and a receipt of it are of them, too. A purge that was erased is not erased any more then.

Documents of which a chunk is a tombstone stay as they are: they were selected chunk by chunk. The block list stays as
it is, too: what is left out of a plan that begins later does not get onto it either.

Cost: nothing, as long as nothing was purged since the plan was committed. Else ids, hashes, places and tokens of the
plan's documents are read, part by part, and looked up, 3 µs each and 1 ns a byte of tokens. Memory: one part's, 16
bytes a hash of these purges, and 8 bytes a chunk that is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.chunk.chunk_plan import parts_of_plan, read_plan
from retrotool.errors import ConflictError, ErasedError, LostRunError
from retrotool.store import blocked, disk, parts, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import Blocked, Hashes
from retrotool.store.log import Draft
from retrotool.store.restored import standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import add_tombstones, read_tombstones, tombstone_paths

Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Found:
    """Chunks of ``named`` documents that one purge keeps from coming back, and what it takes with them.

    What several purges keep from coming back is counted as taken by the first.
    """

    ids: list[Ids] = field(default_factory=list)
    named: int = 0
    chunks: int = 0
    documents: int = 0
    tokens: int = 0

    def counts(self) -> dict[str, int]:
        return {"chunks": self.chunks, "documents": self.documents, "tokens": self.tokens}


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


def _lists(store: Store, plan_id: str) -> dict[str, Hashes]:
    """By their purges, the hashes that came onto the block list since a plan was committed, oldest first."""
    state = store.state
    group, records = state.group("blocked"), standing_purges(state)
    begun = int(state.records[f"plan:{plan_id}"]["order"])
    newer = {
        purge: entry
        for purge in sorted(group, key=lambda purge: int(records[purge]["commit"]))
        if records[purge]["commit"] > begun and (entry := group.get(purge)) is not None
    }
    return {purge: blocked.read_hashes(store, entry) for purge, entry in newer.items()}


def _find(store: Store, plan_id: str, lists: Mapping[str, Hashes]) -> dict[str, _Found]:
    """What each purge keeps from coming back, of the documents of a plan that are whole."""
    secret = store.identity.secret
    every = Blocked(secret, np.unique(np.concatenate(list(lists.values()))))
    tombstones = read_tombstones(store)
    found: dict[str, _Found] = {}
    for part in parts_of_plan(store.state, plan_id):
        table = parts.read_documents(store, part, ["id", "text_hash", "first_row", "n_chunks", "n_tokens"])
        table = table.filter(pa.array(_are_whole(table, tombstones.rows(part))))
        tokens = blocked.stored_tokens(store, parts.part_entry(store, "chunks", part), table)
        held = _held(every, table, tokens)
        table, tokens = table.filter(pa.array(held)), tokens[held]
        counted = np.zeros(table.num_rows, np.bool_)
        for purge, hashes in lists.items():
            mine = _held(Blocked(secret, hashes), table, tokens)
            if mine.any():
                _add(found.setdefault(purge, _Found()), part, table, mine, mine & ~counted)
                counted |= mine
    return found


def _are_whole(table: pa.Table, rows: Ids) -> npt.NDArray[np.bool_]:
    first, count = table["first_row"].to_numpy(), table["n_chunks"].to_numpy()
    whole: npt.NDArray[np.bool_] = np.searchsorted(rows, first) == np.searchsorted(rows, first + count)
    return whole


def _held(several: Blocked, table: pa.Table, tokens: Hashes) -> npt.NDArray[np.bool_]:
    texts = parts.from_fixed_binary(table["text_hash"], np.dtype(np.uint8))
    return several.holds(table["id"].to_pylist(), texts) | several.contains(tokens)


def _add(found: _Found, part: int, table: pa.Table, mine: npt.NDArray[np.bool_], new: npt.NDArray[np.bool_]) -> None:
    first, count, n_tokens = (table[name].to_numpy() for name in ("first_row", "n_chunks", "n_tokens"))
    found.ids.append(parts.chunk_ids(part, parts.rows_of_documents(first[mine], count[mine])))
    found.named += int(mine.sum())
    found.chunks += int(count[new].sum())
    found.documents += int(new.sum())
    found.tokens += int(n_tokens[new].sum())


def _commit(store: Store, run: Run, plan_id: str, plan: FileEntry, found: Mapping[str, _Found]) -> None:
    """Add ``found`` to the purges; ``ConflictError`` if chunks were purged, or the plan changed, concurrently."""
    seen = tombstone_paths(store.state)
    written = []
    try:
        for purge, one in found.items():
            written.append(add_tombstones(store, run.id, purge, np.concatenate(one.ids)))

        def build(state: State) -> Draft:
            if tombstone_paths(state) != seen or not state.has(plan.path):
                raise ConflictError("chunks were purged while a plan was looked at", "Run the same command again.")
            totals, progress = state.records["totals"], state.records[f"plan:{plan_id}"]
            records, taken = {}, dict(progress.get("purged", {}))
            for purge, one in found.items():
                counts, record = one.counts(), state.records[f"purge:{purge}"]
                more = {name: record[name] + n for name, n in counts.items()}
                records[f"purge:{purge}"] = {**record, **more, "erased": False}
                totals = {name: n - counts.get(name, 0) for name, n in totals.items()}
                left = {name: progress[name] - n for name, n in counts.items()}
                progress = {**progress, **left, "blocked": progress["blocked"] + one.documents}
                before, was_erased = taken.get(purge, (0, False))
                taken[purge] = [before + one.named, was_erased or record["erased"]]
            records |= {"totals": totals, f"plan:{plan_id}": {**progress, "purged": taken}}
            add, remove = (entry for entry, _ in written), (path for _, path in written)
            return Draft("purge", {"plan": plan_id}, add=tuple(add), remove=tuple(remove), records=records)

        store.commit(run, build)
    except (ConflictError, LostRunError):
        for entry, _ in written:
            disk.unlink(paths.inside(store.root, entry.path))
        raise
