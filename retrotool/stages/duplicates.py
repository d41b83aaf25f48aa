"""Finishing a ``chunk`` plan: document ids that occur more than once, and what the store remembers of the inputs.

Of documents with the same id the one with the lowest chunk id stays; the others are tombstoned and set aside. They
are found by sorting the ``keys/`` files range by range, so the result does not depend on the order in which units
were finished. Memory: 40 bytes a document of one range, of which there are as many as keep it under ``RANGE_ROWS``
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrotool.errors import ConflictError, ErasedError
from retrotool.sources.lines import count_lines
from retrotool.stages.chunk import GIVEN_UP
from retrotool.stages.chunk_plan import Plan, read_plan, unfinished_plans, write_json
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, write_tombstones

RANGE_ROWS = 8 << 20
REASON = "duplicate document id"


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Documents to leave out: their chunk ids, the rows for quarantine, and how many tokens they have."""

    chunks: npt.NDArray[np.int64]
    quarantine: tuple[tuple[str, int, str], ...]
    tokens: int


def finish_plans(store: Store, run: Run, range_rows: int = RANGE_ROWS) -> None:
    """Finish the plans of which every unit is committed: set duplicates aside, keep only fingerprints of the inputs."""
    for plan_id in unfinished_plans(store.refresh()):
        record = store.state.records[f"plan:{plan_id}"]
        entry = store.state.file("plans", plan_id)
        if record["done"] < record["units"] or entry is None:
            return
        _finish(store, run, plan_id, entry, range_rows)


def _finish(store: Store, run: Run, plan_id: str, entry: FileEntry, range_rows: int) -> None:
    while True:
        seen = store.refresh()
        if not seen.has(entry.path):
            return  # another process finished it
        try:
            draft = _finishing(store, run, plan_id, entry, range_rows)
        except ErasedError:
            continue  # the plan was finished, or something erased, meanwhile: look again
        try:
            store.commit(run, functools.partial(_unless_changed, seen, draft))
        except ConflictError:
            continue  # documents or tombstones were committed meanwhile: search again; clean-up takes the files away
        return


def _finishing(store: Store, run: Run, plan_id: str, entry: FileEntry, range_rows: int) -> Draft:
    """The commit that finishes a plan on the store's state, its files written."""
    plan = read_plan(store, entry)
    plans = store.state.with_prefix("plan:").values()
    order = store.state.records[f"plan:{plan_id}"]["order"]
    # Parts are numbered in the order of the plans.
    parts_below = sum(record["parts"] for record in plans if record["order"] <= order)
    found = find_duplicates(store, plan, range_rows, parts_below)
    known = {"fingerprints": _fingerprints(store, plan_id, plan)}
    add = [write_json(store.root, FileName.new(run.id, "inputs", plan_id, "json"), known, len(known["fingerprints"]))]
    if len(found.chunks):
        name = FileName.new(run.id, "tombstones", plan_id, "parquet")
        add.append(write_tombstones(store.root, name, found.chunks))
        columns = dict(zip(("input", "line", "reason"), zip(*found.quarantine, strict=True), strict=True))
        name = FileName.new(run.id, "quarantine", f"{plan_id}.duplicates", "parquet")
        add.append(parts.write_parquet(store.root, name, parts.columns_of(columns, parts.QUARANTINE_SCHEMA)))
    return Draft("finish", add=tuple(add), remove=(entry.path,), records=_counted(store.state, plan_id, found))


def _fingerprints(store: Store, plan_id: str, plan: Plan) -> list[str]:
    """Fingerprints of a plan's inputs, but for those that were given up: these may be added later."""
    given_up: set[str] = set()
    group = store.state.group("quarantine")
    for slot in group:
        quarantine = group.get(slot)
        if quarantine is not None and slot.partition(".")[0] == plan_id:
            rows = parts.read_parquet(store, quarantine, ["input", "reason"])
            given_up |= set(rows.filter(pc.starts_with(rows["reason"], GIVEN_UP))["input"].unique().to_pylist())
    return [f for file, f in zip(plan.files, plan.fingerprints, strict=True) if file.path not in given_up]


def _unless_changed(seen: State, draft: Draft, newest: State) -> Draft:
    """``draft``, if the documents and tombstones it was made from are still all there are."""
    same = all(_paths(newest, kind) == _paths(seen, kind) for kind in ("keys", "tombstones"))
    if not same or newest.records["totals"] != seen.records["totals"]:
        raise ConflictError("the store grew while duplicates were searched")
    return draft


def _paths(state: State, kind: str) -> list[str]:
    group = state.group(kind)
    return [entry.path for slot in group if (entry := group.get(slot)) is not None]


def _counted(state: State, plan_id: str, found: Duplicates) -> Mapping[str, Any]:
    """Records of the plan and the totals, less the duplicates."""
    change = {
        "documents": -len(found.quarantine),
        "chunks": -len(found.chunks),
        "tokens": -found.tokens,
        "set_aside": len(found.quarantine),
    }
    plan, totals = state.records[f"plan:{plan_id}"], state.records["totals"]
    return {
        f"plan:{plan_id}": {**plan, **{name: plan[name] + n for name, n in change.items()}, "finished": True},
        "totals": {name: totals[name] + n for name, n in change.items()},
    }


def find_duplicates(
    store: Store, plan: Plan, range_rows: int = RANGE_ROWS, parts_below: int | None = None
) -> Duplicates:
    """All living documents whose id a document of a lower chunk id has, purged ones included.

    ``parts_below``: in the parts with lower numbers only; those above belong to plans that are finished later.
    """
    later: dict[int, list[int]] = {}
    for part, doc in sorted(pair for pairs in _ranges(store, range_rows) for pair in pairs):
        if parts_below is None or part < parts_below:
            later.setdefault(part, []).append(doc)
    tombstones = read_tombstones(store)
    chunks: list[npt.NDArray[np.int64]] = []
    places: list[tuple[str, int]] = []
    tokens = 0
    for part, docs in later.items():
        table = parts.read_documents(store, part, ["first_row", "n_chunks", "input", "position"]).take(docs)
        counts = parts.read_parquet(store, parts.part_entry(store, "chunks", part), ["n_tokens"])["n_tokens"].to_numpy()
        for row in table.to_pylist():
            rows = np.arange(row["first_row"], row["first_row"] + row["n_chunks"])
            rows = rows[~tombstones.contains(parts.chunk_ids(part, rows)) & (counts[rows] > 0)]
            if len(rows):
                chunks.append(parts.chunk_ids(part, rows))
                places.append((row["input"], row["position"]))
                tokens += int(counts[rows].sum())
    ids = np.concatenate(chunks) if chunks else np.zeros(0, np.int64)
    return Duplicates(ids, tuple(_with_lines(plan, places)), tokens)


def _ranges(store: Store, range_rows: int) -> Iterator[list[tuple[int, int]]]:
    """(part, doc) of every occurrence of a key but the first, for one range of keys after another."""
    entries = {
        part: entry for part in store.state.parts() if (entry := store.state.part_file("keys", part)) is not None
    }
    rows = sum(entry.rows for entry in entries.values())
    ranges = 1
    while rows > ranges * range_rows and ranges < 1 << 16:
        ranges *= 2
    step = (1 << 16) // ranges
    for low in range(0, 1 << 16, step):
        columns = [
            _read_range(store, entry, part, low, low + step, whole=ranges == 1) for part, entry in entries.items()
        ]
        if not columns:
            continue
        key, part, doc = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((doc, part, key[:, 1], key[:, 0]))
        key, part, doc = key[order], part[order], doc[order]
        again = np.flatnonzero((key[1:] == key[:-1]).all(axis=1)) + 1
        yield list(zip(part[again].tolist(), doc[again].tolist(), strict=True))


def _read_range(
    store: Store, entry: FileEntry, part: int, low: int, high: int, *, whole: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Keys (two uint64), part and doc of the rows of a keys file whose key begins with 16 bits in [low, high)."""
    groups = None if whole else _row_groups(store.path(entry), low, high)
    table = parts.read_parquet(store, entry, ["key", "doc"], groups)
    key = parts.from_fixed_binary(table["key"], np.dtype(">u8"))
    doc = table["doc"].to_numpy()
    inside = (key[:, 0] >> 48 >= low) & (key[:, 0] >> 48 < high)
    return key[inside].astype(np.uint64), np.full(int(inside.sum()), part), doc[inside]


def _row_groups(path: Path, low: int, high: int) -> list[int]:
    """Row groups that may hold keys beginning with 16 bits in [low, high); keys are sorted."""
    with pq.ParquetFile(path) as file:
        found = []
        for i in range(file.metadata.num_row_groups):
            if not file.metadata.row_group(i).num_rows:
                continue
            statistics = file.metadata.row_group(i).column(0).statistics
            first, last = (int.from_bytes(value[:2], "big") for value in (statistics.min, statistics.max))
            if first < high and last >= low:
                found.append(i)
        return found


def _with_lines(plan: Plan, places: list[tuple[str, int]]) -> Iterator[tuple[str, int, str]]:
    """Quarantine rows for documents at (input name, position); lines are counted where the input can still be read."""
    files = {file.name: file for file in plan.files}
    wanted: dict[str, list[int]] = {}
    for name, position in places:
        wanted.setdefault(name, []).append(position)
    for name, positions in wanted.items():
        file = files.get(name)
        lines = sorted(positions)
        if file is not None and file.format.startswith("jsonl"):
            try:
                lines = count_lines(Path(file.path), file.format, sorted(positions))
            except (OSError, pa.ArrowException):
                lines = []
        # A file that has become shorter since has fewer lines than were asked for.
        for line in lines + [0] * (len(positions) - len(lines)):
            yield (file.path if file else name), line, REASON
