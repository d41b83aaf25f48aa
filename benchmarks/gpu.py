"""Measure one GPU with this project in ten minutes, on a machine that has torch and needs no network.

    python benchmarks/gpu.py [--out gpu-bench] [--only ceilings,tests,layer,search,embed,commands] [--small]

Sections, each a process of its own with a time limit, so that one that fails leaves the others:

* ``ceilings``: matrix products, copies and top-k, which bound all the rest;
* ``tests``: those that need a GPU;
* ``layer``: a BERT-base layer of 65,472 tokens, in the ways in which it can be computed;
* ``search``: ``--vectors`` made vectors × 768 in lists, searched for their own neighbours at several numbers of
  lists, in Triton and in torch, next to faiss on the same GPU where it is installed;
* ``embed``: a BERT of base size with random weights: its forward alone, with GELU in the products' epilogue and
  apart, by transformers, and ``embed`` end to end in percent of it; what tanh GELU costs MiniLM in recall; the rate
  of a classifier that screens in half precision, and in float32;
* ``commands``: text of the installed Python packages through ``chunk``, ``embed``, ``index`` and ``neighbours``, on
  the GPU and on the CPU.

Writes ``results.json`` and ``table.md``, the rows for docs/performance.md. ``--small`` runs everything with tiny
shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe

LIMITS = {"ceilings": 60, "tests": 120, "layer": 90, "search": 180, "embed": 210, "commands": 150}
K, DOCUMENT = 20, 32  # neighbours; chunks of a document
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def say(what: str, value: float, unit: str) -> None:
    """Print a figure as a line of JSON, which the main process collects."""
    print(json.dumps({"what": what, "value": round(float(value), 4), "unit": unit}), flush=True)


def now() -> float:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(do: Callable[[], object], n: int = 5) -> float:
    """Return the median time of ``do`` on the device, after two rounds to warm up."""
    taken = []
    for _ in range(n + 2):
        start = now()
        do()
        taken.append(now() - start)
    return sorted(taken[2:])[n // 2]


def ceilings(small: bool) -> None:
    from retrotool.ann.resident import k_largest

    m = 256 if small else 8192
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(m, m, device=DEVICE).to(kind) for _ in range(2))
        say(f"product {m}³ {kind}", 2 * m**3 / seconds_of(lambda a=a, b=b: a @ b) / 1e12, "TFLOP/s")  # type: ignore[misc]
    here = torch.empty((1 << 20) if small else (1 << 29), dtype=torch.int16)
    there, other = (torch.empty_like(here, device=DEVICE) for _ in range(2))
    say("copy on the device, read and written", 4 * len(here) / seconds_of(lambda: there.copy_(other)) / 1e9, "GB/s")
    say("host to device, pageable", 2 * len(here) / seconds_of(lambda: there.copy_(here)) / 1e9, "GB/s")
    if DEVICE != "cpu":
        here = here.pin_memory()
        taken = seconds_of(lambda: there.copy_(here, non_blocking=True))
        say("host to device, pinned", 2 * len(here) / taken / 1e9, "GB/s")
    scores = torch.randn(256 if small else 16384, 16384, device=DEVICE)
    for name, find in (("topk", lambda: scores.topk(128)), ("k_largest", lambda: k_largest(scores, 128))):
        say(f"{name}(128) of 16,384", len(scores) / seconds_of(find) / 1e6, "M rows/s")


def tests(_: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_a_gpu"]
    done = subprocess.run([*command, "tests/encoder", "tests/ann", "tests/stages/test_embed.py"], capture_output=True)
    print(done.stdout.decode()[-3000:], file=sys.stderr)
    say("tests that need a GPU: exit code (5: none ran)", done.returncode, "")


def layer(small: bool) -> None:
    rows, length, d, heads = (8, 66, 64, 4) if small else (992, 66, 768, 12)
    tokens, inner = rows * length, 4 * d
    kind = torch.float16 if DEVICE != "cpu" else torch.float32
    shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (inner, d), "down": (d, inner)}
    weight = {name: torch.randn(*shape, device=DEVICE, dtype=kind) / 28 for name, shape in shapes.items()}
    bias = {name: torch.randn(shape[0], device=DEVICE, dtype=kind) for name, shape in shapes.items()}
    x = torch.randn(tokens, d, device=DEVICE, dtype=kind)
    spans = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32) * length
    loose = torch.cat([spans, spans[-1:].expand(3617)])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weight[name], bias[name])

    def forward(x: torch.Tensor, spans: torch.Tensor, fused: bool) -> torch.Tensor:
        qkv = linear(x, "qkv").view(tokens, 3, heads, -1)
        if DEVICE != "cpu":
            from torch.nn.attention.varlen import varlen_attn

            query, key, value = qkv.unbind(1)
            found: Any = varlen_attn(query, key, value, spans, spans, 128, 128)
            attended = found.flatten(1)
        else:
            attended = qkv[:, 2].flatten(1)
        x = F.layer_norm(x + linear(attended, "out"), (d,))
        up = bias["up"], x, weight["up"].T
        y = torch._addmm_activation(*up, use_gelu=True) if fused else F.gelu(torch.addmm(*up))  # tanh on a GPU
        return F.layer_norm(x + linear(y, "down"), (d,))

    ways: list[tuple[str, torch.Tensor, bool, dict[str, Any]]] = [
        ("4,610 spans, most of them empty", loose, False, {}), ("spans of rows alone", spans, False, {}),
        ("and GELU in the product's epilogue", spans, True, {}),
        ("and max-autotune", spans, False, {"mode": "max-autotune-no-cudagraphs"}),
    ]  # fmt: skip
    with torch.inference_mode():
        for name, some, fused, options in ways[: 3 if small else 4]:
            torch._dynamo.reset()
            compiled = torch.compile(forward, dynamic=False, backend="eager" if small else "inductor", **options)
            taken = seconds_of(lambda run=compiled, some=some, fused=fused: run(x, some, fused), 9)  # type: ignore[misc]
            say(f"BERT-base of such layers: {name}", rows / taken / 12, "chunks/s")


def made_vectors(n: int, d: int) -> torch.Tensor:
    """Return vectors of length 1 on the device, float16 [n, d]: topics, variation of few dimensions, and noise."""
    topics, few = torch.randn(min(50_000, n // 4), d, device=DEVICE), torch.randn(64, d, device=DEVICE) / 8
    found = torch.empty(n, d, dtype=torch.float16, device=DEVICE)
    for start in range(0, n, 500_000):
        size = min(500_000, n - start)
        some = topics[torch.randint(len(topics), (size,), device=DEVICE)] * 0.6
        some += torch.randn(size, 64, device=DEVICE) @ few + torch.randn(size, d, device=DEVICE) * 0.35
        found[start : start + size] = F.normalize(some, dim=1).half()
    return found


def search(small: bool, n: int) -> None:
    from retrotool.ann.codes import Whole
    from retrotool.ann.excluded import Excluded, Queries
    from retrotool.ann.kmeans import assign, kmeans
    from retrotool.ann.lists import Trained
    from retrotool.ann.resident import Centroids, ResidentLists, TorchKernels

    n, d = (10_000, 64) if small else (n, 768)
    nlist = 64 if small else 1 << round(math.log2(4 * math.sqrt(n)))
    device = torch.device(DEVICE)
    vectors = made_vectors(n, d)
    start = now()
    drawn = vectors[torch.randperm(n, device=device)[: 64 * nlist]]
    centroids = kmeans(drawn, nlist, iterations=8)
    say(f"k-means, {nlist} lists, {len(drawn):,} vectors", now() - start, "s")
    start = now()
    numbers = torch.cat([assign(some.float(), centroids, rough=True)[1] for some in torch.split(vectors, 1 << 18)])
    say("vectors put into lists", n / (now() - start) / 1e6, "M/s")
    here, ids = vectors.cpu().numpy(), np.arange(n)
    del vectors, drawn
    trained = Trained(d, Whole(d), centroids.cpu().numpy(), nlist=nlist)
    start = now()
    blocks = (here[first : first + (1 << 16)] for first in range(0, n, 1 << 16))
    lists = ResidentLists(Centroids(trained, device), numbers.int().cpu().numpy(), ids, blocks, DEVICE)
    say("loaded", now() - start, "s")
    q = min(n, 1000 if small else 1 << 20)
    own = ids[:q] // DOCUMENT * DOCUMENT
    queries = Queries(here[:q].astype(np.float32), Excluded(own, own + DOCUMENT - 1))
    few = queries.take(np.arange(0, q, max(1, q // 1000)))
    truth = ResidentLists(None, None, ids, [here], DEVICE) if small else lists
    exact = truth.search(few, 10, nlist).distances
    if small:
        del truth
    for nprobe in (16, 32, 64, 128, 224):
        if nprobe > nlist:
            continue
        recall = (lists.search(few, 10, nprobe).distances <= exact[:, -1:] * (1 + 1e-4) + 1e-6).mean()
        start = now()
        lists.search(queries, K, nprobe)
        say(
            f"{type(lists._kernels).__name__}, {nprobe} lists, recall@10 {recall:.4f}", q / (now() - start), "queries/s"
        )
    if not isinstance(lists._kernels, TorchKernels):
        there = lists.search(few, K, 32)
        lists._kernels = TorchKernels()
        start = now()
        lists.search(queries, K, 64)
        say("TorchKernels, 64 lists", q / (now() - start), "queries/s")
        here_too = lists.search(few, K, 32)
        say("ids that Triton and torch both find", 100 * (there.ids == here_too.ids).mean(), "%")
        say("device memory, at most", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    del lists
    torch.cuda.empty_cache() if DEVICE != "cpu" else None
    faiss_on_gpu(here, queries.vectors[: 1 << 16], nlist)


def faiss_on_gpu(vectors: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], nlist: int) -> None:
    """Search by faiss on the same GPU, for ten more neighbours to make up for the own document."""
    from retrotool.lazy import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        print("faiss has no GPU here", file=sys.stderr)
        return
    options = faiss.GpuIndexIVFFlatConfig()
    index = faiss.GpuIndexIVFFlat(faiss.StandardGpuResources(), vectors.shape[1], nlist, faiss.METRIC_L2, options)
    index.train(vectors[: 64 * nlist].astype(np.float32))
    for first in range(0, len(vectors), 1 << 18):
        index.add(vectors[first : first + (1 << 18)].astype(np.float32))
    for nprobe in (32, 64, 128):
        index.nprobe = nprobe
        index.search(queries[:1024], K + DOCUMENT)
        start = time.perf_counter()
        index.search(queries, K + DOCUMENT)
        say(f"faiss on the GPU, {nprobe} lists", len(queries) / (time.perf_counter() - start), "queries/s")


def embed(small: bool) -> None:
    from embed import bench_pipeline, forward_alone, make_model, plain_transformers

    from retrotool import api
    from retrotool.embed.store_encoder import EncoderRows, compare
    from retrotool.encoder import Encoder
    from retrotool.encoder.classifier import Classifier, find_classifier
    from retrotool.machine import cores
    from retrotool.store.parts import read_chunks
    from retrotool.store.store import Store

    with tempfile.TemporaryDirectory() as name:
        store, model = Path(name) / "store", "minilm" if small else make_model("base", Path(name))
        api.chunk(store, [str(write_text(Path(name), 300_000 if small else 60_000_000))], tokenizer="minilm")
        chunks, dtype = read_chunks(Store.open(store), 0), "bfloat16" if small else "float16"
        some = np.random.default_rng(0).permutation(len(chunks))[: 64 if small else 65_536]
        encoder = Encoder(model, DEVICE, dtype)
        rows = EncoderRows(Store.open(store), encoder).rows(chunks.tokens[some], chunks.n_tokens[some])
        rates = list[float]()
        for way in ("in the epilogue", "apart"):
            rates.append(len(rows) / seconds_of(forward_alone(encoder, rows), 3))
            say(f"forward alone, {dtype}, GELU {way}", rates[-1], "chunks/s")
            encoder._loaded.use_exact_gelu()
        encoder.close()
        texts = encoder.tokenizer.decode_text(chunks.tokens[some], chunks.n_tokens[some])
        sorted_loop = plain_transformers(model, texts, DEVICE, 1024, dtype, ahead=True)
        say("forward alone, transformers, sorted by length", len(texts) / seconds_of(sorted_loop, 3), "chunks/s")
        result = bench_pipeline(store, model, DEVICE)
        say("embed, Parquet to committed .npy", result.chunks / result.seconds, "chunks/s")
        say("of its forward alone", 100 * result.chunks / result.seconds / rates[0], "%")
        say("share of the time in the forward", 100 * result.busy, "%")
        few = rows.take(np.arange(min(len(rows), 4096)))
        true = Encoder("minilm", DEVICE, "float32", forward="transformers").embed(few)
        encoder = Encoder("minilm", DEVICE, dtype, batch_tokens=1 << 20)  # not worth compiling
        for way in ("tanh where the device has it", "exact"):
            found = compare(encoder.embed(few), true, chunks.doc[some[: len(few)]])
            say(f"recall@10 of MiniLM, {dtype}, GELU {way}", 100 * found.recall_at_10, "%")
            encoder._loaded.use_exact_gelu()
        classifier = Classifier(find_classifier(make_classifier(Path(name) / "classifier", small)), DEVICE)
        for way, above, n in (("screened", 0.9, len(texts)), ("float32", 0.0, len(texts) // 8)):
            blocks = [texts[start : min(start + 4096, n)] for start in range(0, n, 4096)]
            classifier.scores(blocks[0][:64], 1, above)
            start = now()
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(lambda block, above=above: classifier.scores(block, 1, above), blocks))
            say(f"classifier of base size, {way}", n / (now() - start), "chunks/s")


def make_classifier(folder: Path, small: bool) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    from retrotool.tokenizers import bundled_model

    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2} if small else {}
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder)
    shutil.copy(bundled_model() / "tokenizer.json", folder)
    return folder


def commands(small: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _commands(folder, write_text(folder, 300_000 if small else 200_000_000))


def write_text(folder: Path, most: int) -> Path:
    """Write the code of the installed Python packages as JSON lines, at most so many bytes."""
    text, written = folder / "text.jsonl", 0
    with text.open("w") as file:
        for root in (*site.getsitepackages(), str(Path(np.__file__).parents[1]), *sys.path):
            for path in sorted(Path(root).rglob("*.py")) if root and written < most else ():
                body = path.read_text(errors="ignore")
                written += file.write(json.dumps({"id": str(path), "text": body}) + "\n") if len(body) > 2000 else 0
                if written >= most:
                    break
    return text


def _commands(folder: Path, text: Path) -> None:
    store = folder / "store"

    def run(what: str, *arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "retrotool", *map(str, arguments), "--json"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        taken = time.perf_counter() - start
        print(done.stderr[-2000:], file=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{what} failed: {done.returncode}")
        say(f"{what}, the whole command", taken, "s")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    run(f"chunk, {text.stat().st_size / 1e6:.0f} MB", "chunk", store, text, "--tokenizer", "minilm")
    embedded = run("embed, MiniLM", "embed", store, "--encoder", "minilm")
    say("chunks embedded", embedded["embedded"], "chunks")
    for device in dict.fromkeys((DEVICE, "cpu")):
        kind = device.split(":")[0]
        run(f"index, {kind}", "index", store, "--name", f"on-{kind}", "--devices", device)
        run(f"neighbours, {kind}", "neighbours", store, "--index", f"on-{kind}", "--name", kind, "--devices", device)
    if shutil.which("nvidia-smi"):
        run("neighbours --exact, cuda", "neighbours", store, "--exact", "--name", "exact", "--devices", DEVICE)


def collect(section: str, arguments: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Run a section in a process and return its figures; what else it prints is in ``<section>.log``."""
    command = [sys.executable, __file__, "--section", section, "--vectors", str(arguments.vectors)]
    with (out / f"{section}.log").open("w") as log, (out / f"{section}.jsonl").open("w") as figures:
        process = subprocess.Popen([*command, *["--small"] * arguments.small], stdout=figures, stderr=log)
        try:
            code = process.wait(LIMITS[section])
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    found = [{**json.loads(line), "section": section} for line in (out / f"{section}.jsonl").read_text().splitlines()]
    for one in found:
        print(f"{section:<10} {one['what']:<70} {one['value']:16,.2f} {one['unit']}")
    if code:
        print(f"{section:<10} ended with {code}: see {out / (section + '.log')}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"))
    parser.add_argument("--only", default=",".join(LIMITS))
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section == "search":
        return search(arguments.small, arguments.vectors)
    if arguments.section:
        return globals()[arguments.section](arguments.small)  # type: ignore[no-any-return]
    arguments.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if DEVICE != "cpu" else "no GPU"
    print(f"{card}, torch {torch.__version__}; {describe()}")
    found = [one for section in arguments.only.split(",") for one in collect(section, arguments, arguments.out)]
    record = {"device": card, "torch": torch.__version__, "machine": describe(), "figures": found}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1))
    rows = [f"| {one['what']} | {one['value']:,.2f} {one['unit']} |" for one in found]
    (arguments.out / "table.md").write_text("\n".join([f"| {card} | |", "| --- | ---: |", *rows, ""]))
    return None


if __name__ == "__main__":
    main()
