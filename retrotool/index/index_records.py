"""The log's entries for an index: its record, training and shards. Opens no file, builds no array.

An index has a *generation*, the number of its training (``docs/format.md``). A new one is built beside the
one that readers use, and the commit that switches removes the old files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from retrotool.ann.choice import IndexOptions, IndexShape
from retrotool.errors import CorruptError
from retrotool.store.log import FileEntry
from retrotool.store.paths import generation_in, generation_slot
from retrotool.store.state import State

SHARD = "shard-"  # prefix of slots of shards
INDEX = "index:"  # prefix of keys of indexes' records
RECALL = "recall"  # slot of the measurement
DEFAULT = "default_index"  # key of the record that names the default index
RECALL_SAMPLE = 2000  # random chunks to measure recall with by default

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecord(IndexShape):
    """An index and its measured recall: the record ``index:<name>``, see ``docs/format.md``."""

    encoder: str
    generation: int = 0
    vectors: int = 0
    nprobe: int = 0
    depth: int = 0
    target: float = 0.0
    target_met: bool = False
    recall_at_1: float = 0.0
    recall_at_10: float = 0.0
    recall_at_100: float = 0.0
    recall_error: float = 0.0
    queries: int = 0
    share: float = 0.0
    rate: float = 0.0
    imbalance: float = 0.0
    files: str = ""
    retrain_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """The log's entry of a training with the options ``asked``, see ``docs/format.md``.

    Errors are mean squared distances of the ``sample`` to centroids and, for residuals, codes.
    """

    encoder: str
    factory: str
    why: str
    dimension: int
    vectors: int
    held: int  # like ``vectors``, but purged ones too
    trained_parts: list[list[int]]  # ranges [first, last] of the parts sampled
    shard_rows: int
    asked: IndexOptions
    sample: int
    seed: int
    error: float
    code_error: float
    imbalance: float  # 1: all lists are equally long

    def sampled(self, numbers: Iterable[int]) -> set[int]:
        """Return which of the parts ``numbers`` the sample was drawn from."""
        from retrotool.ranges import within  # imports numpy, which --help need not wait for

        return within(self.trained_parts, numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A shard in the log; each part has a ``fit``: [vectors, mean squared distance to centroids, codes]."""

    parts: list[int] = field(default_factory=list)
    fit: list[list[float]] = field(default_factory=list)
    imbalance: float | None = None

    @classmethod
    def of(cls, entry: FileEntry) -> ShardRecord:
        """Read the record of a shard's file."""
        record = _read(cls, entry.about or {})
        if len(record.fit) != len(record.parts):
            raise CorruptError(f"{entry.path}: the log lists {len(record.fit)} fits for {len(record.parts)} parts")
        return record


def as_about(record: TrainingRecord | ShardRecord) -> dict[str, Any]:
    """Return a file's record as stored in the log: without unset fields."""
    about = asdict(record, dict_factory=lambda fields: {name: one for name, one in fields if one is not None})
    if isinstance(record, TrainingRecord):
        del about["asked"]["target"]  # it is in the index's record
    return about


def _read(kind: type[T], found: Mapping[str, Any]) -> T:
    return kind(**{one.name: found[one.name] for one in fields(kind) if one.name in found})  # type: ignore[arg-type]


def index_record(state: State, name: str) -> IndexRecord | None:
    """Return the record of an index; None if it was not measured yet."""
    found = state.records.get(INDEX + name)
    return None if found is None else _read(IndexRecord, found)


def default_index(state: State) -> str:
    """Return the name of the default index."""
    return str(state.records.get(DEFAULT, "main"))


class IndexFiles:
    """The files of a ``generation`` of an index, by default the ``current`` one that readers use (or 0)."""

    def __init__(self, state: State, name: str, generation: int | None = None) -> None:
        self.record = index_record(state, name)
        self.current = 0 if self.record is None else self.record.generation
        self.generation = self.current if generation is None else generation
        group = state.group("index", name)
        self.trained = group.get(generation_slot("trained", self.generation))
        mine = ((slot, entry) for slot, entry in group.items() if generation_in(slot) == self.generation)
        self.shards: dict[str, FileEntry] = {slot: entry for slot, entry in mine if slot.startswith(SHARD)}

    @property
    def training(self) -> TrainingRecord | None:
        """The log's entry of the training, None without one."""
        if self.trained is None:
            return None
        about = self.trained.about or {}
        held = about.get("held", about["vectors"])  # older trainings do not record it
        return _read(TrainingRecord, {**about, "held": held, "asked": _read(IndexOptions, about["asked"])})

    @property
    def encoder(self) -> str | None:
        """The encoder that the index, finished or not, was trained for; None without a training."""
        return None if self.training is None else self.training.encoder

    @property
    def digest(self) -> str:
        """A short digest of the shards' paths, which identify their contents."""
        paths = sorted(entry.path for entry in self.shards.values())
        return hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]

    @property
    def vectors(self) -> int:
        """Number of vectors in the shards."""
        return sum(entry.rows for entry in self.shards.values())

    @property
    def parts(self) -> list[int]:
        """Numbers of the parts in the shards, ascending."""
        return sorted(part for entry in self.shards.values() for part in ShardRecord.of(entry).parts)
