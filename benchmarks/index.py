"""Build and search an index of a store's real vectors: recall, memory, time, and those of faiss.

    python benchmarks/index.py STORE [--encoder minilm] [--autofaiss /path/to/venv/bin/python] [--vectors 48000]
        [--device cpu]

STORE has embeddings; it is not changed. Prints:

1. ``retrotool index`` with its defaults, as a process: time, memory, and the recall that it prints;
2. the recall by an independent brute force, on other queries;
3. k-means against ``faiss.Kmeans``: the same vectors, lists, iterations and threads, faiss with its fastest
   kernel;
4. with ``--autofaiss``, the interpreter of an environment that has it: its default index, and one with the
   memory of ours, on the same vectors. There both exclude only the query itself from results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import describe

QUERIES, K = 1000, 10
KERNELS = ("", "HASWELL", "ZEN", "SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")

Floats = npt.NDArray[np.float32]


def export(store: Path, encoder: str, folder: Path, limit: int) -> tuple[Floats, npt.NDArray[np.int64], list[Any]]:
    import pyarrow.parquet as pq

    shown = subprocess.run([*tool(), "info", str(store), "--json"], capture_output=True, check=True)
    vectors, ids, documents = [], [], []
    info = json.loads(shown.stdout)
    gone = [pq.read_table(store / t["path"])["chunk"].to_numpy() for t in info["tombstones"]]
    purged = np.concatenate([np.zeros(0, np.int64), *gone])
    for part in info["parts"]:
        if encoder not in part["embeddings"]:
            continue
        rows = np.load(store / part["embeddings"][encoder]["path"])
        numbers = (part["part"] << 32) + np.arange(len(rows))
        doc = pq.read_table(store / part["chunks"]["path"], columns=["doc"])["doc"].to_numpy()
        alive = ~np.isin(numbers, purged)
        vectors.append(rows[alive].astype(np.float32))
        ids.append(numbers[alive])
        documents += [(part["part"], d) for d in doc[alive].tolist()]
    everything = np.concatenate(vectors)
    if limit and limit < len(everything):
        drawn = np.sort(np.random.default_rng(0).choice(len(everything), limit, replace=False))
        np.save(folder / "vectors.npy", everything[drawn])
    else:
        np.save(folder / "vectors.npy", everything)
    return everything, np.concatenate(ids), documents


def tool() -> list[str]:
    return [sys.executable, "-m", "retrotool"]


def brute_force(
    vectors: Floats, queries: npt.NDArray[np.int64], documents: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64]:
    """Return the K nearest rows of each query in float64, without its document (None: without itself)."""
    found = []
    norms = (vectors.astype(np.float64) ** 2).sum(1)
    for row in queries:
        distances = norms - 2 * (vectors @ vectors[row].astype(np.float64))
        distances[documents == documents[row] if documents is not None else row] = np.inf
        near = np.argpartition(distances, K)[:K]
        found.append(near[np.argsort(distances[near])])
    return np.array(found)


def recall_of(
    vectors: Floats, queries: npt.NDArray[np.int64], found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]
) -> float:
    """Return the share of ``found`` rows as near as the last true one: equal distances count."""
    shares = []
    for row, some, true in zip(queries, found, truth, strict=True):
        query = vectors[row].astype(np.float64)
        farthest = ((vectors[true[-1]] - query) ** 2).sum()
        near = ((vectors[some[some >= 0]] - query) ** 2).sum(1) <= farthest * (1 + 1e-6)
        shares.append(min(int(near.sum()), K) / K)
    return float(np.mean(shares))


def bench_build(store: Path, encoder: str, folder: Path, device: str) -> Path:
    """Time the command on a copy of the store; return the copy."""
    copy = folder / "store"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "index", ignore_errors=True)
    start = time.perf_counter()
    options = [str(copy), "--encoder", encoder, "--name", "bench", "--devices", device, "--json"]
    done = subprocess.run([*tool(), "index", *options], capture_output=True, check=True)
    seconds = time.perf_counter() - start
    result = json.loads(done.stdout)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"retrotool index: {seconds:.1f} s for everything, {memory:.2f} GiB at the peak of the process")
    print(
        f"  {result['factory']}, {result['bytes_per_vector']} bytes a vector, {result['trained_bytes']:,} of training"
    )
    print(f"  printed recall@10 {result['recall_at_10']:.4f} ± {result['recall_error']:.4f}, "
          f"nprobe {result['nprobe']}, {result['depth']} ranked, {result['rate']:,.0f} queries/s")  # fmt: skip
    return copy


def bench_recall(copy: Path, vectors: Floats, ids: npt.NDArray[np.int64], documents: list[Any], device: str) -> None:
    """Measure recall by independent brute force, without the own document and without the query only."""
    from retrotool.ann.excluded import Excluded, Queries
    from retrotool.index.searching import Database
    from retrotool.store.store import Store

    database = Database(Store.open(copy), "bench", device=device)
    rows = np.sort(np.random.default_rng(123).choice(len(vectors), QUERIES, replace=False))
    own = np.unique(np.array(documents), axis=0, return_inverse=True)[1].ravel()
    first = np.array([np.flatnonzero(own == own[row])[[0, -1]] for row in rows])
    for what, excluded, truth in (
        ("own document left out", Excluded(ids[first[:, 0]], ids[first[:, 1]]), brute_force(vectors, rows, own)),
        ("only itself left out", Excluded(ids[rows], ids[rows]), brute_force(vectors, rows, None)),
    ):
        queries = Queries(vectors[rows], excluded)
        database.search(queries, K)
        start = time.perf_counter()
        found = database.search(queries, K)
        rate = QUERIES / (time.perf_counter() - start)
        place = np.where(found.ids >= 0, np.searchsorted(ids, found.ids), -1)
        recall = recall_of(vectors, rows, place, truth)
        print(f"  brute force of its own, {what}: recall@10 {recall:.4f}, {rate:,.0f} queries/s")


def child(arguments: list[str], python: str = sys.executable, **environment: str) -> dict[str, Any]:
    command = [python, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child_main(kind: str, path: str, *more: str) -> dict[str, Any]:
    vectors = np.load(path)
    if kind == "kernel":
        import faiss

        faiss.omp_set_num_threads(os.cpu_count() or 1)
        clusters = faiss.Kmeans(vectors.shape[1], 512, niter=2, max_points_per_centroid=32)
        start = time.perf_counter()
        clusters.train(vectors[:16384])
        return {"seconds": time.perf_counter() - start}
    if kind == "faiss-kmeans":
        import faiss

        faiss.omp_set_num_threads(os.cpu_count() or 1)
        k = int(more[0])
        clusters = faiss.Kmeans(vectors.shape[1], k, niter=int(more[1]), seed=1, max_points_per_centroid=1 << 20)
        start = time.perf_counter()
        clusters.train(vectors)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "error": float(clusters.index.search(vectors, 1)[0].mean())}
    if kind == "kmeans":
        import torch

        from retrotool.ann.kmeans import assign, kmeans

        rows = torch.from_numpy(vectors)
        start = time.perf_counter()
        centroids = kmeans(rows, int(more[0]), iterations=int(more[1]))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "error": float(assign(rows, centroids)[0].mean())}
    return autofaiss(vectors, *more)


def autofaiss(vectors: Floats, memory: str) -> dict[str, Any]:
    import faiss
    from autofaiss import build_index  # type: ignore[import-not-found]

    start = time.perf_counter()
    limit = {} if memory == "default" else {"max_index_memory_usage": memory}
    index, _ = build_index(vectors, save_on_disk=False, metric_type="l2", verbose=40, **limit)
    seconds = time.perf_counter() - start
    rows = np.sort(np.random.default_rng(123).choice(len(vectors), QUERIES, replace=False))
    truth = brute_force(vectors, rows, None)
    start = time.perf_counter()
    _, found = index.search(vectors[rows], K + 1)
    rate = QUERIES / (time.perf_counter() - start)
    without = np.array([[i for i in f if i != row][:K] for f, row in zip(found.tolist(), rows.tolist(), strict=True)])
    size = len(faiss.serialize_index(index)) / len(vectors)
    return {
        "seconds": seconds,
        "rate": rate,
        "recall": recall_of(vectors, rows, without, truth),
        "bytes": size,
        "kind": type(index).__name__,
    }


def best_kernel(path: Path) -> dict[str, str]:
    """Return the OpenBLAS kernel with which faiss is fastest here."""
    times = {}
    for kernel in KERNELS:
        try:
            chosen = {"OPENBLAS_CORETYPE": kernel} if kernel else {}
            times[kernel] = child(["kernel", str(path)], **chosen)["seconds"]
        except SystemExit:
            continue  # this processor has not what it takes
    best = min(times, key=times.__getitem__)
    print(f"faiss's kernel: {best or 'its own choice'} ({times[best]:.2f} s, its own choice {times['']:.2f} s)")
    return {"OPENBLAS_CORETYPE": best} if best else {}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child_main(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--autofaiss", metavar="PYTHON")
    parser.add_argument("--vectors", type=int, default=0, help="take so many for the comparisons, 0: all")
    parser.add_argument("--device", default="cpu", help="of the index and its search, such as cuda:0")
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors, ids, documents = export(arguments.store, arguments.encoder, folder, arguments.vectors)
        print(f"{len(vectors):,} vectors of {vectors.shape[1]} dimensions")
        copy = bench_build(arguments.store, arguments.encoder, folder, arguments.device)
        bench_recall(copy, vectors, ids, documents, arguments.device)
        path = folder / "vectors.npy"
        n = len(np.load(path, mmap_mode="r"))
        kernel = best_kernel(path)
        lists = str(max(256, 1 << int(np.log2(4 * n**0.5))))
        theirs, ours = (
            child(["faiss-kmeans", str(path), lists, "8"], **kernel),
            child(["kmeans", str(path), lists, "8"]),
        )
        times = f"{ours['seconds']:.1f} s, error {ours['error']:.4f}"
        against = f"faiss {theirs['seconds']:.1f} s, error {theirs['error']:.4f}"
        ratio = theirs["seconds"] / ours["seconds"]
        print(f"k-means, {n:,} vectors, {lists} lists, 8 iterations: {times}; {against}: {ratio:.2f} x as fast")
        if arguments.autofaiss:
            for memory in ("default", f"{72 * n / 1e6 + 4.2:.1f}MB"):
                found = child(["autofaiss", str(path), memory], arguments.autofaiss, **kernel)
                size = f"{found['seconds']:.1f} s, {found['bytes']:.0f} bytes a vector"
                recall = f"recall@10 {found['recall']:.4f}, {found['rate']:,.0f} queries/s"
                print(f"autofaiss, memory {memory}: {found['kind']}, {size}, {recall}")


if __name__ == "__main__":
    main()
