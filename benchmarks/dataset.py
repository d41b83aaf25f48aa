"""Measure how fast a training loop reads neighbours: materialised ones, from the tables, and the floors.

    python benchmarks/dataset.py INPUT... [--tokenizer minilm] [--k 2] [--sequence-length 2048] [--workers 2]

INPUT is an input of ``retrotool chunk``. A store is made of it in a temporary folder. Each chunk gets 20
neighbours drawn at random from the whole store, the most expensive ones to read. Then, each in a separate
process with a cold page cache, imports included:

* ``bytes``: read the bytes of the chunks and of the tables with tokens, nothing else;
* ``decode``: read the columns that are needed with pyarrow alone, row group by row group;
* ``loader``: pass as many empty batches of that size through a DataLoader with one worker;
* ``RetroDataset`` over a whole epoch, in batches of 16 sequences: by itself, and through a DataLoader.

Prints the seconds to the first batch, chunks per second in total and from the first batch on, core-seconds of
all processes (which other load changes little), and the largest resident memory of the process and a worker.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

BATCH, SAVED = 16, 20


def files_of(store: Path, *kinds: str) -> list[Path]:
    from retrotool.store.store import Store

    return [store / entry.path for entry in Store.open(store).state.files() if entry.path.startswith(kinds)]


def evict(store: Path) -> None:
    for path in store.rglob("*.parquet"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(arguments: argparse.Namespace) -> int:
    for path in files_of(arguments.store, "chunks/", "neighbours/"):
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    return chunks_in(arguments.store)


def decode(arguments: argparse.Namespace) -> int:
    import pyarrow.parquet as pq

    for path in files_of(arguments.store, "chunks/", "neighbours/"):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.metadata.num_row_groups):
                text = [name for name in file.schema_arrow.names if name.startswith("text_")]
                file.read_row_groups([group], columns=text or None)
    return chunks_in(arguments.store)


def dataset(arguments: argparse.Namespace) -> int:
    from torch.utils.data import DataLoader

    from retrotool import RetroDataset

    found = RetroDataset(arguments.store, "main", arguments.sequence_length, arguments.k, batch_size=BATCH)
    batches = DataLoader(found, batch_size=None, num_workers=arguments.workers) if arguments.workers else found
    chunks = 0
    for batch in batches:
        if not chunks:
            arguments.first = time.time() - arguments.started
        chunks += int((batch["chunk_ids"] >= 0).sum())
    return chunks


def loader(arguments: argparse.Namespace) -> int:
    from torch.utils.data import DataLoader, IterableDataset

    from retrotool import RetroDataset

    found = RetroDataset(arguments.store, "main", arguments.sequence_length, arguments.k, batch_size=BATCH)
    first = next(iter(found))

    class Nothing(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for _ in range(len(found)):
                yield {key: value.clone() for key, value in first.items()}

    return sum(int((batch["chunk_ids"] >= 0).sum()) for batch in DataLoader(Nothing(), batch_size=None, num_workers=1))


CHILDREN = {"bytes": read_bytes, "decode": decode, "loader": loader, "dataset": dataset}


def chunks_in(store: Path) -> int:
    from retrotool.store.store import Store

    return int(Store.open(store).state.records["totals"]["chunks"])


def child(arguments: argparse.Namespace) -> None:
    arguments.first = 0.0
    chunks = CHILDREN[arguments.child](arguments)
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"chunks": chunks, "gib": peak / 2**20, "worker": worker / 2**20, "first": arguments.first}))


def measure(arguments: argparse.Namespace, what: str, workers: int = 0) -> dict[str, Any]:
    evict(arguments.store)
    command = [sys.executable, __file__, "--child", what, "--store", str(arguments.store), "--workers", str(workers)]
    command += [
        "--started",
        str(time.time()),
        "--k",
        str(arguments.k),
        "--sequence-length",
        str(arguments.sequence_length),
    ]
    before = cpu_seconds()
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    steady = found["chunks"] / (seconds - found["first"])
    return {
        **found,
        "seconds": seconds,
        "rate": found["chunks"] / seconds,
        "steady": steady,
        "cores": cpu_seconds() - before,
    }


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(label: str, found: dict[str, Any]) -> None:
    print(
        f"  {label:<52} {found['first']:5.1f} s  {found['rate']:>9,.0f} chunks/s, then {found['steady']:>9,.0f}"
        f"  {found['cores']:5.1f} core-s  {found['gib']:.2f} GiB"
        + (f" + {found['worker']:.2f}" if found["worker"] else "")
    )


def write_tables(store: Path, k: int, text: bool = False) -> None:
    from retrotool.neighbours.retrieved import read_text_of
    from retrotool.store import neighbour_tables, parts
    from retrotool.store.leases import Run
    from retrotool.store.log import Draft
    from retrotool.store.neighbour_tables import NeighbourTable
    from retrotool.store.paths import FileName, part_slot
    from retrotool.store.store import Store
    from retrotool.store.tombstones import read_tombstones

    opened = Store.open(store)
    sizes = np.array([parts.part_entry(opened, "chunks", part).rows for part in opened.state.parts()])
    rng = np.random.default_rng(0)
    uuid = opened.identity.uuid
    record = {
        "database": uuid, "uri": str(store), "within": True, "index": "", "encoder": "", "saved": SAVED, "k": k,
    }  # fmt: skip
    add = []
    with Run(opened.storage) as run:
        for part, rows in zip(opened.state.parts(), sizes.tolist(), strict=True):
            place = np.searchsorted(np.cumsum(sizes), rng.integers(0, sizes.sum(), (rows, SAVED)), side="right")
            ids = (np.array(opened.state.parts())[place] << 32) + rng.integers(0, sizes[place])
            table = NeighbourTable(ids, np.sort(rng.random((rows, SAVED), np.float32), axis=1))
            name = FileName.new(run.id, "neighbours", part_slot(part), "parquet", "main")
            number = opened.state.number
            about = {
                "version": "", "index": "", "encoder": "", "commit": number, "head": opened.state.head[:16],
                "purges": "", "searched": [],
            }  # fmt: skip
            add.append(
                neighbour_tables.write_table(
                    opened, name, table, database=uuid, commit=number, uri="",
                    about={**about, "text": k} if text else about,
                    text=read_text_of(opened, read_tombstones(opened), table, k) if text else None,
                )
            )  # fmt: skip
        old = tuple(entry.path for entry in opened.state.group("neighbours", "main").entries())
        draft = Draft("neighbours", add=tuple(add), remove=old, records={"neighbours:main": record})
        opened.commit(run, lambda _: draft)


def compare(arguments: argparse.Namespace) -> None:
    from retrotool import api

    store = arguments.store
    api.chunk(store, arguments.inputs, tokenizer=arguments.tokenizer, part_size=arguments.part_size)
    write_tables(store, arguments.k)
    chunks = chunks_in(store)
    print(f"{chunks:,} chunks in {len(files_of(store, 'chunks/'))} parts, {arguments.k} of {SAVED} random neighbours")
    most = arguments.workers
    for workers in (0, 1, most):
        label = f"through a DataLoader, {workers} workers" if workers else "by itself"
        show(f"from the tables, {label}", measure(arguments, "dataset", workers))
    start = time.perf_counter()
    write_tables(store, arguments.k, text=True)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in files_of(store, "neighbours/"))
    print(f"with the tokens: {seconds:.1f} s, {chunks / seconds:,.0f} chunks/s, {size / chunks:.0f} bytes a chunk")
    show("floor: bytes", measure(arguments, "bytes"))
    show("floor: decode", measure(arguments, "decode"))
    show("floor: loader", measure(arguments, "loader"))
    for workers in (0, 1, most):
        label = f"through a DataLoader, {workers} workers" if workers else "by itself"
        show(f"materialised, {label}", measure(arguments, "dataset", workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*")
    parser.add_argument("--tokenizer", default="minilm")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--part-size", type=int, default=250_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--store", type=Path, help="where to make the store (default: a temporary folder)")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        arguments.store = arguments.store or Path(folder) / "store"
        compare(arguments)


if __name__ == "__main__":
    main()
