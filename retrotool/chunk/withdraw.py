"""Going on without the fast tokenizer, once it was found to differ from ``tokenizers``.

Of the plans that are not finished, everything it may have tokenised is taken back: their parts leave the store in one
commit (their chunk ids are tombstoned, and never given again), and a new plan file makes every staged unit of the old
one void. Plans finished before are left: they were compared in their time, and ``verify`` can't tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from retrotool.chunk.chunk_plan import parts_of, read_plan, unfinished_plans, write_plan
from retrotool.errors import ErasedError
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, part_slot
from retrotool.store.runs import Run
from retrotool.store.staging import COUNTS, PLAN_COUNTS
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones, write_tombstones

RECORD = "tokenizers"
"""Record that says why this store is tokenised by ``tokenizers`` alone."""


def go_on_exactly(store: Store, run: Run, why: str) -> None:
    """Take back what the fast tokenizer did in unfinished plans, and never use it again in this store."""
    while True:
        try:
            store.commit(run, lambda state: _draft(store, run, state, why))
            return
        except ErasedError:
            continue  # another process finished or took back a plan meanwhile


def _draft(store: Store, run: Run, state: State, why: str) -> Draft | None:
    if RECORD in state.records:
        return None
    add: list[FileEntry] = []
    remove: list[str] = []
    records: dict[str, Any] = {RECORD: {"why": why}}
    totals = dict(state.records.get("totals", {}))
    tombstones = read_tombstones(store)
    for plan_id in unfinished_plans(state):
        entry = state.file("plans", plan_id)
        if entry is None:
            continue
        plan = read_plan(store, entry)
        if not plan.fast:
            continue
        record = state.records[f"plan:{plan_id}"]
        add.append(write_plan(store, run, plan_id, replace(plan, fast=False)))
        withdrawn = list(parts_of(state, plan_id))
        remove += [entry.path, *_files_of(state, withdrawn), *_quarantine_of(state, plan_id)]
        if withdrawn:
            ids = np.concatenate([_all_ids(state, part) for part in withdrawn])
            name = FileName.new(run.id, "tombstones", f"{plan_id}.withdrawn", "parquet")
            add.append(write_tombstones(store.root, name, ids))
        # What was purged meanwhile is no part of the totals any more.
        gone = {**_living(store, withdrawn, tombstones), "set_aside": record["set_aside"]}
        totals = {name: totals[name] - gone[name] for name in COUNTS} if totals else {}
        records[f"plan:{plan_id}"] = {
            **record,
            **dict.fromkeys(PLAN_COUNTS, 0),
            "parts": 0,
            "done": 0,
            "withdrawn": record.get("withdrawn", 0) + len(withdrawn),
        }
    if totals:
        records["totals"] = totals
    # A shard may hold parts of several plans.
    return Draft("withdraw", {}, add=tuple(add), remove=tuple(dict.fromkeys(remove)), records=records)


def _living(store: Store, withdrawn: list[int], tombstones: Tombstones) -> dict[str, int]:
    """Documents, chunks and tokens of some parts that are not purged."""
    counts = dict.fromkeys(("documents", "chunks", "tokens"), 0)
    for part in withdrawn:
        table = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["doc", "n_tokens"])
        n_tokens = table["n_tokens"].to_numpy()
        alive = n_tokens > 0
        alive[tombstones.rows(part)] = False
        counts["documents"] += len(np.unique(table["doc"].to_numpy()[alive]))
        counts["chunks"] += int(alive.sum())
        counts["tokens"] += int(n_tokens[alive].sum())
    return counts


def _all_ids(state: State, part: int) -> Any:
    entry = state.part_file("chunks", part)
    assert entry is not None
    return parts.chunk_ids(part, np.arange(entry.rows))


def _files_of(state: State, withdrawn: list[int]) -> list[str]:
    """Every file of some parts, and the index shards that hold vectors of them."""
    slots = {part_slot(part) for part in withdrawn}
    found = []
    for kind in ("documents", "chunks", "embeddings", "neighbours"):
        for name in state.names(kind):
            group = state.group(kind, name)
            found += [entry.path for slot in slots if (entry := group.get(slot)) is not None]
    for name in state.names("index"):
        group = state.group("index", name)
        for slot in group:
            entry = group.get(slot)
            if entry is not None and not set(withdrawn).isdisjoint((entry.about or {}).get("parts", ())):
                found.append(entry.path)
    return found


def _quarantine_of(state: State, plan_id: str) -> list[str]:
    group = state.group("quarantine")
    entries = [group.get(slot) for slot in group if slot.partition(".")[0] == plan_id]
    return [entry.path for entry in entries if entry is not None]
