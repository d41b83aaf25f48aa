"""A purge that is taken back leaves what there was, and what was made meanwhile is made good."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, write_jsonl
from oracle import saved_neighbours

import retrotool
from retrotool import RetroDataset, commands
from retrotool.ann.choice import Wanted
from retrotool.commands.indexing import Options
from retrotool.commands.purging import PurgeResult
from retrotool.commands.restoring import RestoreResult, restore
from retrotool.commands.writing import writing
from retrotool.errors import ConflictError, UsageError
from retrotool.stages import index as index_stage
from retrotool.stages import restore as restoring
from retrotool.stages.erase import EraseStage
from retrotool.stages.materialise import MaterialiseStage
from retrotool.store import staging
from retrotool.store.atomic import FileEntry
from retrotool.store.blocked import read_blocked
from retrotool.store.paths import FileName
from retrotool.store.restored import restored_chunks
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

SAME = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "documents", "chunks", "tokens")


def purge(store: Path, *names: str, erase: bool = False) -> PurgeResult:
    return commands.purge(store, commands.Selectors(document=names), reason="test", erase=erase)


def back(store: Path, purged: str) -> RestoreResult:
    return restore(store, purged, reason="it was another one")


def verified(store: Path) -> dict[str, object]:
    found = commands.verify(store)
    assert found.problems == []
    return {name: getattr(found, name) for name in SAME}


def near(store: Path, name: str = "main") -> list[list[int]]:
    """Ids of all living neighbours of all living chunks, nearest first."""
    reader = retrotool.open(store)
    ids = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    return [[chunk, *(i for i, _ in reader.neighbour_ids(chunk, name, 20))] for chunk in ids]


def exact(store: Path, scratch: Path, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """What exact search gives for a store as it is now, computed at once and elsewhere."""
    if scratch.exists():
        shutil.rmtree(scratch)
    shutil.copytree(store, scratch)
    commands.neighbours(scratch, name="truth", search=commands.neighbour_tables.SearchOptions(exact=True), **options)
    return saved_neighbours(scratch, "truth")


def assert_exact(store: Path, scratch: Path, name: str = "main") -> None:
    ids, distances = saved_neighbours(store, name)
    true_ids, true_distances = exact(store, scratch)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-3, atol=1e-3)
    assert (ids == true_ids).mean() > 0.999


def test_a_purge_that_is_taken_back_leaves_what_there_was(store_copy: Path) -> None:
    before, found = verified(store_copy), near(store_copy)
    totals = Store.open(store_copy).state.records["totals"]
    encoder = retrotool.open(store_copy).load_encoder()
    text = retrotool.open(store_copy).chunk(retrotool.open(store_copy).document("doc-7")[0]).text
    hits = [n.id for n in retrotool.open(store_copy).search(text, 20, encoder=encoder)]
    purged = purge(store_copy, "doc-7", "doc-30")
    assert verified(store_copy) != before and near(store_copy) != found
    result = back(store_copy, purged.purge)
    assert (result.chunks, result.documents, result.tokens) == (purged.chunks, purged.documents, purged.tokens)
    assert (result.still_purged, result.named_by, result.repeats, result.indexes, result.tables) == (0, (), 0, (), ())
    assert verified(store_copy) == before
    assert near(store_copy) == found
    assert [n.id for n in retrotool.open(store_copy).search(text, 20, encoder=encoder)] == hits
    state = Store.open(store_copy).state
    assert state.records["totals"] == totals
    record = state.records[f"purge:{purged.purge}"]
    assert record["restored"] == state.number == result.commit
    assert record["restored_reason"] == "it was another one" and record["restored_by"]
    assert not len(read_blocked(Store.open(store_copy)))
    assert [state.file(kind, purged.purge) for kind in ("tombstones", "blocked", "selectors")] == [None] * 3
    assert commands.neighbours(store_copy).queries == 0 and verified(store_copy) == before
    assert commands.info(store_copy).purges[purged.purge]["restored"] == result.commit


def test_exports_and_training_give_what_they_gave(store_copy: Path, tmp_path: Path) -> None:
    commands.neighbours(store_copy, materialise=True)

    def exported(name: str) -> list[dict[str, object]]:
        commands.export_neighbours(store_copy, tmp_path / name, format="parquet")
        return [row for path in sorted((tmp_path / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]

    def trained() -> list[list[int]]:
        dataset = RetroDataset(store_copy, sequence_length=256, shuffle=False)
        return [[*item["chunk_ids"].tolist(), *item["neighbours"].flatten().tolist()] for item in dataset]

    rows, items = exported("before"), trained()
    purged = purge(store_copy, "doc-7", "doc-30").purge
    assert exported("between") != rows and trained() != items
    back(store_copy, purged)
    assert exported("after") == rows and trained() == items
    assert commands.materialise(store_copy).made == 0, "what is materialised is as it was"


def test_what_was_materialised_meanwhile_is_not_fresh(store_copy: Path) -> None:
    commands.neighbours(store_copy, materialise=True)
    dataset = RetroDataset(store_copy, sequence_length=256, shuffle=False)
    before = [item["neighbours"].tolist() for item in dataset]
    purged = purge(store_copy, "doc-7").purge
    assert commands.materialise(store_copy).made > 0
    result = back(store_copy, purged)
    (told,) = result.tables
    assert told.parts == 0 and told.materialised > 0 and told.command.endswith("--materialise")
    shown = commands.info(store_copy).materialised["main"]
    assert shown["current"] == shown["parts"] - told.materialised
    again = RetroDataset(store_copy, sequence_length=256, shuffle=False)
    assert [item["neighbours"].tolist() for item in again] == before, "what is not fresh is not used"
    assert commands.materialise(store_copy).made > 0
    shown = commands.info(store_copy).materialised["main"]
    assert shown["current"] == shown["parts"]
    assert commands.materialise(store_copy).made == 0
    assert verified(store_copy)


def test_tables_made_meanwhile_are_searched_again(store_copy: Path, tmp_path: Path) -> None:
    found, before = near(store_copy), verified(store_copy)
    purged = purge(store_copy, "doc-7", "doc-30").purge
    commands.neighbours(store_copy, name="other")
    commands.neighbours(store_copy, k=19, saved=20)  # refills
    result = back(store_copy, purged)
    assert sorted(one.table for one in result.tables) == ["main", "other"]
    assert all(one.parts == 4 for one in result.tables if one.table == "other")
    assert commands.info(store_copy).neighbours["other"]["behind"] == 4
    for one in result.tables:
        words = one.command.split()[3:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        done = commands.neighbours(store_copy, name=options.get("--name", "main"), index=options["--index"])
        assert done.queries > 0
        assert "behind" not in commands.info(store_copy).neighbours[one.table]
    commands.neighbours(store_copy)
    assert near(store_copy) == found == near(store_copy, "other")
    assert {**verified(store_copy), "neighbours": ""} == {**before, "neighbours": ""}
    assert_exact(store_copy, tmp_path / "scratch")
    assert_exact(store_copy, tmp_path / "scratch", "other")


def test_an_index_made_meanwhile_is_completed(store_copy: Path, tmp_path: Path) -> None:
    wanted = Options(Wanted(nlist=4, code="sq8"), shard_rows=150)
    purged = purge(store_copy, "doc-7", "doc-100")
    commands.index(store_copy, name="lists", options=wanted)
    commands.neighbours(store_copy, name="lists", index="lists")
    shards = commands.info(store_copy).indexes["lists"]["shards"]
    assert len(shards) > 2
    result = back(store_copy, purged.purge)
    (lacks,) = result.indexes
    assert (lacks.name, lacks.chunks) == ("lists", purged.chunks)
    assert lacks.command == f"retrotool index {store_copy} --name lists"
    assert commands.info(store_copy).indexes["lists"]["lacking"] == purged.chunks
    assert "lacking" not in commands.info(store_copy).indexes["main"]
    assert verified(store_copy), "it is known what it lacks"
    reader = retrotool.open(store_copy)
    assert reader.database("lists").lacking() == purged.chunks
    # Searched before the index is complete, tables are not taken for complete afterwards.
    early = commands.neighbours(store_copy, name="lists", index="lists")
    assert early.not_indexed == purged.chunks and any("index" in command for command in early.next)
    assert commands.info(store_copy).neighbours["lists"]["behind"]
    merged = commands.index(store_copy, name="lists", options=Options(merge=True))
    assert merged.added == purged.chunks
    assert 0 < len(set(shards) - set(commands.info(store_copy).indexes["lists"]["shards"])) < len(shards)
    assert "lacking" not in commands.info(store_copy).indexes["lists"]
    done = commands.neighbours(store_copy, name="lists", index="lists")
    assert done.queries > 0 and done.not_indexed == 0
    assert "behind" not in commands.info(store_copy).neighbours["lists"]
    assert commands.neighbours(store_copy, name="lists", index="lists").queries == 0
    assert verified(store_copy)
    point = Store.open(store_copy).state.records["index:lists"]
    assert point["vectors"] == 366
    ids, true = saved_neighbours(store_copy, "lists")[0], exact(store_copy, tmp_path / "scratch")[0]
    again = restored_chunks(Store.open(store_copy), purged.purge)
    common = [len(set(row) & set(also)) for row, also in zip(ids.tolist(), true.tolist(), strict=True)]
    assert np.mean(common) > 19.5
    assert np.isin(ids, again).sum() > 0.95 * np.isin(true, again).sum() > 0


def test_an_index_of_which_nobody_knows_the_commit_is_made_anew(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = index_stage.write_index

    def forgetting(root: Path, made: Any, name: FileName, about: dict[str, Any]) -> FileEntry:
        return written(root, made, name, {key: value for key, value in about.items() if key != "commits"})

    monkeypatch.setattr(index_stage, "write_index", forgetting)
    purged = purge(store_copy, "doc-7")
    commands.index(store_copy, name="old", options=Options(Wanted(nlist=4, code="sq8")))
    monkeypatch.setattr(index_stage, "write_index", written)
    assert back(store_copy, purged.purge).indexes[0].chunks == purged.chunks
    assert commands.index(store_copy, name="old").vectors == 366
    assert "lacking" not in commands.info(store_copy).indexes["old"]
    assert verified(store_copy)


def test_appending_the_same_crawl_gives_what_it_gave_before(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = make_rows(12, words=60)
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    two = write_jsonl(tmp_path / "two.jsonl", [*rows, *make_rows(2, first=50, words=60)])
    plain, store = tmp_path / "plain", tmp_path / "store"
    for path in (plain, store):
        commands.chunk(path, [str(one)], tokenizer=str(tiny_encoder), part_size=8)
    purged = purge(store, "doc-3", "doc-8").purge
    back(store, purged)
    for path in (plain, store):
        commands.chunk(path, [str(two)], tokenizer=str(tiny_encoder), part_size=8)
    names = ("content", "ids", "tombstones", "documents", "chunks", "tokens")
    assert {n: verified(store)[n] for n in names} == {n: verified(plain)[n] for n in names}
    assert commands.info(store).documents == 14


def test_a_document_let_in_meanwhile_is_told_and_is_not_its_own_neighbour(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = make_rows(12, words=200)
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    two = write_jsonl(tmp_path / "two.jsonl", [{**rows[3], "text": rows[3]["text"] + " and more"}])
    store = tmp_path / "store"
    commands.chunk(store, [str(one)], tokenizer=str(tiny_encoder))
    purged = purge(store, "doc-3").purge
    commands.chunk(store, [str(two)], allow_purged=True)
    commands.embed(store, encoder=str(tiny_encoder))
    assert back(store, purged).repeats == 1
    commands.neighbours(store)
    reader = retrotool.open(store)
    versions = [
        int(i) for part in reader.parts() for i in reader.chunk_ids(part) if reader.chunk(int(i)).document == "doc-3"
    ]
    assert len(versions) > len(reader.document("doc-3"))
    for chunk in versions:
        assert not set(versions) & {i for i, _ in reader.neighbour_ids(chunk, k=20)}
    assert verified(store)


def test_what_another_purge_names_stays_purged(store_copy: Path) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    assert len(chunks) > 2
    one = commands.purge(store_copy, commands.Selectors(chunk=tuple(chunks[:2])), reason="test").purge
    two = commands.purge(store_copy, commands.Selectors(chunk=tuple(chunks[1:])), reason="test").purge
    result = back(store_copy, one)
    assert (result.chunks, result.documents, result.still_purged, result.named_by) == (1, 1, 1, (two,))
    reader = retrotool.open(store_copy)
    assert reader.is_living(chunks).tolist() == [True, *[False] * (len(chunks) - 1)]
    assert verified(store_copy)
    result = back(store_copy, two)
    assert (result.chunks, result.documents) == (len(chunks) - 1, 0)
    assert retrotool.open(store_copy).is_living(chunks).all()
    assert verified(store_copy)


def test_what_a_chunk_set_aside_stays_so(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = make_rows(8, words=60)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[3], "id": "again"}])
    store = tmp_path / "store"
    commands.chunk(store, [str(tmp_path / "rows.jsonl")], tokenizer=str(tiny_encoder))
    before = verified(store)
    ids = np.flatnonzero(read_tombstones(Store.open(store)).ids >= 0)
    assert len(ids)
    purged = purge(store, "doc-3", "again").purge
    result = back(store, purged)
    assert result.still_purged > 0 and result.named_by == () and result.chunks > 0
    assert verified(store) == before


def test_it_is_refused_where_there_is_nothing_to_take_back(store_copy: Path) -> None:
    with pytest.raises(UsageError, match="no purge 'p0'") as error:
        back(store_copy, "p0")
    assert "none" in error.value.advice
    one, two = purge(store_copy, "doc-7").purge, purge(store_copy, "doc-8", erase=True).purge
    with pytest.raises(UsageError, match="no purge 'p0'") as error:
        back(store_copy, "p0")
    assert one in error.value.advice and two not in error.value.advice
    with pytest.raises(UsageError, match="is erased"):
        back(store_copy, two)
    with pytest.raises(UsageError, match="--reason is empty"):
        restore(store_copy, one, reason=" ")
    done = back(store_copy, one)
    with pytest.raises(UsageError, match=f"already, by commit {done.commit}"):
        back(store_copy, one)
    assert Store.open(store_copy).state.number == done.commit, "nothing was committed"


def test_an_erase_that_was_begun_can_only_be_finished(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7", "doc-100").purge  # of two parts
    store = Store.open(store_copy)
    stage = EraseStage(tuple(read_tombstones(store).ids.tolist()))
    with writing(store) as run:
        task = stage.plan(store)[0]
        staging.stage(store.root, stage.open(store)(task, run.id, lambda _: None))
        staging.fold(store, run)
    with pytest.raises(UsageError, match="was begun") as error:
        back(store_copy, purged)
    assert "--erase" in error.value.advice
    purge(store_copy, "doc-7", "doc-100", erase=True)
    assert commands.info(store_copy).purges[purged]["erased"]
    assert verified(store_copy)


def test_an_erase_that_a_restore_overtakes_changes_nothing(store_copy: Path) -> None:
    before = verified(store_copy)
    purged = purge(store_copy, "doc-7").purge
    store = Store.open(store_copy)
    stage = EraseStage(tuple(read_tombstones(store).ids.tolist()))
    with writing(store) as run:
        (task,) = stage.plan(store)
        staging.stage(store.root, stage.open(store)(task, run.id, lambda _: None))
        state = restoring.commit_restore(store, run, restoring.weigh(store, purged), "test", "me")
        assert "restored" in state.records[f"purge:{purged}"]
        assert len(staging.fold(store, run).refused) == 1
        with pytest.raises(ConflictError, match="taken back"):
            stage.plan(store)
    assert verified(store_copy) == before


def test_a_restore_that_an_erase_overtakes_is_refused(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purged = purge(store_copy, "doc-7").purge
    weigh = restoring.weigh

    def overtaken(store: Store, one: str) -> restoring.Restorable:
        found = weigh(store, one)
        monkeypatch.setattr(restoring, "weigh", weigh)
        purge(store_copy, "doc-7", erase=True)
        return found

    monkeypatch.setattr(restoring, "weigh", overtaken)
    with pytest.raises(UsageError, match="is erased"):
        back(store_copy, purged)
    assert verified(store_copy)
    assert not list((store_copy / "restored").glob("*"))


def test_a_restore_that_a_purge_overtakes_weighs_again(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    purged = purge(store_copy, "doc-7").purge
    weigh = restoring.weigh

    def overtaken(store: Store, one: str) -> restoring.Restorable:
        found = weigh(store, one)
        monkeypatch.setattr(restoring, "weigh", weigh)
        commands.purge(store_copy, commands.Selectors(chunk=(chunks[0], 0)), reason="test")
        return found

    monkeypatch.setattr(restoring, "weigh", overtaken)
    assert back(store_copy, purged).still_purged == 1
    assert retrotool.open(store_copy).is_living(chunks).tolist() == [False, *[True] * (len(chunks) - 1)]
    assert verified(store_copy)


def test_what_was_taken_back_can_be_purged_and_erased(store_copy: Path) -> None:
    first = purge(store_copy, "doc-7")
    back(store_copy, first.purge)
    second = purge(store_copy, "doc-7")
    assert second.purge not in ("", first.purge) and second.chunks == first.chunks
    assert len(read_blocked(Store.open(store_copy)))
    back(store_copy, second.purge)
    third = purge(store_copy, "doc-7", erase=True)
    assert third.erased == first.chunks
    shown = commands.info(store_copy).purges
    assert [shown[one.purge]["erased"] for one in (first, second, third)] == [False, False, True]
    assert verified(store_copy)


def test_another_purge_is_erased_in_between(store_copy: Path) -> None:
    one = purge(store_copy, "doc-7")
    other = purge(store_copy, "doc-8", erase=True)
    commands.index(store_copy, name="lists", options=Options(Wanted(nlist=4, code="sq8")))
    assert back(store_copy, one.purge).chunks == one.chunks
    assert purge(store_copy, "doc-9", erase=True).erased
    shown = commands.info(store_copy)
    assert not shown.purges[one.purge]["erased"] and shown.purges[other.purge]["erased"]
    assert shown.indexes["lists"]["lacking"] == one.chunks, "an erase does not make it whole"
    commands.index(store_copy, name="lists")
    assert "lacking" not in commands.info(store_copy).indexes["lists"]
    assert verified(store_copy)


def test_open_readers_keep_their_view(store_copy: Path) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    purged = purge(store_copy, "doc-7").purge
    reader, view = retrotool.open(store_copy), Store.open(store_copy)
    back(store_copy, purged)
    assert not reader.is_living(chunks).any()
    assert read_tombstones(view).contains(np.array(chunks)).all(), "also when it is read only now"
    reader.refresh()
    assert reader.is_living(chunks).all()
    assert restored_chunks(Store.open(store_copy), purged).tolist() == chunks


def test_an_epoch_begun_meanwhile_goes_on_as_it_was(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7", "doc-30").purge
    dataset = RetroDataset(store_copy, sequence_length=256, seed=3)
    items = [item["chunk_ids"].tolist() for item in dataset]
    dataset = RetroDataset(store_copy, sequence_length=256, seed=3)
    reading = iter(dataset)
    begun = [next(reading)["chunk_ids"].tolist() for _ in range(5)]
    state = dataset.state_dict()
    back(store_copy, purged)
    resumed = RetroDataset(store_copy, sequence_length=256, seed=3)
    resumed.load_state_dict(state)
    assert begun + [item["chunk_ids"].tolist() for item in resumed] == items


def test_neighbours_in_another_store_are_told_and_found_again(store_copy: Path, tmp_path: Path) -> None:
    queries = Path(shutil.copytree(store_copy, tmp_path / "queries"))
    commands.neighbours(store_copy, queries=queries, name="theirs")
    whole = near(queries, "theirs")
    theirs, ours = purge(store_copy, "doc-7").purge, purge(queries, "doc-9").purge
    commands.neighbours(store_copy, queries=queries, name="theirs", saved=19, k=2)
    commands.neighbours(store_copy, queries=queries, name="theirs")
    result = back(queries, ours)
    (told,) = [one for one in result.tables if one.table == "theirs"]
    assert told.parts == 1, "their rows are empty"
    assert f"--queries {queries}" in told.command
    (told,) = back(store_copy, theirs).tables
    assert (told.path, told.table, told.parts) == (str(queries), "theirs", 4)
    commands.neighbours(store_copy, queries=queries, name="theirs")
    assert near(queries, "theirs") == whole
    assert commands.neighbours(store_copy, queries=queries, name="theirs").queries == 0
    assert "behind" not in commands.info(queries).neighbours["theirs"]


def test_rows_of_queries_alone_are_filled_again(store_copy: Path, tmp_path: Path) -> None:
    queries = Path(shutil.copytree(store_copy, tmp_path / "queries"))
    ours = purge(queries, "doc-9")
    commands.neighbours(store_copy, queries=queries, name="theirs")
    back(queries, ours.purge)
    assert commands.neighbours(store_copy, queries=queries, name="theirs").queries == ours.chunks
    commands.neighbours(store_copy, queries=queries, name="anew")
    assert near(queries, "theirs") == near(queries, "anew")


def test_what_is_staged_is_not_committed_over_a_purge_after_a_restore(store_copy: Path) -> None:
    """As many files of tombstones as when it was begun, and yet others."""
    first = purge(store_copy, "doc-7").purge
    store, stage = Store.open(store_copy), MaterialiseStage()
    with writing(store) as run:
        for task in stage.plan(store):
            staging.stage(store.root, stage.open(store)(task, run.id, lambda _: None))
        restoring.commit_restore(store, run, restoring.weigh(store, first), "test", "me")
        purge_now = commands.purge(store_copy, commands.Selectors(document=("doc-8",)), reason="test")
        assert purge_now.chunks
        assert not staging.fold(store, run).committed
