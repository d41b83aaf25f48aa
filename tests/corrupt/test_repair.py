"""``verify`` names what repairs a damage, ``repair`` does it, and says what only a backup can bring back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Cli, Shared, times
from damage_help import Everything, make_everything
from forked import Forked
from stored import contents_of, copy_store, path_in_store, stored_file, stored_files
from test_corrupt_lies import Liar, with_value

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.index.run import Options
from retrotool.info.verify import Verification
from retrotool.repair import run as repair_run
from retrotool.store import tombstones
from retrotool.store.leases import Run
from retrotool.store.store import Store
from retrotool.store.sums import without_sums
from retrotool.store.tombstones import read_tombstones

DERIVED = (
    "embeddings/*/000000-*.npy", "embeddings/*/000001-*.npy.xxh3", "index/main/trained-*.faiss",
    "index/lists/trained-*.faiss", "index/lists/shard-0000-*.faiss", "index/main/shard-*.faiss.xxh3",
    "index/lists/recall-*", "neighbours/main/000001-*", "neighbours/text/000000-*",
)  # fmt: skip
BACKUP = (
    "documents", "chunks", "tombstones", "undone", "blocked", "quarantine", "plans", "inputs", "selectors",
    "tokenizer-*",
)  # fmt: skip
DIGESTS = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised", "chunks")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: tuple[Callable[[Any], object], ...] = (
    flip,
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.unlink(),
)


def digests(found: Verification) -> list[object]:
    return [getattr(found, name) for name in DIGESTS]


@pytest.fixture(scope="module")
def complete(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``built_store`` with one more index, and a table with tokens."""
    store = copy_store(built_store, tmp_path_factory.mktemp("complete") / "store")
    api.index(store, name="lists", options=Options(IndexOptions(nlist=4, code="sq8", shard_rows=200)))
    api.neighbours(store, name="text", index="lists", saved=4, materialise=True)
    return store


@pytest.mark.parametrize("shift", range(times(1, 3)))
def test_what_is_derived_from_chunks_is_rebuilt_and_nothing_else_is_touched(
    complete: Path, tmp_path: Path, shift: int, cli: Cli
) -> None:
    store = copy_store(complete, tmp_path / "store")
    good = api.verify(store)
    before = contents_of(store)
    damaged = [path_in_store(store, stored_files(store, pattern)[0]) for pattern in DERIVED]
    for number, path in enumerate(damaged, shift):
        DAMAGES[number % len(DAMAGES)](stored_file(store, path))
    named = {without_sums(path) for path in damaged}
    found = api.verify(store)
    assert {problem.path for problem in found.problems} == named
    changed = {name for name in DIGESTS if getattr(found, name) != getattr(good, name)}
    assert changed == {name for name in DIGESTS if not getattr(found, name)} >= {"embeddings", "indexes", "neighbours"}
    assert {problem.remedy for problem in found.problems} == {f"retrotool repair {store}"}
    assert f"remedy: retrotool repair {store}" in cli("verify", store).stdout
    tried = api.repair(store, dry_run=True)
    assert list(tried.remaining) == found.problems and not tried.repaired
    result = api.repair(store)
    assert result.ok and not result.remaining
    assert {one.path for one in result.repaired} == named
    same = {one.path for one in result.repaired if one.same}
    assert same == {path for path in named if path.endswith((".npy", ".faiss"))}
    assert digests(api.verify(store)) == digests(good)
    after = contents_of(store)
    touched = {path for path in before if after.get(path) != before[path]}
    assert {without_sums(path) for path in touched} <= named | {
        path for path in touched if path.startswith("index/main/recall-")
    }, "recall is measured again with the shards"


@pytest.fixture
def as_job() -> Iterator[Callable[[int, int], None]]:
    """Chooses which job of a shard this process is."""
    yield lambda job, jobs: api.use_engine(shard=(job, jobs))
    api.use_engine()


def damage(store: Path) -> set[str]:
    """Damage the files of ``DERIVED``; return their names."""
    damaged = [path_in_store(store, stored_files(store, pattern)[0]) for pattern in DERIVED]
    for number, path in enumerate(damaged):
        DAMAGES[number % len(DAMAGES)](stored_file(store, path))
    return {without_sums(path) for path in damaged}


def test_jobs_of_a_shard_repair_what_one_process_does(
    complete: Path, tmp_path: Path, as_job: Callable[[int, int], None]
) -> None:
    store = copy_store(complete, tmp_path / "store")
    good, before, named = api.verify(store), contents_of(store), damage(store)
    found = list[set[str]]()
    for job in range(4):
        as_job(job, 4)
        dry = api.repair(store, dry_run=True)
        found.append({problem.path for problem in dry.remaining})
        assert (dry.ok, dry.shard) == (not found[-1], f"{job}/4")
    assert set.union(*found) == named, "nothing is missed, and nothing sound is suspected"
    repaired = list[str]()
    for job in range(4):
        as_job(job, 4)
        result = api.repair(store)
        assert result.ok, result.remaining
        repaired += [one.path for one in result.repaired]
    assert sorted(repaired) == sorted(named), "once each"
    api.use_engine()
    assert digests(api.verify(store)) == digests(good)
    after = contents_of(store)
    touched = {without_sums(path) for path in before if after.get(path) != before[path]}
    assert {path for path in touched if not path.startswith("index/main/recall-")} <= named


@pytest.mark.on_disk
def test_jobs_of_a_shard_repair_at_once(complete: Path, tmp_path: Path) -> None:
    store = copy_store(complete, tmp_path / "store")
    good, named = api.verify(store), damage(store)
    arguments = ["repair", str(store), "--json", "--devices", "cpu"]
    jobs = [Forked([*arguments, "--shard", f"{job}/3"]) for job in range(3)]
    printed = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], printed
    results = [json.loads(output) for output, _ in printed]
    assert {one["path"] for result in results for one in result["repaired"]} == named
    assert digests(api.verify(store)) == digests(good)


@pytest.mark.on_disk
def test_what_only_a_backup_has_is_named_with_what_is_lost(
    shared: Shared[Everything], tiny_encoder: Path, tmp_path: Path
) -> None:
    made: Everything = shared("everything", lambda root: make_everything(root, tiny_encoder))
    store = copy_store(made.store, tmp_path / "store")
    files = {kind: stored_files(store, kind if "*" in kind else f"{kind}/*")[0] for kind in BACKUP}
    for file in files.values():
        flip(file)
    problems = api.verify(store).problems
    for kind, file in files.items():
        (problem, *_) = (one for one in problems if one.path == path_in_store(store, file))
        assert problem.remedy.startswith(f"Restore {problem.path} from a backup."), problem
        assert (problem.repairable, problem.kind) == (False, "store" if "*" in kind else kind)


@pytest.mark.on_disk
def test_sound_files_are_not_rebuilt_because_tombstones_are_damaged(
    shared: Shared[Everything], tiny_encoder: Path, tmp_path: Path
) -> None:
    made: Everything = shared("everything", lambda root: make_everything(root, tiny_encoder))
    store = copy_store(made.store, tmp_path / "store")
    for path in stored_files(store, "tombstones/*"):
        path.write_bytes(path.read_bytes()[:-9])
    tombstones._small.clear()  # a process reads small files once
    followed = [problem for problem in api.verify(store).problems if problem.kind == "index"]
    assert followed, "without tombstones, shards can't be checked"
    assert all("may follow from the other problems" in problem.remedy for problem in followed)
    before = contents_of(store)
    result = api.repair(store)
    assert not result.ok and not result.repaired and contents_of(store) == before


def test_of_damaged_text_the_parts_documents_and_inputs_are_named(store_copy: Path, cli: Cli, tmp_path: Path) -> None:
    store = Store.open(store_copy)
    part = store.state.parts()[1]
    files = {kind: store.state.part_file(kind, part) for kind in ("documents", "chunks")}
    rows = {kind: entry.rows for kind, entry in files.items() if entry is not None}
    said = f"part {part} is lost: {rows['documents']} documents, {rows['chunks']} chunks, from "
    corpus = str(pq.read_table(stored_file(store_copy, files["documents"].path))["input"][0])  # type: ignore[union-attr]
    for kind, beside in (("chunks", ""), ("documents", "the inputs of the parts beside it: ")):
        copy = copy_store(store_copy, tmp_path / kind)
        stored_file(copy, files[kind].path).unlink()  # type: ignore[union-attr]
        stored_files(copy, f"embeddings/tiny/{part:06d}-*.npy")[0].unlink()
        done = cli("repair", copy)
        assert done.returncode == 12
        assert f"{said}{beside}{corpus}. Then chunk all inputs into a new store." in done.stdout
        assert ("It can't be rebuilt: " in done.stdout) == (kind == "chunks"), "vectors need only the chunks"
        assert len(api.verify(copy).problems) == (2 if kind == "chunks" else 1)


def test_what_was_erased_stays_so_and_purged_chunks_are_not_found_again(store_copy: Path) -> None:
    api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="test", erase=True)
    api.purge(store_copy, api.Selectors(document=("doc-2",)), reason="test")
    for pattern in ("embeddings/*.npy", "neighbours/*", "index/*/shard-*.faiss"):
        for path in stored_files(store_copy, pattern):
            flip(path)  # type: ignore[arg-type]
    assert api.repair(store_copy).ok
    assert api.verify(store_copy).ok, "it would find a vector of an erased chunk"
    purged = read_tombstones(Store.open(store_copy)).ids
    tables = [pq.read_table(path)["ids"].combine_chunks() for path in stored_files(store_copy, "neighbours/*")]
    assert len(purged) and not np.isin(np.concatenate([ids.flatten().to_numpy() for ids in tables]), purged).any()


def test_training_that_can_not_be_repeated_becomes_a_new_generation(complete: Path, tmp_path: Path, cli: Cli) -> None:
    store = copy_store(complete, tmp_path / "store")
    api.purge(store, api.Selectors(document=("doc-1",)), reason="test")  # it was trained on, and no longer is
    path = stored_files(store, "index/lists/trained-*")[0]
    flip(path)  # type: ignore[arg-type]
    done = cli("repair", store)
    assert done.returncode == 0
    assert f"{path_in_store(store, path)}: removed: the index was trained again" in done.stdout
    assert Store.open(store).state.records["index:lists"]["generation"] == 1
    assert api.verify(store).ok


def test_a_damaged_checkpoint_is_replaced(store_copy: Path) -> None:
    with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1):
        api.purge(store_copy, api.Selectors(document=("doc-1",)), reason="test")
    path = stored_files(store_copy, "checkpoints/*")[0]
    flip(path)  # type: ignore[arg-type]
    assert api.verify(store_copy).ok, "it is only a cache"
    done = api.repair(store_copy)
    assert done.ok and [one.path for one in done.repaired] == [path_in_store(store_copy, path)]
    assert not path.exists() and stored_files(store_copy, "checkpoints/*")
    assert api.repair(store_copy).problems == ()


def test_vectors_that_are_not_finite_are_named_and_computed_again(
    store_copy: Path, tiny_encoder: Path, cli: Cli
) -> None:
    good = digests(api.verify(store_copy))
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        Liar(store, run).embeddings(with_value(np.nan, ([3, 5], 0)))
    part = int(
        next(slot for slot, entry in store.refresh().group("embeddings", "tiny").items() if run.id in entry.path)
    )
    said = f"vectors of part {part} are not finite: rows 3, 5"
    done = cli("embed", store_copy, "--encoder", tiny_encoder, "--check", "--devices", "cpu")
    assert done.returncode == 12 and said in done.stderr and f"retrotool repair {store_copy}" in done.stderr
    assert any(said in problem.text for problem in api.verify(store_copy).problems)
    assert api.repair(store_copy).ok
    assert digests(api.verify(store_copy)) == good
    assert cli("embed", store_copy, "--encoder", tiny_encoder, "--check", "--devices", "cpu").returncode == 0


def test_without_the_encoder_vectors_stay_damaged_and_the_reason_is_said(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    flip(stored_files(store_copy, "embeddings/*.npy")[0])  # type: ignore[arg-type]
    flip(stored_files(store_copy, "neighbours/*")[0])  # type: ignore[arg-type]
    found = repair_run.find_encoder
    monkeypatch.setattr(
        repair_run, "find_encoder", lambda *a, **k: (found(*a, **k)[0], replace(found(*a, **k)[1], sha256="0" * 64))
    )
    result = api.repair(store_copy)
    assert not result.ok
    (left,) = (problem for problem in result.remaining if problem.kind == "embeddings")
    assert "is not the one that embedded the store" in left.remedy and "--encoder DIR" in left.remedy
    monkeypatch.undo()
    assert api.repair(store_copy).ok


def test_a_foreign_encoder_and_a_closed_store_need_a_backup(store_copy: Path, cli: Cli) -> None:
    store = Store.open(store_copy)
    with Run(store.storage) as run:
        Liar(store, run).commit(**{"encoder:tiny": {**store.state.records["encoder:tiny"], "foreign": True}})
    path = stored_files(store_copy, "embeddings/*.npy")[0]
    flip(path)  # type: ignore[arg-type]
    assert api.verify(store_copy).problems[0].remedy.startswith("Restore embeddings/")
    stored_file(store_copy, "log/00000001.json").write_text("{}")
    done = cli("repair", store_copy, "--json")
    reported = json.loads(done.stdout)
    assert (done.returncode, reported["commit"], reported["ok"]) == (12, -1, False)
    assert "backup" in reported["remaining"][0]["remedy"]


def test_a_sound_store_is_left_alone(store_copy: Path, cli: Cli) -> None:
    before = contents_of(store_copy)
    done = cli("repair", store_copy)
    assert (done.returncode, done.stdout.startswith("Nothing is damaged (commit ")) == (0, True)
    assert contents_of(store_copy) == before
