"""Find the neighbours of all chunks in a database whose vectors don't fit into memory.

Searching part by part would read the vectors of nearly all lists again for every part. Here each vector is
read a few times, whatever the number of parts, in three rounds of tasks:

1. For each part, write its rows by *tile*. A tile is a range of lists whose vectors fit into memory; near
   lists are in the same tile. A row goes to its *home*, the tile of the list that it is indexed in, and, if
   it has no neighbours yet, as a *guest* to other tiles with lists that it probes. Of a tile, one row group
   has the homes, one the guests.
2. For each tile, load the vectors of its homes, and compare every row that probes a list of the tile with all
   vectors of this list, exactly. Write the nearest of each row, in a row group per part.
3. The task of a part, as in ``neighbours.stage``, merges what the tiles have found for its rows.

These are files of the kind ``routes``, by the name of the table. They are committed, so that a task that is
killed is repeated alone. They are removed when the table is done, by a search after the database has changed,
and by every erase, as vectors are in them. What is purged in between is left out by the third round. As
otherwise, rows that are then short of neighbours are searched for again, and parts that are new are, too.

With many tiles a row is a guest of many. So that guests never take more than ``_MOST_GUESTS`` times the space
of the vectors, the parts that ask are divided into *waves*, with three rounds each; homes are written in all.

Results are those of a search in memory that probes as many lists. For each wave the embeddings are read once,
and written; guests are written once; and everything written is read once. Memory: half of the limit for the
vectors of a tile, and on a GPU at most 48 GiB; in the first round 20 bytes per probe of a part.

Not for exact search, filters, other databases, nor repeated documents: these are searched directly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool import interrupts
from retrotool.ann.excluded import Excluded, Ids, Queries
from retrotool.ann.lists import Floats, VectorLists
from retrotool.ann.ranking import Best, merged, rerank
from retrotool.ann.resident import Centroids
from retrotool.ann.search import SPARE, Search, nearest_lists, nothing_banned
from retrotool.cli import output
from retrotool.embed import search_scope
from retrotool.embed.search_scope import read_part_vectors, searchable_rows
from retrotool.engine.task import Report, Task, is_taken, task_key
from retrotool.errors import ErasedError
from retrotool.index.on_device import OnDevice
from retrotool.index.searching import AnyDatabase, Database, is_gpu
from retrotool.lazy import torch
from retrotool.machine import memory_of_machine
from retrotool.ranges import consecutive_ranges, in_steps, within
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName, part_slot
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import digest_of_undone
from retrotool.store.vectors import MappedVectors

if TYPE_CHECKING:
    from retrotool.neighbours.stage import NeighboursStage

Vectors16 = npt.NDArray[np.float16]
ROUTES = "routes"
TILING = "tiling"  # the slot of the file that says which list is in which tile
_NOWHERE = -1
_FEWEST_ROWS = 64  # 1/n of the vectors: for fewer rows, reading what they need is cheaper than sorting all
_HOMES, _GUESTS = 0, 1  # row groups of a tile
_MOST_GUESTS = 8  # at a time, bytes of guests per byte of the vectors
BESIDE_ROUTED, ANSWER_BYTES = 24, 12  # of a row in a tile, besides its vector; and of a neighbour that is found
_SHARE_OF_MACHINE, _SHARE_FOR_TILE = 2, 2
_CARD_BYTES = 48 << 30  # the rest is for queries
_TILING = pa.schema({"tile": pa.int32(), "size": pa.int64()})
_BATCH_ROWS = 1 << 16  # queries searched at a time
_SHARE_FOR_ROWS = 32  # 1/n of the memory, in numbers of queries, which are there several times
_MOST_GROUP = 1 << 26  # rows of a row group
_ITERATIONS = 8  # of the power method


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A search in ``tiles``: of ``vectors`` bytes in all, of which ``memory`` bytes may be loaded at a time.

    ``held``: the parts that are searched. ``wave_rows``: rows that may ask at a time. ``digest``: of what
    decides the results of the first two rounds; files of another one are useless. ``undone``: that of purges.
    """

    table: str
    tiles: int
    vectors: int
    memory: int
    held: tuple[int, ...]
    wave_rows: float
    digest: str
    undone: str

    def next_tasks(self, store: Store, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of the next round, for ``tasks`` that each make the table of a part from scratch.

        Tasks of later waves come when those of this one are done.
        """
        files = store.state.group(ROUTES, self.table)
        tiling = files.get(TILING)
        wave = None if tiling is None else routes_about(tiling)
        asking = []
        if wave is not None and wave["of"] == self.digest:
            asked = within(wave["asking"], (task.inputs["part"] for task in tasks))
            asking = [task for task in tasks if task.inputs["part"] in asked]
        if wave is None or not asking or wave["tiles"] != self.tiles:
            waves = math.ceil(sum(task.weight for task in tasks) / self.wave_rows)
            spans = consecutive_ranges([task.inputs["part"] for task in tasks[: math.ceil(len(tasks) / waves)]])
            name = hashlib.blake2b(repr([self.digest, self.tiles, spans]).encode(), digest_size=8).hexdigest()
            tiling_of = {"remove": [entry.path for entry in files.entries()], "of": self.digest, "asking": spans}
            return [self._task(files, TILING, name, "tiling", len(tasks), [], tiling_of)]

        def is_missing(slot: str) -> bool:
            entry = files.get(slot)
            return entry is None or routes_about(entry)["plan"] != wave["plan"]

        weights = {task.inputs["part"]: task.weight for task in asking}
        unsorted = [part for part in sorted({*self.held, *weights}) if is_missing(part_slot(part))]
        if unsorted:
            routes = []
            for part in unsorted:
                path = parts.part_entry(store, "embeddings", part, wave["encoder"]).path
                inputs, label = {"part": part, "asks": part in weights}, f"routes of part {part}"
                weight = weights.get(part, 1)
                routes.append(self._task(files, part_slot(part), wave["plan"], label, weight, [path], inputs))
            return routes
        if left := [tile for tile in range(self.tiles) if is_missing(_tile_slot(tile))]:
            weight = sum(weights.values()) // self.tiles
            return [
                self._task(files, _tile_slot(tile), wave["plan"], f"tile {tile}", weight, [], {"tile": tile})
                for tile in left
            ]
        return [replace(task, inputs={**task.inputs, "from_tiles": self.undone}) for task in asking]

    def _task(
        self, files: Any, slot: str, wave: str, label: str, weight: int, reads: list[str], inputs: dict[str, Any]
    ) -> Task:
        """Return the task that makes the file of a slot, in place of that of another search."""
        key, old = task_key("neighbours", {"table": self.table, "plan": wave, "step": label}, reads), files.get(slot)
        inputs = {"slot": slot, "replaces": None if old is None else old.path, "part": None, **inputs}
        inputs |= {"step": label.split()[0], "plan": wave, "tiles": self.tiles}
        return Task(key, label, weight, inputs, claimed=True, for_all=True)

    def __str__(self) -> str:
        return f"{output.size(self.vectors)} of vectors, more than {output.size(self.memory)}: {self.tiles} tiles"


def plan_tiles(stage: NeighboursStage, store: Store, database: AnyDatabase, tasks: Sequence[Task]) -> TilePlan | None:
    """Return how to search in tiles for ``tasks``, which make tables from scratch; None: search directly."""
    is_plain = isinstance(database, Database) and not database.is_restricted and not stage.filters.by_tokens
    if not is_plain or stage.broken or not search_scope.is_same_store(store, database.store):
        return None
    assert isinstance(database, Database)
    dimension = int(store.state.records[f"encoder:{database.encoder}"]["dimension"])
    vectors = 2 * dimension * database.vectors_in_log
    each = memory_of_machine() // _SHARE_OF_MACHINE // len(stage.devices)
    memory = each if stage.memory is None else stage.memory
    if not tasks or vectors <= memory or not database.record.nlist or search_scope.may_repeat(store):
        return None
    tiles = min(-(-vectors // room_of_tile(memory, is_gpu(stage.devices[0]))), database.record.nlist)
    undone = digest_of_undone(store.state)
    decides = [database.settings, database.point.nprobe, database.reads(), stage.saved, undone]
    digest = hashlib.blake2b(repr(decides).encode(), digest_size=8).hexdigest()
    few = _FEWEST_ROWS * sum(task.weight for task in tasks) < database.vectors_in_log
    tiling = store.state.file(ROUTES, TILING, stage.table)
    begun = None if tiling is None or routes_about(tiling)["of"] != digest else routes_about(tiling)
    if few and begun is None:
        return None
    if begun is not None and vectors <= begun["tiles"] * memory:  # with more memory or less: go on with what is there
        tiles = begun["tiles"]
    guests = max(copies(tiles, database.record.nlist, database.point.nprobe) - 1, 1)
    rows = database.vectors_in_log * _MOST_GUESTS / guests * 2 * dimension / bytes_of_guest(dimension, stage.saved)
    return TilePlan(stage.table, tiles, vectors, memory, tuple(database.held()), rows, digest, undone)


def copies(tiles: int, nlist: int, nprobe: int) -> float:
    """Return the expected number of tiles that a row goes to which probes ``nprobe`` of ``nlist`` lists.

    As many as if ``anywhere`` lists were anywhere; near ones are often in the same tile. The power is that of
    documentation, with 512 to 2,048 lists and 5 to 400 tiles (``benchmarks/tiles.py --copies``).
    """
    if tiles == 1 or nlist == 1:
        return 1.0
    anywhere = min(nprobe, nlist) ** min(1.0, math.sqrt(math.log(tiles) / math.log(nlist)))
    return float(tiles * (1 - (1 - 1 / tiles) ** anywhere))


def bytes_of_guest(dimension: int, saved: int) -> int:
    """Return about how many bytes a row takes in a tile, with what is found for it."""
    return 2 * dimension + BESIDE_ROUTED + ANSWER_BYTES * saved


def count_waves(copies_of_row: float, dimension: int, saved: int) -> int:
    """Return the number of waves in which all rows of a database are searched for."""
    guests = (copies_of_row - 1) * bytes_of_guest(dimension, saved)
    return max(1, math.ceil(guests / (_MOST_GUESTS * 2 * dimension)))


def room_of_tile(memory: int, on_gpu: bool) -> int:
    """Return the bytes of vectors in a tile: a share of the memory, at most what a card of 80 GB holds."""
    room = memory // _SHARE_FOR_TILE
    return min(room, _CARD_BYTES) if on_gpu else room


def routes_to_remove(store: Store, table: str) -> tuple[str, ...]:
    """Return the paths of all files of a search in tiles."""
    return tuple(entry.path for entry in store.state.group(ROUTES, table).entries())


def split_lists(centroids: Floats, sizes: Ids, tiles: int) -> npt.NDArray[np.int32]:
    """Return the tile of each list, int32 [nlist], with about as many vectors each, of ``sizes`` [nlist].

    Lists are halved again and again, each time along the direction in which their centroids differ most.
    """
    found = np.empty(len(centroids), np.int32)
    todo = [(np.arange(len(centroids)), 0, tiles)]
    while todo:
        lists, first, several = todo.pop()
        if several == 1 or len(lists) <= 1:
            found[lists] = first
            continue
        apart = centroids[lists] - centroids[lists].mean(0)
        direction = apart[np.square(apart).sum(1).argmax()]
        for _ in range(_ITERATIONS):  # the largest singular vector
            direction = apart.T @ (apart @ direction)
            direction /= max(float(np.linalg.norm(direction)), np.finfo(np.float32).tiny)
        ordered = lists[np.argsort(apart @ direction, kind="stable")]
        left = several // 2
        ends = np.cumsum(sizes[ordered] + 1)  # an empty list has a weight, too
        cut = int(np.searchsorted(ends, ends[-1] * left / several)) + 1
        cut = min(max(cut, 1), len(ordered) - 1)
        todo += [(ordered[:cut], first, left), (ordered[cut:], first + left, several - left)]
    return found


@dataclass(frozen=True, slots=True)
class TileStep:
    """Does the tasks of the first two rounds in a ``database``."""

    store: Store
    database: Database
    stage: NeighboursStage

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Write the file of a task; return None if it is written already."""
        inputs, table, remove = task.inputs, self.stage.table, list[str]()
        if is_taken(self.store, ROUTES, inputs["slot"], table, inputs["replaces"]):
            return None
        if inputs["step"] == "tiling":
            entry, reads, remove = self._write_tiling(task, run), tuple(self.database.reads()), inputs["remove"]
        else:
            remove = [inputs["replaces"]] if inputs["replaces"] else []
            tiling = self._file(TILING, inputs["plan"])
            tile_of, sizes = (column.to_numpy() for column in parts.read_parquet(self.store, tiling).columns)
            reads = (tiling.path,)
            if inputs["step"] == "routes":
                reads += (parts.part_entry(self.store, "embeddings", inputs["part"], self.database.encoder).path,)
                entry = self._route(inputs["part"], tile_of, inputs, run)
            else:
                requests, tile = self._requests(inputs["plan"]), inputs["tile"]
                reads += tuple(one.path for one in requests)
                asking = set(_numbers_in(routes_about(tiling)["asking"]))
                entry = self._search(tile, requests, asking, int(sizes[tile_of == tile].sum()), inputs, run)
        report(task.weight)
        settings = {"name": table, "index": self.stage.index}
        removed = tuple(filter(self.store.state.has, remove))
        return Staged("neighbours", settings, reads, (entry,), removed, task=task.key, run=run)

    def _file(self, slot: str, plan: str) -> FileEntry:
        entry = self.store.state.file(ROUTES, slot, self.stage.table)
        if entry is None or routes_about(entry)["plan"] != plan:
            raise ErasedError(f"{ROUTES} of {self.stage.table!r} were removed by another process")
        return entry

    def _requests(self, plan: str) -> list[FileEntry]:
        files = self.store.state.group(ROUTES, self.stage.table).items()
        return [entry for slot, entry in files if slot.isdigit() and routes_about(entry)["plan"] == plan]

    def _name(self, run: str, slot: str) -> FileName:
        return FileName.new(run, ROUTES, slot, "parquet", self.stage.table)

    def _write_tiling(self, task: Task, run: str) -> FileEntry:
        trained = self.database.trained
        assert trained.centroids is not None, "plan_tiles looked"
        sizes = np.zeros(trained.nlist, np.int64)
        for shard in self.database.shards:
            sizes += [shard.size(number) for number in shard.numbers]
        tile = split_lists(trained.centroids, sizes, task.inputs["tiles"])
        about = {name: task.inputs[name] for name in ("plan", "tiles", "of", "asking")}
        commit, head = search_scope.last_change(self.database.store)
        about |= {"encoder": self.database.encoder, "probed": min(self.database.point.nprobe, len(tile))}
        about |= {"searched": consecutive_ranges(self.database.held()), "commit": commit, "head": head}
        table = pa.table({"tile": tile, "size": sizes}, schema=_TILING)
        return parts.write_parquet(self.store, self._name(run, TILING), table, about=about)

    def _route(self, part: int, tile_of: npt.NDArray[np.int32], inputs: Mapping[str, Any], run: str) -> FileEntry:
        """Write the rows of a part by tile; if it does not ask, as homes without lists."""
        store, encoder = self.store, self.database.encoder
        rows = searchable_rows(store, part, self.database.tombstones)
        vectors = read_part_vectors(store, encoder, part)
        lists = self._lists(vectors, rows if inputs["asks"] else rows[:0])
        homes = self._homes(part, len(vectors))[rows]
        first, last = (ends[rows] for ends in search_scope.document_intervals(store, part))
        nprobe, schema = lists.shape[1], _requests_schema(vectors.shape[1])
        probed_tiles, home_tiles = tile_of[lists].ravel(), np.where(homes >= 0, tile_of[homes], _NOWHERE)
        by_tile = np.argsort(probed_tiles, kind="stable")
        bounds = np.searchsorted(probed_tiles[by_tile], np.arange(inputs["tiles"] + 1))

        def sections() -> Iterator[pa.Table]:
            for tile, (low, high) in enumerate(pairwise(bounds.tolist())):
                interrupts.check()
                pairs = by_tile[low:high]  # of a row and a list, in the order of rows
                asking, counts = np.unique(pairs // max(nprobe, 1), return_counts=True)
                probes = pa.ListArray.from_arrays(
                    np.append(0, np.cumsum(counts)).astype(np.int32), lists.ravel()[pairs]
                )
                mine = np.flatnonzero(home_tiles == tile)
                silent = np.setdiff1d(mine, asking)  # at home, but not in a list that they probe
                none = pa.ListArray.from_arrays(np.zeros(len(silent) + 1, np.int32), pa.array([], pa.int32()))
                order = np.argsort(np.concatenate([asking, silent]), kind="stable")
                some = np.concatenate([asking, silent])[order]
                probes = pa.concat_arrays([probes, none]).take(pa.array(order))
                is_home = home_tiles[some] == tile
                for chosen in (np.flatnonzero(is_home), np.flatnonzero(~is_home)):
                    its = some[chosen]
                    yield pa.table(
                        [
                            rows[its].astype(np.int32), first[its], last[its], homes[its],
                            probes.take(pa.array(chosen)), parts.fixed_binary(vectors[rows[its]].view(np.uint8)),
                        ],
                        schema=schema,
                    )  # fmt: skip

        return self._write(part_slot(part), schema, sections(), inputs, run)

    def _write(
        self, slot: str, schema: pa.Schema, groups: Iterator[pa.Table], inputs: Mapping[str, Any], run: str
    ) -> FileEntry:
        """Write a file with these row groups, of which some are empty."""
        about = {"plan": inputs["plan"]}
        name = self._name(run, slot)
        return parts.write_batches(self.store, name, schema, groups, row_group=_MOST_GROUP, brief=True, about=about)

    def _lists(self, vectors: MappedVectors, rows: Ids) -> npt.NDArray[np.int32]:
        """Return the lists that each row probes, int32 [n, nprobe]."""
        trained, device = self.database.trained, self.stage.devices[0]
        assert trained.centroids is not None
        nprobe = min(self.database.point.nprobe, trained.nlist)
        on_device = Centroids(trained, torch.device(device)) if is_gpu(device) else None
        found = [np.zeros((0, nprobe), np.int32)]
        for some in in_steps(rows, _BATCH_ROWS):
            asked = torch.from_numpy(vectors[some]).to(device).float()
            if on_device is not None:
                nearest = on_device.nearest(asked, nprobe).cpu().numpy()
            else:
                nearest = nearest_lists(trained, trained.rotate(asked), nprobe, torch.get_num_threads())
            found.append(nearest.astype(np.int32))
        return np.concatenate(found)

    def _homes(self, part: int, rows: int) -> npt.NDArray[np.int32]:
        """Return the list that has each row of a part, int32 [rows]; ``_NOWHERE``: it is not in the index."""
        homes = np.full(rows, _NOWHERE, np.int32)
        for shard in self.database.shards_with([part]):
            for number in shard.numbers:
                ids = shard.ids(number)
                homes[parts.row_of(ids[parts.slice_of_part(ids, part)])] = number
        return homes

    def _search(
        self, tile: int, requests: Sequence[FileEntry], asking: set[int], room: int, inputs: Mapping[str, Any],
        run: str,
    ) -> FileEntry:  # fmt: skip
        """Answer the rows of parts that probe a list of the tile, in a row group for each part that asks."""
        loaded = LoadedTile(self.store, self.database, self.stage, requests, asking, tile, room)
        schema = _answers_schema(self.stage.saved)
        answers = (
            pa.table(
                [rows, parts.fixed_binary(best.ids.view(np.uint8)), parts.fixed_binary(best.distances.view(np.uint8))],
                schema=schema,
            )
            for rows, best in loaded.answers()
        )
        return self._write(_tile_slot(tile), schema, answers, inputs, run)


class LoadedTile:
    """The vectors at home in a tile, up to ``room``, in lists that are searched exactly, and who probes them.

    ``requests``: the files of all parts, by part; ``asking``: the parts with rows that probe lists.
    """

    def __init__(
        self, store: Store, database: Database, stage: NeighboursStage, requests: Sequence[FileEntry],
        asking: set[int], tile: int, room: int,
    ) -> None:  # fmt: skip
        self._store, self._database, self._stage, self._tile = store, database, stage, tile
        d = int(store.state.records[f"encoder:{database.encoder}"]["dimension"])
        self._vectors = np.empty((room, d), np.float16)
        ids, homes, held = np.empty(room, np.int64), np.empty(room, np.int32), 0
        # Of each part that asks its file, the places of its vectors, and the same rows without vectors.
        self._asking: list[tuple[FileEntry, slice, pa.Table]] = []
        for entry in requests:
            interrupts.check()
            table, part = self._read(entry, _HOMES), int(entry.slot)
            place = slice(held, held := held + len(table))
            if held > room:
                raise ErasedError(f"the index {stage.index!r} was changed by another process")
            self._vectors[place] = _vectors_of(table)
            ids[place], homes[place] = parts.chunk_ids(part, table["row"].to_numpy()), table["home"].to_numpy()
            if part in asking:
                self._asking.append((entry, place, table.drop_columns(["home", "vector"])))
        self._vectors, ids, homes = self._vectors[:held], ids[:held], homes[:held]
        self._ids, self._lists = ids, VectorLists(ids, self._vectors, homes, database.trained.nlist)
        device, self._on_device = stage.devices[0], None
        if is_gpu(device):
            self._on_device = OnDevice(device, database.trained, ids, homes, self._fetch, d)

    def _read(self, entry: FileEntry, kind: int) -> pa.Table:
        """Read a row group of a part: the rows at home in the tile, or its guests."""
        return parts.read_parquet(self._store, entry, row_groups=[2 * self._tile + kind])

    def _fetch(self, ids: Ids) -> Vectors16:
        return self._vectors[np.searchsorted(self._ids, ids)]

    def answers(self) -> Iterator[tuple[npt.NDArray[np.int32], Best]]:
        """Yield the rows [n] of each part that asks which probe the tile, and the nearest of each."""
        waiting, held, memory = list[Asked](), 0, self._stage.memory
        most = _BATCH_ROWS if memory is None else min(_BATCH_ROWS, memory // _SHARE_FOR_ROWS // self._vectors.shape[1])
        for entry, place, table in self._asking:
            guests = self._read(entry, _GUESTS)
            waiting += [Asked.joined([Asked.of(table, self._vectors[place]), Asked.of(guests, _vectors_of(guests))])]
            held += len(waiting[-1].rows)
            if held >= most:
                yield from self._answered(waiting)
                waiting, held = [], 0
        yield from self._answered(waiting)

    def _answered(self, several: Sequence[Asked]) -> Iterator[tuple[npt.NDArray[np.int32], Best]]:
        if several:
            interrupts.check()
            best, low = self._nearest(Asked.joined(several)), 0
            for asked in several:
                yield asked.rows, best.take(slice(low, low := low + len(asked.rows)))

    def _nearest(self, asked: Asked) -> Best:
        if not len(asked.rows):
            return Best.nothing(0, self._stage.saved)
        k, queries = self._stage.saved, Queries(asked.vectors, Excluded(asked.first, asked.last))
        probed = np.full((len(queries), int(asked.counts.max())), self._lists.empty, np.int64)
        probed[np.arange(probed.shape[1]) < asked.counts[:, None]] = asked.lists
        if self._on_device is not None:
            return self._on_device.search(queries, probed.shape[1], k, probed=probed)
        queries = queries.widened()
        search = Search(
            self._lists.trained, queries, probed.shape[1], k + SPARE, nothing_banned, room=self._database.room,
            rough=True, probed=probed,
        )  # fmt: skip
        search.add(self._lists)
        return rerank(queries.vectors, search.candidates, self._fetch, k)


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows [n] of parts that probe a tile, each with ``counts`` [n] of its ``lists``, one after the other.

    ``vectors`` float16 [n, d]; ``first`` and ``last`` chunk id of each row's own document, int64 [n].
    """

    rows: npt.NDArray[np.int32]
    vectors: Vectors16
    first: Ids
    last: Ids
    counts: Ids
    lists: npt.NDArray[np.int32]

    @classmethod
    def of(cls, table: pa.Table, vectors: Vectors16) -> Asked:
        """Return those rows of a row group that probe a list."""
        lists = table["lists"].combine_chunks()
        counts = lists.value_lengths().to_numpy().astype(np.int64)
        some = np.flatnonzero(counts)
        rows, first, last = (table[name].to_numpy()[some] for name in ("row", "first", "last"))
        return cls(
            rows,
            vectors if len(some) == len(vectors) else vectors[some],
            first,
            last,
            counts[some],
            lists.flatten().to_numpy(),
        )

    @classmethod
    def joined(cls, several: Sequence[Asked]) -> Asked:
        """Concatenate rows of one or several."""
        return several[0] if len(several) == 1 else cls(*map(np.concatenate, zip(*map(_FIELDS, several), strict=True)))


_FIELDS = attrgetter(*Asked.__dataclass_fields__)


def known_to_tiles(store: Store, table: str) -> dict[str, Any]:
    """Return what the tiles of a table were searched in, for ``about`` of the tables that have their results.

    The database may have grown since, or purges may have been undone: then the tables are updated next.
    """
    tiling = store.state.file(ROUTES, TILING, table)
    if tiling is None:
        raise ErasedError(f"{ROUTES} of {table!r} were removed by another process")
    return {name: routes_about(tiling)[name] for name in ("searched", "commit", "head", "probed")}


def found_in_tiles(store: Store, table: str, part: int, rows: Ids, saved: int) -> Best:
    """Return the nearest of ``rows`` [n], ascending, of a part, from what all tiles have found."""
    best, files = Best.nothing(len(rows), saved), store.state.group(ROUTES, table)
    tiling = files.get(TILING)
    if tiling is None:
        raise ErasedError(f"{ROUTES} of {table!r} were removed by another process")
    about = routes_about(tiling)
    group = _numbers_in(about["asking"]).index(part)
    for tile in range(about["tiles"]):
        entry = files.get(_tile_slot(tile))
        if entry is None or routes_about(entry)["plan"] != about["plan"]:
            raise ErasedError(f"{ROUTES} of {table!r} were removed by another process")
        found = parts.read_parquet(store, entry, row_groups=[group])
        ids = parts.from_fixed_binary(found["ids"], np.dtype(np.int64))
        distances = parts.from_fixed_binary(found["distances"], np.dtype(np.float32))
        its = found["row"].to_numpy()
        known = np.isin(its, rows)  # the others were purged since
        place = np.searchsorted(rows, its[known])
        so_far = Best(best.distances[place], best.ids[place])
        best.put(place, merged(so_far, Best(distances[known], ids[known]), saved))
    return best


def _numbers_in(spans: Sequence[Sequence[int]]) -> list[int]:
    """Return the numbers in ranges [first, last]."""
    return [number for first, last in spans for number in range(first, last + 1)]


def _tile_slot(tile: int) -> str:
    return f"tile-{tile:05d}"


def routes_about(entry: FileEntry) -> dict[str, Any]:
    """Return what the log says about a file of the kind ``routes``."""
    assert entry.about is not None, "files of this kind have it"
    return entry.about


def _requests_schema(d: int) -> pa.Schema:
    columns = [("row", pa.int32()), ("first", pa.int64()), ("last", pa.int64()), ("home", pa.int32())]
    return pa.schema([*columns, ("lists", pa.list_(pa.int32())), ("vector", pa.binary(2 * d))])


def _answers_schema(saved: int) -> pa.Schema:
    return pa.schema([("row", pa.int32()), ("ids", pa.binary(8 * saved)), ("distances", pa.binary(4 * saved))])


def _vectors_of(table: pa.Table) -> Vectors16:
    return parts.from_fixed_binary(table["vector"], np.dtype(np.float16))
