"""Measure what the driver of a command does in a store of 28 billion chunks, of which there is only the log.

    python benchmarks/scale.py [--parts 30000] [--shards 3400] [--latency 0.02] [--ray HOST:PORT]

The log names the files of 30,000 parts of about a million chunks, of an index of 3,400 shards, of a table of
neighbours and, for one step, of a search in tiles. Each line is a fresh process: seconds without imports, and the
peak of its memory. On a folder, then in a bucket of a server on this machine (LocalBucket), with ``--latency``
seconds more for each request. ``30,000 tasks``
are done by workers that do nothing: what remains is the driver; with ``--ray`` on that cluster, too. ``fold``
commits 30,000 finished tasks, each with a small file, that are waiting.

A purge of a million chunks of such a store: ``large_purge.py --sizes 28000000000``.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
from machine import describe
from open_store import SEARCHED

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the servers are those of the tests

import buckets

from retrotool.ann.choice import IndexOptions, choose_index
from retrotool.encoder import EncoderIdentity
from retrotool.engine.task import Report, Task, Worker, task_key
from retrotool.index.index_records import IndexRecord, ShardRecord, TrainingRecord, as_about
from retrotool.neighbours.stage import NeighboursStage
from retrotool.store import log, staging
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName, new_token, part_slot
from retrotool.store.state import encode_checkpoint
from retrotool.store.store import Store

ROWS, DIMENSION, LISTS = 1 << 20, 768, 1 << 20
RUN = "0123abcd"
ENCODER = EncoderIdentity("real", "models/real", "0" * 64, "0" * 64, DIMENSION, "mean", False, 512)


class NothingStage:
    """Does 30,000 tasks that take no time."""

    name, unit, worker_cores = "nothing", "task", 1

    def plan(self, store: Store) -> list[Task]:
        """Return the tasks."""
        del store
        return [Task(task_key("nothing", {"n": n}, []), f"task {n}", 1, {"part": n}) for n in range(30_000)]

    def open(self, store: Store) -> Worker:
        """Return a worker."""
        del store

        def work(task: Task, run: str, report: Report) -> int:
            del run
            report(1)
            return int(task.inputs["part"])

        return work


def entry(kind: str, slot: str, ending: str, name: str = "", about: Any = None, rows: int = ROWS) -> FileEntry:
    path = FileName.new(RUN, kind, slot, ending, name).path
    return FileEntry(path, slot, rows, 1000, hashlib.sha256(path.encode()).hexdigest(), about)


def make_store(root: Path, parts: int, shards: int) -> None:
    """Write the first commits and a checkpoint with everything."""
    store = Store.create(root, TokenizerIdentity.of("none", b"{}", 30522, False), b"{}", 64)
    for folder in ("log", "checkpoints"):
        (root / folder).mkdir(exist_ok=True)
    vectors = parts * ROWS
    choice = choose_index(vectors, DIMENSION, IndexOptions(nlist=LISTS))
    asked = IndexOptions(nlist=LISTS)
    training = TrainingRecord(
        encoder="real", factory=choice.factory, why="", dimension=DIMENSION, vectors=vectors, held=vectors,
        trained_parts=[[0, parts - 1]], shard_rows=-(-vectors // shards), asked=asked, seed=0, sample=1, error=1.0,
        code_error=1.0, imbalance=1.0,
    )  # fmt: skip
    record = IndexRecord(
        **asdict(choice.shape()), encoder="real", vectors=vectors, nprobe=46, depth=100, target=0.95, target_met=True,
    )  # fmt: skip
    add = [entry("index", "trained", "faiss", name, as_about(training)) for name in ("main", "new")]
    each = -(-parts // shards)
    for number, first in enumerate(range(0, parts, each)):
        numbers = list(range(first, min(first + each, parts)))
        shard = ShardRecord(parts=numbers, fit=[[ROWS, 1.0, 1.0]] * len(numbers))
        add.append(entry("index", f"shard-{number:04d}", "faiss", "main", as_about(shard), ROWS * len(numbers)))
    for part in range(parts):
        slot = part_slot(part)
        add += [entry("documents", slot, "parquet"), entry("chunks", slot, "parquet")]
        add.append(entry("embeddings", slot, "npy", "real"))
        add.append(
            entry(
                "neighbours",
                slot,
                "parquet",
                "main",
                {**SEARCHED, "commit": 0, "head": "", "searched": [[0, parts - 1]]},
            )
        )
    table = {
        "database": store.identity.uuid, "uri": str(root), "within": True, "index": "main", "encoder": "real",
        "saved": 20, "k": 2,
    }  # fmt: skip
    totals = {"chunks": vectors, "documents": vectors // 10, "tokens": 64 * vectors, "rejected": 0}
    records = {
        "parts": parts, "encoder:real": asdict(ENCODER), "index:main": asdict(record), "neighbours:main": table,
        "totals": totals,
    }  # fmt: skip
    fields = {
        "number": 0, "uuid": "0", "parent": store.genesis, "time": "2026-01-01T00:00:00.000Z", "kind": "chunk",
        "tool": "benchmark", "settings": {}, "reads": [], "add": [], "remove": [], "records": records,
    }  # fmt: skip
    (root / log.commit_path(0)).write_bytes(log.with_checksum(orjson.dumps(fields)))
    commit = log.read(store.storage, 0, store.genesis)
    assert commit is not None
    # Of the commits that added the files there is only the checkpoint, which is all that an open reads.
    state = store.state.fold([replace(commit, add=tuple(add))])
    (root / "checkpoints" / f"{0:08d}-{new_token(RUN)}.json").write_bytes(encode_checkpoint(state))


START = """
import resource, sys, time
sys.path[:0] = [{here!r}]
import scale
from retrotool import api, engine
from retrotool.store import folding
from retrotool.store.leases import Run
from retrotool.store.store import Store
from retrotool.embed.stage import EmbedStage
from retrotool.encoder import EncoderIdentity
from retrotool.index.stage import IndexStage
from retrotool.neighbours.stage import NeighboursStage
begun = time.perf_counter()
{what}
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""
OPEN = "store = Store.open({root!r})\nbegun = time.perf_counter()\n"
STEPS = {
    "open": "store = Store.open({root!r})\nassert len(store.state.all_parts()) == {parts}",
    "plan embed": OPEN + "from dataclasses import replace\n"
    "tasks = engine.plan_tasks(EmbedStage('x', replace(scale.ENCODER, name='other')), store)\n"
    "assert len(tasks) == {parts}",
    "plan index": OPEN + "tasks = engine.plan_tasks(IndexStage('new', 'real', trained=True), store)\n"
    "assert len(tasks) >= {shards} // 2, len(tasks)",
    "plan neighbours": OPEN + "tasks = engine.plan_tasks(scale.search({root!r}), store)\n"
    "assert [task.inputs.get('step') for task in tasks] == ['tiling'], tasks[:2]",
    "plan an up-to-date table": OPEN + ""
    "tasks = engine.plan_tasks(NeighboursStage({root!r}, 'main', 'main', 20, 2), store)",
    "info": "api.info({root!r})",
    "list files": "assert len(api.list_files({root!r}).files) > 4 * {parts}",
}


def stage_all(store: Store, run: Run, parts: int) -> None:
    """Let the embeddings of all parts by another encoder wait for a commit."""
    with ThreadPoolExecutor(16) as threads:

        def finish(part: int) -> None:
            name = FileName.new(run.id, "embeddings", part_slot(part), "npy", "other")
            added = store.write(name, lambda sink: sink.write(b"vectors") and 1)
            key = task_key("embed", {"part": part}, [])
            staging.stage(store.storage, staging.Staged("embed", {}, (), (added,), task=key, run=run.id))

        list(threads.map(finish, range(parts)))


def search(root: str) -> NeighboursStage:
    """Return a search for all neighbours, under a new name."""
    return NeighboursStage(root, "main", "all", 20, 2)


def run(what: str, **known: Any) -> str:
    """Run a step in a fresh process; return seconds and megabytes, as cells of a table."""
    code = START.format(here=str(Path(__file__).parent), what=what.format(**known))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]} |"
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    return f"{seconds:.2f} | {megabytes:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=30_000)
    parser.add_argument("--shards", type=int, default=3_400)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds that each request takes longer")
    parser.add_argument("--ray", help="address of a cluster")
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / buckets.BUCKET / "store"
        make_store(root, arguments.parts, arguments.shards)
        print("| step | seconds | peak of memory, MB |\n|---|---|---|")
        known = {"parts": arguments.parts, "shards": arguments.shards}
        for name, what in STEPS.items():
            print(f"| {name} | {run(what, root=str(root), **known)} |", flush=True)
        tasks = "import retrotool.engine.run as running\nstore = Store.open({root!r})\nstage = scale.NothingStage()\n"
        tasks += "begun = time.perf_counter()\nwith engine.gathering(stage, store) as gather:\n"
        tasks += "    assert len(gather(stage.plan(store))) == 30_000"
        print(f"| 30,000 tasks, in one process | {run(tasks, root=str(root), **known)} |", flush=True)
        fold = OPEN + "with Run(store.storage) as run:\n    scale.stage_all(store, run, {parts})\n"
        fold += "    begun = time.perf_counter()\n    assert len(folding.fold(store, run).committed) == {parts}"
        shutil.copytree(root, Path(folder) / "folded")
        print(f"| fold | {run(fold, root=str(Path(folder) / 'folded'), **known)} |", flush=True)
        shutil.rmtree(Path(folder) / "folded")
        if arguments.ray:
            on_ray = f"engine.use_engine('ray', {arguments.ray!r})\n" + tasks
            print(f"| 30,000 tasks, on Ray | {run(on_ray, root=str(root), **known)} |", flush=True)
        with buckets.local_bucket(Path(folder)) as server, buckets.faulty(server, arguments.latency) as proxy:
            for where, address in (("on loopback", server), (f"{arguments.latency:g} s a request", proxy)):
                with buckets.settings_of(address):
                    for name, what in STEPS.items():
                        cells = run(what, root=f"s3://{buckets.BUCKET}/store", **known)
                        print(f"| {name}, bucket {where} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
