"""Finding the neighbours of a part's keys.

List-major search (``ann.search``) of all its searchable vectors through the database's shards, with the query's own
document and all tombstones masked before the top-k, and a re-rank by the vectors themselves. Rows are read in blocks,
the larger the fewer times a list is decoded. What filters by tokens leave out is told of more candidates than are
saved (``neighbours.filters``).

Tokens of neighbours (``neighbours.retrieved``) that the table before has are copied from it.

Memory: the table, 12 bytes a neighbour, twice while it is written; a block of queries with their candidates; one list.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from retrotool.ann.excluded import Queries
from retrotool.ann.ranking import Best
from retrotool.embed.search_scope import (
    erased_chunks,
    is_same_directory,
    last_change,
    own_documents,
    read_part_vectors,
    searchable_rows,
)
from retrotool.engine.task import Report, Task
from retrotool.index.searching import AnyDatabase, merged
from retrotool.machine import give_memory_back
from retrotool.neighbours.filters import Finder
from retrotool.neighbours.retrieved import Pieces, Reuse, read_text_of
from retrotool.neighbours.stage import (
    FEW,
    MORE,
    SAME,
    WHOLE,
    NeighboursStage,
    probed_by,
    with_filters,
)
from retrotool.neighbours.underfilled import erased_of, few_rows, text_is_current
from retrotool.ranges import consecutive_ranges
from retrotool.store import neighbour_tables
from retrotool.store.atomic import FileEntry
from retrotool.store.neighbour_tables import NO_NEIGHBOUR, NeighbourTable
from retrotool.store.paths import FileName, part_slot
from retrotool.store.restored import stands_for_restored
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones, stands_for

_HEAD_DIGITS = 16


class NeighboursWorker:
    """Finds the neighbours of parts."""

    def __init__(self, store: Store, stage: NeighboursStage) -> None:
        self._store = store
        self._stage = stage
        self._database = stage.open_database(store)
        self._commit = self._database.store.state.number
        self._within = is_same_directory(store, self._database.store)
        self._probed = 0
        """Lists that were probed for the table that is brought up to date; 0: that isn't known."""

    def _current_database(self) -> AnyDatabase:
        """The database at its newest commit: an erase may have replaced files since."""
        if self._database.store.refresh().number != self._commit:
            self._database = self._stage.open_database(self._store)
            self._commit = self._database.store.state.number
        return self._database

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Find the neighbours of one part, or what its table lacks."""
        store, stage = self._store, self._stage
        restored = stands_for_restored(store.refresh())
        database = self._current_database()
        part = int(task.inputs["part"])
        vectors = read_part_vectors(store, database.encoder, part)
        table, asking, before = self._begin(task, database, part, len(vectors))
        own = own_documents(store, part, database.store, database.tombstones, within=self._within)

        def ask(rows: npt.NDArray[np.int64]) -> Queries:
            return Queries(vectors[rows].astype(np.float32), own.take(rows))

        replaced = store.state.part_file("neighbours", part, stage.table)
        self._probed = int(((replaced and replaced.about) or {}).get("probed", 0))
        finder = Finder(store, part, database, stage.saved, stage.filters, ask, stage.memory)
        for rows in finder.blocks(asking):
            best = self._search(database, finder, rows, before, task.inputs["new"])
            table.ids[rows], table.distances[rows] = best.ids, best.distances
            report(len(rows))
            if stage.memory is not None:
                give_memory_back()
        report(task.weight - len(asking))
        if task.inputs["mode"] == FEW and not self._within:
            table = neighbour_tables.erase_neighbours(table, asking[:0], erased_chunks(database.store).contains)
        record = stage.record(store, database)
        commit, head = last_change(database.store)
        about = {
            "version": task.inputs["version"], **{name: record[name] for name in SAME},
            "commit": commit, "head": head[:_HEAD_DIGITS], "purges": stands_for(database.store.state),
            "searched": consecutive_ranges(database.held()),
            "probed": probed_by(database), **with_filters(stage.filters),
        }  # fmt: skip
        if task.inputs["mode"] != WHOLE:
            about["k"] = stage.k  # a row that had so many left was not searched again
        if restored:
            about["restored"] = restored
        if erased := erased_of(store, database):
            about["erased"] = erased
        name = FileName.new(run, "neighbours", part_slot(part), "parquet", stage.table)
        text = None
        if stage.text:
            about["text"] = stage.k
            text = read_text_of(database.store, database.tombstones, table, stage.k, self._reuse(database, replaced))
        entry = neighbour_tables.write_table(
            store.root, name, table, database=record["database"], commit=commit, path=record["path"], about=about,
            text=text, chunk_bytes=store.identity.chunk_length * store.identity.tokenizer.token_bytes,
        )  # fmt: skip
        old_path = task.inputs["replaces"]
        reads = [str(task.inputs["path"])]
        if self._within:  # an erase replaces them: what was found before it must not come after it
            reads += database.reads()
            if stage.text:
                reads += [chunks.path for chunks in database.store.state.group("chunks").entries()]
        # Where nobody has claimed the name yet, the first table does: a run with another database is refused then.
        claim = {} if stage.key in store.state.records else {stage.key: record}
        return Staged(
            task.key, "neighbours", run, {"name": stage.table, "index": stage.index},
            tuple(reads), (entry,), (old_path,) if old_path else (), claim,
        )  # fmt: skip

    def _reuse(self, database: AnyDatabase, old: FileEntry | None) -> Reuse | None:
        """Return what copies the tokens that the table before has; None if it has none that can be used."""
        if old is None or not text_is_current(old, database.store, self._stage.k):
            return None

        def copy(groups: list[int], ids: npt.NDArray[np.int64], into: Pieces) -> npt.NDArray[np.int64]:
            k = ids.shape[1]
            text = neighbour_tables.read_text(self._store, old, groups).nearest(k)
            _, short = neighbour_tables.text_naming(text, database.tombstones.contains)
            same = text.ids == ids
            n_tokens, tokens = into.n_tokens.reshape(-1, k, 2), into.tokens.reshape(*ids.shape, 2, -1)
            n_tokens[same], tokens[same] = text.n_tokens[same], text.tokens[same]
            n_tokens[:, :, 1][short], tokens[:, :, 1][short] = 0, 0
            return np.where(same, NO_NEIGHBOUR, ids)

        return copy

    def _search(
        self,
        database: AnyDatabase,
        finder: Finder,
        rows: npt.NDArray[np.int64],
        before: NeighbourTable | None,
        new: list[int],
    ) -> Best:
        """The neighbours of a block of rows; of what was found ``before``, only in ``new`` parts."""
        if before is None:
            return finder.search(rows)
        ids, distances = before.ids[rows], before.distances[rows]
        gone = database.tombstones.contains(ids)
        kept = Best(np.where(gone, np.float32(np.inf), distances), np.where(gone, NO_NEIGHBOUR, ids))
        best = merged(kept, finder.search(rows, only=new), self._stage.saved)
        if self._probed and self._probed < probed_by(database):
            # The index has grown, and was tuned to probe more lists: what lies in these was not sought before.
            old = sorted(set(database.held()) - set(new))
            more = finder.search(rows, only=old, beyond=self._probed)
            best = merged(best, more, self._stage.saved)
        # Beyond the last of a list that lost some there may be others, of old parts, that were not saved.
        horizon = np.where(gone.any(axis=1), distances[:, -1], np.inf)
        unknown = best.distances > horizon[:, None]
        best.distances[unknown], best.ids[unknown] = np.inf, NO_NEIGHBOUR
        few = (best.ids != NO_NEIGHBOUR).sum(axis=1) < self._stage.k
        # A list that is not full may have been cut by an erase.
        short = np.flatnonzero(few | (ids == NO_NEIGHBOUR).any(axis=1))
        if len(short):
            again = finder.search(rows[short])
            best.ids[short], best.distances[short] = again.ids, again.distances
        return best

    def _begin(
        self, task: Task, database: AnyDatabase, part: int, rows: int
    ) -> tuple[NeighbourTable, npt.NDArray[np.int64], NeighbourTable | None]:
        """The table to fill, the rows to search for, and a table whose neighbours are kept."""
        store, stage, mode = self._store, self._stage, task.inputs["mode"]
        old = store.state.part_file("neighbours", part, stage.table)
        known = old is not None and old.path == task.inputs["replaces"]
        table = neighbour_tables.read_table(store, old) if old is not None and known else None
        if mode == FEW and table is not None:
            table = NeighbourTable(np.array(table.ids), np.array(table.distances))
            return table, few_rows(store, database, part, table.ids, stage.k), None
        fresh = NeighbourTable(
            np.full((rows, stage.saved), NO_NEIGHBOUR, np.int64), np.full((rows, stage.saved), np.inf, np.float32)
        )
        return fresh, searchable_rows(store, part, read_tombstones(store)), table if mode == MORE else None
