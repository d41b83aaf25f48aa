"""Compare the search for neighbours of all chunks through an inverted file with faiss on the same file.

    python benchmarks/neighbours.py STORE [--encoder minilm] [--vectors N] [--nlist 2048] [--nprobe 16] [--queries N]
        [--device cpu]

STORE has embeddings; it is not changed. If it has fewer than ``--vectors``, noisy copies of real ones are
added. One index of float32 vectors, made here, is searched by

* ``retrotool``: list by list, nothing excluded, with extra candidates that are ranked by distances computed
  from the vectors, as in ``retrotool neighbours``; with ``--device cuda:0``, on that GPU, which has the vectors;
* ``faiss`` ``search``, query by query;
* ``faiss.contrib.big_batch_search``, its fastest method here;

with the same lists, probes, queries and threads, faiss with its fastest OpenBLAS kernel. Recall is the share
of neighbours at least as near as those that faiss ``search`` finds: all search the same lists exactly.

The last line is the whole command ``retrotool neighbours`` on a copy of STORE, with its default index.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from index import best_kernel, export, tool
from machine import describe

K = 10
TIE = 1e-5
BLOCK = 1 << 19
NOISE = 0.6
"""Length of the noise, for vectors of length 1: the distance between the nearest chunks of real text."""
OURS = "retrotool"


def ours(folder: Path, nprobe: int, queries: int, device: str) -> tuple[npt.NDArray[np.int64], float]:
    if device != "cpu":
        return on_device(folder, nprobe, queries, device)
    from retrotool.ann import lists
    from retrotool.ann.excluded import Queries
    from retrotool.ann.ranking import rerank
    from retrotool.ann.search import SPARE, Search, nothing_banned

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    shard = lists.read_lists(folder / "ivf.faiss")
    asked = Queries.plain(np.array(vectors[:queries]))
    found: list[npt.NDArray[np.int64]] = []
    seconds = 0.0
    for rows in (1024, None):  # first the few, to warm up
        start = time.perf_counter()
        found = []
        for some in Queries.plain(asked.vectors[:rows]).blocks(BLOCK):
            search = Search(shard.trained, some, nprobe, K + SPARE, nothing_banned, rough=True)
            search.add(shard)
            candidates = search.candidates
            found.append(rerank(some.vectors, candidates, lambda ids: vectors[ids], K).ids)
        seconds = time.perf_counter() - start
    return np.concatenate(found), queries / seconds


def on_device(folder: Path, nprobe: int, queries: int, device: str) -> tuple[npt.NDArray[np.int64], float]:
    import torch

    from retrotool.ann import lists
    from retrotool.ann.excluded import Queries
    from retrotool.ann.resident import Centroids, ResidentLists

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    shard = lists.read_lists(folder / "ivf.faiss")
    numbers = np.empty(len(vectors), np.int32)
    for number in shard.numbers:
        numbers[shard.ids(number)] = number
    blocks = (vectors[first : first + (1 << 16)].astype(np.float16) for first in range(0, len(vectors), 1 << 16))
    ids, centroids = np.arange(len(vectors)), Centroids(shard.trained, torch.device(device))
    start = time.perf_counter()
    loaded = ResidentLists(centroids, numbers, ids, blocks, device)
    print(f"loaded in {time.perf_counter() - start:.2f} s", file=sys.stderr)
    asked = Queries.plain(vectors[:queries].astype(np.float16))
    loaded.search(asked.take(slice(1 << 14)), K, nprobe)  # to warm up
    start = time.perf_counter()
    found = loaded.search(asked, K, nprobe).ids
    return found, queries / (time.perf_counter() - start)


def theirs(folder: Path, nprobe: int, queries: int, how: str) -> tuple[npt.NDArray[np.int64], float]:
    import faiss
    from faiss.contrib.big_batch_search import big_batch_search

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    index: Any = faiss.read_index(str(folder / "ivf.faiss"))
    index.nprobe = nprobe
    asked = np.ascontiguousarray(vectors[:queries])
    index.search(asked[:1024], K)
    start = time.perf_counter()
    if how == "search":
        found = index.search(asked, K)[1]
    else:
        found = big_batch_search(index, asked, K, method=how, verbose=0, threaded=0)[1]
    return np.asarray(found), queries / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--vectors", type=int, default=0)
    parser.add_argument("--nlist", type=int, default=2048)
    parser.add_argument("--nprobe", type=int, default=16)
    parser.add_argument("--queries", type=int, help="default: all vectors")
    parser.add_argument("--device", default="cpu", help="for retrotool; faiss is on the CPU")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, how = Path(arguments.child[0]), arguments.child[1]
        asked = (folder, arguments.nprobe, arguments.queries)
        found, rate = ours(*asked, arguments.device) if how == OURS else theirs(*asked, how)
        np.save(folder / f"{how}.npy", found)
        print(json.dumps(rate))
        return
    print(describe())
    folder = Path(tempfile.mkdtemp())
    try:
        compare(arguments, folder)
        whole(arguments, folder)
    finally:
        shutil.rmtree(folder)


def filled_up(vectors: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    """Return ``n`` vectors: the given ones, then noisy copies of random ones."""
    rng = np.random.default_rng(0)
    behind = np.sort(rng.choice(len(vectors), n - len(vectors)))
    noise = rng.normal(size=(len(behind), vectors.shape[1]), scale=NOISE / vectors.shape[1] ** 0.5)
    length = np.linalg.norm(vectors[behind], axis=1, keepdims=True)
    near = vectors[behind] + noise * length
    near *= length / np.linalg.norm(near, axis=1, keepdims=True)
    return np.insert(vectors, behind + 1, near.astype(np.float32), axis=0)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    import torch

    from retrotool.ann import lists
    from retrotool.ann.codes import Whole
    from retrotool.ann.kmeans import assign, kmeans
    from retrotool.ann.lists import Trained, to_faiss

    vectors, _, _ = export(arguments.store, arguments.encoder, folder, 0)
    if arguments.vectors > len(vectors):
        vectors = filled_up(vectors, arguments.vectors)
    np.save(folder / "vectors.npy", vectors)
    rows = torch.from_numpy(vectors)
    centroids = kmeans(rows, arguments.nlist, iterations=8)
    trained = Trained(vectors.shape[1], Whole(vectors.shape[1], "float32"), centroids.numpy(), nlist=arguments.nlist)
    index = to_faiss(trained)
    lists.fill(index, assign(rows, centroids)[1].numpy(), np.arange(len(vectors)), vectors.view(np.uint8))
    with (folder / "ivf.faiss").open("xb") as file:
        lists.write_lists(index, file.write)
    queries = min(arguments.queries or len(vectors), len(vectors))
    print(f"{len(vectors):,} vectors of {vectors.shape[1]}, {arguments.nlist:,} lists, {arguments.nprobe} probed, "
          f"{queries:,} queries for {K}")  # fmt: skip
    kernels = [{}, *([best] if (best := best_kernel(folder / "vectors.npy")) else [])]
    rates: dict[str, float] = {}
    found: dict[str, npt.NDArray[np.int64]] = {}
    for how in (OURS, "search", "knn_function", "pairwise_distances", "index"):
        for kernel in kernels[: 1 if how == OURS else None]:
            command = [sys.executable, __file__, str(arguments.store), "--nprobe", str(arguments.nprobe)]
            command += ["--queries", str(queries), "--device", arguments.device, "--child", str(folder), how]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **kernel}, check=False)
            if done.returncode:
                print(f"  {how}: failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            rate = float(done.stdout.splitlines()[-1])
            named = f" with {kernel['OPENBLAS_CORETYPE']}" if kernel else ""
            print(f"  {how}{named}: {rate:,.0f} queries/s")
            rates[how] = max(rate, rates.get(how, 0.0))
            found[how] = np.load(folder / f"{how}.npy")
    # Of neighbours that are as far as one another any is right: whose distance search's farthest has.
    farthest = distances(vectors, found["search"]).max(1, keepdims=True) * (1 + TIE) + TIE
    for how in rates:
        right = distances(vectors, found[how]) <= farthest
        print(f"  {how}: {100 * right.mean():.2f} % as near as what search finds")
    batch = max(rate for how, rate in rates.items() if how not in (OURS, "search"))
    print(f"{OURS}: {rates[OURS] / rates['search']:.1f} x search, {rates[OURS] / batch:.2f} x big_batch_search")


def whole(arguments: argparse.Namespace, folder: Path) -> None:
    """Time the command on a copy of the store, with an index that is made for it."""
    store, options = folder / "store", ["--name", "bench", "--devices", arguments.device, "--json"]
    shutil.copytree(arguments.store, store)
    index = [*tool(), "index", str(store), "--encoder", arguments.encoder, *options]
    subprocess.run(index, capture_output=True, check=True)
    start = time.perf_counter()
    command = [*tool(), "neighbours", str(store), "--index", "bench", *options]
    done = subprocess.run(command, capture_output=True, check=True)
    seconds, n = time.perf_counter() - start, json.loads(done.stdout)["queries"]
    print(
        f"retrotool neighbours, the whole command on {arguments.device}: {seconds:.1f} s, {n / seconds:,.0f} queries/s"
    )


def distances(vectors: npt.NDArray[np.float32], found: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Compute squared distances [q, k] of the first q vectors to ``found`` [q, k] (−1: inf)."""
    measured = np.empty(found.shape, np.float32)
    for column in range(found.shape[1]):
        apart = vectors[: len(found)] - vectors[found[:, column]]
        measured[:, column] = np.where(found[:, column] < 0, np.inf, np.square(apart).sum(1))
    return measured


if __name__ == "__main__":
    main()
