"""``index`` and ``neighbours``.

Results count living keys: those that are neither purged nor erased. What a command can't do yet, because the one before
it was not run since the store grew, is counted too, with the commands to run next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from retrotool import engine
from retrotool.ann import lists
from retrotool.commands.counting import command_line, count_keys_of, embed_command
from retrotool.commands.writing import writing
from retrotool.errors import ConflictError, CorruptError, ErasedError, UsageError
from retrotool.stages.base import Task
from retrotool.stages.chunk_plan import write_json
from retrotool.stages.database import Database, count_left, embedded_parts, pick_encoder
from retrotool.stages.index import IndexStage, encoder_of, read_trained, shards
from retrotool.stages.neighbours import NeighboursStage, check_encoders
from retrotool.stages.recall import Recall, tune
from retrotool.store.log import Draft
from retrotool.store.paths import FileName, check_name
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

K = 2
SAVED = 20


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What ``index`` made. ``bytes_per_vector`` is what the shards' files take, divided by their vectors.

    ``not_embedded`` keys are in no shard, for they have no embeddings; ``next`` are the commands that change that.
    """

    name: str
    encoder: str
    kind: str
    vectors: int
    shards: int
    nlist: int
    nprobe: int
    bytes_per_vector: float
    recall_at_10: float
    recall_error: float
    commit: int
    curve: tuple[Recall, ...] = ()
    not_embedded: int = 0
    next: tuple[str, ...] = ()


def index(
    root: str | Path,
    *,
    name: str = "main",
    encoder: str | None = None,
    target_recall: float = 0.95,
    stage: IndexStage | None = None,
) -> IndexResult:
    """Index every part that has embeddings and is in no shard, and measure the recall."""
    if not 0 < target_recall <= 1:
        raise UsageError(f"--target-recall {target_recall} is not above 0 and at most 1")
    check_name(name, "--name")
    store = Store.open(root)
    chosen = pick_encoder(store, encoder or encoder_of(store, name))
    stage = stage or IndexStage(name, chosen)
    with writing(store) as run:
        engine.execute(stage, store, run)
        record = store.refresh().records.get(f"index:{name}")
        current = sorted(shards(store.state, name))
        vectors = sum(entry.rows for slot in current if (entry := store.state.file("index", slot, name)) is not None)
        made = {"shards": current, "vectors": vectors, "target": target_recall}
        if record is None or any(record[key] != value for key, value in made.items()):
            record = _measure_until_committed(store, run, name, chosen, target_recall)
    state = store.refresh()
    curve = tuple(Recall(**point) for point in record["curve"])
    shown = {
        key: record[key]
        for key in ("encoder", "kind", "vectors", "nlist", "nprobe", "bytes_per_vector", "recall_at_10", "recall_error")
    }
    left = count_left(store, embedded_parts(store, chosen), read_tombstones(store))
    todo = (embed_command(store, root, chosen), command_line("index", root, name=name)) if left else ()
    return IndexResult(
        name=name, shards=len(record["shards"]), commit=state.number, curve=curve, not_embedded=left, next=todo, **shown
    )


def _measure_until_committed(store: Store, run: Run, name: str, encoder: str, target: float) -> dict[str, Any]:
    """Measure, and again if another process has changed the shards, or erased what was read, meanwhile."""
    while True:
        seen = store.state.number
        try:
            return _measure(store, run, name, encoder, target)
        except (ConflictError, ErasedError):
            store.refresh()
        except CorruptError:
            # A file that is unlinked between being looked up and being read looks broken.
            if store.refresh().number == seen:
                raise


def _measure(store: Store, run: Run, name: str, encoder: str, target: float) -> dict[str, Any]:
    """Measure an index's recall and commit its record."""
    parts = len(embedded_parts(store, encoder))
    with tqdm(total=parts, unit="part", desc="recall", disable=None, delay=2, file=sys.stderr) as bar:
        point, curve = tune(store, encoder, name, target, bar.update)
    group = store.state.group("index", name)
    entries = {slot: entry for slot in group if slot.startswith("shard-") and (entry := group.get(slot)) is not None}
    count = sum(entry.rows for entry in entries.values())
    size = sum(entry.bytes for entry in entries.values())
    centroids = lists.centroids_of(read_trained(store, name)[1])
    nlist = 0 if centroids is None else len(centroids)
    record: dict[str, Any] = {
        "encoder": encoder, "kind": "IVF, float16" if nlist else "flat, float16",
        "nlist": nlist, "nprobe": point.nprobe, "target": target,
        "vectors": count, "bytes_per_vector": round(size / max(count, 1), 2), "shards": sorted(entries),
        "recall_at_10": round(point.recall, 4), "recall_error": round(point.error, 4),
        "curve": [{"nprobe": p.nprobe, "recall": p.recall, "error": p.error, "queries": p.queries} for p in curve],
    }  # fmt: skip
    report = write_json(store.root, FileName.new(run.id, "index", "recall", "json", name), record, len(curve))

    def build(state: State) -> Draft:
        if {slot: state.file("index", slot, name) for slot in shards(state, name)} != entries:
            raise ConflictError(f"index {name!r} was changed while its recall was measured")
        old = state.file("index", "recall", name)
        settings = {"name": name, "encoder": encoder, "target": target}
        return Draft(
            "index", settings, add=(report,), remove=(old.path,) if old else (), records={f"index:{name}": record}
        )

    store.commit(run, build)
    return record


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
    index: str = "main",
) -> NeighboursResult:
    """Find the neighbours, in the store ``root``, of every chunk of ``queries`` (default: of itself)."""
    if not 1 <= k <= saved:
        raise UsageError(f"-k {k} is not between 1 and --saved {saved}")
    if saved > 1000:
        raise UsageError(f"--saved {saved} is more than 1000")
    check_name(name, "--name")
    database = Database(Store.open(root), index)
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
    held = [part for about in shards(database.store.state, index).values() for part in about["parts"]]
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
