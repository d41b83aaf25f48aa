"""Purge one chunk, 100 documents and a tenth of a store: measure the cost and what is still found.

    python benchmarks/purging.py STORE [--encoder minilm] [--name main] [--where EXPRESSION] [--queries 2000]

STORE has embeddings, an index and neighbours in itself. It is not changed: each purge works on a copy of hard
links. The selectors are ``--chunk``, ``--document``, and ``--where``, which should select about a tenth of
the store. Then

* the vector of every purged chunk is searched, and purged chunks among the 10 nearest are counted;
* every read path is exercised, and purged chunks that it returns are counted
  (``retrotool.receipt.read_paths``);
* neighbours of random live chunks are compared with brute force over live vectors: before the purge, after
  it, after ``neighbours``, and computed from scratch in the purged store;
* the purge is erased and verified, and the rewritten files are counted.

Finally each of the 100 documents is purged separately, and all these purges are erased together.

Times are those of commands as whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from index import tool
from machine import describe

import retrotool
from retrotool.ann.excluded import Queries
from retrotool.purge.erase import part_files
from retrotool.receipt.read_paths import read_paths
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

DOCUMENTS = 100
AT_ONCE = 1 << 14
Ids = npt.NDArray[np.int64]


def run(*arguments: object) -> tuple[dict[str, Any], float]:
    start = time.perf_counter()
    done = subprocess.run([*tool(), *map(str, arguments), "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), time.perf_counter() - start


def embedded(root: Path, encoder: str) -> tuple[Ids, npt.NDArray[np.float16], Ids]:
    """Return ids, vectors and documents (first chunk) of all live chunks with a vector."""
    reader, store = retrotool.open(root), Store.open(root)
    found = []
    for part in (int(slot) for slot in store.state.group("embeddings", encoder)):
        ids = reader.chunk_ids(part)
        rows = ids - (part << 32)
        first = parts.read_documents(store, part, ["first_row"])["first_row"].to_numpy().astype(np.int64)
        document = first[np.searchsorted(first, rows, side="right") - 1] + (part << 32)
        found.append((ids, np.asarray(reader.embeddings(part, encoder))[rows], document))
    ids, vectors, documents = (np.concatenate(some) for some in zip(*found, strict=True))
    return ids, vectors, documents


def truth(ids: Ids, vectors: npt.NDArray[Any], documents: Ids, rows: Ids, k: int) -> Ids:
    """Return the k true nearest chunks in other documents of some rows, by brute force in float32."""
    every = vectors.astype(np.float32)
    squares = (every * every).sum(1)
    found = []
    for some in np.array_split(rows, max(1, len(rows) // 200)):
        apart = squares[None] - 2 * every[some] @ every.T
        apart[documents[some][:, None] == documents[None]] = np.inf
        best = np.argpartition(apart, k, axis=1)[:, :k]
        found.append(ids[best])
    return np.concatenate(found)


def recall(root: Path, encoder: str, chunks: Ids, name: str) -> str:
    """Return recall@2 and @10 of ``chunks`` in table ``name`` against brute force over live chunks."""
    ids, vectors, documents = embedded(root, encoder)
    rows = np.searchsorted(ids, chunks)
    reader = retrotool.open(root)
    near = [[i for i, _ in reader.neighbour_ids(chunk, name, 20)] for chunk in ids[rows].tolist()]
    figures = []
    for k in (2, 10):
        true = truth(ids, vectors, documents, rows, k)
        hits = sum(len(set(a.tolist()) & set(b[:k])) for a, b in zip(true, near, strict=True))
        figures.append(f"recall@{k} {hits / k / len(rows):.4f}")
    return ", ".join(figures)


def searched(root: Path, vectors: npt.NDArray[Any], purged_chunks: Tombstones) -> int:
    database = retrotool.open(root).database()
    found = 0
    for start in range(0, len(vectors), AT_ONCE):
        best = database.search(Queries.plain(vectors[start : start + AT_ONCE].astype(np.float32)), 10)
        found += int(purged_chunks.contains(best.ids).sum())
    return found


def measure(source: Path, folder: Path, selector: list[str], encoder: str, name: str, drawn: Ids) -> None:
    root = Path(shutil.copytree(source, folder / "store", copy_function=os.link))
    ids, vectors, _ = embedded(root, encoder)
    total = json.loads(subprocess.run([*tool(), "info", str(root), "--json"], capture_output=True, check=True).stdout)
    before = read_tombstones(Store.open(root))
    purged, seconds = run("purge", root, *selector, "--reason", "benchmark", "--yes")
    store = Store.open(root)
    after = read_tombstones(store)
    purged_chunks = Tombstones(np.setdiff1d(after.ids, before.ids))
    mine = purged_chunks.contains(ids)
    print(
        f"\n{' '.join(selector)[:60]}: {purged['chunks']:,} of {total['chunks']:,} chunks, {purged['documents']:,} "
        f"whole documents; {mine.sum():,} of {len(ids):,} with vectors"
    )
    print(f"  purge               {seconds:7.1f} s")
    print(f"  in searches by each {searched(root, vectors[mine], purged_chunks)} of {10 * int(mine.sum()):,} results")
    for check in read_paths(store, purged_chunks):
        path = check()
        print(f"  {path.name:<20}{path.found} in {path.rows:,} rows{'; ' + path.note if path.note else ''}")
    drawn = drawn[~purged_chunks.contains(drawn)]
    print(f"  before the purge    {recall(source, encoder, drawn, name)}, of {len(drawn):,} live chunks")
    print(f"  as they are read    {recall(root, encoder, drawn, name)}")
    filled, seconds = run("neighbours", root, "--name", name)
    print(f"  neighbours again    {seconds:7.1f} s: {filled['queries']:,} rows searched again")
    print(f"  after it            {recall(root, encoder, drawn, name)}")
    _, seconds = run("neighbours", root, "--name", "from-scratch", "--saved", 20)
    print(f"  from scratch        {seconds:7.1f} s: {recall(root, encoder, drawn, 'from-scratch')}")
    store = Store.open(root)
    touched = sum(len(part_files(store, part)) for part in purged_chunks.parts())
    erased, seconds = run("erase", root, purged["purge"], "--yes")
    print(
        f"  erase               {seconds:7.1f} s: {erased['files_rewritten']:,} files rewritten, {touched:,} of them "
        f"of {len(purged_chunks.parts()):,} parts"
    )
    verified, seconds = run("receipt", root, purged["purge"], "--out", folder)
    receipt = verified["receipt"]
    files, rows = (sum(one[what] for one in receipt["files"]["kinds"]) for what in ("files", "rows"))
    print(
        f"  receipt             {seconds:7.1f} s: {files:,} files decoded, {rows:,} rows; "
        f"{'nothing of it is left' if receipt['ok'] else 'FAILED'}"
    )
    shutil.rmtree(root)


def one_by_one(source: Path, folder: Path, documents: list[str]) -> None:
    root = Path(shutil.copytree(source, folder / "store", copy_function=os.link))
    each = [run("purge", root, "--document", name, "--reason", "benchmark", "--yes")[1] for name in documents]
    erased, seconds = run("erase", root, "--older-than", "0s", "--yes")
    print(
        f"\n{len(documents)} documents, each purged on its own: {np.median(each):.1f} s each\n"
        f"  erase of all        {seconds:7.1f} s: {erased['erased']:,} chunks, {erased['files_rewritten']:,} files"
    )
    verified, seconds = run("receipt", root, erased["purges"][0], "--out", folder)
    print(f"  receipt of one      {seconds:7.1f} s: {'nothing is left' if verified['receipt']['ok'] else 'FAILED'}")
    shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--name", default="main")
    parser.add_argument("--where", default="source in ('git-doc', 'manpages-dev')")
    parser.add_argument("--queries", type=int, default=2000)
    arguments = parser.parse_args()
    print(describe())
    rng = np.random.default_rng(7)
    ids, _, _ = embedded(arguments.store, arguments.encoder)
    drawn = np.sort(rng.choice(ids, min(arguments.queries, len(ids)), replace=False))
    reader = retrotool.open(arguments.store)
    names: set[str] = set()
    while len(names) < DOCUMENTS:
        names.add(reader.chunk(int(rng.choice(ids))).document)
    # Links need the same file system.
    with tempfile.TemporaryDirectory(dir=arguments.store.absolute().parent) as folder:
        listed = Path(folder) / "takedown.txt"
        listed.write_text("\n".join(sorted(names)))
        chunk = str(int(rng.choice(ids)))
        for selector in (["--chunk", chunk], ["--document", f"@{listed}"], ["--where", arguments.where]):
            measure(arguments.store, Path(folder), selector, arguments.encoder, arguments.name, drawn)
        one_by_one(arguments.store, Path(folder), sorted(names))


if __name__ == "__main__":
    main()
