"""Repairing tables after purges: as if computed anew, and no row searched that had enough left."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from oracle import Plain, brute_force, read_plain, saved_neighbours
from test_affected import in_groups_of
from test_index_rivals import at_once
from test_neighbour_filters import run

import retrotool
from retrotool import api
from retrotool.ann.choice import Wanted
from retrotool.errors import StoreNotFoundError, UsageError
from retrotool.index import run as index_run
from retrotool.index.exact import ExactDatabase
from retrotool.index.run import Options
from retrotool.index.searching import Database
from retrotool.neighbours.neighbour_options import FilterOptions
from retrotool.neighbours.repair_run import TableRepaired
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.stage import NeighboursStage
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)
K, SAVED = 3, 5


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Embedded, with an exact index, and few neighbours saved. Not to be changed: copy it."""
    store = tmp_path_factory.mktemp("repair") / "store"
    grow(store, tiny_encoder, 70, 0)
    api.index(store)
    api.neighbours(store, k=K, saved=SAVED)
    return store


@pytest.fixture
def store(young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(young, tmp_path / "store"))


def grow(store: Path, encoder: Path, n: int, first: int) -> None:
    inputs = [str(write_jsonl(store.parent / f"{store.name}-{first}.jsonl", make_rows(n, first=first, words=80)))]
    api.chunk(store, inputs, tokenizer=str(encoder), part_size=60)
    api.embed(store, encoder=str(encoder), devices="cpu")


def purge(store: Path, ids: list[int], *, erase: bool = False) -> str:
    path = store.parent / "ids"
    path.write_text("".join(f"{i}\n" for i in ids))
    return api.purge(store, api.Selectors(ids=str(path)), reason="test", erase=erase).purge


def repair(store: Path, **options: Any) -> TableRepaired:
    (done,) = api.repair(store, devices="cpu", **options).tables
    return done


def some(store: Path, share: float, seed: int = 0) -> list[int]:
    """Documents at random, so that the same are near one another: their chunks."""
    plain = read_plain(store)
    names = np.unique(plain.documents.astype(str))
    drawn = np.random.default_rng(seed).choice(names, int(share * len(names)), replace=False)
    return [int(i) for i in plain.ids[np.isin(plain.documents.astype(str), drawn)]]


def counted(before: np.ndarray, plain: Plain, purged: list[int], k: int = K) -> dict[str, int]:
    """What a repair is to find, from the tables and what was purged, row by row."""
    told = {"touched": 0, "filled": 0, "searched": 0}
    victims = set(purged)
    for row, ids in enumerate(before.tolist()):
        if not plain.living[row]:
            continue
        left = [i for i in ids if i >= 0 and i not in victims]
        told["touched"] += any(i in victims for i in ids)
        told["searched"] += len(left) < k
        told["filled"] += len(left) >= k and any(i in victims for i in ids[:k])
    return told


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """The vectors of all queries that are searched for."""
    seen: list[np.ndarray] = []
    for kind in (Database, ExactDatabase):
        search = kind.search

        def spy(self, queries, *arguments, _search=search, **options):  # type: ignore[no-untyped-def]
            seen.append(np.array(queries.vectors))
            return _search(self, queries, *arguments, **options)

        monkeypatch.setattr(kind, "search", spy)
    yield seen


def assert_as_anew(store: Path, purged: list[int], name: str = "main", k: int = K) -> None:
    """What is read is what brute force finds of what is left: the same distances, and ids but for ties."""
    plain = read_plain(store, purged=frozenset(purged))
    true_ids, true = brute_force(plain, plain, k)
    reader = retrotool.open(store)
    same = total = 0
    for row in np.flatnonzero(plain.living):
        found = reader.neighbour_ids(int(plain.ids[row]), name)
        assert len(found) == int(np.isfinite(true[row]).sum())
        np.testing.assert_allclose([d for _, d in found], true[row][: len(found)], rtol=1e-4, atol=1e-3)
        same += sum(i == j for (i, _), j in zip(found, true_ids[row], strict=False))
        total += len(found)
    assert total > 100 and same / total > 0.99


@pytest.mark.parametrize("how", ["index", "exact"])
@pytest.mark.parametrize("erased", ["purged", "erased", "erased later"])
def test_repaired_is_as_computed_anew_and_only_short_rows_are_searched(
    store: Path, how: str, erased: str, asked: list[np.ndarray]
) -> None:
    name = {"index": "main", "exact": "exact"}[how]
    api.neighbours(store, name="exact", k=K, saved=SAVED, search=EXACT)
    before, vectors = saved_neighbours(store, name), read_plain(store).vectors
    victims = some(store, 0.4)
    purged = purge(store, victims, erase=erased == "erased")
    if erased == "erased later":
        api.erase(store, [purged])
    plain = read_plain(store, purged=frozenset(victims))
    due = counted(before[0], plain, victims)
    assert due["searched"] > 10 and due["filled"] > 10
    if erased != "purged":  # of entries that an erase has taken out nothing tells
        due |= {"touched": 0, "filled": 0}
    asked.clear()
    done = repair(store, name=name)
    assert {count: getattr(done, count) for count in due} == due
    assert (done.rows, done.parts, done.parts_read, done.short) == (plain.living.sum(), 3, 3, 0)
    left = (before[0] >= 0) & ~np.isin(before[0], victims)
    short = plain.living & (left.sum(axis=1) < K)
    searched = np.concatenate(asked)
    assert len(searched) == due["searched"]
    assert np.array_equal(np.unique(searched, axis=0), np.unique(vectors[short], axis=0))
    after = saved_neighbours(store, name)
    if erased == "purged":
        assert np.array_equal(after[0][~short], before[0][~short]), "what a restore would want is there still"
    assert_as_anew(store, victims, name)
    assert api.verify(store).problems == []


def test_tables_of_several_row_groups_are_looked_through_whole(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_groups_of(16, monkeypatch)
    api.neighbours(store, name="small", k=K, saved=SAVED)
    before = saved_neighbours(store, "small")[0]
    victims = some(store, 0.4)
    purge(store, victims)
    done = repair(store, name="small")
    due = counted(before, read_plain(store, purged=frozenset(victims)), victims)
    assert {count: getattr(done, count) for count in due} == due


def test_what_is_repaired_is_not_read_again(store: Path) -> None:
    victims = some(store, 0.4)
    purge(store, victims)
    cost: list[Any] = []
    first = api.repair(store, devices="cpu", begin=cost.append)
    files = [store / part["neighbours"]["main"]["path"] for part in api.info(store).parts]
    sizes = [file.stat().st_size for file in files]
    assert cost[0].files == 3 and first.bytes == cost[0].bytes > 0
    again = api.repair(store, devices="cpu", begin=cost.append)
    assert (cost[1].files, again.bytes, again.commit) == (0, 0, first.commit)
    assert (again.tables[0].touched, again.tables[0].searched, again.tables[0].parts_read) == (0, 0, 0)
    purge(store, some(store, 0.1, seed=1))
    third = api.repair(store, devices="cpu", begin=cost.append)
    assert third.bytes == sum(sizes), "all that was there before it"


def test_a_dry_run_counts_and_changes_nothing(store: Path) -> None:
    victims = some(store, 0.4)
    purge(store, victims)
    before = api.verify(store)
    would = repair(store, dry_run=True)
    assert api.verify(store) == before
    done = repair(store)
    assert (would.touched, would.filled, would.searched) == (done.touched, done.filled, done.searched)


def test_rows_stay_short_where_there_is_no_more(store: Path) -> None:
    plain = read_plain(store)
    names = plain.documents.astype(str)
    left = ["doc-1", "doc-4"]
    victims = plain.ids[~np.isin(names, left)].tolist()
    purge(store, victims)
    sizes = {name: int((names == name).sum()) for name in left}
    due = sum(n for name, n in sizes.items() if sum(sizes.values()) - n < K)
    done = repair(store)
    assert done.rows == sum(sizes.values()) and 0 < due < done.searched
    assert done.short == due
    reader = retrotool.open(store)
    for name, n in sizes.items():
        assert {len(reader.neighbour_ids(chunk)) for chunk in reader.document(name)} == {min(K, done.rows - n)}
    assert repair(store).searched == 0, "it is known that there are no more"


def test_a_repair_that_is_interrupted_goes_on_and_repeats_no_part(
    store: Path, asked: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = some(store, 0.4)
    purge(store, victims)
    whole = Path(shutil.copytree(store, store.parent / "whole"))
    repair(whole)
    due = sum(map(len, asked))
    asked.clear()
    spied = ExactDatabase.search, Database.search

    def interrupted(self, *arguments, **options):  # type: ignore[no-untyped-def]
        if len(asked) == 2:
            raise KeyboardInterrupt
        return spied[1](self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repair(store)
    assert api.verify(store).problems == []
    done = repair(store)
    assert done.parts_read == 1
    assert sum(map(len, asked)) == due
    assert np.array_equal(saved_neighbours(store)[0], saved_neighbours(whole)[0])


def test_parts_that_are_behind_are_left_to_neighbours(store: Path, tiny_encoder: Path) -> None:
    grow(store, tiny_encoder, 20, 500)
    purge(store, some(store, 0.3))
    done = repair(store)
    assert (done.parts, done.behind) == (3, 1), "new parts have no table; the index has not grown"
    api.index(store)
    purge(store, some(store, 0.3, seed=1))
    done = repair(store)
    assert (done.behind, done.parts_read, done.searched) == (4, 0, 0)
    told = run("purge", store, "--repair").stdout
    assert "4 parts left as they are, as they lack more than what was purged." in told
    assert done.command == shlex.join(
        ["retrotool", "neighbours", str(store), "-k", "3", "--saved", "5", "--index", "main"]
    )
    assert run(*shlex.split(done.command)[1:]).exit_code == 0
    assert repair(store).behind == 0


def test_a_table_is_refused_when_its_index_or_database_is_gone_and_others_are_repaired(store: Path) -> None:
    api.index(store, name="other")
    api.neighbours(store, name="t", index="other", k=K, saved=SAVED)
    purge(store, some(store, 0.4))
    index_run.drop(store, name="other")
    with pytest.raises(UsageError, match=r"'t' were found in the index 'other' of .*, which is gone") as error:
        api.repair(store, name="t")
    assert error.value.advice.endswith(f"retrotool neighbours {store} -k 3 --saved 5 --name t --index NAME")
    ended = run("purge", store, "--repair", "--json")
    told = json.loads(ended.stdout)
    assert ended.exit_code == 2
    assert [one["table"] for one in told["refused"]] == ["t"] and told["refused"][0]["exit_code"] == 2
    assert [(one["table"], one["short"]) for one in told["tables"]] == [("main", 0)] and told["tables"][0]["searched"]
    with pytest.raises(UsageError, match="has no neighbours 'x'; it has: main, t"):
        api.repair(store, name="x")
    ended = run("purge", store, "--repair")
    assert "Not repaired: the neighbours 't' were found in the index 'other'" in ended.stdout
    assert "nothing to repair, nothing was purged since." in ended.stdout


def test_without_tables_there_is_nothing_to_repair(young: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    grow(tmp_path / "bare", tiny_encoder, 3, 0)
    with pytest.raises(UsageError, match="has no neighbours") as error:
        api.repair(tmp_path / "bare")
    assert error.value.advice == f"Make them with: retrotool neighbours {tmp_path / 'bare'}"


def test_tables_elsewhere_are_named_and_repaired_there(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    training = tmp_path / "training"
    grow(training, tiny_encoder, 12, 900)
    api.neighbours(store, queries=training, name="t", k=K, saved=SAVED)
    api.neighbours(store, queries=training, name="u", k=K, saved=SAVED, search=EXACT)
    assert api.repair(store, devices="cpu").consumers == ()
    before = saved_neighbours(training, "t")[0]
    victims = some(store, 0.4)
    purged = purge(store, victims)
    left = api.repair(store, devices="cpu").consumers
    assert sorted((one.path, one.table, one.there) for one in left) == [
        (str(training), "t", True), (str(training), "u", True)
    ]  # fmt: skip
    assert np.array_equal(saved_neighbours(training, "t")[0], before)
    api.erase(store, [purged])
    due = counted(before, read_plain(training), victims)
    done = repair(training, name="t")
    assert {count: getattr(done, count) for count in due} == due
    assert done.database == str(store)
    assert not np.isin(saved_neighbours(training, "t")[0], victims).any(), "what was erased there is out, too"
    (other,) = api.repair(store, devices="cpu").consumers
    assert other.command == f"retrotool purge {training} --repair --name u"
    assert f"Not touched: neighbours 'u' of {training}, another store. Repair them: {other.command}\n" in (
        run("purge", store, "--repair").stdout
    )
    assert run(*shlex.split(other.command)[1:]).exit_code == 0
    assert api.repair(store, devices="cpu").consumers == ()
    plain = read_plain(training)
    for name in ("t", "u"):
        true_ids, true = brute_force(plain, read_plain(store), K)
        ids, distances = saved_neighbours(training, name)
        np.testing.assert_allclose(distances[:, :K], true, rtol=1e-4, atol=1e-3)
        assert (ids[:, :K] == true_ids).mean() > 0.99
    store.rename(tmp_path / "away")
    with pytest.raises(StoreNotFoundError, match="isn't there"):
        api.repair(training)
    training.rename(tmp_path / "away-too")
    purge(tmp_path / "away", some(tmp_path / "away", 0.1, seed=3))
    assert {one.there for one in api.repair(tmp_path / "away", devices="cpu").consumers} == {False}
    assert f"Not looked at: neighbours 'u' of {training}, which is not there now." in (
        run("purge", tmp_path / "away", "--repair").stdout
    )


def test_all_tables_of_a_mixture_are_repaired(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    grow(tmp_path / "books", tiny_encoder, 40, 700)
    api.neighbours(store, name="mix", databases=[(tmp_path / "books", None)], k=K, saved=SAVED, search=EXACT)
    purge(store, some(store, 0.4))
    purge(tmp_path / "books", some(tmp_path / "books", 0.4))
    done = api.repair(store, name="mix", devices="cpu").tables
    assert sorted(one.table for one in done) == ["mix.books", "mix.store"]
    assert all(one.searched and not one.short for one in done)
    all_of_it = api.repair(store, devices="cpu").tables
    assert sorted(one.table for one in all_of_it) == ["main", "mix.books", "mix.store"]


def test_a_table_keeps_its_filters(store: Path) -> None:
    api.neighbours(store, name="apart", k=K, saved=SAVED, filters=FilterOptions(exclude_sources=("a",)))
    victims = some(store, 0.4)
    purge(store, victims)
    record = Store.open(store).state.records["neighbours:apart"]
    done = repair(store, name="apart")
    assert done.searched > 10
    assert Store.open(store).state.records["neighbours:apart"] == record
    reader = retrotool.open(store)
    chunks = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    found = [reader.neighbour_ids(chunk, "apart") for chunk in chunks]
    assert all(len(one) == K for one in found)
    numbers = [int(reader.chunk(i).document.removeprefix("doc-")) for one in found for i, _ in one]
    assert {number % 2 for number in numbers} == {1}, "of the other source"


def test_more_neighbours_may_be_used_after_a_repair(store: Path) -> None:
    """A row that had enough left for a smaller k was not searched: with a larger one it has not."""
    api.neighbours(store, k=1, saved=SAVED)
    victims = some(store, 0.6)
    purge(store, victims)
    assert repair(store).searched > 0
    before = saved_neighbours(store)[0]
    api.neighbours(store, k=K, saved=SAVED)
    assert_as_anew(store, victims)
    plain = read_plain(store, purged=frozenset(victims))
    assert counted(before, plain, victims)["searched"] > 0
    assert repair(store).searched == 0


def test_what_was_materialised_is_named_when_tables_have_changed(store: Path) -> None:
    api.materialise(store)
    purge(store, some(store, 0.4))
    done = repair(store)
    assert done.stale == 3
    assert (
        f"3 parts materialised as they were before. Anew: {done.materialise}" in run("purge", store, "--repair").stdout
    )
    assert run(*shlex.split(done.materialise)[1:]).exit_code == 0
    assert repair(store).stale == 0


def test_a_repair_of_rows_that_came_back(store: Path) -> None:
    """Rows of queries that were purged when a part was made have no neighbours; taken back, they are short."""
    victims = some(store, 0.2)
    purged = purge(store, victims)
    repair(store)
    api.restore(store, purged, reason="test")
    done = repair(store)
    assert 0 < done.behind < 3, "where rows were searched meanwhile, these chunks are to be sought: they are back"
    assert run(*shlex.split(done.command)[1:]).exit_code == 0
    assert_as_anew(store, [])


def test_two_repairs_at_once_share_the_parts(store: Path) -> None:
    victims = some(store, 0.4)
    purge(store, victims)
    for code, err in at_once(store, ("purge", "--repair"), ("purge", "--repair")):
        assert code == 0 and "Traceback" not in err
    assert repair(store).searched == 0
    assert_as_anew(store, victims)
    assert api.verify(store).problems == []


def test_an_index_of_lists_finds_as_many_as_anew(store: Path) -> None:
    api.index(store, name="lists", target_recall=1.0, options=Options(Wanted(nlist=8, code="sq8"), 70))
    api.neighbours(store, name="lists", index="lists", k=K, saved=SAVED)
    victims = some(store, 0.4)
    purge(store, victims)
    done = repair(store, name="lists")
    assert done.searched > 10 and done.short == 0
    api.neighbours(store, name="anew", index="lists", k=K, saved=SAVED)
    reader = retrotool.open(store)
    chunks = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    pairs = [(reader.neighbour_ids(chunk, "lists"), reader.neighbour_ids(chunk, "anew")) for chunk in chunks]
    assert np.mean([one == other for one, other in pairs]) > 0.95


def test_the_command_tells_what_it_costs_and_does(store: Path) -> None:
    purge(store, some(store, 0.4))
    would = run("purge", store, "--repair", "--dry-run")
    ended = run("purge", store, "--repair", "--name", "main")
    assert would.stderr == ended.stderr
    assert ended.stderr.startswith("Reads ") and ended.stderr.endswith(": 3 parts of the neighbours 'main'.\n")
    for text, told in ((would.stdout, "to search again"), (ended.stdout, "searched again")):
        assert text.startswith("Neighbours 'main' of ") and f"  {told}" in text
    for wrong in (("--erase",), ("--reason", "x"), ("--chunk", "1"), ("p1234",), ("--affected", "main")):
        assert run("purge", store, "--repair", *wrong).exit_code == 2
    assert run("purge", store, "--chunk", "1", "--reason", "x", "--name", "main").exit_code == 2


def test_a_stage_of_a_table_is_what_neighbours_made_it_with(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task keys are those of ``neighbours``: what one has staged the other need not do."""
    purge(store, some(store, 0.4))
    planned: list[list[str]] = []
    plan = NeighboursStage.plan

    def spy(self, opened):  # type: ignore[no-untyped-def]
        tasks = plan(self, opened)
        planned.append([task.key for task in tasks])
        return tasks

    monkeypatch.setattr(NeighboursStage, "plan", spy)
    other = Path(shutil.copytree(store, store.parent / "other"))
    repair(store)
    by_repair, planned[:] = planned[0], []
    api.neighbours(other, k=K, saved=SAVED)
    assert by_repair == planned[0] and len(by_repair) == 3
