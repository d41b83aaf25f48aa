"""Count what each command asks of an object store, and compare the bytes with those that it needs.

    python benchmarks/bucket.py [--chunks 100000] [--parts 8] [--dimension 384] [--latency 0.02]

A server on this machine, LocalBucket, holds the inputs and the store; a proxy before it adds ``--latency``
seconds to every request. Text is drawn from the project's documentation; vectors are random around a few
centres (``embed --from``), as an encoder would take hours. The storage layer of each process writes its
requests to a file (``RETROTOOL_TRAFFIC``).

For each command: seconds, requests by kind, bytes sent and received, and the floor: each byte of the data
files that the command must read, once, by the sizes in the log. Files of the log, leases, claims and staging
are not in the floor. With an empty cache of mapped files before every command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from machine import describe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))  # the servers are those of the tests

import buckets  # noqa: E402

from retrotool.store.storage import Storage  # noqa: E402
from retrotool.store.store import Store  # noqa: E402

STORE = f"s3://{buckets.BUCKET}/store"
INPUTS = f"s3://{buckets.BUCKET}/inputs"
READS = {  # the kinds of files that each command reads whole
    "chunk": (),
    "embed": ("chunks", "documents"),
    "index": ("embeddings", "index"),
    "neighbours": ("chunks", "embeddings", "index"),
    "neighbours --materialise": ("chunks", "documents", "index", "neighbours"),
    "verify": ("documents", "chunks", "embeddings", "index", "neighbours"),
    "train": ("chunks", "documents", "neighbours"),
}


def make_inputs(folder: Path, chunks: int) -> int:
    """Write documents of shuffled sentences for about ``chunks`` chunks; return their bytes."""
    pages = sorted((HERE.parent / "docs").rglob("*.md"))
    sentences = [line for page in pages for line in page.read_text().split(". ") if len(line) > 40]
    draw, total = random.Random(0), 0
    folder.mkdir(parents=True)
    for number in range(8):
        with (folder / f"{number}.jsonl").open("w") as file:
            for document in range(chunks // 8 // 10):
                text = ". ".join(draw.choices(sentences, k=15))
                file.write(json.dumps({"id": f"{number}-{document}", "text": text}) + "\n")
        total += (folder / f"{number}.jsonl").stat().st_size
    return total


def run(arguments: list[str], traffic: Path, environment: dict[str, str]) -> tuple[float, Counter[str], int, int]:
    """Run a command; return seconds, requests by kind, bytes sent, and bytes received."""
    traffic.unlink(missing_ok=True)
    begun = time.perf_counter()
    subprocess.run(arguments, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    requests: Counter[str] = Counter()
    sent = received = 0
    for line in traffic.read_text().splitlines() if traffic.exists() else ():
        kind, *_, out, back = line.split()
        requests[kind] += 1
        sent, received = sent + int(out), received + int(back)
    return seconds, requests, sent, received


def bytes_of(store: Store, kinds: tuple[str, ...]) -> int:
    """Return the bytes of the store's live files of some kinds."""
    return sum(entry.bytes for entry in store.state.files() if entry.kind in kinds)


def local_storage(root: Path) -> Storage:
    """Return the storage of the server's folder that is the store: looking at it costs no request."""
    from retrotool.store.storage import storage_at

    return storage_at(root / buckets.BUCKET / "store")


def main() -> None:
    """Run the commands in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000, help="about how many")
    parser.add_argument("--parts", type=int, default=8, help="about how many")
    parser.add_argument("--dimension", type=int, default=384, help="of the vectors")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds that each request takes longer")
    options = parser.parse_args()
    print(describe())
    root = Path(tempfile.mkdtemp(prefix="retrotool-bucket-"))
    try:
        with buckets.local_bucket(root) as server, buckets.faulty(server, options.latency) as proxy:
            measure(root, proxy, options)
    finally:
        shutil.rmtree(root)


def measure(root: Path, proxy: str, options: argparse.Namespace) -> None:
    """Run the commands on a store at ``proxy``."""
    traffic, cache = root / "traffic", root / "cache"
    environment = {
        **os.environ, **buckets.KEYS, "AWS_ENDPOINT_URL": proxy, "RETROTOOL_TRAFFIC": str(traffic),
        "RETROTOOL_CACHE": str(cache),
    }  # fmt: skip
    inputs = make_inputs(root / buckets.BUCKET / "inputs", options.chunks)
    tool = [str(Path(sys.executable).with_name("retrotool"))]
    vectors = root / "vectors.npy"
    steps: list[tuple[str, list[str]]] = [
        ("chunk", [*tool, "chunk", STORE, INPUTS, "--part-size", str(max(1, options.chunks // options.parts))]),
        ("embed", [*tool, "embed", STORE, "--encoder", "drawn", "--from", str(vectors)]),
        ("index", [*tool, "index", STORE]),
        ("neighbours", [*tool, "neighbours", STORE]),
        ("neighbours --materialise", [*tool, "neighbours", STORE, "--materialise"]),
        ("verify", [*tool, "verify", STORE]),
        ("train", [sys.executable, "-c", EPOCH.format(store=STORE)]),
    ]
    print(
        "| command | seconds | requests | sent, MB | received, MB | floor, MB | ratio |\n|---|---|---|---|---|---|---|"
    )
    for name, arguments in steps:
        store = Store.open(local_storage(root)) if name != "chunk" else None
        if name == "embed" and store is not None:
            rows = sum(entry.rows for entry in store.state.group("chunks").entries())
            centres = np.random.default_rng(0).normal(size=(256, options.dimension))
            draw = np.random.default_rng(1)
            drawn = centres[draw.integers(0, 256, rows)] + 0.5 * draw.normal(size=(rows, options.dimension))
            np.save(vectors, drawn.astype(np.float16))
        shutil.rmtree(cache / "files", ignore_errors=True)
        floor = inputs if store is None else bytes_of(store, READS[name])
        seconds, requests, sent, received = run(arguments, traffic, environment)
        if name == "index":  # it reads what it has written, to measure recall
            floor = bytes_of(Store.open(local_storage(root)), READS[name])
        asked = f"{sum(requests.values()):,} ({', '.join(f'{n:,} {kind}' for kind, n in requests.most_common())})"
        print(
            f"| `{name}` | {seconds:.1f} | {asked} | {sent / 1e6:.1f} | {received / 1e6:.1f} | {floor / 1e6:.1f} "
            f"| {received / floor:.2f} |",
            flush=True,
        )


EPOCH = """
import retrotool
n = sum(1 for _ in retrotool.RetroDataset("{store}", sequence_length=1024))
assert n > 0
"""


if __name__ == "__main__":
    main()
