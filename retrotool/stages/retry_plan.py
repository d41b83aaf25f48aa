"""Planning ``chunk --retry-quarantine``: inputs of which something was set aside, and that have changed since.

Each is planned again as a whole file, with what is known of it (see ``retry``). When that plan is finished, the rows
that its inputs had set aside before are taken out of the older quarantine files and counts: what is still wrong is in
the new plan's. Cost: one read of the quarantine files.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrotool.errors import ErasedError
from retrotool.sources import Fields, InputFile
from retrotool.stages.chunk_plan import (
    PLAN_FIELDS,
    Piece,
    Plan,
    draft_of,
    hashes_of,
    known_inputs,
    may_be_fast,
    read_fields,
    read_json,
)  # fmt: skip
from retrotool.stages.retry import Retry
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class _Aside:
    """An input that rows were set aside of: how it was read, and how often each plan set something aside."""

    file: InputFile
    fields: Fields
    part_size: int
    retry: Retry
    rows: Mapping[str, int]
    damaged: Mapping[str, int]


def commit_retry(store: Store, run: Run) -> list[str]:
    """Plan the inputs that have changed since rows of them were set aside; return the plans' ids."""
    planned: list[str] = []
    for fields, part_size in sorted({(a.fields, a.part_size) for a in _inputs_aside(store, store.refresh())}, key=repr):
        plan_id = secrets.token_hex(4)

        def build(
            state: State, fields: Fields = fields, part_size: int = part_size, plan_id: str = plan_id
        ) -> Draft | None:
            found = [a for a in _inputs_aside(store, state) if (a.fields, a.part_size) == (fields, part_size)]
            return _draft(store, run, state, plan_id, found)

        while True:
            try:
                state = store.commit(run, build)
                break
            except ErasedError:
                continue  # a plan was finished while its inputs were read
        if f"plan:{plan_id}" in state.records:
            planned.append(plan_id)
    return planned


def _draft(store: Store, run: Run, state: State, plan_id: str, found: list[_Aside]) -> Draft | None:
    there = [_as_it_is(aside) for aside in found if Path(aside.file.path).is_file()]
    if not there:
        return None
    fields = there[0].fields
    fingerprints, _ = known_inputs(store, state)
    hashes = hashes_of(store, [aside.file for aside in there], fields)
    mended = [(a, h) for a, h in zip(there, hashes, strict=True) if h[0] not in fingerprints]
    if not mended:
        return None
    files = tuple(aside.file for aside, _ in mended)
    plan = Plan(
        files=files,
        fingerprints=tuple(fingerprint for _, (fingerprint, _) in mended),
        places=tuple(place for _, (_, place) in mended),
        fields=fields,
        part_size=there[0].part_size,
        units=tuple((Piece(number, file.size),) for number, file in enumerate(files)),
        fast=may_be_fast(state, files),
        retries={number: aside.retry for number, (aside, _) in enumerate(mended)},
    )
    draft = draft_of(store, run, state, plan_id, plan)
    return replace(draft, records={**draft.records, **_forgiven(state, [aside for aside, _ in mended])})


def _as_it_is(aside: _Aside) -> _Aside:
    return replace(aside, file=replace(aside.file, size=Path(aside.file.path).stat().st_size))


def _forgiven(state: State, mended: list[_Aside]) -> dict[str, Any]:
    """Records of plans whose inputs are retried: what these had set aside does not count against --max-bad."""
    records = {}
    for plan_id in {plan_id for aside in mended for plan_id in aside.rows}:
        record = state.records[f"plan:{plan_id}"]
        counts = {
            "set_aside": sum(aside.rows.get(plan_id, 0) for aside in mended),
            "damaged": sum(aside.damaged.get(plan_id, 0) for aside in mended),
        }
        before = record.get("forgiven", {})
        records[f"plan:{plan_id}"] = {**record, "forgiven": {k: before.get(k, 0) + n for k, n in counts.items()}}
    return records


def _inputs_aside(store: Store, state: State) -> list[_Aside]:
    """The inputs that rows were set aside of, duplicates not counted, in the order of their paths."""
    plans = _plans(store, state)
    rows: dict[str, dict[str, int]] = {}
    damaged: dict[str, dict[str, int]] = {}
    retries: dict[str, Retry] = {}
    for plan_id, entry in quarantine_files(state):
        if plan_id not in plans:
            continue
        table = parts.read_parquet(store, entry, ["input", "rows_before", "prefix"])
        for path, n in _counts(table):
            of_input = rows.setdefault(path, {})
            of_input[plan_id] = of_input.get(plan_id, 0) + n
        broken = table.filter(table["rows_before"].is_valid())
        for row in broken.to_pylist():
            path = row["input"]
            damaged.setdefault(path, {})[plan_id] = damaged.get(path, {}).get(plan_id, 0) + 1
            retries[path] = Retry(row["rows_before"], (row["prefix"] or b"").hex())
    found = []
    for path, of_input in sorted(rows.items()):
        plan_id = max(of_input, key=lambda plan_id: int(state.records[f"plan:{plan_id}"]["order"]))
        file = plans[plan_id].files.get(path)
        if file is not None:
            # With rows missing in the middle there is no beginning to go on behind.
            alone = sum(of_input.values()) == 1
            retry = retries.get(path, Retry()) if alone else Retry()
            plan = plans[plan_id]
            found.append(_Aside(file, plan.fields, plan.part_size, retry, of_input, damaged.get(path, {})))
    return found


def _counts(table: pa.Table) -> Iterator[tuple[str, int]]:
    for row in table.group_by("input").aggregate([("input", "count")]).to_pylist():
        yield row["input"], row["input_count"]


@dataclass(frozen=True, slots=True)
class _Planned:
    """How the inputs of a plan were read: by path, those of which something was set aside."""

    files: Mapping[str, InputFile]
    fields: Fields
    part_size: int


def _plans(store: Store, state: State) -> dict[str, _Planned]:
    """All plans of which the inputs are remembered."""
    found = {}
    for kind in ("inputs", "plans"):
        group = state.group(kind)
        for slot in group:
            entry = group.get(slot)
            assert entry is not None
            content = read_json(store, entry)
            if content.keys() >= PLAN_FIELDS:
                files = {file["path"]: InputFile(**file) for file in content["files"]}
                found[slot] = _Planned(files, read_fields(content["fields"]), int(content["part_size"]))
    return found


def quarantine_files(state: State) -> Iterator[tuple[str, FileEntry]]:
    """(plan id, file) of the quarantine files, those of duplicates left out."""
    group = state.group("quarantine")
    for slot in group:
        entry = group.get(slot)
        plan_id, _, rest = slot.partition(".")
        if entry is not None and rest != "duplicates":
            yield plan_id, entry


@dataclass(frozen=True, slots=True)
class Settled:
    """What finishing a plan changes of quarantine files, and of the counts of older plans: (rows, damages) less."""

    add: tuple[FileEntry, ...] = ()
    remove: tuple[str, ...] = ()
    less: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def applied(self, records: Mapping[str, Any], state: State) -> dict[str, Any]:
        """``records`` of a commit, with the counts of the older plans and the totals less."""
        changed = dict(records)
        for plan_id, (rows, damaged) in self.less.items():
            key = f"plan:{plan_id}"
            older = {name: n for name, n in state.records[key].items() if name != "forgiven"}
            changed[key] = {**older, "set_aside": older["set_aside"] - rows, "damaged": older["damaged"] - damaged}
        gone = sum(rows for rows, _ in self.less.values())
        totals = changed["totals"]
        changed["totals"] = {**totals, "set_aside": totals["set_aside"] - gone}
        return changed


def settle(store: Store, run: Run, plan_id: str, plan: Plan) -> Settled:
    """Take what retried inputs had set aside before out of the older quarantine files."""
    retried = pa.array([plan.files[number].path for number in plan.retries], pa.string())
    add: list[FileEntry] = []
    remove: list[str] = []
    less: dict[str, tuple[int, int]] = {}
    for older, entry in quarantine_files(store.state):
        if older == plan_id or not len(retried):
            continue
        table = parts.read_parquet(store, entry)
        gone = pc.is_in(table["input"], retried)
        solved = table.filter(gone)
        if not solved.num_rows:
            continue
        remove.append(entry.path)
        rows, damaged = less.get(older, (0, 0))
        broken = solved.num_rows - solved["rows_before"].null_count
        less[older] = (rows + solved.num_rows, damaged + broken)
        left = table.filter(pc.invert(gone))
        if left.num_rows:
            name = FileName.new(run.id, "quarantine", FileName.parse(entry.path).slot, "parquet")
            add.append(parts.write_parquet(store.root, name, left))
    return Settled(tuple(add), tuple(remove), less)


def gather_quarantine(store: Store, run: Run, plan_id: str) -> Settled:
    """One quarantine file of a plan, of those of its units."""
    entries = [entry for of_plan, entry in quarantine_files(store.state) if of_plan == plan_id]
    if len(entries) < 2:
        return Settled()
    name = FileName.new(run.id, "quarantine", plan_id, "parquet")
    tables = (parts.read_parquet(store, entry) for entry in entries)
    whole = parts.write_batches(store.root, name, parts.QUARANTINE_SCHEMA, tables)
    return Settled((whole,), tuple(entry.path for entry in entries))


def remembered(store: Store, plan_id: str, plan: Plan) -> dict[str, Any]:
    """What an inputs file has for a retry: how those inputs were read that rows were set aside of."""
    aside: set[str] = set()
    for of_plan, entry in quarantine_files(store.state):
        if of_plan == plan_id:
            aside |= set(parts.read_parquet(store, entry, ["input"])["input"].unique().to_pylist())
    files = [asdict(file) for file in plan.files if file.path in aside]
    return {"files": files, "fields": asdict(plan.fields), "part_size": plan.part_size}
