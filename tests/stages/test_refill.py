"""Refilling tables after purges: as if computed again, and no row searched that had enough left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from oracle import Plain, brute_force, read_plain, saved_neighbours
from restore_help import once_before
from stored import copy_store, stored_files
from test_affected import in_groups_of
from test_index_rivals import at_once

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.index.run import Options
from retrotool.index.searching import Database, ExactDatabase
from retrotool.neighbours.filters import FilterOptions
from retrotool.neighbours.run import NeighboursResult, SearchOptions
from retrotool.store import neighbour_tables
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)
K, SAVED = 3, 5


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Embedded, with an exact index, and few neighbours saved. Not to be changed: copy it."""
    store = tmp_path_factory.mktemp("repair") / "store"
    grow(store, tiny_encoder, 70, 0)
    api.index(store)
    api.neighbours(store, k=K, saved=SAVED)
    return store


@pytest.fixture
def store(young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_store(young, tmp_path / "store")


def grow(store: Path, encoder: Path, n: int, first: int) -> None:
    inputs = [str(write_jsonl(store.parent / f"{store.name}-{first}.jsonl", make_rows(n, first=first, words=80)))]
    api.chunk(store, inputs, tokenizer=str(encoder), part_size=60)
    api.embed(store, encoder=str(encoder), devices="cpu")


def purge(store: Path, ids: list[int], *, erase: bool = False) -> str:
    path = store.parent / "ids"
    path.write_text("".join(f"{i}\n" for i in ids))
    return api.purge(store, api.Selectors(chunk=Path(path)), reason="test", erase=erase).purge


def refill(store: Path, **options: Any) -> NeighboursResult:
    return api.neighbours(store, k=K, saved=SAVED, **options)


def some(store: Path, share: float, seed: int = 0) -> list[int]:
    """Documents at random, so that the same are near one another: their chunks."""
    plain = read_plain(store)
    names = np.unique(plain.documents.astype(str))
    drawn = np.random.default_rng(seed).choice(names, int(share * len(names)), replace=False)
    return [int(i) for i in plain.ids[np.isin(plain.documents.astype(str), drawn)]]


def short_rows(before: np.ndarray, plain: Plain, purged: list[int], k: int = K) -> np.ndarray:
    """Which rows are to be searched again, from the tables and what was purged."""
    left = (before >= 0) & ~np.isin(before, purged)
    return plain.live & (left.sum(axis=1) < k)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """The vectors of all queries that are searched for."""
    seen: list[np.ndarray] = []
    for kind in (Database, ExactDatabase):
        search = kind.search

        def spy(self, queries, *arguments, _search=search, **options):  # type: ignore[no-untyped-def]
            seen.append(np.array(queries.vectors))
            return _search(self, queries, *arguments, **options)

        monkeypatch.setattr(kind, "search", spy)
    yield seen


def assert_as_again(store: Path, purged: list[int], name: str = "main", k: int = K) -> None:
    """What is read is what brute force finds of what is left: the same distances, and ids but for ties."""
    plain = read_plain(store, purged=frozenset(purged))
    true_ids, true = brute_force(plain, plain, k)
    reader = retrotool.open(store)
    same = total = 0
    for row in np.flatnonzero(plain.live):
        found = reader.neighbour_ids(int(plain.ids[row]), name)
        assert len(found) == int(np.isfinite(true[row]).sum())
        np.testing.assert_allclose([d for _, d in found], true[row][: len(found)], rtol=1e-4, atol=1e-3)
        same += sum(i == j for (i, _), j in zip(found, true_ids[row], strict=False))
        total += len(found)
    assert total > 100 and same / total > 0.99


@pytest.mark.parametrize("how", ["index", "exact"])
@pytest.mark.parametrize("erased", ["purged", "erased", "erased later"])
def test_refilled_is_as_computed_again_and_only_short_rows_are_searched(
    store: Path, how: str, erased: str, asked: list[np.ndarray]
) -> None:
    options = {"index": {}, "exact": {"name": "exact", "search": EXACT}}[how]
    name = options.get("name", "main")
    refill(store, **options)
    before, vectors = saved_neighbours(store, name), read_plain(store).vectors
    targets = some(store, 0.4)
    purged = purge(store, targets, erase=erased == "erased")
    if erased == "erased later":
        api.erase(store, [purged])
    plain = read_plain(store, purged=frozenset(targets))
    short = short_rows(before[0], plain, targets)
    assert short.sum() > 10
    asked.clear()
    done = refill(store, **options)
    assert (done.queries, done.rows) == (short.sum(), plain.live.sum())
    searched = np.concatenate(asked)
    assert len(searched) == done.queries
    assert np.array_equal(np.unique(searched, axis=0), np.unique(vectors[short], axis=0))
    after = saved_neighbours(store, name)
    if erased == "purged":
        assert np.array_equal(after[0][~short], before[0][~short]), "what an undo would want is there still"
    assert_as_again(store, targets, name)
    assert api.verify(store).problems == []
    again = refill(store, **options)
    assert (again.queries, again.commit) == (0, done.commit)


def test_tables_of_several_row_groups_are_looked_through_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_groups_of(16, monkeypatch)
    refill(store, name="small")
    before = saved_neighbours(store, "small")[0]
    targets = some(store, 0.4)
    purge(store, targets)
    done = refill(store, name="small")
    assert done.queries == short_rows(before, read_plain(store, purged=frozenset(targets)), targets).sum() > 0


def test_tables_that_know_of_all_purges_are_not_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purge(store, some(store, 0.4))
    refill(store)
    monkeypatch.setattr(neighbour_tables, "read_ids", None)
    monkeypatch.setattr(neighbour_tables, "read_table", None)
    assert refill(store).queries == 0


def test_rows_stay_short_where_there_is_no_more(store: Path) -> None:
    plain = read_plain(store)
    names = plain.documents.astype(str)
    left = ["doc-1", "doc-4"]
    targets = plain.ids[~np.isin(names, left)].tolist()
    purge(store, targets)
    sizes = {name: int((names == name).sum()) for name in left}
    due = sum(n for name, n in sizes.items() if sum(sizes.values()) - n < K)
    done = refill(store)
    assert done.rows == sum(sizes.values()) and 0 < due < done.queries
    reader = retrotool.open(store)
    for name, n in sizes.items():
        assert {len(reader.neighbour_ids(chunk)) for chunk in reader.document(name)} == {min(K, done.rows - n)}
    assert refill(store).queries == 0, "it is known that there are no more"


def test_a_refill_that_is_interrupted_goes_on_and_repeats_no_part(
    store: Path, asked: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = some(store, 0.4)
    purge(store, targets)
    whole = copy_store(store, store.parent / "whole")
    refill(whole)
    due = sum(map(len, asked))
    asked.clear()
    spied = ExactDatabase.search, Database.search

    def interrupted(self, *arguments, **options):  # type: ignore[no-untyped-def]
        if len(asked) == 2:
            raise KeyboardInterrupt
        return spied[1](self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refill(store)
    assert api.verify(store).problems == []
    refill(store)
    assert sum(map(len, asked)) == due
    assert np.array_equal(saved_neighbours(store)[0], saved_neighbours(whole)[0])


def test_tables_of_another_store_lose_what_was_erased(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    training = tmp_path / "training"
    grow(training, tiny_encoder, 12, 900)
    by_name: dict[str, dict[str, Any]] = {"t": {}, "u": {"search": EXACT}}
    for name, options in by_name.items():
        refill(store, queries=training, name=name, **options)
    before = saved_neighbours(training, "t")[0]
    targets = some(store, 0.4)
    api.erase(store, [purge(store, targets)])
    plain = read_plain(training)
    for name, options in by_name.items():
        done = refill(store, queries=training, name=name, **options)
        assert done.queries == short_rows(before, plain, targets).sum()
        assert not np.isin(saved_neighbours(training, name)[0], targets).any()
        true_ids, true = brute_force(plain, read_plain(store), K)
        ids, distances = saved_neighbours(training, name)
        np.testing.assert_allclose(distances[:, :K], true, rtol=1e-4, atol=1e-3)
        assert (ids[:, :K] == true_ids).mean() > 0.99


def test_all_tables_of_a_mixture_are_refilled(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    grow(tmp_path / "books", tiny_encoder, 40, 700)
    refill(store, name="mix", databases=[(tmp_path / "books", None)], search=EXACT)
    purge(store, some(store, 0.4))
    purge(tmp_path / "books", some(tmp_path / "books", 0.4))
    done = refill(store, name="mix", search=EXACT)
    assert len(done.mix) == 2 and all(0 < one.queries < one.rows for one in done.mix)
    assert refill(store, name="mix", search=EXACT).queries == 0


def test_a_table_keeps_its_filters(store: Path) -> None:
    api.neighbours(store, name="apart", k=K, saved=SAVED, filters=FilterOptions(exclude_sources=("a",)))
    targets = some(store, 0.4)
    purge(store, targets)
    record = Store.open(store).state.records["neighbours:apart"]
    assert refill(store, name="apart").queries > 10
    assert Store.open(store).state.records["neighbours:apart"] == record
    reader = retrotool.open(store)
    chunks = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    found = [reader.neighbour_ids(chunk, "apart") for chunk in chunks]
    assert all(len(one) == K for one in found)
    numbers = [int(reader.chunk(i).document.removeprefix("doc-")) for one in found for i, _ in one]
    assert {number % 2 for number in numbers} == {1}, "of the other source"


def test_more_neighbours_may_be_used_after_a_refill(store: Path) -> None:
    """A row that had enough left for a smaller k was not searched: with a larger one it has not."""
    api.neighbours(store, k=1, saved=SAVED)
    targets = some(store, 0.6)
    purge(store, targets)
    assert api.neighbours(store, k=1, saved=SAVED).queries > 0
    before = saved_neighbours(store)[0]
    done = refill(store)
    assert_as_again(store, targets)
    plain = read_plain(store, purged=frozenset(targets))
    assert done.queries == short_rows(before, plain, targets).sum() > 0
    assert refill(store).queries == 0


def test_two_refills_at_once_share_the_parts(store: Path) -> None:
    targets = some(store, 0.4)
    purge(store, targets)
    again = ("neighbours", "-k", str(K), "--saved", str(SAVED))
    for code, err in at_once(store, again, again):
        assert code == 0 and "Traceback" not in err, err
    assert refill(store).queries == 0
    assert_as_again(store, targets)
    assert api.verify(store).problems == []


@pytest.mark.parametrize("table", range(3))
def test_a_table_that_another_refill_replaces_between_look_up_and_reading_is_planned_again(
    store: Path, table: int
) -> None:
    targets = some(store, 0.4)
    purge(store, targets)
    folder = store / "neighbours" / "main"
    slots = [file.name.partition("-")[0] for file in stored_files(store, "neighbours/main/*")]
    with once_before("read", folder, lambda: refill(store), slot=slots[table]):
        assert refill(store).queries == 0
    assert_as_again(store, targets)
    assert api.verify(store).problems == []


def test_an_index_of_lists_finds_as_many_as_again(store: Path) -> None:
    api.index(store, name="lists", target_recall=1.0, options=Options(IndexOptions(nlist=8, code="sq8", shard_rows=70)))
    api.neighbours(store, name="lists", index="lists", k=K, saved=SAVED)
    targets = some(store, 0.4)
    purge(store, targets)
    assert refill(store, name="lists", index="lists").queries > 10
    api.neighbours(store, name="again", index="lists", k=K, saved=SAVED)
    reader = retrotool.open(store)
    chunks = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    pairs = [(reader.neighbour_ids(chunk, "lists"), reader.neighbour_ids(chunk, "again")) for chunk in chunks]
    assert np.mean([one == other for one, other in pairs]) > 0.95
