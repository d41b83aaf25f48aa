"""``purge``: select, confirm, commit, erase; and ``scan``, one share of the scan of a purge, for a job array.

Another process may purge or erase at the same time. What was selected, or begun to be erased, on a view that another
commit has overtaken is selected, or planned, again; ``confirm`` is asked again if that changes what it was asked.

The jobs of an array share the scan of the purge that is to follow, which finds it done as it asks for the same. Each
job begins with its own share of the parts and continues with what no other has begun, so the others finish the share
of a job that dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from retrotool import engine
from retrotool.cli.result_files import check_file, written
from retrotool.embed.search_scope import purges_erased
from retrotool.engine.progress import counting
from retrotool.errors import UsageError
from retrotool.neighbours.dependents import Dependent, dependents
from retrotool.purge.commit import commit_purge
from retrotool.purge.erase_run import (
    ELSEWHERE,
    clear,
    erase_chunks,
    until_not_overtaken,
)
from retrotool.purge.purged_chunks import count_rows
from retrotool.purge.review import Review, review
from retrotool.purge.same_text import NO_TEXT, SameText, find_same_text
from retrotool.purge.select import Match, Selection, Selectors, same_selector, select, signed
from retrotool.purge.selectors.scan import ScanStage
from retrotool.store.folding import writing
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """What ``purge`` did, or would do.

    ``purge`` is empty if there was nothing to do; ``purges`` are those that an erase was of: this, or, if it did no
    more than go on with them, those by the same selectors before, the newest first. ``unerased`` counts the selected
    chunks, copies included, that an erase has still to take, and ``unerased_share`` is their share of all chunks that
    the store ever had. ``erased`` counts the chunks whose bytes are gone; among them are those of ``copies``, documents
    that a ``chunk`` had set aside because they repeat one that is erased. ``blocked`` counts the hashes of ids, texts
    and tokens that were not on the block list before. ``not_reached`` says what an erase never reaches.
    ``dependents`` are the stores with neighbours in this one, which an erase does not reach. ``same_text``: documents
    that stay, and have the text of one that was selected and is not live, as a ``chunk`` had rejected it. ``matches``
    are how many chunks each selector means. A dry run has a ``review``, and ``out`` is the file that it
    wrote the ids of the ``chunks`` to ("": none was asked for).
    """

    purge: str
    chunks: int
    documents: int
    tokens: int
    already_purged: int
    share: float
    unerased: int
    unerased_share: float
    erased: int
    copies: int
    files_rewritten: int
    blocked: int
    dry_run: bool
    commit: int
    examples: tuple[int, ...] = field(default=())
    not_reached: tuple[str, ...] = field(default=())
    dependents: tuple[Dependent, ...] = field(default=())
    matches: tuple[Match, ...] = field(default=())
    same_text: SameText = NO_TEXT
    purges: tuple[str, ...] = field(default=())
    review: Review | None = None
    out: str = ""


def purge(
    root: str | Path,
    selectors: Selectors,
    *,
    reason: str,
    who: str | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    erase: bool = False,
    confirm: Callable[[PurgeResult], bool] = lambda _: True,
) -> PurgeResult:
    """Purge what selectors mean, and erase it if asked to.

    ``reason`` and ``who`` (None: the user of this process) stay in the log. ``confirm`` is asked with what would be
    done, unless it is a dry run; False leaves everything as it is. ``out``: a new file for the ids of the chunks that
    a dry run selects and that are not purged yet, one a line, which ``Selectors.ids`` reads.
    """
    who = signed(reason, who)
    if out is not None:
        _check_out(out, dry_run)
    store = Store.open(root)
    request = selectors.read(store)
    agreed: PurgeResult | None = None

    def attempt() -> PurgeResult:
        nonlocal agreed
        if request.scan is not None and not request.scan.is_done(store):
            with writing(store) as run:
                engine.execute(request.scan, store, run)
        total = len(request.lookups) * len(store.state.parts())
        with counting("select", "part", total) as report:
            selection = select(store, request, erase=erase, report=report)
        planned = _planned(store, selection, dry_run)
        if dry_run:
            if out is not None:
                _write_ids(out, selection)
            return replace(planned, review=review(store, selection), out=str(out or ""))
        if (planned.chunks or planned.unerased) and not _is_alike(planned, agreed):
            if not confirm(planned):
                return planned
            agreed = planned
        return _carry_out(store, selection, planned, reason, who, erase)

    return until_not_overtaken(store, attempt)


def _check_out(out: str | Path, dry_run: bool) -> None:
    if not dry_run:
        raise UsageError("--out is for the ids that a dry run selects", "Give --dry-run, too.")
    check_file("--out", out)
    if Path(out).exists():
        raise UsageError(f"--out {out} exists already", "Name a file that does not.")


def _write_ids(out: str | Path, selection: Selection) -> None:
    with written(out) as path, path.open("w", encoding="ascii") as file:
        file.writelines(f"{chunk}\n" for chunk in selection.live.tolist())


def _planned(store: Store, selection: Selection, dry_run: bool) -> PurgeResult:
    """What a selection would do, if nothing else happened."""
    state = store.state
    chunks = len(selection.live)
    alive = int(state.records.get("totals", {}).get("chunks", 0))
    rows = count_rows(store)
    return PurgeResult(
        "", chunks, selection.documents, selection.tokens,
        already_purged=len(selection.chunks) - chunks, share=chunks / alive if alive else 0.0,
        unerased=selection.unerased, unerased_share=selection.unerased / rows if rows else 0.0,
        erased=0, copies=selection.copied, files_rewritten=0, blocked=selection.newly_blocked,
        dry_run=dry_run, commit=state.number, examples=tuple(selection.live[:10].tolist()),
        matches=selection.matches, same_text=find_same_text(store, selection.chunks),
    )  # fmt: skip


def _is_alike(planned: PurgeResult, agreed: PurgeResult | None) -> bool:
    """Whether what is planned takes no more than what was agreed to."""
    return agreed is not None and planned.chunks <= agreed.chunks and planned.unerased <= agreed.unerased


def _carry_out(
    store: Store, selection: Selection, planned: PurgeResult, reason: str, who: str, erase: bool
) -> PurgeResult:
    """Commit a purge, and erase."""
    purged, erased, rewritten = "", 0, 0
    with writing(store) as run:  # also with nothing to purge: an interrupted erase may have left files to take away
        # Purges of before there were block lists are made good. An erase needs a purge that names all its chunks, or it
        # could not be gone on with after a kill.
        uncovered = erase and not _is_covered(store, selection)
        if planned.chunks or planned.blocked or uncovered:
            purged = commit_purge(store, run, selection, reason, who)
        if erase:
            victims = np.union1d(selection.chunks, selection.copies)
            naming = (purged,) if purged else tuple(same_selector(store, selection.request))
            erased, rewritten = until_not_overtaken(store, lambda: erase_chunks(store, run, victims, naming))
            clear(store, run)
    state = store.refresh()
    records = state.with_prefix("purge:")
    before = sorted(same_selector(store, selection.request), key=lambda purge: -int(records[purge]["commit"]))
    of = (purged,) if purged else tuple(before)
    return replace(
        planned, purge=purged, purges=of if erased else (), erased=erased, files_rewritten=rewritten,
        commit=state.number,
        not_reached=(ELSEWHERE,) if erased and state.names("index") else (),
        dependents=tuple(dependents(store)) if erase and purges_erased(store) else (),
    )  # fmt: skip


def _is_covered(store: Store, selection: Selection) -> bool:
    """Whether purges of the same selector name all chunks of a selection, and all copies."""
    purges = same_selector(store, selection.request)
    named = [np.zeros(0, np.int64), *(read_tombstones(store, purge).ids for purge in purges)]
    return bool(np.isin(np.union1d(selection.chunks, selection.copies), np.concatenate(named)).all())


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What a share of a scan did: ``parts`` scanned by this run, of ``of`` in the store.

    ``elsewhere`` are parts that other living runs are at. ``done``: all are scanned.
    """

    parts: int
    of: int
    elsewhere: int
    done: bool
    commit: int


def scan(root: str | Path, selectors: Selectors, shard: tuple[int, int]) -> ScanResult:
    """Scan the parts of job ``shard`` (i, n), i from 0, and then those that no other job has begun."""
    engine.check_shard(shard)
    store = Store.open(root)
    scanned = selectors.read(store).scanned
    if not scanned:
        raise UsageError(
            "--shard shares the scan that selectors by content need, and none is given",
            "What is looked up (--ids, --documents, --where, --duplicates) is purged without it.",
        )
    stage = ScanStage(scanned, shard)
    parts = 0

    def count(_: Staged) -> bool:
        nonlocal parts
        parts += 1
        return False

    with writing(store) as run:
        engine.execute(stage, store, run, enough=count)
        elsewhere = engine.count_elsewhere(stage, store, run)
    return ScanResult(parts, len(store.state.parts()), elsewhere, stage.is_done(store), store.state.number)
