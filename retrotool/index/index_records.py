"""What the log says of an index: its record, its training and its shards; no file is opened, and no array made.

An index has a *generation*, the number of its training. Files of generation 0 are in the slots ``trained`` and
``shard-…``, those of a later one in ``trained.g1`` and so on. While the next generation is built, the record names the
current one, which all readers use; the commit that switches removes the old files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from retrotool.ann.choice import IndexShape, IndexWishes
from retrotool.errors import CorruptError
from retrotool.store.log import FileEntry
from retrotool.store.paths import generation_in, generation_slot
from retrotool.store.state import State

SHARD = "shard-"
"""What slots of shards begin with."""
RECALL = "recall"
"""Slot of what was measured."""
DEFAULT = "default_index"
"""Key of the record that names the index to take where none is named."""

QUERIES = 2000
"""Random chunks that the recall is measured with, unless so many are asked for."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecord(IndexShape):
    """What an index is, and what was measured of it: the record ``index:<name>``, see ``docs/format.md``.

    ``nprobe`` and ``depth`` are its operating point. ``target`` is the recall@10 that was asked for, and ``holds``
    whether that is reached; ``recall_error`` is half the 95 % interval of what is. The truth of ``queries`` was sought
    in the ``share`` of the vectors; ``rate`` is in queries a second. ``files`` stands for the shards that were
    measured. ``due`` says why to train anew; "": there is no reason.
    """

    encoder: str
    generation: int = 0
    vectors: int = 0
    nprobe: int = 0
    depth: int = 0
    target: float = 0.0
    holds: bool = False
    recall_at_1: float = 0.0
    recall_at_10: float = 0.0
    recall_at_100: float = 0.0
    recall_error: float = 0.0
    queries: int = 0
    share: float = 0.0
    rate: float = 0.0
    imbalance: float = 0.0
    files: str = ""
    due: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """What the log says of a training: what was ``asked`` for and chosen, of which vectors, and how it fits these.

    ``vectors`` were live, and ``held`` is what shards of the same parts hold, purged ones too. A ``sample`` of them was
    drawn from ``trained_parts``, [first, last] of what is consecutive, by ``seed``. ``error`` and ``code_error`` are
    the sample's mean squared distances to the centroids and, of residuals, to what their codes stand for;
    ``imbalance`` is nlist · Σ(share of list)², 1 if all lists are as long.
    """

    encoder: str
    factory: str
    why: str
    dimension: int
    vectors: int
    held: int
    trained_parts: list[list[int]]
    shard_rows: int
    asked: IndexWishes
    sample: int
    seed: int
    error: float
    code_error: float
    imbalance: float

    def sampled(self, numbers: Iterable[int]) -> set[int]:
        """Those of some parts that the sample was drawn from."""
        from retrotool.ranges import within  # numpy, which a command that only asks for help need not wait for

        return within(self.trained_parts, numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What the log says of a shard: the ``parts`` that it holds, and for each how well the training fits it.

    A ``fit`` is [vectors, mean squared distance to the centroids, and of residuals to their codes]. ``imbalance`` is
    that of its lists, None without lists.
    """

    parts: list[int] = field(default_factory=list)
    fit: list[list[float]] = field(default_factory=list)
    imbalance: float | None = None

    @classmethod
    def of(cls, entry: FileEntry) -> ShardRecord:
        """What the log says of the file of a shard."""
        record = _read(cls, entry.about or {})
        if len(record.fit) != len(record.parts):
            raise CorruptError(f"{entry.path}: the log says how {len(record.fit)} of {len(record.parts)} parts fit")
        return record


def as_about(record: TrainingRecord | ShardRecord) -> dict[str, Any]:
    """A record of a file as the log keeps it: without what was not given."""
    about = {name: value for name, value in asdict(record).items() if value is not None}
    if isinstance(record, TrainingRecord):
        about["asked"] = {name: value for name, value in about["asked"].items() if value is not None}
        del about["asked"]["target"]  # which the index's record has
    return about


def _read(kind: type[T], found: Mapping[str, Any]) -> T:
    """A record of what the log has; a field that ``kind`` does not know is left out."""
    return kind(**{one.name: found[one.name] for one in fields(kind) if one.name in found})  # type: ignore[arg-type]


def index_key(name: str) -> str:
    """Key of an index's record."""
    return f"index:{name}"


def index_record(state: State, name: str) -> IndexRecord | None:
    """The record of an index; None if there is none yet: it was not measured."""
    found = state.records.get(index_key(name))
    return None if found is None else _read(IndexRecord, found)


def default_index(state: State) -> str:
    """The index that is meant where none is named."""
    return str(state.records.get(DEFAULT, "main"))


class IndexFiles:
    """The files of an index in a state, of its ``generation``, and what the log says of them.

    ``current`` is the generation that readers use, 0 also if there is none yet; it is meant where none is given.
    ``trained`` is the file of the training, and ``shards`` are those of the shards by their slots.
    """

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
        """What the log says of the training; None if there is none."""
        if self.trained is None:
            return None
        about = self.trained.about or {}
        held = about.get("held", about["vectors"])  # a training from before that was counted
        return _read(TrainingRecord, {**about, "held": held, "asked": _read(IndexWishes, about["asked"])})

    @property
    def encoder(self) -> str | None:
        """The encoder that the index, finished or not, was trained for; None if there is no training."""
        return None if self.training is None else self.training.encoder

    @property
    def digest(self) -> str:
        """A short name of the shards: as good as their contents, for names of files are of these."""
        paths = sorted(entry.path for entry in self.shards.values())
        return hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]

    @property
    def vectors(self) -> int:
        """How many vectors the shards hold."""
        return sum(entry.rows for entry in self.shards.values())

    @property
    def parts(self) -> list[int]:
        """Numbers of the parts that the shards hold, ascending."""
        return sorted(part for entry in self.shards.values() for part in ShardRecord.of(entry).parts)
