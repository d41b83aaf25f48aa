"""Neighbours in a database larger than the memory to use: as if found in memory, whatever happens in between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from oracle import saved_neighbours
from stored import copy_store, stored_files

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.engine import run as running
from retrotool.index.run import Options
from retrotool.info import verify as verifying
from retrotool.neighbours import stage, tiles
from retrotool.neighbours.run import SearchOptions
from retrotool.store.store import Store

SAVED = 5
INDEXES = {"whole": "IVF24,SQfp16", "coded": "IVF24,SQ8"}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store of some parts with two indexes of 24 lists, and neighbours by both. Not to be changed: copy it."""
    store = tmp_path_factory.mktemp("tiles") / "store"
    inputs = [str(write_jsonl(store.parent / "rows.jsonl", make_rows(150, words=80)))]
    api.chunk(store, inputs, tokenizer=str(tiny_encoder), part_size=60)
    api.embed(store, encoder=str(tiny_encoder))
    for name, factory in INDEXES.items():
        options = Options(IndexOptions(factory=factory, shard_rows=100), sample=50)
        api.index(store, name=name, target_recall=0.5, options=options)
        api.neighbours(store, name=name, index=name, saved=SAVED)
    return store


@pytest.fixture
def store(indexed: Path, tmp_path: Path) -> Path:
    return copy_store(indexed, tmp_path / "store")


def vectors(store: Path) -> int:
    return sum(entry.bytes for entry in Store.open(store).state.group("embeddings", "tiny").entries())


def find(store: Path, memory: int, index: str = "whole", name: str = "tiled") -> None:
    api.neighbours(store, name=name, index=index, saved=SAVED, search=SearchOptions(memory=memory))


def assert_equal(store: Path, one: str, other: str) -> None:
    for here, there in zip(saved_neighbours(store, one), saved_neighbours(store, other), strict=True):
        assert np.array_equal(here, there)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("share", [1.5, 4, 30])
def test_tables_are_those_of_a_search_in_memory(
    store: Path, index: str, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    find(store, int(vectors(store) / share), index)
    (found,) = re.findall(r"more than .*: (\d+) tiles$", capsys.readouterr().err, re.MULTILINE)
    assert int(found) == min(round(2 * share), 24)
    assert_equal(store, "tiled", index)
    assert not stored_files(store, "routes/*/*"), "nothing is left"
    assert api.verify(store).ok
    before = Store.open(store).state.number
    find(store, int(vectors(store) / share), index)
    assert Store.open(store).state.number == before, "nothing is left to do"


@pytest.mark.parametrize("share", [3, 12])
def test_tokens_are_those_of_a_pass_through_the_whole_text(
    store: Path, share: int, capsys: pytest.CaptureFixture[str]
) -> None:
    api.neighbours(store, name="direct", index="whole", saved=SAVED, materialise=True)
    expected = api.verify(store).materialised
    text = api.info(store).chunks * 64 * 2
    search = SearchOptions(memory=text // share)
    capsys.readouterr()
    api.neighbours(store, name="tiled", index="whole", saved=SAVED, materialise=True, search=search)
    said = capsys.readouterr().err
    assert re.search(r"of text, more than .*: \d+ shelves$", said, re.MULTILINE), said
    assert_equal(store, "tiled", "whole")
    assert not stored_files(store, "routes/*/*")
    with pytest.MonkeyPatch.context() as patch:  # the digest names the table
        patch.setattr(verifying, "_lines_digest", lambda lines: "\n".join(sorted(lines)))
        found = api.verify(store)
    lines = found.materialised.splitlines()
    tokens = {name: [line.split()[1] for line in lines if f"/{name}/" in line] for name in ("direct", "tiled")}
    assert tokens["direct"] == tokens["tiled"] and len(lines) > 8
    assert found.ok and expected


def test_what_fits_is_not_sorted(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find(store, vectors(store))
    assert "tiles" not in capsys.readouterr().err
    assert_equal(store, "tiled", "whole")


@pytest.mark.on_disk
def test_each_row_is_written_once_as_a_home_and_a_few_times_as_a_guest(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    route = tiles.TileStep._route

    def watched(self: tiles.TileStep, *arguments: Any) -> Any:
        entry = route(self, *arguments)
        about = pq.read_metadata(store / entry.path)
        seen.append([about.row_group(n).num_rows for n in range(about.num_row_groups)])
        return entry

    monkeypatch.setattr(tiles.TileStep, "_route", watched)
    find(store, vectors(store) // 4)
    homes, guests = (sum(sum(rows[kind::2]) for rows in seen) for kind in (0, 1))
    assert homes == api.info(store).chunks
    assert 0 < guests < 7 * homes, "of eight tiles, a row goes to those that it probes"


@pytest.mark.parametrize("rows", [60, 130])
def test_waves_find_what_one_finds(store: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 60 chunks ask one by one, or two at a time; each wave finds neighbours in all parts."""
    parts = api.info(store).parts
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_MOST_GUESTS", rows / api.info(store).chunks)
        patch.setattr(tiles, "copies", lambda *_: 2)
        patch.setattr(tiles, "bytes_of_guest", lambda dimension, _: 2 * dimension)
        done = interrupt_at(patch, "", lambda: None)
        find(store, vectors(store) // 4)
    assert done.count("tiling") == -(-api.info(store).chunks // rows)
    assert done.count("routes") == done.count("tiling") * len(parts)
    assert_equal(store, "tiled", "whole")
    assert not stored_files(store, "routes/*/*")
    assert api.verify(store).ok


def test_a_store_that_has_doubled_is_searched_as_a_whole(store: Path, tiny_encoder: Path) -> None:
    """Old parts have tables already: they are only added to, but new parts find neighbours in old ones."""
    more = [{**row, "id": f"more-{row['id']}", "text": f"more {row['text']}"} for row in make_rows(150, words=80)]
    api.chunk(store, [str(write_jsonl(store.parent / "more.jsonl", more))], part_size=60)
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store, name="whole")
    other = copy_store(store, store.parent / "other")
    find(store, vectors(store) // 3, name="whole")
    find(other, 1 << 30, name="whole")
    for here, there in zip(saved_neighbours(store, "whole"), saved_neighbours(other, "whole"), strict=True):
        assert np.array_equal(here, there)
    assert not stored_files(store, "routes/*/*")


def test_space_for_the_sorted_vectors_is_checked_before_they_are_written(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(running, "check_space", lambda storage, size, name: asked.append(size))
    find(store, vectors(store) // 3)
    assert vectors(store) in asked


def interrupt_at(patch: pytest.MonkeyPatch, step: str, act: Any) -> list[str]:
    """Call ``act`` before the first task of a step; return the list of the steps of all tasks."""
    done: list[str] = []
    call = tiles.TileStep.__call__

    def watched(self: tiles.TileStep, task: Any, run: str, report: Any) -> Any:
        if task.inputs["step"] == step and step not in done:
            done.append(step)
            act()
        else:
            done.append(task.inputs["step"])
        return call(self, task, run, report)

    patch.setattr(tiles.TileStep, "__call__", watched)
    return done


def stop_at_tiles(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a search, and end it by Ctrl-C before its first tile."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, "tile", stop)
        find(store, vectors(store) // 3)


def purge(store: Path, *, erase: bool = False) -> None:
    api.purge(store, api.Selectors(where="id = 'doc-7' or id = 'doc-90'"), reason="test", erase=erase)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("step", ["routes", "tile"])
def test_what_is_purged_in_between_is_not_found(
    store: Path, step: str, erase: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        done = interrupt_at(patch, step, lambda: purge(store, erase=erase))
        find(store, vectors(store) // 3)
    assert (done.count("tiling") > 1) == erase, "an erase removes what was sorted"
    find(store, 1 << 30, name="direct")
    assert_equal(store, "tiled", "direct")
    assert api.verify(store).ok
    assert not stored_files(store, "routes/*/*")


def test_an_erase_removes_what_an_interrupted_search_has_left(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_tiles(store, monkeypatch)
    assert len(stored_files(store, "routes/tiled/*")) > 3
    assert api.verify(store).ok
    purge(store, erase=True)
    assert not stored_files(store, "routes/*/*")
    (made,) = api.info(store).purges
    assert api.verify_purge(store, made, out=store.parent).receipt.ok
    find(store, vectors(store) // 3)
    find(store, 1 << 30, name="direct")
    assert_equal(store, "tiled", "direct")


def test_an_interrupted_search_goes_on_where_it_stopped(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_tiles(store, monkeypatch)
    with monkeypatch.context() as patch:
        done = interrupt_at(patch, "", lambda: None)
        find(store, vectors(store) // 3)
    assert set(done) == {"tile"}
    assert_equal(store, "tiled", "whole")


def test_with_other_memory_an_interrupted_search_goes_on(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do jobs on machines with more memory and less undo one another's work."""

    stop_at_tiles(store, monkeypatch)
    for share in (4, 2):
        with monkeypatch.context() as patch:
            done = interrupt_at(patch, "", lambda: None)
            find(store, vectors(store) // share)
        assert "tiling" not in done
    assert_equal(store, "tiled", "whole")


def test_files_of_an_earlier_search_are_not_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job may commit them after the task that removes them was planned."""

    stop_at_tiles(store, monkeypatch)
    before = Store.open(store).state.group("routes", "tiled")
    late = {entry.path for slot, entry in before.items() if slot in ("000001", "000003")}
    assert len(late) == 2
    tune = Options(IndexOptions(), sample=50)
    api.index(store, name="whole", target_recall=0.9, options=tune)
    write = tiles.TileStep._write_tiling

    def forgetful(self: tiles.TileStep, task: Any, run: str) -> Any:
        task.inputs["remove"][:] = [path for path in task.inputs["remove"] if path not in late]
        return write(self, task, run)

    with monkeypatch.context() as patch:
        patch.setattr(tiles.TileStep, "_write_tiling", forgetful)
        done = interrupt_at(patch, "", lambda: None)
        find(store, vectors(store) // 3)
    assert done.count("tiling") == 1 and done.count("routes") == len(api.info(store).parts)
    find(store, 1 << 30, name="direct")
    assert_equal(store, "tiled", "direct")
    assert not stored_files(store, "routes/*/*")


@pytest.mark.parametrize("change", ["growth", "undo"])
@pytest.mark.parametrize("step", ["routes", "tile", "merge"])
def test_what_comes_in_between_is_found_in_the_end(
    store: Path, tiny_encoder: Path, step: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "undo":
        purge(store)

    def act() -> None:
        if change == "undo":
            api.undo(store, api.info(store).purges[0], reason="test")
            return
        near = [{**row, "id": f"near-{row['id']}"} for row in make_rows(25, words=79)]
        api.chunk(store, [str(write_jsonl(store.parent / "near.jsonl", near))], part_size=60)
        api.embed(store, encoder=str(tiny_encoder))
        api.index(store, name="whole")

    with monkeypatch.context() as patch:
        if step == "merge":
            merge, acted = stage.found_in_tiles, list[None]()

            def watched(*arguments: Any) -> Any:
                if not acted:
                    acted.append(None)
                    act()
                return merge(*arguments)

            patch.setattr(stage, "found_in_tiles", watched)
        else:
            interrupt_at(patch, step, act)
        find(store, vectors(store) // 3)
    find(store, vectors(store) // 3)
    find(store, 1 << 30, name="direct")
    assert_equal(store, "tiled", "direct")
    assert not stored_files(store, "routes/*/*")
    assert api.verify(store).ok


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_lists_are_split_evenly_and_near_ones_stay_together(several: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centroids, sizes = rng.normal(size=(n, 8)).astype(np.float32), rng.integers(0, 50, n)
    found = tiles.split_lists(centroids, sizes, several)
    assert found.shape == (n,) and found.min() >= 0 and found.max() < several
    held = np.bincount(found, sizes, minlength=several)
    assert held.max(initial=0) <= sizes.sum() / several + (np.log2(several) + 1) * (sizes.max() + 1) + n
    assert np.array_equal(found, tiles.split_lists(centroids, sizes, several))


def test_lists_on_a_line_are_split_into_segments() -> None:
    centroids = np.outer(np.random.default_rng(0).permutation(64), np.ones(4)).astype(np.float32)
    found = tiles.split_lists(centroids, np.full(64, 10), 8)[np.argsort(centroids[:, 0])]
    assert (np.diff(found) != 0).sum() == 7
