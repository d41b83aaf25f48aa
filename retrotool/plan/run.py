"""``plan``: estimate the files, index, GPU-hours, core-hours and hours of a database, without a corpus.

n chunks of up to m tokens are encoded to d dimensions; L = tokens / n + 2 is their mean length with special
tokens. Rates are measured, per core, per GPU, or per host (its file system).

Sizes
    chunks        n = tokens / m + documents · (m − 1) / 2m: last chunks of documents are half full on average
    neighbours    13 bytes each; 8 in a small store, where ids compress better
    For a store of 158,539 chunks of documentation, the errors are between -1 % and +12 %.

Work, in floating-point operations (a multiplication and an addition are two)
    embed         n · L · layers · (8·h² + 4·h·i + 4·L·h), with h hidden and i intermediate dimensions; on
                  GPUs, cores also prepare n chunks at a rate
    index: train  sample · nlist · 2·d · iterations, with sample = 64 · nlist vectors, on one GPU or host;
                  2·√nlist instead of nlist for two-level k-means
    index: encode n · (nlist + 256 + d) · 2·d: nearest list, 256 centroids per piece, rotation (the latter two
                  only if the index has pieces and a rotation; nothing for an exact one)
    neighbours    n · (nlist + scanned + 100) · 2·d: scanned = 3·nlist codes per query, those of 24 to 96
                  lists, and 100 re-ranked candidates unless codes are the vectors; n · n · 2·d if exact

Time
    The longest of: operations / rate of the devices, core-seconds / cores, and bytes / rate of the disks,
    which read and write each file once. neighbours reads vectors twice, to re-rank; GPUs load them once, or
    for every eight parts if they do not fit. Vectors that half of a host's memory does not hold are searched
    in tiles (``neighbours.tiles``), for which rows are written and read again. Parts are the units of work,
    so the worker with the most parts decides. Stages run one after another.

Not included: what the plan lists as not counted, killed jobs, and the recall, which can only be measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from retrotool import machine
from retrotool.ann.choice import ITERATIONS, TARGET_RECALL, IndexOptions, IndexShape, choose_index
from retrotool.ann.kmeans import TWO_LEVELS
from retrotool.chunk import CHUNK_LENGTH, PART_SIZE
from retrotool.chunk.run import check_chunk_length
from retrotool.cli.command_lines import SAVED
from retrotool.cli.options import parse_count
from retrotool.encoder.encoder_identity import read_config
from retrotool.errors import UsageError
from retrotool.index.stage import default_shard_rows, sample_size
from retrotool.neighbours.tiles import room_of_tile
from retrotool.sizes import parse_size

DOCUMENT_BYTES, NEIGHBOUR_BYTES = 60, 13
ROW_BYTES, TOKEN_HUNDREDTHS = 3, 105  # bytes per chunk without its tokens, and hundredths of a byte per token
TEXT_BYTES = 4  # bytes of text per token
LIST_BYTES = 8
SPECIAL_TOKENS = 2
SCANNED_LISTS = 3
RERANKED = 100
PROBED = 80  # lists of a chunk
_NEAR_TOGETHER = 0.7  # tiles that a chunk goes to, by those of a random choice of lists: measured 0.55 to 0.8
_BESIDE_ROUTED, _LIST_NUMBER, _ANSWER = 24, 4, 12  # bytes of a row in a tile, besides its vector; and of a neighbour
_CARD_BYTES, _BESIDE_VECTOR = 56e9, 40  # of 80 GB, for vectors; bytes of a vector besides its numbers
_PARTS_AT_ONCE = 8  # searched by a GPU in each portion of vectors that is loaded
_LOADED_PER_SECOND = 2e10  # bytes, from memory to a GPU
GPUS_A_HOST = 8
TOKENS_A_DOCUMENT = 700
_CENTROIDS = 256
_HOUR = 3600.0
_MOST = 10**9
WIDE = 768  # encoders with fewer dimensions have a separate rate: small matrices don't keep a device busy
_EPYC = "an EPYC with AVX-512 BF16"
_SSD = "assumed: a local SSD"
_MOST_SIZE = 1 << 14
_MOST_RATE = 1e24
_MOST_BYTES = (1 << 63) - 1  # the most that JSON can have


@dataclass(frozen=True, slots=True)
class Rate:
    """The rate of a stage: ``value`` in ``unit`` per ``per`` ("core", "GPU" or "host"), and its source."""

    stage: str
    value: float
    unit: str
    per: str
    source: str


_RATES = (
    Rate("chunk", 21.5e6, "B/s", "core", f"{_EPYC}: text from files to Parquet"),
    Rate("embed", 3.6e14, "FLOP/s", "GPU", "an H100: 31,600 full chunks of BERT-base"),
    Rate("embed", 2.0e11, "FLOP/s", "core", _EPYC),
    Rate("embed narrow", 1.6e14, "FLOP/s", "GPU", "an H100"),
    Rate("embed narrow", 1.77e11, "FLOP/s", "core", _EPYC),
    Rate("feed", 6.1e4, "chunks/s", "core", f"{_EPYC}: chunks prepared for a GPU"),
    Rate("index", 2.1e14, "FLOP/s", "GPU", "an H100: nearest of many centroids"),
    Rate("index", 8.5e10, "FLOP/s", "core", f"{_EPYC}: nearest of many centroids"),
    Rate("neighbours", 5.0e13, "FLOP/s", "GPU", "an H100, by arithmetic: queries against lists"),
    Rate("neighbours", 1.5e10, "FLOP/s", "core", "a Xeon: queries against lists"),
    Rate("read", 2.0e9, "B/s", "host", _SSD),
    Rate("write", 1.0e9, "B/s", "host", _SSD),
)
TABLE = {(rate.stage, rate.per): rate for rate in _RATES}
STAGES = ("chunk", "embed", "feed", "index", "neighbours", "read", "write")  # whose rate the caller can give


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Sizes of a BERT; ``intermediate`` are the dimensions of its feed-forward network."""

    name: str
    layers: int
    hidden: int
    intermediate: int

    def flops_per_token(self, length: float) -> float:
        """Return the floating-point operations per token of a forward over texts of ``length`` tokens."""
        products = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        return self.layers * (2.0 * products + 4.0 * length * self.hidden)


@dataclass(frozen=True, slots=True)
class Machines:
    """The hosts, with cores and ``memory`` (bytes) per host, and the total GPUs."""

    gpus: int
    hosts: int
    cores: int
    memory: int


@dataclass(frozen=True, slots=True)
class Files:
    """All files of a kind; ``each`` describes how ``bytes`` is computed."""

    kind: str
    bytes: int
    each: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan(IndexShape):
    """The index that would be chosen."""

    sample: int  # vectors that it is trained on, by one host
    sample_bytes: int
    shards: int
    memory: int  # bytes
    hosts: int  # whose memory holds it


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage costs. ``limit`` is its bottleneck: GPU, CPU or disk. ``core_hours`` counts busy cores."""

    name: str
    gpu_hours: float
    core_hours: float
    wall_hours: float
    read_bytes: int
    written_bytes: int
    limit: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a database of ``tokens`` tokens takes, and the ``rates`` that were used."""

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
    assumptions: tuple[str, ...]


def plan(
    tokens: int | str,
    *,
    encoder: str = "minilm",
    gpus: int = 0,
    hosts: int | None = None,
    cores: int | None = None,
    memory_per_host: int | str | None = None,
    tokens_per_document: int = TOKENS_A_DOCUMENT,
    chunk_length: int = CHUNK_LENGTH,
    saved: int = SAVED,
    target_recall: float = TARGET_RECALL,
    rates: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a database of ``tokens`` tokens, such as 1.75T.

    ``cores`` and ``memory_per_host`` (bytes, or for example 64GiB) are by default those of this machine,
    ``hosts`` one per 8 GPUs. ``rates`` (by stage, in the units of the plan) replace those of ``TABLE``.
    """
    hosts = max(1, -(-gpus // GPUS_A_HOST)) if hosts is None else hosts
    tokens = parse_count("--tokens", tokens) if isinstance(tokens, str) else tokens
    given = parse_size("--memory-per-host", memory_per_host) if isinstance(memory_per_host, str) else memory_per_host
    memory = machine.memory_of_machine() if given is None else given
    machines = Machines(gpus, hosts, machine.cores() if cores is None else cores, memory)
    work = _Work(
        tokens, find_shape(encoder), machines, tokens_per_document, chunk_length, saved, target_recall, rates or {}
    )
    stages = (work.chunk(), work.embed(), work.train(), work.encode(), work.neighbours())
    gpu, core, wall = (sum(getattr(stage, f"{kind}_hours") for stage in stages) for kind in ("gpu", "core", "wall"))
    return Plan(
        tokens, work.documents, work.n, chunk_length, work.parts, work.encoder, machines, work.files,
        sum(one.bytes for one in work.files), work.index(), stages, gpu, core, wall, tuple(work.rates.values()),
        work.assumptions(),
    )  # fmt: skip


@dataclass
class _Work:
    """Computes a plan; ``given`` rates replace those of ``TABLE``, ``rates`` collects those that are used."""

    tokens: int
    encoder: EncoderShape
    machines: Machines
    tokens_per_document: int
    chunk_length: int
    saved: int
    target_recall: float
    given: Mapping[str, float]
    rates: dict[str, Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        machines = self.machines
        for option, value, least, most in (
            ("--tokens", self.tokens, 1, 10**14),
            ("--gpus", machines.gpus, 0, _MOST),
            ("--hosts", machines.hosts, 1, _MOST),
            ("--cores", machines.cores, 1, _MOST),
            ("--memory-per-host", machines.memory, 1, 10**15),
            ("--tokens-per-document", self.tokens_per_document, 1, _MOST),
            ("--neighbours", self.saved, 1, 1000),
        ):
            if not least <= value <= most:
                raise UsageError(f"{option} {value} is not between {least:,} and {most:,}")
        check_chunk_length(self.chunk_length)
        for stage, rate in self.given.items():
            if stage not in STAGES:
                raise UsageError(f"--rate {stage}={rate:g}: {stage!r} is not one of {', '.join(STAGES)}")
            if not 0 < rate <= _MOST_RATE:
                raise UsageError(f"--rate {stage}={rate:g} is not above 0 and at most {_MOST_RATE:g}")
        if not 0 < self.target_recall <= 1:
            raise UsageError(f"--target-recall {self.target_recall} is not above 0 and at most 1")
        self.documents, m = -(-self.tokens // self.tokens_per_document), self.chunk_length
        self.n = max(self.documents, -(-(2 * self.tokens + self.documents * (m - 1)) // (2 * m)))
        self.parts = -(-self.n // PART_SIZE)
        choice = self._choice = choose_index(self.n, self.encoder.hidden, IndexOptions(target=self.target_recall))
        self._shards = -(-self.n // default_shard_rows(choice, None))
        self._sample = sample_size(self.n, choice, self.machines.memory) if choice.nlist else 0
        of_lists = LIST_BYTES * choice.nlist * self._shards
        n, vector, saved = self.n, 2 * choice.d, NEIGHBOUR_BYTES * self.saved
        tokens = TOKEN_HUNDREDTHS * self.tokens // 100
        of_chunks = f"{ROW_BYTES} bytes per chunk and {TOKEN_HUNDREDTHS / 100} per token"
        of_index = f"{choice.bytes_per_vector:,} bytes per chunk, lists, training"
        self.files = (
            Files("documents", DOCUMENT_BYTES * self.documents, f"{DOCUMENT_BYTES} bytes per document"),
            Files("chunks", ROW_BYTES * n + tokens, of_chunks),
            Files("embeddings", vector * n, f"{vector:,} bytes per chunk"),
            Files("index", n * choice.bytes_per_vector + choice.trained_bytes + of_lists, of_index),
            Files("neighbours", saved * n, f"{saved:,} bytes per chunk, {self.saved} saved"),
        )
        self._bytes = {one.kind: one.bytes for one in self.files}
        self._device = "GPU" if self.machines.gpus else "core"
        half, vectors = self.machines.memory // 2, self._bytes["embeddings"]
        self._tiles = -(-vectors // room_of_tile(half, machines.gpus > 0)) if choice.nlist and vectors > half else 0
        apart = self._tiles and self._tiles * (1 - (1 - 1 / self._tiles) ** PROBED)  # of lists that are anywhere
        self._copies = max(1.0, _NEAR_TOGETHER * apart)

    def index(self) -> IndexPlan:
        choice, sample, memory = self._choice, self._sample, self._bytes["index"]
        return IndexPlan(
            **asdict(choice.shape()), sample=sample, sample_bytes=2 * choice.d * sample, shards=self._shards,
            memory=memory, hosts=-(-memory // self.machines.memory),
        )  # fmt: skip

    def chunk(self) -> StagePlan:
        machines = self.machines
        seconds = TEXT_BYTES * self.tokens / self._rate("chunk", "core")
        written = self._bytes["documents"] + self._bytes["chunks"]
        wall = seconds * self._share(machines.hosts * machines.cores)
        return self._stage("chunk", 0.0, seconds, {"CPU": wall}, 0, written, self._share(machines.hosts))

    def embed(self) -> StagePlan:
        length, encoder = self.tokens / self.n + SPECIAL_TOKENS, self.encoder
        known = TABLE["embed" if encoder.hidden >= WIDE else "embed narrow", self._device]
        chunks = known.value / (length * encoder.flops_per_token(length))
        seconds = self.n / self._use(Rate("embed", chunks, "chunks/s", self._device, known.source))
        feed = self.n / self._rate("feed", "core") if self.machines.gpus else 0.0
        return self._spread("embed", seconds, self._bytes["chunks"], self._bytes["embeddings"], feed)

    def train(self) -> StagePlan:
        choice, sample = self._choice, self._sample
        lists = choice.nlist if choice.nlist <= TWO_LEVELS else 2 * choice.nlist**0.5
        flops = sample * lists * 2.0 * choice.coded * ITERATIONS
        read, written = 2 * choice.d * sample, choice.trained_bytes
        return self._spread("index: train", self._products("index", flops), read, written, alone=True)

    def encode(self) -> StagePlan:
        choice = self._choice
        centroids = choice.nlist + (_CENTROIDS if choice.pieces else 0) + (choice.d if choice.rotated else 0)
        flops = self.n * centroids * 2.0 * choice.coded
        read, written = self._bytes["embeddings"], self._bytes["index"] - choice.trained_bytes
        return self._spread("index: encode", self._products("index", flops), read, written)

    def neighbours(self) -> StagePlan:
        choice, n = self._choice, self.n
        coded = choice.code not in ("float16", "float32")
        scanned = min(n, SCANNED_LISTS * choice.nlist) if choice.nlist else n
        flops = n * (choice.nlist + scanned + min(n, RERANKED) * coded) * 2.0 * choice.coded
        vectors = self._bytes["embeddings"]
        if self._tiles:
            return self._in_tiles(n * (choice.nlist + scanned) * 2.0 * choice.coded)
        seconds = self._products("neighbours", flops)
        read = vectors * (1 + coded) + self._bytes["index"]
        if self.machines.gpus:
            fits = n * (2 * choice.d + _BESIDE_VECTOR) <= _CARD_BYTES
            loads = 1 if fits else -(-self.parts // _PARTS_AT_ONCE)
            seconds += loads * vectors / _LOADED_PER_SECOND
            read = vectors * (1 if 2 * vectors <= self.machines.memory else loads)
        return self._spread("neighbours", seconds, read, self._bytes["neighbours"])

    def _in_tiles(self, flops: float) -> StagePlan:
        """Return the cost of a search in tiles, with ``flops`` to find and search lists."""
        choice, n, copies = self._choice, self.n, self._copies
        moved = int(n * (copies * (2 * choice.d + _BESIDE_ROUTED) + _LIST_NUMBER * PROBED))
        moved += int(n * copies * _ANSWER * self.saved)
        seconds = self._products("neighbours", flops)
        seconds += moved / _LOADED_PER_SECOND if self.machines.gpus else 0.0
        read = self._bytes["embeddings"] + LIST_BYTES * n + moved
        written = moved + self._bytes["neighbours"]
        return self._spread("neighbours", seconds, min(read, _MOST_BYTES), min(written, _MOST_BYTES))

    def _rate(self, stage: str, per: str) -> float:
        return self._use(TABLE[stage, per])

    def _use(self, rate: Rate) -> float:
        given = self.given.get(rate.stage)
        if given is not None:
            rate = replace(rate, value=float(given), source="given")
        self.rates[rate.stage] = rate
        return rate.value

    def _products(self, stage: str, flops: float) -> float:
        return flops / self._rate(stage, self._device) if flops else 0.0

    def _spread(
        self, name: str, seconds: float, read: int, written: int, feed: float = 0.0, *, alone: bool = False
    ) -> StagePlan:
        """Distribute ``seconds`` of one device over all devices; ``feed`` are core-seconds that GPUs need."""
        machines = self.machines
        gpus, hosts = (1.0, 1.0) if alone else (self._share(machines.gpus or 1), self._share(machines.hosts))
        gpu, core = (seconds, feed) if machines.gpus else (0.0, seconds)
        walls = {"GPU": gpu * gpus, "CPU": core / machines.cores * hosts}
        return self._stage(name, gpu, core, walls, read, written, hosts)

    def _stage(
        self, name: str, gpu: float, core: float, walls: dict[str, float], read: int, written: int, hosts: float
    ) -> StagePlan:
        """Add the disks to ``walls`` (seconds); ``hosts``: share of files of the busiest host."""
        disk = read / self._rate("read", "host") + written / self._rate("write", "host")
        walls = {**walls, "disk": disk * hosts}
        limit = max(walls, key=walls.__getitem__)
        wall = walls[limit]
        return StagePlan(name, gpu / _HOUR, core / _HOUR, wall / _HOUR, read, written, limit if wall else "")

    def _share(self, workers: int) -> float:
        """Return the share of all chunks that the busiest worker has, as workers take whole parts."""
        return min(1.0, -(-self.parts // workers) * PART_SIZE / self.n)

    def assumptions(self) -> tuple[str, ...]:
        choice = self._choice
        found = [
            f"{self.tokens_per_document:,} tokens per document, with a half-full last chunk",
            f"{TEXT_BYTES} bytes of text per token",
            "tokens of 2 bytes (a vocabulary of up to 65,536), compressed to about half",
            "document ids of about 13 bytes when compressed, and no kept metadata",
            "every chunk is embedded and indexed and gets neighbours, one stage after another",
            "disks: every file is read and written once, a lower bound",
            "not counted: reading the input, networks, and cores that only drive a GPU",
        ]
        if self._tiles:
            found.append(
                f"{self._tiles:,} tiles of vectors, as half of a host's memory does not hold all; a chunk goes to "
                f"{self._copies:.1f} of them, as measured with up to 100 tiles"
            )
        elif self.machines.gpus:
            found.append(
                f"GPUs hold all vectors, or load them for every {_PARTS_AT_ONCE} parts from the memory of a host"
            )
        if choice.nlist:
            candidates = "" if choice.code in ("float16", "float32") else f", {RERANKED} candidates are re-ranked"
            found.insert(4, f"each query is compared with {SCANNED_LISTS * choice.nlist:,} codes{candidates}")
        return tuple(found)


_KNOWN = {"minilm": "6x384", "bert-base": "12x768", "bert-large": "24x1024"}
_FIELDS = (("num_hidden_layers", "n_layers"), ("hidden_size", "dim"), ("intermediate_size", "hidden_dim"))


def find_shape(spec: str) -> EncoderShape:
    """Return the sizes of an encoder: a known name, LAYERSxHIDDEN, or a model directory."""
    path = Path(spec).expanduser()
    if sizes := re.fullmatch(r"(\d{1,4})x(\d{1,4})", _KNOWN.get(spec, spec)):
        layers, hidden = map(int, sizes.groups())
        if not layers or not hidden:
            raise UsageError(f"encoder {spec!r}: layers and dimensions must not be 0")
        return EncoderShape(spec, layers, hidden, 4 * hidden)
    if not path.is_dir():
        raise UsageError(
            f"encoder {spec!r} is not a known name, and not a directory",
            f"Give {', '.join(_KNOWN)}, a model directory, or layers and hidden dimensions, such as 12x768.",
        )
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"encoder {spec!r}: {path} has no config.json", "Name a model directory with one.")
    return EncoderShape(path.absolute().name, *(_size(file, read_config(path), names) for names in _FIELDS))


def _size(file: Path, config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_SIZE:
        raise UsageError(
            f"{file}: {names[0]} is {value!r}, not a number from 1 to {_MOST_SIZE:,}",
            "Only encoders of the BERT family are supported; give others as --encoder LAYERSxHIDDEN.",
        )
    return value
