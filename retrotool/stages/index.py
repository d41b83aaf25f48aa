"""``index``: a faiss index over the embeddings, with its true recall.

Only keys are indexed, trained on and counted. Up to ``FLAT_LIMIT`` vectors the index is exact; above, an inverted
file whose codes are the stored float16 vectors. The first task trains (k-means on vectors drawn at random over all
parts); then each shard is a task: assign in torch, write a faiss file that holds its own coarse quantiser. Parts
embedded later go into new shards under the same training. ``measure`` then finds the least ``nprobe`` that holds the
target recall. Memory: the training sample, and one shard (2·d bytes a vector) while it is written.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.ann import lists
from retrotool.ann.kmeans import assign, kmeans
from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.stages.base import Report, Task, task_key
from retrotool.stages.database import count_keys, embedded_parts, read_part_vectors, searchable_rows
from retrotool.store import atomic, parts, staging
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.staging import Staged
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

FLAT_LIMIT = 1 << 16
SHARD_ROWS = 1 << 20
_SAMPLES_A_LIST = 64
_SEED = 0


@dataclass(frozen=True, slots=True)
class IndexStage:
    """All parts of an encoder's embeddings that the index ``index`` does not hold."""

    index: str
    encoder: str
    flat_limit: int = FLAT_LIMIT
    shard_rows: int = SHARD_ROWS
    name: str = field(default="index", init=False)
    unit: str = field(default="chunk", init=False)

    def plan(self, store: Store) -> list[Task]:
        """First the training, if there is none; then one task a new shard, in the order of the parts."""
        made_with = encoder_of(store, self.index)
        if made_with not in (None, self.encoder):
            raise UsageError(
                f"index {self.index!r} is of the encoder {made_with!r}, not {self.encoder!r}",
                "Give the new index a name of its own with --name.",
            )
        trained = store.state.file("index", "trained", self.index)
        if trained is None:
            n = sum(count_keys(store, part) for part in embedded_parts(store, self.encoder))
            key = task_key("index", {"name": self.index, "train": self.encoder, "flat_limit": self.flat_limit}, [])
            return [] if staging.is_staged(store.root, key) else [Task(key, "training", n, {"train": True})]
        tasks = []
        number = self._next_shard(store)
        for run in self._new_runs(store):
            paths = [self._embeddings(store, part).path for part in run]
            key = task_key("index", {"name": self.index, "shard": number}, [trained.path, *paths])
            rows = sum(count_keys(store, part) for part in run)
            if not staging.is_staged(store.root, key):
                tasks.append(Task(key, f"shard {number}", rows, {"shard": number, "parts": run, "paths": paths}))
            number += 1
        return tasks

    def _embeddings(self, store: Store, part: int) -> FileEntry:
        return parts.part_entry(store, "embeddings", part, self.encoder)

    def _next_shard(self, store: Store) -> int:
        numbers = [int(slot.removeprefix("shard-")) for slot in shards(store.state, self.index)]
        return max(numbers, default=-1) + 1

    def _new_runs(self, store: Store) -> list[list[int]]:
        """Parts that no shard holds, in runs of up to ``shard_rows`` keys."""
        held = {part for about in shards(store.state, self.index).values() for part in about["parts"]}
        runs: list[list[int]] = []
        rows = 0
        for part in embedded_parts(store, self.encoder):
            if part in held:
                continue
            size = count_keys(store, part)
            if not runs or rows + size > self.shard_rows:
                runs.append([])
                rows = 0
            runs[-1].append(part)
            rows += size
        return runs

    def open(self, store: Store) -> IndexWorker:
        """Nothing to load."""
        return IndexWorker(store, self)


def encoder_of(store: Store, name: str) -> str | None:
    """The encoder that an index, finished or not, was trained for; None if there is none of this name."""
    trained = store.state.file("index", "trained", name)
    return None if trained is None else str((trained.about or {})["encoder"])


def shards(state: State, name: str) -> dict[str, Mapping[str, Any]]:
    """The shards of an index: slot → what the log says about it (its parts)."""
    group = state.group("index", name)
    entries = {slot: group.get(slot) for slot in group if slot.startswith("shard-")}
    return {slot: entry.about or {} for slot, entry in entries.items() if entry is not None}


def choose_lists(n: int, flat_limit: int) -> int:
    """Number of inverted lists for n vectors: about 8√n, a power of two, at least 39 vectors a list; 0: flat."""
    if n <= flat_limit:
        return 0
    return 1 << min(round(math.log2(8 * math.sqrt(n))), math.floor(math.log2(n / 39)))


class IndexWorker:
    """Trains, and writes shards."""

    def __init__(self, store: Store, stage: IndexStage) -> None:
        self._store = store
        self._stage = stage

    def __call__(self, task: Task, run: str, report: Report) -> Staged:
        """Do one task."""
        self._store.refresh()
        tombstones = read_tombstones(self._store)
        if task.inputs.get("train"):
            return self._train(task, run, report, tombstones)
        return self._write_shard(task, run, report, tombstones)

    def _train(self, task: Task, run: str, report: Report, tombstones: Tombstones) -> Staged:
        import torch

        stage, store = self._stage, self._store
        numbers = embedded_parts(store, stage.encoder)
        rows = {part: searchable_rows(store, part, tombstones) for part in numbers}
        n = sum(map(len, rows.values()))
        nlist = choose_lists(n, stage.flat_limit)
        if nlist == 0:
            index = lists.empty_flat(read_part_vectors(store, stage.encoder, numbers[0]).shape[1])
        else:
            sample = _sample(store, stage.encoder, rows, min(n, nlist * _SAMPLES_A_LIST))
            index = lists.empty_ivf(kmeans(torch.from_numpy(sample), nlist, seed=_SEED).numpy())
        name = FileName.new(run, "index", "trained", "faiss", stage.index)
        entry = write_index(store.root, index, name, {"encoder": stage.encoder})
        report(task.weight)
        return Staged(
            task.key, "index", run, {"name": stage.index, "encoder": stage.encoder, "nlist": nlist}, add=(entry,)
        )

    def _write_shard(self, task: Task, run: str, report: Report, tombstones: Tombstones) -> Staged:
        import torch

        stage, store = self._stage, self._store
        trained, index = read_trained(store, stage.index)
        centroids = lists.centroids_of(index)
        table = None if centroids is None else torch.from_numpy(centroids)
        for part in task.inputs["parts"]:
            searchable = searchable_rows(store, part, tombstones)
            vectors = read_part_vectors(store, stage.encoder, part)[searchable]
            _check_finite(vectors, part, searchable)
            assigned = None if table is None else assign(torch.from_numpy(vectors.astype(np.float32)), table)[1].numpy()
            if len(searchable):
                lists.add(index, parts.chunk_ids(part, searchable), vectors, assigned)
            report(len(vectors))
        slot = f"shard-{task.inputs['shard']:04d}"
        about = {"parts": list(task.inputs["parts"])}
        entry = write_index(store.root, index, FileName.new(run, "index", slot, "faiss", stage.index), about)
        reads = (trained.path, *task.inputs["paths"])
        return Staged(task.key, "index", run, {"name": stage.index, "encoder": stage.encoder}, reads, (entry,))


def read_trained(store: Store, name: str) -> tuple[FileEntry, Any]:
    """The trained, empty index of a name; ``CorruptError`` if it is not, to the bit, what the log says.

    All that is indexed goes into lists by it, and it is small beside a shard: its sum is checked each time.
    """
    trained = store.state.file("index", "trained", name)
    if trained is None:
        raise CorruptError(f"index {name!r} has no training", f"See what else is wrong: retrotool verify {store.root}")
    path = store.path(trained)
    if atomic.file_sha256(path) != trained.sha256:
        raise CorruptError(
            f"{path}: its SHA-256 is not what the log says", f"See what else is wrong: retrotool verify {store.root}"
        )
    return trained, lists.open_index(path)


def write_index(root: Path, index: Any, name: FileName, about: dict[str, Any] | None) -> FileEntry:
    """Write a faiss index through the store's door, and read it back; ``StorageError`` if it is not all there."""
    try:
        return atomic.write_file(
            root,
            name,
            lambda path: lists.write(index, path),
            about=about,
            check=lambda path, _: lists.check(index, path),
        )
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise StorageError(
            f"{name.path}: {error.strerror}; what was committed before is untouched",
            "The file system, or a limit of the process (ulimit -f), allows no file of this size.",
        ) from error


def _check_finite(vectors: npt.NDArray[np.float16], part: int, rows: Sequence[int] | npt.NDArray[np.int64]) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(rows[int(np.argmin(finite))])
        raise UsageError(
            f"the vector of chunk {(part << parts.PART_SHIFT) + row} (part {part}, row {row}) is not finite",
            "Embed the part again.",
        )


def _sample(
    store: Store, encoder: str, rows: Mapping[int, npt.NDArray[np.int64]], size: int
) -> npt.NDArray[np.float32]:
    """``size`` searchable vectors, float32, drawn at random over all parts (the first n are of few sources)."""
    sizes = np.array([len(r) for r in rows.values()])
    drawn = np.sort(np.random.default_rng(_SEED).choice(int(sizes.sum()), size, replace=False))
    ends = np.cumsum(sizes)
    pieces = []
    for (part, searchable), end, count in zip(rows.items(), ends, sizes, strict=True):
        mine = drawn[(drawn >= end - count) & (drawn < end)] - (end - count)
        if len(mine):
            pieces.append(read_part_vectors(store, encoder, part)[searchable[mine]].astype(np.float32))
    return np.concatenate(pieces)


def read_searchable(
    store: Store, encoder: str, part: int, tombstones: Tombstones
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Chunk ids and vectors of a part's searchable chunks."""
    searchable = searchable_rows(store, part, tombstones)
    return parts.chunk_ids(part, searchable), read_part_vectors(store, encoder, part)[searchable]
