"""``purge --repair``: searching again, by the settings that tables were made with, for rows that purges left too short.

It is what ``neighbours`` does after purges (``stages.neighbours``, its mode FEW), and nothing else of what that does:
parts without a table, and tables that lack what has come into the database since, are left to it. A task is a part, as
there, under the same key: what either has staged the other needs not do.

Cost: as of ``stages.gaps`` for every table that does not know of all purges; then reading and writing those of which a
row is short, and searching for these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from retrotool.cli.command_lines import table_command
from retrotool.engine.stage import Task, Worker
from retrotool.errors import UsageError
from retrotool.index.exact import NO_INDEX
from retrotool.index.index_files import index_key
from retrotool.neighbours.neighbour_filters import Filters
from retrotool.neighbours.stage import FEW, NeighboursStage, check_encoders, database_of
from retrotool.neighbours.underfilled import GapFinder
from retrotool.store.atomic import FileEntry
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class RepairStage:
    """The parts of ``search``'s tables in which rows are short since something was purged."""

    search: NeighboursStage
    name: str = field(default="repair", init=False)
    unit: str = field(default="chunk", init=False)

    def of_worker(self, number: int) -> RepairStage:
        """What a worker process is to open: with its own device."""
        return replace(self, search=self.search.of_worker(number))

    def plan(self, store: Store) -> Sequence[Task]:
        """Those tasks of ``neighbours`` that fill rows up. Errors as there."""
        return [task for task in self.search.plan(store) if task.inputs["mode"] == FEW]

    def open(self, store: Store) -> Worker:
        """Open the database."""
        return self.search.open(store)


def repair_of(store: Store, table: str, devices: tuple[str, ...] = ("cpu",)) -> RepairStage:
    """The repair of a table, searched as its record says; ``UsageError`` if what it was searched in is not there."""
    database, record = database_of(store, table)
    index = str(record["index"])
    if index != NO_INDEX and index_key(index) not in database.state.records:
        raise UsageError(
            f"the neighbours {table!r} were found in the index {index!r} of {database.root}, which is gone",
            f"Make it again, or compute them anew by another one: {_by_another(store, table, database)}",
        )
    return RepairStage(
        NeighboursStage(
            str(database.root.absolute()), index, table, int(record["saved"]), int(record["k"]),
            str(record["encoder"]) if index == NO_INDEX else None, devices=devices, filters=Filters.of(record),
        )
    )  # fmt: skip


def _by_another(store: Store, table: str, database: Store) -> str:
    line, _, _ = table_command(store, table, database).rpartition(" --index ")
    return f"{line} --index NAME"


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to look at before a table is repaired; no table was read for it.

    ``held`` parts have a table that is up to date but for purges, and ``unread`` are those that must be read to tell
    what these did. ``behind`` parts have none that is, so they are left to ``neighbours``.
    """

    held: dict[int, FileEntry]
    unread: dict[int, FileEntry]
    behind: tuple[int, ...]
    finder: GapFinder

    @property
    def bytes(self) -> int:
        """Bytes of the tables that must be read."""
        return sum(entry.bytes for entry in self.unread.values())


def look_at(store: Store, stage: RepairStage) -> Look:
    """What there is of a table. ``UsageError`` as of ``NeighboursStage.plan``."""
    search = stage.search
    database = search.open_database(store)
    check_encoders(store, database)
    search.filters.check(store, database.store)
    finder = GapFinder(store, database, search.k)
    held, behind = {}, []
    for todo in search.todo(store, database):
        if todo.table is not None and todo.mode == FEW:
            held[todo.part] = todo.table
        else:
            behind.append(todo.part)
    unread = {part: entry for part, entry in held.items() if not finder.knows_all(entry)}
    return Look(held, unread, tuple(behind), finder)
