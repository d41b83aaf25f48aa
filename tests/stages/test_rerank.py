"""Saved neighbours ordered by BM25, compared with its formula written out over the tokens that the API returns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from stored import copy_store, stored_file, stored_files
from test_materialise import check_all, entries, purge_ids
from test_neighbour_filters import grow, run, spied, with_copies

import retrotool
from retrotool import api
from retrotool.errors import TaskError, UsageError
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.table_reader import NeighbourReader, TextReader
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)
SAVED = 6


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Embedded, with a table "near" by distance and a table "main" that is re-ranked. Not to be changed: copy it."""
    store = grow(tmp_path_factory.mktemp("rerank") / "store", tiny_encoder, with_copies(30))
    grow(store, tiny_encoder, with_copies(16, first=200))
    for name, rerank in (("near", None), ("main", "overlap")):
        api.neighbours(store, name=name, saved=SAVED, search=EXACT, rerank=rerank)  # type: ignore[arg-type]
    return store


@pytest.fixture
def store(young: Path, tmp_path: Path) -> Path:
    return copy_store(young, tmp_path / "store")


class Bm25:
    """The score of a pair of chunks, from all live chunks of a database as they are now."""

    def __init__(self, queries: Path, database: Path) -> None:
        self.asked, self.reader = retrotool.open(queries), retrotool.open(database)
        live = [i for part in self.reader.parts() for i in live_chunks(self.reader, part)]
        self.chunks = {i: self.reader.chunk(i).tokens.tolist() for i in live}
        self.holding = Counter(token for tokens in self.chunks.values() for token in set(tokens))
        self.mean = sum(map(len, self.chunks.values())) / len(self.chunks)

    def __call__(self, chunk: int, neighbour: int) -> float:
        other, score = Counter(self.chunks[neighbour]), 0.0
        for token in set(self.asked.chunk(chunk).tokens.tolist()):
            n, frequency = self.holding[token], other[token]
            idf = math.log(1 + (len(self.chunks) - n + 0.5) / (n + 0.5))
            length = 1 - 0.75 + 0.75 * other.total() / self.mean
            score += idf * frequency * (1.2 + 1) / (frequency + 1.2 * length)
        return score


def live_chunks(reader: retrotool.Reader, part: int) -> list[int]:
    ids = reader.chunk_ids(part)
    return [int(i) for i in ids[reader.is_live(ids)]]


def check(
    queries: Path,
    database: Path | None = None,
    *,
    scorers: Iterable[Bm25] = (),
    table: str = "main",
    near: str = "near",
) -> int:
    """Each row has the neighbours and distances of the table ``near``, ordered by one scorer; return how many moved."""
    scorers = (Bm25(queries, database or queries), *scorers)
    reader, moved = retrotool.open(queries), 0
    for part in reader.parts():
        for chunk in live_chunks(reader, part):
            found, nearest = (reader.neighbour_ids(chunk, name, SAVED) for name in (table, near))
            assert dict(found) == dict(nearest) and len(found) == len(nearest)
            orders = []
            for scorer in scorers:
                scores = [scorer(chunk, i) for i, _ in found]
                orders.append(all(one >= other - 1e-4 for one, other in pairwise(scores)))
            assert any(orders), (chunk, found)
            assert reader.neighbour_ids(chunk, table) == found[:2]
            moved += found != nearest
    assert api.verify(queries).ok
    return moved


def test_order_and_scores_are_those_of_the_formula(store: Path) -> None:
    assert check(store) > 30
    scorer, reader = Bm25(store, store), retrotool.open(store)
    for part in api.info(store).parts:
        table = pq.read_table(stored_file(store, part["neighbours"]["main"]["path"]))
        for row, (ids, scores) in enumerate(zip(table["ids"].to_pylist(), table["scores"].to_pylist(), strict=True)):
            chunk = (part["part"] << 32) + row
            if not reader.is_live([chunk])[0]:
                continue
            expected = [scorer(chunk, i) if i >= 0 else -math.inf for i in ids]
            assert scores == pytest.approx(expected, abs=1e-3)
            assert [i for i in ids if i >= 0] == [i for i, _ in reader.neighbour_ids(chunk, k=SAVED)]
    api.export(store, store.parent / "exported", table="main", k=SAVED)
    for row in pq.read_table(sorted((store.parent / "exported").glob("part-*.parquet"))).to_pylist():
        assert [i for i in row["neighbours"] if i >= 0] == [i for i, _ in reader.neighbour_ids(row["chunk"], k=SAVED)]


def test_repair_makes_a_damaged_table_in_its_order(store: Path) -> None:
    path = stored_file(store, entries(store)["000001"].path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not api.verify(store).ok
    api.repair(store)
    check(store)


def test_distance_restores_the_table_and_nothing_is_searched(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("info", store).stdout.count("; re-ranked by overlap") == 1
    asked = spied(monkeypatch)
    shown = run("neighbours", store, "--name", "near", "--saved", SAVED, "--exact", "--rerank", "overlap").stdout
    assert shown.endswith("Re-ranked by overlap (--rerank distance undoes this).\n")
    again = json.loads(run("neighbours", store, "--name", "near", "--saved", SAVED, "--exact", "--json").stdout)
    assert again["rerank"] == "overlap" and again["queries"] == 0
    files = {table: [entry.path for entry in entries(store, table).values()] for table in ("near", "main")}
    columns = {name: [pq.read_table(stored_file(store, path)) for path in paths] for name, paths in files.items()}
    assert all(one.equals(other) for one, other in zip(columns["near"], columns["main"], strict=True))
    back = run("neighbours", store, "--saved", SAVED, "--exact", "--rerank", "distance").stdout
    assert "Re-ranked" not in back and asked == []
    reader = retrotool.open(store)
    for entry in entries(store, "main").values():
        table = pq.read_table(stored_file(store, entry.path))
        assert table.column_names == ["ids", "distances"]
        for row, distances in enumerate(table["distances"].to_pylist()):
            assert distances == sorted(distances)
            if reader.is_live([chunk := (entry.part << 32) + row])[0]:
                there = [i for i in table["ids"][row].as_py() if i >= 0]
                assert there == [i for i, _ in reader.neighbour_ids(chunk, k=SAVED)]
    before = Store.open(store).state.number
    assert api.neighbours(store, saved=SAVED, search=EXACT).commit == before
    assert api.verify(store).ok


def test_later_runs_keep_the_order(store: Path, tiny_encoder: Path) -> None:
    """After growth all rows are scored again; after a purge those that are refilled."""
    grow(store, tiny_encoder, with_copies(12, first=500))
    update(store)
    check(store)
    old, reader = Bm25(store, store), retrotool.open(store)
    named = Counter(i for chunk in live_chunks(reader, 0) for i, _ in reader.neighbour_ids(chunk, k=SAVED))
    purged = [i for i, _ in named.most_common(40)]
    purge_ids(store, *purged)
    found = {chunk: reader.neighbour_ids(chunk, k=SAVED) for chunk in live_chunks(retrotool.open(store), 0)}
    reader.refresh()
    for chunk, before in found.items():
        assert reader.neighbour_ids(chunk, k=SAVED) == [one for one in before if one[0] not in purged], "masked"
    assert update(store) > 0
    check(store, scorers=[old])
    (purge,) = api.info(store).purges
    api.undo(store, purge, reason="test")
    update(store)
    check(store)
    api.purge(store, api.Selectors(chunk=store.parent / "ids"), reason="test", erase=True)
    update(store)
    check(store, scorers=[old])


def update(store: Path) -> int:
    return [api.neighbours(store, name=name, saved=SAVED, search=EXACT).queries for name in ("near", "main")][1]


def test_edits_are_read_in_their_order(store: Path) -> None:
    reader = retrotool.open(store)
    chunk = next(i for i in live_chunks(reader, 0) if len(reader.neighbour_ids(i, k=SAVED)) == SAVED)
    ids = [i for i, _ in reader.neighbour_ids(chunk, k=SAVED)]
    write_edits(store, {"chunk": name_of(chunk), "ban": [name_of(ids[0])]})
    assert [i for i, _ in retrotool.open(store).neighbour_ids(chunk, k=SAVED)] == ids[1:]
    write_edits(store, {"chunk": name_of(chunk), "neighbours": [name_of(ids[5]), name_of(ids[1]), name_of(ids[0])]})
    assert [i for i, _ in retrotool.open(store).neighbour_ids(chunk, k=SAVED)] == [ids[5], ids[1], ids[0]]
    api.neighbours(store, saved=SAVED, search=EXACT, rerank="distance")
    assert [i for i, _ in retrotool.open(store).neighbour_ids(chunk, k=SAVED)] == [ids[5], ids[1], ids[0]]


def write_edits(store: Path, *lines: dict[str, Any], table: str = "main") -> None:
    file = store.parent / "edits.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    api.edit_neighbours(store, file, name=table)


def name_of(chunk: int) -> str:
    return f"{chunk >> 32}:{chunk & 0xFFFFFFFF}"


@pytest.mark.parametrize("share", [None, 8])
def test_stored_tokens_follow_the_order(store: Path, share: int | None) -> None:
    """Also where a database's text does not fit into memory, and is read shelf by shelf."""
    memory = None if share is None else api.info(store).chunks * 64 * 2 // share
    search, sorted_by_shelf = SearchOptions(exact=True, memory=memory), 0
    for rerank in (None, "distance", "overlap"):
        api.neighbours(store, saved=SAVED, search=search, materialise=True, rerank=rerank)  # type: ignore[arg-type]
        commits = [path.read_text() for path in stored_files(store, "log/*")]
        before, sorted_by_shelf = sorted_by_shelf, sum("routes/main/shelf-" in commit for commit in commits)
        assert (sorted_by_shelf > before) == (share is not None)
        check_all(store)
        reader = retrotool.open(store)
        for i in live_chunks(reader, 0):
            order = reader.neighbour_ids(i, k=SAVED)
            assert (order == sorted(order, key=lambda one: one[1])) or rerank != "distance"
        assert api.verify(store).ok
    check(store)
    assert not [entry for entry in Store.open(store).state.files() if entry.path.startswith("routes/")]


def test_a_mixture_is_merged_by_score_times_weight(store: Path, tiny_encoder: Path) -> None:
    books = grow(store.parent / "books", tiny_encoder, [*with_copies(14, first=900), *make_rows(8, words=60)])
    weights = {"store": 1.0, "books": 1.25}
    given: list[tuple[Path, float | None]] = [(books, weights["books"])]
    mixed = {"name": "m", "saved": SAVED, "search": EXACT}
    api.neighbours(store, databases=given, rerank="overlap", materialise=True, **mixed)  # type: ignore[arg-type]
    scorers = {name: Bm25(store, place) for name, place in (("store", store), ("books", books))}

    def merged(chunk: int) -> list[float]:
        reader, found = retrotool.open(store), []
        for name, scorer in scorers.items():
            found += [weights[name] * scorer(chunk, i) for i, _ in reader.neighbour_ids(chunk, f"m.{name}", SAVED)]
        return sorted(found, reverse=True)

    def scored(chunk: int) -> list[tuple[str, float]]:
        places = retrotool.open(store).neighbour_places(chunk, "m", SAVED)
        names = [(Path(path).name, i) for path, i, _ in places]
        return [(name, weights[name] * scorers[name](chunk, i)) for name, i in names]

    chunks = live_chunks(retrotool.open(store), 0)[::3]
    assert {name for chunk in chunks for name, _ in scored(chunk)} == set(weights)
    for chunk in chunks:
        assert [score for _, score in scored(chunk)] == pytest.approx(merged(chunk)[:SAVED], abs=1e-3)
    check_text(store)
    assert api.neighbours(store, **mixed).rerank == "overlap"  # type: ignore[arg-type]
    own = retrotool.open(store).neighbour_ids(chunks[0], "m.store", SAVED)
    write_edits(store, {"chunk": name_of(chunks[0]), "neighbours": [name_of(own[-1][0])]}, table="m.store")
    assert retrotool.open(store).neighbour_places(chunks[0], "m")[0][1:] == own[-1], "what was set comes first"
    check_text(store)
    api.neighbours(store, rerank="distance", **mixed)  # type: ignore[arg-type]
    for chunk in chunks:
        places = retrotool.open(store).neighbour_places(chunk, "m", SAVED)
        keys = [distance / weights[Path(path).name] for path, _, distance in places]
        assert keys == sorted(keys)
    check_text(store)
    one = {"name": "m.books", "saved": SAVED, "search": EXACT, "rerank": "overlap"}
    api.neighbours(books, queries=store, materialise=True, **one)  # type: ignore[arg-type]
    check_text(store, stored=False)


def check_text(store: Path, stored: bool = True) -> None:
    """The tokens of a mixture are those of the neighbours that are read without them."""
    reader = NeighbourReader(Store.open(store), "m")
    rows = TextReader(reader, 2)
    for part in reader.parts():
        assert bool(rows.with_text(part)) == stored
        given, found = rows.read([(part, 0)]), reader.read(part, 2)
        pieces = reader.pieces(found)
        assert np.array_equal(given.ids, found.ids) and np.array_equal(given.databases, found.databases)
        assert np.array_equal(given.tokens.reshape(pieces.tokens.shape), pieces.tokens)


def test_another_database_and_its_erase(young: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    database = copy_store(young, tmp_path / "database")
    queries = grow(tmp_path / "queries", tiny_encoder, with_copies(8, first=700))
    for name, rerank in (("near", None), ("main", "overlap")):
        api.neighbours(
            database, queries=queries, name=name, saved=SAVED, search=EXACT, rerank=rerank  # type: ignore[arg-type]
        )  # fmt: skip
    check(queries, database)
    old, reader = Bm25(queries, database), retrotool.open(queries)
    targets = {reader.neighbour_ids(chunk)[0][0] for chunk in live_chunks(reader, 0)[:3]}
    purge_ids(database, *targets, erase=True)
    for name in ("near", "main"):
        api.neighbours(database, queries=queries, name=name, saved=SAVED, search=EXACT)
    check(queries, database, scorers=[old])
    for entry in entries(queries).values():
        table = pq.read_table(stored_file(queries, entry.path))
        assert not targets & {i for ids in table["ids"].to_pylist() for i in ids}


def test_a_table_that_is_not_yet_in_order_is_not_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended after its first part: readers refuse the others, and the next run orders only these."""
    done = retrotool.neighbours.stage.NeighboursWorker._compute

    def stops(self: Any, database: Any, task: Any, *rest: Any) -> Any:
        if task.inputs["part"]:
            raise RuntimeError("the machine stopped")
        return done(self, database, task, *rest)

    monkeypatch.setattr(retrotool.neighbours.stage.NeighboursWorker, "_compute", stops)
    before = entries(store)
    with pytest.raises(TaskError, match="the machine stopped"):
        api.neighbours(store, saved=SAVED, search=EXACT, rerank="distance")
    monkeypatch.undo()
    reader = retrotool.open(store)
    first = entries(store)
    assert reader.neighbour_ids(0) and first["000000"] != before["000000"] and first["000001"] == before["000001"]
    with pytest.raises(UsageError, match="its table has another index, filters or order"):
        reader.neighbour_ids(1 << 32)
    api.neighbours(store, saved=SAVED, search=EXACT)
    after = entries(store)
    assert after["000000"] == first["000000"] and after["000001"] != first["000001"]
    assert all(pq.read_schema(stored_file(store, e.path)).names == ["ids", "distances"] for e in after.values())
    with pytest.raises(UsageError, match="neither overlap nor distance"):
        api.neighbours(store, rerank="both")  # type: ignore[arg-type]
