"""A database knows who uses it, and an erase names those in which something of what it erased is left."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from oracle import read_plain, saved_neighbours
from test_neighbour_filters import grow, oracle, run
from test_neighbour_filters import nothing as nothing_dropped

import retrotool
from retrotool import api
from retrotool.neighbours.dependents import consumers, register
from retrotool.neighbours.run import SearchOptions
from retrotool.purge import erase_run
from retrotool.purge.purge_text import consumer_left as describe
from retrotool.store.runs import Run
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A database with an index and a store of queries; not to be changed."""
    folder = tmp_path_factory.mktemp("consumers")
    grow(folder / "database", tiny_encoder, make_rows(30, words=60))
    api.index(folder / "database")
    grow(folder / "training", tiny_encoder, make_rows(12, first=100, words=60))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("database", "training"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def used(**options: Any) -> Any:
    return api.neighbours("database", **{"queries": "training", "name": "t", **options})


def erase(*documents: str) -> Any:
    Path("names").write_text("".join(f"{name}\n" for name in documents))
    return api.purge("database", api.Selectors(documents="names"), reason="test", erase=True)


def noted() -> list[Any]:
    return consumers(Store.open("database").state)


def test_a_database_is_told_once_who_uses_it(here: Path) -> None:
    assert used().unaware == ()
    (one,) = noted()
    assert (one.path, one.table, one.materialised) == (str(here / "training"), "t", False)
    assert one.uuid == Store.open("training").identity.uuid and one.again == {"index": "main", "k": 2, "saved": 20}
    told = api.info("database").consumers
    assert told == [{**told[0], "path": str(here / "training"), "table": "t", "there": True}]
    assert f"used by     {here}/training, neighbours t, since {one.since[:10]}\n" in run("info", "database").stdout
    number = Store.open("database").state.number
    used()
    assert Store.open("database").state.number == number, "nothing new to tell"
    api.neighbours("database")
    assert [one.table for one in noted()] == ["t"], "a store does not tell itself"
    used(k=3, saved=6)
    assert noted()[0].again == {"index": "main", "k": 3, "saved": 6} and noted()[0].since == one.since
    assert api.verify("database").problems == []


def test_a_mixture_tells_each_of_its_databases(here: Path, tiny_encoder: Path) -> None:
    grow(here / "books", tiny_encoder, make_rows(5, first=200, words=60))
    used(databases=[("books", None), ("training", 2.0)], search=EXACT)
    assert [one.table for one in noted()] == ["t.database"]
    assert [one.table for one in consumers(Store.open("books").state)] == ["t.books"]
    assert consumers(Store.open("training").state) == []


def test_an_erase_names_who_holds_ids_and_the_command_takes_them_out(here: Path) -> None:
    used(saved=8)
    used(name="exact", saved=8, k=1, search=EXACT)
    before = saved_neighbours(Path("training"), "t")[0]
    victims = retrotool.open("database").document("doc-7")
    assert np.isin(before, victims).any()
    found = erase("doc-7")
    assert [(one.path, one.table, one.there, one.materialised) for one in found.consumers] == [
        (str(here / "training"), table, True, False) for table in ("exact", "t")
    ]
    assert np.isin(saved_neighbours(Path("training"), "t")[0], victims).any()
    reader = retrotool.open("training")
    assert not any(i in victims for chunk in reader.chunk_ids(0) for i, _ in reader.neighbour_ids(int(chunk), "t", 8))
    told = run("purge", "database", "--documents", "names", "--reason", "test", "--erase", "--yes").stdout
    lines = [line for line in told.splitlines() if line.startswith("Left: ")]
    assert len(lines) == 2 and "which is masked when they are read" in lines[1]
    assert shlex.split(lines[0].rpartition("Take it out: ")[2]) == [
        "retrotool", "neighbours", "database", "--queries", str(here / "training"), "-k", "1", "--saved", "8",
        "--name", "exact", "--exact",
    ]  # fmt: skip
    for line in lines:
        done = run(*shlex.split(line.rpartition("Take it out: ")[2])[1:])
        assert done.exit_code == 0 and ("exact search" if "'exact'" in line else "index 'main'") in done.stdout
    for table in ("t", "exact"):
        ids, distances = saved_neighbours(Path("training"), table)
        assert not np.isin(ids, victims).any() and np.array_equal(ids < 0, np.isinf(distances))
        assert (np.diff(np.where(np.isinf(distances), 1e9, distances), axis=1) >= 0).all()
        kept = np.isin(before, victims)
        assert (ids[~kept.any(axis=1)] >= 0).sum() == (before[~kept.any(axis=1)] >= 0).sum()
    assert erase("doc-7").consumers == (), "and then nothing is left to name"
    assert used(saved=8).queries == 0
    assert api.verify("training").problems == []


def test_rows_that_lost_too_many_are_filled_up_when_ids_are_taken_out(here: Path) -> None:
    used(saved=2)
    reader = retrotool.open("training")
    near = reader.neighbours(int(reader.chunk_ids(0)[0]), "t")
    documents = {neighbour.chunk.document for neighbour in near}
    victims = [i for document in documents for i in retrotool.open("database").document(document)]
    # Purged first, and filled up; erased only then.
    Path("names").write_text("".join(f"{name}\n" for name in documents))
    api.purge("database", api.Selectors(documents="names"), reason="test")
    assert used(saved=2).queries > 0
    assert len(erase(*documents).consumers) == int(np.isin(saved_neighbours(Path("training"), "t")[0], victims).any())
    used(saved=2)
    ids, distances = saved_neighbours(Path("training"), "t")
    assert not np.isin(ids, victims).any()
    truth = oracle(Path("training"), Path("database"), 2, nothing_dropped)
    assert np.allclose(distances, truth[1], atol=1e-3)


def test_a_store_that_is_not_there_is_named_too(here: Path, tiny_encoder: Path) -> None:
    used()
    Path("training").rename("moved")
    (one,) = erase("doc-7").consumers
    assert (one.path, one.there) == (str(here / "training"), False)
    assert shlex.split(one.command) == [
        "retrotool", "neighbours", "database", "--queries", str(here / "training"), "--name", "t", "--index", "main",
    ]  # fmt: skip
    assert "training, neighbours t, since" in (told := run("info", "database").stdout) and "it is not there now" in told
    grow(here / "training", tiny_encoder, make_rows(2, first=900))
    (other,) = erase("doc-9").consumers
    assert not other.there, "another store lies there now"
    told = run("purge", "database", "--documents", "names", "--reason", "test", "--erase", "--yes").stdout
    assert f"Not looked at: neighbours 't' of {here}/training, which is not there now. Where it is, run: " in told
    used(queries="moved")
    assert [one.path for one in noted()] == [str(here / "moved")], "found again, it is known by its new place alone"
    assert erase("doc-9").consumers == (), "and has no ids of what was erased"
    assert (
        run("purge", "database", "--documents", "names", "--reason", "test", "--erase").stdout == "Nothing to purge.\n"
    )


def test_a_copy_of_the_store_is_a_consumer_of_its_own(here: Path) -> None:
    used()
    shutil.copytree("training", "copy")
    used(queries="copy")
    assert {one.path for one in noted()} == {str(here / "training"), str(here / "copy")}
    assert {one.path for one in erase("doc-7").consumers} == {str(here / "training"), str(here / "copy")}


def test_who_has_no_neighbours_in_it_any_more_is_not_named(here: Path, tiny_encoder: Path) -> None:
    used(search=EXACT)
    grow(here / "books", tiny_encoder, make_rows(20, first=200, words=60))
    used(databases=[("books", None)], search=EXACT)  # the table has another name now
    assert sorted(one.table for one in noted()) == ["t", "t.database"]
    found = erase("doc-7").consumers
    assert {one.table for one in found} <= {"t", "t.database"} and found
    shutil.rmtree("training")
    shutil.copytree("books", "training")
    assert [one.there for one in erase("doc-7").consumers] == [False, False]


def test_texts_that_cannot_be_reached_are_named_even_where_no_id_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used()
    database, queries = Store.open("database"), Store.open("training")
    again = {"index": "main", "k": 2, "saved": 20}
    assert register(database, queries, "t", again, materialised=True)
    used()
    assert [one.materialised for one in noted()] == [True], "once written they are there"
    (one,) = erase("doc-7").consumers
    assert one.names and not one.materialised, "its texts were reached"
    used()
    assert erase("doc-7").consumers == ()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(erase_run, "erase_consumed", refuse)
    (one,) = erase("doc-7").consumers
    assert one.materialised and not one.names
    assert describe(one).startswith("Left: the texts written with neighbours 't' of ")


def test_a_database_that_cannot_be_written_is_used_all_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Run.__enter__

    def refuse(self: Run) -> Run:
        if self.root.absolute() == here / "database":
            raise OSError(errno.EROFS, "Read-only file system", str(self.root))
        return enter(self)

    monkeypatch.setattr(Run, "__enter__", refuse)
    told = run("neighbours", "database", "--queries", "training", "--name", "t", "--json")
    fields = json.loads(told.stdout)
    assert fields["queries"] == len(read_plain(Path("training")).ids) and fields["unaware"] == ["database"]
    assert told.stderr == (
        "database can't be written, so it doesn't know who uses it: an erase there won't name this store.\n"
    )
    assert noted() == []

    def broken(self: Run) -> Run:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Run, "__enter__", broken)
    with pytest.raises(OSError, match="Input/output"):
        used(name="u")
