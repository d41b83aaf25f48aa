"""Check the neighbour tables of a store independently, with pyarrow, numpy and brute force.

    python benchmarks/neighbour_tables.py STORE [--name main] [--encoder minilm] [--queries 2000] [--purge N]

STORE has embeddings, and neighbours in itself. Over all rows: neighbours in the query's own document, and
purged ones (``--purge`` first purges N random documents in a copy). On random queries: the share of the true
nearest 2 and 10 in the table, by brute force in float32 over all vectors of other documents, and the largest
error of its distances.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from index import export, tool
from machine import describe

import retrotool

SAVED_TOGETHER = 1 << 8


def table_of(store: Path, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    info = json.loads(subprocess.run([*tool(), "info", str(store), "--json"], capture_output=True, check=True).stdout)
    chunks, ids, distances = [], [], []
    for part in info["parts"]:
        if name in part["neighbours"]:
            table = pq.read_table(store / part["neighbours"][name]["path"])
            n = table.num_rows
            chunks.append((part["part"] << 32) + np.arange(n))
            ids.append(table["ids"].combine_chunks().flatten().to_numpy().reshape(n, -1))
            distances.append(table["distances"].combine_chunks().flatten().to_numpy().reshape(n, -1))
    return np.concatenate(chunks), np.concatenate(ids), np.concatenate(distances)


def member(some: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which numbers are in ``ids``, ascending."""
    found: npt.NDArray[np.bool_] = ids[np.minimum(np.searchsorted(ids, some), len(ids) - 1)] == some
    return found


def own(rows: npt.NDArray[np.int64], neighbours: npt.NDArray[np.int64], documents: Any, ids: Any) -> int:
    numbers = {document: i for i, document in enumerate(dict.fromkeys(documents))}
    number = np.array([numbers[document] for document in documents])
    place = np.searchsorted(ids, rows)
    live = (place < len(ids)) & (ids[np.minimum(place, len(ids) - 1)] == rows)
    whose = number[np.minimum(np.searchsorted(ids, neighbours), len(ids) - 1)]
    same = (whose == number[np.minimum(place, len(ids) - 1)][:, None]) & member(neighbours, ids) & live[:, None]
    return int(same.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--name", default="main")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--purge", type=int, default=0)
    arguments = parser.parse_args()
    print(describe())
    folder = Path(tempfile.mkdtemp())
    try:
        store = arguments.store
        if arguments.purge:
            store = Path(shutil.copytree(store, folder / "store"))
            purge(store, arguments.purge)
        look(store, arguments.name, arguments.encoder, arguments.queries, folder)
    finally:
        shutil.rmtree(folder)


def purge(store: Path, n: int) -> None:
    reader = retrotool.open(store)
    rng = np.random.default_rng(0)
    names = {
        reader.chunk(int(rng.choice(reader.chunk_ids(int(rng.choice(reader.parts())))))).document for _ in range(n)
    }
    given = [word for name in sorted(names) for word in ("--document", name)]
    subprocess.run(
        [*tool(), "purge", str(store), *given, "--reason", "benchmark", "--yes"], capture_output=True, check=True
    )


def look(store: Path, name: str, encoder: str, queries: int, folder: Path) -> None:
    vectors, ids, documents = export(store, encoder, folder, 0)
    rows, neighbours, distances = table_of(store, name)
    held = np.isin(rows, ids)
    rows, neighbours, distances = rows[held], neighbours[held], distances[held]
    print(f"{len(ids):,} vectors; {len(rows):,} rows of {neighbours.shape[1]} neighbours")
    print(f"of the own document: {own(rows, neighbours, documents, ids)} in {neighbours.size:,}")
    reader = retrotool.open(store)
    drawn = np.sort(np.random.default_rng(1).choice(len(rows), min(queries, len(rows)), replace=False))
    gone = seen = 0
    for i in drawn.tolist():
        found = reader.neighbour_ids(int(rows[i]), name, neighbours.shape[1])
        seen += len(found)
        gone += int((~member(np.array([chunk for chunk, _ in found], np.int64), ids)).sum())
    print(f"purged, as they are read: {gone} in {seen:,} of {len(drawn):,} rows")
    names = {document: i for i, document in enumerate(dict.fromkeys(documents))}
    number = np.array([names[document] for document in documents])
    hits, off = {2: 0, 10: 0}, 0.0
    squares = (vectors * vectors).sum(1)
    for start in range(0, len(drawn), SAVED_TOGETHER):
        some = drawn[start : start + SAVED_TOGETHER]
        place = np.searchsorted(ids, rows[some])
        apart = squares[None] - 2 * vectors[place] @ vectors.T
        apart[number[place][:, None] == number[None]] = np.inf
        best = np.argpartition(apart, 10, axis=1)[:, :10]
        best = np.take_along_axis(best, np.argsort(np.take_along_axis(apart, best, 1), 1), 1)
        for j, i in enumerate(some.tolist()):
            there = member(neighbours[i], ids)
            for k in hits:  # of what a reader is given
                hits[k] += len(np.intersect1d(ids[best[j, :k]], neighbours[i][there][:k]))
            exact = ((vectors[np.searchsorted(ids, neighbours[i][there])] - vectors[place[j]]) ** 2).sum(1)
            off = max(off, float(np.abs(exact - distances[i][there]).max(initial=0)))
    for k, n in hits.items():
        print(f"recall@{k}: {n / k / len(drawn):.4f} of the true nearest, on {len(drawn):,} queries")
    print(f"largest difference of a distance to its float32: {off:.1e}")


if __name__ == "__main__":
    main()
