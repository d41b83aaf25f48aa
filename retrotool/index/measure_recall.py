"""Measure an index and commit the result: operating point, recall, and whether retraining is recommended.

Whether to retrain follows from the distances and lists in the ``ShardRecord``s: parts that the training
sampled are compared with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.ann.choice import parse_factory
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.engine.progress import counting
from retrotool.errors import ConflictError
from retrotool.index.index_files import read_shards, read_trained
from retrotool.index.index_records import RECALL, IndexFiles, IndexRecord, ShardRecord, TrainingRecord, index_key
from retrotool.index.recall import Measurement, Searched, find_truth, measure_recall
from retrotool.index.searching import Vectors, room_in
from retrotool.index.stage import superseded
from retrotool.machine import give_memory_back
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.parts import distinct_parts, part_of
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import read_tombstones

Fits = npt.NDArray[np.float64]  # [n, 3]: vectors of a part, mean squared distances to centroids and to codes
# Thresholds for retraining, relative to the training: squared distances, imbalance, number of vectors.
_WORSE, _UNEVEN, _GROWN = 1.15, 2.0, 4.0
_ENOUGH_NEW = 1000  # new vectors below which an average means nothing
_ENOUGH = 50  # queries from new parts below which their recall means nothing


def measure_until_committed(
    store: Store,
    run: Run,
    name: str,
    generation: int,
    target: float,
    *,
    sample: int,
    device: str = "cpu",
    memory: int | None = None,
) -> None:
    """Measure a generation of an index and commit its record, which makes it the current one.

    Retries if another process interferes. ``memory`` is in bytes.
    """

    def attempt() -> None:
        files = IndexFiles(store.state, name, generation)
        training = files.training
        if training is None:
            raise superseded(name)
        _, trained = read_trained(store, name, generation)
        encoder, numbers = training.encoder, files.parts
        room = room_in(training.asked.memory if memory is None else memory)
        opened = list(read_shards(store, name, trained, generation=generation))
        with counting("exact search", "part", len(numbers)) as report:
            truth = find_truth(store, encoder, numbers, report, sample=sample, device=device, room=room)
        give_memory_back()
        with counting("recall", "point") as report:
            index = Searched(trained, opened, Vectors(store, encoder), read_tombstones(store).contains)
            seen = np.array(sorted(training.sampled(distinct_parts(truth.ids))), np.int64)
            trained_on = np.isin(part_of(truth.ids), seen)
            new_or_not = np.where(trained_on, "trained on", "added since").astype(object)
            groups = {"source": truth.sources, "part": new_or_not}
            found = measure_recall(truth, index, target, groups=groups, report=report, device=device, room=room)
        record = asdict(_record(files, training, found, target))
        path = FileName.new(run.id, "index", RECALL, "json", name)
        file = write_json_file(store, path, {**record, **asdict(found)}, len(found.curve))

        def build(state: State) -> Draft:
            now = IndexFiles(state, name, generation)
            if now.trained is None or generation < now.current or now.shards != files.shards:
                raise ConflictError(
                    f"the index {name!r} was changed while it was measured", "Run the same command again."
                )
            settings = {"name": name, "encoder": encoder, "target": target, "generation": generation}
            # Remove the previous measurement or, if the generation becomes current, all files of others.
            kept, is_new = [now.trained, *now.shards.values()], generation != now.current
            group = state.group("index", name).items()
            old = tuple(one.path for slot, one in group if slot == RECALL or (is_new and one not in kept))
            return Draft("index", settings, add=(file,), remove=old, records={index_key(name): record})

        store.commit(run, build)

    retry_overtaken(attempt, store.renew)


def _record(files: IndexFiles, training: TrainingRecord, found: Measurement, target: float) -> IndexRecord:
    point, moved = found.point, drift(files)
    choice = replace(parse_factory(training.factory, training.dimension), why=training.why)
    return IndexRecord(
        **asdict(choice.shape()), encoder=training.encoder, generation=files.generation, vectors=moved.vectors,
        nprobe=point.nprobe, depth=point.depth, target=target, target_met=found.target_met,
        recall_at_1=round(point.recall_at_1, 4), recall_at_10=round(point.recall_at_10, 4),
        recall_at_100=round(point.recall_at_100, 4), recall_error=round(point.error, 4), queries=found.queries,
        share=round(found.share, 4), rate=round(point.rate, 1), imbalance=round(moved.imbalance, 3),
        files=files.digest, retrain_reason=_due(moved, found, target),
    )  # fmt: skip


def _due(moved: Drift, found: Measurement, target: float) -> str:
    new = found.groups.get("part", {}).get("added since")
    if new is not None and new[2] >= _ENOUGH and new[0] + new[1] < min(target, found.point.recall_at_10):
        return f"recall@10 of vectors added since training is {new[0]:.4f} ± {new[1]:.4f}"
    return moved.retrain_reason


@dataclass(frozen=True, slots=True)
class Drift:
    """How ``new`` vectors differ from others; errors are ratios. ``retrain_reason`` may be ""."""

    new: int
    vectors: int
    error: float = 1.0
    code_error: float = 1.0
    imbalance: float = 1.0
    grown: float = 1.0
    retrain_reason: str = ""


def drift(files: IndexFiles) -> Drift:
    """Compare the contents of an index with what it was trained on."""
    trained, entries, vectors = files.training, list(files.shards.values()), files.vectors
    if trained is None:
        return Drift(0, vectors)
    records = [ShardRecord.of(entry) for entry in entries]
    seen = trained.sampled(part for one in records for part in one.parts)
    fits = [(part in seen, *fit) for one in records for part, fit in zip(one.parts, one.fit, strict=True)]
    table = np.array(fits, np.float64).reshape(-1, 4)
    old, new = table[table[:, 0] == 1, 1:], table[table[:, 0] == 0, 1:]
    errors = _ratio(old, new, 1, trained.error), _ratio(old, new, 2, trained.code_error)
    uneven = _imbalance(records, [entry.rows for entry in entries])
    grown = vectors / trained.held if trained.held else 1.0
    found = Drift(int(new[:, 0].sum()), vectors, *errors, uneven, grown)
    # An exact index is not trained.
    return replace(found, retrain_reason=_drift_due(found, trained.imbalance)) if trained.error else found


def _drift_due(found: Drift, imbalance: float) -> str:
    if found.new < _ENOUGH_NEW:
        return ""
    signs = (
        (found.error > _WORSE, f"new vectors are {found.error:.2f} times as far from their centroids"),
        (found.code_error > _WORSE, f"new vectors are {found.code_error:.2f} times as far from their codes"),
        (found.imbalance > _UNEVEN * max(imbalance, 1.0),
         f"lists have become uneven: imbalance {found.imbalance:.1f}, was {imbalance:.1f}"),
        (found.grown > _GROWN, f"there are {found.grown:.1f} times as many vectors as at training"),
    )  # fmt: skip
    return next((why for is_so, why in signs if is_so), "")


def _imbalance(records: Sequence[ShardRecord], vectors: Sequence[int]) -> float:
    pairs = zip(records, vectors, strict=True)
    known = [(one.imbalance, rows) for one, rows in pairs if one.imbalance is not None and rows]
    return float(np.average([v for v, _ in known], weights=[n for _, n in known])) if known else 1.0


def _ratio(old: Fits, new: Fits, column: int, sample: float) -> float:
    """Return how many times larger a column is for ``new`` than for ``old`` or, without these, the sample."""
    before = np.average(old[:, column], weights=old[:, 0]) if old[:, 0].sum() else sample
    return float(np.average(new[:, column], weights=new[:, 0]) / before) if before and new[:, 0].sum() else 1.0
