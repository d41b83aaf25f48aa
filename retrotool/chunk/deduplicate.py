"""Finish a ``chunk`` plan: find duplicate documents, replace outdated ones, and record the plan's inputs.

Duplicates are found after chunking, over all parts at once, by the rule in the store format: first by id,
then by text. ``update`` decides about ids that the store has from earlier plans. Small inputs of lines are
read again to report line numbers instead of byte offsets.

Memory besides ``hash_partitions`` and ``update``: one part with a duplicate, 17 bytes per duplicate and 8 per
chunk of it.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk import chunk_plan, hash_partitions
from retrotool.chunk.chunk_plan import ChunkPlan, Duplicates, Existing
from retrotool.chunk.hash_partitions import Places
from retrotool.chunk.quarantine import join_quarantines, quarantine_files
from retrotool.chunk.stage import GIVEN_UP
from retrotool.chunk.update import compare_ids
from retrotool.cli.output import count
from retrotool.errors import ConflictError, DuplicatesError, InputError, UsageError
from retrotool.machine import user_name
from retrotool.ranges import expand_ranges
from retrotool.sources import InputFile
from retrotool.sources.inputs import IN_BYTES
from retrotool.sources.lines import count_lines
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import PREFIX, REPLACED, Tombstones, read_tombstones, write_tombstones
from retrotool.store.weights import Weight, weigh_chunks, weight_of

_COUNTED_SOURCES = 100_000
_EXAMPLES = 3
_SEARCHED_PARTS = 16  # for the originals of examples
BY_ID = "duplicate document id"
BY_TEXT = "duplicate text"
DIFFERING = "another text than the stored document of this id"
_REASONS = (BY_ID, BY_TEXT, DIFFERING, "")  # by kind; unchanged documents are not reported
_BY_ID, _BY_TEXT, _DIFFERING, _UNCHANGED = range(4)
_COUNTED_BYTES, _TEXTS_COUNTED_BYTES = 256 << 20, 4 << 20  # most of an input that is read to number ids and texts
_IN_LINES = ("jsonl", "csv", "tsv")  # formats whose rows are reported by line number

Kinds = npt.NDArray[np.int8]  # indices of ``_REASONS``


@dataclass(slots=True)
class DuplicateCounts:
    """Live documents of a plan that repeat an earlier one, and what they hold.

    * ``by_id``, ``by_text``: of the same plan, or by text of any.
    * ``unchanged``, ``differing``: the store had their ids before, with the same or another text.
    * ``replaced``, ``removed``: documents of earlier plans that leave the store, by the purge ``purge``.
    * ``weight``: what is dropped of all these.
    * ``examples``: ids of some of ``differing``; ``copies``: of some of ``by_text``, and what they repeat.
    * ``not_mirrored``: inputs of which nothing was removed.
    """

    by_id: int = 0
    by_text: int = 0
    unchanged: int = 0
    differing: int = 0
    replaced: int = 0
    removed: int = 0
    purge: str = ""
    weight: Weight = field(default_factory=Weight)
    examples: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    not_mirrored: tuple[str, ...] = ()
    sources: Counter[str] = field(default_factory=Counter)  # by text; above 100,000 sources the smallest are dropped

    def add(self, kinds: Kinds, sources: Sequence[str]) -> None:
        """Count duplicates by kind, and by source those by text."""
        n = np.bincount(kinds, minlength=len(_REASONS)).tolist()
        for name, number in zip(("by_id", "by_text", "differing", "unchanged"), n, strict=True):
            setattr(self, name, getattr(self, name) + number)
        self.sources.update(itertools.compress(sources, (kinds == _BY_TEXT).tolist()))
        if len(self.sources) > _COUNTED_SOURCES:
            self.sources = Counter(dict(self.sources.most_common(_COUNTED_SOURCES // 2)))


def finish_plans(
    store: Store, run: Run, *, duplicates: Duplicates = "skip", existing: Existing | None = None
) -> dict[str, DuplicateCounts]:
    """Finish the plans whose units are all committed; return the duplicates of those it finished, by plan id.

    ``skip`` tombstones and quarantines duplicates, ``keep`` only counts them, ``fail`` raises
    ``DuplicatesError`` and leaves the plan for the next call. ``existing`` decides for plans that were made
    with ``fail`` (None: skip); the others have decided themselves.
    """
    finished: dict[str, DuplicateCounts] = {}
    for plan_id in chunk_plan.unfinished_plans(store.refresh()):
        record = store.state.records[f"plan:{plan_id}"]
        entry = store.state.file("plans", plan_id)
        if record["done"] < record["units"] or entry is None:
            break
        counts = _finish(store, run, plan_id, entry, duplicates, existing)
        if counts is not None:
            finished[plan_id] = counts
    return finished


def _finish(
    store: Store, run: Run, plan_id: str, entry: FileEntry, duplicates: Duplicates, existing: Existing | None
) -> DuplicateCounts | None:
    def attempt() -> DuplicateCounts | None:
        seen = store.state
        if not seen.has(entry.path):
            return None  # another process finished it
        draft, counts, weight = _finishing(store, run, plan_id, entry, duplicates, existing)

        def build(newest: State) -> Draft:
            # The draft is valid only for the documents and tombstones that it was made from.
            same = all(
                list(newest.group(kind).entries()) == list(seen.group(kind).entries())
                for kind in ("documents", "tombstones")
            )
            if not same or newest.records["totals"] != seen.records["totals"]:
                raise ConflictError("the store changed while duplicates were searched", "Run the same command again.")
            purge = replaced_record(newest, plan_id, weight, "chunk replaced or removed the documents")
            purges = {PREFIX + counts.purge: purge} if counts.purge else {}
            return replace(draft, records={**draft.records, **purges})

        store.commit(run, build)  # if it loses the race, clean-up removes its files
        return counts

    store.refresh()
    # A concurrent ``chunk`` commits every half minute for hours, so this may lose the race many times.
    return retry_overtaken(attempt, store.renew, sys.maxsize)


def _finishing(
    store: Store, run: Run, plan_id: str, entry: FileEntry, duplicates: Duplicates, existing: Existing | None
) -> tuple[Draft, DuplicateCounts, Weight]:
    """Return the commit that finishes a plan, but for the record of its purge, and what the purge takes."""
    plan = chunk_plan.read_plan(store, entry)
    if plan.existing == "fail" and existing == "mirror":
        advice = "Finish it with skip or replace first."
        raise UsageError("--existing mirror: interrupted work was begun with --existing fail", advice)
    chosen = (existing or "skip") if plan.existing == "fail" else plan.existing
    tombstones = read_tombstones(store)
    new_parts = chunk_plan.parts_of_plan(store.state, plan_id)
    free = chunk_plan.chunks_of_purges(store) if plan.allow_purged else None
    by_id = find_repeated_ids(store, new_parts, tombstones, free)
    update = compare_ids(store, plan_id, plan, tombstones, by_id, chosen, keep_repeats=duplicates == "keep")
    by_id = np.setdiff1d(by_id, update.new, assume_unique=True)
    by_text = find_repeated_texts(store, new_parts, tombstones, free, np.union1d(by_id, update.outdated))
    places = np.union1d(by_id, by_text)
    kinds = np.full(len(places), _BY_ID, np.int8)
    for kind, some in ((_BY_TEXT, by_text), (_DIFFERING, update.differing), (_UNCHANGED, update.unchanged)):
        kinds[np.searchsorted(places, some)] = kind
    counts = DuplicateCounts(
        replaced=len(update.replaced), removed=len(update.removed), not_mirrored=update.not_mirrored,
        examples=_ids_of(store, update.differing[:_EXAMPLES]), copies=_copies(store, places, kinds, tombstones),
    )  # fmt: skip
    chunks: list[npt.NDArray[np.int64]] = []
    kept = (_BY_ID, _BY_TEXT) if duplicates == "keep" else ()
    tables = _read_repeats(store, plan, tombstones, places, kinds, kept, counts, chunks)
    add: list[FileEntry] = []
    first = next(tables, None)
    if "fail" in (duplicates, chosen) and first is not None:
        _fail(first, counts, tables, duplicates, chosen)
    if first is not None:
        name = FileName.new(run.id, "quarantine", f"{plan_id}.duplicates", "parquet")
        rows = itertools.chain([first], tables)
        add.append(parts.write_batches(store, name, parts.QUARANTINE_SCHEMA, rows))
    dropped = np.concatenate([np.zeros(0, np.int64), *chunks])
    if len(dropped):
        name = FileName.new(run.id, "tombstones", plan_id, "parquet")
        add.append(write_tombstones(store, name, dropped))
    by_part = parts.rows_by_part(update.outdated)
    gone = np.concatenate([np.zeros(0, np.int64), *(chunk_plan.chunks_of(store, *docs) for docs in by_part)])
    outdated, weights = weigh_chunks(store, gone, tombstones)
    if len(outdated):
        counts.purge = "p" + secrets.token_hex(4)
        add.append(write_tombstones(store, FileName.new(run.id, "tombstones", counts.purge, "parquet"), outdated))
    known = _known(store, plan_id, plan)
    name = FileName.new(run.id, "inputs", plan_id, "json")
    add.append(chunk_plan.write_json_file(store, name, known, len(known["fingerprints"])))
    joined, parted = join_quarantines(store, run, plan_id)
    seen = [one.path for one in chunk_plan.files_of_plan(store.state, "seen", plan_id)]
    weight = weight_of(weights)
    draft = Draft(
        "finish", {"duplicates": duplicates, "existing": chosen}, add=(*add, *joined),
        remove=(entry.path, *parted, *seen), records=_counted(store, plan_id, counts, duplicates, chosen, weight),
    )  # fmt: skip
    return draft, counts, weight


def _fail(
    first: pa.Table, counts: DuplicateCounts, more: Iterator[pa.Table], duplicates: Duplicates, existing: Existing
) -> None:
    """Raise ``DuplicatesError`` if there is anything that must not be."""
    for _ in more:  # count them all
        pass
    if existing == "fail" and counts.differing:
        raise DuplicatesError(
            f"{count(counts.differing, 'document')} with another text than the stored documents of the same ids, such "
            f"as {', '.join(counts.examples)}",
            "Nothing that is live was changed. The next run finishes: with --existing replace the new texts replace "
            "the stored ones, otherwise the stored ones stay.",
        )
    if duplicates == "fail" and counts.by_id + counts.by_text:
        rows = first.filter(pc.not_equal(first["reason"], DIFFERING)).slice(0, _EXAMPLES).to_pylist()
        examples = "; ".join(f"{row['input']} line {row['line']} ({row['reason']})" for row in rows)
        raise DuplicatesError(
            f"{count(counts.by_id + counts.by_text, 'duplicate document')}: {counts.by_id:,} by id, "
            f"{counts.by_text:,} by text only; the first: {examples}",
            "They are chunked, but not live yet. Run the same command again with --duplicates skip (the first of each "
            "stays) or --duplicates keep (all stay).",
        )


def find_repeated_ids(store: Store, new_parts: range, tombstones: Tombstones, free: Tombstones | None) -> Places:
    """Return documents of ``new_parts`` with the id of an earlier one, or of a live one of earlier parts.

    With ``free``, purged documents are allowed: an id is free again if all its chunks are in ``free``.
    """

    def leave_out(part: int) -> npt.NDArray[np.int64]:
        if part < new_parts.start:
            return chunk_plan.documents_within(store, part, tombstones)
        return np.zeros(0, np.int64) if free is None else chunk_plan.documents_within(store, part, free)

    return hash_partitions.find_repeats(store, "key", new_parts, leave_out)


def find_repeated_texts(
    store: Store, new_parts: range, tombstones: Tombstones, free: Tombstones | None, but: Places
) -> Places:
    """Return documents of ``new_parts`` with the text of an earlier one, none of these among ``but``."""

    def leave_out_only(part: int) -> npt.NDArray[np.int64]:
        return parts.row_of(but[parts.slice_of_part(but, part)])

    def leave_out(part: int) -> npt.NDArray[np.int64]:
        docs, purged = leave_out_only(part), tombstones.rows(part)
        if not len(purged):
            return docs
        first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy()
        return np.union1d(docs, np.searchsorted(first, purged, side="right") - 1)

    texts = hash_partitions.find_repeats(store, "text_hash", new_parts, leave_out)
    purged = {part: chunk_plan.documents_within(store, part, tombstones) for part in new_parts}
    if free is None and any(map(len, purged.values())):  # text of purged documents counts, too
        alike = hash_partitions.find_repeats(store, "text_hash", new_parts, leave_out_only)
        documents = [parts.chunk_ids(part, docs) for part, docs in purged.items()]
        texts = np.union1d(texts, np.intersect1d(alike, np.concatenate(documents)))
    return texts


def _ids_of(store: Store, places: Places) -> tuple[str, ...]:
    by_part = parts.rows_by_part(places)
    columns = (parts.read_documents(store, part, ["id"])["id"].take(pa.array(docs)) for part, docs in by_part)
    return tuple(name for column in columns for name in column.to_pylist())


def _copies(store: Store, places: Places, kinds: Kinds, tombstones: Tombstones) -> tuple[tuple[str, str], ...]:
    """Return ids of documents that repeat a text, and of live ones of the newest parts with it."""
    repeats: dict[bytes, str] = {}
    for part, docs in parts.rows_by_part(places[kinds == _BY_TEXT][:_EXAMPLES]):
        table = parts.read_documents(store, part, ["id", "text_hash"]).take(pa.array(docs))
        repeats |= zip(table["text_hash"].to_pylist(), table["id"].to_pylist(), strict=True)
    found: dict[bytes, str] = {}
    for part in store.state.all_parts()[-_SEARCHED_PARTS:] if repeats else ():
        hashes = parts.read_documents(store, part, ["text_hash"])["text_hash"]
        docs = np.flatnonzero(pc.is_in(hashes, value_set=pa.array(repeats, hashes.type)).to_numpy())
        dropped = parts.row_of(places[parts.slice_of_part(places, part)])
        docs = np.setdiff1d(docs, np.union1d(dropped, chunk_plan.documents_within(store, part, tombstones)))
        found |= zip(hashes.take(pa.array(docs)).to_pylist(), _ids_of(store, parts.chunk_ids(part, docs)), strict=True)
    return tuple((name, found[text]) for text, name in repeats.items() if found.get(text, name) != name)


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


def _counted(
    store: Store, plan_id: str, counts: DuplicateCounts, duplicates: Duplicates, existing: Existing, outdated: Weight
) -> Mapping[str, Any]:
    """Return the records of the plan and the store once the plan is finished."""
    state = store.state
    plan, totals = state.records[f"plan:{plan_id}"], state.records["totals"]
    rejected = counts.by_id * (duplicates == "skip")
    finished: dict[str, Any] = {
        **plan, **{name: plan[name] - n for name, n in asdict(counts.weight).items()},
        "rejected": plan["rejected"] + rejected,
        "duplicates": duplicates, "duplicates_by_id": counts.by_id, "duplicates_by_text": counts.by_text,
        "existing": existing, "differing": counts.differing, "replaced": counts.replaced, "removed": counts.removed,
        "known_documents": plan.get("known_documents", 0) + counts.unchanged, "finished": True,
    }  # fmt: skip
    purged = plan.get("purged", {})
    added = {name: finished[name] - purged.get(name, 0) - n for name, n in asdict(outdated).items()}
    return {
        f"plan:{plan_id}": finished,
        "totals": {name: n + added.get(name, rejected) for name, n in totals.items()},
        "pending": int(state.records.get("pending", 0)) - len(chunk_plan.parts_of_plan(state, plan_id)),
    }


def replaced_record(state: State, plan_id: str, weight: Weight, reason: str, who: str | None = None) -> dict[str, Any]:
    """Return the record of a purge of documents that others replace."""
    return {
        **asdict(weight), "selector": REPLACED, "hash": plan_id, "reason": reason, "who": who or user_name(),
        "commit": state.number + 1, "erased": False, "plan": plan_id,
    }  # fmt: skip


def _read_repeats(
    store: Store, plan: ChunkPlan, tombstones: Tombstones, places: Places, kinds: Kinds, kept: Collection[int],
    counts: DuplicateCounts, dropped: list[npt.NDArray[np.int64]],
) -> Iterator[pa.Table]:  # fmt: skip
    """Count the duplicates that have a live chunk; yield the quarantine rows of each part.

    Those of the kinds ``kept`` are only counted. ``dropped`` gets the chunks of the others: also purged ones,
    which may be restored, but not erased ones. In the tables an input's documents are together and in order.
    """
    files = {file.name: file for file in plan.files}
    columns = ["id", "text_hash", "first_row", "n_chunks", "input", "position", "source"]
    for part in parts.distinct_parts(places):
        some = parts.slice_of_part(places, part)
        table = parts.read_documents(store, part, columns).take(pa.array(parts.row_of(places[some])))
        # Without a given id only its text can repeat.
        mine = np.where((kinds[some] == _BY_ID) & parts.named_by_text(table), np.int8(_BY_TEXT), kinds[some])
        entry = parts.part_entry(store, "chunks", part)
        n_tokens = parts.read_parquet(store, entry, ["n_tokens"])["n_tokens"].to_numpy()
        n_chunks = table["n_chunks"].to_numpy()
        rows = expand_ranges(table["first_row"].to_numpy(), n_chunks)
        left = n_tokens[rows] > 0
        owner, ids = np.repeat(np.arange(len(n_chunks)), n_chunks)[left], parts.chunk_ids(part, rows[left])
        goes = ~np.isin(mine, list(kept))
        dropped.append(ids[goes[owner]])
        counts.weight += weight_of(weigh_chunks(store, dropped[-1], tombstones)[1])
        live = np.bincount(owner[~tombstones.contains(ids)], minlength=len(mine)) > 0
        counts.add(mine[live], table["source"].filter(pa.array(live)).fill_null("").to_pylist())
        reported = live & goes & (mine != _UNCHANGED)
        inputs = pc.run_end_encode(table["input"].combine_chunks().filter(pa.array(reported)))
        positions, reasons = table["position"].to_numpy()[reported], mine[reported]
        bounds = itertools.pairwise([0, *inputs.run_ends.to_pylist()])
        tables = [
            _quarantine_rows(files[name], positions[start:end], reasons[start:end])
            for name, (start, end) in zip(inputs.values.to_pylist(), bounds, strict=True)
        ]
        if tables:
            yield pa.concat_tables(tables)


def _quarantine_rows(file: InputFile, positions: npt.NDArray[np.int64], kinds: Kinds) -> pa.Table:
    has_offsets = file.base in IN_BYTES
    n = len(positions)
    lines = [0] * n if has_offsets else positions.tolist()
    if file.base in _IN_LINES:
        ids = np.flatnonzero((kinds != _BY_TEXT) | (file.size <= _TEXTS_COUNTED_BYTES)).tolist()
        if ids and file.size <= _COUNTED_BYTES:
            with contextlib.suppress(OSError, InputError):
                # A file that was truncated since has fewer lines than requested.
                for i, line in zip(ids, count_lines(file, positions[ids].tolist()), strict=False):
                    lines[i] = line
    columns: dict[str, Any] = {
        "input": [file.path] * n,
        "line": lines,
        "offset": positions.tolist() if has_offsets else [None] * n,
        "reason": [_REASONS[kind] for kind in kinds.tolist()],
        "excerpt": [None] * n,
        "damage": [False] * n,
    }
    return pa.table(columns, schema=parts.QUARANTINE_SCHEMA)
