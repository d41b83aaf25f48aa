"""What ``plan`` gives: sizes, an index and costs, as frozen dataclasses whose fields are those of ``--json``."""

from __future__ import annotations

from dataclasses import dataclass

from retrotool.plan.encoder_shapes import EncoderShape
from retrotool.plan.rates import Rate


@dataclass(frozen=True, slots=True)
class Machines:
    """What the work is spread over; ``memory`` is in bytes a host. Without GPUs everything runs on cores."""

    gpus: int
    hosts: int
    cores: int
    memory: int


@dataclass(frozen=True, slots=True)
class Files:
    """All files of a kind; ``each`` says what they take, for people."""

    kind: str
    bytes: int
    each: str


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The index that would be chosen. ``memory`` are bytes to hold all of it, ``hosts`` how many that takes.

    ``sample`` are the vectors that it is trained on, on one host, and ``sample_bytes`` what they take there.
    """

    factory: str
    kind: str
    why: str
    nlist: int
    bytes_per_vector: int
    trained_bytes: int
    sample: int
    sample_bytes: int
    shards: int
    memory: int
    hosts: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage costs. ``limit`` is what it waits for: GPU, CPU or disk; ``core_hours`` of those that are busy."""

    name: str
    gpu_hours: float
    core_hours: float
    wall_hours: float
    read_bytes: int
    written_bytes: int
    limit: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a database of ``tokens`` tokens takes: files, an index, stages one after another, and their sums.

    ``rates`` are those that were reckoned with, and ``rates_file`` is where some of them are from ("": none is).
    """

    tokens: int
    documents: int
    chunks: int
    chunk_length: int
    parts: int
    encoder: EncoderShape
    machines: Machines
    files: tuple[Files, ...]
    bytes: int
    index: IndexPlan
    stages: tuple[StagePlan, ...]
    gpu_hours: float
    core_hours: float
    wall_hours: float
    rates: tuple[Rate, ...]
    rates_file: str
    assumptions: tuple[str, ...]
