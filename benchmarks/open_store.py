"""Measure opening a store of 30,000 parts in a fresh process.

    python benchmarks/open_store.py [--parts 30000] [--runs 5] [--latency 0.02]

Makes a log of one commit per part, each naming four files (documents, chunks, embeddings, neighbours) that
need not exist: opening reads only the log. The head is half a checkpoint interval after the last checkpoint.
Times, in fresh processes, ``Store.open`` alone and the whole process. The floor reads and parses the
checkpoint and the commits after it without building a state. Then the same store is opened in a bucket of a
server on this machine (LocalBucket), with and without ``--latency`` seconds more for each request.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import orjson
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the servers are those of the tests

import buckets

from retrotool.store import log
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName, new_token, part_slot
from retrotool.store.state import encode_checkpoint
from retrotool.store.storage import storage_at
from retrotool.store.store import CHECKPOINT_EVERY, Store

KINDS = (
    ("documents", "", "parquet"),
    ("chunks", "", "parquet"),
    ("embeddings", "minilm", "npy"),
    ("neighbours", "main", "parquet"),
)
SEARCHED = {
    "version": "0" * 16, "index": "main", "encoder": "minilm", "commit": 1, "head": "0" * 16, "purges": "",
    "searched": [[0, 29_999]],
}  # fmt: skip
"""The log entry of a neighbour table."""
RUN = "0123abcd"
OPEN = """
import time
start = time.perf_counter()
from retrotool.store.store import Store
state = Store.open({root!r}).state
assert len(state.parts()) == {parts}, len(state.parts())
assert state.part_file("neighbours", {last}, "main") is not None
print(time.perf_counter() - start)
"""
FLOOR = """
import time
start = time.perf_counter()
import orjson, hashlib, pathlib
root = pathlib.Path({root!r})
data = max((root / "checkpoints").iterdir()).read_bytes()
hashlib.sha256(data).hexdigest()
orjson.loads(data.partition(b"\\n")[2])
for number in range({first}, {end}):
    data = (root / "log" / f"{{number:08d}}.json").read_bytes()
    hashlib.sha256(data).hexdigest()
    orjson.loads(data)
print(time.perf_counter() - start)
"""


def make_store(root: Path, parts: int) -> None:
    """Make a store whose log has ``parts`` commits of four files each, without fsync."""
    tokenizer = TokenizerIdentity.of("none", b"{}", 30522, False)
    store = Store.create(root, tokenizer, b"{}", 64)
    (root / "log").mkdir()
    (root / "checkpoints").mkdir()
    last_checkpoint = parts - 1 - CHECKPOINT_EVERY // 2
    state = store.state.fold(islice(commits(root, store.genesis, parts), last_checkpoint + 1))
    (root / "checkpoints" / f"{state.number:08d}-{new_token(RUN)}.json").write_bytes(encode_checkpoint(state))
    for _ in commits(root, state.head, parts, first=state.number + 1):
        pass


def commits(root: Path, head: str, parts: int, first: int = 0) -> Iterator[log.Commit]:
    """Write one commit per part, like ``log.append`` without its checks, and yield it as it is read."""
    for part in range(first, parts):
        entries = [entry(part, kind, name, ending).as_json() for kind, name, ending in KINDS]
        fields = {
            "number": part, "uuid": "0", "parent": head, "time": "2026-01-01T00:00:00.000Z", "kind": "chunk",
            "tool": "benchmark",
            "settings": {}, "reads": [], "add": entries, "remove": [], "records": {"parts": part + 1},
        }  # fmt: skip
        (root / log.commit_path(part)).write_bytes(log.with_checksum(orjson.dumps(fields)))
        commit = log.read(storage_at(root), part, head)
        assert commit is not None
        head = commit.sha256
        yield commit


def entry(part: int, kind: str, name: str, ending: str) -> FileEntry:
    slot = part_slot(part)
    path = FileName.new(RUN, kind, slot, ending, name).path
    sha256 = hashlib.sha256(f"{kind}{part}".encode()).hexdigest()
    return FileEntry(path, slot, 1_048_576, 80_000_000 + part, sha256, SEARCHED if kind == "neighbours" else None)


def seconds(code: str) -> tuple[float, float]:
    """Run a fresh process; return the seconds that it prints and its total seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=30_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds that each request takes longer")
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / buckets.BUCKET / "store"
        start = time.perf_counter()
        make_store(root, arguments.parts)
        made = time.perf_counter() - start
        print(f"{arguments.parts:,} commits naming {len(KINDS) * arguments.parts:,} files, made in {made:.1f} s")
        code = OPEN.format(root=str(root), parts=arguments.parts, last=arguments.parts - 1)
        floor = FLOOR.format(root=str(root), first=arguments.parts - CHECKPOINT_EVERY // 2, end=arguments.parts)
        ours = [seconds(code) for _ in range(arguments.runs)]
        floors = [seconds(floor) for _ in range(arguments.runs)]
        in_bucket = {}
        code = OPEN.format(root=f"s3://{buckets.BUCKET}/store", parts=arguments.parts, last=arguments.parts - 1)
        with buckets.local_bucket(Path(folder)) as server, buckets.faulty(server, arguments.latency) as proxy:
            for what, address in (("on loopback", server), (f"{arguments.latency:g} s a request", proxy)):
                with buckets.settings_of(address):
                    in_bucket[what] = [seconds(code)[0] for _ in range(arguments.runs)]
    report("open, imports included", [inside for inside, _ in ours])
    report("the whole process", [whole for _, whole in ours])
    report("floor: read and parse", [inside for inside, _ in floors])
    for what, times in in_bucket.items():
        report(f"bucket, {what}", times)


def report(what: str, times: list[float]) -> None:
    print(f"{what:<24} median {statistics.median(times):.3f} s, from {min(times):.3f} to {max(times):.3f}")


if __name__ == "__main__":
    main()
