"""``neighbours``.

Results count living keys: those that are neither purged nor erased. What it can't do yet, because the command before it
was not run since a store grew, is counted too, with the commands to run next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrotool import engine
from retrotool.ann.choice import FLAT_LIMIT
from retrotool.commands.counting import command_line, count_keys_of, embed_command
from retrotool.commands.materialising import MaterialiseResult
from retrotool.commands.materialising import materialise as materialise_tables
from retrotool.commands.writing import writing
from retrotool.encoder import find_devices
from retrotool.errors import ConflictError, UsageError
from retrotool.stages.base import Task
from retrotool.stages.database import count_left, count_living_keys, embedded_parts, pick_encoder
from retrotool.stages.exact import NO_INDEX
from retrotool.stages.index_files import index_key
from retrotool.stages.neighbours import FEW, NeighboursStage, check_encoders
from retrotool.stages.searching import pick_index
from retrotool.store import claims
from retrotool.store.paths import check_name
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

K = 2
SAVED = 20


@dataclass(frozen=True, slots=True)
class NeighboursResult:
    """What ``neighbours`` did; ``queries`` are the keys searched for by this run, ``rows`` those the table has now.

    ``not_embedded`` keys of the query store have no embeddings, so no neighbours; ``not_indexed`` keys of the database
    are not in the index, so they are nobody's; ``next`` are the commands that change that. ``index`` is "" for exact
    search. ``elsewhere`` parts are left to other runs. ``materialised``: what was asked for with the tables.
    """

    name: str
    database: str
    index: str
    encoder: str
    queries: int
    rows: int
    k: int
    saved: int
    commit: int
    not_embedded: int = 0
    not_indexed: int = 0
    next: tuple[str, ...] = ()
    elsewhere: int = 0
    materialised: MaterialiseResult | None = None


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to go about it; see ``retrotool neighbours --help``."""

    exact: bool = False
    encoder: str | None = None
    memory: int | None = None
    devices: str = "auto"
    shard: tuple[int, int] | None = None


def neighbours(
    root: str | Path,
    *,
    queries: str | Path | None = None,
    k: int = K,
    saved: int = SAVED,
    name: str = "main",
    index: str | None = None,
    search: SearchOptions | None = None,
    materialise: bool = False,
) -> NeighboursResult:
    """Find the neighbours, in the store ``root``, of every chunk of ``queries`` (default: of itself).

    ``materialise``: then write their tokens, too, for a training loop to read.
    """
    search = search or SearchOptions()
    if not 1 <= k <= saved:
        raise UsageError(f"-k {k} is not between 1 and --saved {saved}")
    if saved > 1000:
        raise UsageError(f"--saved {saved} is more than 1000")
    if search.shard is not None and not 0 <= search.shard[0] < search.shard[1]:
        raise UsageError(f"--shard {search.shard[0]}/{search.shard[1]}: of n jobs this is one from 0 to n - 1")
    check_name(name, "--name")
    devices = tuple(find_devices(search.devices))
    chosen = _choose_index(Store.open(root), index, search)
    stage = NeighboursStage(
        str(Path(root).absolute()), chosen, name, saved, k, search.encoder, search.memory, devices, search.shard
    )
    database = stage.open_database()
    store = Store.open(queries) if queries is not None else Store.open(root)
    check_encoders(store, database)
    with writing(store) as run:
        todo = _count_queries(store, stage.plan(store))
        record = stage.record(store, database)
        store.commit(run, lambda state: stage.claim(state, record))
        engine.execute(stage, store, run, workers=len(devices))
        _check_claim(store, stage, record)
        store.refresh()
        held = claims.held(store.root, run.id)
        elsewhere = sum(task.key in held for task in stage.plan(store))
    made = materialise_tables(store.root, name=name, shard=search.shard) if materialise else None
    state = store.refresh()
    database = stage.open_database()
    rows = count_keys_of(store, map(int, state.group("neighbours", name)))
    not_embedded = count_left(store, embedded_parts(store, database.encoder), read_tombstones(store))
    not_indexed = count_left(database.store, database.held(), database.tombstones)
    left: list[str] = []
    if not_embedded:
        left.append(embed_command(store, queries or root, database.encoder))
    if not_indexed:
        if count_left(database.store, embedded_parts(database.store, database.encoder), database.tombstones):
            left.append(embed_command(database.store, root, database.encoder))
        if chosen != NO_INDEX:
            left.append(command_line("index", root, name=chosen))
    if left:
        given = {"k": None if k == K else k, "saved": None if saved == SAVED else saved}
        asked = {"index": chosen or None, "encoder": search.encoder}
        again = command_line("neighbours", root, queries=queries, **given, name=name, **asked)
        left.append(f"{again} --exact" if search.exact else again)
    return NeighboursResult(
        name, str(root), chosen, database.encoder, todo, rows, k, saved, state.number, not_embedded, not_indexed,
        tuple(dict.fromkeys(left)), elsewhere, made,
    )  # fmt: skip


def _choose_index(store: Store, index: str | None, search: SearchOptions) -> str:
    """The index to search, or ``NO_INDEX``: where that is asked for, or there is none and exact search is quicker."""
    if search.exact:
        if index is not None:
            raise UsageError("--exact searches without an index", "Give --exact or --index.")
        return NO_INDEX
    if index is None and not store.state.with_prefix(index_key("")) and store.state.names("embeddings"):
        encoder = pick_encoder(store, search.encoder)
        tombstones = read_tombstones(store)
        if sum(count_living_keys(store, part, tombstones) for part in embedded_parts(store, encoder)) <= FLAT_LIMIT:
            return NO_INDEX
    if search.encoder is not None:
        raise UsageError("--encoder says what exact search is among; an index is of one encoder", "Give --exact, too.")
    return pick_index(store, index)


def _check_claim(store: Store, stage: NeighboursStage, record: Mapping[str, Any]) -> None:
    """``ConflictError`` if another run took the name for other tables meanwhile."""
    known = store.refresh().records.get(stage.key)
    if known is None or any(known[field] != record[field] for field in ("database", "index", "encoder")):
        raise ConflictError(
            f"another run made the neighbours {stage.table!r} with another index meanwhile",
            "Give one of them a name of its own with --name.",
        )


def _count_queries(store: Store, tasks: Iterable[Task]) -> int:
    """Living keys that tasks of ``neighbours`` search for; of a table to refill only some rows."""
    tasks = list(tasks)
    whole = count_keys_of(store, [task.inputs["part"] for task in tasks if task.inputs["mode"] != FEW])
    return whole + sum(task.weight for task in tasks if task.inputs["mode"] == FEW)
