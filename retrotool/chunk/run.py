"""Run ``chunk``: plan, work the units, finish the plans, and report what was done and rejected."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrotool import engine, sources, tokenizers
from retrotool.chunk import CHUNK_LENGTH, chunk_plan
from retrotool.chunk.chunk_plan import ChunkOptions
from retrotool.chunk.deduplicate import BY_ID, BY_TEXT, DIFFERING, DuplicateCounts, finish_plans
from retrotool.chunk.quarantine import quarantine_files, without_numbers
from retrotool.chunk.stage import ChunkStage
from retrotool.cli import output
from retrotool.cli.options import check_utf8
from retrotool.engine.progress import Progress
from retrotool.errors import AbortError, CorruptError, ErasedError, StorageError, UsageError, listed
from retrotool.machine import user_name
from retrotool.sources import InputFile
from retrotool.sources.inputs import STANDARD_INPUT, is_spooled, spool
from retrotool.store import folding, leases, parts, staging
from retrotool.store.folding import writing
from retrotool.store.identity import is_store
from retrotool.store.leases import Run
from retrotool.store.staging import PLAN_COUNTS, Staged, Unit
from retrotool.store.storage import Storage, storage_at
from retrotool.store.store import Store
from retrotool.store.tombstones import standing_purges
from retrotool.tokenizers import FastTokenizer, Findings, Tokenizer, TokensDiffer, find_tokenizer

_CHECKED_PARTS = 64


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """A reason for rejected rows: how many, where the first one is, and its excerpt, if it was kept."""

    reason: str
    rows: int
    input: str
    line: int
    excerpt: str = ""


def merge_reasons(rows: Iterable[RejectedReason]) -> tuple[RejectedReason, ...]:
    """Merge reasons that differ only in numbers, which are then left out; the most frequent come first."""
    found: dict[str, RejectedReason] = {}
    for row in rows:
        kind = without_numbers(row.reason)
        old = found.get(kind, replace(row, rows=0))
        name = row.reason if row.reason == old.reason else kind
        found[kind] = replace(old, rows=old.rows + row.rows, reason=name)
    return tuple(sorted(found.values(), key=lambda reason: -reason.rows))


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """Result of ``chunk`` for the given inputs, including units that an interrupted run committed."""

    documents: int
    chunks: int
    tokens: int
    rejected: int
    blocked: int  # documents that were purged before
    unchanged: int  # documents that the store has already, with the same id and text
    damaged: int
    keys_cut: int
    hashed_ids: int  # documents without an id field, whose id is a hash of their content
    compared: int  # documents for which the fast tokenizer was compared with ``tokenizers``
    exact: int  # documents that only ``tokenizers`` tokenised
    duplicates: int  # documents skipped for their text
    parts: int
    known_inputs: int
    commit: int
    known_rejected: int = 0  # rows of the inputs that were known, which were rejected before
    duplicate_ids: int = 0  # documents skipped for their id, also among the ``reasons``
    stopped: str = ""  # why not everything was done
    reasons: tuple[RejectedReason, ...] = ()
    quarantine: tuple[str, ...] = ()  # Parquet files that list the rejected rows
    duplicate_examples: tuple[tuple[str, str], ...] = ()  # ids of some, and of documents with their text
    duplicates_by_source: Mapping[str, int] = field(default_factory=dict)
    differing: int = 0  # documents left out, as the store has another text under their ids
    differing_examples: tuple[str, ...] = ()  # some of their ids
    replaced: int = 0  # documents of the store that left it for new texts
    removed: int = 0  # documents of the store that left it, as their input does not have them any more
    purges: tuple[str, ...] = ()  # of these, each of which can be undone
    not_mirrored: tuple[str, ...] = ()  # inputs of which none was removed, and why


def chunk(
    root: str | Path,
    inputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    chunk_length: int | None = None,
    options: ChunkOptions | None = None,
    **changes: Any,
) -> ChunkResult:
    """Add inputs to a store as chunks; create the store if needed. Without inputs, resume interrupted work.

    ``changes`` are fields of ``ChunkOptions``. Several workers need an ``if __name__ == "__main__":`` guard.
    """
    chosen = check_options(replace(options or ChunkOptions(), **changes))
    storage = storage_at(root)
    if not inputs and not (is_store(storage) and chunk_plan.unfinished_plans(Store.open(storage).state)):
        raise UsageError("no input was given, and there is nothing to resume", "Name files or folders.")
    # Check all inputs before anything is created.
    files = find_readable([name for name in inputs if name != STANDARD_INPUT], chosen)
    repeats: dict[str, DuplicateCounts] = {}
    with contextlib.ExitStack() as stack:
        if STANDARD_INPUT in inputs:
            if engine.engine_in_use().name != "local":
                raise UsageError(
                    "standard input can't be read by other machines",
                    "Write it to a file that all of them see, or leave --engine out.",
                )
            stream, base = sys.stdin.buffer if sys.stdin else None, sources.base_of(chosen.format)
            files = find_readable(inputs, chosen, stack.enter_context(spool(stream, base or "jsonl")))
        check_rows(files, chosen)
        has_tokens = chosen.fields.tokens is not None or any(file.base == "tokens" for file in files)
        if has_tokens and tokenizer is None and not is_store(storage):
            raise UsageError("the input has token ids, whose tokenizer is not known", "Name it: --tokenizer TOKENIZER")
        store, loaded = _open_or_create(storage, tokenizer, chunk_length, chosen.note)
        before = store.state.all_parts()
        run = stack.enter_context(writing(store))
        plans = list(chunk_plan.unfinished_plans(store.state))
        _note_resumed(store, run, files, chosen)
        if chosen.exact_tokenizer:
            chunk_plan.use_exact_tokenizer(store, run, "--exact-tokenizer was given")
        known: dict[str, tuple[str, ...]] = {}
        changed: frozenset[str] = frozenset()
        resumed: set[str] = set()
        if files:
            with Progress("chunk", doing="checking the tokenizer"):
                findings = _findings(store, files, loaded, chosen)
            changed = frozenset(file.path for file in chunk_plan.changed_inputs(store, run, files, chosen))
            if changed and plans:
                # The documents of a changed input are known only when no plan is open.
                _work(store, run, plans, replace(chosen, max_bad=None), changed)
                repeats.update(finish_plans(store, run, duplicates=chosen.duplicates, existing=chosen.existing))
            plan, known = chunk_plan.commit_plan(store, run, files, chosen, findings)
            resumed = {path for path, read in known.items() if read and read[-1] in plans}
            plans += [plan] if plan else []
        open_plans = [plan for plan in plans if not store.state.records[f"plan:{plan}"]["finished"]]
        stopped = _work(store, run, open_plans, chosen)
        if engine.is_a_job() and chunk_plan.unfinished_plans(store.refresh()):
            chosen.note("Other jobs are doing the rest; the last one completes the plan.")
        if not stopped:
            with Progress("chunk", doing="looking for duplicates"):
                repeats.update(finish_plans(store, run, duplicates=chosen.duplicates, existing=chosen.existing))
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in plans]
    units = _waiting_units(store, plans)
    # Rows that were rejected before an input was read again do not count.
    reasons, damaged = _reasons(store, plans, units, changed)
    by_id = sum(reason.rows for reason in reasons if reason.reason == BY_ID)
    rejected = sum(reason.rows for reason in reasons) - by_id
    counts = {**_counts_of(store, plans), "rejected": rejected, "damaged": damaged}
    counts["unchanged"] = counts.pop("known_documents")
    left_out = [found.sources for found in repeats.values()] if chosen.duplicates == "skip" else []
    skipped = {path: read for path, read in known.items() if path not in resumed}
    known_rejected, listed = _rejected_before(store, skipped)
    listed += [store.where(entry.path) for plan in plans for entry in quarantine_files(state, plan)]
    listed += [store.where(unit.quarantine.path) for unit in units if unit.quarantine is not None]
    _note_known(store, before or state.all_parts(), chosen, known)
    if chosen.existing == "mirror" and before and any(Path(name).is_dir() for name in inputs):
        purge = f"""retrotool purge {shlex.quote(store.place)} --where "input = 'NAME'" --reason ..."""
        chosen.note(f"Documents of files that were deleted or renamed stay. To remove them: {purge}")
    return ChunkResult(
        **counts, known_inputs=len(skipped), known_rejected=known_rejected, commit=state.number, duplicate_ids=by_id,
        parts=sum(int(record["parts"]) for record in records) + sum(len(unit.parts) for unit in units),
        duplicates=sum(record["duplicates_by_text"] for record in records if record.get("duplicates") == "skip"),
        stopped=stopped, reasons=reasons, quarantine=tuple(listed),
        duplicate_examples=tuple(pair for one in repeats.values() for pair in one.copies),
        duplicates_by_source=dict(sum(left_out, Counter[str]())),
        **{name: sum(record.get(name, 0) for record in records) for name in ("differing", "replaced", "removed")},
        differing_examples=tuple(name for one in repeats.values() for name in one.examples),
        purges=tuple(purge for purge, record in standing_purges(state).items() if record.get("plan") in plans),
        not_mirrored=tuple(name for one in repeats.values() for name in one.not_mirrored),
    )  # fmt: skip


def _note_resumed(store: Store, run: Run, files: Sequence[InputFile], options: ChunkOptions) -> None:
    if leases.others(store.storage, run.id):
        return  # they may be reading them now
    store.refresh()
    given = {file.path for file in files}
    resumed: dict[InputFile, bool] = {}  # whether it was begun with other options
    for plan_id, _, plan in chunk_plan.open_plans(store):
        left = plan.units[store.state.records[f"plan:{plan_id}"]["done"] :]
        is_other = plan.fields != options.fields
        resumed.update((plan.files[piece.file], is_other) for unit in left for piece in unit)
    names = [file.path for file in resumed if file.path not in given and not is_spooled(file)]
    changed = [file.path for file, is_other in resumed.items() if is_other and file.path in given]
    skip = "" if options.exclude else " To leave an input out, add --exclude."
    if names:
        options.note(f"Resuming interrupted work: {listed(names[:1], len(names))}.{skip}")
    if changed:
        how = "is read to its end with the options that it was begun with, not those given now"
        options.note(f"Resuming interrupted work: {listed(changed[:1], len(changed))} {how}.{skip}")


def find_readable(inputs: Sequence[str], options: ChunkOptions, stdin: InputFile | None = None) -> list[InputFile]:
    """Return the files behind the inputs; raise ``UsageError`` if one can't be read with these options."""
    with _input_errors():
        base, encoding = sources.base_of(options.format), sources.encoding_of(options.encoding)
        found = sources.survey(inputs, stdin, base, encoding, options.exclude)
        for file in found.files:
            sources.check_input(file, options.fields, keep_end=options.keep_end)
            with file.open():
                pass
    if found.left_out:
        skipped = output.count(len(found.left_out), "file")
        options.note(f"{skipped} of unknown format skipped, such as {found.left_out[0]}. To read all: --format.")
    if found.excluded:
        if not found.files:
            raise UsageError("--exclude matches every input", "Change the pattern. Nothing was changed.")
        options.note(f"{output.count(len(found.excluded), 'path')} excluded, such as {found.excluded[0]}.")
    return found.files


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Raise ``UsageError`` for inputs that the system or their storage refuses."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", "Nothing was read or changed.") from error
    except StorageError as error:
        raise UsageError(str(error), error.advice) from error


def check_rows(files: Sequence[InputFile], options: ChunkOptions) -> None:
    """Check the first rows of inputs (``sources.check_heads``); note fields to keep that no input has."""
    with _input_errors():
        absent = sources.check_heads(files, options.fields, require_id=options.require_id)
    for name in absent:
        options.note(f"--keep {name}: none of the rows at the beginning of the inputs has this field.")


def _findings(
    store: Store, files: Sequence[InputFile], loaded: Tokenizer | None, options: ChunkOptions
) -> Findings | None:
    """Examine the fast tokenizer unless its findings are recorded; note if it is not used."""
    if not chunk_plan.may_be_fast(store.state, files):
        return None
    known, new = chunk_plan.known_findings(store.state), None
    why = "" if known is None else known.why
    if known is None or known.versions != tokenizers.library_versions():
        fast = FastTokenizer(loaded or tokenizers.stored_tokenizer(store))
        new, why = fast.findings, fast.why
    if why:
        options.note(f"Using only the tokenizers library, which is many times slower: {why}.")
    return new


def check_options(options: ChunkOptions) -> ChunkOptions:
    """Return the options without repeated fields; raise ``UsageError`` for invalid ones."""
    fields = options.fields
    always = ("source", "id") if fields.id == "id" else ("source",)
    fields = replace(fields, keep=tuple(name for name in dict.fromkeys(fields.keep) if name not in always))
    if options.format in ("u16", "u32"):
        fields = replace(fields, token_dtype=f"uint{options.format[1:]}")
    for value in (fields.text, fields.id, fields.key, fields.value, fields.tokens, fields.separator, *fields.keep):
        check_utf8("field or separator", value or "")
    check_utf8("RETROTOOL_WHO", user_name())
    if not all(Path(pattern).parts for pattern in options.exclude):
        raise UsageError("--exclude: a pattern is empty", "Give a name or a path, such as '*.html' or 'drafts/*'.")
    for name in fields.keep:
        if name in parts.RESERVED_COLUMNS or not name:
            advice = "Rename the field in the input."
            raise UsageError(f"--keep {name}: the store has its own column of this name", advice)
    for option, number, allowed, named in (
        ("--part-size", options.part_size, range(1, 1 << 31), "1 and 2^31 - 1"),
        ("--end-of-document", fields.end_of_document or 0, range(1 << 32), "0 and 2^32 - 1"),
        ("--max-document", fields.max_document, range(1, 1 << 40), "1 byte and 1 TiB"),
    ):
        if number not in allowed:
            raise UsageError(f"{option} {number} is not between {named}")
    if (fields.key is None) != (fields.value is None):
        raise UsageError("--key-field and --value-field must be given together", "Give both, or neither.")
    if fields.tokens is not None and (fields.key is not None or fields.value is not None):
        advice = "Key-value records are made of text; give one or the other."
        raise UsageError("--tokens-field can't be used with --key-field and --value-field", advice)
    if not 0 <= options.check <= 1:
        raise UsageError(f"check={options.check} is not a share between 0 and 1")
    return replace(options, fields=fields)


def _work(
    store: Store, run: Run, plans: Sequence[str], options: ChunkOptions, changed: frozenset[str] = frozenset()
) -> str:
    """Execute all units; return why it stopped early, or "". ``changed``: inputs that are read again."""
    stage = ChunkStage(options.exclude, changed, options.check, run.id)
    store.refresh()
    rejected = _counts_of(store, plans)["rejected"]

    def is_enough(staged: Staged) -> bool:
        nonlocal rejected
        rejected += 0 if staged.unit is None else staged.unit.counts["rejected"]
        return bool(_too_many(rejected, options))

    try:
        if not _too_many(rejected, options):
            engine.execute(stage, store, run, workers=options.workers, enough=is_enough, wait=options.wait)
    except TokensDiffer as error:
        chunk_plan.use_exact_tokenizer(store, run, error.summary)
        folding.fold(store, run)  # removes the units that are void now
        raise AbortError(
            f"{error}. Nothing that was tokenised since the last commit is kept",
            "Run the same command again: it resumes with tokenizers alone. What was committed before passed its "
            "samples. To check all of it, chunk its inputs into another store with --exact-tokenizer and compare the "
            "contents that retrotool verify prints.",
        ) from error
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in chunk_plan.unfinished_plans(state)]
    has_units = any(record["done"] < record["units"] for record in records)
    return _too_many(rejected, options) if has_units else ""


def _too_many(rejected: int, options: ChunkOptions) -> str:
    """Return why a run with so many rejected rows stops, or ""."""
    if options.max_bad is None or rejected <= options.max_bad:
        return ""
    return f"{output.count(rejected, 'row')} rejected, more than --max-bad {options.max_bad:,}"


def check_chunk_length(chunk_length: int | None) -> None:
    """Raise ``UsageError`` for a length that no store has."""
    if chunk_length is not None and not 1 <= chunk_length <= 4096:
        raise UsageError(f"--chunk-length {chunk_length} is not between 1 and 4096")


def _open_or_create(
    storage: Storage, tokenizer: str | None, chunk_length: int | None, note: Callable[[str], object]
) -> tuple[Store, Tokenizer | None]:
    check_chunk_length(chunk_length)
    check_utf8("store", storage.place)
    if is_store(storage):
        store = Store.open(storage)
        known = Tokenizer(find_tokenizer(tokenizer)) if tokenizer else None
        check_store_identity(store, tokenizer, known, chunk_length)
        return store, known
    loaded = Tokenizer(find_tokenizer(tokenizer or tokenizers.DEFAULT_TOKENIZER))
    store = Store.create(storage, loaded.identity, loaded.file.content, chunk_length or CHUNK_LENGTH)
    check_store_identity(store, loaded.file.name, loaded, chunk_length)  # another process may have created it
    kind = "lossless" if loaded.lossless else "loses case or spacing"
    note(f"New store. Its tokenizer, {loaded.file.name} ({kind}), can't be changed later.")
    return store, loaded


def check_store_identity(store: Store, name: str | None, tokenizer: Tokenizer | None, chunk_length: int | None) -> None:
    """Raise ``UsageError`` if the store has another tokenizer or chunk length than the given ones."""
    own = store.identity
    wanted = own.tokenizer.sha256 if tokenizer is None else tokenizer.identity.sha256
    if wanted != own.tokenizer.sha256:
        raise UsageError(
            f"{store.place} was made with the tokenizer {own.tokenizer.name!r} (sha256 {own.tokenizer.sha256[:12]}…), "
            f"not with {name!r} ({wanted[:12]}…)",
            "Leave --tokenizer out to use the store's, or create a new store.",
        )
    if chunk_length not in (None, own.chunk_length):
        advice = "Leave --chunk-length out, or create a new store."
        raise UsageError(f"{store.place} has chunks of {own.chunk_length} tokens, not {chunk_length}", advice)


def _waiting_units(store: Store, plans: Sequence[str]) -> list[Unit]:
    done = {plan: int(store.state.records[f"plan:{plan}"]["done"]) for plan in plans}
    units = [task.unit for task in staging.read_staged(store.storage).values() if task.unit is not None]
    return [unit for unit in units if unit.plan in done and unit.index >= done[unit.plan]]


def _counts_of(store: Store, plans: Sequence[str]) -> dict[str, int]:
    records = [store.state.records[f"plan:{plan}"] for plan in plans]
    units = _waiting_units(store, plans)
    return {
        name: sum(int(record.get(name, 0)) for record in records) + sum(unit.counts.get(name, 0) for unit in units)
        for name in PLAN_COUNTS
    }


def _reasons(
    store: Store, plans: Sequence[str], units: Sequence[Unit], read_again: Collection[str]
) -> tuple[tuple[RejectedReason, ...], int]:
    """Return the reasons for rejected rows, merged but for numbers, and how many rows stand for damage."""
    found: list[RejectedReason] = []
    damaged = 0
    state = store.state
    entries = [(plan, entry) for plan in plans for entry in chunk_plan.files_of_plan(state, "quarantine", plan)]
    entries += [(unit.plan, unit.quarantine) for unit in units if unit.quarantine is not None]
    columns, again = ["input", "line", "reason", "excerpt", "damage"], pa.array(read_again, pa.string())
    firsts = [(column, "first") for column in ("input", "line", "excerpt")]
    for plan, table in ((plan, table) for plan, entry in entries for table in parts.read_tables(store, entry, columns)):
        if plan != plans[-1]:
            table = table.filter(pc.invert(pc.is_in(table["input"], again)))
        damaged += int(pc.sum(table["damage"]).as_py() or 0)
        known = pc.is_in(table["reason"], pa.array([BY_TEXT, DIFFERING]))
        grouped = table.filter(pc.invert(known)).group_by("reason", use_threads=False)
        for row in grouped.aggregate([*firsts, ("reason", "count")]).to_pylist():
            first = (row["input_first"], row["line_first"], row["excerpt_first"] or "")
            found.append(RejectedReason(row["reason"], row["reason_count"], *first))
    return merge_reasons(found), damaged


def _rejected_before(store: Store, known: Mapping[str, Sequence[str]]) -> tuple[int, list[str]]:
    """Return how many rows of known inputs were rejected when last read, and the files that list them."""
    found: dict[str, int] = {}
    last = {path: plans[-1] for path, plans in known.items() if plans}
    for plan in sorted(set(last.values())):
        paths = pa.array([path for path in last if last[path] == plan], pa.string())
        for entry in quarantine_files(store.state, plan):
            with contextlib.suppress(ErasedError, CorruptError):  # which do not concern this run
                tables = parts.read_tables(store, entry, ["input"])
                rows = sum(pc.sum(pc.is_in(table["input"], paths)).as_py() or 0 for table in tables)
                found |= {store.where(entry.path): rows} if rows else {}
    return sum(found.values()), list(found)


def _note_known(store: Store, old: Sequence[int], options: ChunkOptions, known: Mapping[str, Collection[str]]) -> None:
    """Note options that do nothing for inputs that the store has."""
    what = f"{output.count(len(known), 'input')} already in the store"
    records = [store.state.records[f"plan:{plan}"] for plan in set().union(*known.values())]
    skipped = sum(one["duplicates_by_id"] + one["duplicates_by_text"] for one in records if "duplicates" in one)
    if options.duplicates == "keep" and skipped:
        options.note(f"--duplicates keep: {what} without duplicates, and not read again. A new store would keep them.")
    with contextlib.suppress(ErasedError):  # by another process
        entries = [parts.part_entry(store, "documents", part) for part in old[:_CHECKED_PARTS]]
        columns = {name for entry in entries for name in parts.read_schema(store, entry).names}
        lost = [name for name in options.fields.keep if name not in columns]
        if lost and known and old:
            options.note(f"--keep {', '.join(lost)}: {what} without it, and not read again. A new store would have it.")
