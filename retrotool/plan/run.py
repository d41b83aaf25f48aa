"""``plan``: estimate the files, index, hours, bytes, requests and price of a database, without a corpus.

n chunks of up to m tokens are encoded to d dimensions; L = tokens / n + 2 is their mean length with special
tokens. Rates are measured, per core, per GPU, or per host (its disks or network).

Sizes
    chunks        n = tokens / m + documents · (m − 1) / 2m: last chunks of documents are half full on average
    neighbours    3.4 bytes for a distance, and 0.16 for each binary digit of the largest id
    For stores of 1, 2 and 4 million chunks, the error of all files is at most 2 % (docs/performance.md).

Work, in floating-point operations (a multiplication and an addition are two)
    embed         n · L · layers · (8·h² + 4·h·i + 4·L·h), with h hidden and i intermediate dimensions; on
                  GPUs, cores also prepare n chunks at a rate
    index: train  sample · nlist · 2·d · iterations, with sample = 64 · nlist vectors, on one GPU or host;
                  2·√nlist instead of nlist for two-level k-means
    index: encode n · (nlist + 256 + d) · 2·d: nearest list, 256 centroids per piece, rotation (the latter two
                  only if the index has pieces and a rotation; nothing for an exact one); for very many lists
                  33·√nlist instead of nlist
    index: recall 2,000 queries · n · 2·d, up to a budget: exact search
    neighbours    n · nlist · 2·d to find lists, at the rate of index; n · nprobe · n / nlist · 2·d to search;
                  on cores also n · (nprobe · 70,000 + saved · 130,000), for what is done for each list and
                  neighbour, as measured; n · n · 2·d if exact

Time
    The longest of: operations / rate of the devices, core-seconds / cores, bytes / rate of the hosts, which
    read and write each file once, and in a bucket requests / rate of the bucket. GPUs load vectors once for
    neighbours, or for every eight parts if they do not fit. Vectors that half of a host's memory does not
    hold are searched in tiles (``neighbours.tiles``), for which rows are written and read again. Tasks are
    the units of work, so the worker with the most decides. Stages run one after another.

Requests: files are read in ranges of 8 MiB, and sent in parts of 16; a task needs some more for the log.

Not included: what the plan lists as not counted, killed jobs, and the recall, which can only be measured.
"""

from __future__ import annotations

import math
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
from retrotool.cli import output
from retrotool.cli.command_lines import SAVED
from retrotool.cli.options import parse_count
from retrotool.encoder.encoder_identity import json_object
from retrotool.errors import UsageError
from retrotool.index.recall import BUDGET, GPU_BUDGET
from retrotool.index.stage import default_shard_rows, sample_size
from retrotool.neighbours.tiles import ANSWER_BYTES, BESIDE_ROUTED, bytes_of_guest, copies, count_waves, room_of_tile
from retrotool.sizes import parse_size
from retrotool.store.storage import PART_BYTES, RANGE_BYTES

DOCUMENT_BYTES = 60
DISTANCE_BYTES, ID_BYTES = 3.4, 0.16  # of a neighbour, compressed: of its distance, and of each binary digit
ROW_BYTES, TOKEN_HUNDREDTHS = 3, 105  # bytes per chunk without its tokens, and hundredths of a byte per token
TEXT_BYTES = 4  # bytes of text per token
LIST_BYTES = 8
SPECIAL_TOKENS = 2
NPROBE = 128  # lists that a chunk is compared with: 96 to 168 for documentation
_LIST_FLOPS, _SAVED_FLOPS = 70_000, 130_000  # as much work as a list and a saved neighbour of a query are on cores
_ASKED = 2000  # queries, to measure recall
_UPPER_PROBED = 33  # of √nlist upper lists, with finding them
_LIST_NUMBER = 4  # bytes of a list that a row in a tile probes
_CARD_BYTES, _BESIDE_VECTOR = 56e9, 40  # of 80 GB, for vectors; bytes of a vector besides its numbers
_PARTS_AT_ONCE = 8  # searched by a GPU in each portion of vectors that is loaded
_LOADED_PER_SECOND = 2e10  # bytes, from memory to a GPU
_BESIDE_READS, _BESIDE_WRITES = 20, 6  # requests of a task besides those for its data: measured 7 to 35, and 2 to 10
GPUS_A_HOST = 8
TOKENS_A_DOCUMENT = 700
_CENTROIDS = 256
_HOUR = 3600.0
_MOST = 10**9
WIDE = 768  # encoders with fewer dimensions have a separate rate: small matrices don't keep a device busy
_EPYC = "an EPYC with AVX-512 BF16"
_SSD, _NETWORK, _S3 = "assumed: a local SSD", "assumed: a network of 25 Gbit/s", "S3, for a prefix"
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
_OF_BUCKET = (
    Rate("read", 3.0e9, "B/s", "host", _NETWORK),
    Rate("write", 3.0e9, "B/s", "host", _NETWORK),
    Rate("get", 5500.0, "requests/s", "bucket", _S3),
    Rate("put", 3500.0, "requests/s", "bucket", _S3),
)
STAGES = ("chunk", "embed", "feed", "index", "neighbours", "read", "write", "get", "put")  # rates that can be given
PRICES = ("gpu", "host", "get", "put", "stored")


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
    """The hosts, cores and ``memory`` (bytes) per host, GPUs in all, and whether a bucket has the store."""

    gpus: int
    hosts: int
    cores: int
    memory: int
    bucket: bool = False


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
    """What a stage costs. ``limit`` is its bottleneck: GPU, CPU, disk, network or requests.

    ``core_hours`` counts busy cores, ``gets`` and ``puts`` requests to a bucket, which ``price`` contains.
    """

    name: str
    tasks: int
    gpu_hours: float
    core_hours: float
    wall_hours: float
    read_bytes: int
    written_bytes: int
    gets: int
    puts: int
    price: float | None
    limit: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a database of ``tokens`` tokens takes, and the ``rates`` that were used.

    ``price`` is that of all stages, ``price_a_month`` that of the files; None without prices.
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
    price: float | None
    price_a_month: float | None
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
    nprobe: int = NPROBE,
    bucket: bool = False,
    rates: Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a database of ``tokens`` tokens, such as 1.75T.

    ``cores`` and ``memory_per_host`` (bytes, or for example 64GiB) are by default those of this machine,
    ``hosts`` one per 8 GPUs. ``nprobe``: lists that each chunk is compared with. ``bucket``: the store is in
    object storage. ``rates`` (by stage, in the units of the plan) replace those of ``TABLE``. ``prices``: of
    a ``gpu`` and a ``host`` for an hour, of 1,000 requests (``get``, ``put``), and of a GB ``stored`` for a
    month.
    """
    hosts = max(1, -(-gpus // GPUS_A_HOST)) if hosts is None else hosts
    tokens = parse_count("--tokens", tokens) if isinstance(tokens, str) else tokens
    given = parse_size("--memory-per-host", memory_per_host) if isinstance(memory_per_host, str) else memory_per_host
    memory = machine.memory_of_machine() if given is None else given
    machines = Machines(gpus, hosts, machine.cores() if cores is None else cores, memory, bucket)
    work = _Work(
        tokens, find_shape(encoder), machines, tokens_per_document, chunk_length, saved, target_recall, nprobe,
        rates or {}, prices or {},
    )  # fmt: skip
    stages = (work.chunk(), work.embed(), work.train(), work.encode(), work.recall(), *work.neighbours())
    priced = [stage.price for stage in stages if stage.price is not None]
    size = sum(one.bytes for one in work.files)
    gpu, core, wall = (sum(getattr(stage, f"{kind}_hours") for stage in stages) for kind in ("gpu", "core", "wall"))
    return Plan(
        tokens, work.documents, work.n, chunk_length, work.parts, work.encoder, machines, work.files,
        size, work.index(), stages, gpu, core, wall, sum(priced) if priced else None,
        size / 1e9 * work.prices["stored"] if "stored" in work.prices else None, tuple(work.rates.values()),
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
    nprobe: int
    given: Mapping[str, float]
    prices: Mapping[str, float]
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
            ("--nprobe", self.nprobe, 1, _MOST),
        ):
            if not least <= value <= most:
                raise UsageError(f"{option} {value} is not between {least:,} and {most:,}")
        check_chunk_length(self.chunk_length)
        for option, known, numbers in (("--rate", STAGES, self.given), ("--price", PRICES, self.prices)):
            for name, number in numbers.items():
                if name not in known:
                    raise UsageError(f"{option} {name}={number:g}: {name!r} is not one of {', '.join(known)}")
                if not 0 < number <= _MOST_RATE:
                    raise UsageError(f"{option} {name}={number:g} is not above 0 and at most {_MOST_RATE:g}")
        if not 0 < self.target_recall <= 1:
            raise UsageError(f"--target-recall {self.target_recall} is not above 0 and at most 1")
        self.documents, m = -(-self.tokens // self.tokens_per_document), self.chunk_length
        self.n = max(self.documents, -(-(2 * self.tokens + self.documents * (m - 1)) // (2 * m)))
        self.parts = -(-self.n // PART_SIZE)
        choice = self._choice = choose_index(self.n, self.encoder.hidden, IndexOptions(target=self.target_recall))
        self._shards = -(-self.n // default_shard_rows(choice, None))
        self._sample = sample_size(self.n, choice, self.machines.memory) if choice.nlist else 0
        of_lists = LIST_BYTES * choice.nlist * self._shards
        n, vector = self.n, 2 * choice.d
        saved = round(self.saved * (DISTANCE_BYTES + ID_BYTES * math.log2(n + 1)))
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
        self._probed = min(self.nprobe, choice.nlist)
        self._copies = copies(self._tiles, choice.nlist, self._probed) if self._tiles else 1.0
        self._waves = count_waves(self._copies, choice.d, self.saved)
        row = bytes_of_guest(choice.d, self.saved)
        self._scratch = int(n * (1 + (self._copies - 1) / self._waves) * row)
        upper = _UPPER_PROBED * choice.nlist**0.5
        self._compared = choice.nlist if choice.nlist <= TWO_LEVELS else upper  # centroids, to find lists
        self._known = TABLE | {(rate.stage, rate.per): rate for rate in _OF_BUCKET if self.machines.bucket}

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
        walls = {"CPU": seconds * self._share(machines.hosts * machines.cores)}
        hosts = self._share(machines.hosts)
        return self._stage("chunk", self.parts, 0.0, seconds, walls, 0, written, hosts, files=2)

    def embed(self) -> StagePlan:
        length, encoder = self.tokens / self.n + SPECIAL_TOKENS, self.encoder
        known = TABLE["embed" if encoder.hidden >= WIDE else "embed narrow", self._device]
        chunks = known.value / (length * encoder.flops_per_token(length))
        seconds = self.n / self._use(Rate("embed", chunks, "chunks/s", self._device, known.source))
        feed = self.n / self._rate("feed", "core") if self.machines.gpus else 0.0
        return self._spread("embed", self.parts, seconds, self._bytes["chunks"], self._bytes["embeddings"], feed)

    def train(self) -> StagePlan:
        choice, sample = self._choice, self._sample
        lists = choice.nlist if choice.nlist <= TWO_LEVELS else 2 * choice.nlist**0.5
        flops = sample * lists * 2.0 * choice.coded * ITERATIONS
        read, written = 2 * choice.d * sample, choice.trained_bytes
        return self._spread("index: train", 1, self._products("index", flops), read, written, units=1)

    def encode(self) -> StagePlan:
        choice = self._choice
        centroids = self._compared + (_CENTROIDS if choice.pieces else 0) + (choice.d if choice.rotated else 0)
        seconds = self._products("index", self.n * centroids * 2.0 * choice.coded)
        read, written = self._bytes["embeddings"], self._bytes["index"] - choice.trained_bytes
        return self._spread("index: encode", self._shards, seconds, read, written)

    def recall(self) -> StagePlan:
        if not self._choice.nlist:
            return self._spread("index: recall", 0, 0.0, 0, 0)
        asked = min(_ASKED, self.n)
        budget = GPU_BUDGET if self.machines.gpus else BUDGET
        share = min(1.0, max(budget / (asked * self.n), 2000 / (10 * asked)))
        seconds = self._products("index", share * asked * self.n * 2.0 * self._choice.d)
        read = int(share * self._bytes["embeddings"])
        return self._spread("index: recall", 1, seconds, read, 0, pieces=self.parts, units=1)

    def neighbours(self) -> tuple[StagePlan, ...]:
        choice, n, gpus = self._choice, self.n, self.machines.gpus
        scanned = min(n, self._probed * n / choice.nlist) if choice.nlist else n
        finding = self._products("index", n * self._compared * 2.0 * choice.d)
        flops = n * scanned * 2.0 * choice.d
        flops += 0 if gpus else n * (self._probed * _LIST_FLOPS + self.saved * _SAVED_FLOPS)
        searching, vectors = self._products("neighbours", flops), self._bytes["embeddings"]
        if self._tiles:
            return self._in_tiles(finding, searching)
        read = vectors + (0 if gpus else self._bytes["index"])
        if gpus:
            fits = n * (2 * choice.d + _BESIDE_VECTOR) <= _CARD_BYTES
            loads = 1 if fits else -(-self.parts // _PARTS_AT_ONCE)
            searching += loads * vectors / _LOADED_PER_SECOND
            read = vectors * (1 if 2 * vectors <= self.machines.memory else loads)
        read += self._bytes["documents"]
        return (self._spread("neighbours", self.parts, finding + searching, read, self._bytes["neighbours"]),)

    def _in_tiles(self, finding: float, searching: float) -> tuple[StagePlan, ...]:
        """Return the cost of the three rounds of a search in tiles: to find lists, search them, and merge."""
        choice, n, tiles, waves = self._choice, self.n, self._tiles, self._waves
        routed = int(n * ((self._copies - 1 + waves) * (2 * choice.d + BESIDE_ROUTED) + _LIST_NUMBER * self._probed))
        found = int(n * self._copies * ANSWER_BYTES * self.saved)
        if self.machines.gpus:
            searching += routed / _LOADED_PER_SECOND
        read = waves * (self._bytes["embeddings"] + LIST_BYTES * n)
        pieces, tasks = self.parts * tiles, self.parts * waves
        return (
            self._spread("neighbours: route", tasks, finding, read, routed),
            self._spread(
                "neighbours: search", tiles * waves, searching, routed, found, pieces=pieces * (waves + 1), units=tiles
            ),
            self._spread("neighbours: merge", self.parts, 0.0, found, self._bytes["neighbours"], pieces=pieces),
        )

    def _rate(self, stage: str, per: str) -> float:
        return self._use(self._known[stage, per])

    def _use(self, rate: Rate) -> float:
        given = self.given.get(rate.stage)
        if given is not None:
            rate = replace(rate, value=float(given), source="given")
        self.rates[rate.stage] = rate
        return rate.value

    def _products(self, stage: str, flops: float) -> float:
        return flops / self._rate(stage, self._device) if flops else 0.0

    def _spread(
        self, name: str, tasks: int, seconds: float, read: int, written: int, feed: float = 0.0, *,
        pieces: int = 0, units: int = 0,
    ) -> StagePlan:  # fmt: skip
        """Distribute ``seconds`` of one device over all devices; ``feed`` are core-seconds that GPUs need.

        ``units`` of equal size are shared instead of parts.
        """
        machines = self.machines
        gpus, hosts = (
            -(-units // workers) / units if units else self._share(workers)
            for workers in (machines.gpus or 1, machines.hosts)
        )
        gpu, core = (seconds, feed) if machines.gpus else (0.0, seconds)
        walls = {"GPU": gpu * gpus, "CPU": core / machines.cores * hosts}
        return self._stage(name, tasks, gpu, core, walls, read, written, hosts, pieces=pieces)

    def _stage(
        self, name: str, tasks: int, gpu: float, core: float, walls: dict[str, float], read: int, written: int,
        hosts: float, *, files: int = 1, pieces: int = 0,
    ) -> StagePlan:  # fmt: skip
        """Add bytes and requests to ``walls`` (seconds).

        Tasks write ``files`` each, and read ``pieces`` in all. ``hosts``: share of files of the busiest host.
        """
        moved = read / self._rate("read", "host") + written / self._rate("write", "host")
        walls = {**walls, "network" if self.machines.bucket else "disk": moved * hosts}
        gets = max(pieces, tasks) + read // RANGE_BYTES + _BESIDE_READS * tasks
        puts = files * tasks + written // PART_BYTES + _BESIDE_WRITES * tasks
        if self.machines.bucket:
            walls["requests"] = gets / self._rate("get", "bucket") + puts / self._rate("put", "bucket")
        limit = max(walls, key=walls.__getitem__)
        wall, machines = walls[limit] / _HOUR, self.machines
        hourly = machines.gpus * self.prices.get("gpu", 0.0) + machines.hosts * self.prices.get("host", 0.0)
        asked = gets * self.prices.get("get", 0.0) + puts * self.prices.get("put", 0.0)
        price = wall * hourly + asked * self.machines.bucket / 1000 if self.prices else None
        read, written = min(read, _MOST_BYTES), min(written, _MOST_BYTES)
        limit = limit if wall else ""
        return StagePlan(name, tasks, gpu / _HOUR, core / _HOUR, wall, read, written, gets, puts, price, limit)

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
            f"{'networks' if self.machines.bucket else 'disks'}: every file is read and written once, a lower bound",
            "not counted: reading the input, copies of a bucket's files on disks, and cores that only drive a GPU",
        ]
        if self._tiles:
            found.append(
                f"{self._tiles:,} tiles of vectors, as half of a host's memory does not hold all; a chunk goes to "
                f"{self._copies:.1f} of them, as measured with up to 400 tiles; {output.count(self._waves, 'wave')} of "
                f"chunks, so that {output.size(self._scratch)} suffice for what is removed in the end"
            )
        elif self.machines.gpus:
            found.append(
                f"GPUs hold all vectors, or load them for every {_PARTS_AT_ONCE} parts from the memory of a host"
            )
        if choice.nlist:
            compared = self.n * self._probed // choice.nlist
            found.insert(4, f"each chunk is compared with {self._probed:,} lists, about {compared:,} vectors")
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
    return EncoderShape(path.absolute().name, *(_size(file, json_object(file), names) for names in _FIELDS))


def _size(file: Path, config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_SIZE:
        raise UsageError(
            f"{file}: {names[0]} is {value!r}, not a number from 1 to {_MOST_SIZE:,}",
            "Only encoders of the BERT family are supported; give others as --encoder LAYERSxHIDDEN.",
        )
    return value
