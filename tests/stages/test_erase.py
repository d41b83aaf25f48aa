"""What an erase takes besides the chunks selected: copies, distances, excerpts, selectors, spooled input; and races."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows, make_text, write_jsonl
from oracle import saved_neighbours
from stored import copy_store, stored_file, stored_files
from test_purge import everything, lines

import retrotool
from retrotool import api, engine
from retrotool.ann import lists
from retrotool.engine.task import Task
from retrotool.purge import erase
from retrotool.purge.selectors import lookup
from retrotool.store import folding, neighbour_tables, parts, tombstones
from retrotool.store.blocked import read_blocked
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.store import Store

SECRET, VERSION = make_text(990, 150), make_text(991, 150)
FIRST, SAME_TEXT, OTHER = "the-first-of-all", "a-copy-by-text", "somebody-else"


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A store with a document, another version of it under its id, and its text under another id, in three parts."""
    folder = tmp_path_factory.mktemp("repeating")
    rows = make_rows(12)
    cases = [(FIRST, SECRET, rows[:4]), (FIRST, VERSION, rows[4:8]), (SAME_TEXT, SECRET, rows[8:])]
    inputs = []
    for number, (name, text, others) in enumerate(cases):
        rows_of = [*others, {"id": name, "text": text, "source": "targets"}]
        inputs.append(str(write_jsonl(folder / f"{number}.jsonl", rows_of)))
    for path in inputs:
        api.chunk(folder / "store", [path], tokenizer=str(tiny_encoder))
    api.embed(folder / "store", encoder=str(tiny_encoder))
    api.index(folder / "store")
    api.neighbours(folder / "store")
    return folder / "store"


@pytest.fixture
def store(repeating: Path, tmp_path: Path) -> Path:
    return copy_store(repeating, tmp_path / "store")


def rows_of(store: Path, part: int) -> tuple[list[int], list[bytes]]:
    """Chunk ids, and tokens and vectors, of the last document of a part, tombstones included."""
    opened = Store.open(store)
    last = parts.read_documents(opened, part, ["first_row", "n_chunks"]).to_pylist()[-1]
    rows = range(last["first_row"], last["first_row"] + last["n_chunks"])
    chunks = parts.read_chunks(opened, part)
    vectors = np.load(stored_file(store, opened.state.part_file("embeddings", part, "tiny").path))
    bits = [chunks.tokens[row].tobytes() for row in rows] + [vectors[row].tobytes() for row in rows]
    return [part << 32 | row for row in rows], bits


def names_of(store: Path) -> set[str | None]:
    opened = Store.open(store)
    return {n for part in opened.state.parts() for n in parts.read_documents(opened, part, ["id"])["id"].to_pylist()}


def test_an_erase_takes_what_was_set_aside_as_a_repeat(store: Path, tmp_path: Path) -> None:
    chunks, bits = zip(*(rows_of(store, part) for part in range(3)), strict=True)
    assert all(trace in everything(store) for traces in bits for trace in traces), "they are on the disk"
    before = api.info(store)
    assert before.documents == 13
    given = lines(tmp_path / "ids", chunks[0])
    planned = api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True, dry_run=True)
    assert (planned.chunks, planned.unerased, planned.copies) == (len(chunks[0]), sum(map(len, chunks)), 2)
    result = api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    assert (result.chunks, result.documents, result.copies) == (len(chunks[0]), 1, 2)
    assert result.erased == sum(map(len, chunks))
    haystack = everything(store)
    assert [trace for traces in bits for trace in traces if trace in haystack] == []
    assert names_of(store).isdisjoint({FIRST, SAME_TEXT})
    after = api.info(store)
    assert (after.documents, after.chunks) == (12, before.chunks - result.chunks), (
        "copies had been taken from the totals"
    )
    assert after.purges[result.purge]["erased"]
    assert api.verify(store).problems == []


def test_processes_share_the_parts_of_a_large_erase(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    execute = erase.engine.execute

    def counted(*arguments: Any, workers: int) -> None:
        asked.append(workers)
        execute(*arguments, workers=workers)

    monkeypatch.setattr(erase, "_ROWS_A_WORKER", 2)
    monkeypatch.setattr(erase, "cores", lambda: 2)
    monkeypatch.setattr(erase.engine, "execute", counted)
    chunks, bits = zip(*(rows_of(store, part) for part in range(3)), strict=True)
    given = lines(tmp_path / "ids", chunks[0])
    done = api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    assert asked == [2]
    haystack = everything(store)
    assert not any(trace in haystack for traces in bits for trace in traces)
    assert api.verify(store).ok
    assert api.verify_purge(store, done.purge, out=tmp_path).receipt.ok


def test_copies_are_not_blocked_and_others_are_left_alone(store: Path, tmp_path: Path) -> None:
    texts = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in (SECRET, VERSION, "")]
    kept = names_of(store) - {FIRST, SAME_TEXT}
    api.purge(store, api.Selectors(chunk=lines(tmp_path / "ids", rows_of(store, 0)[0])), reason="test", erase=True)
    blocked = read_blocked(Store.open(store))
    assert blocked.holds([FIRST, SAME_TEXT, OTHER], [texts[2]] * 3).tolist() == [True, False, False]
    assert blocked.holds([OTHER] * 2, texts[:2]).tolist() == [True, False]
    assert names_of(store) == {*kept, None}


def test_without_an_erase_copies_stay_as_they_are(store: Path, tmp_path: Path) -> None:
    given = lines(tmp_path / "ids", rows_of(store, 0)[0])
    first = api.purge(store, api.Selectors(chunk=Path(given)), reason="test")
    assert (first.copies, first.unerased) == (0, 0)
    assert {FIRST, SAME_TEXT} <= names_of(store)
    again = api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    assert (again.chunks, again.already_purged, again.copies) == (0, first.chunks, 2)
    assert names_of(store).isdisjoint({FIRST, SAME_TEXT})
    assert all(purge["erased"] for purge in api.info(store).purges.values())
    once_more = api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    assert (once_more.purge, once_more.purges) == ("", (again.purge, first.purge)), "these are to be verified"


@pytest.mark.parametrize("purged_before", [False, True])
def test_an_erase_that_was_interrupted_still_knows_the_copies(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purged_before: bool
) -> None:
    """The first document's id and hash are gone by then, so nothing in the files shows what repeated it."""
    bits = [trace for part in range(3) for trace in rows_of(store, part)[1]]
    given = lines(tmp_path / "ids", rows_of(store, 0)[0])
    if purged_before:
        api.purge(store, api.Selectors(chunk=Path(given)), reason="test")
    done: list[int] = []
    rewrite = erase.EraseWorker._part

    def one_only(worker: erase.EraseWorker, part: int, run: str) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(part)
        return rewrite(worker, part, run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(erase.EraseWorker, "_part", one_only)
        api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    assert done == [0]
    assert names_of(store) >= {SAME_TEXT, FIRST}
    api.purge(store, api.Selectors(chunk=Path(given)), reason="test", erase=True)
    haystack = everything(store)
    assert [trace for trace in bits if trace in haystack] == []
    assert names_of(store).isdisjoint({FIRST, SAME_TEXT})
    assert all(purge["erased"] for purge in api.info(store).purges.values())
    assert api.verify(store).problems == []


def test_an_erase_that_is_not_finished_is_no_damage(store_copy: Path) -> None:
    """A large one commits every half a minute: first parts, then shards, then tables."""
    purge = api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="test").purge
    opened = Store.open(store_copy)
    targets = tombstones.read_tombstones(opened)
    stage = erase.EraseStage(targets, (purge,))
    with writing(opened) as run:
        (task,) = stage.plan(opened)
        assert task.label == "part 0", "the others wait"
        rewrite(opened, stage, task, run)
        assert np.isin(targets.ids, shard_ids(opened)).all()
        assert api.verify(store_copy).problems == []
        record = opened.state.records[f"purge:{purge}"]
        opened.commit(run, lambda _: Draft("erase", records={f"purge:{purge}": {**record, "erased": True}}))
        assert any("chunks that are erased" in problem.text for problem in api.verify(store_copy).problems)
        for task in stage.plan(opened):
            rewrite(opened, stage, task, run)
        assert stage.plan(opened) == []
    assert not np.isin(targets.ids, shard_ids(opened)).any()
    assert api.verify(store_copy).problems == []


def rewrite(store: Store, stage: erase.EraseStage, task: Task, run: Run) -> None:
    engine.perform(stage.open(store), store.storage, task, run.id, lambda *_: None)
    folding.fold(store, run)


def shard_ids(store: Store) -> np.ndarray:
    return lists.read_lists(store.storage.local(store.state.file("index", "shard-0000", "main").path)).ids(0)


def test_tables_keep_no_distance_to_what_is_erased(store_copy: Path, tmp_path: Path) -> None:
    targets = np.array(retrotool.open(store_copy).document("doc-9") + retrotool.open(store_copy).document("doc-30"))
    before, distances_before = saved_neighbours(store_copy)
    assert np.isin(before, targets).any()
    state = Store.open(store_copy).state
    rows = np.concatenate([part << 32 | np.arange(state.part_file("chunks", part).rows) for part in state.parts()])
    api.purge(store_copy, api.Selectors(chunk=lines(tmp_path / "ids", targets.tolist())), reason="test", erase=True)
    ids, distances = saved_neighbours(store_copy)
    gone = np.isin(rows, targets)
    assert (ids[gone] == -1).all()
    assert np.isinf(distances[gone]).all()
    for row in np.flatnonzero(~gone):
        stay = ~np.isin(before[row], targets)
        left = int(stay.sum())
        assert ids[row].tolist() == [*before[row][stay].tolist(), *[-1] * (20 - left)]
        assert distances[row][:left].tolist() == distances_before[row][stay].tolist()
        assert np.isinf(distances[row][left:]).all()
    assert api.verify(store_copy).problems == []
    assert api.neighbours(store_copy).queries == 0, "they count as the tables of what was searched"


def test_ids_of_another_store_are_not_taken_for_ones_own(
    store_copy: Path, built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    queries = tmp_path / "queries"
    source = write_jsonl(tmp_path / "q.jsonl", make_rows(30, first=500))
    api.chunk(queries, [str(source)], tokenizer=str(tiny_encoder))
    api.embed(queries, encoder=str(tiny_encoder))
    api.neighbours(store_copy, queries=queries)
    before, _ = saved_neighbours(queries)
    target = int(before[before < 1 << 32][0])  # the id of a chunk here and there
    result = api.purge(queries, api.Selectors(chunk=lines(tmp_path / "ids", [target])), reason="test", erase=True)
    after, distances = saved_neighbours(queries)
    rows = np.arange(len(after)) == target
    assert (after[~rows] == before[~rows]).all()
    assert (after[rows] == -1).all() and np.isinf(distances[rows]).all()
    assert result.not_reached == (), "without an index nothing was searched for here"
    assert api.verify(queries).problems == []
    (sentence,) = api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="test", erase=True).not_reached
    assert "other stores" in sentence
    assert (saved_neighbours(queries)[0] == after).all()


def test_ids_of_the_store_that_it_was_copied_from_are_not_its_own(store_copy: Path, built_store: Path) -> None:
    """A copy has the same uuid, and goes its own way from then on."""
    api.neighbours(built_store, queries=store_copy, name="copied")
    targets = retrotool.open(store_copy).document("doc-9")
    before, _ = saved_neighbours(store_copy, "copied")
    assert np.isin(before, targets).any()
    state = Store.open(store_copy).state
    rows = np.concatenate([part << 32 | np.arange(state.part_file("chunks", part).rows) for part in state.parts()])
    api.purge(store_copy, api.Selectors(where="id = 'doc-9'"), reason="test", erase=True)
    after, _ = saved_neighbours(store_copy, "copied")
    gone = np.isin(rows, targets)
    assert (after[~gone] == before[~gone]).all()
    assert (after[gone] == -1).all()
    assert not np.isin(saved_neighbours(store_copy)[0], targets).any()
    assert api.verify(store_copy).problems == []


def test_excerpts_of_what_could_not_be_read_go(tmp_path: Path, tiny_encoder: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", make_rows(5))
    with source.open("a") as file:
        file.write('{"id": "doc-3", "text": "broken off\n{"id": "x"}\n')
    api.chunk(tmp_path / "store", [str(source)], tokenizer=str(tiny_encoder))

    def quarantine() -> list[dict[str, object]]:
        (file,) = api.info(tmp_path / "store").quarantine
        return pq.read_table(stored_file(tmp_path / "store", file["path"])).to_pylist()

    before = quarantine()
    assert [row["excerpt"][:12] for row in before] == ['{"id": "doc-', "id"]
    api.purge(tmp_path / "store", api.Selectors(where="id = 'doc-4'"), reason="test")
    assert quarantine() == before
    api.purge(tmp_path / "store", api.Selectors(where="id = 'doc-4'"), reason="test", erase=True)
    assert quarantine() == [{**row, "excerpt": None} for row in before], "all, because their documents are not known"
    assert b"broken off" not in everything(tmp_path / "store")
    assert api.verify(tmp_path / "store").problems == []


def test_a_selector_goes_when_others_have_erased_what_it_took(store_copy: Path, tmp_path: Path) -> None:
    both = "id in ('doc-3', 'doc-4')"
    first = api.purge(store_copy, api.Selectors(where=both), reason="test")

    def literals() -> list[bytes]:
        return [file.read_bytes() for file in stored_files(store_copy, "selectors/*")]

    api.purge(store_copy, api.Selectors(document=lines(tmp_path / "a", ["doc-3"])), reason="test", erase=True)
    assert not api.info(store_copy).purges[first.purge]["erased"]
    assert literals() == [], "it names what was erased"
    api.purge(store_copy, api.Selectors(document=lines(tmp_path / "b", ["doc-4"])), reason="test", erase=True)
    assert all(purge["erased"] for purge in api.info(store_copy).purges.values())
    assert literals() == []


def beside(monkeypatch: pytest.MonkeyPatch, of: object, name: str, work: Callable[[], object]) -> None:
    """Have ``work`` done by another process, as it were, just before a function is called for the first time.

    ``of``: what has the function, under this ``name``: a module, a class or a table of functions.
    """
    original = of[name] if isinstance(of, dict) else getattr(of, name)

    def called(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        work()
        return original(*arguments, **options)

    if isinstance(of, dict):
        monkeypatch.setitem(of, name, called)
    else:
        monkeypatch.setattr(of, name, called)


@pytest.mark.parametrize("at", ["documents", "index", "neighbours", "files_of_several_parts"])
def test_an_erase_goes_on_beside_another(
    store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The other replaces files that this one is about to read."""
    other, own = lines(tmp_path / "other", ["doc-9"]), lines(tmp_path / "own", ["doc-11"])
    api.purge(store_copy, api.Selectors(document=Path(other)), reason="test")
    beside(
        monkeypatch, erase._HOLDS if at in erase._HOLDS else erase, at,
        lambda: api.purge(store_copy, api.Selectors(document=Path(other)), reason="test", erase=True),
    )  # fmt: skip
    assert api.purge(store_copy, api.Selectors(document=Path(own)), reason="test", erase=True).erased > 0
    assert names_of(store_copy).isdisjoint({"doc-9", "doc-11"})
    assert all(purge["erased"] for purge in api.info(store_copy).purges.values())
    assert api.verify(store_copy).problems == []


@pytest.mark.parametrize("at", ["_part", "_shard", "_table"])
def test_a_task_that_another_erase_overtakes_is_planned_again(
    store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    other, own = lines(tmp_path / "other", ["doc-9"]), lines(tmp_path / "own", ["doc-11"])
    api.purge(store_copy, api.Selectors(document=Path(other)), reason="test")
    beside(
        monkeypatch, erase.EraseWorker, at,
        lambda: api.purge(store_copy, api.Selectors(document=Path(other)), reason="test", erase=True),
    )  # fmt: skip
    assert api.purge(store_copy, api.Selectors(document=Path(own)), reason="test", erase=True).erased > 0
    assert names_of(store_copy).isdisjoint({"doc-9", "doc-11"})
    assert api.verify(store_copy).problems == []


def test_a_selection_that_an_erase_overtakes_is_made_again(
    store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(
        monkeypatch, lookup, "_chunks_where",
        lambda: api.purge(store_copy, api.Selectors(where="id = 'doc-9'"), reason="test", erase=True),
    )  # fmt: skip
    result = api.purge(store_copy, api.Selectors(where="id in ('doc-9', 'doc-11')"), reason="test")
    assert result.documents == 1


def test_planning_again_reads_only_what_is_new(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.neighbours(store_copy, name="nearest", k=1, saved=1)
    purge = api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="test").purge
    store = Store.open(store_copy)
    stage = erase.EraseStage(tombstones.read_tombstones(store), (purge,))
    with writing(store) as run:
        rewrite(store, stage, stage.plan(store)[0], run)
    tasks = stage.plan(store)
    assert len(tasks) > 1
    looked_at: list[str] = []
    read = neighbour_tables.read_ids

    def noted(store: Store, entry: FileEntry, groups: list[int]) -> Any:
        looked_at.append(entry.path)
        return read(store, entry, groups)

    monkeypatch.setattr(neighbour_tables, "read_ids", noted)
    assert [task.key for task in stage.plan(store)] == [task.key for task in tasks]
    assert looked_at == []
    api.neighbours(store_copy, name="another")
    store.refresh()
    assert len(stage.plan(store)) >= len(tasks)
    assert set(looked_at) == {entry.path for entry in store.state.group("neighbours", "another").entries()}
