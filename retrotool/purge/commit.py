"""Commit what was selected: tombstones, and the block list that keeps it from coming back with its input.

The commit costs what is purged, not what is stored.
"""

from __future__ import annotations

import secrets

import numpy as np

from retrotool.chunk.chunk_plan import write_json_file
from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError
from retrotool.purge.same_text import find_in_open_plans, parts_of_open_plans
from retrotool.purge.select import Selection
from retrotool.purge.selectors.scan import scan_files
from retrotool.store import blocked, disk, paths
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import tombstone_paths, write_tombstones


def commit_purge(store: Store, run: Run, selection: Selection, reason: str, who: str) -> str:
    """Make the chunks of a selection tombstones, also those that other purges had, and block what they were of.

    Returns the purge's id. ``ConflictError`` if another purge was committed since the selection was made, or copies of
    what it has, in a plan that is not finished. Copies are
    written down too, though they are tombstones already: once their originals are erased nothing else tells them.
    What was scanned for it goes.
    """
    request = selection.request
    scan = request.scan.scan(store) if request.scan else None
    purge = "p" + secrets.token_hex(4)
    seen = tombstone_paths(selection.state)
    add: list[FileEntry] = []

    def build(state: State) -> Draft:
        if tombstone_paths(state) != seen:
            raise ConflictError("another purge was committed while this one selected", "Run the same command again.")
        new = [part for part in parts_of_open_plans(store) if part not in selection.open_parts]
        if len(find_in_open_plans(store, new, selection.chunks, selection.blocked)):
            raise ConflictError("copies were chunked while this purge selected", "Run the same command again.")
        counts = {"chunks": len(selection.live), "documents": selection.documents, "tokens": selection.tokens}
        totals = {name: n - counts.get(name, 0) for name, n in state.records["totals"].items()}
        hashed = store.identity.keyed_hash(request.literal)
        selector = {"selector": request.kind, "hash": hashed, "reason": reason, "who": who}
        record = {**counts, **selector, "commit": state.number + 1, "erased": False}
        records = {f"purge:{purge}": record, "totals": totals}
        gone = scan_files(state, scan) if scan else []
        return Draft("purge", selector, add=tuple(add), remove=tuple(gone), records=records)

    try:
        _write_purge(store, run, purge, selection, add)
        store.commit(run, build)
    except (ConflictError, CorruptError, ErasedError, LostRunError):
        for entry in add:  # one of them has the selector's text: it must not wait for the next clean-up
            disk.unlink(paths.inside(store.root, entry.path))
        raise
    return purge


def _write_purge(store: Store, run: Run, purge: str, selection: Selection, add: list[FileEntry]) -> None:
    """Write the files of a purge, and note them in ``add``."""
    root = store.root
    named = np.union1d(selection.chunks, selection.copies)
    add.append(write_tombstones(root, FileName.new(run.id, "tombstones", purge, "parquet"), named))
    if len(selection.blocked):
        add.append(blocked.write_blocked(root, FileName.new(run.id, "blocked", purge, "parquet"), selection.blocked))
    # Last: it must not stay if another can't be written.
    literal = {"kind": selection.request.kind, "literal": selection.request.literal}
    add.append(write_json_file(root, FileName.new(run.id, "selectors", purge, "json"), literal, 1))
