"""Neighbours of a store that grows, by several jobs, exactly or through an index: as if computed at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from oracle import brute_force, read_plain, saved_neighbours
from stored import copy_store
from test_index_rivals import at_once

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.ann.ranking import Best, merged
from retrotool.errors import UsageError
from retrotool.index.run import Options
from retrotool.index.searching import Database, ExactDatabase
from retrotool.neighbours.run import SearchOptions
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.state import State
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Embedded, without index. Not to be changed: copy it."""
    store = tmp_path_factory.mktemp("young") / "store"
    grow(store, tiny_encoder, 80, 0)
    return store


@pytest.fixture
def store(young: Path, tmp_path: Path) -> Path:
    return copy_store(young, tmp_path / "store")


def grow(store: Path, encoder: Path, n: int, first: int) -> None:
    rows = make_rows(n, first=first, words=80)
    inputs = [str(write_jsonl(store.parent / f"{first}.jsonl", rows))]
    api.chunk(store, inputs, tokenizer=str(encoder), part_size=60)
    api.embed(store, encoder=str(encoder))


def purge(store: Path, ids: list[int], *, erase: bool = False) -> None:
    path = store.parent / "ids"
    path.write_text("".join(f"{i}\n" for i in ids))
    api.purge(store, api.Selectors(chunk=Path(path)), reason="test", erase=erase)


def assert_true(store: Path, name: str, purged: frozenset[int] = frozenset()) -> None:
    """What is saved is what brute force finds; ids may differ where distances tie."""
    plain = read_plain(store, purged=purged)
    ids, distances = saved_neighbours(store, name)
    true_ids, true = brute_force(plain, plain, ids.shape[1])
    live = plain.live
    assert np.array_equal(np.isinf(distances[live]), np.isinf(true[live]))
    there = np.isfinite(true[live])
    assert np.allclose(distances[live][there], true[live][there], atol=1e-3)
    assert (ids[live] == true_ids[live]).mean() > 0.97
    assert (ids[~live] == -1).all()


def test_few_chunks_need_no_index(store: Path) -> None:
    found = api.neighbours(store)
    assert found.index == "" and found.not_indexed == 0
    assert_true(store, "main")
    assert api.neighbours(store).queries == 0, "nothing is left to do"
    assert api.neighbours(store, search=EXACT).commit == found.commit
    assert api.verify(store).problems == []
    with pytest.raises(UsageError, match="--exact can't be combined with --index"):
        api.neighbours(store, index="main", search=EXACT)


def test_an_index_that_is_there_is_used_and_takes_the_place_of_exact_search(store: Path) -> None:
    api.neighbours(store)
    api.index(store)
    found = api.neighbours(store)
    assert found.index == "main" and found.queries == found.rows
    assert_true(store, "main")
    again = api.neighbours(store, name="other", search=EXACT)
    assert again.index == ""
    assert np.array_equal(saved_neighbours(store, "main")[0], saved_neighbours(store, "other")[0])
    with pytest.raises(UsageError, match="--encoder needs --exact"):
        api.neighbours(store, search=SearchOptions(encoder="tiny"))


@pytest.mark.parametrize("how", ["exact", "flat", "lists"])
@pytest.mark.parametrize("purged", ["nothing", "purged", "erased"])
def test_what_is_computed_bit_by_bit_is_what_is_computed_at_once(
    store: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, how: str, purged: str
) -> None:
    index = {"exact": None, "flat": "flat", "lists": "lists"}[how]

    def build() -> None:
        if index is not None:
            wanted = IndexOptions(nlist=8, code="sq8") if how == "lists" and fresh else IndexOptions()
            api.index(store, name=index, target_recall=1.0, options=Options(replace(wanted, shard_rows=70)))

    fresh = True
    options = EXACT if index is None else None
    build()
    first = api.neighbours(store, name="grown", index=index, search=options)
    before = read_plain(store).ids
    targets = [] if purged == "nothing" else before[::9].tolist()
    if targets:
        purge(store, targets, erase=purged == "erased")
    grow(store, tiny_encoder, 20, 500)
    fresh = False
    if index is not None:
        api.index(store, name=index, options=Options())
    asked: list[object] = []
    for kind in (Database, ExactDatabase):
        search = kind.search

        def spy(self, *arguments, _search=search, **options):  # type: ignore[no-untyped-def]
            asked.append((len(arguments[0]), options.get("only")))
            return _search(self, *arguments, **options)

        monkeypatch.setattr(kind, "search", spy)
    grown = api.neighbours(store, name="grown", index=index, search=options)
    new = [only for _, only in asked if only is not None]
    assert len(new) >= 2 and all(only == new[0] and min(only) > int(before[-1] >> 32) for only in new)
    whole = sum(n for n, only in asked if only is None)
    assert whole < grown.rows, "old rows are not searched again in old parts, but where they were left with too few"
    assert grown.rows > first.rows - len(targets)
    at_once_ = api.neighbours(store, name="at-once", index=index, search=options)
    assert at_once_.queries == at_once_.rows
    ids, distances = saved_neighbours(store, "grown")
    other_ids, other = saved_neighbours(store, "at-once")
    there = (ids >= 0) & (other_ids >= 0)
    assert (ids[:, :2] >= 0).sum() == (other_ids[:, :2] >= 0).sum()
    if how == "lists":  # which does not find all
        assert (ids == other_ids)[there].mean() > 0.95
    else:
        assert np.abs(distances[there] - other[there]).max() <= 1e-4
        assert (ids == other_ids)[there].mean() > 0.99, "ties aside"
    if not targets:
        assert np.array_equal(ids >= 0, other_ids >= 0), "all that are saved; after a purge, as far as it is known"
        if how != "lists":
            assert_true(store, "grown")
    assert api.verify(store).problems == []


def test_little_memory_gives_the_same(store: Path) -> None:
    api.index(store, name="lists", target_recall=1.0, options=Options(IndexOptions(nlist=8, code="sq8", shard_rows=70)))
    api.neighbours(store, name="much", index="lists")
    api.neighbours(store, name="little", index="lists", search=SearchOptions(memory=1 << 20))
    api.neighbours(store, name="exact", search=SearchOptions(exact=True, memory=1 << 20))
    for name in ("little", "exact"):
        ids, distances = saved_neighbours(store, name)
        true_ids, true = saved_neighbours(store, "much")
        assert (ids == true_ids).mean() > 0.97
        assert np.allclose(np.where(ids < 0, 0, distances), np.where(true_ids < 0, 0, true), atol=1e-3)


def test_jobs_and_worker_processes_share_a_store(store: Path, tmp_path: Path) -> None:
    one = copy_store(store, tmp_path / "one")
    api.neighbours(one)
    jobs = [("neighbours", "--shard", f"{i}/2", "--devices", "cpu") for i in range(2)]
    for code, err in at_once(store, *jobs):
        assert code == 0 and "Traceback" not in err
    assert api.neighbours(store).queries == 0
    assert np.array_equal(saved_neighbours(store)[0], saved_neighbours(one)[0])
    api.neighbours(store, name="two", search=SearchOptions(devices="cpu,cpu"))
    assert np.array_equal(saved_neighbours(store, "two")[0], saved_neighbours(one)[0])
    assert api.verify(store).problems == []
    with pytest.raises(UsageError, match="--shard 2/2"):
        api.use_engine(shard=(2, 2))


def test_merging_keeps_the_nearest_once_each() -> None:
    inf = np.inf
    one = Best(np.array([[0.1, 0.5, inf]], np.float32), np.array([[7, 3, -1]]))
    other = Best(np.array([[0.2, 0.5, 0.9]], np.float32), np.array([[4, 3, 8]]))
    found = merged(one, other, 3)
    assert found.ids.tolist() == [[7, 4, 3]]
    nothing = merged(Best(one.distances[:, 2:], one.ids[:, 2:]), Best(one.distances[:, 2:], one.ids[:, 2:]), 2)
    assert nothing.ids.tolist() == [[-1, -1]] and np.isinf(nothing.distances).all()


def test_an_index_that_probes_more_lists_since_gives_what_it_gives_at_once(store: Path, tiny_encoder: Path) -> None:
    def probe(nprobe: int) -> None:
        opened = Store.open(store)

        def more(state: State) -> Draft:
            key = "index:main"
            return Draft("index", {}, records={key: {**state.records[key], "nprobe": nprobe}})

        with writing(opened) as run:
            opened.commit(run, more)

    wanted = Options(IndexOptions(nlist=8, code="sq8", shard_rows=70))
    api.index(store, options=wanted)
    probe(1)
    api.neighbours(store)
    grow(store, tiny_encoder, 20, 80)
    api.index(store, options=Options(IndexOptions(shard_rows=70)))
    probe(4)
    database = Database(Store.open(store), thorough=True)
    assert database.point.nprobe == 7
    api.neighbours(store)
    api.neighbours(store, name="whole")
    one, other = (saved_neighbours(store, name)[1] for name in ("main", "whole"))
    assert np.array_equal(one, other)
    probe(8)
    assert api.neighbours(store).queries == 0, "not for this alone"
