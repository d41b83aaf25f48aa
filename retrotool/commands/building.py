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
from retrotool.commands.counting import command_line, count_keys_of, embed_command
from retrotool.commands.writing import writing
from retrotool.errors import ConflictError, UsageError
from retrotool.stages.base import Task
from retrotool.stages.database import count_left, embedded_parts
from retrotool.stages.index_files import held_parts
from retrotool.stages.neighbours import NeighboursStage, check_encoders
from retrotool.stages.searching import Database
from retrotool.store.paths import check_name
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

K = 2
SAVED = 20


@dataclass(frozen=True, slots=True)
class NeighboursResult:
    """What ``neighbours`` did; ``queries`` are the keys searched for by this run, ``rows`` those the table has now.

    ``not_embedded`` keys of the query store have no embeddings, so no neighbours; ``not_indexed`` keys of the database
    are not in the index, so they are nobody's; ``next`` are the commands that change that.
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


def neighbours(
    root: str | Path,
    *,
    queries: str | Path | None = None,
    k: int = K,
    saved: int = SAVED,
    name: str = "main",
    index: str | None = None,
) -> NeighboursResult:
    """Find the neighbours, in the store ``root``, of every chunk of ``queries`` (default: of itself)."""
    if not 1 <= k <= saved:
        raise UsageError(f"-k {k} is not between 1 and --saved {saved}")
    if saved > 1000:
        raise UsageError(f"--saved {saved} is more than 1000")
    check_name(name, "--name")
    database = Database(Store.open(root), index)
    index = database.name
    store = Store.open(queries) if queries is not None else Store.open(root)
    check_encoders(store, database)
    with writing(store) as run:
        stage = NeighboursStage(str(Path(root).absolute()), index, name, saved, k)
        todo = _count_queries(store, stage.plan(store))
        record = stage.record(store, database)
        store.commit(run, lambda state: stage.claim(state, record))
        engine.execute(stage, store, run)
        _check_claim(store, stage, record)
    state = store.refresh()
    database = Database(Store.open(root), index)
    rows = count_keys_of(store, map(int, state.group("neighbours", name)))
    held = held_parts(database.store.state, index)
    not_embedded = count_left(store, embedded_parts(store, database.encoder), read_tombstones(store))
    not_indexed = count_left(database.store, held, database.tombstones)
    left: list[str] = []
    if not_embedded:
        left.append(embed_command(store, queries or root, database.encoder))
    if not_indexed:
        if count_left(database.store, embedded_parts(database.store, database.encoder), database.tombstones):
            left.append(embed_command(database.store, root, database.encoder))
        left.append(command_line("index", root, name=index))
    if left:
        chosen = {"k": None if k == K else k, "saved": None if saved == SAVED else saved}
        left.append(command_line("neighbours", root, queries=queries, **chosen, name=name, index=index))
    return NeighboursResult(
        name, str(root), index, database.encoder, todo, rows, k, saved, state.number, not_embedded, not_indexed,
        tuple(dict.fromkeys(left)),
    )  # fmt: skip


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
    whole = count_keys_of(store, [task.inputs["part"] for task in tasks if not task.inputs["refill"]])
    return whole + sum(task.weight for task in tasks if task.inputs["refill"])
