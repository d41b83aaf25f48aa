"""Commands on a GPU that is mocked: what they compute there is what they compute on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, make_text, write_jsonl
from mock_cuda import mock_cuda
from oracle import read_plain, saved_neighbours

from retrotool import api
from retrotool.ann import resident
from retrotool.encoder import Encoder, cosines, forwards
from retrotool.index.run import IndexOptions, Options
from retrotool.index.searching import ExactDatabase
from retrotool.neighbours.filters import FilterOptions
from retrotool.neighbours.run import SearchOptions
from retrotool.store.store import Store


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(resident, "pick_kernels", lambda device: resident.TorchKernels())
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


def test_what_does_not_fit_is_searched_in_portions(
    store_copy: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrotool.ann.excluded import Queries
    from retrotool.index import on_device

    loaded = list[tuple[int, ...]]()
    load = on_device.OnDevice._load

    def watch(self: on_device.OnDevice, portion: tuple[int, ...]) -> resident.ResidentLists:
        loaded.append(portion)
        return load(self, portion)

    plain = read_plain(store_copy)
    queries = Queries.plain(plain.vectors[:50])
    whole = ExactDatabase(Store.open(store_copy), device="cuda:0").search(queries, 8)
    monkeypatch.setattr(on_device, "_BLOCK", 16)
    monkeypatch.setattr(on_device, "free_memory", lambda device: 0)
    monkeypatch.setattr(on_device.OnDevice, "_load", watch)
    found = ExactDatabase(Store.open(store_copy), device="cuda:0").search(queries, 8)
    assert len(loaded) == len(api.info(store_copy).parts) > 1
    assert np.array_equal(found.ids, whole.ids) and np.array_equal(found.distances, whole.distances)


def test_an_encoder_gives_the_vectors_of_a_cpu(tiny_encoder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "compile_layer", lambda: forwards.Layer.forward)
    here, there = Encoder(str(tiny_encoder), "cpu"), Encoder(str(tiny_encoder), "cuda:0", batch_tokens=2048)
    rows = here.tokenizer.encode_batch([make_text(i, 1 + i % 60) for i in range(300)])
    assert there.dtype == "float16" and there._loaded.constant
    assert cosines(here.embed(rows), there.embed(rows)).min() > 0.9995
