"""Measure an index: its true recall, its operating point, and whether retraining is recommended.

The truth for random chunks comes from exact search without each chunk's own document: queries ×
vectors distances. Above a budget only a random share of the vectors is searched for true neighbours; the most
thorough search of the index decides which of them are among the k nearest of all.

Recall@k is the mean share of the true k nearest found; ties count. Points are a grid of ``nprobe`` and, for
codes, re-rank depths; one search serves all depths. A point costs the codes scanned plus ``_RERANK`` per
candidate, so the choice depends on data alone. Rates are measured on batches.

Whether to retrain follows from the distances and lists in the ``ShardRecord``s: parts that the training
sampled are compared with the others.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrotool.ann.choice import parse_factory
from retrotool.ann.codes import Whole
from retrotool.ann.excluded import Excluded, Ids, Queries
from retrotool.ann.lists import InvertedLists, Trained, VectorLists
from retrotool.ann.matmul import CentroidTable
from retrotool.ann.ranking import Best, are_among, exact_distances
from retrotool.ann.search import SPARE, Banned, Search
from retrotool.chunk.chunk_plan import write_json_file
from retrotool.embed import search_scope
from retrotool.encoder.devices import checking_device, pick_device
from retrotool.engine import gathering
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.errors import ConflictError
from retrotool.index.index_records import INDEX, RECALL, IndexFiles, IndexRecord, ShardRecord, TrainingRecord
from retrotool.index.searching import TUNED_K, Vectors, nearest_of, read_shard, read_trained, room_in, rows_in
from retrotool.index.stage import superseded
from retrotool.lazy import torch
from retrotool.machine import give_memory_back
from retrotool.ranges import as_slice, in_steps
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.parts import chunk_ids, distinct_parts, part_of, rows_by_part
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.storage import each
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.tombstones import Tombstones, read_tombstones

Floats = npt.NDArray[np.float64]
Hits = tuple[Floats, Floats]  # per query: true neighbours found, and existing
DEPTH = 100
_SEED = 1
BUDGET, GPU_BUDGET = 1 << 34, 1 << 40  # distances for a truth: some minutes on two cores, or on a GPU
_BLOCK = 256
_KNOWN = 2000  # true neighbours, among the 10 nearest of all queries, that a sample contains at any cost
DEPTHS = (20, 30, 50, 100, 200, 400)
_RERANK = 16  # cost of re-ranking a candidate, in codes scanned
_BEYOND = 2
_THOROUGH = 0.999
_Z = 1.96
_GROUPS = 1000
_KS = (1, TUNED_K, DEPTH)
_TIE = 16 * float(np.finfo(np.float32).eps)  # relative accuracy of a float32 sum of squares


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall at a point; ``error``: half its 95 % interval @10. ``scanned``: codes per query."""

    nprobe: int
    depth: int
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    error: float
    scanned: float
    rate: float = 0.0

    @property
    def cost(self) -> float:
        """Cost of a query, in codes scanned."""
        return self.scanned + _RERANK * self.depth


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured ``curve``, chosen ``point``, and ``groups``: kind → name → (recall@10, error, queries)."""

    curve: tuple[Recall, ...]
    point: Recall
    target_met: bool
    queries: int
    vectors: int
    share: float
    groups: dict[str, dict[str, tuple[float, float, int]]] = field(default_factory=dict)


def measure_recall(
    search: RecallSearch, target: float, groups: Mapping[str, npt.NDArray[np.object_]], report: Report
) -> Measurement:
    """Measure the curve from below ``target`` to well above it; report each ``nprobe``."""
    truth, last = search.truth, max(search.trained.nlist, 1)
    grid = [*sorted(n for i in range(31) for n in (1 << i, 3 << i) if n < last), last]
    curve, reached = list[Recall](), 0
    first = max(bisect.bisect_left(grid, search.lists_needed(target)) - 1, 0)
    for nprobe in grid[first:]:
        curve += search.at(nprobe)
        report(1)
        # Continue past the target while more lists with fewer candidates may be cheaper.
        reached += curve[-1].recall_at_10 - curve[-1].error >= target
        least = min((p.cost for p in curve if p.recall_at_10 - p.error >= target), default=math.inf)
        if reached > (0 if search.is_whole else _BEYOND) or curve[-1].scanned + _RERANK * search.depths[0] >= least:
            break
    if truth.share < 1:
        search.thorough(curve[-1].nprobe, BUDGET)
        curve = [search.recall(p.nprobe, p.depth) for p in curve]
    good = [p for p in curve if p.recall_at_10 - p.error >= target]
    chosen = min(good, key=lambda p: p.cost) if good else max(curve, key=lambda p: (p.recall_at_10, -p.cost))
    holds = chosen.recall_at_10 - chosen.error >= target or not len(truth)
    by_query = search.hits(chosen.nprobe, chosen.depth, TUNED_K)
    by_group = {kind: _by_group(by_query, labels, search.sampled) for kind, labels in groups.items()}
    return Measurement(tuple(curve), chosen, holds, len(truth), truth.vectors, truth.share, by_group)


class RecallSearch:
    """Searches of ``shards`` of a training at increasing ``nprobe``, re-ranked by ``vectors``.

    ``banned``: tests for ids that must not be found. For a sampled truth, hits are kept per true neighbour.
    """

    def __init__(
        self, truth: Truth, trained: Trained, shards: Sequence[InvertedLists], vectors: Vectors, banned: Banned,
        room: int,
    ) -> None:  # fmt: skip
        self.truth, self.trained, self.is_whole = truth, trained, isinstance(trained.codec, Whole)
        self.depths = (DEPTH + SPARE,) if self.is_whole else DEPTHS
        self._shards, self._vectors, self._banned, self._room = shards, vectors, banned, room
        # Exact indexes, and queries that are all vectors, have no sampling error.
        self.sampled = trained.centroids is not None and (truth.share < 1 or len(truth) < truth.vectors)
        # By ``nprobe``, depth and k: number found [q] or, for a sampled truth, which were found [q, t].
        self._found: dict[tuple[int, int, int], npt.NDArray[Any]] = {}
        # Per true neighbour, the number found nearer by the latest and so most thorough search.
        self._nearer = np.zeros(truth.best.ids.shape, np.int64)
        self._cost: dict[tuple[int, int], tuple[float, float]] = {}

    def lists_needed(self, target: float) -> int:
        """Return the fewest lists per query that contain the share ``target`` of the true nearest.

        Recall can't reach it with fewer, whatever the codes. A vector is taken to be in its nearest list.
        """
        truth, trained = self.truth, self.trained
        known = truth.best.ids[:, : max(1, round(TUNED_K * truth.share))]  # of a sample, so many are among the nearest
        ids, place = np.unique(known[known >= 0], return_inverse=True)
        if trained.centroids is None or not len(ids):
            return 1
        table = CentroidTable(torch.from_numpy(trained.centroids))

        def scores(vectors: npt.NDArray[Any]) -> torch.Tensor:
            return table.scores(trained.rotate(torch.from_numpy(vectors.astype(np.float32))) - table.mean)

        lists = torch.cat(
            [scores(self._vectors(some)).argmax(1) for some in np.array_split(ids, -(-len(ids) // _BLOCK))]
        )
        number = torch.full(known.shape, -1)
        number[torch.from_numpy(known >= 0)] = lists[torch.from_numpy(place)]
        nearer = list[torch.Tensor]()
        for rows in np.array_split(np.arange(len(known)), -(-len(known) // _BLOCK)):
            found, wanted = scores(truth.queries.vectors[rows]), number[torch.from_numpy(rows)]
            own = found.gather(1, wanted.clamp_min(0))
            counts = torch.stack([(found > column.unsqueeze(1)).sum(1) for column in own.T], 1)
            nearer.append(counts[wanted >= 0])
        ranks = torch.cat(nearer).sort().values
        return int(ranks[min(math.ceil(target * len(ranks)), len(ranks)) - 1]) + 1

    def at(self, nprobe: int) -> list[Recall]:
        """Search at ``nprobe``; return the recall at all depths, the deepest last."""
        scanned, searched, ranked, deepest = 0, 0.0, 0.0, max(self.depths)
        is_sample, shape = self.truth.share < 1, self.truth.best.ids.shape
        none: npt.NDArray[Any] = np.zeros(shape, np.bool_) if is_sample else np.zeros(shape[0], np.int64)
        found = {key: none.copy() for key in itertools.product(self.depths, _KS)}
        first = 0
        for queries in self.truth.queries.blocks(rows_in(self._room, deepest, self.trained.d)):
            start = time.perf_counter()
            search = Search(self.trained, queries, nprobe, deepest, self._banned, room=self._room, rough=True)
            search.add(*self._shards)
            candidates = search.candidates
            scanned += search.scanned
            searched += time.perf_counter() - start
            start = time.perf_counter()
            distances = exact_distances(queries.vectors, candidates, self._vectors)
            ranked += time.perf_counter() - start
            rows = slice(first, first := first + len(queries))
            truth = self.truth.best.take(rows)
            # As in searches, k = 100 takes ten times the candidates, here up to the deepest.
            enough = {
                (depth, k): min(k + SPARE if self.is_whole else depth * max(k // TUNED_K, 1), deepest)
                for depth, k in found
            }
            best = {n: Best(distances[:, :n], candidates[:, :n]).nearest(DEPTH) for n in {*enough.values()}}
            for (depth, k), hits in found.items():
                some = best[enough[depth, k]]
                hits[rows] = are_among(truth.ids, some.ids[:, :k]) if is_sample else _count_found(truth, some, k)
            pairs = zip(best[deepest].distances, truth.distances * (1 - _TIE), strict=True)
            self._nearer[rows] = [np.searchsorted(row, own) for row, own in pairs]
        q = max(first, 1)
        self._found |= {(nprobe, depth, k): hits for (depth, k), hits in found.items()}
        for depth in self.depths:
            self._cost[nprobe, depth] = scanned / q, q / max(searched + ranked * depth / deepest, 1e-9)
        return [self.recall(nprobe, depth) for depth in self.depths]

    def thorough(self, nprobe: int, budget: int) -> None:
        """Search with more lists than ``nprobe`` until it finds hardly anything nearer or costs too much.

        If it ends early, too many neighbours may count as true: recall is rather under- than overestimated.
        """
        deepest, nlist = max(self.depths), self.trained.nlist
        while nprobe < nlist and 2 * self._cost[nprobe, deepest][0] * len(self.truth) <= budget:
            before, nprobe = nprobe, min(2 * nprobe, nlist)
            self.at(nprobe)
            if self.recall(before, deepest).recall_at_10 >= _THOROUGH:
                break

    def recall(self, nprobe: int, depth: int) -> Recall:
        """Return the recall at a point that was searched."""
        hits = (self.hits(nprobe, depth, k) for k in _KS)
        (one, _), (ten, error), (hundred, _) = (ratio(*some, sampled=self.sampled) for some in hits)
        return Recall(nprobe, depth, one, ten, hundred, error, *self._cost[nprobe, depth])

    def hits(self, nprobe: int, depth: int, k: int) -> Hits:
        """Return the numbers of true neighbours found, and of those that exist, for each query."""
        found, there = self._found[nprobe, depth, k], self.truth.best.ids >= 0
        if self.truth.share < 1:
            there = there & (self._nearer < k)
            return (there & found).sum(axis=1).astype(np.float64), there.sum(axis=1).astype(np.float64)
        return found.astype(np.float64), there[:, :k].sum(axis=1).astype(np.float64)


def _count_found(truth: Best, found: Best, k: int) -> Ids:
    """Count the true k nearest of each query that were found, or others as near: int64 [q]."""
    there = truth.ids[:, :k] >= 0
    farthest = np.where(there, truth.distances[:, :k], -np.inf).max(axis=1, initial=-np.inf)
    near = found.distances[:, :k] <= (farthest * (1 + _TIE))[:, None]
    counts: Ids = np.minimum((near & (found.ids[:, :k] >= 0)).sum(axis=1), there.sum(axis=1))
    return counts


def ratio(hits: Floats, possible: Floats, *, sampled: bool = True) -> tuple[float, float]:
    """Return recall, weighted by possible hits, and half its 95 % interval (0 if not ``sampled``)."""
    total = possible.sum()
    if not total:
        return 1.0, 1.0 if sampled else 0.0  # nothing to find
    recall = float(hits.sum() / total)
    if not sampled:
        return recall, 0.0
    spread = hits - recall * possible
    count = int((possible > 0).sum())
    error = _Z * math.sqrt((spread**2).sum() * count / max(count - 1, 1)) / total
    # With few queries, or perfect recall, the spread underestimates the error; use Wilson's interval.
    return recall, float(max(error, _Z**2 / 2 / (count + _Z**2)))


def _by_group(by_query: Hits, groups: npt.NDArray[np.object_], sampled: bool) -> dict[str, tuple[float, float, int]]:
    hits, possible = by_query
    names, counts = np.unique(groups.astype(str), return_counts=True)
    found = {}
    for name in names[np.argsort(-counts, kind="stable")][:_GROUPS]:
        mine = groups == name
        recall, error = ratio(hits[mine], possible[mine], sampled=sampled)
        found[str(name)] = (recall, error, int(mine.sum()))
    return found


@dataclass(frozen=True, slots=True)
class Truth:
    """Queries, their ``ids`` and ``sources`` [q], and the nearest of each in a ``share`` of the vectors."""

    ids: Ids
    queries: Queries
    sources: npt.NDArray[np.object_]
    best: Best
    vectors: int
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)


def find_truth(
    store: Store, encoder: str, numbers: list[int], report: Report, sample: int, device: str, room: int
) -> Truth:
    """Find the truth for random chunks of the parts ``numbers``; report each part searched."""
    tombstones = read_tombstones(store)
    rows = search_scope.SearchableRows(store, numbers, tombstones)
    n = sum(rows.counts.values())
    drawn = [chunk_ids(part, chosen) for part, chosen in rows.draw(min(sample, n), _SEED)]
    ids = np.concatenate([np.zeros(0, np.int64), *drawn])
    if not len(ids):
        no_queries = Queries.plain(np.zeros((0, 1), np.float32))
        return Truth(ids, no_queries, np.zeros(0, object), Best.nothing(0, DEPTH), n)
    asked = _queries(store, encoder, ids, tombstones)
    budget = BUDGET if device == "cpu" else GPU_BUDGET
    share = min(1.0, max(budget / (len(ids) * n), _KNOWN / (TUNED_K * len(ids))))
    rng = np.random.default_rng(_SEED)
    best: Best | None = None
    for part in search_scope.vectors_ahead(store, encoder, numbers):
        chosen = searchable = rows[part]
        if share < 1:
            blocks = rng.random(-(-len(searchable) // _BLOCK)) < share
            chosen = searchable[np.repeat(blocks, _BLOCK)[: len(searchable)]]
        if len(chosen):
            vectors = search_scope.read_part_vectors(store, encoder, part)
            step = len(chosen) if device != "cpu" else max(1, room // (2 * vectors.shape[1]))
            for rows_here in in_steps(chosen, step):
                some = VectorLists(chunk_ids(part, rows_here), vectors[as_slice(rows_here)])
                best = nearest_of(asked, some, DEPTH, best, device=device, room=room)
        report(1)
    give_memory_back()
    found = [_of_documents(store, part, rows, "source").to_pylist() for part, rows in rows_by_part(ids)]
    sources = np.array([source or "" for some in found for source in some], object)
    return Truth(ids, asked, sources, best or Best.nothing(len(ids), DEPTH), n, share)


def _queries(store: Store, encoder: str, ids: Ids, tombstones: Tombstones) -> Queries:
    vectors, intervals, keys = [], [], []
    repeat = search_scope.may_repeat(store)
    by_part = rows_by_part(ids)
    for part, rows in store.copied_ahead(by_part, lambda some: store.state.part_file("embeddings", some[0], encoder)):
        vectors.append(search_scope.read_part_vectors(store, encoder, part)[rows].astype(np.float32))
        if repeat:
            keys.append(_of_documents(store, part, rows, "key"))
        else:
            intervals.append([ends[rows] for ends in search_scope.document_intervals(store, part)])
    if repeat:
        excluded = search_scope.find_documents(store, pa.chunked_array(keys), tombstones)
    else:
        excluded = Excluded(*np.concatenate(intervals, axis=1))
    return Queries(np.concatenate(vectors), excluded)


def _of_documents(store: Store, part: int, rows: Ids, column: str) -> pa.Array:
    table = parts.read_documents(store, part, [column, "first_row"])
    documents = np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1
    return table[column].combine_chunks().take(pa.array(documents))


Fits = npt.NDArray[np.float64]  # [n, 3]: vectors of a part, mean squared distances to centroids and to codes
# Thresholds for retraining, relative to the training: squared distances, imbalance, number of vectors.
_WORSE, _UNEVEN, _GROWN = 1.15, 2.0, 4.0
_ENOUGH_NEW = 1000  # new vectors below which an average means nothing
_ENOUGH = 50  # queries from new parts below which their recall means nothing


@dataclass(frozen=True, slots=True)
class RecallStage:
    """Measures a generation of ``index`` as of ``commit``, in one task that returns a ``Measurement``.

    ``sample``: number of queries. ``room``: bytes of each buffer.
    """

    index: str
    generation: int
    target: float
    sample: int
    room: int
    commit: int
    devices: tuple[str, ...]
    name: str = field(default="recall", init=False)
    unit: str = field(default="part", init=False)

    def plan(self, store: Store) -> list[Task]:
        """Return the task."""
        numbers = IndexFiles(store.state, self.index, self.generation).parts
        key = task_key("recall", {"index": self.index, "generation": self.generation}, [])
        return [Task(key, f"index {self.index}", len(numbers), {})]

    def open(self, store: Store) -> Worker:
        """Return the worker."""
        device = pick_device(self.devices[0])

        def work(task: Task, run: str, report: Report) -> Measurement:  # noqa: ARG001
            return self._measure(store.at(self.commit), device, report)

        return work

    def _measure(self, store: Store, device: str, report: Report) -> Measurement:
        files = IndexFiles(store.state, self.index, self.generation)
        assert files.training is not None, "the caller has looked"
        encoder, trained = files.training.encoder, read_trained(store, self.index, self.generation)[1]
        opened = list(each(store.storage, lambda entry: read_shard(store, entry, trained), files.shards.values()))
        with checking_device(device):
            truth = find_truth(store, encoder, files.parts, report, self.sample, device, self.room)
        give_memory_back()
        banned = read_tombstones(store).contains
        search = RecallSearch(truth, trained, opened, Vectors(store, encoder), banned, self.room)
        seen = np.array(sorted(files.training.sampled(distinct_parts(truth.ids))), np.int64)
        trained_on = np.isin(part_of(truth.ids), seen)
        groups = {
            "source": truth.sources, "part": np.where(trained_on, "trained on", "added since").astype(object)
        }  # fmt: skip
        return measure_recall(search, self.target, groups, report=lambda _: report(0))


def measure_until_committed(
    store: Store,
    run: Run,
    name: str,
    generation: int,
    target: float,
    sample: int,
    devices: tuple[str, ...],
    memory: int | None,
) -> None:
    """Measure a generation of an index and commit its record, which makes it the current one.

    Retries if another process interferes. ``memory`` is in bytes.
    """

    def attempt() -> None:
        files = IndexFiles(store.state, name, generation)
        training = files.training
        if training is None:
            raise superseded(name)
        encoder, room = training.encoder, room_in(training.asked.memory if memory is None else memory)
        stage = RecallStage(name, generation, target, sample, room, store.state.number, devices)
        with gathering(stage, store) as gather:
            found: Measurement = gather(stage.plan(store))[0]
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
            return Draft("index", settings, add=(file,), remove=old, records={INDEX + name: record})

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
    trained, vectors = files.training, files.vectors
    if trained is None:
        return Drift(0, vectors)
    records = [(ShardRecord.of(entry), entry.rows) for entry in files.shards.values()]
    seen = trained.sampled(part for one, _ in records for part in one.parts)
    fits = [(part in seen, *fit) for one, _ in records for part, fit in zip(one.parts, one.fit, strict=True)]
    table = np.array(fits, np.float64).reshape(-1, 4)
    old, new = table[table[:, 0] == 1, 1:], table[table[:, 0] == 0, 1:]
    errors = _ratio(old, new, 1, trained.error), _ratio(old, new, 2, trained.code_error)
    known = [(one.imbalance, rows) for one, rows in records if one.imbalance is not None and rows]
    uneven = float(np.average([v for v, _ in known], weights=[n for _, n in known])) if known else 1.0
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


def _ratio(old: Fits, new: Fits, column: int, sample: float) -> float:
    """Return how many times larger a column is for ``new`` than for ``old`` or, without these, the sample."""
    before = np.average(old[:, column], weights=old[:, 0]) if old[:, 0].sum() else sample
    return float(np.average(new[:, column], weights=new[:, 0]) / before) if before and new[:, 0].sum() else 1.0
