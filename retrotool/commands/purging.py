"""``purge``: select, confirm, commit, erase.

Another process may purge or erase at the same time. What was selected, or begun to be erased, on a view that another
commit has overtaken is selected, or planned, again; ``confirm`` is asked again if that changes what it was asked.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from retrotool import engine
from retrotool.commands.counting import neighbours_command
from retrotool.commands.materialising import erase_consumed
from retrotool.commands.selecting import Selectors, check_text
from retrotool.commands.writing import writing
from retrotool.errors import ConflictError, CorruptError, ErasedError, RetrotoolError, UsageError
from retrotool.stages import purge as selecting
from retrotool.stages.consumers import Holding, holding, is_of_this, table_files
from retrotool.stages.database import erased_chunks
from retrotool.stages.erase import EraseStage
from retrotool.stages.index_files import measured_files
from retrotool.stages.purge import Selection
from retrotool.stages.selection import Asked, Ids, Match, Report, choose
from retrotool.store import staging
from retrotool.store.clean import clean, clean_spool
from retrotool.store.log import Draft
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

ATTEMPTS = 20
"""How often what another process has overtaken is begun again."""
_ELSEWHERE = (
    "ids of what was erased, distances to it, and its text if materialised, "
    "where other stores have neighbours in this one"
)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ConsumerLeft:
    """A store with neighbours in this one: what an erase did there, what may be left, and what to run there.

    ``materialised``: text may be left, as the store can't be written, or is not there. ``rewritten`` files had some.
    ``names``: tables name what was erased.
    """

    path: str
    table: str
    there: bool
    materialised: bool
    command: str
    rewritten: int = 0
    names: bool = True


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """What ``purge`` did, or would do.

    ``purge`` is empty if there was nothing to do. ``unerased`` counts the selected chunks, copies included, that an
    erase has still to take, and ``unerased_share`` is their share of all chunks that the store ever had. ``erased``
    counts the chunks whose bytes are gone; among them are those of ``copies``, documents that a ``chunk`` had set
    aside because they repeat one that is erased. ``blocked`` are the ids and texts that are kept from coming back, and
    were not before. ``left`` says, in sentences, where text may lie that an erase could not reach just now, and
    ``not_reached`` what may be there that it never reaches. ``consumers`` are other stores that name what was erased,
    by this purge or before, or could, as far as they are known. ``matches`` are how many chunks each selector means.
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
    left: tuple[str, ...] = field(default=())
    not_reached: tuple[str, ...] = field(default=())
    consumers: tuple[ConsumerLeft, ...] = field(default=())
    matches: tuple[Match, ...] = field(default=())


def select(store: Store, asked: Asked, *, erase: bool = False, report: Report = lambda _: None) -> Selection:
    """Select what is asked for; scans must have been done.

    A purge by the same selectors may have been interrupted in its erase, so that its documents can't be found any more:
    then missing ones are no error, and with ``erase`` its chunks, and the copies of these, are selected too.
    """
    earlier = selecting.same_selector(store, asked)
    chosen = choose(store, asked, missing_ok=bool(earlier), report=report)
    if not erase:
        return selecting.weigh(store, asked, chosen)
    begun = [purge for purge, erased in earlier.items() if not erased]
    more = np.concatenate([np.zeros(0, np.int64), *(read_tombstones(store, purge).ids for purge in begun)])
    copies, copied = selecting.find_copies(store, selecting.in_store(store, np.union1d(chosen.chunks, more)))
    known = [read_tombstones(store, purge + selecting.COPIES).ids for purge in begun]
    copies = selecting.in_store(store, np.unique(np.concatenate([copies, *known])))
    return selecting.weigh(store, asked, chosen, more, copies, copied)


def purge(
    root: str | Path,
    selectors: Selectors,
    *,
    reason: str,
    who: str | None = None,
    dry_run: bool = False,
    erase: bool = False,
    confirm: Callable[[PurgeResult], bool] = lambda _: True,
) -> PurgeResult:
    """Purge what selectors mean, and erase it if asked to.

    ``reason`` and ``who`` (None: the user of this process) stay in the log. ``confirm`` is asked with what would be
    done, unless it is a dry run; False leaves everything as it is.
    """
    if not reason.strip():
        raise UsageError("--reason is empty", "Say why, in words that name no person: it stays in the log for ever.")
    check_text("--reason", reason)
    who = getpass.getuser() if who is None else who
    check_text("--who", who)
    store = Store.open(root)
    asked = selectors.asked(store)
    agreed: PurgeResult | None = None

    def attempt() -> PurgeResult:
        nonlocal agreed
        if asked.scan is not None and asked.scan.plan(store):
            with writing(store) as run:
                engine.execute(asked.scan, store, run)
        total = len(asked.given) * len(store.state.parts())
        with tqdm(total=total, unit="part", desc="select", disable=None, delay=2, file=sys.stderr) as bar:
            selection = select(store, asked, erase=erase, report=bar.update)
        planned = _planned(store, selection, dry_run)
        if dry_run:
            return planned
        if (planned.chunks or planned.unerased) and not _is_alike(planned, agreed):
            if not confirm(planned):
                return planned
            agreed = planned
        return _carry_out(store, selection, planned, reason, who, erase)

    return until_not_overtaken(store, attempt)


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


def _planned(store: Store, selection: Selection, dry_run: bool) -> PurgeResult:
    """What a selection would do, if nothing else happened."""
    state = store.state
    chunks = len(selection.living)
    alive = int(state.records.get("totals", {}).get("chunks", 0))
    rows = sum(entry.rows for part in state.parts() if (entry := state.part_file("chunks", part)) is not None)
    return PurgeResult(
        "", chunks, selection.documents, selection.tokens,
        already_purged=len(selection.chunks) - chunks, share=chunks / alive if alive else 0.0,
        unerased=selection.unerased, unerased_share=selection.unerased / rows if rows else 0.0,
        erased=0, copies=selection.copied, files_rewritten=0, blocked=selection.newly_blocked,
        dry_run=dry_run, commit=state.number, examples=tuple(selection.living[:10].tolist()),
        matches=selection.chosen.matches,
    )  # fmt: skip


def _is_alike(planned: PurgeResult, agreed: PurgeResult | None) -> bool:
    """Whether what is planned takes no more than what was agreed to."""
    return agreed is not None and planned.chunks <= agreed.chunks and planned.unerased <= agreed.unerased


def _carry_out(
    store: Store, selection: Selection, planned: PurgeResult, reason: str, who: str, erase: bool
) -> PurgeResult:
    """Commit a purge, and erase."""
    purged, erased, rewritten = "", 0, 0
    left: list[str] = []
    consumers: list[ConsumerLeft] = []
    with writing(store) as run:  # also with nothing to purge: an interrupted erase may have left files to take away
        # Purges of before there were block lists are made good. An erase needs a purge that names all its chunks, or it
        # could not be gone on with after a kill.
        uncovered = erase and not _is_covered(store, selection)
        if planned.chunks or planned.blocked or uncovered:
            purged = selecting.commit_purge(store, run, selection, reason, who)
        if erase:
            victims = np.union1d(selection.chunks, selection.copies)
            erased, rewritten = until_not_overtaken(store, lambda: _erase(store, run, victims))
            left = _clear(store, run)
            consumers = _consumers(store, victims)
    state = store.refresh()
    return replace(
        planned, purge=purged, erased=erased, files_rewritten=rewritten, commit=state.number, left=tuple(left),
        not_reached=(_ELSEWHERE,) if erased and state.names("index") else (), consumers=tuple(consumers),
    )  # fmt: skip


def _consumers(store: Store, chunks: Ids) -> list[ConsumerLeft]:
    """The other stores in which something of erased chunks is left, or may be: of these, and of all erased before."""
    erased = Tombstones(np.union1d(chunks[read_tombstones(store).contains(chunks)], erased_chunks(store).ids))
    if not len(erased):
        return []
    total = table_files(store)
    with tqdm(total=total, unit="file", desc="other stores", disable=None, delay=2, file=sys.stderr) as bar:
        found = []
        for one in holding(store, erased, bar.update):
            rewritten = _erase_texts(one, store, erased) if one.consumer.materialised else 0
            if one.store is None or one.names_erased or rewritten is None or rewritten:
                again = neighbours_command(store.root, one.consumer.path, one.consumer.table, one.consumer.again)
                found.append(
                    ConsumerLeft(
                        one.consumer.path, one.consumer.table, one.store is not None, rewritten is None, again,
                        rewritten or 0, one.names_erased,
                    )
                )  # fmt: skip
        return found


def _erase_texts(one: Holding, store: Store, erased: Tombstones) -> int | None:
    """Erase what a consumer has of the text of erased chunks: how many files that took; None if it can't be reached.

    Not where it uses a copy of this database: there another chunk may have the id.
    """
    if one.store is None or not is_of_this(one.store, one.consumer.table, store):
        return None
    try:
        with writing(one.store) as run:
            return erase_consumed(one.store, run, store, erased)
    except (RetrotoolError, OSError):
        return None  # it can't be written; what is left there is told


def _is_covered(store: Store, selection: Selection) -> bool:
    """Whether purges of the same selector name all chunks of a selection, and all copies."""
    purges = selecting.same_selector(store, selection.asked)
    named = [np.zeros(0, np.int64), *(selecting.tombstones_of(store, purge) for purge in purges)]
    return bool(np.isin(np.union1d(selection.chunks, selection.copies), np.concatenate(named)).all())


def _erase(store: Store, run: Run, chunks: Ids) -> tuple[int, int]:
    """Erase tombstoned chunks; return how many chunks and how many files were rewritten.

    ``ConflictError`` if any is none: the purge was taken back meanwhile.
    """
    chunks = selecting.in_store(store, chunks)
    victims = Tombstones(chunks)
    stage = EraseStage(tuple(victims.ids.tolist()))
    rewritten = sum(task.weight for task in stage.tasks(store))
    engine.execute(stage, store, run)

    def build(state: State) -> Draft | None:
        done = selecting.erased_purges(store, victims)
        records = {f"purge:{p}": {**state.records[f"purge:{p}"], "erased": True} for p in done}
        gone = [entry.path for p in done if (entry := state.file("selectors", p)) is not None]
        # What was measured of an index names the sources of documents: the victims' may be among them.
        gone += [path for name in state.names("index") for path in measured_files(state, name)] if done else []
        return Draft("erase", {"purges": done}, remove=tuple(gone), records=records) if done else None

    store.commit(run, build)
    return len(victims), rewritten


def _clear(store: Store, run: Run) -> list[str]:
    """Take away what may hold what was erased, and say what must stay."""
    # Staged tasks of others that had read the old files can't be committed any more; their files must not stay.
    staging.fold(store, run)
    clean(store, thorough=True)
    left = clean_spool(store, run.id)
    told = []
    if planned := [file.path.name for file in left if file.planned]:
        told.append(
            f"Standard input of a chunk that is not finished lies in {store.root}/spool ({', '.join(planned)}) and may "
            f"hold what was erased. Finish that: retrotool chunk {store.root} --retry-quarantine; then run this again."
        )
    if busy := [file.path.name for file in left if not file.planned]:
        told.append(
            f"Standard input in {store.root}/spool ({', '.join(busy)}) may hold what was erased; it was written less "
            "than an hour ago, and a process may be about to chunk it. Run this again when none is."
        )
    return told
