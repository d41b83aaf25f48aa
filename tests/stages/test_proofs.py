"""What comes to a purge after the first of it was erased is proven, too: copies, and vectors of another encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_encoder, make_rows, make_text, write_jsonl

from retrotool import api
from retrotool.engine import execute
from retrotool.errors import TaskError
from retrotool.purge.erase import EraseStage
from retrotool.purge.needles import Draw
from retrotool.purge.prove import ProveStage
from retrotool.purge.proving import Receipt
from retrotool.purge.purged_chunks import COPIES, tombstones_of
from retrotool.store import folding, parts, staging, vectors
from retrotool.store.runs import Run
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

VERSION = make_text(77, 120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store with documents ``one`` and ``two``, and another version of ``two``, which was set aside."""
    folder = tmp_path_factory.mktemp("made")
    texts = [make_text(seed, 120) for seed in (75, 76)]
    first = [{"id": "one", "text": texts[0]}, *make_rows(6), {"id": "two", "text": texts[1]}]
    then = [*make_rows(6, first=10), {"id": "two", "text": VERSION}]
    for number, rows in enumerate((first, then)):
        path = write_jsonl(folder / f"{number}.jsonl", [{"source": "s", "year": 1, **row} for row in rows])
        api.chunk(folder / "store", [str(path)], tokenizer=str(tiny_encoder))
    api.embed(folder / "store", encoder=str(tiny_encoder))
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def purge(store: Path, *documents: str) -> str:
    """Purge the chunks of documents, by their numbers: so nothing else is named that has their id."""
    opened = Store.open(store)
    places = [place for place in parts.read_documents(opened, 0).to_pylist() if place["id"] in documents]
    chunks = [place["first_row"] + n for place in places for n in range(place["n_chunks"])]
    return api.purge(store, api.Selectors(chunk=tuple(chunks)), reason="test").purge


def receipt(store: Path, purge: str) -> Receipt:
    (store.parent / "out").mkdir(exist_ok=True)
    return api.verify_purge(store, purge, out=store.parent / "out").receipt


def test_copies_that_are_erased_later_are_proven(store: Path) -> None:
    one, both = purge(store, "one"), purge(store, "one", "two")
    api.erase(store, [one])  # keeps proofs of the other purge, too, which names no copy yet
    api.erase(store, [both])
    opened = Store.open(store)
    copies = read_tombstones(opened, both + COPIES).ids
    assert len(copies)
    found = receipt(store, both)
    assert found.ok and found.copies == len(copies)
    assert len(found.salted_chunks) == found.chunks == len(tombstones_of(opened, both))
    (store / "left.txt").write_text(VERSION)
    assert not receipt(store, both).ok
    assert receipt(store, one).ok
    assert api.verify(store).ok


def test_vectors_of_an_encoder_that_came_later_are_proven(store: Path, tmp_path: Path) -> None:
    one, both = purge(store, "one"), purge(store, "one", "two")
    api.erase(store, [one])
    api.embed(store, encoder=str(make_encoder(tmp_path / "late", seed=5)))
    opened = Store.open(store)
    victim = int(read_tombstones(opened, both).ids.max())
    entry = opened.state.part_file("embeddings", victim >> parts.PART_SHIFT, "late")
    assert entry is not None
    vector = vectors.read_vectors(opened, entry)[victim & 0xFFFFFFFF].tobytes()
    assert np.frombuffer(vector, np.float16).any()
    api.erase(store, [both])
    assert receipt(store, both).ok
    (store / "left.bin").write_bytes(vector)
    assert {trace.kind for trace in receipt(store, both).searched.left} == {"vector16"}  # type: ignore[union-attr]


def test_each_purge_names_its_own_copies(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after what held the originals, nothing but its own purge tells that a copy is still there."""
    one, two = purge(store, "one"), purge(store, "two")

    def first_part(stage: EraseStage | ProveStage, opened: Store, run: Run, workers: int) -> None:
        if isinstance(stage, ProveStage):
            return execute(stage, opened, run, workers=workers)
        task = next(task for task in stage.plan(opened) if task.inputs.get("part") == 0)
        staging.stage(opened.root, stage.open(opened)(task, run.id, lambda _: None))
        folding.fold(opened, run)
        raise OSError("killed")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):
        patched.setattr("retrotool.purge.erase_run.engine.execute", first_part)
        api.erase(store, [one, two])
    opened = Store.open(store)
    assert len(read_tombstones(opened, two + COPIES)) and not len(read_tombstones(opened, one + COPIES))
    api.erase(store, [two])
    opened = Store.open(store)
    copies = read_tombstones(opened, two + COPIES).ids
    n_tokens = parts.read_chunks(opened, 1).n_tokens
    assert not n_tokens[copies & 0xFFFFFFFF].any()
    (store / "left.txt").write_text(VERSION)
    assert not receipt(store, two).ok


@pytest.mark.parametrize("kind", ["proofs", "tombstones"])
def test_evidence_that_is_not_what_the_log_says_is_no_proof(store: Path, kind: str) -> None:
    """Another file of the same size, whole in itself, such as one of another purge."""
    one = purge(store, "one")
    api.erase(store, [one])
    assert receipt(store, one).ok
    (path,) = (store / kind).glob(f"{one}[-.]*")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"parquet-cpp-arrow")  # who wrote it: no reader checks that
    data[at : at + 7] = b"PARQUET"
    path.write_bytes(data)
    found = receipt(store, one)
    assert not found.ok and any("by SHA-256" in problem and kind in problem for problem in found.problems)


def test_a_part_is_read_once_for_all_purges_and_not_again_after_a_kill(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {row["id"] for row in parts.read_documents(Store.open(store), 0, ["id"]).to_pylist()}
    purges = [purge(store, name) for name in sorted(ids)]
    everything = api.purge(store, api.Selectors(where="n_tokens > 0"), reason="test").purge
    drawn: list[int] = []
    of_part = Draw.of_part

    def one_part(draw: Draw, part: int, *arguments: Any) -> Any:
        if drawn:
            raise OSError("killed")
        drawn.append(part)
        return of_part(draw, part, *arguments)

    with monkeypatch.context() as patched, pytest.raises(TaskError, match="part 1 failed 3 times: OSError: killed"):
        patched.setattr(Draw, "of_part", one_part)
        api.erase(store, [*purges, everything])
    assert not any(record["erased"] for record in api.info(store).purges.values())

    def counted(draw: Draw, part: int, *arguments: Any) -> Any:
        drawn.append(part)
        return of_part(draw, part, *arguments)

    monkeypatch.setattr(Draw, "of_part", counted)
    api.erase(store, [*purges, everything])
    assert sorted(drawn) == [0, 1], "each part once"
    every = receipt(store, everything)
    assert every.ok and len(every.salted_chunks) == every.chunks
    few = [receipt(store, one) for one in purges]
    assert all(one.ok and len(one.salted_chunks) == one.chunks and one.searched for one in few)
    assert all(one.searched.needles["id"] == 1 for one in few if one.searched), "its own document's, and no other"
    (store / "left.txt").write_text(make_text(75, 120))
    assert [receipt(store, one).ok for one in purges].count(False) == 1
