"""Compare rates of embedding with common alternatives.

    python benchmarks/embed.py INPUT.jsonl[.zst] [...] [--model minilm] [--chunks 2000] [--device auto]

``--model base`` is a BERT of base size with random weights and the bundled tokenizer; a directory is any
model. All ways embed the same texts, in turns, ``--rounds`` times, and the best round counts.

On a CPU: ``sentence-transformers``, ``transformers`` in batches of 64, and retrotool with every dtype, and with
the tanh form of GELU, which a GPU computes in half precision. On a GPU: the packed forward pass alone,
``transformers`` sorted by length in batches of 1,024 (forward pass only), the whole way from Parquet to a
committed .npy, and its share of the device's matrix product rate. On both: the pipeline with a simulated device
that waits instead of computing (``--pace``), which shows what does not overlap with it.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import describe

from retrotool import api
from retrotool.embed.run import EmbedResult
from retrotool.embed.store_encoder import EncoderRows, compare
from retrotool.encoder import Encoder, Rows, packed
from retrotool.encoder.devices import BATCH_TOKENS, DTYPES, pick_device
from retrotool.encoder.forwards import Computed, Handle, Ready
from retrotool.machine import cores
from retrotool.store.parts import read_chunks
from retrotool.store.store import Store
from retrotool.tokenizers import FastTokenizer, bundled_model

Vectors = np.ndarray[Any, np.dtype[Any]]


def report(what: str, rate: float, unit: str = "chunks/s", more: str = "") -> None:
    print(f"{what:<44} {rate:12,.1f} {unit}   {more}".rstrip(), flush=True)


def best_of(
    rounds: int, ways: Mapping[str, Callable[[], Vectors]], chunks: int
) -> tuple[dict[str, float], dict[str, Vectors]]:
    """Measure chunks per second of each way, in turns; also return their vectors."""
    best = dict.fromkeys(ways, 0.0)
    vectors = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            vectors[name] = way()
            best[name] = max(best[name], chunks / (time.perf_counter() - start))
    return best, vectors


def make_model(name: str, folder: Path) -> str:
    """Return the path or name of a model; ``base`` is made here."""
    if name != "base":
        return name
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig()).half().float().save_pretrained(folder / "bert-base-random")
    shutil.copy(bundled_model() / "tokenizer.json", folder / "bert-base-random")
    return str(folder / "bert-base-random")


def flops(encoder: Encoder, rows: Rows) -> float:
    """Count the multiplications and additions of the forward pass: products with weights, and attention."""
    from retrotool.encoder.encoder_identity import json_object

    config = json_object(encoder._path / "config.json")
    d, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    lengths = rows.lengths.astype(np.float64) + len(encoder._before) + len(encoder._after)
    return float(layers * (lengths.sum() * (8 * d * d + 4 * d * inner) + 4 * d * (lengths**2).sum()))


def peak(device: str, dtype: str) -> float:
    """Measure the best rate of matrix products, in FLOP/s; on a CPU one per core."""
    from retrotool.encoder.packed import Dense, OneDnnDense
    from retrotool.machine import has_onednn

    kind = getattr(torch, dtype)
    cpu = device == "cpu"
    layer = OneDnnDense if cpu and has_onednn(kind) else Dense
    lanes = cores() if cpu else 1
    best = 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for rows, d, inner in (
            [(2048, 384, 1536), (2048, 768, 3072)] if cpu else [(8192, 8192, 8192), (65536, 768, 3072)]
        ):
            x = torch.randn(rows, d, device=device, dtype=kind)
            product = layer(torch.randn(inner, d, device=device), torch.randn(inner, device=device), kind)

            def work(_: int, x: torch.Tensor = x, product: torch.nn.Module = product) -> None:
                for _ in range(20):
                    product(x)
                _wait(device)

            for _ in range(4):
                start = time.perf_counter()
                list(pool.map(work, range(lanes)))
                best = max(best, lanes * 20 * 2 * rows * d * inner / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Paced:
    """A device that takes ``rate`` tokens per second and returns zeros, to show what does not overlap."""

    depth = 3

    def __init__(self, encoder: Encoder, rate: float) -> None:
        self._inner, self._dimension, self._rate = encoder._runner, encoder.identity.dimension, rate
        self._pool = ThreadPoolExecutor(1)

    def ready(self, rows: Rows, batch_tokens: int) -> Ready:
        return self._inner.ready(rows, batch_tokens)

    def submit(self, ready: Ready) -> Handle:
        return self._pool.submit(self._compute, ready).result

    def _compute(self, ready: Ready) -> Computed:
        seconds = ready.tensors["ids"].numel() / self._rate
        time.sleep(seconds)
        return np.zeros((ready.rows, self._dimension), np.float16), True, seconds

    def close(self) -> None:
        self._pool.shutdown()
        self._inner.close()


def bench_pipeline(store: Path, model: str, device: str, rate: float | None = None) -> EmbedResult:
    """Run ``embed`` to a committed file on a copy; with ``rate``, on a paced device with a GPU's batches."""
    copy = Path(shutil.copytree(store, store.parent / "copy"))
    verify = Encoder.verify

    def paced(self: Encoder, *_: Any) -> None:
        self._runner = Paced(self, rate or 0.0)  # type: ignore[assignment]
        self.cosine = 1.0
        self.fast = FastTokenizer(self.tokenizer)

    usual = BATCH_TOKENS["cpu"]
    if rate is not None:
        Encoder.verify = paced  # type: ignore[method-assign, assignment]
        BATCH_TOKENS["cpu"] = BATCH_TOKENS["cuda"]
    try:
        return api.embed(copy, encoder=model, devices=device, check=rate is None)
    finally:
        Encoder.verify = verify  # type: ignore[method-assign]
        BATCH_TOKENS["cpu"] = usual
        shutil.rmtree(copy)


def without_a_forward(store: Path, model: str, chunk_rates: list[float]) -> None:
    """Report how fast the pipeline is by itself, and how much of a device's time it uses."""
    for rate in (float("inf"), *chunk_rates):
        result = bench_pipeline(store, model, "cpu", 1e12 if rate == float("inf") else rate * 66)
        what = "any rate" if rate == float("inf") else f"{rate:,.0f} chunks/s"
        more = f"{result.chunks:,} chunks in {result.parts} parts, at work {100 * result.busy:.1f} % of the time"
        report(f"pipeline, a device of {what}", result.chunks / result.seconds, more=more)


def sentence_transformers(model: str, texts: list[str], device: str) -> Callable[[], Vectors]:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(bundled_model()) if model == "minilm" else model, device=device)
    loaded.encode(texts[:64])
    return lambda: np.asarray(loaded.encode(texts))


def plain_transformers(
    model: str, texts: list[str], device: str, batch: int, dtype: str, *, ahead: bool
) -> Callable[[], Vectors]:
    """Return a loop over ``AutoModel`` with mean pooling; ``ahead``: sorted and tokenized before timing."""
    import transformers

    path = str(bundled_model()) if model == "minilm" else model
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json", pad_token="[PAD]")
    loaded = transformers.AutoModel.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if ahead else list(range(len(texts)))

    def prepare(start: int) -> dict[str, torch.Tensor]:
        some = [texts[i] for i in order[start : start + batch]]
        tokens = tokenizer(some, padding=True, truncation=True, max_length=512, return_tensors="pt")
        return {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}

    starts = range(0, len(texts), batch)
    prepared = {start: prepare(start) for start in starts} if ahead else {}

    def embed() -> Vectors:
        found = []
        with torch.inference_mode():
            for start in starts:
                tokens = prepared.get(start) or prepare(start)
                hidden = loaded(**tokens).last_hidden_state.float()
                weight = tokens["attention_mask"].unsqueeze(-1).float()
                found.append(torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1)))
            vectors = torch.cat(found).cpu().numpy()
        back = np.empty_like(vectors)
        back[order] = vectors
        return back

    embed()
    return embed


def on_a_cpu(model: str, texts: list[str], rounds: int, dtypes: tuple[str, ...]) -> None:
    encoders = {dtype: Encoder(model, "cpu", dtype) for dtype in dtypes}
    with mock.patch.dict(packed.ACTIVATIONS, gelu="gelu_tanh"):  # as a GPU computes it in half precision
        encoders["float32, tanh GELU"] = Encoder(model, "cpu", "float32")
    for encoder in encoders.values():
        encoder.embed(encoder.tokenize(texts[:64]))
    ways = {"sentence-transformers": sentence_transformers(model, texts, "cpu")}
    ways["transformers, batches of 64"] = plain_transformers(model, texts, "cpu", 64, "float32", ahead=False)
    for dtype, encoder in encoders.items():
        ways[f"ours, {dtype}"] = lambda encoder=encoder: encoder.embed(encoder.tokenize(texts))  # type: ignore[misc]
    rates, vectors = best_of(rounds, ways, len(texts))
    true = vectors["sentence-transformers"]
    for name, rate in rates.items():
        more = ""
        if name.startswith("ours"):
            cosine, recall = compare(vectors[name], true)
            more = ", ".join(f"{rate / rates[other]:.2f} x {other}" for other in list(rates)[:2])
            more += f", cosine {cosine.min():.5f} or more, recall@10 {recall:.4f}"
        report(name, rate, more=more)
    one = next(iter(encoders.values()))
    work = flops(one, one.tokenize(texts)) / len(texts)
    for dtype in dtypes:
        most = peak("cpu", dtype)
        share = work * rates[f"ours, {dtype}"] / most
        report(f"matrix products, {dtype}", most / 1e9, "GFLOP/s", f"ours reach {100 * share:.0f} % of it")


def forward_alone(encoder: Encoder, rows: Rows) -> Callable[[], Vectors]:
    """Return what computes the vectors of rows, longest first, from batches that are prepared here."""
    prepared = [batch.ready for batch in encoder._batches([rows]) if batch.ready is not None]

    def packed() -> Vectors:
        handles = [encoder._runner.submit(ready) for ready in prepared]
        return np.concatenate([handle()[0] for handle in handles])

    packed()
    return packed


def on_a_gpu(model: str, store: Path, texts: list[str], rounds: int, device: str) -> None:
    encoder = Encoder(model, device)
    rows = encoder.tokenize(texts)
    tokens = int(rows.lengths.sum()) + len(texts) * (len(encoder._before) + len(encoder._after))
    ways = {"packed forward alone": forward_alone(encoder, rows)}
    ways["transformers, sorted, batches of 1,024"] = plain_transformers(
        model, texts, device, 1024, encoder.dtype, ahead=True
    )
    rates, _ = best_of(rounds, ways, len(texts))
    forward, sorted_loop = rates.values()
    most = peak(device, encoder.dtype)
    work = flops(encoder, rows) / len(texts)
    report("packed forward alone", forward, more=f"{forward * tokens / len(texts):,.0f} tokens/s")
    report("transformers, sorted, batches of 1,024", sorted_loop, more="forward only")
    encoder.close()
    result = bench_pipeline(store, model, device)
    whole = result.chunks / result.seconds
    report(
        "Parquet to committed .npy",
        whole,
        more=f"{100 * whole / forward:.1f} % of the forward alone, {whole / sorted_loop:.2f} x transformers, "
        f"{result.tokens / result.seconds:,.0f} tokens/s, device idle {100 * (1 - result.busy):.1f} %",
    )
    report("matrix products", most / 1e12, "TFLOP/s", f"the forward reaches {100 * work * forward / most:.0f} % of it")
    print(f"check: {result.check}")
    print(f"device memory, at most: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pace", type=float, nargs="*", default=[31_600, 110_000], help="chunks/s of a made-up device")
    parser.add_argument("--tokenizer", help="of the store; default: the encoder's, so that tokens go straight in")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments.model, Path(folder))
        store = Path(folder) / "store"
        api.chunk(store, arguments.inputs, tokenizer=arguments.tokenizer)
        opened = Store.open(store)
        encoder = Encoder(model, "cpu")
        chunks = read_chunks(opened, 0)
        which = np.sort(np.random.default_rng(0).permutation(len(chunks))[: arguments.chunks])
        texts = EncoderRows(opened, encoder)._tokenizer.decode_text(chunks.tokens[which], chunks.n_tokens[which])
        print(f"{len(texts):,} of {len(chunks):,} chunks, {model}, {encoder.forward} forward, on {device}")
        if device == "cpu":
            dtypes = tuple(dtype for dtype in DTYPES if dtype != "float16")
            on_a_cpu(model, texts, arguments.rounds, dtypes)
        else:
            on_a_gpu(model, store, texts, arguments.rounds, device)
        without_a_forward(store, model, arguments.pace)
    print(f"host memory, at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
