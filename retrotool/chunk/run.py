"""``chunk``: plan, work the units, finish."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from retrotool.chunk.chunk_result import (
    ChunkResult,
    counts_of,
    note_empty_columns,
    result_of,
)
from retrotool.chunk.deduplicate import DuplicateCounts, finish_plans
from retrotool.chunk.stage import ChunkStage
from retrotool.cli.command_lines import command_line
from retrotool.errors import AbortError, UsageError
from retrotool.sources import InputFile, find_inputs
from retrotool.sources.inputs import STANDARD_INPUT, is_spooled, spool
from retrotool.store import folding, leases, parts
from retrotool.store.folding import writing
from retrotool.store.identity import is_store
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
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
    result = result_of(store, plans, changed, known, stopped, exceeded, repeats if chosen.duplicates == "skip" else {})
    note_empty_columns(store, sorted(set(store.state.all_parts()) - before), chosen.fields.keep, known, chosen.note)
    return result


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
