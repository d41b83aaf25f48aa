"""Neighbour tables of one name are of one database and one index, and are filled up after purges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, make_encoder, make_rows, write_jsonl
from oracle import brute_force, read_plain, saved_neighbours
from stored import copy_store, move_store, stored_file

import retrotool
from retrotool import api, engine
from retrotool.errors import UsageError
from retrotool.neighbours.stage import NeighboursStage
from retrotool.store import folding, neighbour_tables, staging
from retrotool.store.folding import writing
from retrotool.store.store import Store


def chunk(store: Path, model: Path, rows: list[dict[str, object]]) -> Path:
    source = write_jsonl(store.parent / f"{store.name}-{rows[0]['id']}.jsonl", rows)
    api.chunk(store, [str(source)], tokenizer=str(model), part_size=100)
    api.embed(store, encoder=str(model))
    return store


def renamed(prefix: str, n: int, first: int) -> list[dict[str, object]]:
    return [{**row, "id": f"{prefix}-{row['id']}"} for row in make_rows(n, first=first)]


def build(store: Path, model: Path, rows: list[dict[str, object]]) -> Path:
    chunk(store, model, rows)
    api.index(store)
    return store


def stage_of(database: Path, index: str = "main") -> NeighboursStage:
    return NeighboursStage(str(database.absolute()), index, "main", 20, 2)


def purge(store: Path, *documents: str, erase: bool = False) -> None:
    names = store.parent / "names"
    names.write_text("".join(f"{name}\n" for name in documents))
    api.purge(store, api.Selectors(document=Path(names)), reason="test", erase=erase)


def nothing(*_: int) -> None:
    """Reports to nobody."""


def test_two_runs_with_one_name_and_two_databases_do_not_mix(tmp_path: Path, tiny_encoder: Path) -> None:
    one, other = (build(tmp_path / name, tiny_encoder, renamed(name, 10, 100)) for name in ("one", "other"))
    queries = chunk(tmp_path / "queries", tiny_encoder, make_rows(6, first=300))
    ours, theirs = Store.open(queries), Store.open(queries)
    with writing(ours) as run, writing(theirs) as rival:
        late, early = stage_of(one), stage_of(other)
        (planned,) = late.plan(ours)
        engine.perform(late.open(ours), ours.storage, planned, run.id, nothing)  # computed and staged, not committed
        late_file = stored_file(queries, f"staging/{planned.key}.json")
        finished = late_file.read_bytes()
        late_file.unlink()
        engine.execute(early, theirs, rival)  # committed concurrently
        late_file.write_bytes(finished)
        assert list(folding.fold(ours, run).refused) == [planned.key]
        with pytest.raises(UsageError, match="from another database"):
            late.plan(ours)
    reader = retrotool.open(queries)
    found = [n.chunk.document for i in reader.chunk_ids(0) for n in reader.neighbours(int(i))]
    assert found and all(document.startswith("other-") for document in found)
    assert api.verify(queries).problems == []


def test_tables_of_another_index_do_not_stay_under_the_name(tmp_path: Path, tiny_encoder: Path) -> None:
    """The other index's encoder lacks a part: it has no table then, rather than one of distances that don't compare."""
    second = make_encoder(tmp_path / "models" / "second", 7)
    store = build(tmp_path / "store", tiny_encoder, make_rows(20))
    api.embed(store, encoder=str(second))
    api.index(store, name="second", encoder="second")
    chunk(store, tiny_encoder, make_rows(20, first=100))
    api.index(store, encoder="tiny")
    api.neighbours(store)
    result = api.neighbours(store, name="main", index="second")
    assert result.not_embedded == result.not_indexed == len(retrotool.open(store).chunk_ids(1)) > 0
    reader = retrotool.open(store)
    place = int(reader.chunk_ids(0)[3])
    near, distance = reader.neighbour_ids(place)[0]
    apart = reader.embeddings(0, "second")[[place, near]].astype(np.float64)
    assert distance == pytest.approx(((apart[0] - apart[1]) ** 2).sum(), rel=1e-3)
    with pytest.raises(UsageError, match=r"part 1 of .* has no neighbours 'main' yet"):
        reader.neighbours(reader.document("doc-101")[0])


def test_a_run_with_another_index_that_was_killed_leaves_nothing_mixed(store_copy: Path) -> None:
    api.index(store_copy, name="other")
    store = Store.open(store_copy)
    stage = stage_of(store_copy, "other")
    with writing(store) as run:  # one task of a job array, and no end: the record is that of the first run
        task = stage.plan(store)[0]
        engine.perform(stage.open(store), store.storage, task, run.id, nothing)
        folding.fold(store, run)
    reader = retrotool.open(store_copy)
    with pytest.raises(UsageError, match="part 0 has no neighbours 'main' of the index 'main' yet"):
        reader.neighbours(int(reader.chunk_ids(0)[0]))
    assert reader.neighbours(int(reader.chunk_ids(1)[0])), "of the first run"
    assert api.neighbours(store_copy, name="main", index="other").queries < api.info(store_copy).keys
    reader.refresh()
    assert reader.neighbours(int(reader.chunk_ids(0)[0])) and reader.neighbours(int(reader.chunk_ids(1)[0]))


@pytest.fixture
def copied(tmp_path: Path, tiny_encoder: Path) -> tuple[Path, Path]:
    """A store, and its copy."""
    original = build(tmp_path / "original", tiny_encoder, make_rows(20))
    api.neighbours(original)
    return original, copy_store(original, tmp_path / "copy")


def documents_near(reader: retrotool.Reader, name: str = "main") -> set[str]:
    chunks = [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]
    found = {i: {n.chunk.document for n in reader.neighbours(i, name, k=20)} for i in chunks}
    assert all(found.values()) and not any(reader.chunk(i).document in found[i] for i in chunks)
    return set().union(*found.values())


@pytest.mark.parametrize("grown", [False, True])
def test_a_copy_of_the_database_does_not_take_itself_for_it(
    copied: tuple[Path, Path], tiny_encoder: Path, grown: bool
) -> None:
    """The ids of the parts that came since the copy are those of other chunks in each."""
    original, copy = copied
    build(original, tiny_encoder, renamed("a", 30, 100))
    if grown:
        build(copy, tiny_encoder, renamed("b", 30, 200))
    for _ in range(2):
        api.neighbours(original, queries=copy, name="t")
    reader = retrotool.open(copy)
    found = documents_near(reader, "t")
    assert {"a-doc-107", "doc-7"} <= found and not any(name.startswith("b-") for name in found)
    purge(original, "a-doc-107", "doc-7")
    reader.refresh()
    assert documents_near(reader, "t") == found - {"a-doc-107", "doc-7"}
    api.neighbours(copy)
    assert not any(name.startswith("a-") for name in documents_near(retrotool.open(copy))), "it is its own database too"
    assert api.verify(copy).problems == []


def test_a_copy_that_lies_where_the_database_was_is_refused(copied: tuple[Path, Path], tiny_encoder: Path) -> None:
    original, copy = copied
    queries = chunk(original.with_name("queries"), tiny_encoder, make_rows(4, first=300))
    for store in (original, copy):
        build(store, tiny_encoder, renamed(store.name, 5, 100))
    api.neighbours(original, queries=queries)
    move_store(original, original.with_name("away"))
    move_store(copy, original)
    reader = retrotool.open(queries)
    with pytest.raises(UsageError, match="from a diverged copy"):
        reader.neighbours(int(reader.chunk_ids(0)[0]))
    with pytest.raises(UsageError, match="from a diverged copy"):
        api.neighbours(original, queries=queries)


@pytest.mark.parametrize("erase", [False, True])
def test_rows_with_too_few_neighbours_left_are_filled_up(tmp_path: Path, tiny_encoder: Path, erase: bool) -> None:
    store = build(tmp_path / "store", tiny_encoder, make_rows(40))
    api.neighbours(store, saved=2)
    reader = retrotool.open(store)
    chunks = [int(i) for part in reader.parts() for i in reader.chunk_ids(part)]
    targets = {n.chunk.document for n in reader.neighbours(chunks[0])}
    purge(store, *targets, erase=erase)
    reader.refresh()
    live = [i for i in chunks if reader.is_live([i])[0]]
    short = [i for i in live if len(reader.neighbours(i)) < 2]
    assert 0 < len(short) < len(live)
    result = api.neighbours(store, saved=2)
    assert result.queries == len(short), "and no other row"
    reader.refresh()
    true = brute_force(plain := read_plain(store, purged=frozenset(chunks) - frozenset(live)), plain, 2)[1]
    for row, i in enumerate(plain.ids):
        if plain.live[row]:
            assert [d for _, d in reader.neighbour_ids(int(i))] == pytest.approx(true[row].tolist(), abs=1e-4)
    assert api.neighbours(store, saved=2).queries == 0
    assert api.verify(store).problems == []


def test_across_stores_rows_are_filled_up_after_a_purge_in_the_database(
    copied: tuple[Path, Path], tiny_encoder: Path
) -> None:
    database, _ = copied
    queries = chunk(database.with_name("queries"), tiny_encoder, make_rows(10, first=300))
    api.neighbours(database, queries=queries, saved=3, k=3)
    reader = retrotool.open(queries)
    first = int(reader.chunk_ids(0)[0])
    purge(database, reader.neighbours(first)[1].chunk.document)
    assert api.neighbours(database, queries=queries, saved=3, k=1).queries == 0, "one is enough, and there is one"
    assert api.neighbours(database, queries=queries, saved=3, k=3).queries > 0
    reader.refresh()
    assert len(reader.neighbours(first)) == 3
    true = brute_force(read_plain(queries), read_plain(database), 3)[1]
    assert saved_neighbours(queries)[1].shape == true.shape


def test_what_was_found_before_an_erase_is_not_committed_after_it(store_copy: Path) -> None:
    store = Store.open(store_copy)
    stage = NeighboursStage(str(store_copy), "main", "late", 20, 2)
    targets = [i for i in retrotool.open(store_copy).document("doc-115") if i >> 32]
    assert targets
    with writing(store) as run:
        (task,) = (task for task in stage.plan(store) if task.inputs["part"] == 0)
        late = stage.open(store)(task, run.id, nothing)
        assert np.isin(targets, neighbour_tables.read_table(store, late.add[0]).ids).any()
        purge(store_copy, "doc-115", erase=True)
        staging.stage(store.storage, late)
        assert folding.fold(store, run).refused
        engine.execute(stage, store, run)
    assert not np.isin(saved_neighbours(store_copy, "late")[0], targets).any()


def test_nothing_is_read_to_find_that_nothing_is_to_be_done(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purge(store_copy, "doc-5")
    api.neighbours(store_copy, name="later")

    def refuse(*_: object) -> None:
        raise UsageError("reads a table")

    for read in ("read_table", "read_ids"):
        monkeypatch.setattr(neighbour_tables, read, refuse)
    assert api.neighbours(store_copy, name="later").queries == 0
    with pytest.raises(UsageError, match="reads a table"):
        api.neighbours(store_copy)


def test_a_run_by_another_index_replaces_a_table_only_if_it_is_named(store_copy: Path, cli: Cli) -> None:
    api.index(store_copy, name="other")
    commit = api.info(store_copy).commit
    for options, new in (
        (("--index", "other"), "the index 'other'; nothing was changed\nAdd --name other"),
        (("--exact",), "exact search; nothing was changed\nAdd --name exact"),
    ):
        refused = cli("neighbours", store_copy, *options)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: the neighbours 'main' are by the index 'main', this run is by " + new)
        assert refused.stderr.endswith(" to make a second table, or --name main to replace this one.\n")
    assert api.info(store_copy).commit == commit
    assert cli("neighbours", store_copy, "--index", "other", "--name", "second").returncode == 0
    assert cli("neighbours", store_copy, "--index", "other", "--name", "main").returncode == 0
    assert cli("neighbours", store_copy).returncode == 2, "the default is not the index of the table, either"
    assert {table["index"] for table in api.info(store_copy).neighbours.values()} == {"other"}
