"""``chunk``: plan, work the units, finish; and begin again with the slow tokenizer if the fast one is found wrong."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from retrotool import engine, sources
from retrotool.commands.limits import MaxBad
from retrotool.commands.writing import writing
from retrotool.errors import UsageError
from retrotool.sources import Fields, InputFile, find_inputs
from retrotool.sources.files import STANDARD_INPUT
from retrotool.sources.spool import spool
from retrotool.stages.chunk import ChunkStage
from retrotool.stages.chunk_plan import Wanted, commit_plan, known_findings, may_be_fast, read_plan, unfinished_plans
from retrotool.stages.duplicates import DuplicateCounts, finish_plans
from retrotool.stages.repeats import BY_TEXT
from retrotool.stages.retry_plan import commit_retry
from retrotool.stages.withdraw import go_on_exactly
from retrotool.store import disk, parts
from retrotool.store.runs import Run
from retrotool.store.staging import PLAN_COUNTS, Staged
from retrotool.store.store import Store
from retrotool.tokenizers import (
    BUNDLED,
    FastTokenizer,
    Findings,
    Tokenizer,
    TokenizerFile,
    TokensDiffer,
    find_tokenizer,
    library_versions,
)  # fmt: skip

CHUNK_LENGTH = 64
PART_SIZE = 1 << 20
Duplicates = Literal["skip", "keep", "fail"]
_SPOOL_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class SetAsideReason:
    """A reason why rows were set aside, how many, and where the first is."""

    reason: str
    rows: int
    input: str
    line: int


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What ``chunk`` did for the inputs given, units committed by an earlier, interrupted run included.

    ``stopped`` says why not all was done; "" if it was. ``duplicates`` are documents left out for their text;
    ``blocked`` those that were purged once. Of ``compared`` documents the fast tokenizer's tokens were held against
    those of ``tokenizers``; ``exact`` ones only ``tokenizers`` did.
    """

    documents: int
    chunks: int
    tokens: int
    set_aside: int
    blocked: int
    damaged: int
    keys_cut: int
    compared: int
    exact: int
    duplicates: int
    parts: int
    known_inputs: int
    commit: int
    stopped: str = ""
    reasons: tuple[SetAsideReason, ...] = ()
    duplicates_by_source: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """How ``chunk`` goes about it; see the command's help."""

    fields: Fields = field(default_factory=Fields)
    part_size: int = PART_SIZE
    workers: int = 1
    skip_missing: bool = False
    duplicates: Duplicates = "skip"
    add_changed: bool = False
    allow_purged: bool = False
    max_bad: MaxBad = field(default_factory=MaxBad)
    check: float = 0.001
    note: Callable[[str], object] = str


def chunk(
    root: str | Path,
    inputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    chunk_length: int | None = None,
    retry_quarantine: bool = False,
    options: ChunkOptions | None = None,
    **changes: Any,
) -> ChunkResult:
    """Chunk inputs into a store, making it if there is none.

    ``changes`` are fields of ``ChunkOptions``. With more than one worker, a script must call this below
    ``if __name__ == "__main__":``, as processes are spawned.
    """
    chosen = _checked(replace(options or ChunkOptions(), **changes))
    if not inputs and not retry_quarantine:
        raise UsageError(
            "no input was given", "Name files or folders, or retry what was set aside: --retry-quarantine."
        )
    # Before anything is made: what can't be read must leave nothing behind.
    files = find_inputs([name for name in inputs if name != STANDARD_INPUT])
    for file in files:
        sources.check(file, chosen.fields)
    store, loaded = open_or_create(Path(root), tokenizer, chunk_length)
    spooled = None
    if STANDARD_INPUT in inputs:
        spooled = spool(sys.stdin.buffer, spool_folder(store))
        files = find_inputs(inputs, spooled)
    with writing(store) as run:
        plans = list(unfinished_plans(store.state))
        known = 0
        if retry_quarantine:
            plans += commit_retry(store, run)
        if files:
            findings = _findings(store, files, loaded)
            wanted = Wanted(chosen.fields, chosen.part_size, chosen.allow_purged, chosen.add_changed, findings)
            plan, known = commit_plan(store, run, files, wanted)
            plans += [plan] if plan else []
        stopped = _work(store, run, plans, chosen)
        repeats = finish_plans(store, run, duplicates=chosen.duplicates) if not stopped else {}
        clear_spool(store, spooled)
    return _result(store, plans, known, stopped, repeats if chosen.duplicates == "skip" else {})


def spool_folder(store: Store) -> Path:
    """Where standard input lies until it is chunked."""
    return store.root / "spool"


def clear_spool(store: Store, own: Path | None) -> None:
    """Remove what was standard input and is chunked: the caller's, and what dead runs left."""
    folder = spool_folder(store)
    if not folder.is_dir():
        return
    state = store.refresh()
    plans = [entry for plan in unfinished_plans(state) if (entry := state.file("plans", plan)) is not None]
    waiting = {file.path for entry in plans for file in read_plan(store, entry).files}
    for path in folder.iterdir():
        # Another process may be about to plan what it has just written.
        stale = time.time() - path.stat().st_mtime > _SPOOL_SECONDS
        if str(path.absolute()) not in waiting and (path == own or stale):
            disk.unlink(path)


def _findings(store: Store, files: Sequence[InputFile], loaded: Tokenizer | None) -> Findings | None:
    """What there is to know about the fast tokenizer, if it will be used and is not known yet."""
    known = known_findings(store.state)
    if not may_be_fast(store.state, files) or (known is not None and known.versions == library_versions()):
        return None
    exact = loaded or Tokenizer(TokenizerFile(store.identity.tokenizer.name, store.tokenizer_json()))
    return FastTokenizer(exact).findings


def _checked(options: ChunkOptions) -> ChunkOptions:
    fields = replace(options.fields, keep=tuple(dict.fromkeys(options.fields.keep)))
    for name in fields.keep:
        if name in parts.RESERVED_COLUMNS or not name:
            raise UsageError(
                f"--keep {name}: the store has a column of this name already", "Rename the field in the input."
            )
    if options.part_size < 1 or options.part_size >= 1 << 31:
        raise UsageError(f"--part-size {options.part_size} is not between 1 and 2^31 - 1")
    if (fields.key is None) != (fields.value is None):
        raise UsageError("--key-field and --value-field go together", "Give both, or neither.")
    if not 0 <= options.check <= 1:
        raise UsageError(f"--check {options.check} is not a share between 0 and 1")
    return replace(options, fields=fields)


def _work(store: Store, run: Run, plans: Sequence[str], options: ChunkOptions) -> str:
    """Work all units; why it stopped before, or ""."""
    stage = ChunkStage(options.skip_missing, options.check)
    while True:
        watch = _Watch(store, plans, options.max_bad)
        if reason := watch.reason():
            return reason
        try:
            engine.execute(stage, store, run, workers=options.workers, enough=watch)
        except TokensDiffer as error:
            options.note(f"{error}. Going on with tokenizers; what was not compared is done again.")
            go_on_exactly(store, run, str(error))
            continue
        return watch.reason() if unfinished_units(store) else ""


def unfinished_units(store: Store) -> bool:
    """Whether a plan has units that are not done."""
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in unfinished_plans(state)]
    return any(record["done"] < record["units"] for record in records)


class _Watch:
    """Counts what is set aside, and says when it is too much."""

    def __init__(self, store: Store, plans: Sequence[str], limit: MaxBad) -> None:
        state = store.refresh()
        records = [state.records[f"plan:{plan}"] for plan in plans]
        self._counts = {name: sum(record.get(name, 0) for record in records) for name in PLAN_COUNTS}
        # What an input that is retried had set aside does not count against it.
        for record in records:
            for name, n in record.get("forgiven", {}).items():
                self._counts[name] -= n
        self._limit = limit

    def reason(self) -> str:
        """Why the run must stop; "" if it may go on."""
        return self._limit.exceeded(self._counts)

    def __call__(self, staged: Staged) -> bool:
        if staged.unit is not None:
            for name in PLAN_COUNTS:
                self._counts[name] += staged.unit.counts.get(name, 0)
        return bool(self.reason())


def _result(
    store: Store, plans: Sequence[str], known: int, stopped: str, repeats: Mapping[str, DuplicateCounts]
) -> ChunkResult:
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in plans]
    counts = {name: sum(int(record.get(name, 0)) for record in records) for name in (*PLAN_COUNTS, "parts")}
    repeating = Counter[str]()
    for counts_of_plan in repeats.values():
        repeating.update({source: by_text for source, (_, by_text) in counts_of_plan.largest() if by_text})
    return ChunkResult(
        **counts,
        duplicates=sum(record["duplicates_by_text"] for record in records if record.get("duplicates") == "skip"),
        known_inputs=known,
        commit=state.number,
        stopped=stopped,
        reasons=_reasons(store, plans),
        duplicates_by_source=dict(repeating),
    )


def open_or_create(root: Path, tokenizer: str | None, chunk_length: int | None) -> tuple[Store, Tokenizer | None]:
    """The store at ``root``, made if there is none, and its tokenizer if that was loaded.

    ``UsageError`` if the store goes by another tokenizer or chunk length.
    """
    if chunk_length is not None and not 1 <= chunk_length <= 4096:
        raise UsageError(f"--chunk-length {chunk_length} is not between 1 and 4096")
    loaded: Tokenizer | None
    if not (root / "store.json").exists():
        loaded = Tokenizer(find_tokenizer(tokenizer or BUNDLED))
        store = Store.create(root, loaded.identity, loaded.file.content, chunk_length or CHUNK_LENGTH)
    else:
        store = Store.open(root)
        loaded = Tokenizer(find_tokenizer(tokenizer)) if tokenizer else None
    own = store.identity
    wanted = own.tokenizer.sha256 if loaded is None else loaded.identity.sha256
    if wanted != own.tokenizer.sha256:
        raise UsageError(
            f"{root} was made with the tokenizer {own.tokenizer.name!r} (sha256 {own.tokenizer.sha256[:12]}…); "
            f"{tokenizer!r} is another ({wanted[:12]}…)",
            "Leave --tokenizer out to go on with the store's own, or make a new store.",
        )
    if chunk_length not in (None, own.chunk_length):
        raise UsageError(
            f"{root} has chunks of {own.chunk_length} tokens, not {chunk_length}",
            "Leave --chunk-length out, or make a new store.",
        )
    return store, loaded


def _reasons(store: Store, plans: Sequence[str]) -> tuple[SetAsideReason, ...]:
    """Reasons why rows of some plans were set aside, the most frequent first."""
    found: dict[str, SetAsideReason] = {}
    group = store.state.group("quarantine")
    for slot in group:
        entry = group.get(slot)
        if entry is None or slot.partition(".")[0] not in plans:
            continue
        table = parts.read_parquet(store, entry, ["input", "line", "reason"])
        grouped = table.filter(pc.not_equal(table["reason"], BY_TEXT)).group_by("reason", use_threads=False)
        for row in grouped.aggregate([("input", "first"), ("line", "first"), ("reason", "count")]).to_pylist():
            reason = row["reason"]
            old = found.get(reason) or SetAsideReason(reason, 0, row["input_first"], row["line_first"])
            found[reason] = replace(old, rows=old.rows + row["reason_count"])
    return tuple(sorted(found.values(), key=lambda reason: -reason.rows))
