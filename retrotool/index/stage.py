"""The ``index`` stage: encode a store's vectors into faiss files, after training.

Only keys are indexed, trained on and counted. The first task trains, on a random sample of all parts in
proportion, as the first n vectors come from few sources; it is deterministic for a seed on a CPU. Then each
*window* of parts is a task: assign lists, encode, write a faiss file. A window has up to ``shard_rows`` keys
in the order of parts, embedded or not, so two runs that index a part concurrently use the same slot, and the
second is refused. Parts embedded later go into further shards, ``shard-0003.1``; ``merge`` joins those of a
window. Purged vectors are indexed until erased; searches mask them. Shards contain a coarse quantiser that is
small enough.

Memory: the training sample, float16 in at most half of the limit; then the codes of one shard, twice, plus 32
bytes per vector while it is written.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann import codes, lists
from retrotool.ann.choice import ITERATIONS, SAMPLES_PER_LIST, IndexChoice, IndexOptions, choose_index, parse_factory
from retrotool.ann.codes import Codec, Codes, Product, Scalar, Whole
from retrotool.ann.excluded import Ids
from retrotool.ann.kmeans import TWO_LEVELS, ReportShare, assign, kmeans
from retrotool.ann.lists import Trained, to_faiss
from retrotool.ann.resident import Centroids, free_memory
from retrotool.embed import search_scope
from retrotool.embed.search_scope import SearchableRows, read_part_vectors
from retrotool.encoder.devices import checking_device
from retrotool.engine.task import Report, Task, is_taken, task_key
from retrotool.errors import ConflictError, UsageError
from retrotool.index.index_records import SHARD, IndexFiles, ShardRecord, TrainingRecord, as_about
from retrotool.index.searching import read_shard, read_trained, write_index
from retrotool.lazy import torch
from retrotool.machine import give_memory_back, memory_of_machine
from retrotool.ranges import consecutive_ranges, runs_up_to
from retrotool.read_ahead import ahead
from retrotool.store import parts
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName, generation_slot
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_rejected, read_tombstones
from retrotool.store.vectors import check_finite

SHARD_ROWS = 1 << 20
_MIN_PER_LIST = 16  # vectors per list and shard: with fewer, opening a list costs more than scanning it
QUANTIZER_SHARE = 0.05  # of a shard, up to which the shard contains the coarse quantiser
_BLOCK_ROWS = {"cpu": 1 << 12, "cuda": 1 << 18}


@dataclass(frozen=True, slots=True)
class IndexStage:
    """Index all embedded parts that a generation of ``index`` does not contain yet.

    ``trained``: the training existed at the start, so this run must not train. ``merge``: join shards.
    """

    index: str
    encoder: str
    wanted: IndexOptions = field(default_factory=IndexOptions)
    generation: int = 0
    devices: tuple[str, ...] = ("cpu",)  # one per worker
    merge: bool = False
    broken: tuple[str, ...] = ()  # paths of shards to rebuild instead
    trained: bool = False
    name: str = field(default="index", init=False)
    unit: str = field(default="chunk", init=False)

    def files(self, state: State) -> IndexFiles:
        """Return the files of the generation being built."""
        return IndexFiles(state, self.index, self.generation)

    def plan(self, store: Store) -> list[Task]:
        """Plan the training if it is missing; otherwise one task per new shard or merge."""
        made_with = IndexFiles(store.state, self.index).encoder
        if made_with not in (None, self.encoder):
            raise UsageError(
                f"index {self.index!r} was built for encoder {made_with!r}, not {self.encoder!r}",
                "Choose another name for the new index with --name.",
            )
        files = self.files(store.state)
        if files.trained is None:
            if self.trained or (self.generation and files.record is None):
                raise superseded(self.index)
            n = sum(search_scope.count_keys(store, part) for part in search_scope.embedded_parts(store, self.encoder))
            key = self._key({"train": self.encoder, "generation": self.generation}, [])
            inputs = {"train": True, "slot": generation_slot("trained", self.generation)}
            return [Task(key, "training", n, inputs, claimed=True, for_all=True)]
        if self.broken:
            return self._repairs(store, files)
        return self._merges(files) if self.merge else self._new_shards(store, files)

    def _key(self, settings: dict[str, Any], reads: Sequence[str]) -> str:
        return task_key("index", {"name": self.index, **settings}, reads)

    def _new_shards(self, store: Store, files: IndexFiles) -> list[Task]:
        assert files.training is not None
        there = set(search_scope.embedded_parts(store, self.encoder)).difference(files.parts)
        tasks = []
        # Windows: consecutive parts of up to ``shard_rows`` keys, or one larger.
        windows = runs_up_to(
            files.training.shard_rows, store.state.parts(), lambda part: search_scope.count_keys(store, part)
        )
        for window, numbers in enumerate(windows):
            if new := [part for part in numbers if part in there]:
                slot = _free_slot(files.shards, window, self.generation)
                rows = sum(search_scope.count_keys(store, part) for part in new)
                tasks.append(self._coding(store, files, slot, rows, {"slot": slot, "parts": new}))
        return tasks

    def _repairs(self, store: Store, files: IndexFiles) -> list[Task]:
        there = set(search_scope.embedded_parts(store, self.encoder))
        tasks = []
        for slot, entry in files.shards.items():
            if entry.path in self.broken:
                numbers = [part for part in ShardRecord.of(entry).parts if part in there]
                inputs = {"slot": slot, "parts": numbers, "replaces": entry.path}
                tasks.append(self._coding(store, files, f"repair {slot}", entry.rows, inputs))
        return tasks

    def _coding(self, store: Store, files: IndexFiles, label: str, rows: int, inputs: dict[str, Any]) -> Task:
        assert files.trained is not None
        paths = [parts.part_entry(store, "embeddings", part, self.encoder).path for part in inputs["parts"]]
        settings = {"repair": inputs["replaces"]} if "replaces" in inputs else {"slot": inputs["slot"]}
        key = self._key(settings, [files.trained.path, *paths])
        return Task(key, label, rows, {**inputs, "paths": paths}, claimed=True)

    def _merges(self, files: IndexFiles) -> list[Task]:
        found: dict[str, list[FileEntry]] = {}
        for slot, entry in files.shards.items():
            window = slot.removesuffix(f".g{self.generation}").split(".")[0]
            found.setdefault(window, []).append(entry)
        tasks = []
        for window, some in found.items():
            if len(some) > 1:
                paths = [entry.path for entry in some]
                key, rows = self._key({"merge": window}, paths), sum(entry.rows for entry in some)
                inputs = {"merge": generation_slot(window, self.generation), "paths": paths}
                tasks.append(Task(key, f"merge {window}", rows, inputs, claimed=True))
        return tasks

    def size_of(self, store: Store, task: Task) -> int:
        """Return the bytes of codes and ids, for the training those of the shards that follow."""
        known = self.files(store.state).training
        choice = (
            parse_factory(known.factory, known.dimension) if known else choose_for(store, self.encoder, self.wanted)
        )
        return task.weight * choice.bytes_per_vector

    def open(self, store: Store) -> IndexWorker:
        """Return the worker."""
        return IndexWorker(store, self)


def superseded(name: str) -> ConflictError:
    """Return the error for an index that another run retrained or dropped."""
    return ConflictError(f"index {name!r} was retrained or dropped by another run", "Run the same command again.")


def choose_for(store: Store, encoder: str, wanted: IndexOptions) -> IndexChoice:
    """Return the index that suits the embedded vectors."""
    n = search_scope.count_keys_of(store, search_scope.embedded_parts(store, encoder))
    d = int(store.state.records[f"encoder:{encoder}"]["dimension"])
    return choose_index(n, d, wanted)


def default_shard_rows(choice: IndexChoice, memory: int | None) -> int:
    """Return the vectors per shard: a million, more for very many lists, fewer in little memory."""
    rows = max(SHARD_ROWS, _MIN_PER_LIST * choice.nlist)
    return rows if memory is None else max(1, min(rows, memory // (7 * choice.bytes_per_vector)))


def _free_slot(taken: Mapping[str, Any], window: int, generation: int) -> str:
    """Return the next free slot of a window: ``shard-0003``, ``shard-0003.1`` and so on."""
    numbered = (f"{SHARD}{window:04d}" + (f".{further}" if further else "") for further in itertools.count())
    return next(slot for one in numbered if (slot := generation_slot(one, generation)) not in taken)


class IndexWorker:
    """Trains, writes and merges shards."""

    def __init__(self, store: Store, stage: IndexStage) -> None:
        self._store, self._stage, self._device = store, stage, stage.devices[0]

    def __call__(self, task: Task, run: str, report: Report) -> Staged | None:
        """Run one task; return None if it is done already."""
        store, inputs = self._store, task.inputs
        state = store.refresh()
        if "merge" in inputs:
            work, is_done = self._merge, not all(map(state.has, inputs["paths"]))
        else:
            work = self._train if "train" in inputs else self._write_shard
            is_done = is_taken(store, "index", inputs["slot"], self._stage.index, inputs.get("replaces"))
        if is_done:
            return None
        try:
            with checking_device(self._device):
                return work(task, run, report)
        finally:
            give_memory_back()

    def _train(self, task: Task, run: str, report: Report) -> Staged:
        stage, store = self._stage, self._store
        choice = choose_for(store, stage.encoder, stage.wanted)
        numbers = search_scope.embedded_parts(store, stage.encoder)
        rows = search_scope.SearchableRows(store, numbers, read_tombstones(store))
        done = 0.0

        def progress(share: float) -> None:
            nonlocal done
            before, done = done, min(done + share, 1.0)
            report(int(done * task.weight) - int(before * task.weight))

        # Shards include purged vectors, as a purge can be undone.
        left_out = Tombstones(np.union1d(read_rejected(store).ids, search_scope.erased_chunks(store).ids))
        memory = stage.wanted.memory
        trained, fit = train_index(
            store, stage.encoder, rows, choice, memory=memory, device=self._device, report=progress
        )
        report(task.weight - int(done * task.weight))
        record = TrainingRecord(
            encoder=stage.encoder, factory=choice.factory, why=choice.why, dimension=choice.d,
            vectors=sum(rows.counts.values()),
            held=search_scope.count_keys_of(store, numbers, left_out), trained_parts=consecutive_ranges(numbers),
            shard_rows=stage.wanted.shard_rows or default_shard_rows(choice, memory), asked=stage.wanted, seed=SEED,
            **fit,
        )  # fmt: skip
        name = FileName.new(run, "index", task.inputs["slot"], "faiss", stage.index)
        entry = write_index(store, to_faiss(trained), name, as_about(record))
        settings = {"name": stage.index, "encoder": stage.encoder, "factory": choice.factory}
        return Staged("index", settings, add=(entry,), task=task.key, run=run)

    def _write_shard(self, task: Task, run: str, report: Report) -> Staged:
        stage, store = self._stage, self._store
        entry, trained = read_trained(store, stage.index, stage.generation)
        numbers = list(task.inputs["parts"])
        in_lists, ids, codes, fit = _coded(store, stage.encoder, numbers, trained, self._device, report)
        record = ShardRecord(parts=numbers, fit=fit)
        written = self._write(run, task.inputs["slot"], in_lists, ids, codes, trained, record)
        reads = (entry.path, *task.inputs["paths"])
        settings = {"name": stage.index, "encoder": stage.encoder}
        replaced = task.inputs.get("replaces")
        return Staged("index", settings, reads, (written,), (replaced,) if replaced else (), task=task.key, run=run)

    def _write(
        self, run: str, slot: str, numbers: Ids, ids: Ids, codes: Codes, trained: Trained, record: ShardRecord
    ) -> FileEntry:
        quantizer = 0 if trained.centroids is None else trained.centroids.nbytes
        index = to_faiss(trained, quantizer=quantizer <= QUANTIZER_SHARE * (codes.nbytes + ids.nbytes))
        lists.fill(index, numbers, ids, codes)
        if trained.nlist:
            record = replace(record, imbalance=round(imbalance(numbers, trained.nlist), 3))
        name = FileName.new(run, "index", slot, "faiss", self._stage.index)
        return write_index(self._store, index, name, as_about(record))

    def _merge(self, task: Task, run: str, report: Report) -> Staged:
        stage, store = self._stage, self._store
        entries = [one for one in stage.files(store.state).shards.values() if one.path in task.inputs["paths"]]
        _, trained = read_trained(store, stage.index, stage.generation)
        for entry in entries:
            store.check_sum(entry)
        found = [read_shard(store, entry, trained) for entry in entries]
        numbers = [np.full(shard.size(i), i, np.int64) for shard in found for i in shard.numbers]
        ids = np.concatenate([shard.ids(i) for shard in found for i in shard.numbers])
        codes = np.concatenate([shard.codes(i) for shard in found for i in shard.numbers])
        order = np.argsort(ids, kind="stable")
        records = map(ShardRecord.of, entries)
        fits = dict(sorted(pair for one in records for pair in zip(one.parts, one.fit, strict=True)))
        slot, record = task.inputs["merge"], ShardRecord(parts=list(fits), fit=list(fits.values()))
        written = self._write(run, slot, np.concatenate(numbers)[order], ids[order], codes[order], trained, record)
        report(task.weight)
        old = tuple(entry.path for entry in entries)
        settings = {"name": stage.index, "encoder": stage.encoder, "merge": True}
        return Staged("index", settings, old, (written,), old, task=task.key, run=run)


def _coded(
    store: Store, encoder: str, numbers: Sequence[int], trained: Trained, device: str, report: Report
) -> tuple[Ids, Ids, Codes, list[list[float]]]:
    """Return lists [n], ids [n] and codes [n, size] of what is not erased, and the fit of each part."""
    most, n = sum(search_scope.count_keys(store, part) for part in numbers), 0
    in_lists, ids = np.empty(most, np.int64), np.empty(most, np.int64)
    codes = np.empty((most, trained.codec.size), np.uint8)
    rejected, size = read_rejected(store), _BLOCK_ROWS[device.split(":")[0]]
    fit = {part: np.zeros(3) for part in numbers}
    centroids = Centroids(trained, torch.device(device)) if trained.nlist > TWO_LEVELS else None

    def blocks() -> Iterator[tuple[int, Ids, npt.NDArray[np.float16]]]:
        for part in search_scope.vectors_ahead(store, encoder, numbers):
            coded, vectors = search_scope.searchable_rows(store, part, rejected), None
            for start in range(0, len(coded), size):
                vectors = search_scope.read_part_vectors(store, encoder, part) if vectors is None else vectors
                rows = coded[start : start + size]
                yield part, rows, vectors[rows]
            report(search_scope.count_keys(store, part) - len(coded))

    with contextlib.closing(ahead(blocks(), 1)) as read:
        for part, rows, some in read:
            there = torch.from_numpy(some).to(device).float()
            if not bool(there.sum(1).isfinite().all()):  # sums of float16 can't overflow
                check_finite(store, some, part, rows)
            lists = None if centroids is None else centroids.nearest(there, 1)[:, 0]
            found, made, *off = _encode(trained, there, lists)
            place = slice(n, n + len(rows))
            in_lists[place], codes[place] = found.cpu().numpy(), made.cpu().numpy()
            ids[place] = parts.chunk_ids(part, rows)
            n += len(rows)
            fit[part] += [len(rows), *off]
            report(len(rows))
    means = [[int(sums[0]), *(sums[1:] / max(sums[0], 1)).tolist()] for sums in fit.values()]
    return in_lists[:n], ids[:n], codes[:n], means


def _encode(
    trained: Trained, rows: torch.Tensor, lists: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Code rows as ``Trained.encode`` does, in halves if a GPU's memory does not suffice."""
    try:
        return trained.encode(rows, lists)
    except torch.OutOfMemoryError:
        if len(rows) <= _BLOCK_ROWS["cpu"]:
            raise
    torch.cuda.empty_cache()
    in_halves = zip(rows.chunk(2), (None, None) if lists is None else lists.chunk(2), strict=True)
    halves = [_encode(trained, *half) for half in in_halves]
    found, made, *errors = zip(*halves, strict=True)
    return torch.cat(found), torch.cat(made), sum(errors[0]), sum(errors[1])


SEED = 0
_KMEANS_SHARE = 0.8
_MEASURED = 1 << 12
_LEAST_CODE_SAMPLE = 16 * 256


def sample_size(n: int, choice: IndexChoice, memory: int | None) -> int:
    """Return the number of vectors to train on."""
    most = max(SAMPLES_PER_LIST * choice.nlist, codes.SAMPLE)
    memory = memory_of_machine() if memory is None else memory
    return min(n, most, max(memory // (4 * choice.d), choice.nlist))


def _code_sample(choice: IndexChoice, memory: int | None) -> int:
    """Return the number of vectors to train codes on: as float32, three times, a quarter of the memory."""
    if memory is None:
        return codes.SAMPLE
    return min(codes.SAMPLE, max(_LEAST_CODE_SAMPLE, memory // (48 * choice.d)))


def train_index(
    store: Store,
    encoder: str,
    rows: SearchableRows,
    choice: IndexChoice,
    *,
    memory: int | None = None,
    device: str = "cpu",
    report: ReportShare = lambda _: None,
) -> tuple[Trained, dict[str, Any]]:
    """Train the index of ``choice`` on the searchable ``rows``; report shares of the work done.

    Also return the fields of its ``TrainingRecord`` on how it fits the sample.
    """
    if choice.nlist == 0:
        report(1.0)
        fit = {"sample": 0, "error": 0.0, "code_error": 0.0, "imbalance": 1.0}
        return Trained(choice.d, Whole(choice.coded, choice.code)), fit
    n = sum(rows.counts.values())
    size = sample_size(n, choice, memory)
    if device != "cpu":  # float16, and half of the memory is for products
        size = min(size, max(free_memory(torch.device(device)) // (4 * choice.d), choice.nlist))
    sample = torch.from_numpy(draw_vectors(store, encoder, rows, size)).to(device)
    centroids = kmeans(
        sample, choice.nlist, iterations=ITERATIONS, seed=SEED, report=lambda share: report(_KMEANS_SHARE * share)
    )
    rng = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(sample), generator=rng)[: _code_sample(choice, memory)].to(device)
    residuals = sample[chosen].float()
    del sample
    distances, assigned = assign(residuals, centroids)
    residuals.sub_(centroids[assigned])
    rotation = None
    if choice.rotated:
        rotation = codes.train_rotation(residuals, choice.pieces, choice.rotated, seed=SEED)
        residuals, centroids = residuals @ rotation.T, centroids @ rotation.T
    codec = _codec(choice, residuals)
    turned = None if rotation is None else rotation.cpu().numpy()
    trained = Trained(choice.d, codec, centroids.cpu().numpy(), turned, choice.nlist)
    code_error = _code_error(codec, residuals[:_MEASURED])
    report(1.0 - _KMEANS_SHARE)
    uneven = imbalance(assigned.cpu().numpy(), choice.nlist)
    return trained, {
        "sample": size, "error": float(distances.mean()), "code_error": code_error, "imbalance": round(uneven, 3),
    }  # fmt: skip


def imbalance(numbers: npt.NDArray[np.int64], nlist: int) -> float:
    """Return n·Σ(share of list)² of the lists ``numbers`` [s], less 1/s for chance; 1: equally long."""
    if not len(numbers):
        return 1.0
    shares = np.bincount(numbers, minlength=nlist) / len(numbers)
    return float(nlist * ((shares**2).sum() - 1 / len(numbers)))


def _codec(choice: IndexChoice, residuals: torch.Tensor) -> Codec:
    if choice.pieces:
        return Product(codes.train_product(residuals, choice.pieces, seed=SEED).cpu().numpy())
    return Scalar.train(residuals) if choice.code == "sq8" else Whole(choice.coded, choice.code)


def _code_error(codec: Codec, residuals: torch.Tensor) -> float:
    if isinstance(codec, Whole):
        return 0.0
    coded = codec.decode(codec.encode(residuals).cpu().numpy())
    return float((coded.to(residuals.device) - residuals).square().sum(1).mean())


def draw_vectors(store: Store, encoder: str, rows: SearchableRows, size: int) -> npt.NDArray[np.float16]:
    """Return ``size`` random searchable vectors, float16; raise ``CorruptError`` if some are not finite."""
    sample = np.empty((size, read_part_vectors(store, encoder, next(iter(rows.counts))).shape[1]), np.float16)
    done = 0
    drawn = rows.draw(size, SEED)
    for part, chosen in store.copied_ahead(drawn, lambda some: store.state.part_file("embeddings", some[0], encoder)):
        vectors = read_part_vectors(store, encoder, part)[chosen]
        check_finite(store, vectors, part, chosen)
        sample[done : done + len(chosen)] = vectors
        done += len(chosen)
    return sample
