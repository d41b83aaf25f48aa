"""A purge of one chunk, of 100 documents and of a tenth of a store: what it costs, and whether anybody still finds it.

    python benchmarks/purging.py STORE [--encoder minilm] [--name main] [--where EXPRESSION] [--queries 2000]

STORE has embeddings, an index and neighbours in itself; it is not changed (each purge is made in a copy of links, as
no file of a store is ever changed). Each purge is by another selector: ``--chunk``, ``--documents``, and ``--where``,
which should mean about a tenth of the store. Then

* every victim is a query of a search, and the victims among the 10 nearest are counted;
* every read path is taken, and the victims in what it returns are counted (``retrotool.receipt.read_paths``);
* neighbours of random live chunks, as they are read, are compared with brute force over the live vectors alone:
  before the purge, after it, after ``neighbours``, and as they are found from scratch in the store that was purged;
* it is erased and verified, and the files that were rewritten are counted, and those of the parts that it touched.

At last each of the 100 documents is purged on its own, and all these purges are erased together.

Times are those of the commands as whole processes.
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
from retrotool.purge.erase import EraseStage, part_files
from retrotool.receipt.read_paths import read_paths
from retrotool.store import parts
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones, read_tombstones

DOCUMENTS = 100
AT_ONCE = 1 << 14
Ids = npt.NDArray[np.int64]


def run(*arguments: object) -> tuple[dict[str, Any], float]:
    """What a command tells as JSON, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run([tool(), *map(str, arguments), "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), time.perf_counter() - start


def embedded(root: Path, encoder: str) -> tuple[Ids, npt.NDArray[np.float16], Ids]:
    """Ids, vectors and documents (first chunk) of all live chunks that have a vector."""
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
    """The k true nearest of other documents, of some rows, by brute force in float32."""
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
    """recall@2 and @10 of ``chunks`` in the table ``name`` as it is read, against brute force over what is live."""
    ids, vectors, documents = embedded(root, encoder)
    rows = np.searchsorted(ids, chunks)
    reader = retrotool.open(root)
    near = [[i for i, _ in reader.neighbour_ids(chunk, name, 20)] for chunk in ids[rows].tolist()]
    told = []
    for k in (2, 10):
        true = truth(ids, vectors, documents, rows, k)
        hits = sum(len(set(a.tolist()) & set(b[:k])) for a, b in zip(true, near, strict=True))
        told.append(f"recall@{k} {hits / k / len(rows):.4f}")
    return ", ".join(told)


def searched(root: Path, vectors: npt.NDArray[Any], victims: Tombstones) -> int:
    """How many of the 10 nearest of the victims' own vectors are victims."""
    database = retrotool.open(root).database()
    found = 0
    for start in range(0, len(vectors), AT_ONCE):
        best = database.search(Queries.plain(vectors[start : start + AT_ONCE].astype(np.float32)), 10)
        found += int(victims.contains(best.ids).sum())
    return found


def measure(source: Path, folder: Path, selector: list[str], encoder: str, name: str, drawn: Ids) -> None:
    """One purge, from the selection to the receipt."""
    root = Path(shutil.copytree(source, folder / "store", copy_function=os.link))
    ids, vectors, _ = embedded(root, encoder)
    total = json.loads(subprocess.run([tool(), "info", str(root), "--json"], capture_output=True, check=True).stdout)
    before = read_tombstones(Store.open(root))
    purged, seconds = run("purge", root, *selector, "--reason", "benchmark", "--yes")
    store = Store.open(root)
    after = read_tombstones(store)
    victims = Tombstones(np.setdiff1d(after.ids, before.ids))
    mine = victims.contains(ids)
    print(
        f"\n{' '.join(selector)[:60]}: {purged['chunks']:,} of {total['chunks']:,} chunks, {purged['documents']:,} "
        f"whole documents; {mine.sum():,} of {len(ids):,} with vectors"
    )
    print(f"  purge               {seconds:7.1f} s")
    print(f"  in searches by each {searched(root, vectors[mine], victims)} of {10 * int(mine.sum()):,} results")
    for take in read_paths(store, victims.ids):
        path = take()
        print(f"  {path.name:<20}{path.found} in {path.rows:,} rows{'; ' + path.note if path.note else ''}")
    drawn = drawn[~victims.contains(drawn)]
    print(f"  before the purge    {recall(source, encoder, drawn, name)}, of {len(drawn):,} live chunks")
    print(f"  as they are read    {recall(root, encoder, drawn, name)}")
    filled, seconds = run("neighbours", root, "--name", name)
    print(f"  neighbours again    {seconds:7.1f} s: {filled['queries']:,} rows searched again")
    print(f"  after it            {recall(root, encoder, drawn, name)}")
    _, seconds = run("neighbours", root, "--name", "from-scratch", "--saved", 20)
    print(f"  from scratch        {seconds:7.1f} s: {recall(root, encoder, drawn, 'from-scratch')}")
    store = Store.open(root)
    touched = sum(len(part_files(store, part)) for part in victims.parts())
    holding = sum(task.weight for task in EraseStage(victims, (purged["purge"],)).tasks(store))
    erased, seconds = run("purge", root, purged["purge"], "--erase", "--yes")
    print(
        f"  erase               {seconds:7.1f} s: {erased['files_rewritten']:,} files rewritten; {holding:,} held "
        f"some, {touched:,} of them of {len(victims.parts()):,} parts"
    )
    verified, seconds = run("receipt", root, purged["purge"], "--out", folder)
    receipt = verified["receipt"]
    files, rows = (sum(one[what] for one in receipt["files"]["kinds"]) for what in ("files", "rows"))
    print(
        f"  verify              {seconds:7.1f} s: {files:,} files decoded, {rows:,} rows; "
        f"{'nothing of it is left' if receipt['ok'] else 'FAILED'}"
    )
    shutil.rmtree(root)


def one_by_one(source: Path, folder: Path, documents: list[str]) -> None:
    """A purge for each document, and one erase of all."""
    root = Path(shutil.copytree(source, folder / "store", copy_function=os.link))
    each = [run("purge", root, "--document", name, "--reason", "benchmark", "--yes")[1] for name in documents]
    erased, seconds = run("erase", root, "--older-than", "0s", "--yes")
    print(
        f"\n{len(documents)} documents, each purged on its own: {np.median(each):.1f} s each\n"
        f"  erase of all        {seconds:7.1f} s: {erased['erased']:,} chunks, {erased['files_rewritten']:,} files"
    )
    verified, seconds = run("receipt", root, erased["purges"][0], "--out", folder)
    print(f"  verify of one       {seconds:7.1f} s: {'nothing is left' if verified['receipt']['ok'] else 'FAILED'}")
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
