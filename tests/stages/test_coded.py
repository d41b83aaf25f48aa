"""Coded indexes of a store of some thousand chunks: recall, growth, new trainings, joined and broken shards.

Vectors are made up: clusters of 32 dimensions, one set of clusters a source. They stand in files as an encoder would
have left them.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from conftest import Shared, rewrite_sums, times, write_jsonl
from memory_storage import MemoryFile
from oracle import at, read_plain
from stored import copy_store, path_in_store, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool import app as command_line
from retrotool.ann.choice import IndexOptions
from retrotool.ann.excluded import Queries
from retrotool.encoder import Encoder, Rows
from retrotool.errors import CorruptError, UsageError
from retrotool.index import recall
from retrotool.index import run as index_run
from retrotool.index import stage as index_stage
from retrotool.index.index_records import IndexFiles
from retrotool.index.run import Options, describe
from retrotool.index.searching import Database, Point
from retrotool.store.state import State
from retrotool.store.store import Store

pytestmark = pytest.mark.slow

SOURCES = ("books", "forum", "manual")
PER_SOURCE = 3400
CODED = IndexOptions(factory="OPQ16,IVF64,PQ16")
PLAIN = IndexOptions(nlist=32, code="sq8")
FEW, SOME = 200, times(600, 2000)
"""Queries of a recall that nothing here depends on, and of one that is compared with another."""


def made_up(seed: int, n: int, d: int = 32) -> np.ndarray:
    """Vectors around 40 centres of their own, which leave some directions nearly empty."""
    rng = np.random.default_rng(seed)
    shape = np.geomspace(2, 0.2, d)
    centres = rng.normal(size=(40, d)) * 1.5
    return ((centres[rng.integers(0, 40, n)] + rng.normal(size=(n, d))) * shape).astype(np.float16)


@pytest.fixture(scope="module")
def made(shared: Shared[dict[str, Path]], tiny_encoder: Path) -> dict[str, Path]:
    """Stores of the same documents, by source and shuffled; and the inputs, one a source."""
    return shared("coded", lambda root: make_stores(root, tiny_encoder))


def make_stores(root: Path, encoder: Path) -> dict[str, Path]:
    rows: list[dict[str, Any]] = []
    inputs = {}
    for source in SOURCES:
        mine = [{"id": f"{source}-{i}", "text": f"word{i} of {source}", "source": source} for i in range(PER_SOURCE)]
        inputs[source] = write_jsonl(root / f"{source}.jsonl", mine)
        rows += mine
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = write_jsonl(root / "shuffled.jsonl", [rows[i] for i in order])
    stores = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, files in (("sorted", [inputs[s] for s in SOURCES]), ("shuffled", [shuffled])):
            stores[name] = root / name
            api.chunk(stores[name], [str(file) for file in files], tokenizer=str(encoder), part_size=1500)
            embed_by_id(patch, stores[name], encoder)
    return {**stores, **{f"{source} input": path for source, path in inputs.items()}}


def embed_by_id(patch: pytest.MonkeyPatch, store: Path, encoder: Path) -> None:
    """Embed what is new with the vectors that documents have by their ids."""
    table = {s: made_up(i, 3 * PER_SOURCE) for i, s in enumerate((*SOURCES, "late", "other"))}
    opened = Store.open(store)
    have = set(opened.state.group("embeddings", "tiny"))
    names = []
    for part in api.info(store).parts:
        if f"{part['part']:06d}" not in have:
            import pyarrow.parquet as pq

            names += pq.read_table(stored_file(store, part["documents"]["path"]))["id"].to_pylist()
    waiting = iter(names)

    def vectors(
        _: Encoder, blocks: Iterable[Rows], report: Callable[[int], object] = lambda _: None
    ) -> Iterator[np.ndarray]:
        for rows in blocks:
            mine = [next(waiting).rsplit("-", 1) for _ in range(len(rows))]
            report(len(rows))
            yield np.stack([table[source][int(number)] for source, number in mine])

    patch.setattr(Encoder, "vectors", vectors)
    patch.setattr(Encoder, "verify", lambda encoder, _: setattr(encoder, "cosine", 1.0))
    api.embed(store, encoder=str(encoder))


@pytest.fixture(autouse=True)
def few_queries_of_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair, which has no option for it, measures recall with few queries, too."""
    monkeypatch.setattr("retrotool.repair.run.RECALL_SAMPLE", FEW)


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    return copy_store(made["sorted"], tmp_path / "store")


@pytest.fixture(scope="module")
def built(shared: Shared[Path], made: dict[str, Path]) -> Path:
    def build(folder: Path) -> Path:
        store = copy_store(made["sorted"], folder / "store")
        api.index(store, options=Options(dataclasses.replace(CODED, shard_rows=4000), sample=SOME))
        return store

    return shared("coded index", build)


@pytest.fixture
def built_copy(built: Path, tmp_path: Path) -> Path:
    return copy_store(built, tmp_path / "store")


def true_recall(store: Path, name: str | None = None, k: int = 10, q: int = 500) -> float:
    """Recall@k at the operating point by a brute force of its own, on other queries than retrotool's."""
    database = Database(Store.open(store), name)
    plain = read_plain(store, purged=frozenset(database.tombstones.ids.tolist()))
    alive = np.flatnonzero(plain.live)
    chosen = np.sort(np.random.default_rng(99).choice(alive, min(q, len(alive)), replace=False))
    vectors = plain.vectors[chosen]
    d = (vectors**2).sum(1)[:, None] + (plain.vectors**2).sum(1)[None] - 2 * vectors @ plain.vectors.T
    d[:, ~plain.live] = np.inf
    d[np.arange(len(chosen)), chosen] = np.inf  # every document is one chunk
    best = np.argpartition(d, k, axis=1)[:, :k]
    from retrotool.ann.excluded import Excluded

    ids = plain.ids[chosen]
    found = database.search(Queries(vectors, Excluded(ids, ids)), k)
    return float(np.mean([len(set(f) & set(plain.ids[b])) / k for f, b in zip(found.ids, best, strict=True)]))


def test_the_printed_recall_is_the_true_one_and_the_same_in_any_order(made: dict[str, Path], tmp_path: Path) -> None:
    results = {}
    for order in ("sorted", "shuffled"):
        store = copy_store(made[order], tmp_path / order)
        results[order] = api.index(store, options=Options(CODED, sample=SOME))
        assert results[order].target_met and results[order].recall_at_10 >= 0.95
        assert results[order].bytes_per_vector == 24
        assert abs(true_recall(store) - results[order].recall_at_10) <= 0.015
        assert results[order].recall_at_1 >= results[order].recall_at_10 >= 0.95
        assert api.verify(store).problems == []
    assert abs(results["sorted"].recall_at_10 - results["shuffled"].recall_at_10) <= 0.02
    groups = results["sorted"].groups
    assert set(groups["source"]) == set(SOURCES) and set(groups["part"]) == {"trained on"}
    assert sum(q for _, _, q in groups["source"].values()) == results["sorted"].queries == SOME


def test_the_curve_rises_and_the_point_is_the_cheapest_that_holds(built: Path) -> None:
    result = describe(Store.open(built), "main")
    by_depth: dict[int, list[Any]] = {}
    for point in result.curve:
        by_depth.setdefault(point.depth, []).append(point)
    for points in by_depth.values():
        assert [p.nprobe for p in points] == sorted(p.nprobe for p in points)
        assert all(a.recall_at_10 <= b.recall_at_10 + 0.01 for a, b in itertools.pairwise(points))
        assert all(a.scanned < b.scanned for a, b in itertools.pairwise(points))
    good = [p for p in result.curve if p.recall_at_10 - p.error >= 0.95]
    chosen = next(p for p in result.curve if (p.nprobe, p.depth) == (result.nprobe, result.depth))
    assert chosen in good and all(chosen.cost <= p.cost for p in good)


def test_the_curve_begins_where_lists_contain_enough_and_misses_no_point(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(tune=True, sample=FEW)
    short = api.index(built_copy, options=options)
    monkeypatch.setattr(recall.RecallSearch, "lists_needed", lambda *_: 1)
    whole = api.index(built_copy, options=options)
    assert (short.nprobe, short.depth, short.recall_at_10) == (whole.nprobe, whole.depth, whole.recall_at_10)
    found = [{(point.nprobe, point.depth): point.recall_at_10 for point in result.curve} for result in (short, whole)]
    assert found[0].items() < found[1].items()


def test_tuning_does_not_build(built_copy: Path) -> None:
    before = api.info(built_copy).indexes["main"]
    low = api.index(built_copy, target_recall=0.7, options=Options(sample=SOME))
    assert low.shards == len(before["shards"]) and api.info(built_copy).indexes["main"]["shards"] == before["shards"]
    assert (low.nprobe, low.depth) < (before["nprobe"], before["depth"])
    again = api.index(built_copy, options=Options(tune=True, sample=SOME))
    assert (again.nprobe, again.depth, again.queries, again.target) == (low.nprobe, low.depth, SOME, 0.7)
    assert abs(again.recall_at_10 - low.recall_at_10) <= again.recall_error + low.recall_error
    commit = again.commit
    assert api.index(built_copy, target_recall=0.7, options=Options(sample=SOME)).commit == commit, (
        "nothing is left to do"
    )
    assert api.index(built_copy, target_recall=0.7, options=Options(tune=True, sample=FEW)).commit > commit


def test_what_was_asked_for_is_kept_until_something_else_is(built_copy: Path) -> None:
    low = api.index(built_copy, target_recall=0.7, options=Options(sample=FEW))
    again = api.index(built_copy, options=Options(sample=FEW))
    assert (again.target, again.commit) == (0.7, low.commit)
    again = api.index(built_copy, options=Options(IndexOptions(memory=10**9), retrain=True, sample=FEW))
    assert (again.target, again.factory) == (0.7, CODED.factory)
    other = api.index(built_copy, options=Options(IndexOptions(nlist=8, code="sq8"), retrain=True, sample=FEW))
    assert other.factory == "IVF8,SQ8"
    third = api.index(built_copy, options=Options(retrain=True, sample=FEW))
    assert third.factory == "IVF8,SQ8"
    trained = Store.open(built_copy).state.file("index", "trained.g3", "main")
    assert trained is not None and trained.about is not None
    assert trained.about["asked"] == {"memory": 10**9, "nlist": 8, "code": "sq8", "shard_rows": 4000}


@pytest.mark.parametrize(
    "given",
    [
        ("--drop", "--name", "main", "--memory", "1GB"), ("--drop", "--name", "main", "--tune"),
        ("--drop", "--nlist", "4"), ("--drop", "--target-recall", "0.9"), ("--drop", "--shard", "0/2"),
        ("--retrain", "--merge"), ("--retrain", "--shard", "0/2"),
    ],
)  # fmt: skip
def test_options_that_would_be_ignored_are_refused(
    built: Path, given: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    before = Store.open(built).state.number
    with pytest.raises(SystemExit) as end:
        command_line.app(["index", str(built), *given], prog_name="retrotool")
    assert end.value.code == 2
    reported = capfd.readouterr().err
    assert all(option in reported for option in given if option in ("--retrain", "--drop"))
    assert Store.open(built).state.number == before


def test_an_operating_point_can_be_given(built: Path) -> None:
    database = Database(Store.open(built))
    plain = read_plain(built)
    queries = Queries.plain(plain.vectors[:50])
    everything = database.search(queries, 10, Point(64, 400))
    exact = np.argsort(((plain.vectors[:50, None] - plain.vectors[None]) ** 2).sum(-1), axis=1)[:, :10]
    assert (everything.ids == plain.ids[exact]).mean() > 0.99
    little = database.search(queries, 10, Point(1, 10))
    assert (little.ids == plain.ids[exact]).mean() < 0.9


def grow(store: Path, encoder: Path, source: str = "late", first: int = 0, n: int = 2500) -> None:
    """More documents: of clusters that the training did not see, unless its source is one of those."""
    numbers = range(first, first + n)
    rows = [{"id": f"{source}-{i}", "text": f"word{i} of {source}", "source": source} for i in numbers]
    api.chunk(store, [str(write_jsonl(store.parent / f"{source}.jsonl", rows))], part_size=1500)
    with pytest.MonkeyPatch.context() as patch:
        embed_by_id(patch, store, encoder)


def test_what_is_added_and_purged_is_found_as_well_as_in_a_fresh_index(
    built_copy: Path, made: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    grow(built_copy, tiny_encoder)
    before = set(api.info(built_copy).indexes["main"]["shards"])
    result = api.index(built_copy, options=Options(sample=SOME))
    assert result.added == 2500 and result.vectors == 3 * PER_SOURCE + 2500
    assert before < set(api.info(built_copy).indexes["main"]["shards"]), "old shards are left alone"
    assert result.drift is not None and result.drift.new == 2500
    assert result.drift.error > 1.15 and "times as far from their centroids" in result.drift.retrain_reason
    assert "recall@10 of vectors added since training" in result.retrain_reason, "which says more"
    assert set(result.groups["part"]) == {"trained on", "added since"}
    fresh = api.index(built_copy, name="fresh", options=Options(CODED, sample=SOME))
    assert fresh.retrain_reason == ""
    assert abs(true_recall(built_copy, "main") - true_recall(built_copy, "fresh")) <= 0.02
    targets = [f"{s}-{i}" for s in SOURCES for i in range(0, PER_SOURCE, 5)]
    (tmp_path / "ids").write_text("\n".join(targets))
    api.purge(built_copy, api.Selectors(document=tmp_path / "ids"), reason="test")
    purged = set(Database(Store.open(built_copy)).tombstones.ids.tolist())
    assert len(purged) == len(targets)
    assert true_recall(built_copy, "main") >= 0.94
    api.purge(built_copy, api.Selectors(document=tmp_path / "ids"), reason="test", erase=True)
    assert not any(
        purged & set(shard.ids(number).tolist())
        for shard in Database(Store.open(built_copy), "main").shards
        for number in range(64)
    )
    assert api.verify(built_copy).problems == []
    left = 3 * PER_SOURCE + 2500 - len(targets)
    assert api.index(built_copy, name="main", options=Options(sample=SOME)).vectors == left
    assert true_recall(built_copy, "main") >= 0.94


def test_purged_vectors_that_a_training_left_out_are_no_growth_of_the_index(
    copy: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    targets = [f"{s}-{i}" for s in SOURCES for i in range(PER_SOURCE) if i % 6]
    (tmp_path / "ids").write_text("\n".join(targets))
    api.purge(copy, api.Selectors(document=tmp_path / "ids"), reason="test")
    made = api.index(copy, options=Options(PLAIN, sample=FEW))
    assert made.vectors == 3 * PER_SOURCE, "a purge can be undone"
    grow(copy, tiny_encoder, "books", PER_SOURCE, 1500)
    grown = api.index(copy, options=Options(sample=FEW)).drift
    assert grown is not None and (grown.new, grown.vectors, grown.retrain_reason) == (1500, 3 * PER_SOURCE + 1500, "")
    assert grown.grown == pytest.approx(1 + 1500 / (3 * PER_SOURCE))


def test_a_new_training_takes_the_place_of_the_old_in_one_commit(
    built_copy: Path, made: dict[str, Path], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(built_copy, tiny_encoder)
    old = api.info(built_copy).indexes["main"]

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):  # all is built, and not switched yet
        patch.setattr(index_run, "measure_until_committed", stop)
        api.index(built_copy, options=Options(PLAIN, retrain=True, sample=FEW))
    between = api.info(built_copy).indexes["main"]
    assert (between["trained"], between["shards"]) == (old["trained"], old["shards"])
    assert api.verify(built_copy).problems == []
    true_recall(built_copy)
    begun = Store.open(built_copy).state.file("index", "trained.g1", "main")
    result = api.index(built_copy, options=Options(PLAIN, retrain=True, sample=FEW))
    assert Store.open(built_copy).state.file("index", "trained.g1", "main") == begun, "it goes on where it stopped"
    assert result.vectors == 3 * PER_SOURCE + 2500 and result.retrain_reason == ""
    now = api.info(built_copy).indexes["main"]
    assert now["generation"] == 1 and set(now["shards"]).isdisjoint(old["shards"])
    assert not any(stored_file(built_copy, path).exists() for path in (*old["shards"], old["trained"]))
    assert api.verify(built_copy).problems == []
    third = api.index(built_copy, options=Options(IndexOptions(nlist=8, code="sq8"), retrain=True, sample=FEW))
    assert third.factory == "IVF8,SQ8" and api.info(built_copy).indexes["main"]["generation"] == 2
    assert api.verify(built_copy).problems == []


def test_small_shards_are_joined_and_give_the_same(built_copy: Path, made: dict[str, Path], tiny_encoder: Path) -> None:
    for source in ("late", "other"):
        grow(built_copy, tiny_encoder, source, n=300)
        result = api.index(built_copy, options=Options(sample=FEW))
    state = Store.open(built_copy).state
    further = [slot for slot in IndexFiles(state, "main").shards if re.fullmatch(r"shard-\d{4}\.\d", slot)]
    assert further
    queries = Queries.plain(read_plain(built_copy).vectors[::50])
    before = Database(Store.open(built_copy)).search(queries, 10)
    joined = api.index(built_copy, options=Options(merge=True, sample=FEW))
    after = Database(Store.open(built_copy)).search(queries, 10)
    assert joined.shards == result.shards - len(further) and joined.vectors == result.vectors
    assert joined.drift is not None and result.drift is not None
    reported, before_it = (dataclasses.replace(drift, imbalance=0) for drift in (joined.drift, result.drift))
    assert reported == before_it and reported.new == 600, "parts are reported apart in a joined shard, too"
    assert np.array_equal(before.ids, after.ids)
    assert api.verify(built_copy).problems == []
    assert api.index(built_copy, options=Options(merge=True, sample=FEW)).commit == joined.commit


def test_a_broken_shard_is_not_merged(built_copy: Path, made: dict[str, Path], tiny_encoder: Path) -> None:
    """Its codes, or ids, would get a right sum."""
    for source in ("late", "other"):
        grow(built_copy, tiny_encoder, source, n=300)
        api.index(built_copy, options=Options(sample=FEW))
    further = [slot for slot in IndexFiles(Store.open(built_copy).state, "main").shards if slot.count(".")]
    for slot, place in ((further[0], -8), (further[0].split(".")[0], -2000)):
        store = copy_store(built_copy, built_copy.parent / f"broken{place}")
        path = stored_file(store, IndexFiles(Store.open(store).state, "main").shards[slot].path)
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=path.name) as error:
            api.index(store, options=Options(merge=True, sample=FEW))
        assert error.value.exit_code == 12 and "retrotool verify" in error.value.advice
        assert api.repair(store).ok
        assert api.index(store, options=Options(merge=True, sample=FEW)).vectors == 3 * PER_SOURCE + 600
        assert api.verify(store).problems == []


def break_shard(store: Path, how: str) -> Path | MemoryFile:
    path = shard_file(store, 1)
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "bits": b"x" + data[1:], "empty": b""}[how])
    return path


@pytest.mark.parametrize("how", ["gone", "cut", "bits", "empty"])
def test_a_broken_shard_is_named_left_out_if_asked_to_and_mended(
    built_copy: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = api.info(built_copy).indexes["main"]
    path = break_shard(built_copy, how)
    queries = Queries.plain(read_plain(built_copy).vectors[:20])
    with pytest.raises(CorruptError, match=path.name) as error:
        Database(Store.open(built_copy)).search(queries, 10)
    assert error.value.exit_code == 12 and "retrotool verify" in error.value.advice

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            command_line.app([str(a) for a in arguments], prog_name="retrotool")
        return int(end.value.code or 0), *capfd.readouterr()

    assert run("search", built_copy, "word")[0] == 12
    code, out, err = run("search", built_copy, "word", "--allow-missing-shards")
    share = Store.open(built_copy).state.file("index", "shard-0001", "main").rows / before["vectors"]  # type: ignore[union-attr]
    assert code == 0 and out and f"{100 * share:.2f} % of the index" in err and "retrotool repair" in err
    reported = json.loads(run("search", built_copy, "word", "--allow-missing-shards", "--json")[1])
    assert reported["missing"]["shards"] == [path_in_store(built_copy, path)]
    assert reported["missing"]["share"] == pytest.approx(share)
    assert api.repair(built_copy).ok
    after = api.info(built_copy).indexes["main"]
    assert (after["vectors"], len(after["shards"])) == (before["vectors"], len(before["shards"]))
    assert api.verify(built_copy).problems == []


def test_a_shard_that_names_a_chunk_that_is_not_there_is_corrupt(built_copy: Path) -> None:
    break_shard(built_copy, "bits")
    shard = shard_file(built_copy, 0)
    index = faiss.deserialize_index(np.frombuffer(shard.read_bytes(), np.uint8))
    ivf = faiss.extract_index_ivf(index)
    ids = np.arange(ivf.invlists.list_size(0), dtype=np.int64) + (np.int64(77) << 32)
    codes = np.zeros((len(ids), ivf.code_size), np.uint8)
    ivf.invlists.update_entries(0, 0, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    shard.write_bytes(faiss.serialize_index(index).tobytes())
    rewrite_sums(shard)
    queries = Queries.plain(read_plain(built_copy).vectors[:300])
    with pytest.raises(CorruptError, match="refers to chunk"):
        Database(Store.open(built_copy), allow_missing=True).search(queries, 10, Point(64, 4000))


def shard_file(store: Path, number: int) -> Path | MemoryFile:
    return stored_file(store, str(api.info(store).indexes["main"]["shards"][number]))


def test_swapped_codes_are_found_by_verify(built_copy: Path) -> None:
    """A shard whose sum is right, as the log has it, but whose codes are of other vectors."""
    store = Store.open(built_copy)
    entry = IndexFiles(store.state, "main").shards["shard-0000"]
    index = faiss.read_index(str(at(built_copy, entry.path)))
    ivf = faiss.extract_index_ivf(index)
    for number in range(64):
        n = ivf.invlists.list_size(number)
        ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), n).copy()
        codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), n * ivf.code_size).copy()[::-1].copy()
        if n:
            ivf.invlists.update_entries(number, 0, n, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    from retrotool.index.searching import write_index
    from retrotool.store.folding import writing
    from retrotool.store.log import Draft
    from retrotool.store.paths import FileName

    with writing(store) as run:
        name = FileName.new(run.id, "index", "shard-0000", "faiss", "main")
        written = write_index(store, index, name, entry.about)
        store.commit(run, lambda _: Draft("index", add=(written,), remove=(entry.path,)))
    assert any(
        "has vectors that differ from the embeddings" in problem.text for problem in api.verify(built_copy).problems
    )


def test_indexes_have_names_a_default_and_an_end(built_copy: Path) -> None:
    api.index(built_copy, name="exact", options=Options(IndexOptions(nlist=0), default=True, sample=FEW))
    assert Database(Store.open(built_copy)).name == "exact"
    assert Database(Store.open(built_copy), "main").name == "main"
    with pytest.raises(UsageError, match="no index 'nought'"):
        Database(Store.open(built_copy), "nought")
    dropped = index_run.drop(built_copy, name="exact")
    assert dropped.files == 3 and not stored_files(built_copy, "index/exact/*")
    assert Database(Store.open(built_copy)).name == "main"
    with pytest.raises(UsageError, match="no index 'exact'"):
        index_run.drop(built_copy, name="exact")
    assert api.verify(built_copy).problems == []
    again = api.index(built_copy, name="exact", options=Options(IndexOptions(nlist=0), sample=FEW))
    assert again.recall_at_10 == 1.0 and api.verify(built_copy).problems == []


def test_an_index_that_is_there_is_not_another_one_in_silence(built_copy: Path) -> None:
    with pytest.raises(UsageError, match="already trained, as OPQ16,IVF64,PQ16") as error:
        api.index(built_copy, options=Options(IndexOptions(nlist=32), sample=FEW))
    assert "--retrain" in error.value.advice
    with pytest.raises(UsageError, match="combined"):
        api.index(built_copy, options=Options(merge=True, retrain=True, sample=FEW))


def test_parts_without_embeddings_are_left_out_and_counted(copy: Path, made: dict[str, Path]) -> None:
    rows = [{"id": f"new-{i}", "text": f"new{i}"} for i in range(30)]
    api.chunk(copy, [str(write_jsonl(copy.parent / "new.jsonl", rows))])
    result = api.index(copy, options=Options(PLAIN, sample=FEW))
    assert (result.vectors, result.not_embedded) == (3 * PER_SOURCE, 30)
    assert "embed" in result.next[0]


@pytest.mark.parametrize("where", ["in the sample", "later"])
def test_a_vector_that_is_no_number_is_named(copy: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "later":  # as if the training had not drawn it
        draw = index_stage.draw_vectors

        def drawn(*arguments: Any) -> np.ndarray:
            with monkeypatch.context() as patch:
                patch.setattr(index_stage, "check_finite", lambda *_: None)
                return np.nan_to_num(draw(*arguments))

        monkeypatch.setattr(index_stage, "draw_vectors", drawn)
    part = api.info(copy).parts[2]
    path = stored_file(copy, part["embeddings"]["tiny"]["path"])
    vectors = np.load(path)
    vectors[7, 3] = np.nan
    np.save(data := io.BytesIO(), vectors)
    path.write_bytes(data.getvalue())
    rewrite_sums(path)
    with pytest.raises(CorruptError, match=r"part 2 are not finite: row 7$"):
        api.index(copy, options=Options(IndexOptions(factory="IVF64,SQ8"), sample=FEW))
    assert "main" not in Store.open(copy).state.with_prefix("index:")


def test_recall_from_a_sample_of_the_store_is_about_that_of_all(
    built_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.index(built_copy, target_recall=0.8, options=Options(sample=1000))
    find_truth = recall.find_truth

    def of_a_sample(*arguments: Any, **options: Any) -> recall.Truth:
        with monkeypatch.context() as patch:
            patch.setattr(recall, "BUDGET", 5_000_000)
            return find_truth(*arguments, **options)

    monkeypatch.setattr("retrotool.index.recall.find_truth", of_a_sample)
    sampled = api.index(built_copy, options=Options(tune=True, sample=1000))
    assert 0.3 < sampled.share < 0.5 and whole.share == 1
    (same,) = (p for p in sampled.curve if (p.nprobe, p.depth) == (whole.nprobe, whole.depth))
    assert same.error > whole.recall_error
    assert abs(same.recall_at_10 - whole.recall_at_10) <= 2 * (same.error + whole.recall_error)


@pytest.mark.parametrize("memory", [1 << 30, 2_000_000, 500_000, 1])
def test_memory_chooses_the_code(copy: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrotool.ann.choice.FLAT_LIMIT", 5000)
    monkeypatch.setattr("retrotool.ann.choice.DEFAULT_CODE", 16)
    result = api.index(copy, options=Options(IndexOptions(memory=memory), sample=FEW))
    size = result.vectors * result.bytes_per_vector + result.trained_bytes
    assert size <= memory or result.factory.endswith("PQ8")
    assert ("read from disk" in result.why) == (size > memory)
    assert api.verify(copy).problems == []


@pytest.mark.parametrize("n", [1, 10, 300])
@pytest.mark.parametrize("kind", ["copies", "zeros", "apart"])
def test_small_and_degenerate_stores(tmp_path: Path, tiny_encoder: Path, n: int, kind: str) -> None:
    rows = [{"id": f"d-{i}", "text": f"word{i}"} for i in range(n)]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "in.jsonl", rows))], tokenizer=str(tiny_encoder))
    vectors = {"copies": np.ones((n, 32)), "zeros": np.zeros((n, 32)), "apart": made_up(0, n)}[kind]

    def given(_: Encoder, blocks: Iterable[Rows], report: Callable[[int], object] = print) -> Iterator[np.ndarray]:
        start = 0
        for some in blocks:
            yield vectors[start : start + len(some)].astype(np.float16)
            start += len(some)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "vectors", given)
        patch.setattr(Encoder, "verify", lambda encoder, _: setattr(encoder, "cosine", 1.0))
        api.embed(store, encoder=str(tiny_encoder))
    for name, wanted in (
        ("main", IndexOptions()),
        ("lists", IndexOptions(nlist=min(n, 4))),
        ("half", IndexOptions(nlist=1, code="float16")),
    ):
        result = api.index(store, name=name, options=Options(wanted, sample=FEW))
        assert result.vectors == n
        found = Database(Store.open(store), name).search(Queries.plain(vectors[:5].astype(np.float32)), 3)
        assert (found.ids[:, 0] >= 0).all() and (found.distances[:, 0] <= 1e-3).all()
    if kind != "zeros":  # which are what an erase leaves
        assert api.verify(store).problems == []
    if n > 1:
        with pytest.raises(UsageError, match="product codes need 9,984 vectors"):
            api.index(store, name="coded", options=Options(IndexOptions(nlist=1, code="pq8"), sample=FEW))


def test_a_store_whose_chunks_are_all_purged_finds_nothing(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    rows = [{"id": "a", "text": "word"}]
    api.chunk(store, [str(write_jsonl(tmp_path / "in.jsonl", rows))], tokenizer=str(tiny_encoder))
    with pytest.raises(UsageError, match="no embeddings"):
        api.index(store, options=Options(sample=FEW))
    api.embed(store, encoder=str(tiny_encoder))
    (tmp_path / "ids").write_text("a\n")
    api.purge(store, api.Selectors(document=tmp_path / "ids"), reason="test")
    result = api.index(store, options=Options(sample=FEW))
    assert (result.vectors, result.recall_at_10) == (1, 1.0)
    assert retrotool.open(store).search("word", encoder=retrotool.open(store).load_encoder()) == []


def test_a_generation_that_was_given_up_is_taken_away(built_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_run, "measure_until_committed", lambda *_, **__: None)
    api.index(built_copy, options=Options(PLAIN, retrain=True, sample=FEW))

    def files(state: State) -> set[str]:
        return {slot for slot in state.group("index", "main") if slot.endswith(".g1")}

    begun = Store.open(built_copy).state.file("index", "trained.g1", "main")
    assert len(files(Store.open(built_copy).state)) >= 2 and begun is not None
    api.index(built_copy, options=Options(IndexOptions(nlist=8, code="sq8"), retrain=True, sample=FEW))
    other = Store.open(built_copy).state.file("index", "trained.g1", "main")
    assert other is not None and other.path != begun.path and (other.about or {})["factory"] == "IVF8,SQ8"
    assert api.verify(built_copy).problems == []
