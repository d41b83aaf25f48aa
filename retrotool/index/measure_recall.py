"""Measuring an index and committing what was found: its operating point, its recall, and the curve."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from retrotool.ann.choice import parse_factory
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.engine.progress import counting
from retrotool.errors import ConflictError
from retrotool.index.index_files import read_shards, read_trained
from retrotool.index.index_records import (
    QUERIES,
    RECALL,
    IndexRecord,
    TrainingRecord,
    generation_of,
    held_parts,
    index_key,
    index_record,
    shards,
    shards_digest,
    trained_entry,
    training_record,
)
from retrotool.index.recall import Measurement, Searched, find_truth, measure_recall
from retrotool.index.searching import Point, Vectors, room_in
from retrotool.index.stage import superseded
from retrotool.index.staleness import Drift, drift
from retrotool.machine import give_memory_back
from retrotool.store.ids import part_of
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones


def measure_until_committed(
    store: Store,
    run: Run,
    name: str,
    generation: int,
    target: float,
    *,
    queries: int = QUERIES,
    keep: bool = False,
    device: str = "cpu",
    memory: int | None = None,
) -> None:
    """Measure a generation of an index and commit its record, which makes that the current one.

    Again if another process has changed the shards, or erased what was read, meanwhile. ``keep``: at the operating
    point that the record has, which stays. ``memory``: bytes, if not those that it was trained in.
    """

    def attempt() -> None:
        if trained_entry(store.state, name, generation) is None:
            raise superseded(name)
        _measure(store, run, name, generation, target, queries, keep, device, memory)

    retry_overtaken(attempt, store.renew)


_ENOUGH = 50
"""Queries from new parts below which their recall says nothing."""


def _measure(
    store: Store,
    run: Run,
    name: str,
    generation: int,
    target: float,
    queries: int,
    keep: bool,
    device: str,
    memory: int | None,
) -> None:
    _, trained = read_trained(store, name, generation)
    entries, training = shards(store.state, name, generation), training_record(store.state, name, generation)
    assert training is not None, "it was read"
    encoder = training.encoder
    room = room_in(training.asked.memory if memory is None else memory)
    opened = list(read_shards(store, name, trained, generation=generation))
    numbers = held_parts(store.state, name, generation)
    before = index_record(store.state, name)
    at = Point(before.nprobe, before.depth) if keep and before is not None else None
    with counting("exact search", "part", len(numbers)) as report:
        truth = find_truth(store, encoder, numbers, report, queries=queries, device=device, room=room)
    give_memory_back()
    with counting("recall", "point") as report:
        found = measure_recall(
            truth, Searched(trained, opened, Vectors(store, encoder), read_tombstones(store).contains), target, at=at,
            groups={"source": truth.sources, "part": _new_or_not(truth.ids, training.parts)},
            report=report, device=device, room=room,
        )  # fmt: skip
    record = asdict(_record(store.state, name, generation, training, found, target))
    content = {**record, **asdict(found)}
    file = write_json_file(store.root, FileName.new(run.id, "index", RECALL, "json", name), content, len(found.curve))

    def build(state: State) -> Draft:
        gone = trained_entry(state, name, generation) is None or generation < generation_of(state, name)
        if gone or shards(state, name, generation) != entries:
            raise ConflictError(f"the index {name!r} was changed while it was measured", "Run the same command again.")
        settings = {"name": name, "encoder": encoder, "target": target, "generation": generation}
        return Draft(
            "index", settings, add=(file,), remove=_replaced(state, name, generation), records={index_key(name): record}
        )

    store.commit(run, build)


def _new_or_not(ids: npt.NDArray[np.int64], seen: set[int]) -> npt.NDArray[np.object_]:
    """For each chunk whether its part is one that the index was trained on."""
    parts = part_of(ids)
    return np.where(np.isin(parts, np.array(sorted(seen), np.int64)), "trained on", "added since").astype(object)


def _record(
    state: State, name: str, generation: int, training: TrainingRecord, found: Measurement, target: float
) -> IndexRecord:
    point, moved = found.point, drift(state, name, generation)
    choice = replace(parse_factory(training.factory, training.dimension), why=training.why)
    return IndexRecord(
        **asdict(choice.shape()), encoder=training.encoder, generation=generation, vectors=moved.vectors,
        nprobe=point.nprobe, depth=point.depth, target=target, holds=found.holds,
        recall_at_1=round(point.recall_at_1, 4), recall_at_10=round(point.recall_at_10, 4),
        recall_at_100=round(point.recall_at_100, 4), recall_error=round(point.error, 4), queries=found.queries,
        share=round(found.share, 4), rate=round(point.rate, 1), imbalance=round(moved.imbalance, 3),
        files=shards_digest(state, name, generation), due=_due(moved, found, target),
    )  # fmt: skip


def _due(moved: Drift, found: Measurement, target: float) -> str:
    """Why to train anew; "" if there is no reason."""
    new = found.groups.get("part", {}).get("added since")
    if new is not None and new[2] >= _ENOUGH and new[0] + new[1] < min(target, found.point.recall_at_10):
        return f"recall@10 of what was added since the training is {new[0]:.4f} ± {new[1]:.4f}"
    return moved.due


def _replaced(state: State, name: str, generation: int) -> tuple[str, ...]:
    """Paths of what a measurement takes the place of: the one before, and what is of other generations."""
    group = state.group("index", name)
    kept = {f.path for f in shards(state, name, generation).values()}
    trained = trained_entry(state, name, generation)
    kept |= {trained.path} if trained else set()
    current = generation_of(state, name)
    found = []
    for slot in group:
        entry = group.get(slot)
        measured = slot == RECALL
        if entry is not None and entry.path not in kept and (measured or generation != current):
            found.append(entry.path)
    return tuple(found)
