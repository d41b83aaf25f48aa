"""``plan --calibrate``: the rates of this machine, measured by the code that does the work.

Each rate is that of work done over and over for a few seconds after a first time that is not counted. CPU rates are
those of all cores at work, divided by their number (chunk, and getting chunks ready for a GPU: by CPU time). One GPU
is measured, the first.

    chunk       ``chunk`` of texts of Python's help, from .jsonl.zst to a committed store among temporary files
    embed       ``Encoder`` over chunks of 64 random tokens: a few layers of the size of BERT-base with random weights;
                and, as the narrow one, ``minilm``, if its extra is installed
    index       ``ann.kmeans.assign`` of random vectors of 768 dimensions
    neighbours  ``ann.search`` through random codes of 64 bytes, and re-ranking, on the CPU
    disk        a file beside the rates, or among temporary files: written and fsynced, put out of the cache, and read

What can't be measured is left out of the file, so that what is built in stays, and is told with its reason. Other work
on the machine makes all of it slower than it is. Memory: up to 1 GiB; on the disk up to 1.2 GB, for the time it takes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import orjson
import zstandard
from tqdm import tqdm

from retrotool import interrupts
from retrotool.encoder.devices import cores
from retrotool.errors import UsageError
from retrotool.plan import machine, rates
from retrotool.plan.encoder_shapes import find_shape
from retrotool.plan.rates import BUILT_IN, Rate

if TYPE_CHECKING:
    from retrotool.ann.trained import Trained
    from retrotool.encoder import Encoder

CHUNK_LENGTH = 64
_BLOCK = 1 << 24
_FRAME = 2
"""Special tokens of a BERT."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; what it is by default keeps a machine busy, and takes a minute or two.

    ``vectors`` are searched, and on a GPU 16 times as many are assigned; ``lists`` are of these.
    """

    seconds: float = 3.0
    text_bytes: int = 1 << 25
    layers: int = 4
    d: int = 768
    vectors: int = 1 << 16
    lists: int = 1 << 8
    queries: int = 1 << 11
    nprobe: int = 48
    file_bytes: int = 1 << 30


SIZES = Sizes()


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A rate that could not be measured, and why."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and written to ``file``; ``directory`` is where the disk was measured."""

    file: str
    machine: str
    date: str
    seconds: float
    directory: str
    rates: tuple[Rate, ...]
    not_measured: tuple[NotMeasured, ...]


class _CannotError(Exception):
    """Why something can't be measured here."""


@dataclass(frozen=True, slots=True)
class _Measure:
    """Rates that are measured together: ``run`` gives their values in the order of ``keys``."""

    what: str
    keys: tuple[str, ...]
    run: Callable[[], Sequence[float]]


def calibrate(file: str | Path | None = None, sizes: Sizes | None = None) -> Calibration:
    """Measure this machine, and write its rates to ``file``, by default where ``plan`` looks for them.

    ``UsageError`` if ``file`` is there and holds something else.
    """
    sizes = sizes or SIZES
    target = rates.default_file() if file is None else Path(file)
    if file is not None and target.exists():
        rates.read_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target.parent} can't be written to", "Name another file with --rates.")
    directory = Path(tempfile.gettempdir()) if file is None else target.absolute().parent
    started = time.monotonic()
    found: dict[str, float] = {}
    missing: list[NotMeasured] = []
    measures = _measures(sizes, directory)
    with tqdm(total=len(measures), desc="calibrate", unit="", disable=None, file=sys.stderr) as bar:
        for measure in measures:
            interrupts.check()
            bar.set_postfix_str(measure.what)
            try:
                found |= dict(zip(measure.keys, measure.run(), strict=True))
            except (_CannotError, UsageError) as reason:
                missing += [NotMeasured(key, str(reason)) for key in measure.keys]
            bar.update()
    name, date = machine.describe(), datetime.now(UTC).date().isoformat()
    measured = {rate.key: float(f"{found[rate.key]:.4g}") for rate in BUILT_IN if rate.key in found}
    rates.save(target, measured, name, date)
    by_key = rates.find_rates(target).by_key
    return Calibration(
        file=str(target),
        machine=name,
        date=date,
        seconds=round(time.monotonic() - started, 1),
        directory=str(directory),
        rates=tuple(by_key[key] for key in measured),
        not_measured=tuple(sorted(missing, key=lambda one: rates.KEYS.index(one.key))),
    )


def _measures(sizes: Sizes, directory: Path) -> list[_Measure]:
    return [
        _Measure("chunk", ("chunk_core_bytes_per_s",), lambda: [_chunk(sizes)]),
        _Measure("embed", ("embed_core_flop_per_s",), lambda: [_embed_wide("cpu", sizes) / cores()]),
        _Measure("embed, narrow", ("embed_core_narrow_flop_per_s",), lambda: [_embed_narrow("cpu", sizes) / cores()]),
        _Measure("embed, GPU", ("embed_gpu_flop_per_s",), lambda: [_embed_wide(_gpu(), sizes)]),
        _Measure("embed, narrow, GPU", ("embed_gpu_narrow_flop_per_s",), lambda: [_embed_narrow(_gpu(), sizes)]),
        _Measure("chunks for a GPU", ("feed_core_chunks_per_s",), _feed),
        _Measure("index", ("assign_core_flop_per_s",), lambda: [_assign("cpu", sizes) / cores()]),
        _Measure("index, GPU", ("assign_gpu_flop_per_s",), lambda: [_assign(_gpu(), sizes)]),
        _Measure("neighbours", ("search_core_flop_per_s",), lambda: [_search(sizes) / cores()]),
        _Measure("neighbours, GPU", ("search_gpu_flop_per_s",), _search_on_gpu),
        _Measure("disk", ("disk_write_bytes_per_s", "disk_read_bytes_per_s"), lambda: _disk(directory, sizes)),
    ]


def _per_second(step: Callable[[], float], seconds: float) -> float:
    """Units of work a second: ``step`` does some, and says how many."""
    step()
    started, done = time.perf_counter(), 0.0
    while True:
        interrupts.check()
        done += step()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return done / elapsed


def _gpu() -> str:
    if not machine.has_gpu():
        raise _CannotError("torch sees no GPU")
    return "cuda:0"


def _texts() -> list[str]:
    """Half a megabyte of English with examples of code, in pieces of up to 3,000 characters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _CannotError("this Python has no help texts to tokenise") from None
    return [text[start : start + 3000] for text in topics.values() for start in range(0, len(text), 3000)]


def _chunk(sizes: Sizes) -> float:
    """Bytes of text a second of CPU time, from compressed lines of JSON to a committed store."""
    from retrotool.chunk.run import chunk

    texts = _texts()
    copies = max(1, sizes.text_bytes // sum(map(len, texts)))
    with tempfile.TemporaryDirectory() as folder:
        store, first, rest = (Path(folder) / name for name in ("store", "first.jsonl.zst", "rest.jsonl.zst"))
        _write_documents(first, 0, texts)
        # In the first run the tokenizer is got ready, which is paid once a store.
        chunk(store, [str(first)])
        done = sum(_write_documents(rest, copy, texts) for copy in range(1, copies + 1))
        started = time.process_time()
        chunk(store, [str(rest)])
        return done / (time.process_time() - started)


def _write_documents(path: Path, copy: int, texts: Sequence[str]) -> int:
    """Append documents that are no copies of others to a file; how many bytes of text they have."""
    numbered = [f"{copy}. {text}" for text in texts]
    lines = b"".join(orjson.dumps({"id": f"{copy}/{i}", "text": text}) + b"\n" for i, text in enumerate(numbered))
    with path.open("ab") as file:
        file.write(zstandard.compress(lines))
    return sum(len(text.encode()) for text in numbered)


def _embed_wide(device: str, sizes: Sizes) -> float:
    """Floating-point operations a second of the forward of a BERT of base size."""
    with tempfile.TemporaryDirectory() as folder:
        make_bert(Path(folder), layers=sizes.layers, d=sizes.d)
        return _embed(folder, device, sizes)


def _embed_narrow(device: str, sizes: Sizes) -> float:
    return _embed("minilm", device, sizes)


def make_bert(path: Path, *, layers: int, d: int) -> None:
    """Write the directory of a BERT with random weights and a vocabulary of 1,000 made-up words."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, processors
    from transformers import BertConfig, BertModel

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(996))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of the vocabulary
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        intermediate_size=4 * d,
        max_position_embeddings=128,
    )
    config.save_pretrained(path)
    # Not by the model's own method, which draws a progress bar.
    save_file(BertModel(config).state_dict(), path / "model.safetensors", {"format": "pt"})


def _embed(spec: str, device: str, sizes: Sizes) -> float:
    from retrotool.encoder import Rows

    length = CHUNK_LENGTH + _FRAME
    with _encoder(spec, device) as encoder:
        n = max(1, encoder.batch_tokens // length) * encoder.work.lanes * 4
        ids = np.random.default_rng(0).integers(100, 900, n * CHUNK_LENGTH, dtype=np.int32)
        rows = Rows(ids, np.full(n, CHUNK_LENGTH, np.int64))
        flops = n * length * find_shape(spec).flops_per_token(length)

        def step() -> float:
            encoder.embed(rows)
            return flops

        return _per_second(step, sizes.seconds)


@contextmanager
def _encoder(spec: str, device: str) -> Iterator[Encoder]:
    """A loaded encoder in the type that it has by default there."""
    from retrotool.encoder import Encoder

    encoder = Encoder(spec, device, say=lambda _: None)
    try:
        yield encoder
    finally:
        encoder.close()


def _feed() -> Sequence[float]:
    raise _CannotError("only a run of embed on a GPU shows it")


def _assign(device: str, sizes: Sizes) -> float:
    """Floating-point operations a second of finding the nearest centroid."""
    import torch

    from retrotool.ann.kmeans import assign

    many = 16 if device != "cpu" else 1
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(max(1, sizes.vectors // 4) * many, sizes.d, generator=generator).to(device)
    centroids = torch.randn(16 * sizes.lists, sizes.d, generator=generator).to(device)
    flops = 2.0 * len(vectors) * len(centroids) * sizes.d

    def step() -> float:
        # Copied to the host, so that it is waited for.
        assign(vectors, centroids)[1].cpu()
        return flops

    return _per_second(step, sizes.seconds)


class _MadeUp:
    """Lists of random codes, all of one length, in memory."""

    def __init__(self, trained: Trained, n: int) -> None:
        self.trained = trained
        self._codes = np.random.default_rng(1).integers(0, 256, (n, trained.codec.size), dtype=np.uint8)
        self._ids = np.arange(n, dtype=np.int64).reshape(trained.nlist, -1)

    def __len__(self) -> int:
        return len(self._codes)

    def size(self, number: int) -> int:
        """Vectors in a list."""
        return int(self.ids(number).size)

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """Ids of a list, ascending."""
        ids: npt.NDArray[np.int64] = self._ids[number]
        return ids

    def codes(self, number: int) -> npt.NDArray[np.uint8]:
        """Codes of a list."""
        codes: npt.NDArray[np.uint8] = self._codes[self._ids[number]]
        return codes


def _search(sizes: Sizes) -> float:
    """Floating-point operations a second of a search: lists found and gone through, candidates re-ranked."""
    from retrotool.ann.codes import Product
    from retrotool.ann.excluded import Queries
    from retrotool.ann.ranking import rerank
    from retrotool.ann.search import Search, nothing_banned
    from retrotool.ann.trained import Trained
    from retrotool.plan.run import RERANKED

    rng = np.random.default_rng(0)
    d, pieces, depth = sizes.d, 64, min(RERANKED, sizes.vectors)
    table = rng.standard_normal((pieces, 256, d // pieces), np.float32)
    centroids = rng.standard_normal((sizes.lists, d), np.float32)
    lists = _MadeUp(Trained(d, Product(table), centroids, None, sizes.lists), sizes.vectors)
    vectors = rng.standard_normal((sizes.vectors, d), np.float32).astype(np.float16)
    queries = Queries.plain(rng.standard_normal((sizes.queries, d), np.float32))

    def step() -> float:
        search = Search(lists.trained, queries, sizes.nprobe, depth, nothing_banned)
        search.add(lists)
        rerank(queries.vectors, search.candidates, lambda ids: vectors[ids], 10)
        return 2.0 * d * (search.scanned + sizes.queries * (sizes.lists + depth))

    return _per_second(step, sizes.seconds)


def _search_on_gpu() -> Sequence[float]:
    _gpu()
    raise _CannotError("search does not run on a GPU in this version")


def _disk(directory: Path, sizes: Sizes) -> Sequence[float]:
    """Bytes a second written and fsynced, and read when they are not in the cache."""
    free = shutil.disk_usage(directory).free
    if free < 2 * sizes.file_bytes:
        raise _CannotError(f"{directory} has only {free / 1e9:.1f} GB free")
    if not hasattr(os, "posix_fadvise"):
        raise _CannotError("files can't be put out of the cache here")
    block = np.random.default_rng(0).bytes(min(_BLOCK, sizes.file_bytes))
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(max(1, sizes.file_bytes // len(block))):
            interrupts.check()
            file.write(block)
        os.fsync(file.fileno())
        written, size = time.perf_counter() - started, file.tell()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        while file.read(len(block)):
            interrupts.check()
        return size / written, size / (time.perf_counter() - started)
