"""``purge --erase`` of purges that were made before; and what every erase consists of.

Another process may purge or erase at the same time. What was begun on a view that another commit has overtaken is
planned again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from retrotool import engine
from retrotool.embed.search_scope import purges_erased
from retrotool.errors import ConflictError, CorruptError, ErasedError, LostRunError, UsageError
from retrotool.index.index_files import measured_files
from retrotool.machine import cores, memory_of_machine
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.purge.erase import EraseStage, part_files
from retrotool.purge.purged_chunks import Ids, count_rows, count_unerased, erased_purges, has_any
from retrotool.purge.same_text import find_copies
from retrotool.purge.selectors import scan
from retrotool.store import disk, folding, log, paths
from retrotool.store.clean import clean
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.restored import PREFIX, check_not_restored, standing_purges
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, add_tombstones, read_tombstones

ATTEMPTS = 20
"""How often what another process has overtaken is begun again."""
ELSEWHERE = (
    "ids of what was erased, distances to it, and its text if materialised, "
    "where other stores have neighbours in this one"
)
_ROWS_A_WORKER = 1 << 16
"""Rows of parts that take some times what it takes to start a process."""
_WORKER_BYTES, _TIMES_A_PART = 1 << 29, 3
"""Memory of a process: this, and so many times the tokens and vectors of a part."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class EraseResult:
    """What an erase of earlier ``purges`` did, or is to do.

    ``unerased`` counts the chunks that it has still to take, copies included, and ``unerased_share`` is their share of
    all chunks that the store ever had. The rest as in ``PurgeResult``.
    """

    purges: tuple[str, ...]
    unerased: int
    unerased_share: float
    erased: int
    copies: int
    files_rewritten: int
    commit: int
    not_reached: tuple[str, ...] = field(default=())
    dependents: tuple[Dependent, ...] = field(default=())


def erase(
    root: str | Path,
    purges: Sequence[str] = (),
    *,
    older_than: float | None = None,
    confirm: Callable[[EraseResult], bool] = lambda _: True,
) -> EraseResult:
    """Erase the chunks of purges, given by their ids, or of all that are older than so many seconds.

    ``UsageError`` for one that the store has not. What is erased already is no error: an erase that was interrupted
    goes on. ``confirm`` is asked before anything is rewritten; False leaves everything as it is.
    """
    store = Store.open(root)

    def attempt() -> EraseResult:
        # Selected again each time: a purge may have been undone since the last attempt.
        wanted = tuple(_wanted(store, purges, older_than))
        chunks = [np.zeros(0, np.int64), *(read_tombstones(store, purge).ids for purge in wanted)]
        named = np.unique(np.concatenate(chunks))
        left = [purge for purge in wanted if not store.state.records[PREFIX + purge]["erased"]]
        asked = [np.zeros(0, np.int64), *(read_tombstones(store, purge).ids for purge in left)]
        copies, copied = find_copies(store, np.unique(np.concatenate(asked)))
        victims = np.union1d(named, copies)
        unerased = count_unerased(store, victims)
        planned = EraseResult(wanted, unerased, unerased / max(count_rows(store), 1), 0, copied, 0, store.state.number)
        if unerased and not confirm(planned):
            return planned
        with writing(store) as run:
            _name_copies(store, run, left, copies)
            erased, rewritten = until_not_overtaken(store, lambda: erase_chunks(store, run, victims, wanted))
            clear(store, run)
        state = store.refresh()
        return EraseResult(
            wanted, unerased, planned.unerased_share, erased, copied, rewritten, state.number,
            (ELSEWHERE,) if erased and state.names("index") else (),
            tuple(dependents(store)) if purges_erased(store) else (),
        )  # fmt: skip

    return until_not_overtaken(store, attempt)


def _wanted(store: Store, purges: Sequence[str], older_than: float | None) -> list[str]:
    """The ids of purges to erase."""
    records = store.state.with_prefix("purge:")
    for purge in purges:
        if purge not in records:
            known = f"it has: {', '.join(records)}" if records else "it has none"
            raise UsageError(f"{store.root} has no purge {purge!r}; {known}", f"See: retrotool info {store.root}")
        if "restored" in records[purge]:
            raise UsageError(f"the purge {purge!r} was taken back: its chunks are not purged", "Purge them again.")
    if older_than is None:
        return list(dict.fromkeys(purges))
    before = datetime.fromtimestamp(max(time.time() - older_than, 0.0), UTC)
    old = [
        purge
        for purge, record in records.items()
        if not (record["erased"] or "restored" in record)
        and (commit := log.read(store.root, int(record["commit"]))) is not None
        and datetime.fromisoformat(commit.time) < before
    ]
    return list(dict.fromkeys([*purges, *old]))


def _name_copies(store: Store, run: Run, purges: Sequence[str], copies: Ids) -> None:
    """Add ``copies`` to the tombstones of each purge that erases them and does not name them yet.

    Once their originals are erased nothing else tells copies: so an erase can be resumed after a kill. Cost: if there
    are any, that of ``find_copies`` for each purge.
    """
    for purge in purges:
        named = read_tombstones(store, purge).ids
        if not len(np.setdiff1d(copies, named)):
            continue
        own = copies if len(purges) == 1 else find_copies(store, named)[0]
        if len(new := np.setdiff1d(own, named)):
            _name(store, run, purge, new)


def _name(store: Store, run: Run, purge: str, new: Ids) -> None:
    """Add to what a purge names; ``ConflictError`` if it was undone, erased or added to by another process."""
    entry, before = add_tombstones(store, run.id, purge, new)

    def build(state: State) -> Draft:
        check_not_restored(state, (purge,))
        if state.records[PREFIX + purge]["erased"]:
            raise ConflictError("the purge is erased by another process, too", "Run the same command again.")
        return Draft("erase", {"purges": []}, add=(entry,), remove=(before,))

    try:
        store.commit(run, build)
    except (ConflictError, LostRunError):
        disk.unlink(paths.inside(store.root, entry.path))
        raise


def until_not_overtaken(store: Store, attempt: Callable[[], _Result]) -> _Result:
    """The result of ``attempt``; again on the newest state, as long as it is another process that makes it fail."""
    for _ in range(ATTEMPTS):
        seen = store.refresh().number
        try:
            return attempt()
        except (ErasedError, ConflictError, CorruptError):
            # Between being found and being read a file can be replaced, which then looks like damage.
            if store.refresh().number == seen:
                raise
    return attempt()


def erase_chunks(store: Store, run: Run, chunks: Ids, purges: Sequence[str]) -> tuple[int, int]:
    """Erase the chunks of ``purges``, which are tombstones; return how many chunks, and how many files were rewritten.

    ``ConflictError`` if one of the purges was undone before all were erased, or has more chunks by then.
    """
    victims = Tombstones(chunks)
    workers = _workers(store, victims)
    stage = EraseStage(victims, tuple(purges))
    rewritten = sum(task.weight for task in stage.tasks(store))
    engine.execute(stage, store, run, workers=workers)

    def build(state: State) -> Draft | None:
        done = erased_purges(store, victims)
        if any(not state.records[PREFIX + p]["erased"] and p not in done for p in purges):
            raise ConflictError("a purge has more chunks than when its erase began", "Run the same command again.")
        records = {f"purge:{p}": {**state.records[f"purge:{p}"], "erased": True} for p in done}
        # What other purges asked for, too, to take some of the victims, may name these.
        alike = [p for p in standing_purges(state) if has_any(store, p, victims)]
        gone = [entry.path for p in {*done, *alike} if (entry := state.file("selectors", p)) is not None]
        # What was measured of an index names the sources of documents: the victims' may be among them.
        gone += [path for name in state.names("index") for path in measured_files(state, name)] if done else []
        # Places in the text of victims, and what was looked for, hashed.
        gone += [path for name in state.names(scan.KIND) for path in scan.scan_files(state, name)] if done else []
        return Draft("erase", {"purges": done}, remove=tuple(gone), records=records) if done else None

    store.commit(run, build)
    return len(victims), rewritten


def _workers(store: Store, victims: Tombstones) -> int:
    """Processes for an erase: as many as there are cores, half the memory allows, and starting pays for."""
    several = [part_files(store, part) for part in victims.parts() if store.state.part_file("chunks", part)]
    rows = [max(entry.rows for entry in files if FileName.parse(entry.path).kind == "chunks") for files in several]
    if sum(rows) < 2 * _ROWS_A_WORKER:
        return 1
    vectors = [sum(entry.bytes for entry in files if entry.path.startswith("embeddings/")) for files in several]
    tokens = store.identity.chunk_length * store.identity.tokenizer.token_bytes
    most = max(n * tokens + bytes_ for n, bytes_ in zip(rows, vectors, strict=True))
    room = memory_of_machine() // 2 // (_WORKER_BYTES + _TIMES_A_PART * most)
    return max(1, min(cores(), len(several), room, sum(rows) // _ROWS_A_WORKER))


def clear(store: Store, run: Run) -> None:
    """Remove what may hold what was erased, and no commit names."""
    # Staged tasks of others that had read the old files can't be committed any more; their files must not stay.
    folding.fold(store, run)
    clean(store, run, thorough=True)
