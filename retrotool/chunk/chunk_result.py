"""What a ``chunk`` came to: counts of its plans, why rows were set aside, how many may be, and what may be a slip."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from retrotool.chunk.deduplicate import BY_TEXT, DuplicateCounts
from retrotool.chunk.quarantine import without_numbers
from retrotool.errors import ErasedError
from retrotool.store import parts, staging
from retrotool.store.staging import PLAN_COUNTS, Unit
from retrotool.store.store import Store

_LOOKED_AT = 64
"""Parts whose columns are looked at."""

Note = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """A reason why rows were set aside, how many, where the first is, and its excerpt, if one was kept."""

    reason: str
    rows: int
    input: str
    line: int
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What ``chunk`` did for the inputs given, units committed by an earlier, interrupted run included.

    ``stopped`` says why not all was done, ``exceeded`` that more was set aside than was allowed though all was done; ""
    if not. ``duplicates`` are documents left out for their text, ``known_documents`` those that the store has of an
    input that was read again, ``blocked`` those that were purged once. Of ``compared`` documents the fast tokenizer's
    tokens were compared with those of ``tokenizers``; ``exact`` ones only ``tokenizers`` did.
    """

    documents: int
    chunks: int
    tokens: int
    set_aside: int
    blocked: int
    known_documents: int
    damaged: int
    keys_cut: int
    compared: int
    exact: int
    duplicates: int
    parts: int
    known_inputs: int
    commit: int
    stopped: str = ""
    exceeded: str = ""
    reasons: tuple[RejectedReason, ...] = ()
    duplicates_by_source: Mapping[str, int] = field(default_factory=dict)


def waiting_units(store: Store, plans: Sequence[str]) -> list[Unit]:
    """Units of some plans that are done, and wait for those before them to be committed."""
    done = {plan: int(store.state.records[f"plan:{plan}"]["done"]) for plan in plans}
    units = [task.unit for task in staging.read_staged(store.storage).values() if task.unit is not None]
    return [unit for unit in units if unit.plan in done and unit.index >= done[unit.plan]]


def counts_of(store: Store, plans: Sequence[str]) -> dict[str, int]:
    """What the units of some plans came to, committed or waiting."""
    records = [store.state.records[f"plan:{plan}"] for plan in plans]
    units = waiting_units(store, plans)
    return {
        name: sum(int(record.get(name, 0)) for record in records) + sum(unit.counts.get(name, 0) for unit in units)
        for name in PLAN_COUNTS
    }


def result_of(
    store: Store,
    plans: Sequence[str],
    read_again: Collection[str],
    known: int,
    stopped: str,
    exceeded: str,
    repeats: Mapping[str, DuplicateCounts],
) -> ChunkResult:
    """The result of a run that worked on some plans.

    What all but the last of them had set aside of inputs that were ``read_again`` does not count.
    """
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in plans]
    units = waiting_units(store, plans)
    reasons, damaged = _reasons(store, plans, units, read_again)
    counts = {**counts_of(store, plans), "set_aside": sum(reason.rows for reason in reasons), "damaged": damaged}
    repeating = sum((found.sources for found in repeats.values()), Counter[str]())
    return ChunkResult(
        **counts,
        parts=sum(int(record["parts"]) for record in records) + sum(len(unit.parts) for unit in units),
        duplicates=sum(record["duplicates_by_text"] for record in records if record.get("duplicates") == "skip"),
        known_inputs=known,
        commit=state.number,
        stopped=stopped,
        exceeded=exceeded,
        reasons=reasons,
        duplicates_by_source=dict(repeating),
    )


def _reasons(
    store: Store, plans: Sequence[str], units: Sequence[Unit], read_again: Collection[str]
) -> tuple[tuple[RejectedReason, ...], int]:
    """Reasons why rows of some plans were set aside, the most frequent first, and how many stand for damage.

    Reasons that are alike but for numbers are one.
    """
    found: dict[str, RejectedReason] = {}
    damaged = 0
    for table in _quarantines(store, plans, units, read_again):
        damaged += int(pc.sum(table["damage"]).as_py() or 0)
        grouped = table.filter(pc.not_equal(table["reason"], BY_TEXT)).group_by("reason", use_threads=False)
        firsts = [(column, "first") for column in ("input", "line", "excerpt")]
        for row in grouped.aggregate([*firsts, ("reason", "count")]).to_pylist():
            reason, n, first = row["reason"], row["reason_count"], row["excerpt_first"] or ""
            kind = without_numbers(reason)
            old = found.get(kind)
            if old is None:
                found[kind] = RejectedReason(reason, n, row["input_first"], row["line_first"], first)
            else:
                found[kind] = replace(old, rows=old.rows + n, reason=reason if reason == old.reason else kind)
    return tuple(sorted(found.values(), key=lambda reason: -reason.rows)), damaged


def _quarantines(
    store: Store, plans: Sequence[str], units: Sequence[Unit], read_again: Collection[str]
) -> Iterator[pa.Table]:
    entries = [(slot.partition(".")[0], entry) for slot, entry in store.state.group("quarantine").items()]
    again = pa.array(read_again, pa.string())
    for plan, entry in (*entries, *((unit.plan, unit.quarantine) for unit in units)):
        if entry is None or plan not in plans:
            continue
        for table in parts.read_tables(store, entry, ["input", "line", "reason", "excerpt", "damage"]):
            yield table if plan == plans[-1] else table.filter(pc.invert(pc.is_in(table["input"], again)))


def note_empty_columns(store: Store, new: Sequence[int], keep: Sequence[str], known: int, note: Note) -> None:
    """Name the fields to keep that no row of the ``new`` parts has, and those that inputs read before lack."""
    old = [part for part in store.state.all_parts() if part not in new][:_LOOKED_AT] if known else []
    with contextlib.suppress(ErasedError):  # by another process, just now
        for name in keep:
            columns = (parts.read_documents(store, part, [name])[name] for part in new if name in _columns(store, part))
            if new and all(column.null_count == len(column) for column in columns):
                note(f"--keep {name}: no row has this field, so its column is empty.")
        lost = [name for name in keep if old and not any(name in _columns(store, part) for part in old)]
        if lost:
            what = "1 input is" if known == 1 else f"{known:,} inputs are"
            note(f"--keep {', '.join(lost)}: {what} in the store already, and without it.")


def _columns(store: Store, part: int) -> list[str]:
    return list(parts.read_schema(store, parts.part_entry(store, "documents", part)).names)
