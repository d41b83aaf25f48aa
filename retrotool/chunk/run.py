"""``chunk``: plan, work the units, finish; what came of it, why rows were rejected, and what may be a slip."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrotool import engine, sources
from retrotool.chunk import CHUNK_LENGTH
from retrotool.chunk.chunk_plan import (
    ChunkOptions,
    MaxBad,
    changed_inputs,
    commit_plan,
    known_findings,
    may_be_fast,
    open_plans,
    unfinished_plans,
    use_exact_tokenizer,
)
from retrotool.chunk.deduplicate import BY_TEXT, DuplicateCounts, finish_plans
from retrotool.chunk.quarantine import without_numbers
from retrotool.chunk.stage import ChunkStage
from retrotool.cli.command_lines import command_line
from retrotool.errors import AbortError, ErasedError, UsageError
from retrotool.sources import InputFile, find_inputs
from retrotool.sources.inputs import STANDARD_INPUT, is_spooled, spool
from retrotool.store import folding, leases, parts, staging
from retrotool.store.folding import writing
from retrotool.store.identity import is_store
from retrotool.store.leases import Run
from retrotool.store.staging import PLAN_COUNTS, Staged, Unit
from retrotool.store.storage import Storage, storage_at
from retrotool.store.store import Store
from retrotool.tokenizers import (
    BUNDLED,
    FastTokenizer,
    Findings,
    Tokenizer,
    TokensDiffer,
    find_tokenizer,
    library_versions,
    stored_tokenizer,
)  # fmt: skip

_LOOKED_AT = 64
"""Parts whose columns are looked at."""


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """A reason why rows were rejected, how many, where the first is, and its excerpt, if one was kept."""

    reason: str
    rows: int
    input: str
    line: int
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What ``chunk`` did for the inputs given, units committed by an earlier, interrupted run included.

    ``stopped`` says why not all was done, ``exceeded`` that more was rejected than was allowed though all was done; ""
    if not. ``duplicates`` are documents left out for their text, ``known_documents`` those that the store has of an
    input that was read again, ``blocked`` those that were purged once. Of ``compared`` documents the fast tokenizer's
    tokens were compared with those of ``tokenizers``; ``exact`` ones only ``tokenizers`` did.
    """

    documents: int
    chunks: int
    tokens: int
    rejected: int
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


def chunk(
    root: str | Path,
    inputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    chunk_length: int | None = None,
    options: ChunkOptions | None = None,
    **changes: Any,
) -> ChunkResult:
    """Chunk inputs into a store, making it if there is none; without inputs, finish what was begun before.

    ``changes`` are fields of ``ChunkOptions``. With more than one worker, a script must call this below
    ``if __name__ == "__main__":``, as processes are spawned.
    """
    chosen = check_options(replace(options or ChunkOptions(), **changes))
    storage = storage_at(root)
    if not inputs and not (is_store(storage) and unfinished_plans(Store.open(storage).state)):
        raise UsageError("no input was given, and nothing is left unfinished", "Name files or folders.")
    # Before anything is made: what can't be read must leave nothing behind.
    files = find_readable([name for name in inputs if name != STANDARD_INPUT], chosen)
    store, loaded = open_or_create(storage, tokenizer, chunk_length)
    repeats: dict[str, DuplicateCounts] = {}
    before = set(store.state.all_parts())
    with contextlib.ExitStack() as stack:
        if STANDARD_INPUT in inputs:
            files = find_inputs(inputs, stack.enter_context(spool(sys.stdin.buffer if sys.stdin else None)))
        run = stack.enter_context(writing(store))
        plans = list(unfinished_plans(store.state))
        _tell_begun(store, run, files, chosen)
        if chosen.exact_tokenizer:
            use_exact_tokenizer(store, run, "it was asked for")
        known = 0
        changed: frozenset[str] = frozenset()
        if files:
            findings = _findings(store, files, loaded, chosen)
            if chosen.add_changed:
                changed = frozenset(file.path for file in changed_inputs(store, run, files, chosen))
            if changed and plans:
                # What the store has of an input is known once no plan is open.
                _work(store, run, plans, replace(chosen, max_bad=MaxBad()), changed)
                repeats.update(finish_plans(store, run, duplicates=chosen.duplicates))
            plan, known = commit_plan(store, run, files, chosen, findings)
            plans += [plan] if plan else []
        open_plans = [plan for plan in plans if not store.state.records[f"plan:{plan}"]["finished"]]
        stopped = _work(store, run, open_plans, chosen)
        if not stopped and _has_units(store):
            chosen.note(
                "The standard input of another running chunk is left to it, and what was read after it waits for it. "
                f"If it was killed on another machine, finish in an hour: {command_line('chunk', store.place)}"
            )
        exceeded = "" if stopped else chosen.max_bad.exceeded(counts_of(store, open_plans), last=True)
        if not stopped:
            repeats.update(finish_plans(store, run, duplicates=chosen.duplicates))
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in plans]
    units = waiting_units(store, plans)
    # What all plans but the last had rejected of inputs that were read again does not count.
    reasons, damaged = _reasons(store, plans, units, changed)
    counts = {**counts_of(store, plans), "rejected": sum(reason.rows for reason in reasons), "damaged": damaged}
    left_out = [found.sources for found in repeats.values()] if chosen.duplicates == "skip" else []
    note_empty_columns(store, sorted(set(state.all_parts()) - before), chosen.fields.keep, known, chosen.note)
    return ChunkResult(
        **counts,
        parts=sum(int(record["parts"]) for record in records) + sum(len(unit.parts) for unit in units),
        duplicates=sum(record["duplicates_by_text"] for record in records if record.get("duplicates") == "skip"),
        known_inputs=known,
        commit=state.number,
        stopped=stopped,
        exceeded=exceeded,
        reasons=reasons,
        duplicates_by_source=dict(sum(left_out, Counter[str]())),
    )


def _tell_begun(store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions) -> None:
    """Say which inputs, not asked for now, are read since an interrupted run has begun with them."""
    if leases.others(store.storage, run.id):
        return  # they may be at it themselves
    store.refresh()
    asked = {file.path for file in files}
    begun: dict[InputFile, None] = {}
    for plan_id, _, plan in open_plans(store):
        left = plan.units[store.state.records[f"plan:{plan_id}"]["done"] :]
        begun.update((plan.files[piece.file], None) for unit in left for piece in unit)
    names = [file.path for file in begun if file.path not in asked and not is_spooled(file)]
    if names:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        give_up = "" if options.skip_missing else " To give an input up, move it away and add --skip-missing."
        options.note(f"Finishing what was begun before: {names[0]}{more}.{give_up}")


def find_readable(inputs: Sequence[str], options: ChunkOptions) -> list[InputFile]:
    """The files behind the inputs; ``UsageError`` if one can't be read, or not in this way."""
    sources.check_fields(options.fields)
    try:
        found = sources.survey(inputs)
        files = list(found.files)
        for file in files:
            sources.check_input(file, options.fields)
            with Path(file.path).open("rb"):
                pass
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was read or changed.") from error
    if found.left_out:
        what = "file is" if len(found.left_out) == 1 else "files are"
        options.note(f"{len(found.left_out):,} {what} of no known format, and left out: {found.left_out[0]}, for one.")
    return files


def _findings(
    store: Store, files: Sequence[InputFile], loaded: Tokenizer | None, options: ChunkOptions
) -> Findings | None:
    """What is to be known of the fast tokenizer, if that would be used and is not known yet; says if it is not used."""
    if not may_be_fast(store.state, files):
        return None
    known, new = known_findings(store.state), None
    why = "" if known is None else known.why
    if known is None or known.versions != library_versions():
        fast = FastTokenizer(loaded or stored_tokenizer(store))
        new, why = fast.findings, fast.why
    if why:
        options.note(f"Tokenising by tokenizers alone, which is many times slower: {why}.")
    return new


def check_options(options: ChunkOptions) -> ChunkOptions:
    """The options, tidied; ``UsageError`` for one that can't be meant."""
    fields = replace(options.fields, keep=tuple(dict.fromkeys(options.fields.keep)))
    for value in (fields.text, fields.id, fields.key, fields.value, fields.tokens, fields.separator, *fields.keep):
        if value is not None and not _is_utf8(value):
            raise UsageError(f"{value!a} is not UTF-8", "Fields and separators are text.")
    for name in fields.keep:
        if name in parts.RESERVED_COLUMNS or not name:
            raise UsageError(
                f"--keep {name}: the store has a column of this name already", "Rename the field in the input."
            )
    if options.part_size < 1 or options.part_size >= 1 << 31:
        raise UsageError(f"--part-size {options.part_size} is not between 1 and 2^31 - 1")
    if fields.end_of_document is not None and not 0 <= fields.end_of_document < 1 << 32:
        raise UsageError(f"--end-of-document {fields.end_of_document} is no token id: these are below 2^32")
    if not 0 < fields.max_document < 1 << 40:
        raise UsageError(f"--max-document {fields.max_document:,} is not between 1 byte and 1 TiB")
    if (fields.key is None) != (fields.value is None):
        raise UsageError("--key-field and --value-field go together", "Give both, or neither.")
    if not 0 <= options.check <= 1:
        raise UsageError(f"--check {options.check} is not a share between 0 and 1")
    return replace(options, fields=fields)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="ignore").decode() == text


def _work(
    store: Store, run: Run, plans: Sequence[str], options: ChunkOptions, changed: frozenset[str] = frozenset()
) -> str:
    """Work all units; why it stopped before, or "". ``changed``: inputs that will be read again."""
    stage = ChunkStage(options.skip_missing, changed, options.check, run.id)
    store.refresh()
    counts = Counter(counts_of(store, plans))

    def is_enough(staged: Staged) -> bool:
        counts.update(staged.unit.counts if staged.unit is not None else {})
        return bool(options.max_bad.exceeded(counts))

    if (reason := options.max_bad.exceeded(counts)) and _has_units(store):
        return reason
    try:
        engine.execute(stage, store, run, workers=options.workers, enough=is_enough)
    except TokensDiffer as error:
        use_exact_tokenizer(store, run, error.summary)
        folding.fold(store, run)  # removes the units that are void now
        raise AbortError(
            f"{error}. Nothing that was tokenised since the last commit is kept",
            "Run the same command again with --exact-tokenizer: it goes on where it stopped, and the store keeps it. "
            "What was committed before passed its samples. To be sure of it, chunk its inputs into another store with "
            "--exact-tokenizer and compare the contents that retrotool verify prints.",
        ) from error
    return options.max_bad.exceeded(counts) if _has_units(store) else ""


def _has_units(store: Store) -> bool:
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in unfinished_plans(state)]
    return any(record["done"] < record["units"] for record in records)


def check_chunk_length(chunk_length: int | None) -> None:
    """``UsageError`` for a length that no store has."""
    if chunk_length is not None and not 1 <= chunk_length <= 4096:
        raise UsageError(f"--chunk-length {chunk_length} is not between 1 and 4096")


def open_or_create(storage: Storage, tokenizer: str | None, chunk_length: int | None) -> tuple[Store, Tokenizer | None]:
    """The store in a storage, made if there is none, and its tokenizer if that was loaded.

    ``UsageError`` if the store goes by another tokenizer or chunk length.
    """
    check_chunk_length(chunk_length)
    if not _is_utf8(storage.place):
        raise UsageError(f"{storage.place!a}: a store's path must be UTF-8", "Give the store another name.")
    loaded: Tokenizer | None
    if not is_store(storage):
        loaded = Tokenizer(find_tokenizer(tokenizer or BUNDLED))
        store = Store.create(storage, loaded.identity, loaded.file.content, chunk_length or CHUNK_LENGTH)
    else:
        store = Store.open(storage)
        loaded = Tokenizer(find_tokenizer(tokenizer)) if tokenizer else None
    check_store_identity(store, tokenizer, loaded, chunk_length)
    return store, loaded


def check_store_identity(store: Store, name: str | None, tokenizer: Tokenizer | None, chunk_length: int | None) -> None:
    """``UsageError`` if the store goes by another tokenizer or chunk length than what was asked for."""
    own = store.identity
    wanted = own.tokenizer.sha256 if tokenizer is None else tokenizer.identity.sha256
    if wanted != own.tokenizer.sha256:
        raise UsageError(
            f"{store.place} was made with the tokenizer {own.tokenizer.name!r} (sha256 {own.tokenizer.sha256[:12]}…); "
            f"{name!r} is another ({wanted[:12]}…)",
            "Leave --tokenizer out to go on with the store's own, or make a new store.",
        )
    if chunk_length not in (None, own.chunk_length):
        raise UsageError(
            f"{store.place} has chunks of {own.chunk_length} tokens, not {chunk_length}",
            "Leave --chunk-length out, or make a new store.",
        )


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


def _reasons(
    store: Store, plans: Sequence[str], units: Sequence[Unit], read_again: Collection[str]
) -> tuple[tuple[RejectedReason, ...], int]:
    """Reasons why rows of some plans were rejected, the most frequent first, and how many stand for damage.

    Reasons that are alike but for numbers are one.
    """
    found: dict[str, RejectedReason] = {}
    damaged = 0
    entries = [(slot.partition(".")[0], entry) for slot, entry in store.state.group("quarantine").items()]
    entries += [(unit.plan, unit.quarantine) for unit in units if unit.quarantine is not None]
    columns, again = ["input", "line", "reason", "excerpt", "damage"], pa.array(read_again, pa.string())
    tables = (
        (plan, table) for plan, entry in entries if plan in plans for table in parts.read_tables(store, entry, columns)
    )
    for plan, table in tables:
        if plan != plans[-1]:
            table = table.filter(pc.invert(pc.is_in(table["input"], again)))
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


def note_empty_columns(
    store: Store, new: Sequence[int], keep: Sequence[str], known: int, note: Callable[[str], object]
) -> None:
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
