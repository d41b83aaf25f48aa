"""Find the neighbours of all chunks with a tenth of the memory that the vectors need, and compare with all of it.

    python benchmarks/tiles.py STORE [--encoder minilm] [--vectors 1000000] [--share 10] [--part-size 125000] [--bucket]

STORE has embeddings; noisy copies of them are added up to ``--vectors``, as in ``neighbours.py``. They are the
vectors of a new store whose text is made up, which has the index that ``retrotool index`` chooses. Its neighbours
are found twice, each time by a new process: in memory, and with ``--memory`` 1/``--share`` of the vectors. Printed
are seconds, chunks per second, the peak of memory, and how many neighbours differ.

With ``--bucket`` the store is on a server of this machine, and the bytes that the search in tiles sends and
receives are counted, beside what ``retrotool plan`` says of the same search.

With ``--copies`` nothing is searched: for several numbers of lists and tiles, the number of tiles that a row goes to
is counted, beside what ``retrotool.neighbours.tiles.copies`` expects.
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

import numpy as np
import torch
from index import export, tool
from machine import describe
from neighbours import filled_up

from retrotool import api
from retrotool.ann.kmeans import assign, kmeans
from retrotool.neighbours.tiles import copies, split_lists
from retrotool.plan.run import Plan
from retrotool.store import neighbour_tables
from retrotool.store.store import Store

SENTENCES = 4  # of a document: about one chunk


def make_store(root: Path, place: str, vectors: np.ndarray, part_size: int, environment: dict[str, str]) -> None:
    """Make a store with these vectors, one a document."""
    inputs = root / "inputs.jsonl"
    with inputs.open("w") as file:
        for number in range(len(vectors)):
            file.write(json.dumps({"id": str(number), "text": f"document {number}"}) + "\n")
    np.save(root / "vectors.npy", vectors.astype(np.float16))
    for arguments in (
        ["chunk", place, str(inputs), "--tokenizer", "bytes-32k", "--part-size", str(part_size)],
        ["embed", place, "--encoder", "real", "--from", str(root / "vectors.npy")],
        ["index", place],
    ):
        subprocess.run([*tool(), *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


LAUNCH = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
raise SystemExit(done.returncode)
"""
"""A small process between this one and a command, which would begin with the memory of this one."""


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
    """Run a command; return seconds, the peak of its memory in bytes, and what it said."""
    begun = time.perf_counter()
    launch = [sys.executable, "-c", LAUNCH, *tool(), *arguments]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begun, int(done.stdout), done.stderr


def difference(store: Store) -> tuple[int, int, int, int]:
    """Return how many neighbours differ between the two tables, are nearer and farther in tiles, and of how many."""
    differ = nearer = farther = total = 0
    for slot in store.state.group("neighbours", "whole"):
        one, other = (
            neighbour_tables.read_table(store, entry)
            for name in ("whole", "tiled")
            if (entry := store.state.file("neighbours", slot, name)) is not None
        )
        differ += int((one.ids != other.ids).sum())
        nearer += int((other.distances < one.distances).sum())
        farther += int((other.distances > one.distances).sum())
        total += one.ids.size
    return differ, nearer, farther, total


def measure(root: Path, arguments: argparse.Namespace) -> None:
    environment, place, traffic = dict(os.environ), str(root / "store"), root / "traffic"
    vectors = export(arguments.store, arguments.encoder, root, 0)[0]
    if arguments.vectors > len(vectors):
        vectors = filled_up(vectors, arguments.vectors)
    make_store(root, place, vectors, arguments.part_size, environment)
    size = 2 * vectors.size
    memory = size // arguments.share
    print(f"{len(vectors):,} vectors of {vectors.shape[1]}, {size / 1e6:,.0f} MB; memory {memory / 1e6:,.0f} MB")
    print("| how | seconds | chunks/s | peak of memory, MB |\n|---|---|---|---|")
    for name, options in (("whole", []), ("tiled", ["--memory", str(memory)])):
        seconds, peak, said = timed(["neighbours", place, "--name", name, *options], environment)
        note = next((line for line in said.splitlines() if line.endswith(" tiles")), "in memory")
        print(f"| {note} | {seconds:.1f} | {len(vectors) / seconds:,.0f} | {peak / 1e6:,.0f} |", flush=True)
    differ, nearer, farther, total = difference(Store.open(place))
    print(f"{differ:,} of {total:,} neighbours differ; in tiles {nearer:,} are nearer, {farther:,} farther")
    if arguments.bucket:
        count_bytes(root, place, memory, traffic, vectors.shape)


def planned(place: str, shape: tuple[int, ...], memory: int) -> Plan:
    """Return the plan of the search with ``memory`` bytes in a store of vectors of this shape, one a document."""
    nprobe = Store.open(place).state.records["index:main"]["nprobe"] * 7 // 4
    plan = api.plan(
        shape[0], encoder=f"1x{shape[1]}", tokens_per_document=1, memory_per_host=2 * memory, nprobe=nprobe, bucket=True
    )
    assert plan.chunks == shape[0]
    return plan


def count_bytes(root: Path, place: str, memory: int, traffic: Path, shape: tuple[int, ...]) -> None:
    """Search again in a copy of the store in a bucket; print the bytes, beside those of the plan."""
    plan = planned(place, shape, memory)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import buckets

    shutil.copytree(place, root / buckets.BUCKET / "store")
    with buckets.local_bucket(root) as server:
        environment = {
            **os.environ, **buckets.KEYS, "AWS_ENDPOINT_URL": server, "RETROTOOL_TRAFFIC": str(traffic),
            "RETROTOOL_CACHE": str(root / "cache"),
        }  # fmt: skip
        store = f"s3://{buckets.BUCKET}/store"
        _, _, said = timed(["neighbours", store, "--name", "again", "--memory", str(memory)], environment)
    sent = received = 0
    by_kind: dict[str, list[int]] = {}
    for line in traffic.read_text().splitlines():
        _, *path, out, back = line.split()
        sent, received = sent + int(out), received + int(back)
        counts = by_kind.setdefault(path[0].split("/")[0] if path else "listings", [0, 0])
        counts[0], counts[1] = counts[0] + int(out), counts[1] + int(back)
    print(said.splitlines()[0])
    mine = [stage for stage in plan.stages if stage.name.startswith("neighbours")]
    for what, found, expected in (
        ("sent", sent, sum(stage.written_bytes for stage in mine)),
        ("received", received, sum(stage.read_bytes for stage in mine)),
    ):
        print(f"{what} {found / 1e6:,.0f} MB, planned {expected / 1e6:,.0f} MB: {found / expected:.2f} x")
    for kind, (up, down) in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(f"  {kind}: sent {up / 1e6:,.1f} MB, received {down / 1e6:,.1f} MB")


def count_copies(vectors: np.ndarray) -> None:
    """Print the tiles that a row goes to, for numbers of lists, tiles and lists probed."""
    rows, draw = torch.from_numpy(vectors), np.random.default_rng(0)
    asked = rows[torch.from_numpy(np.sort(draw.choice(len(rows), 3000, replace=False)))]
    probes = (3, 8, 24, 48, 81, 128)
    print("| lists | tiles |" + "".join(f" {n} probed, counted | expected |" for n in probes))
    print("|---|---|" + "---|---|" * len(probes))
    for nlist in (512, 1024, 2048):
        sample = np.sort(draw.choice(len(rows), min(len(rows), 64 * nlist), replace=False))
        centroids = kmeans(rows[torch.from_numpy(sample)], nlist, iterations=6)
        sizes = np.bincount(assign(rows, centroids)[1].numpy(), minlength=nlist)
        near = torch.cdist(asked, centroids).topk(max(probes), largest=False)[1].numpy()
        for tiles in (5, 10, 20, 50, 100, 200, 400):
            if tiles > nlist // 5:
                break
            tile = split_lists(centroids.numpy(), sizes, tiles)[near]
            cells = ""
            for n in probes:
                found = 1 + (np.diff(np.sort(tile[:, :n], axis=1), axis=1) != 0).sum(1).mean()
                cells += f" {found:.1f} | {copies(tiles, nlist, n):.1f} |"
            print(f"| {nlist} | {tiles} |{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--share", type=int, default=10)
    parser.add_argument("--part-size", type=int, default=125_000)
    parser.add_argument("--bucket", action="store_true")
    parser.add_argument("--copies", action="store_true")
    arguments = parser.parse_args()
    print(describe())
    root = Path(tempfile.mkdtemp(prefix="retrotool-tiles-"))
    try:
        if arguments.copies:
            count_copies(export(arguments.store, arguments.encoder, root, 0)[0])
        else:
            measure(root, arguments)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
