"""Find the neighbours of all chunks in a database whose vectors don't fit into memory.

Searching part by part would read the vectors of nearly all lists again for every part. Here each vector is
read a few times, whatever the number of parts, in three rounds of tasks:

1. For each part, write its rows by *tile*. A tile is a range of lists whose vectors fit into memory; near
   lists are in the same tile. A row goes to its *home*, the tile of the list that it is indexed in, and as a
   *guest* to other tiles with lists that it probes. Of a tile, one row group has the homes, one the guests.
2. For each tile, load the vectors of its homes, and compare every row that probes a list of the tile with all
   vectors of this list, exactly. Write the nearest of each row, in a row group per part.
3. The task of a part, as in ``neighbours.stage``, merges what the tiles have found for its rows.

These are files of the kind ``routes``, by the name of the table. They are committed, so that a task that is
killed is repeated alone. They are removed when the table is done, when the database changes, and by every
erase, as vectors are in them. What is purged in between is left out by the third round; rows that are then
short of neighbours are searched for again, as they are otherwise.

Results are those of a search in memory that probes as many lists. The embeddings are read once; then 1 plus
the guests of a row times as much is written, and read once. Memory: half of the limit for the vectors of a
tile, and on a GPU at most 48 GiB; in the first round 20 bytes per probe of a part.

Not for exact search, filters, other databases, nor repeated documents: these are searched directly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
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
from retrotool.engine.task import Report, Task, task_key
from retrotool.errors import ErasedError
from retrotool.index.on_device import OnDevice
from retrotool.index.searching import AnyDatabase, Database, is_gpu
from retrotool.lazy import torch
from retrotool.machine import memory_of_machine
from retrotool.ranges import in_steps
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
_FEWEST_ROWS = 8  # 1/n of the vectors: for fewer rows, reading what they need is cheaper than sorting all
_SHARE_OF_MACHINE, _SHARE_FOR_TILE = 2, 2
_CARD_BYTES = 48 << 30  # the rest is for queries
_TILING = pa.schema({"tile": pa.int32()})
_BATCH_ROWS = 1 << 16  # queries searched at a time
_SHARE_FOR_ROWS = 32  # 1/n of the memory, in numbers of queries, which are there several times
_MOST_GROUP = 1 << 26  # rows of a row group
_ITERATIONS = 8  # of the power method


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A search in ``tiles``: of ``vectors`` bytes in all, of which ``memory`` bytes may be loaded at a time.

    ``digest``: of what decides the results of the first two rounds; files of another one are useless.
    """

    table: str
    tiles: int
    vectors: int
    memory: int
    digest: str

    def next_tasks(self, store: Store, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of the next round, for ``tasks`` that each make the table of a part from scratch.

        Parts that were added after the first round are searched directly.
        """
        files = store.state.group(ROUTES, self.table)
        tiling = files.get(TILING)
        if tiling is None or routes_about(tiling)["plan"] != self.digest:
            old = [entry.path for entry in files.entries()]
            return [self._task("tiling", len(tasks), [], {"remove": old})]
        missing = [task for task in tasks if files.get(part_slot(task.inputs["part"])) is None]
        found = [tile for tile in range(self.tiles) if files.get(_tile_slot(tile)) is not None]
        if missing and not found:
            return [
                self._task(f"routes of {task.label}", task.weight, [task.inputs["path"]], {"part": task.inputs["part"]})
                for task in missing
            ]
        if len(missing) < len(tasks) and len(found) < self.tiles:
            weight = sum(task.weight for task in tasks) // self.tiles
            left = [tile for tile in range(self.tiles) if tile not in found]
            return [self._task(f"tile {tile}", weight, [], {"tile": tile}) for tile in left]
        return [
            task if task in missing else replace(task, inputs={**task.inputs, "from_tiles": True}) for task in tasks
        ]

    def _task(self, label: str, weight: int, reads: list[str], inputs: dict[str, Any]) -> Task:
        key = task_key("neighbours", {"table": self.table, "plan": self.digest, "step": label}, reads)
        step = label.split()[0]
        inputs = {"step": step, "plan": self.digest, "tiles": self.tiles, "part": None, **inputs}
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
    memory = memory_of_machine() // _SHARE_OF_MACHINE if stage.memory is None else stage.memory
    few = _FEWEST_ROWS * sum(task.weight for task in tasks) < database.vectors_in_log
    if vectors <= memory or few or not database.record.nlist or search_scope.may_repeat(store):
        return None
    tiles = min(-(-vectors // room_of_tile(memory, is_gpu(stage.devices[0]))), database.record.nlist)
    held = [database.settings, database.point.nprobe, database.reads(), stage.saved, tiles]
    digest = hashlib.blake2b(repr([*held, digest_of_undone(store.state)]).encode(), digest_size=8).hexdigest()
    return TilePlan(stage.table, tiles, vectors, memory, digest)


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

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Write the file of a task."""
        inputs, table = task.inputs, self.stage.table
        if inputs["step"] == "tiling":
            entry = self._write_tiling(task, run)
            reads, remove = tuple(self.database.reads()), tuple(filter(self.store.state.has, inputs["remove"]))
        else:
            remove = ()
            tiling = self._file(TILING, inputs["plan"])
            tile_of = parts.read_parquet(self.store, tiling)["tile"].to_numpy()
            reads = (tiling.path,)
            if inputs["step"] == "routes":
                reads += (parts.part_entry(self.store, "embeddings", inputs["part"], self.database.encoder).path,)
                entry = self._route(inputs["part"], tile_of, inputs, run)
            else:
                requests = self._requests()
                reads += tuple(one.path for one in requests)
                entry = self._search(inputs["tile"], requests, inputs, run)
        report(task.weight)
        settings = {"name": table, "index": self.stage.index}
        return Staged("neighbours", settings, reads, (entry,), remove, task=task.key, run=run)

    def _file(self, slot: str, plan: str) -> FileEntry:
        entry = self.store.state.file(ROUTES, slot, self.stage.table)
        if entry is None or routes_about(entry)["plan"] != plan:
            raise ErasedError(f"{ROUTES} of {self.stage.table!r} were removed by another process")
        return entry

    def _requests(self) -> list[FileEntry]:
        files = self.store.state.group(ROUTES, self.stage.table).items()
        return [entry for slot, entry in files if slot.isdigit()]

    def _name(self, run: str, slot: str) -> FileName:
        return FileName.new(run, ROUTES, slot, "parquet", self.stage.table)

    def _write_tiling(self, task: Task, run: str) -> FileEntry:
        trained = self.database.trained
        assert trained.centroids is not None, "plan_tiles looked"
        sizes = np.zeros(trained.nlist, np.int64)
        for shard in self.database.shards:
            sizes += [shard.size(number) for number in shard.numbers]
        tile = split_lists(trained.centroids, sizes, task.inputs["tiles"])
        about = {"plan": task.inputs["plan"], "tiles": task.inputs["tiles"]}
        table = pa.table({"tile": tile}, schema=_TILING)
        return parts.write_parquet(self.store, self._name(run, TILING), table, about=about)

    def _route(self, part: int, tile_of: npt.NDArray[np.int32], inputs: Mapping[str, Any], run: str) -> FileEntry:
        """Write the rows of a part by tile."""
        store, encoder = self.store, self.database.encoder
        rows = searchable_rows(store, part, self.database.tombstones)
        vectors = read_part_vectors(store, encoder, part)
        lists, homes = self._lists(vectors, rows), self._homes(part, len(vectors))[rows]
        first, last = (ends[rows] for ends in search_scope.document_intervals(store, part))
        count: dict[str, list[int]] = {"homes": [], "guests": []}
        nprobe = lists.shape[1]
        probed_tiles, home_tiles = tile_of[lists].ravel(), np.where(homes >= 0, tile_of[homes], _NOWHERE)
        by_tile = np.argsort(probed_tiles, kind="stable")
        bounds = np.searchsorted(probed_tiles[by_tile], np.arange(inputs["tiles"] + 1))

        def sections() -> Iterator[pa.Table]:
            for tile, (low, high) in enumerate(pairwise(bounds.tolist())):
                interrupts.check()
                pairs = by_tile[low:high]  # of a row and a list, in the order of rows
                asking, counts = np.unique(pairs // nprobe, return_counts=True)
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
                for kind, chosen in (("homes", np.flatnonzero(is_home)), ("guests", np.flatnonzero(~is_home))):
                    count[kind].append(len(chosen))
                    if len(chosen):
                        its = some[chosen]
                        yield pa.table(
                            [
                                rows[its].astype(np.int32), first[its], last[its], homes[its],
                                probes.take(pa.array(chosen)), parts.fixed_binary(vectors[rows[its]].view(np.uint8)),
                            ],
                            schema=_requests_schema(vectors.shape[1]),
                        )  # fmt: skip

        schema = _requests_schema(vectors.shape[1])
        name = self._name(run, part_slot(part))
        entry = parts.write_batches(
            store, name, schema, sections(), row_group=_MOST_GROUP, brief=True, about={"plan": inputs["plan"]}
        )
        return replace(entry, about={"plan": inputs["plan"], **count})

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

    def _search(self, tile: int, requests: Sequence[FileEntry], inputs: Mapping[str, Any], run: str) -> FileEntry:
        """Answer the rows of all parts that probe a list of the tile."""
        loaded = LoadedTile(self.store, self.database, self.stage, requests, tile)
        done: list[int] = []

        def answers() -> Iterator[pa.Table]:
            for part, rows, best in loaded.answers():
                done.append(part)
                yield pa.table(
                    [
                        rows,
                        parts.fixed_binary(best.ids.view(np.uint8)),
                        parts.fixed_binary(best.distances.view(np.uint8)),
                    ],
                    schema=_answers_schema(self.stage.saved),
                )

        name = self._name(run, _tile_slot(tile))
        schema = _answers_schema(self.stage.saved)
        entry = parts.write_batches(
            self.store, name, schema, answers(), row_group=_MOST_GROUP, brief=True, about={"plan": inputs["plan"]}
        )
        return replace(entry, about={"plan": inputs["plan"], "parts": done})


class LoadedTile:
    """The vectors at home in a tile, in lists that are searched exactly, and the rows that probe them."""

    def __init__(
        self, store: Store, database: Database, stage: NeighboursStage, requests: Sequence[FileEntry], tile: int
    ) -> None:
        self._store, self._database, self._stage, self._tile = store, database, stage, tile
        self._requests = [
            one for one in requests if routes_about(one)["homes"][tile] + routes_about(one)["guests"][tile]
        ]
        starts = np.cumsum([0, *(routes_about(one)["homes"][tile] for one in self._requests)])
        self._places = [slice(low, high) for low, high in pairwise(starts.tolist())]
        d = int(store.state.records[f"encoder:{database.encoder}"]["dimension"])
        self._vectors = np.empty((int(starts[-1]), d), np.float16)
        ids, homes = np.empty(len(self._vectors), np.int64), np.empty(len(self._vectors), np.int32)
        self._at_home: list[pa.Table | None] = []  # the same rows without vectors
        for entry, place in zip(self._requests, self._places, strict=True):
            interrupts.check()
            table = self._read(entry, "homes")
            self._at_home.append(None if table is None else table.drop_columns(["home", "vector"]))
            if table is not None:
                self._vectors[place] = _vectors_of(table)
                ids[place] = parts.chunk_ids(int(entry.slot), table["row"].to_numpy())
                homes[place] = table["home"].to_numpy()
        self._ids, self._lists = ids, VectorLists(ids, self._vectors, homes, database.trained.nlist)
        device, self._on_device = stage.devices[0], None
        if is_gpu(device):
            self._on_device = OnDevice(device, database.trained, ids, homes, self._fetch, d)

    def _read(self, entry: FileEntry, kind: str) -> pa.Table | None:
        """Read a row group of a part: the rows at home in the tile, or its guests; None if there are none."""
        about = routes_about(entry)
        if not about[kind][self._tile]:
            return None
        before = sum(n > 0 for name in ("homes", "guests") for n in about[name][: self._tile])
        group = before + (kind == "guests" and about["homes"][self._tile] > 0)
        return parts.read_parquet(self._store, entry, row_groups=[group])

    def _fetch(self, ids: Ids) -> Vectors16:
        return self._vectors[np.searchsorted(self._ids, ids)]

    def answers(self) -> Iterator[tuple[int, npt.NDArray[np.int32], Best]]:
        """Yield each part with rows that probe the tile, these rows [n], and the nearest of each."""
        waiting, held, memory = list[tuple[int, Asked]](), 0, self._stage.memory
        most = _BATCH_ROWS if memory is None else min(_BATCH_ROWS, memory // _SHARE_FOR_ROWS // self._vectors.shape[1])
        for entry, place, table in zip(self._requests, self._places, self._at_home, strict=True):
            asked = self._asked(entry, place, table)
            if len(asked.rows):
                waiting.append((int(entry.slot), asked))
                held += len(asked.rows)
            if held >= most:
                yield from self._answered(waiting)
                waiting, held = [], 0
        yield from self._answered(waiting)

    def _asked(self, entry: FileEntry, place: slice, at_home: pa.Table | None) -> Asked:
        """Return the rows of a part that probe a list of the tile: those at home in it, and its guests."""
        found = [] if at_home is None else [Asked.of(at_home, self._vectors[place])]
        guests = self._read(entry, "guests")
        found += [] if guests is None else [Asked.of(guests, _vectors_of(guests))]
        return Asked.joined(found)

    def _answered(self, several: Sequence[tuple[int, Asked]]) -> Iterator[tuple[int, npt.NDArray[np.int32], Best]]:
        if several:
            interrupts.check()
            best, low = self._nearest(Asked.joined([asked for _, asked in several])), 0
            for part, asked in several:
                yield part, asked.rows, best.take(slice(low, low := low + len(asked.rows)))

    def _nearest(self, asked: Asked) -> Best:
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
        """Concatenate rows."""
        if len(several) == 1:
            return several[0]
        none = np.zeros(0, np.int64)
        nothing = cls(none.astype(np.int32), np.zeros((0, 0), np.float16), none, none, none, none.astype(np.int32))
        return cls(*map(np.concatenate, zip(*map(astuple, several), strict=True))) if several else nothing


def found_in_tiles(store: Store, table: str, part: int, rows: Ids, saved: int) -> Best:
    """Return the nearest of ``rows`` [n], ascending, of a part, from what all tiles have found."""
    best, files = Best.nothing(len(rows), saved), store.state.group(ROUTES, table)
    tiling = files.get(TILING)
    if tiling is None:
        raise ErasedError(f"{ROUTES} of {table!r} were removed by another process")
    for tile in range(routes_about(tiling)["tiles"]):
        entry = files.get(_tile_slot(tile))
        if entry is None or part not in routes_about(entry)["parts"]:
            continue
        found = parts.read_parquet(store, entry, row_groups=[routes_about(entry)["parts"].index(part)])
        ids = parts.from_fixed_binary(found["ids"], np.dtype(np.int64))
        distances = parts.from_fixed_binary(found["distances"], np.dtype(np.float32))
        its = found["row"].to_numpy()
        known = np.isin(its, rows)  # the others were purged since
        place = np.searchsorted(rows, its[known])
        so_far = Best(best.distances[place], best.ids[place])
        best.put(place, merged(so_far, Best(distances[known], ids[known]), saved))
    return best


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
