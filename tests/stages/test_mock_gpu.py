"""Commands on a GPU that is mocked: what they compute there is what they compute on a CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, make_text, write_jsonl
from mock_cuda import mock_cuda
from oracle import read_plain, saved_neighbours

from retrotool import api
from retrotool.ann import resident
from retrotool.ann.excluded import Queries
from retrotool.encoder import Encoder, cosines, forwards
from retrotool.index.run import IndexOptions, Options
from retrotool.index.searching import NO_INDEX, ExactDatabase
from retrotool.neighbours import tiles
from retrotool.neighbours.filters import FilterOptions
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.stage import NeighboursStage
from retrotool.store.store import Store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(resident, "pick_kernels", lambda device, d: (resident.TorchKernels(), ""))
    with mock_cuda():
        yield


def purge(store: Path, *documents: str) -> None:
    names = store.parent / "names"
    names.write_text("".join(f"{name}\n" for name in documents))
    api.purge(store, api.Selectors(document=names), reason="test")


def neighbours_of(store: Path, exact: bool, device: str, **options: object) -> None:
    search = SearchOptions(exact=exact, devices=device)
    api.neighbours(store, saved=6, name=f"on-{device[:4]}", search=search, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("nlist", [None, 0, 6])
def test_tables_are_those_of_a_cpu_when_a_store_grows_and_shrinks(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path, gpu: None, nlist: int | None
) -> None:
    exact = nlist is None
    if nlist:
        wanted = IndexOptions(nlist=nlist, code="float16", shard_rows=100)
        api.index(store_copy, target_recall=1, options=Options(wanted, devices="cuda:0", retrain=True))
        purge(store_copy, "doc-9")
    for device in ("cpu", "cuda:0"):
        neighbours_of(store_copy, exact, device)
    compare(store_copy)
    purge(store_copy, "doc-3", "doc-40")
    added = write_jsonl(tmp_path / "more.jsonl", make_rows(20, first=200))
    api.chunk(store_copy, [str(added)])
    api.embed(store_copy, encoder=str(tiny_encoder), devices="cuda:0")
    if not exact:
        api.index(store_copy, target_recall=1, options=Options(devices="cuda:0"))
    for device in ("cpu", "cuda:0"):
        neighbours_of(store_copy, exact, device)
    compare(store_copy)


@pytest.mark.parametrize("exact", [True, False])
def test_filters_leave_out_on_a_gpu_what_they_leave_out_on_a_cpu(store_copy: Path, gpu: None, exact: bool) -> None:
    if not exact:
        wanted = IndexOptions(nlist=8, code="float16", shard_rows=100)
        api.index(store_copy, target_recall=0.9, options=Options(wanted, retrain=True))
    for device in ("cpu", "cuda:0"):
        neighbours_of(store_copy, exact, device, filters=FilterOptions(0.5, True, only_sources=("a",)))
    compare(store_copy, least=0.97)


def compare(store: Path, least: float = 1.0) -> None:
    """Hold the tables of both devices against each other; neighbours as near as another may be in its place."""
    (ids, distances), (theirs, off) = (saved_neighbours(store, f"on-{device}") for device in ("cpu", "cuda"))
    assert (ids >= 0).any() and np.array_equal(np.isinf(distances), np.isinf(off))
    there = np.isfinite(distances)
    same = np.isclose(np.where(there, distances, 0), np.where(there, off, 0), rtol=1e-5, atol=1e-6)
    assert same.mean() >= least
    # Sums are ordered differently: places of equal distances may be changed, and no others.
    gaps = np.abs(np.diff(np.where(there, distances, 1e9), axis=1, prepend=-1, append=2e9)) > 1e-5
    apart = there & same & gaps[:, :-1] & gaps[:, 1:]
    assert apart.mean() > 0.3 and (ids == theirs)[apart].mean() >= least


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is loaded, for a GPU with room for 100 vectors; loading lasts until other threads have come."""
    from retrotool.index import on_device
    from retrotool.neighbours import stage

    sizes, load = list[int](), on_device.OnDevice._load

    def watch(self: on_device.OnDevice, portion: on_device.Portion) -> resident.ResidentLists:
        if portion not in self._loaded:
            sizes.append(sum(map(len, portion)))
            end = time.monotonic() + 1
            in_flight = stage._IN_FLIGHT if threading.current_thread().name.startswith("retrotool-task") else 1
            while len(self._left) < in_flight and time.monotonic() < end:
                time.sleep(0.01)
        return load(self, portion)

    monkeypatch.setattr(on_device, "_LEAST", 100)
    monkeypatch.setattr(on_device, "free_memory", lambda device: 0)
    monkeypatch.setattr(on_device.OnDevice, "_load", watch)
    return sizes


@pytest.mark.parametrize(("exact", "in_flight", "most"), [(True, 1, 13), (True, 4, 4), (False, 2, 8)])
def test_tasks_in_flight_share_portions_of_what_does_not_fit(
    store_copy: Path,
    gpu: None,
    loads: list[int],
    monkeypatch: pytest.MonkeyPatch,
    exact: bool,
    in_flight: int,
    most: int,
) -> None:
    assert len(api.info(store_copy).parts) == -(-len(read_plain(store_copy).ids) // 100) == 4
    if not exact:
        wanted = IndexOptions(nlist=6, code="float16", shard_rows=100)
        api.index(store_copy, target_recall=1, options=Options(wanted, retrain=True))
    monkeypatch.setattr("retrotool.neighbours.stage._IN_FLIGHT", in_flight)
    for device in ("cpu", "cuda:0"):
        neighbours_of(store_copy, exact, device)
    compare(store_copy)
    # Alone, a task begins with the portion that the last one left. Together they load all four once.
    assert len(loads) <= most and (in_flight > 1 or len(loads) == most) and max(loads) <= 100


def test_a_part_that_does_not_fit_is_divided(store_copy: Path, gpu: None, loads: list[int]) -> None:
    plain = read_plain(store_copy)
    queries = Queries.plain(plain.vectors[:50])
    here, there = (ExactDatabase(Store.open(store_copy), device=device) for device in ("cpu", "cuda:0"))
    of, expected = plain.ids >> 32, 0
    for only in (None, [1, 2], [0]):
        right, found = (one.search(queries, 8, only=only) for one in (here, there))
        assert np.array_equal(found.ids, right.ids) and np.allclose(found.distances, right.distances, atol=1e-6)
        expected += -(-int(np.isin(of, only or of).sum()) // 100)
    assert len(loads) == expected and max(loads) <= 100


def test_a_commit_that_changes_nothing_that_is_searched_does_not_load_it_again(
    store_copy: Path, gpu: None, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrotool.index.on_device._LEAST", 10_000)
    monkeypatch.setattr("retrotool.engine.run.FOLD_SECONDS", 0)
    monkeypatch.setattr("retrotool.neighbours.stage._IN_FLIGHT", 2)
    before = api.info(store_copy).commit
    neighbours_of(store_copy, True, "cuda:0")
    assert api.info(store_copy).commit > before + 2, "tables were committed one after the other"
    assert len(loads) == 1


@pytest.mark.parametrize("card", [1 << 40, 2000])
def test_tiles_are_searched_as_on_a_cpu(
    store_copy: Path, gpu: None, monkeypatch: pytest.MonkeyPatch, card: int
) -> None:
    monkeypatch.setattr(tiles, "_CARD_BYTES", card)
    wanted = IndexOptions(nlist=24, code="float16", shard_rows=100)
    api.index(store_copy, target_recall=0.5, options=Options(wanted, devices="cuda:0", retrain=True, sample=50))
    memory = sum(entry.bytes for entry in Store.open(store_copy).state.group("embeddings", "tiny").entries()) // 3
    api.neighbours(store_copy, saved=6, name="on-cpu", search=SearchOptions(devices="cpu"))
    api.neighbours(store_copy, saved=6, name="on-cuda", search=SearchOptions(memory=memory, devices="cuda:0"))
    compare(store_copy, 0.99)


def test_a_part_without_anything_to_search_for_has_an_empty_table(store_copy: Path, gpu: None) -> None:
    plain = read_plain(store_copy)
    purge(store_copy, *sorted({str(name) for name in plain.documents[plain.ids >> 32 == 0]}))
    for device in ("cpu", "cuda:0"):
        neighbours_of(store_copy, True, device)
    compare(store_copy)


def test_what_a_gpu_holds_is_replaced_when_no_thread_searches_it(store_copy: Path, gpu: None) -> None:
    worker = NeighboursStage(str(store_copy), NO_INDEX, "main", 6, 2, devices=("cuda:0",)).open(Store.open(store_copy))
    old = worker._database
    old.search(Queries.plain(read_plain(store_copy).vectors[:5]), 3)
    assert worker._reopened() and worker._database is old
    purge(store_copy, "doc-9")
    worker._searching = 1
    assert not worker._reopened() and len(old._resident) == 1
    worker._searching = 0
    assert worker._reopened() and worker._database is not old and not old._resident


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_threads_that_search_on_a_cpu_take_turns(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    threads = torch.get_num_threads()
    neighbours_of(store_copy, True, "cpu")
    monkeypatch.setattr(NeighboursStage, "in_flight", property(lambda _: 2))
    search = SearchOptions(exact=True, devices=devices)
    api.neighbours(store_copy, saved=6, name="on-cuda", search=search)
    compare(store_copy)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({}, 1),
        ({"devices": ("cuda:0",)}, 8),
        ({"devices": ("cuda:0",), "saved": 200}, 3),
        ({"devices": ("cuda:0",), "memory": 1 << 30}, 1),
    ],
)
def test_tasks_in_flight_are_as_many_as_the_memory_of_the_machine_holds(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], tasks: int
) -> None:
    monkeypatch.setattr("retrotool.neighbours.stage.memory_of_machine", lambda: 100 << 30)
    given = {"database": "", "index": "", "table": "", "saved": 20, "k": 2, **options}
    assert NeighboursStage(**given).in_flight == tasks  # type: ignore[arg-type]


def test_an_encoder_gives_the_vectors_of_a_cpu(tiny_encoder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "compile_layer", lambda: forwards.Layer.forward)
    here, there = Encoder(str(tiny_encoder), "cpu"), Encoder(str(tiny_encoder), "cuda:0", batch_tokens=2048)
    rows = here.tokenizer.encode_batch([make_text(i, 1 + i % 60) for i in range(300)])
    assert there.dtype == "float16" and there._loaded.constant
    assert cosines(here.embed(rows), there.embed(rows)).min() > 0.9995
