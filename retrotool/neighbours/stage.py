"""``neighbours``: the nearest keys of every key, outside its own document.

A task makes the table of one part of the query store. Rows of purged queries, and of values of key-value
records, are empty. A task searches:

* everything, if the table is new, the index or filters changed, or the index was tuned or trained again;
* only new parts, if the database has grown; the results are merged into the table;
* only rows with fewer than k live neighbours, after purges (``GapFinder``); this also removes neighbours that
  another database has erased;
* chunks whose purge was undone (``store.tombstones``), once the index has them.

If tables are re-ranked, it then orders what it has saved by tokens (``neighbours.bm25``). Rows that it has
not searched keep their scores. Searches merge by distance, so a table is put into that order first.

A name belongs to one database: its record is set with the first task, or before (``claim``). The log's entry
of a table has its index and the commit of the database, which detects diverged copies of the database and
tables of concurrent runs. It also has the purges that the table takes into account. If there are others, the
ids of the table are read, a row group at a time, and looked up in the tombstones; the stage keeps the
result.

Memory: the table, 12 bytes per neighbour, twice while it is written; a block of queries with candidates; one
list.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from retrotool import interrupts
from retrotool.ann.excluded import Queries
from retrotool.ann.ranking import Best, merged
from retrotool.chunk import PART_SIZE
from retrotool.cli.command_lines import command_line, embed_command, table_command
from retrotool.embed import search_scope
from retrotool.embed.search_scope import erased_chunks
from retrotool.encoder.devices import checking_device
from retrotool.engine.task import Report, Task, Worker, is_taken, task_key
from retrotool.errors import ErasedError, StoreNotFoundError, UsageError
from retrotool.index.searching import NO_INDEX, AnyDatabase, Database, ExactDatabase, searched_of
from retrotool.machine import give_memory_back, memory_of_machine
from retrotool.neighbours.bm25 import TermStatistics, count_terms, score_overlap
from retrotool.neighbours.filters import Filters, Finder, candidates_at_once
from retrotool.neighbours.retrieved import read_text_of
from retrotool.neighbours.shelves import ShelfPlan, do_text_step, from_shelves, plan_shelves
from retrotool.neighbours.tiles import TilePlan, TileStep, found_in_tiles, plan_tiles
from retrotool.ranges import as_slice, consecutive_ranges, within
from retrotool.store import neighbour_tables, parts
from retrotool.store.log import Draft, FileEntry
from retrotool.store.neighbour_tables import ERASED, NO_NEIGHBOUR, NO_SCORE, NeighbourTable
from retrotool.store.parts import ROW_GROUP, Ids
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import digest_of_undone, missed_spans, read_tombstones, stands_for

_HEAD_DIGITS = 16
# Tasks at a time on a GPU: it finds a million rows in a second or so, and a core writes them in two to four.
# They load what does not fit into its memory together.
_IN_FLIGHT = 8
_SHARE_OF_MACHINE, _TABLES = 4, 3  # memory for them: 1/n of the machine's, in which each holds so many tables
_TEXT_BYTES = 1 << 30  # and, if tokens are stored, these
_NEIGHBOUR_BYTES = 8  # of 12 in memory; ids are compressed
_SAME = ("index", "encoder")  # fields that tables share with the record of their name, besides the filters
_WHOLE, FEW, _MORE = "whole", "few", "more"  # all rows in all parts, rows with gaps, all rows in new parts


@dataclass(frozen=True, slots=True)
class NeighboursStage:
    """Makes or updates a table of neighbours in ``database``, for all parts of the query store."""

    database: str
    index: str  # ``NO_INDEX``: exact search among the vectors of ``encoder``
    table: str
    saved: int
    k: int
    encoder: str | None = None
    memory: int | None = None  # limits a search, in bytes
    devices: tuple[str, ...] = ("cpu",)  # one per worker process
    filters: Filters = field(default_factory=Filters)
    text: bool = False  # also store the tokens of the first k neighbours of each row
    rerank: str = ""  # ``OVERLAP``: order saved neighbours by that, else by distance
    broken: tuple[str, ...] = ()  # paths of tables to make again instead
    gaps: dict[Any, tuple[int, bool]] = field(default_factory=dict, compare=False, repr=False)  # see ``GapFinder``
    name: str = field(default="neighbours", init=False)
    unit: str = field(default="chunk", init=False)

    def open_database(self, queries: Store) -> AnyDatabase:
        """Open the newest commit of the database, restricted to the sources that the filters allow."""
        store, allows = Store.open(self.database), self.filters.allows(queries)
        store.reads_copies = self.text  # of neighbours, whose chunks are anywhere
        if self.index == NO_INDEX:
            return ExactDatabase(store, self.encoder, device=self.devices[0], memory=self.memory, allows=allows)
        return Database(store, self.index, device=self.devices[0], memory=self.memory, thorough=True, allows=allows)

    def plan(self, store: Store) -> list[Task]:
        """Plan a task for each embedded part whose table is missing or not up to date.

        Raises ``UsageError`` if the name belongs to another database or to a diverged copy of it, or if
        encoders, or tokens that filters compare, differ between queries and database.
        """
        database = self.open_database(store)
        tasks = self.part_tasks(store, database)
        tiles, shelves = self.in_rounds(store, database, tasks)
        with_text = list[Task]()
        if shelves is not None:  # tokens are added when all tables are there, and in order
            adding = [task for task in tasks if task.inputs["adds_text"]]
            tasks = [
                replace(task, inputs={**task.inputs, "text": not task.inputs["makes"]})
                for task in tasks
                if not task.inputs["adds_text"]
            ]
            if not any(task.inputs["makes"] for task in tasks):
                with_text = shelves.next_tasks(store, adding)
        whole = [task for task in tasks if task.inputs["mode"] == _WHOLE]
        others = [task for task in tasks if task.inputs["mode"] != _WHOLE]
        return [*(whole if tiles is None else tiles.next_tasks(store, whole)), *others, *with_text]

    def in_rounds(
        self, store: Store, database: AnyDatabase, tasks: Sequence[Task]
    ) -> tuple[TilePlan | None, ShelfPlan | None]:
        """Return how tasks are done if vectors, and if tokens, of the database don't fit into memory."""
        whole = [task for task in tasks if task.inputs["mode"] == _WHOLE]
        read = [task for task in tasks if task.inputs["adds_text"] or task.inputs["makes"]]
        return plan_tiles(self, store, database, whole), plan_shelves(self, store, database.store, read)

    def part_tasks(self, store: Store, database: AnyDatabase) -> list[Task]:
        """Return a task for each part, which ``tiles`` may have to precede; raises as ``plan`` does."""
        check_encoders(store, database)
        self.filters.check_can_compare(store, database.store)
        record = self.record(store, database)
        self._check_database(store.state, record)
        version, gaps = _version(database, record), GapFinder(store, database, self)
        held, checked = database.held(), set[tuple[int, str]]()
        spans = consecutive_ranges(held)
        # Of all parts, as it takes time in proportion to their number.
        to_search = cache(partial(_to_search, database=database.store.state, held=held))
        tasks = []
        for part in search_scope.embedded_parts(store, database.encoder):
            old, mode, new = store.state.part_file("neighbours", part, self.table), _WHOLE, spans
            if self.broken and (old is None or old.path not in self.broken):
                continue
            if old is not None and _commit(old) not in checked:
                check_neighbour_ids(old, self.table, database.store)
                checked.add(_commit(old))
            path = parts.part_entry(store, "embeddings", part, database.encoder).path
            settings: dict[str, Any] = {"table": self.table, "version": version, "held": spans}
            weight = search_scope.count_keys(store, part)
            if self.broken:
                settings["repair"] = old.path if old is not None else ""
            elif old is not None and _is_of(old, record) and (old.about or {}).get("version") == version:
                about = old.about or {}
                searched = tuple(map(tuple, about["searched"]))
                mode, new = to_search(searched, _commit(old)[0], by_tokens=Filters.of(about).by_tokens)
                settings["from"] = [old.path, mode, *gaps.taken, self.k]
                if mode == FEW:
                    if (short := gaps.find(part, old)) is None:
                        continue
                    weight = short
            if self.text:
                settings["text"] = self.k
            if self.rerank:
                settings["rerank"] = self.rerank
            # A task makes a table, or puts an older one into another order, or adds only text.
            makes = mode == _WHOLE or old is None or neighbour_tables.reranked_by(old) != self.rerank
            inputs = {
                "part": part, "path": path, "version": version, "new": new, "mode": mode, "makes": makes,
                "adds_text": self.text and mode == FEW and not weight and not makes,
                "replaces": old.path if old is not None else None,
            }  # fmt: skip
            key = task_key("neighbours", settings, [path])
            tasks.append(Task(key, f"part {part}", weight, inputs, claimed=True))
        return tasks

    @property
    def in_flight(self) -> int:
        """Tasks at a time in a process: a GPU searches for one while others are prepared and written."""
        if self.devices[0] == "cpu" or self.memory is not None:
            return 1
        each = _TABLES * PART_SIZE * self.saved * (_NEIGHBOUR_BYTES + 4) + _TEXT_BYTES * self.text
        return max(1, min(_IN_FLIGHT, memory_of_machine() // len(self.devices) // _SHARE_OF_MACHINE // each))

    @property
    def key(self) -> str:
        """Key of the table's record."""
        return f"neighbours:{self.table}"

    def record(self, store: Store, database: AnyDatabase) -> dict[str, Any]:
        """Build the record ``neighbours:<table>``."""
        optional = {"filters": self.filters.as_record(), "text": self.text, "rerank": self.rerank}
        return {
            "database": database.store.identity.uuid, "uri": database.store.uri,
            "within": search_scope.is_same_store(store, database.store),
            "index": self.index, "encoder": database.encoder, "saved": self.saved, "k": self.k,
            **{name: value for name, value in optional.items() if value},
        }  # fmt: skip

    def _check_database(self, state: State, record: Mapping[str, Any]) -> None:
        known = state.records.get(self.key, record)
        if "mix" in known:
            raise UsageError(f"the neighbours {self.table!r} are a mixture", "Give another --name.")
        if known["database"] != record["database"]:
            of = f"the neighbours {self.table!r} are from another database, {known['uri']}"
            raise UsageError(of, "Give another --name.")
        if known["encoder"] != record["encoder"] and state.file("edits", "all", self.table) is not None:
            edited = f"the neighbours {self.table!r} were edited, with distances by the encoder {known['encoder']!r}"
            raise UsageError(edited, "Give an --index of that encoder, or another --name.")

    def claim(self, state: State, record: dict[str, Any]) -> Draft | None:
        """Build the commit that sets the record and removes tables of another index or filters."""
        self._check_database(state, record)
        entries = state.group("neighbours", self.table).entries()
        others = tuple(entry.path for entry in entries if not _is_of(entry, record))
        if state.records.get(self.key) == record and not others:
            return None
        return Draft("neighbours", {"name": self.table, "index": self.index}, remove=others, records={self.key: record})

    def size_of(self, store: Store, task: Task) -> int:
        """Return the bytes of a part's table: at least ids and distances of the rows that are searched.

        Of a part that is sorted by tiles, those of its vectors, which are written at least once.
        """
        if task.inputs.get("step") == "routes":
            encoder = store.state.records[f"index:{self.index}"]["encoder"]
            return parts.part_entry(store, "embeddings", task.inputs["part"], encoder).bytes
        return task.weight * self.saved * _NEIGHBOUR_BYTES

    def open(self, store: Store) -> Worker:
        """Open the database."""
        return NeighboursWorker(store, self)


def check_encoders(store: Store, database: AnyDatabase) -> None:
    """Raise ``UsageError`` unless queries and database were embedded with the same encoder."""
    key = f"encoder:{database.encoder}"
    ours, theirs = store.state.records.get(key), database.store.state.records.get(key)
    if ours is None:
        raise UsageError(
            f"{store.place} has no embeddings of {database.encoder!r}, the encoder of the index",
            f"Make them with: {embed_command(database.store, database.encoder, store)}",
        )
    if theirs is None or any(ours[field] != theirs[field] for field in ("sha256", "dimension")):
        raise UsageError(
            f"{store.place} and {database.store.place} have different encoders of the name {database.encoder!r}",
            "Embed one of them again with the encoder of the other.",
        )


def _version(database: AnyDatabase, record: Mapping[str, Any]) -> str:
    filters = [record["filters"]] if "filters" in record else []
    fields = [record["database"], *database.settings, record["saved"], *filters]
    return hashlib.blake2b(repr(fields).encode(), digest_size=8).hexdigest()


def probed_by(database: AnyDatabase) -> int:
    """Return the lists that a search probes, 0 if it has no lists or no fixed number."""
    if isinstance(database, ExactDatabase) or database.is_restricted:
        return 0
    return min(database.point.nprobe, database.trained.nlist)


def _to_search(
    spans: Sequence[Sequence[int]], commit: int, *, by_tokens: bool, database: State, held: list[int]
) -> tuple[str, list[list[int]]]:
    """Return the mode of a task for a table of the same index, and runs [first, last] of parts to search.

    Of the table are the ``spans`` of parts that it was searched in, the ``commit`` of the database, and if it
    is filtered ``by_tokens``.
    """
    before, now = within(spans, held), set(held)
    missed = within(missed_spans(database, commit), held)
    has_lost = sum(last + 1 - first for first, last in spans) > len(before)
    # Filters by tokens may have compared neighbours without their continuations, which are no longer purged.
    if has_lost or (by_tokens and missed):
        return _WHOLE, consecutive_ranges(held)
    new = sorted(now - before | missed)
    return (_WHOLE if set(new) == now else _MORE if new else FEW), consecutive_ranges(new)


def _is_of(entry: FileEntry, record: Mapping[str, Any]) -> bool:
    about = entry.about or {}
    return all(about[name] == record[name] for name in _SAME) and Filters.of(about) == Filters.of(record)


def _commit(entry: FileEntry) -> tuple[int, str]:
    """Return the number and the start of the SHA-256 of the database's commit that a table is from."""
    about = entry.about or {}
    return int(about["commit"]), str(about["head"])


def check_neighbour_ids(entry: FileEntry, table: str, database: Store) -> None:
    """Raise ``UsageError`` if the database lacks the commit that a table is from, so that ids may differ."""
    if not search_scope.has_commit(database, *_commit(entry)):
        advice = "Put that copy back, or compute them again under another --name."
        raise UsageError(f"the neighbours {table!r} are from a diverged copy of {database.place}", advice)


def check_table(store: Store, part: int, table: str, database: Store) -> FileEntry:
    """Return a part's table. Raises ``UsageError`` if it differs from its record or from ``database``."""
    entry, record = parts.part_entry(store, "neighbours", part, table), store.state.records[f"neighbours:{table}"]
    if not _is_of(entry, record) or neighbour_tables.reranked_by(entry) != record.get("rerank", ""):
        how = "exact search" if record["index"] == NO_INDEX else f"the index {record['index']!r}"
        raise UsageError(
            f"part {part} has no neighbours {table!r} of {how} yet: its table has another index, filters or order",
            f"Compute them: {table_command(store, table, database)}",
        )
    check_neighbour_ids(entry, table, database)
    return entry


def pick_table(store: Store, table: str | None) -> str:
    """Return the table to read: ``table`` if given, else the only table or mixture, or main."""
    if table is not None:
        return table
    records = store.state.with_prefix("neighbours:")
    mixed = {str(member["table"]) for record in records.values() for member in record.get("mix", ())}
    names = [name for name in records if name not in mixed]
    return names[0] if len(names) == 1 else "main"


def members_of(store: Store, name: str) -> list[tuple[str, float]]:
    """Return (table, weight) of the tables that are read as ``name``: one, or those of a mixture."""
    record = store.state.records.get(f"neighbours:{name}")
    if record is None or "mix" not in record:
        return [(name, 1.0)]
    if not record["mix"]:
        raise store.corrupt(f"the mixture {name!r} has no tables")
    return [(str(member["table"]), float(member["weight"])) for member in record["mix"]]


def table_record(store: Store, table: str) -> Mapping[str, Any]:
    """Return the record of an existing table. Raises ``CorruptError`` if it is that of a mixture."""
    record: Mapping[str, Any] = store.state.records[f"neighbours:{table}"]
    if "mix" in record:
        raise store.corrupt(f"the neighbours {table!r} must be a table, but are a mixture")
    return record


def database_of(store: Store, table: str) -> tuple[Store, Mapping[str, Any]]:
    """Open the newest commit of a table's database; return it with the table's record.

    Raises ``UsageError`` if the table or the database is missing, or another store is in place of the
    database.
    """
    record = store.state.records.get(f"neighbours:{table}")
    if record is None:
        have = ", ".join(store.state.with_prefix("neighbours:")) or "none"
        raise UsageError(
            f"{store.place} has no neighbours {table!r}; it has: {have}",
            f"Make them with: {command_line('neighbours', store.place, name=table)}\n"
            f"or, in another store: {command_line('neighbours', 'DATABASE', queries=store.place, name=table)}",
        )
    if "mix" in record:
        tables = ", ".join(name for name, _ in members_of(store, table))
        raise UsageError(f"the neighbours {table!r} are a mixture of {tables}", "Name one of these tables.")
    # Not by comparing uuids, as a copy of the database has the same one.
    if record["within"]:
        return store, record
    try:
        database = Store.open(record["uri"])
    except StoreNotFoundError:
        raise StoreNotFoundError(
            f"the database of the neighbours {table!r} of {store.place} is missing; it was at {record['uri']}",
            f"Put it back. If it has moved, name its new place: {table_command(store, table, None)}",
        ) from None
    if database.identity.uuid != record["database"]:
        raise UsageError(
            f"{record['uri']} is not the database of the neighbours {table!r}",
            "Put that back, or compute the neighbours again: tombstones can't be applied without it.",
        )
    return database, record


class NeighboursWorker:
    """Executes the tasks of a ``NeighboursStage``, which several threads may give it.

    They share the database, and what it has in the memory of a GPU. It is opened again after a commit, and
    loaded again, once no thread is searching, if that changed what is found.
    """

    def __init__(self, store: Store, stage: NeighboursStage) -> None:
        self._store = store
        self._stage = stage
        self._database = stage.open_database(store)
        self._newest = Store.open(stage.database)
        self._within = search_scope.is_same_store(store, self._database.store)
        self._counting, self._terms = threading.Lock(), dict[Any, TermStatistics]()
        self._turn = threading.Condition()
        self._step = threading.Lock()  # a tile or a shelf fills the memory that all threads have
        self._searching = 0  # threads

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Make or update the table of one part; return None if another run did."""
        with self._turn:
            undone = digest_of_undone(self._store.refresh())  # first: the database may then know more, not less
            while not self._reopened():
                self._turn.wait()
            database = self._database
            self._searching += 1
        try:
            if "step" in task.inputs:
                with self._step:
                    if task.inputs["step"] == "text":
                        return do_text_step(self._store, database.tombstones, self._stage, task, run, report)
                    assert isinstance(database, Database), "an index was searched when this was planned"
                    return TileStep(self._store, database, self._stage)(task, run, report)
            part, replaces = part_slot(task.inputs["part"]), task.inputs["replaces"]
            if is_taken(self._store, "neighbours", part, self._stage.table, replaces):
                return None
            write = self._compute(database, task, run, report, undone)
        finally:
            with self._turn:
                self._searching -= 1
                self._turn.notify_all()
        return write()

    def _reopened(self) -> bool:
        """Open the database's newest commit, unless others search now and would find something else in it."""
        old = self._database
        if self._newest.refresh().number == old.store.state.number:
            return True
        new = self._stage.open_database(self._store)
        if searched_of(new) == searched_of(old):
            new.take_over(old)
        elif self._searching:
            return False
        else:  # an erase may have replaced files
            old.leave_device()
        self._database = new
        return True

    def _compute(
        self, database: AnyDatabase, task: Task, run: str, report: Report, undone: str
    ) -> Callable[[], Staged]:
        """Search for one part; return the function that writes the table."""
        store, stage = self._store, self._stage
        part = int(task.inputs["part"])
        if {undone, *task.inputs.get("from_shelves", [])[1:], task.inputs.get("from_tiles", undone)} != {undone}:
            raise ErasedError(f"purges were undone after what {task.label} is made from was collected")
        replaced = store.state.part_file("neighbours", part, stage.table)
        if replaced is not None and replaced.path in stage.broken:
            replaced = None  # it can't be read
        total = parts.part_entry(store, "embeddings", part, database.encoder).rows
        table, asking, before = self._begin(task, database, part, replaced, total)
        vectors = search_scope.read_part_vectors(store, database.encoder, part) if len(asking) else None
        own = search_scope.own_documents(store, part, database.store, database.tombstones, within=self._within)

        def ask(rows: Ids) -> Queries:
            assert vectors is not None, "there are rows to search for"
            asked = Queries(vectors[as_slice(rows)], own.take(rows))
            return asked.widened() if stage.devices[0] == "cpu" else asked

        probed = int(((replaced and replaced.about) or {}).get("probed", 0))
        finder = Finder(store, part, database, stage.saved, stage.filters, ask, stage.memory)
        new = sorted(within(task.inputs["new"], database.held()))
        found, of_tiles = None, dict[str, Any]()
        if "from_tiles" in task.inputs:
            found, of_tiles = found_in_tiles(store, stage.table, part, asking, stage.saved)
        for rows in finder.blocks(asking) if len(asking) else ():
            with checking_device(stage.devices[0]):
                if found is None:
                    best = self._search(finder, rows, before, new, probed)
                else:
                    best = self._completed(finder, rows, found.take(np.searchsorted(asking, rows)))
            table.ids[rows], table.distances[rows] = best.ids, best.distances
            report(len(rows))
            if stage.memory is not None:
                give_memory_back()
        report(task.weight - len(asking))
        if task.inputs["mode"] == FEW and not self._within:
            is_erased = erased_chunks(database.store).contains
            table = neighbour_tables.erase_neighbours(table, asking[:0], is_erased)
        if stage.rerank:
            table = self._reranked(table, database, part, asking)
        record = stage.record(store, database)
        commit, head = search_scope.last_change(database.store)
        about = {
            "version": task.inputs["version"],
            **{name: record[name] for name in (*_SAME, "filters", "rerank") if name in record},
            "commit": commit, "head": head, "purges": stands_for(database.store.state),
            "searched": consecutive_ranges(database.held()), "probed": probed_by(database), **of_tiles,
        }  # fmt: skip
        about["head"] = about["head"][:_HEAD_DIGITS]
        if task.inputs["mode"] != _WHOLE:
            about["k"] = stage.k  # rows with so many live neighbours were not searched again
        if undone:
            about["undone"] = undone
        if erased := erased_of(store, database):
            about["erased"] = erased
        name = FileName.new(run, "neighbours", part_slot(part), "parquet", stage.table)
        text = None
        if has_text := stage.text and task.inputs.get("text", True):
            about["text"] = stage.k
            old = (store, replaced) if replaced and text_is_current(replaced, database.store, stage.k) else None
            tombstones = database.tombstones
            shelves = task.inputs.get("from_shelves")
            read = from_shelves(store, tombstones, stage.table, part, shelves[0]) if shelves else None
            text = read_text_of(database.store, tombstones, table, stage.k, old, read)
        old_path = task.inputs["replaces"]
        reads = [str(task.inputs["path"])]
        if self._within:  # an erase replaces these: results from before it must not be committed after it
            reads += database.reads()
            if has_text:
                reads += [chunks.path for chunks in database.store.state.group("chunks").entries()]
        # The first table claims the name, so that a run with another database is refused.
        claim = {} if stage.key in store.state.records else {stage.key: record}

        def write() -> Staged:
            entry = neighbour_tables.write_table(
                store, name, table, database=record["database"], commit=commit, uri=record["uri"], about=about,
                text=text,
            )  # fmt: skip
            return Staged(
                "neighbours", {"name": stage.table, "index": stage.index},
                tuple(reads), (entry,), (old_path,) if old_path else (), claim, task=task.key, run=run,
            )  # fmt: skip

        return write

    def _reranked(self, table: NeighbourTable, database: AnyDatabase, part: int, asking: Ids) -> NeighbourTable:
        """Order neighbours by scores, which rows that are not ``asking`` have if the table has any."""
        has_some = (table.ids != NO_NEIGHBOUR).any(axis=1)
        rows = np.flatnonzero(has_some) if table.scores is None else asking
        scores = np.full(table.ids.shape, NO_SCORE, np.float32) if table.scores is None else table.scores
        if len(rows):
            at_once = candidates_at_once(database, self._stage.memory)
            terms = self._terms_of(database)
            scores[rows] = score_overlap(self._store, part, rows, table.ids[rows], database, terms, at_once)
        return NeighbourTable(table.ids, table.distances, scores).by_score()

    def _terms_of(self, database: AnyDatabase) -> TermStatistics:
        """Count tokens in the chunks of the database, once until these change."""
        state = database.store.state
        chunks = tuple(entry.path for entry in state.group("chunks").entries())
        key = chunks, stands_for(state), digest_of_undone(state)
        with self._counting:
            if key not in self._terms:
                self._terms = {key: count_terms(database.store, database.tombstones)}
            return self._terms[key]

    def _search(self, finder: Finder, rows: Ids, before: NeighbourTable | None, new: list[int], probed: int) -> Best:
        """Find the neighbours of a block of rows. With a table ``before``, search ``new`` parts and merge.

        ``probed``: lists that were probed for that table, 0 if unknown.
        """
        database = finder.database
        if before is None:
            return finder.search(rows)
        ids, distances = before.ids[rows], before.distances[rows]
        gone = database.tombstones.contains(ids)
        kept = Best(np.where(gone, np.float32(np.inf), distances), np.where(gone, NO_NEIGHBOUR, ids))
        best = merged(kept, finder.search(rows, only=new), self._stage.saved)
        if probed and probed < probed_by(database):
            # The index has grown and is tuned to probe more lists, which were not searched for old parts.
            old = sorted(set(database.held()) - set(new))
            more = finder.search(rows, only=old, beyond=probed)
            best = merged(best, more, self._stage.saved)
        # If saved neighbours were purged, old parts may have unsaved ones beyond the last one.
        horizon = np.where(gone.any(axis=1), distances[:, -1], np.inf)
        unknown = best.distances > horizon[:, None]
        best.distances[unknown], best.ids[unknown] = np.inf, NO_NEIGHBOUR
        few = (best.ids != NO_NEIGHBOUR).sum(axis=1) < self._stage.k
        # A row that is not full may have lost neighbours to an erase.
        short = np.flatnonzero(few | (ids == NO_NEIGHBOUR).any(axis=1))
        if len(short):
            best.put(short, finder.search(rows[short]))
        return best

    def _completed(self, finder: Finder, rows: Ids, found: Best) -> Best:
        """Leave out what was purged since tiles were searched; search again for rows that are short then."""
        gone = finder.database.tombstones.contains(found.ids)
        kept = Best(np.where(gone, np.float32(np.inf), found.distances), np.where(gone, NO_NEIGHBOUR, found.ids))
        best = kept.nearest(self._stage.saved)
        short = np.flatnonzero((best.ids == NO_NEIGHBOUR).any(axis=1))
        if len(short):
            best.put(short, finder.search(rows[short]))
        return best

    def _begin(
        self, task: Task, database: AnyDatabase, part: int, old: FileEntry | None, rows: int
    ) -> tuple[NeighbourTable, Ids, NeighbourTable | None]:
        """Return the table to fill, the rows to search for, and the table to merge with, if any."""
        store, stage, mode = self._store, self._stage, task.inputs["mode"]
        known = old is not None and old.path == task.inputs["replaces"]
        table = neighbour_tables.read_table(store, old).by_distance() if old is not None and known else None
        searchable = search_scope.searchable_rows(store, part, read_tombstones(store))
        if mode == FEW and table is not None:
            live = (table.ids != NO_NEIGHBOUR) & ~database.tombstones.contains(table.ids)
            few = searchable[live[searchable].sum(axis=1) < stage.k]
            scores = None if table.scores is None or not stage.rerank else np.array(table.scores)
            return NeighbourTable(np.array(table.ids), np.array(table.distances), scores), few, None
        nothing = Best.nothing(rows, stage.saved)
        return NeighbourTable(nothing.ids, nothing.distances), searchable, table if mode == _MORE else None


class GapFinder:
    """Finds what purges have left to do in tables of a store whose neighbours are chunks of ``database``."""

    def __init__(self, store: Store, database: AnyDatabase, stage: NeighboursStage) -> None:
        self._store, self._database, self._stage = store, database, stage
        self._own, self._erased = cache(partial(read_tombstones, store)), cache(partial(erased_chunks, database.store))
        # Digests: purges of database and queries, erases of the database, and undone purges of queries, whose
        # rows are empty in tables made during these.
        purges, undone = stands_for(database.store.state), digest_of_undone(store.state)
        self.taken = (purges, stands_for(store.state), erased_of(store, database), undone)

    def find(self, part: int, entry: FileEntry) -> int | None:
        """Return how many rows of a part have to be searched; None if there is nothing to do at all."""
        about, stage = entry.about or {}, self._stage
        known = about["purges"], about.get("erased", ""), about.get("undone", "")
        few, is_stale = 0, False
        # A table that was made, or refilled to k neighbours, after all purges of the database is not read.
        if known != (self.taken[0], *self.taken[2:]) or int(about.get("k", stage.k)) < stage.k:
            key = (entry.path, *self.taken)
            if key not in stage.gaps:
                stage.gaps[key] = self._read(part, entry)
            few, is_stale = stage.gaps[key]
        lacks_text = stage.text and not text_is_current(entry, self._database.store, stage.k)
        lacks_order = neighbour_tables.reranked_by(entry) != stage.rerank
        return few if few or is_stale or lacks_text or lacks_order else None

    def _read(self, part: int, entry: FileEntry) -> tuple[int, bool]:
        """Return how many rows have fewer than k live neighbours, and whether other data is out of date."""
        searched = np.zeros(entry.rows, np.bool_)
        searched[search_scope.searchable_rows(self._store, part, self._own())] = True
        few, is_stale = 0, False
        for group in range(-(-entry.rows // ROW_GROUP)):
            interrupts.check()
            ids = neighbour_tables.read_ids(self._store, entry, [group])
            left = ~self._database.tombstones.contains(ids) & (ids != NO_NEIGHBOUR)
            rows = searched[group * ROW_GROUP : (group + 1) * ROW_GROUP]
            few += int((left[rows].sum(axis=1) < self._stage.k).sum())
            is_stale |= self.taken[2] != "" and bool(self._erased().contains(ids).any())
            if self._stage.text and neighbour_tables.text_size(entry):
                text = neighbour_tables.read_text(self._store, entry, [group], tokens=False)
                purged, short = neighbour_tables.text_naming(text, self._database.tombstones.contains)
                is_stale |= bool((purged | short | (text.ids == ERASED)).any())
        return few, is_stale


def text_is_current(entry: FileEntry, database: Store, k: int) -> bool:
    """Return whether a table has tokens of k neighbours, and no purge of its database was undone since."""
    missed = missed_spans(database.state, int((entry.about or {})["commit"]))
    return neighbour_tables.text_size(entry) >= k and not missed


def erased_of(store: Store, database: AnyDatabase) -> str:
    """Return a digest of another database's erased purges; "" within a store, whose erase does its tables."""
    if search_scope.is_same_store(store, database.store) or not (erased := search_scope.purges_erased(database.store)):
        return ""
    return hashlib.blake2b(" ".join(erased).encode(), digest_size=8).hexdigest()
