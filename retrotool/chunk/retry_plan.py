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

from retrotool.chunk.chunk_plan import (
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
from retrotool.chunk.retry import Retry
from retrotool.errors import ErasedError
from retrotool.sources import Fields, InputFile
from retrotool.store import parts, schemas
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store

_TOO_LONG = "more than --max-document|longer than"
"""What the reasons say of rows that a larger limit lets in."""


@dataclass(frozen=True, slots=True)
class _Aside:
    """An input that rows were set aside of: how it was read, and how often each plan set something aside.

    ``too_long``: some of them may be taken up as they are, as longer documents are let in now.
    """

    file: InputFile
    fields: Fields
    part_size: int
    retry: Retry
    rows: Mapping[str, int]
    damaged: Mapping[str, int]
    too_long: bool = False


def commit_retry(store: Store, run: Run, *, max_document: int = 0, allow_purged: bool = False) -> list[str]:
    """Plan the inputs that have changed since rows of them were set aside; return the plans' ids.

    Also those that have not, if rows were too long and ``max_document`` is larger now. To be called when no plan is
    open: what an open plan has yet to read of an input is not known.
    """
    planned: list[str] = []
    found = _inputs_aside(store, store.refresh(), max_document)
    for fields, part_size in sorted({(a.fields, a.part_size) for a in found}, key=repr):
        plan_id = secrets.token_hex(4)

        def build(
            state: State, fields: Fields = fields, part_size: int = part_size, plan_id: str = plan_id
        ) -> Draft | None:
            found = _inputs_aside(store, state, max_document)
            alike = [a for a in found if (a.fields, a.part_size) == (fields, part_size)]
            return _draft(store, run, state, plan_id, alike, allow_purged)

        while True:
            try:
                state = store.commit(run, build)
                break
            except ErasedError:
                continue  # a plan was finished while its inputs were read
        if f"plan:{plan_id}" in state.records:
            planned.append(plan_id)
    return planned


def _draft(store: Store, run: Run, state: State, plan_id: str, found: list[_Aside], allow_purged: bool) -> Draft | None:
    there = [_as_it_is(aside) for aside in found if Path(aside.file.path).is_file()]
    if not there:
        return None
    fields = there[0].fields
    fingerprints, _ = known_inputs(store, state)
    hashes = hashes_of(store, [aside.file for aside in there], fields)
    mended = [(a, h) for a, h in zip(there, hashes, strict=True) if a.too_long or h[0] not in fingerprints]
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
        allow_purged=allow_purged,
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


def _inputs_aside(store: Store, state: State, max_document: int = 0) -> list[_Aside]:
    """The inputs that rows were set aside of, duplicates not counted, in the order of their paths."""
    plans = _plans(store, state)
    rows: dict[str, dict[str, int]] = {}
    damaged: dict[str, dict[str, int]] = {}
    breaks: dict[str, tuple[int, str]] = {}
    too_long: set[str] = set()
    for plan_id, entry in quarantine_files(state):
        if plan_id not in plans:
            continue
        for table in parts.read_tables(store, entry, ["input", "reason", "rows_before", "prefix"]):
            for path, n in _counts(table):
                of_input = rows.setdefault(path, {})
                of_input[plan_id] = of_input.get(plan_id, 0) + n
            long = table.filter(pc.match_substring_regex(table["reason"], _TOO_LONG))
            too_long |= set(long["input"].unique().to_pylist())
            broken = table.filter(table["rows_before"].is_valid())
            for row in broken.to_pylist():
                path = row["input"]
                damaged.setdefault(path, {})[plan_id] = damaged.get(path, {}).get(plan_id, 0) + 1
                breaks[path] = (row["rows_before"], (row["prefix"] or b"").hex())
    found = []
    for path, of_input in sorted(rows.items()):
        readers = sorted((p for p in plans if path in plans[p].files), key=lambda p: _order(state, p))
        if not readers:
            continue
        plan = plans[readers[-1]]
        # With rows missing in the middle, or read before, there is no beginning to go on behind.
        alone = sum(of_input.values()) == 1 and len(readers) == 1
        before, prefix = breaks.get(path, (0, "")) if alone else (0, "")
        wider = path in too_long and max_document > plan.fields.max_document
        fields = (
            replace(plan.fields, max_document=max(max_document, plan.fields.max_document)) if wider else plan.fields
        )
        retry = Retry(before, prefix, tuple(readers))
        found.append(_Aside(plan.files[path], fields, plan.part_size, retry, of_input, damaged.get(path, {}), wider))
    return found


def _order(state: State, plan_id: str) -> int:
    return int(state.records[f"plan:{plan_id}"]["order"])


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
        solved, broken = _count_of(store, entry, retried)
        if not solved:
            continue
        remove.append(entry.path)
        rows, damaged = less.get(older, (0, 0))
        less[older] = (rows + solved, damaged + broken)
        if solved < entry.rows:
            name = FileName.new(run.id, "quarantine", FileName.parse(entry.path).slot, "parquet")
            tables = parts.read_tables(store, entry)
            left = (table.filter(pc.invert(pc.is_in(table["input"], retried))) for table in tables)
            add.append(parts.write_batches(store.root, name, schemas.QUARANTINE_SCHEMA, left))
    return Settled(tuple(add), tuple(remove), less)


def _count_of(store: Store, entry: FileEntry, inputs: pa.Array) -> tuple[int, int]:
    """How many rows of a quarantine file are of some inputs, and how many of these stand for the rest of a file."""
    rows = broken = 0
    for table in parts.read_tables(store, entry, ["input", "rows_before"]):
        own = table.filter(pc.is_in(table["input"], inputs))
        rows += own.num_rows
        broken += own.num_rows - own["rows_before"].null_count
    return rows, broken


def gather_quarantine(store: Store, run: Run, plan_id: str) -> Settled:
    """One quarantine file of a plan, of those of its units."""
    entries = [entry for of_plan, entry in quarantine_files(store.state) if of_plan == plan_id]
    if len(entries) < 2:
        return Settled()
    name = FileName.new(run.id, "quarantine", plan_id, "parquet")
    tables = (table for entry in entries for table in parts.read_tables(store, entry))
    whole = parts.write_batches(store.root, name, schemas.QUARANTINE_SCHEMA, tables)
    return Settled((whole,), tuple(entry.path for entry in entries))


def remembered(store: Store, plan_id: str, plan: Plan) -> dict[str, Any]:
    """What an inputs file has for a retry: how those inputs were read that rows were set aside of."""
    aside: set[str] = set()
    for of_plan, entry in quarantine_files(store.state):
        if of_plan == plan_id:
            for table in parts.read_tables(store, entry, ["input"]):
                aside |= set(table["input"].unique().to_pylist())
    files = [asdict(file) for file in plan.files if file.path in aside]
    return {"files": files, "fields": asdict(plan.fields), "part_size": plan.part_size}
