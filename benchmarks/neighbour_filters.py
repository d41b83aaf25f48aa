"""Measure the cost of excluding neighbours, and the recall of searches restricted to some sources.

    python benchmarks/neighbour_filters.py STORE [--index main] [--rows 4000] [--queries 500]

STORE is embedded and indexed, and has several sources; it is not changed. First, 20 neighbours of random rows
of one part are found with each token filter, by exact search and through the index. Then random chunks are
searched in each source alone, and in all but that one: recall@10 against exact search in the same sources, as
``neighbours`` searches, and with only as many probes as without restriction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from machine import describe

from retrotool.ann.excluded import Queries
from retrotool.ann.ranking import Best
from retrotool.embed.search_scope import own_documents, read_part_vectors, searchable_rows
from retrotool.index.searching import AnyDatabase, Database, ExactDatabase, source_names
from retrotool.neighbours.filters import Filters, Finder
from retrotool.store.store import Store

Rows = npt.NDArray[np.int64]
SAVED, K = 20, 10
FILTERS = {
    "nothing left out": Filters(),
    "--max-overlap 0.125": Filters(0.125),
    "--max-overlap 0.5": Filters(0.5),
    "--exclude-near-copies": Filters(near_copies=True),
    "--max-overlap 0.125 --exclude-near-copies": Filters(0.125, near_copies=True),
}


def asking(store: Store, database: AnyDatabase, part: int) -> Callable[[Rows], Queries]:
    vectors = read_part_vectors(store, database.encoder, part)
    own = own_documents(store, part, store, database.tombstones, within=True)
    return lambda rows: Queries(vectors[rows].astype(np.float32), own.take(rows))


def some_rows(store: Store, database: AnyDatabase, part: int, n: int) -> Rows:
    rows = searchable_rows(store, part, database.tombstones)
    return np.sort(np.random.default_rng(part).choice(rows, min(n, len(rows)), replace=False))


def costs(store: Store, database: AnyDatabase, n: int, truth: dict[str, Rows]) -> dict[str, Rows]:
    """Measure each filter; with ``truth``, also print how much of its nearest ten is found."""
    part = database.held()[0]
    ask, rows = asking(store, database, part), some_rows(store, database, part, n)
    Finder(store, part, database, SAVED, Filters(), ask).search(rows[:256])
    found: dict[str, Rows] = {}
    for words, filters in FILTERS.items():
        start, used = time.perf_counter(), time.process_time()
        best = Finder(store, part, database, SAVED, filters, ask).search(rows)
        rate, per_core = len(rows) / (time.perf_counter() - start), len(rows) / (time.process_time() - used)
        found[words] = best.ids
        other = (best.ids != found["nothing left out"]).any(axis=1).mean()
        full = (best.ids >= 0).all(axis=1).mean()
        true = f", recall@10 {share_of(best.ids[:, :K], truth[words][:, :K]):.4f}" if truth else ""
        print(f"  {words}: {rate:,.0f} rows/s, {per_core:,.0f} a second of a core; others in {100 * other:.1f} % of "
              f"the rows, all 20 in {100 * full:.2f} %{true}")  # fmt: skip
    return found


def recall(store: Store, index: str, n: int) -> None:
    plain = Database(store, index)
    asked = [asking(store, plain, part)(some_rows(store, plain, part, n // len(plain.held()))) for part in plain.held()]

    def find(search: Callable[[Queries], Best]) -> tuple[Rows, float]:
        search(asked[0].take(np.arange(8)))
        start = time.process_time()
        ids = np.concatenate([search(some).ids for some in asked])
        return ids, len(ids) / (time.process_time() - start)

    print(f"  everything: {find(lambda some: plain.search(some, K))[1]:,.0f} queries a second of a core")
    for name in sorted(set().union(*source_names(store))):
        for which, allows in (("only", name.__eq__), ("all but", name.__ne__)):
            print(f"  {which} {name} {restricted(store, index, allows, find)}")


class _Narrow(Database):
    """Probes as many lists as without a filter."""

    def _probes(self, queries: Queries, nprobe: int) -> Iterable[tuple[int, Rows]]:
        return [(nprobe, np.arange(len(queries)))]


def restricted(store: Store, index: str, allows: Callable[[str], bool], find: Callable[..., tuple[Rows, float]]) -> str:
    database = Database(store, index, allows=allows)
    exact = ExactDatabase(store, database.encoder, allows=allows)
    narrow = _Narrow(store, index, allows=allows)
    truth = find(lambda some: exact.search(some, K))[0]
    share = database._n_searched / database.vectors_in_log
    (found, rate), (less, less_rate) = (
        find(lambda some: database.search(some, K)),
        find(lambda some: narrow.search(some, K)),
    )
    return (
        f"({100 * share:.1f} %): recall@10 {share_of(found, truth):.4f}, {rate:,.0f} a second; "
        f"without probing more {share_of(less, truth):.4f}, {less_rate:,.0f}"
    )


def share_of(found: Rows, truth: Rows) -> float:
    pairs = [(set(one), set(true) - {-1}) for one, true in zip(found.tolist(), truth.tolist(), strict=True)]
    return float(np.mean([len(one & true) / len(true) for one, true in pairs if true]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--index", default="main")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=500)
    arguments = parser.parse_args()
    print(describe())
    store = Store.open(arguments.store)
    database = Database(store, arguments.index)
    print(f"{SAVED} neighbours of {arguments.rows:,} chunks among {database.vectors_in_log:,}, exactly")
    truth = costs(store, ExactDatabase(store, database.encoder), arguments.rows, {})
    print(f"through index {arguments.index!r}: {database.trained.nlist:,} lists, {database.point.nprobe} probed")
    costs(store, database, arguments.rows, truth)
    print("in some sources, through the index:")
    recall(store, arguments.index, arguments.queries)


if __name__ == "__main__":
    main()
