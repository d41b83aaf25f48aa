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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
from retrotool.index.searching import AnyDatabase, Database
from retrotool.lazy import torch
from retrotool.machine import memory_of_machine
from retrotool.ranges import as_slice, consecutive_ranges, in_steps, within
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
Asked = tuple[pa.Table, Vectors16]  # rows of parts that probe a tile, and their vectors
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
        wave = {} if tiling is None else routes_about(tiling)
        spans = wave["asking"] if (wave.get("of"), wave.get("tiles")) == (self.digest, self.tiles) else []
        asked = within(spans, (task.inputs["part"] for task in tasks))
        asking = [task for task in tasks if task.inputs["part"] in asked]
        if not asking:
            waves = math.ceil(sum(task.weight for task in tasks) / self.wave_rows)
            spans = consecutive_ranges([task.inputs["part"] for task in tasks[: math.ceil(len(tasks) / waves)]])
            name = hashlib.blake2b(repr([self.digest, self.tiles, spans]).encode(), digest_size=8).hexdigest()
            tiling_of = {
                "step": "tiling", "tiles": self.tiles, "remove": [entry.path for entry in files.entries()],
                "of": self.digest, "asking": spans,
            }  # fmt: skip
            return [route_task(store, self.table, TILING, name, "tiling", len(tasks), tiling_of)]
        plan, written = wave["plan"], routes_of(store, self.table, wave["plan"])
        weights = {task.inputs["part"]: task.weight for task in asking}
        unsorted = [part for part in sorted({*self.held, *weights}) if part_slot(part) not in written]
        if unsorted:
            routes = []
            for part in unsorted:
                path = parts.part_entry(store, "embeddings", part, wave["encoder"]).path
                inputs = {"step": "routes", "tiles": self.tiles, "part": part, "asks": part in weights}
                label, weight = f"routes of part {part}", weights.get(part, 1)
                routes.append(route_task(store, self.table, part_slot(part), plan, label, weight, inputs, [path]))
            return routes
        weight = sum(weights.values()) // self.tiles
        left = [
            route_task(store, self.table, slot, plan, f"tile {tile}", weight, {"step": "tile", "tile": tile})
            for tile in range(self.tiles)
            if (slot := _tile_slot(tile)) not in written
        ]
        return left or [replace(task, inputs={**task.inputs, "from_tiles": self.undone}) for task in asking]

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
    tiles = min(-(-vectors // room_of_tile(memory, stage.devices[0] != "cpu")), database.record.nlist)
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


def routes_of(store: Store, table: str, plan: str) -> dict[str, FileEntry]:
    """Return the files of the kind ``routes`` of a plan for a table, by slot in order."""
    files = store.state.group(ROUTES, table).items()
    return {slot: entry for slot, entry in files if routes_about(entry)["plan"] == plan}


def route_task(
    store: Store, table: str, slot: str, plan: str, label: str, weight: int, inputs: Mapping[str, Any],
    reads: Sequence[str] = (),
) -> Task:  # fmt: skip
    """Return the task that makes the file of a slot, in place of that of another plan."""
    old = store.state.file(ROUTES, slot, table)
    known = {"slot": slot, "plan": plan, "replaces": None if old is None else old.path, "part": None}
    key = task_key("neighbours", {"table": table, "plan": plan, "step": slot}, reads)
    return Task(key, label, weight, {**known, **inputs}, claimed=True, for_all=True)


def do_route_task(
    store: Store, stage: NeighboursStage, task: Task, run: str, report: Report,
    make: Callable[[], tuple[FileEntry, Sequence[str]]],
) -> Staged | None:  # fmt: skip
    """Write the file of a task by ``make``, which also returns what it read; None if it is there already."""
    inputs = task.inputs
    if is_taken(store, ROUTES, inputs["slot"], stage.table, inputs["replaces"]):
        return None
    entry, reads = make()
    report(task.weight)
    removed = tuple(path for path in inputs.get("remove", [inputs["replaces"]]) if path and store.state.has(path))
    settings = {"name": stage.table, "index": stage.index}
    return Staged("neighbours", settings, tuple(reads), (entry,), removed, task=task.key, run=run)


def write_routes(
    store: Store, table: str, inputs: Mapping[str, Any], run: str, schema: pa.Schema, groups: Iterator[pa.Table]
) -> FileEntry:
    """Write the file of a task with these row groups, of which some may be empty."""
    name, about = FileName.new(run, ROUTES, inputs["slot"], "parquet", table), {"plan": inputs["plan"]}
    return parts.write_batches(store, name, schema, groups, row_group=_MOST_GROUP, brief=True, about=about)


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
        make = self._write_tiling if task.inputs["step"] == "tiling" else self._write_rows
        return do_route_task(self.store, self.stage, task, run, report, lambda: make(task, run))

    def _write_rows(self, task: Task, run: str) -> tuple[FileEntry, Sequence[str]]:
        """Write the rows of a part by tile, or the answers of a tile."""
        inputs = task.inputs
        tiling = _file(self.store, self.stage.table, TILING, inputs["plan"])
        tile_of, sizes = (column.to_numpy() for column in parts.read_parquet(self.store, tiling).columns)
        if inputs["step"] == "routes":
            path = parts.part_entry(self.store, "embeddings", inputs["part"], self.database.encoder).path
            return self._route(inputs["part"], tile_of, inputs, run), (tiling.path, path)
        files = routes_of(self.store, self.stage.table, inputs["plan"]).items()
        requests = [entry for slot, entry in files if slot.isdigit()]
        asking = set(_numbers_in(routes_about(tiling)["asking"]))
        room = int(sizes[tile_of == inputs["tile"]].sum())
        answers = LoadedTile(self, requests, asking, inputs["tile"], room).answers()
        entry = write_routes(self.store, self.stage.table, inputs, run, _answers_schema(self.stage.saved), answers)
        return entry, (tiling.path, *(one.path for one in requests))

    def _write_tiling(self, task: Task, run: str) -> tuple[FileEntry, Sequence[str]]:
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
        name = FileName.new(run, ROUTES, TILING, "parquet", self.stage.table)
        return parts.write_parquet(self.store, name, table, about=about), self.database.reads()

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
                asking = pairs // max(nprobe, 1)
                some = np.union1d(asking, np.flatnonzero(home_tiles == tile))  # some homes probe no list of the tile
                starts = np.append(np.searchsorted(asking, some), len(pairs)).astype(np.int32)
                probes = pa.ListArray.from_arrays(starts, lists.ravel()[pairs])
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

        return write_routes(store, self.stage.table, inputs, run, schema, sections())

    def _lists(self, vectors: MappedVectors, rows: Ids) -> npt.NDArray[np.int32]:
        """Return the lists that each row probes, int32 [n, nprobe]."""
        trained, device = self.database.trained, self.stage.devices[0]
        assert trained.centroids is not None
        nprobe = min(self.database.point.nprobe, trained.nlist)
        on_device = Centroids(trained, torch.device(device)) if device != "cpu" else None
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
        for shard in self.database.shards_with([part], self.database.shards):
            for number in shard.numbers:
                ids = shard.ids(number)
                homes[parts.row_of(ids[parts.slice_of_part(ids, part)])] = number
        return homes


class LoadedTile:
    """The vectors at home in a tile, up to ``room``, in lists that are searched exactly, and who probes them.

    ``requests``: the files of all parts, by part; ``asking``: the parts with rows that probe lists.
    """

    def __init__(self, step: TileStep, requests: Sequence[FileEntry], asking: set[int], tile: int, room: int) -> None:
        self._store, self._database, self._stage, self._tile = step.store, step.database, step.stage, tile
        trained, device, self._on_device = self._database.trained, self._stage.devices[0], None
        self._vectors = np.empty((room, trained.d), np.float16)
        ids, homes, held = np.empty(room, np.int64), np.empty(room, np.int32), 0
        # Of each part that asks its file, the places of its vectors, and the same rows without vectors.
        self._asking: list[tuple[FileEntry, slice, pa.Table]] = []
        for entry in requests:
            interrupts.check()
            table, part = self._read(entry, _HOMES), int(entry.slot)
            place = slice(held, held := held + len(table))
            if held > room:
                raise ErasedError(f"the index {self._stage.index!r} was changed by another process")
            self._vectors[place] = _vectors_of(table)
            ids[place], homes[place] = parts.chunk_ids(part, table["row"].to_numpy()), table["home"].to_numpy()
            if part in asking:
                self._asking.append((entry, place, table.drop_columns(["vector"])))
        self._vectors, ids, homes = self._vectors[:held], ids[:held], homes[:held]
        self._ids, self._lists = ids, VectorLists(ids, self._vectors, homes, trained.nlist)
        if device != "cpu":
            self._on_device = OnDevice(device, trained, ids, homes, self._fetch, trained.d)

    def _read(self, entry: FileEntry, kind: int) -> pa.Table:
        """Read a row group of a part: the rows at home in the tile, or its guests."""
        return parts.read_parquet(self._store, entry, row_groups=[2 * self._tile + kind])

    def _fetch(self, ids: Ids) -> Vectors16:
        return self._vectors[np.searchsorted(self._ids, ids)]

    def answers(self) -> Iterator[pa.Table]:
        """Yield, for each part that asks, the rows that probe a list of the tile, and the nearest of each."""
        waiting, held, memory = list[Asked](), 0, self._stage.memory
        most = _BATCH_ROWS if memory is None else min(_BATCH_ROWS, memory // _SHARE_FOR_ROWS // self._vectors.shape[1])
        for entry, place, table in self._asking:
            guests = self._read(entry, _GUESTS)
            asked = (_probing(table, self._vectors[place]), _probing(guests, _vectors_of(guests)))
            waiting.append(_joined(asked))
            held += len(waiting[-1][0])
            if held >= most:
                yield from self._answered(waiting)
                waiting, held = [], 0
        yield from self._answered(waiting)

    def _answered(self, several: Sequence[Asked]) -> Iterator[pa.Table]:
        if several:
            interrupts.check()
            best, low = self._nearest(*_joined(several)), 0
            found = [parts.fixed_binary(column.view(np.uint8)) for column in (best.ids, best.distances)]
            for table, _ in several:
                columns = [table["row"], *(column.slice(low, len(table)) for column in found)]
                yield pa.table(columns, schema=_answers_schema(self._stage.saved))
                low += len(table)

    def _nearest(self, table: pa.Table, vectors: Vectors16) -> Best:
        if not len(table):
            return Best.nothing(0, self._stage.saved)
        k, lists = self._stage.saved, table["lists"].combine_chunks()
        queries = Queries(vectors, Excluded(table["first"].to_numpy(), table["last"].to_numpy()))
        counts = lists.value_lengths().to_numpy()
        probed = np.full((len(queries), int(counts.max())), self._lists.empty, np.int64)
        probed[np.arange(probed.shape[1]) < counts[:, None]] = lists.flatten().to_numpy()
        if self._on_device is not None:
            return self._on_device.search(queries, probed.shape[1], k, probed=probed)
        queries = queries.widened()
        search = Search(
            self._lists.trained, queries, probed.shape[1], k + SPARE, nothing_banned, room=self._database.room,
            rough=True, probed=probed,
        )  # fmt: skip
        search.add(self._lists)
        return rerank(queries.vectors, search.candidates, self._fetch, k)


def _probing(table: pa.Table, vectors: Vectors16) -> Asked:
    """Return those rows of a row group that probe a list."""
    some = np.flatnonzero(pc.list_value_length(table["lists"]).to_numpy())
    return table.select(["row", "first", "last", "lists"]).take(pa.array(some)), vectors[as_slice(some)]


def _joined(several: Sequence[Asked]) -> Asked:
    tables, vectors = zip(*several, strict=True)
    return pa.concat_tables(tables), np.concatenate(vectors)


def found_in_tiles(store: Store, table: str, part: int, rows: Ids, saved: int) -> tuple[Best, dict[str, Any]]:
    """Return the nearest of ``rows`` [n], ascending, of a part, from what all tiles have found.

    Also return what the tiles were searched in, for ``about`` of the table. The database may have grown
    since, or purges may have been undone: then the table is updated next.
    """
    best, about = Best.nothing(len(rows), saved), routes_about(_file(store, table, TILING))
    group = _numbers_in(about["asking"]).index(part)
    for tile in range(about["tiles"]):
        entry = _file(store, table, _tile_slot(tile), about["plan"])
        found = parts.read_parquet(store, entry, row_groups=[group])
        ids = parts.from_fixed_binary(found["ids"], np.dtype(np.int64))
        distances = parts.from_fixed_binary(found["distances"], np.dtype(np.float32))
        its = found["row"].to_numpy()
        known = np.isin(its, rows)  # the others were purged since
        place = np.searchsorted(rows, its[known])
        best.put(place, merged(best.take(place), Best(distances[known], ids[known]), saved))
    return best, {name: about[name] for name in ("searched", "commit", "head", "probed")}


def _file(store: Store, table: str, slot: str, plan: str | None = None) -> FileEntry:
    entry = store.state.file(ROUTES, slot, table)
    if entry is None or plan not in (None, routes_about(entry)["plan"]):
        raise ErasedError(f"{ROUTES} of {table!r} were removed by another process")
    return entry


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
