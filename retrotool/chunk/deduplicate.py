"""Finish a ``chunk`` plan: find duplicate documents, and record the plan's inputs.

Duplicates are found after chunking, over all parts at once, by the rule in the store format: first by id,
then by text. Only documents of the plan are rejected, so plans of any size give the same documents. Small
inputs of lines are read again to report line numbers instead of byte offsets.

Memory besides ``hash_partitions``: one part with a duplicate, 17 bytes per duplicate and 8 per chunk of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import chunk_plan, hash_partitions
from retrotool.chunk.chunk_plan import ChunkPlan, Duplicates
from retrotool.chunk.hash_partitions import Places
from retrotool.chunk.quarantine import join_quarantines, quarantine_files
from retrotool.chunk.stage import GIVEN_UP
from retrotool.cli.output import count
from retrotool.errors import ConflictError, DuplicatesError, InputError
from retrotool.ranges import expand_ranges
from retrotool.sources import InputFile
from retrotool.sources.inputs import IN_BYTES
from retrotool.sources.lines import count_lines
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.parts import distinct_parts, row_of, slice_of_part
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import Tombstones, read_tombstones, write_tombstones

_COUNTED_SOURCES = 100_000
_EXAMPLES = 3
BY_ID = "duplicate document id"
BY_TEXT = "duplicate text"
_LOCATED_ROWS = 1 << 20
_COUNTED_BYTES, _TEXTS_COUNTED_BYTES = 256 << 20, 4 << 20  # most of an input that is read to number ids and texts
_TABLE_ROWS = 1 << 16
_IN_LINES = ("jsonl", "csv", "tsv")  # formats whose rows are reported by line number

Flags = npt.NDArray[np.bool_]


@dataclass(slots=True)
class DuplicateCounts:
    """Live documents of a plan that repeat an earlier one, by id or by text only, and what they hold."""

    by_id: int = 0
    by_text: int = 0
    chunks: int = 0
    tokens: int = 0
    sources: Counter[str] = field(default_factory=Counter)  # by text; above 100,000 sources the smallest are dropped

    def add(self, repeats: PartRepeats) -> None:
        """Count the duplicates of one part."""
        texts = int(repeats.by_text.sum())
        self.by_id += len(repeats.by_text) - texts
        self.by_text += texts
        self.chunks += repeats.live
        self.tokens += repeats.tokens
        self.sources.update(itertools.compress(repeats.sources, repeats.by_text.tolist()))
        if len(self.sources) > _COUNTED_SOURCES:
            self.sources = Counter(dict(self.sources.most_common(_COUNTED_SOURCES // 2)))


def finish_plans(store: Store, run: Run, *, duplicates: Duplicates = "skip") -> dict[str, DuplicateCounts]:
    """Finish the plans whose units are all committed; return the duplicates of those it finished, by plan id.

    ``skip`` tombstones and quarantines duplicates, ``keep`` only counts them, ``fail`` raises
    ``DuplicatesError`` and leaves the plan for the next call.
    """
    finished: dict[str, DuplicateCounts] = {}
    for plan_id in chunk_plan.unfinished_plans(store.refresh()):
        record = store.state.records[f"plan:{plan_id}"]
        entry = store.state.file("plans", plan_id)
        if record["done"] < record["units"] or entry is None:
            break
        counts = _finish(store, run, plan_id, entry, duplicates)
        if counts is not None:
            finished[plan_id] = counts
    return finished


def _finish(store: Store, run: Run, plan_id: str, entry: FileEntry, duplicates: Duplicates) -> DuplicateCounts | None:
    def attempt() -> DuplicateCounts | None:
        seen = store.state
        if not seen.has(entry.path):
            return None  # another process finished it
        draft, counts = _finishing(store, run, plan_id, entry, duplicates)

        def build(newest: State) -> Draft:
            # The draft is valid only for the documents and tombstones that it was made from.
            same = all(
                list(newest.group(kind).entries()) == list(seen.group(kind).entries())
                for kind in ("documents", "tombstones")
            )
            if not same or newest.records["totals"] != seen.records["totals"]:
                raise ConflictError("the store changed while duplicates were searched", "Run the same command again.")
            return draft

        store.commit(run, build)  # if it loses the race, clean-up removes its files
        return counts

    store.refresh()
    # A concurrent ``chunk`` commits every half minute for hours, so this may lose the race many times.
    return retry_overtaken(attempt, store.renew, sys.maxsize)


def _finishing(
    store: Store, run: Run, plan_id: str, entry: FileEntry, duplicates: Duplicates
) -> tuple[Draft, DuplicateCounts]:
    plan = chunk_plan.read_plan(store, entry)
    tombstones = read_tombstones(store)
    free = chunk_plan.chunks_of_purges(store) if plan.allow_purged else None
    places, by_text = find_duplicates(store, chunk_plan.parts_of_plan(store.state, plan_id), tombstones, free)
    counts = DuplicateCounts()
    chunks: list[npt.NDArray[np.int64]] = []

    def counted() -> Iterator[PartRepeats]:
        for repeats in _read_repeats(store, tombstones, places, by_text):
            counts.add(repeats)
            chunks.append(repeats.chunks)
            yield repeats

    add: list[FileEntry] = []
    found = counted()
    tables = _locate(plan, found)
    first = None if duplicates == "keep" else next(tables, None)
    if first is not None and duplicates == "skip":
        name = FileName.new(run.id, "quarantine", f"{plan_id}.duplicates", "parquet")
        rows = itertools.chain([first], tables)
        add.append(parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, rows))
    if chunks and duplicates == "skip":  # of all that repeat, as all are located
        name = FileName.new(run.id, "tombstones", plan_id, "parquet")
        add.append(write_tombstones(store, name, np.concatenate(chunks)))
    for _ in found:  # count what is not located
        chunks.clear()
    if first is not None and duplicates == "fail":
        rows = first.slice(0, _EXAMPLES).to_pylist()
        examples = "; ".join(f"{row['input']} line {row['line']} ({row['reason']})" for row in rows)
        raise DuplicatesError(
            f"{count(counts.by_id + counts.by_text, 'duplicate document')}: {counts.by_id:,} by id, "
            f"{counts.by_text:,} by text only; the first: {examples}",
            "They are chunked, but not live yet. Run the same command again with --duplicates skip (the first of each "
            "stays) or --duplicates keep (all stay).",
        )
    known = _known(store, plan_id, plan)
    name = FileName.new(run.id, "inputs", plan_id, "json")
    add.append(chunk_plan.write_json_file(store, name, known, len(known["fingerprints"])))
    joined, parted = join_quarantines(store, run, plan_id)
    draft = Draft(
        "finish", {"duplicates": duplicates}, add=(*add, *joined), remove=(entry.path, *parted),
        records=_counted(store, plan_id, counts, duplicates),
    )  # fmt: skip
    return draft, counts


def find_duplicates(
    store: Store, new_parts: range, tombstones: Tombstones, free: Tombstones | None = None
) -> tuple[Places, npt.NDArray[np.bool_]]:
    """Return documents of ``new_parts`` that repeat an earlier one, ascending, and which by text only."""
    # With ``free``, purged documents are allowed: an id is free again if all its chunks are in ``free``.
    given_free = None if free is None else functools.partial(chunk_plan.documents_within, store, chunks=free)
    by_id = hash_partitions.find_repeats(store, "key", new_parts, given_free)

    def repeat_id(part: int) -> npt.NDArray[np.int64]:
        return row_of(by_id[slice_of_part(by_id, part)])

    def leave_out(part: int) -> npt.NDArray[np.int64]:
        docs, purged = repeat_id(part), tombstones.rows(part)
        if not len(purged):
            return docs
        first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy()
        return np.union1d(docs, np.searchsorted(first, purged, side="right") - 1)

    texts = hash_partitions.find_repeats(store, "text_hash", new_parts, leave_out)
    purged = {part: chunk_plan.documents_within(store, part, tombstones) for part in new_parts}
    if free is None and any(map(len, purged.values())):  # text of purged documents counts, too
        alike = hash_partitions.find_repeats(store, "text_hash", new_parts, repeat_id)
        documents = [parts.chunk_ids(part, docs) for part, docs in purged.items()]
        texts = np.union1d(texts, np.intersect1d(alike, np.concatenate(documents)))
    places = np.concatenate([by_id, texts])
    order = np.argsort(places)
    return places[order], order >= len(by_id)


def _known(store: Store, plan_id: str, plan: ChunkPlan) -> dict[str, Any]:
    given_up: set[str] = set()
    for quarantine in quarantine_files(store.state, plan_id):
        for rows in parts.read_tables(store, quarantine, ["input", "reason"]):
            given_up |= set(rows.filter(pc.starts_with(rows["reason"], GIVEN_UP))["input"].to_pylist())
    kept = [i for i, file in enumerate(plan.files) if file.path not in given_up]
    return {
        "fingerprints": [plan.fingerprints[i] for i in kept],
        "places": [plan.places[i] for i in kept],
        "given_up": [place for i, place in enumerate(plan.places) if plan.files[i].path in given_up],
        "fields": {"max_document": plan.fields.max_document},
    }


def _counted(store: Store, plan_id: str, counts: DuplicateCounts, duplicates: Duplicates) -> Mapping[str, Any]:
    state = store.state
    plan, totals = state.records[f"plan:{plan_id}"], state.records["totals"]
    documents = counts.by_id + counts.by_text
    change = {"documents": -documents, "chunks": -counts.chunks, "tokens": -counts.tokens, "rejected": counts.by_id}
    if duplicates != "skip":
        change = dict.fromkeys(change, 0)
    found = {"duplicates": duplicates, "duplicates_by_id": counts.by_id, "duplicates_by_text": counts.by_text}
    return {
        f"plan:{plan_id}": {**plan, **{name: plan[name] + n for name, n in change.items()}, **found, "finished": True},
        "totals": {
            name: totals[name] + n + (plan[name] - plan.get("purged", {}).get(name, 0)) * (name != "rejected")
            for name, n in change.items()
        },
        "pending": int(state.records.get("pending", 0)) - len(chunk_plan.parts_of_plan(state, plan_id)),
    }


@dataclass(frozen=True, slots=True)
class PartRepeats:
    """n duplicates of one part that have a live chunk."""

    chunks: npt.NDArray[np.int64]  # of all duplicates, also purged ones, which may be restored, but not erased ones
    live: int  # live chunks
    by_text: Flags  # [n]: not by id
    inputs: pa.Array
    positions: npt.NDArray[np.int64]
    sources: list[str]
    tokens: int  # of live chunks


def _read_repeats(store: Store, tombstones: Tombstones, places: Places, by_text: Flags) -> Iterator[PartRepeats]:
    columns = ["first_row", "n_chunks", "input", "position", "source"]
    for part in distinct_parts(places):
        some = slice_of_part(places, part)
        table = parts.read_documents(store, part, columns).take(pa.array(row_of(places[some])))
        entry = parts.part_entry(store, "chunks", part)
        n_tokens = parts.read_parquet(store, entry, ["n_tokens"])["n_tokens"].to_numpy()
        n_chunks = table["n_chunks"].to_numpy()
        owner = np.repeat(np.arange(len(n_chunks)), n_chunks)
        rows = expand_ranges(table["first_row"].to_numpy(), n_chunks)
        ids = parts.chunk_ids(part, rows)
        left = n_tokens[rows] > 0
        if not left.any():
            continue
        alive = left & ~tombstones.contains(ids)
        live = np.bincount(owner[alive], minlength=len(n_chunks)) > 0
        table = table.filter(pa.array(live))
        inputs, positions = table["input"].combine_chunks(), table["position"].to_numpy()
        sources, tokens = table["source"].fill_null("").to_pylist(), int(n_tokens[rows[alive]].sum())
        yield PartRepeats(ids[left], int(alive.sum()), by_text[some][live], inputs, positions, sources, tokens)


def _locate(plan: ChunkPlan, found: Iterator[PartRepeats]) -> Iterator[pa.Table]:
    files = {file.name: file for file in plan.files}
    waiting: list[pa.Table] = []
    rows = 0
    for name, positions, by_text in _by_input(found):
        waiting.append(_quarantine_rows(files.get(name), name, positions, by_text))
        rows += len(positions)
        if rows >= _TABLE_ROWS:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _by_input(found: Iterator[PartRepeats]) -> Iterator[tuple[str, npt.NDArray[np.int64], Flags]]:
    for name, some in itertools.groupby(itertools.chain.from_iterable(map(_runs, found)), lambda run: run[0]):
        positions, by_text = (np.concatenate(column) for column in zip(*(run[1:] for run in some), strict=True))
        order = np.argsort(positions, kind="stable")
        for start in range(0, len(order), _LOCATED_ROWS):
            rows = order[start : start + _LOCATED_ROWS]
            yield name, positions[rows], by_text[rows]


def _runs(repeats: PartRepeats) -> Iterator[tuple[str, npt.NDArray[np.int64], Flags]]:
    runs = pc.run_end_encode(repeats.inputs)
    bounds = itertools.pairwise([0, *runs.run_ends.to_pylist()])
    for name, (start, end) in zip(runs.values.to_pylist(), bounds, strict=True):
        yield name, repeats.positions[start:end], repeats.by_text[start:end]


def _quarantine_rows(file: InputFile | None, name: str, positions: npt.NDArray[np.int64], by_text: Flags) -> pa.Table:
    has_offsets = file is not None and file.base in IN_BYTES
    n = len(positions)
    lines = [0] * n if has_offsets else positions.tolist()
    if file is not None and file.base in _IN_LINES:
        ids = np.flatnonzero(~by_text | (file.size <= _TEXTS_COUNTED_BYTES)).tolist()
        if ids and file.size <= _COUNTED_BYTES:
            with contextlib.suppress(OSError, InputError):
                # A file that was truncated since has fewer lines than requested.
                for i, line in zip(ids, count_lines(file, positions[ids].tolist()), strict=False):
                    lines[i] = line
    columns: dict[str, Any] = {
        "input": [file.path if file is not None else name] * n,
        "line": lines,
        "offset": positions.tolist() if has_offsets else [None] * n,
        "reason": [BY_TEXT if text else BY_ID for text in by_text.tolist()],
        "excerpt": [None] * n,
        "damage": [False] * n,
    }
    return pa.table(columns, schema=parts.QUARANTINE_SCHEMA)
