"""``purge``: select, confirm, commit, erase."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from retrotool import engine
from retrotool.commands.writing import writing
from retrotool.errors import UsageError
from retrotool.stages import purge as selecting
from retrotool.stages.erase import EraseStage
from retrotool.stages.purge import Ids, Report, Selection
from retrotool.store import staging
from retrotool.store.clean import clean
from retrotool.store.log import Draft
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """What ``purge`` did, or would do.

    ``purge`` is empty if there was nothing to do. ``erased`` counts the chunks whose bytes are gone, ``blocked`` the
    ids and texts that are kept from coming back, and were not before.
    """

    purge: str
    chunks: int
    documents: int
    tokens: int
    already_purged: int
    share: float
    erased: int
    files_rewritten: int
    blocked: int
    dry_run: bool
    commit: int
    examples: tuple[int, ...] = field(default=())


def select(
    store: Store, kind: str, value: str, *, resume_erase: bool = False, report: Report = lambda _: None
) -> Selection:
    """Select chunks by ``ids`` or ``documents`` (a file, one a line), ``where`` or ``pattern`` (an expression).

    A purge by the same selector may have been interrupted in its erase, so that its documents can't be found any more:
    then missing ones are no error, and with ``resume_erase`` its chunks are selected too.
    """
    lines: list[str] = []
    literal = value
    if kind in ("ids", "documents"):
        try:
            lines = Path(value).read_text("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            raise UsageError(f"{value} can't be read: {error.strerror}", "Give a file with one id a line.") from error
        literal = "\n".join(lines)
    earlier = selecting.same_selector(store, kind, literal)
    match kind:
        case "ids":
            chunks = selecting.select_ids(store, lines)
        case "documents":
            chunks = selecting.select_documents(store, lines, missing_ok=bool(earlier), report=report)
        case "where":
            chunks = selecting.select_where(store, value, report)
        case "pattern":
            chunks = selecting.select_pattern(store, value, report)
        case _:
            raise UsageError(f"there is no selector {kind!r}", "Known are ids, documents, where and pattern.")
    found = [chunks]
    if resume_erase:
        found += [read_tombstones(store, purge).ids for purge, erased in earlier.items() if not erased]
    return selecting.weigh(store, kind, literal, np.unique(np.concatenate(found)))


def purge(
    root: str | Path,
    kind: str,
    value: str,
    *,
    reason: str,
    dry_run: bool = False,
    erase: bool = False,
    confirm: Callable[[PurgeResult], bool] = lambda _: True,
) -> PurgeResult:
    """Purge what a selector (see ``select``) matches, and erase it if asked to.

    ``confirm`` is asked with what would be done, unless it is a dry run; False leaves everything as it is.
    """
    if not reason.strip():
        raise UsageError("--reason is empty", "Say why, in words that name no person: it stays in the log for ever.")
    store = Store.open(root)
    total = len(store.state.parts())
    with tqdm(total=total, unit="part", desc="select", disable=None, delay=2, file=sys.stderr) as bar:
        selection = select(store, kind, value, resume_erase=erase, report=bar.update)
    chunks = len(selection.living)
    alive = int(store.state.records.get("totals", {}).get("chunks", 0))
    base: dict[str, Any] = {
        "chunks": chunks, "documents": selection.documents, "tokens": selection.tokens,
        "already_purged": len(selection.chunks) - chunks, "share": chunks / alive if alive else 0.0,
        "blocked": selection.newly_blocked, "examples": tuple(selection.living[:10].tolist()),
    }  # fmt: skip
    planned = PurgeResult("", **base, erased=0, files_rewritten=0, dry_run=dry_run, commit=store.state.number)
    if dry_run or (chunks and not confirm(planned)):
        return planned
    purged, erased, rewritten = "", 0, 0
    with writing(store) as run:  # also with nothing to purge: an interrupted erase may have left files to take away
        # Purges of before there were block lists are made good. An erase needs a purge that names all its chunks, or it
        # could not be gone on with after a kill.
        uncovered = erase and len(selection.chunks) and not _is_covered(store, selection)
        if chunks or selection.newly_blocked or uncovered:
            purged = selecting.commit_purge(store, run, selection, reason)
        if erase and len(selection.chunks):
            erased, rewritten = _erase(store, run, selection.chunks)
    return PurgeResult(
        purged, **base, erased=erased, files_rewritten=rewritten, dry_run=False, commit=store.refresh().number
    )


def _is_covered(store: Store, selection: Selection) -> bool:
    """Whether purges of the same selector name all chunks of a selection."""
    purges = selecting.same_selector(store, selection.kind, selection.literal)
    named = [read_tombstones(store, purge).ids for purge in purges]
    return bool(named) and bool(np.isin(selection.chunks, np.concatenate(named)).all())


def _erase(store: Store, run: Run, chunks: Ids) -> tuple[int, int]:
    """Erase tombstoned chunks; return how many chunks and how many files were rewritten."""
    victims = Tombstones(chunks[read_tombstones(store).contains(chunks)])
    stage = EraseStage(tuple(victims.ids.tolist()))
    rewritten = sum(task.weight for task in stage.plan(store))
    engine.execute(stage, store, run)
    done = selecting.purges_within(store, victims)

    def build(state: State) -> Draft | None:
        records = {f"purge:{p}": {**state.records[f"purge:{p}"], "erased": True} for p in done}
        selectors = [entry.path for p in done if (entry := state.file("selectors", p)) is not None]
        return Draft("erase", {"purges": done}, remove=tuple(selectors), records=records) if done else None

    store.commit(run, build)
    # Staged tasks of others that had read the old files can't be committed any more; their files must not stay.
    staging.fold(store, run)
    clean(store, thorough=True)
    return len(victims), rewritten
