"""Find the neighbours of all chunks with a tenth of the memory that the vectors need, and compare with all of it.

    python benchmarks/tiles.py STORE [--encoder minilm] [--vectors 1000000] [--share 10] [--part-size 125000] [--bucket]

STORE has embeddings; noisy copies of them are added up to ``--vectors``, as in ``neighbours.py``. They are the
vectors of a new store whose text is made up, which has the index that ``retrotool index`` chooses. Its neighbours
are found twice, each time by a new process: in memory, and with ``--memory`` 1/``--share`` of the vectors. Printed
are seconds, chunks per second, the peak of memory, and how many neighbours differ.

With ``--bucket`` the store is on a server of this machine, and the bytes that the search in tiles sends and
receives are counted, beside what was predicted from the number of tiles that a row goes to.
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
from index import export, tool
from machine import describe
from neighbours import filled_up

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
        count_bytes(root, place, memory, traffic, size)


def count_bytes(root: Path, place: str, memory: int, traffic: Path, size: int) -> None:
    """Search again in a copy of the store in a bucket; print the bytes."""
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
    print(f"sent {sent / 1e6:,.0f} MB, received {received / 1e6:,.0f} MB; vectors {size / 1e6:,.0f} MB")
    for kind, (up, down) in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(f"  {kind}: sent {up / 1e6:,.1f} MB, received {down / 1e6:,.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--share", type=int, default=10)
    parser.add_argument("--part-size", type=int, default=125_000)
    parser.add_argument("--bucket", action="store_true")
    arguments = parser.parse_args()
    print(describe())
    root = Path(tempfile.mkdtemp(prefix="retrotool-tiles-"))
    try:
        measure(root, arguments)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
