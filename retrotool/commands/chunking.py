"""``chunk``: plan, work the units, finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retrotool import engine
from retrotool.commands.writing import writing
from retrotool.errors import UsageError
from retrotool.sources import Fields, find_inputs
from retrotool.stages.chunk import ChunkStage
from retrotool.stages.chunk_plan import commit_plan, unfinished_plans
from retrotool.stages.duplicates import finish_plans
from retrotool.store import parts
from retrotool.store.staging import COUNTS
from retrotool.store.store import Store
from retrotool.tokenizers import BUNDLED, Tokenizer, find_tokenizer

CHUNK_LENGTH = 64
PART_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class SetAsideReason:
    """A reason why rows were set aside, how many, and where the first is."""

    reason: str
    rows: int
    input: str
    line: int


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What ``chunk`` did for the inputs given, units committed by an earlier, interrupted run included."""

    documents: int
    chunks: int
    tokens: int
    set_aside: int
    parts: int
    known_inputs: int
    commit: int
    reasons: tuple[SetAsideReason, ...] = ()


def chunk(
    root: str | Path,
    inputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    chunk_length: int | None = None,
    fields: Fields | None = None,
    part_size: int = PART_SIZE,
    workers: int = 1,
    skip_missing: bool = False,
) -> ChunkResult:
    """Chunk inputs into a store, making it if there is none.

    With more than one worker, a script must call this below ``if __name__ == "__main__":``, as processes are spawned.
    """
    fields = fields or Fields()
    fields = replace(fields, keep=tuple(dict.fromkeys(fields.keep)))
    for name in fields.keep:
        if name in parts.RESERVED_COLUMNS or not name:
            raise UsageError(
                f"--keep {name}: the store has a column of this name already", "Rename the field in the input."
            )
    if part_size < 1 or part_size >= 1 << 31:
        raise UsageError(f"--part-size {part_size} is not between 1 and 2^31 - 1")
    files = find_inputs(inputs)
    store = _open_or_create(Path(root), tokenizer, chunk_length)
    with writing(store) as run:
        before = set(unfinished_plans(store.state))
        plan, known = commit_plan(store, run, files, fields, part_size)
        plans = [*before, *([plan] if plan else [])]
        engine.execute(ChunkStage(skip_missing), store, run, workers=workers)
        finish_plans(store, run)
    state = store.refresh()
    records = [state.records[f"plan:{plan}"] for plan in plans]
    counts = {name: sum(int(record[name]) for record in records) for name in (*COUNTS, "parts")}
    return ChunkResult(**counts, known_inputs=known, commit=state.number, reasons=_reasons(store, plans))


def _open_or_create(root: Path, tokenizer: str | None, chunk_length: int | None) -> Store:
    if chunk_length is not None and not 1 <= chunk_length <= 4096:
        raise UsageError(f"--chunk-length {chunk_length} is not between 1 and 4096")
    if not (root / "store.json").exists():
        made = Tokenizer(find_tokenizer(tokenizer or BUNDLED))
        store = Store.create(root, made.identity, made.file.content, chunk_length or CHUNK_LENGTH)
        wanted = made.identity.sha256
    else:
        store = Store.open(root)
        wanted = Tokenizer(find_tokenizer(tokenizer)).identity.sha256 if tokenizer else store.identity.tokenizer.sha256
    own = store.identity
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
    return store


def _reasons(store: Store, plans: Sequence[str]) -> tuple[SetAsideReason, ...]:
    """Reasons why rows of some plans were set aside, the most frequent first."""
    found: dict[str, SetAsideReason] = {}
    group = store.state.group("quarantine")
    for slot in group:
        entry = group.get(slot)
        if entry is None or slot.partition(".")[0] not in plans:
            continue
        grouped = parts.read_parquet(store, entry).group_by("reason", use_threads=False)
        for row in grouped.aggregate([("input", "first"), ("line", "first"), ("reason", "count")]).to_pylist():
            reason = row["reason"]
            old = found.get(reason) or SetAsideReason(reason, 0, row["input_first"], row["line_first"])
            found[reason] = replace(old, rows=old.rows + row["reason_count"])
    return tuple(sorted(found.values(), key=lambda reason: -reason.rows))
