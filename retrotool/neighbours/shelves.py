"""Store the tokens of the neighbours of all chunks, of a database whose text doesn't fit into memory.

The neighbours of one part are chunks of nearly all parts. Reading their tokens part by part would read the
whole database again for every part (``neighbours.retrieved``). Here every chunk file is read once, in three
rounds of tasks, as in ``neighbours.tiles``, after the tables were made without tokens:

1. For each part, write the ids of the neighbours whose tokens it needs, in a row group per *shelf*: a run of
   parts of the database, the answers from which fit into memory.
2. For each shelf, read its chunks, and write the tokens that each part needs, in a row group per part.
3. The task of a part, as in ``neighbours.stage``, puts them into its table.

Files are of the kind ``routes``, and are treated like those of a search in tiles. Bytes: the chunk files
once, the ids, and the tokens, which are written and read once more than they are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from retrotool import interrupts
from retrotool.cli import output
from retrotool.embed import search_scope
from retrotool.engine.task import Report, Task
from retrotool.errors import ErasedError
from retrotool.machine import memory_of_machine
from retrotool.neighbours.retrieved import Pieces, read_pieces
from retrotool.neighbours.tiles import do_route_task, route_task, routes_about, routes_of, write_routes
from retrotool.ranges import runs_up_to
from retrotool.store import neighbour_tables, parts
from retrotool.store.log import FileEntry
from retrotool.store.parts import Ids
from retrotool.store.staging import Staged
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, digest_of_undone

if TYPE_CHECKING:
    from retrotool.neighbours.stage import NeighboursStage

_SHARE_OF_MACHINE, _SHARE_FOR_SHELF, _FEWEST_ROWS = 2, 4, 8
_ASKED = pa.schema({"id": pa.int64()})


@dataclass(frozen=True, slots=True)
class ShelfPlan:
    """How tokens of ``text`` bytes in all are read, of which ``memory`` bytes may be loaded at a time.

    ``shelves``: the first and the last part of each. ``digest``: of all that decides what is read.
    """

    table: str
    shelves: tuple[tuple[int, int], ...]
    text: int
    memory: int
    digest: str
    undone: str

    def next_tasks(self, store: Store, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of the next round, for ``tasks`` that add tokens to the table of a part each."""
        written = routes_of(store, self.table, self.digest)
        missing = [task for task in tasks if _asks_slot(task.inputs["part"]) not in written]
        left = [number for number in range(len(self.shelves)) if _shelf_slot(number) not in written]
        if missing and len(left) == len(self.shelves):
            return [self._task(store, _asks_slot(one.inputs["part"]), one.label, one.inputs["part"]) for one in missing]
        if left and len(missing) < len(tasks):
            return [self._task(store, _shelf_slot(n), f"shelf {n}", shelf=n) for n in left]
        return [
            one if one in missing else replace(one, inputs={**one.inputs, "from_shelves": [self.digest, self.undone]})
            for one in tasks
        ]

    def has_shelves(self, store: Store) -> bool:
        """Return whether some shelves are there already: what is left of a run that was killed needs them."""
        return any(slot.startswith("shelf-") for slot in routes_of(store, self.table, self.digest))

    def _task(self, store: Store, slot: str, label: str, part: int | None = None, shelf: int | None = None) -> Task:
        inputs = {"step": "text", "part": part, "shelf": shelf, "shelves": self.shelves}
        return route_task(store, self.table, slot, self.digest, f"text of {label}", 1, inputs)

    def __str__(self) -> str:
        return f"{output.size(self.text)} of text, more than {output.size(self.memory)}: {len(self.shelves)} shelves"


def plan_shelves(stage: NeighboursStage, store: Store, database: Store, tasks: Sequence[Task]) -> ShelfPlan | None:
    """Return how to read the tokens for ``tasks``, which only add them; None: each reads what it needs."""
    if not stage.text or not tasks or not search_scope.is_same_store(store, database):
        return None
    numbers, own = database.state.parts(), database.identity
    entries = [parts.part_entry(database, "chunks", part) for part in numbers]
    share = memory_of_machine() // _SHARE_OF_MACHINE // len(stage.devices)
    memory = share if stage.memory is None else stage.memory
    each = 2 * stage.k * own.chunk_length * own.tokenizer.token_bytes  # of a row, as often asked for as it asks
    text = sum(entry.rows for entry in entries) * own.chunk_length * own.tokenizer.token_bytes
    if text <= memory:
        return None
    rows = {part: entry.rows for part, entry in zip(numbers, entries, strict=True)}
    runs = runs_up_to(memory // _SHARE_FOR_SHELF // each, numbers, rows.__getitem__)
    shelves = tuple((run[0], run[-1]) for run in runs)
    undone = digest_of_undone(database.state)
    held = [stage.k, shelves, [entry.path for entry in entries], undone]
    digest = hashlib.blake2b(repr(held).encode(), digest_size=8).hexdigest()
    plan = ShelfPlan(stage.table, shelves, text, memory, digest, undone)
    few = _FEWEST_ROWS * len(tasks) < len(numbers)
    return None if few and not plan.has_shelves(store) else plan


def do_text_step(
    store: Store, tombstones: Tombstones, stage: NeighboursStage, task: Task, run: str, report: Report
) -> Staged | None:
    """Do a task of the first two rounds; return None if it is done already."""
    inputs = task.inputs

    def ask() -> tuple[FileEntry, Sequence[str]]:
        table = store.state.part_file("neighbours", inputs["part"], stage.table)
        if table is None:
            raise ErasedError(f"the table of part {inputs['part']} was removed by another process")
        asked = _asks(store, tombstones, table, stage.k, inputs["shelves"])
        sections = (pa.table([ids], schema=_ASKED) for ids in asked if len(ids))
        entry = write_routes(store, stage.table, inputs, run, _ASKED, sections)
        return replace(entry, about={"plan": inputs["plan"], "asked": list(map(len, asked))}), [table.path]

    def answer() -> tuple[FileEntry, Sequence[str]]:
        files = routes_of(store, stage.table, inputs["plan"]).items()
        asks, done = [one for slot, one in files if slot.startswith("asks-")], list[int]()
        first, last = inputs["shelves"][inputs["shelf"]]
        chunks = [parts.part_entry(store, "chunks", n) for n in store.state.parts() if first <= n <= last]
        answers = _answers(store, tombstones, asks, inputs["shelf"], done)
        entry = write_routes(store, stage.table, inputs, run, _answers_schema(store), answers)
        return replace(entry, about={"plan": inputs["plan"], "parts": done}), [one.path for one in (*asks, *chunks)]

    return do_route_task(store, stage, task, run, report, ask if inputs["shelf"] is None else answer)


def _asks(
    store: Store, tombstones: Tombstones, table: FileEntry, k: int, shelves: Sequence[Sequence[int]]
) -> list[Ids]:
    """Return for each shelf the ids, ascending, of the first k live neighbours in a table."""
    near = neighbour_tables.read_table(store, table)
    near = neighbour_tables.erase_neighbours(near, np.zeros(0, np.int64), tombstones.contains)
    ids = np.unique(near.ids[:, :k])
    ids = ids[ids >= 0]
    return np.split(ids, np.searchsorted(ids, [parts.join_id(first, 0) for first, _ in shelves]))[1:]


def _answers(
    store: Store, tombstones: Tombstones, asks: Sequence[FileEntry], shelf: int, done: list[int]
) -> Iterator[pa.Table]:
    """Yield the tokens of what each part asks for, in the order of parts, which are added to ``done``."""
    asked = {int(entry.slot.removeprefix("asks-")): ids for entry in asks if len(ids := _asked(store, entry, shelf))}
    every = np.unique(np.concatenate([np.zeros(0, np.int64), *asked.values()]))
    pieces = read_pieces(store, tombstones, every)
    for part, ids in asked.items():
        interrupts.check()
        place = np.searchsorted(every, ids)
        done.append(part)
        columns = [
            ids, parts.fixed_binary(pieces.n_tokens[place].astype(np.int32).view(np.uint8)),
            parts.fixed_binary(pieces.tokens[place].reshape(len(ids), -1).view(np.uint8)),
        ]  # fmt: skip
        yield pa.table(columns, schema=_answers_schema(store))


def _asked(store: Store, entry: FileEntry, shelf: int) -> Ids:
    counts = routes_about(entry)["asked"]
    if not counts[shelf]:
        return np.zeros(0, np.int64)
    group = sum(n > 0 for n in counts[:shelf])
    ids: Ids = parts.read_parquet(store, entry, row_groups=[group])["id"].to_numpy()
    return ids


def from_shelves(
    store: Store, tombstones: Tombstones, table: str, part: int, plan: str
) -> Callable[[Ids, Pieces], Pieces]:
    """Return a function that fills pieces as ``read_pieces`` does, from what a plan has for a part.

    Ids that it did not ask for, because its table has changed since, are read directly.
    """
    own, found = store.identity, [_answers_schema(store).empty_table()]
    for slot, entry in routes_of(store, table, plan).items():
        if slot.startswith("shelf-") and part in (numbers := routes_about(entry)["parts"]):
            found.append(parts.read_parquet(store, entry, row_groups=[numbers.index(part)]))
    joined, dtype = pa.concat_tables(found), parts.token_dtype(own.tokenizer.token_bytes)
    ids, n_tokens = joined["id"].to_numpy(), parts.from_fixed_binary(joined["n_tokens"], np.dtype(np.int32))
    all_tokens = parts.from_fixed_binary(joined["tokens"], dtype).reshape(-1, 2, own.chunk_length)

    def read(wanted: Ids, into: Pieces) -> Pieces:
        live = (wanted >= 0) & ~tombstones.contains(wanted)
        place = np.minimum(np.searchsorted(ids, wanted), max(len(ids) - 1, 0))
        there = live & (ids[place] == wanted) if len(ids) else np.zeros(len(wanted), np.bool_)
        into.n_tokens[there], into.tokens[there] = n_tokens[place[there]], all_tokens[place[there]]
        gone = there & (into.n_tokens[:, 1] > 0) & tombstones.contains(wanted + 1)  # continuations purged since
        into.n_tokens[gone, 1], into.tokens[gone, 1] = 0, 0
        left = live & ~there
        return read_pieces(store, tombstones, np.where(left, wanted, -1), into) if left.any() else into

    return read


def _asks_slot(part: int) -> str:
    return f"asks-{part:06d}"


def _shelf_slot(number: int) -> str:
    return f"shelf-{number:05d}"


def _answers_schema(store: Store) -> pa.Schema:
    own = store.identity
    size = 2 * own.chunk_length * own.tokenizer.token_bytes
    return pa.schema([("id", pa.int64()), ("n_tokens", pa.binary(8)), ("tokens", pa.binary(size))])
