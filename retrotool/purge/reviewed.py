"""Selections that were reviewed: a dry run writes down which chunks it means, and a purge takes just these.

``selections/<selection>`` is a sorted file of chunk ids with what was asked for, which can be personal data: the purge
takes it away, and so does an erase of any of its chunks. Ids and rows stay what they are, so parts that came since, and
purges, change nothing of what was reviewed; what is erased, or left the store with its part, can't be what was seen.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa

from retrotool.errors import UsageError
from retrotool.purge.selection import Asked, Ids, Reviewed
from retrotool.purge.selectors.scan import scan_files
from retrotool.store import parts, schemas
from retrotool.store.log import Draft
from retrotool.store.parts import PART_SHIFT
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import Store

KIND = "selections"
_ASKED = b"retrotool.asked"


@dataclass(frozen=True, slots=True)
class _Written:
    kind: str
    literal: str
    store: str


def write_selection(store: Store, run: Run, asked: Asked, chunks: Ids) -> str:
    """Write down a selection, and commit it; return its id, "" if there is nothing in it.

    What was scanned for it is not needed any more, and goes with that commit.
    """
    scan = asked.scan.scan(store) if asked.scan else ""
    if not len(chunks):
        if gone := scan_files(store.state, scan):
            store.commit(run, lambda _: Draft("select", {"selector": asked.kind}, remove=tuple(gone)))
        return ""
    name = "s" + secrets.token_hex(4)
    about = {"kind": asked.kind, "literal": asked.literal, "store": store.identity.uuid}
    table = pa.table([pa.array(np.sort(chunks), pa.int64())], schema=schemas.TOMBSTONES_SCHEMA)
    table = table.replace_schema_metadata({_ASKED: orjson.dumps(about)})
    entry = parts.write_parquet(store.root, FileName.new(run.id, KIND, name, "parquet"), table)
    settings = {"selection": name, "selector": asked.kind, "hash": store.identity.keyed_hash(asked.literal)}
    store.commit(run, lambda state: Draft("select", settings, add=(entry,), remove=tuple(scan_files(state, scan))))
    return name


def read_selection(store: Store, name: str) -> Asked:
    """What was reviewed, to be purged; ``UsageError`` if the store has no such selection, or not any more as it was."""
    entry = store.state.file(KIND, name)
    if entry is None:
        have = ", ".join(store.state.group(KIND)) or "none"
        raise UsageError(
            f"{store.root} has no selection {name!r}; it has: {have}",
            "A selection is of one store, and goes with its purge. Make one with --dry-run.",
        )
    table = parts.read_parquet(store, entry)
    written = _Written(**orjson.loads((table.schema.metadata or {})[_ASKED]))
    chunks = table["chunk"].to_numpy()
    if written.store != store.identity.uuid:
        raise UsageError(f"the selection {name!r} is of another store", "Select anew with --dry-run.")
    _check_there(store, name, chunks)
    return Asked(reviewed=Reviewed(name, written.kind, written.literal, chunks))


def _check_there(store: Store, name: str, chunks: Ids) -> None:
    """``UsageError`` if any of the chunks left the store with its part, or was erased."""
    gone = 0
    for part in np.unique(chunks >> PART_SHIFT).tolist():
        rows = chunks[chunks >> PART_SHIFT == part] - (part << PART_SHIFT)
        entry = store.state.part_file("chunks", part)
        if entry is None:
            gone += len(rows)
        else:
            gone += int((parts.read_parquet(store, entry, ["n_tokens"])["n_tokens"].to_numpy()[rows] == 0).sum())
    if gone:
        raise UsageError(
            f"{gone:,} of the {len(chunks):,} chunks of the selection {name!r} were erased since it was reviewed",
            "Select anew with --dry-run.",
        )


def selections_of(store: Store, chunks: Ids) -> list[str]:
    """Paths of the selections that name any of some chunks, which ascend."""
    found = []
    group = store.state.group(KIND)
    for slot in group:
        entry = group.get(slot)
        if entry is not None and np.isin(parts.read_parquet(store, entry)["chunk"].to_numpy(), chunks).any():
            found.append(entry.path)
    return found
