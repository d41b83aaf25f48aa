"""``purge --repair``: fill up what purges have left too short in tables of neighbours.

Which rows these are is read off the tables; what that costs is told before. Then the rows that have fewer than k left
are searched again, as the table's record says. Tables that lie in other stores are not touched: the result has the
commands.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from retrotool import engine
from retrotool.cli.command_lines import table_command
from retrotool.embed.counting import command_line, count_keys_of
from retrotool.embed.search_scope import purges
from retrotool.encoder import find_devices
from retrotool.errors import RetrotoolError, StoreNotFoundError, UsageError
from retrotool.neighbours.dependents import consumers, is_of_this
from retrotool.neighbours.materialised import current_file
from retrotool.neighbours.mixtures import is_mixture, mixtures_with
from retrotool.neighbours.repair import Look, RepairStage, look_at, repair_of
from retrotool.neighbours.stage import database_of, members_of
from retrotool.neighbours.underfilled import NO_GAPS, Gaps
from retrotool.purge.erase_run import until_not_overtaken
from retrotool.purge.undo_run import tables_command
from retrotool.store import claims
from retrotool.store.runs import Run
from retrotool.store.session import writing
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class RepairCost:
    """What a repair reads to see what there is to do: ``files`` of ``tables``, of so many ``bytes``."""

    tables: tuple[str, ...]
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TableRepaired:
    """What was done for a table; counts are of living keys that have a row.

    ``rows`` are all of them. Of ``parts`` parts ``parts_read`` were read, as something was purged since these were made
    or filled up. There, ``touched`` rows name a purged chunk among those saved. Of them ``filled`` lost some of their
    first k, and others that are saved have taken the places. ``searched`` rows had fewer than k left; ``short`` of them
    still have, as nothing more is found. ``behind`` parts lack more than what was purged, and are left as they are;
    ``command`` brings them up to date. ``elsewhere`` parts are left to other runs. ``stale`` parts are materialised,
    but not as the table is now; ``materialise`` is the command.
    """

    table: str
    database: str
    index: str
    k: int
    saved: int
    rows: int
    parts: int
    parts_read: int
    touched: int
    filled: int
    searched: int
    short: int
    behind: int = 0
    command: str = ""
    elsewhere: int = 0
    stale: int = 0
    materialise: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A table that can't be repaired, and why."""

    table: str
    error: str
    advice: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class TablesElsewhere:
    """Tables of another store that may have gaps: of purges of this store that they don't know. Not looked at further.

    ``there``: whether the store is where it was.
    """

    path: str
    table: str
    there: bool
    command: str


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What ``repair`` did, or, in a dry run, would do: ``searched`` rows are then still to be, and none is ``short``.

    ``bytes`` of tables were read to tell.
    """

    tables: tuple[TableRepaired, ...]
    bytes: int
    dry_run: bool
    commit: int
    refused: tuple[Refused, ...] = field(default=())
    consumers: tuple[TablesElsewhere, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Found:
    """A table, how it is searched, what there is of it, and the gaps of each part that is held."""

    stage: RepairStage
    look: Look
    gaps: Mapping[int, Gaps]

    @property
    def todo(self) -> list[int]:
        """Parts with rows to search again, or entries to take out that another store has erased."""
        return [part for part, gaps in self.gaps.items() if gaps.few or gaps.holds_erased]


def repair(
    root: str | Path,
    *,
    name: str | None = None,
    devices: str = "auto",
    dry_run: bool = False,
    begin: Callable[[RepairCost], object] = lambda _: None,
) -> RepairResult:
    """Search again for the rows of tables of the store ``root`` that have fewer than k neighbours left.

    ``name``: of this table, or mixture, alone. ``begin`` is told what is to be read, before it is. A table that can't
    be repaired is an error if it is the one that was asked for, or none can be; else it is ``refused``, and the others
    are repaired.
    """
    store = Store.open(root)
    wanted = _wanted(store, name)
    found, refused = until_not_overtaken(store, lambda: _look(store, wanted, begin))
    if refused and (name is not None or not found):
        raise next(iter(refused.values()))
    if dry_run:
        done = [_told(store, one) for one in found]
    else:
        with writing(store) as run:  # also if there is nothing to do: one that was killed may have left files
            done = [_repair(store, run, one, devices) for one in found]
    return RepairResult(
        tuple(done), sum(one.look.bytes for one in found), dry_run, store.refresh().number,
        tuple(Refused(table, str(error), error.advice, error.exit_code) for table, error in refused.items()),
        tuple(_elsewhere(store)) if name is None else (),
    )  # fmt: skip


def _wanted(store: Store, name: str | None) -> list[str]:
    """The tables to look at; of a mixture those that it is of."""
    records = store.state.with_prefix("neighbours:")
    if name is not None and name in records:
        return [table for table, _ in members_of(store, name)]
    if name is not None or not records:
        what = "no neighbours" if name is None else f"no neighbours {name!r}"
        have = f"; it has: {', '.join(records)}" if records else ""
        raise UsageError(
            f"{store.root} has {what}{have}", f"Make them with: {command_line('neighbours', store.root, name=name)}"
        )
    return [table for table, record in records.items() if not is_mixture(record)]


def _look(
    store: Store, wanted: Sequence[str], begin: Callable[[RepairCost], object]
) -> tuple[list[_Found], dict[str, RetrotoolError]]:
    """The gaps of tables, and the errors of those that can't be repaired."""
    looks: list[tuple[RepairStage, Look]] = []
    refused: dict[str, RetrotoolError] = {}
    for table in wanted:
        try:
            stage = repair_of(store, table)
            looks.append((stage, look_at(store, stage)))
        except (UsageError, StoreNotFoundError) as error:
            refused[table] = error
    files, size = sum(len(look.unread) for _, look in looks), sum(look.bytes for _, look in looks)
    begin(RepairCost(tuple(stage.search.table for stage, _ in looks), files, size))
    found = []
    with tqdm(total=size, unit="B", unit_scale=True, desc="look", disable=None, delay=2, file=sys.stderr) as bar:
        for stage, look in looks:
            gaps = {}
            for part, entry in look.held.items():
                gaps[part] = look.finder.find(part, entry)
                bar.update(entry.bytes if part in look.unread else 0)
            found.append(_Found(stage, look, gaps))
    return found, refused


def _repair(store: Store, run: Run, found: _Found, devices: str) -> TableRepaired:
    """Search again for what is short in a table."""
    if not found.todo:
        return _told(store, found)
    of_workers = tuple(find_devices(devices))
    stage = replace(found.stage, search=replace(found.stage.search, devices=of_workers))
    engine.execute(stage, store, run, workers=len(of_workers))
    store.refresh()
    held = claims.held(store.root, run.id)
    elsewhere = sum(task.key in held for task in stage.plan(store))
    now = look_at(store, stage)
    done = [part for part in found.todo if part in now.held and now.held[part].path != found.look.held[part].path]
    short = sum(now.finder.read(part, now.held[part]).few for part in done)
    return _told(store, found, short, elsewhere)


def _told(store: Store, found: _Found, short: int = 0, elsewhere: int = 0) -> TableRepaired:
    search, look = found.stage.search, found.look
    total = sum(found.gaps.values(), NO_GAPS)
    database, _ = database_of(store, search.table)
    slots = list(store.state.group("neighbours", search.table))
    stale, materialise = _stale(store, search.table)
    return TableRepaired(
        search.table, str(database.root), search.index, search.k, search.saved, count_keys_of(store, map(int, slots)),
        len(slots), len(look.unread), total.touched, total.filled, total.few, short,
        len(look.behind), table_command(store, search.table, database) if look.behind else "", elsewhere,
        stale, materialise,
    )  # fmt: skip


def _stale(store: Store, table: str) -> tuple[int, str]:
    """How many parts are materialised otherwise than a table is now, alone or in a mixture; and what does it anew."""
    for name in (table, *mixtures_with(store.state, table)):
        group = store.state.group("materialised", name)
        if stale := sum(current_file(store, name, int(slot)) is None for slot in group):
            return stale, f"{tables_command(store, store.root, name)} --materialise"
    return 0, ""


def _elsewhere(store: Store) -> Iterator[TablesElsewhere]:
    """Tables of other stores that don't know of all purges of this one, or can't be looked at. The logs tell."""
    for one in consumers(store.state):
        other = one.open()
        command = shlex.join(["retrotool", "purge", one.path, "--repair", "--name", one.table])
        if other is None:
            yield TablesElsewhere(one.path, one.table, False, command)
        elif is_of_this(other, one.table, store) and any(_may_have_gaps(other, one.table, store)):
            yield TablesElsewhere(one.path, one.table, True, command)


def _may_have_gaps(other: Store, name: str, database: Store) -> Iterator[bool]:
    """For each part of tables in a database, whether something was purged since it was made or filled up."""
    for table, _ in members_of(other, name):
        if other.state.records.get(f"neighbours:{table}", {}).get("database") == database.identity.uuid:
            group = other.state.group("neighbours", table)
            entries = (group.get(slot) for slot in group)
            yield from ((entry.about or {}).get("purges") != purges(database) for entry in entries if entry is not None)
