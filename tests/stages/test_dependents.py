"""A database lists the stores that have neighbours in it; each takes erased text and ids out with its next run."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from oracle import read_plain, saved_neighbours
from stored import contents_of, copy_store, move_store, stored_file
from test_neighbour_filters import grow, oracle, run
from test_neighbour_filters import nothing as nothing_dropped

import retrotool
from retrotool import RetroDataset, api
from retrotool.errors import StorageError, StoreNotFoundError, UsageError
from retrotool.neighbours.dependents import dependents
from retrotool.neighbours.run import SearchOptions
from retrotool.store.leases import Run
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A database with an index and a store of queries; not to be changed."""
    folder = tmp_path_factory.mktemp("dependents")
    grow(folder / "database", tiny_encoder, make_rows(30, words=60))
    api.index(folder / "database")
    grow(folder / "training", tiny_encoder, make_rows(12, first=100, words=60))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("database", "training"):
        copy_store(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def used(**options: Any) -> Any:
    return api.neighbours("database", **{"queries": "training", "name": "t", **options})


def erase(*documents: str) -> Any:
    Path("names").write_text("".join(f"{name}\n" for name in documents))
    return api.purge("database", api.Selectors(document=Path("names")), reason="test", erase=True)


def noted() -> list[Any]:
    return dependents(Store.open("database"))


@pytest.mark.on_disk
def test_a_database_records_once_who_uses_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert used().unaware == ()
    (one,) = noted()
    assert (one.path, one.table, one.uuid) == (str(here / "training"), "t", Store.open("training").identity.uuid)
    command = f"retrotool neighbours database --queries {here}/training --name t --index main"
    assert one.command == command
    assert api.info("database").dependents == [one]
    shown = run("info", "database").stdout
    assert f"used by     {here}/training, neighbours t, since {one.since[:10]}\n" in shown and command in shown
    monkeypatch.chdir(here / "training")
    shown = run("info", ".").stdout
    assert (
        shown.startswith(f"{here}/training: ") and f"20 saved for {len(read_plain(Path()).ids)} chunks, from" in shown
    )
    assert f"from database {here}/database" in shown
    monkeypatch.chdir(here)
    number = Store.open("database").state.number
    used()
    assert Store.open("database").state.number == number, "nothing new to record"
    api.neighbours("database")
    assert [one.table for one in noted()] == ["t"], "a store is not a dependent of itself"
    used(k=3, saved=6)
    assert " -k 3 --saved 6 " in noted()[0].command and noted()[0].since == one.since
    assert api.verify("database").problems == []


def test_each_database_of_a_mixture_has_a_record(here: Path, tiny_encoder: Path) -> None:
    grow(here / "books", tiny_encoder, make_rows(5, first=200, words=60))
    used(databases=[("books", None), ("training", 2.0)], search=EXACT)
    assert [one.table for one in noted()] == ["t.database"]
    assert [one.table for one in dependents(Store.open("books"))] == ["t.books"]
    assert dependents(Store.open("training")) == []


def test_an_erase_lists_dependents_and_the_command_takes_ids_out(here: Path) -> None:
    used(saved=8)
    used(name="exact", saved=8, k=1, search=EXACT)
    before = saved_neighbours(Path("training"), "t")[0]
    files = contents_of("training")
    targets = retrotool.open("database").document("doc-7")
    assert np.isin(before, targets).any()
    found = erase("doc-7")
    assert [(one.path, one.table) for one in found.dependents] == [(str(here / "training"), t) for t in ("exact", "t")]
    assert contents_of("training") == files
    reader = retrotool.open("training")
    assert not any(i in targets for chunk in reader.chunk_ids(0) for i, _ in reader.neighbour_ids(int(chunk), "t", 8))
    shown = run("purge", "database", "--document", "@names", "--reason", "test", "--erase", "--yes").stdout
    lines = [line for line in shown.splitlines() if "another store" in line]
    assert len(lines) == 2 and "They may contain ids and text of erased chunks, which readers skip." in lines[1]
    assert shlex.split(lines[0].rpartition("Remove them: ")[2]) == [
        "retrotool", "neighbours", "database", "--queries", str(here / "training"), "-k", "1", "--saved", "8",
        "--name", "exact", "--exact", "--encoder", "tiny",
    ]  # fmt: skip
    for line in lines:
        done = run(*shlex.split(line.rpartition("Remove them: ")[2])[1:])
        assert done.exit_code == 0 and ("exact search" if "'exact'" in line else "index 'main'") in done.stdout
    for table in ("t", "exact"):
        ids, distances = saved_neighbours(Path("training"), table)
        assert not np.isin(ids, targets).any() and np.array_equal(ids < 0, np.isinf(distances))
        assert (np.diff(np.where(np.isinf(distances), 1e9, distances), axis=1) >= 0).all()
        kept = np.isin(before, targets)
        assert (ids[~kept.any(axis=1)] >= 0).sum() == (before[~kept.any(axis=1)] >= 0).sum()
    assert used(saved=8).queries == 0
    assert api.verify("training").problems == []


def test_rows_that_lost_too_many_are_filled_up_when_ids_are_taken_out(here: Path) -> None:
    used(saved=2)
    reader = retrotool.open("training")
    near = reader.neighbours(int(reader.chunk_ids(0)[0]), "t")
    documents = {neighbour.chunk.document for neighbour in near}
    targets = [i for document in documents for i in retrotool.open("database").document(document)]
    # Purged first, and filled up; erased only then.
    Path("names").write_text("".join(f"{name}\n" for name in documents))
    api.purge("database", api.Selectors(document=Path("names")), reason="test")
    assert used(saved=2).queries > 0
    assert len(erase(*documents).dependents) == 1
    used(saved=2)
    ids, distances = saved_neighbours(Path("training"), "t")
    assert not np.isin(ids, targets).any()
    truth = oracle(Path("training"), Path("database"), 2, nothing_dropped)
    assert np.allclose(distances, truth[1], atol=1e-3)


def test_a_store_that_was_moved_is_listed_until_it_is_found_again(here: Path, tiny_encoder: Path) -> None:
    used()
    move_store("training", "moved")
    (one,) = erase("doc-7").dependents
    assert one.path == str(here / "training"), "the path is a hint"
    grow(here / "training", tiny_encoder, make_rows(2, first=900))
    used(queries="moved")
    assert [one.path for one in noted()] == [str(here / "moved")], "found again, it is known by its new place alone"


def test_a_copy_of_the_store_is_a_dependent_of_its_own(here: Path) -> None:
    used()
    copy_store("training", "copy")
    used(queries="copy")
    assert {one.path for one in noted()} == {str(here / "training"), str(here / "copy")}
    assert {one.path for one in erase("doc-7").dependents} == {str(here / "training"), str(here / "copy")}


def test_a_dependent_refuses_to_read_without_its_database(here: Path, tiny_encoder: Path) -> None:
    used(materialise=True)
    erase("doc-7")
    move_store("database", "away")
    command = "retrotool neighbours DATABASE --queries training --name t --index main"
    with pytest.raises(StoreNotFoundError, match="is missing; it was at") as error:
        RetroDataset("training", "t")
    assert command in error.value.advice
    grow(here / "database", tiny_encoder, make_rows(3, first=900))
    with pytest.raises(UsageError, match="is not the database of the neighbours 't'"):
        RetroDataset("training", "t")


def test_text_of_a_dependent_is_never_returned_and_out_with_its_next_run(here: Path) -> None:
    used(materialise=True)
    reader = retrotool.open("database")
    erased = {tuple(tokens) for tokens in reader.tokens(reader.document("doc-7")).tolist()}
    assert erased & tokens_read() and erased & tokens_stored(), "the dependent has text of it"
    (one,) = erase("doc-7").dependents
    assert not erased & tokens_read()
    assert run(*shlex.split(one.command)[1:]).exit_code == 0
    assert not erased & tokens_read() and not erased & tokens_stored()
    assert api.verify("training").problems == []


def tokens_read() -> set[tuple[int, ...]]:
    """The tokens of all neighbours, and of what follows them, that a training loop is given."""
    items = list(RetroDataset("training", "t", sequence_length=64))
    return {tuple(tokens) for item in items for tokens in item["neighbours"].reshape(-1, 64).tolist()}


def tokens_stored() -> set[tuple[int, ...]]:
    """Those that are in the files of neighbours."""
    found: set[tuple[int, ...]] = set()
    for entry in Store.open("training").state.files():
        if entry.path.startswith("neighbours/"):
            table = pq.read_table(stored_file("training", entry.path))
            for name in table.column_names:
                if pa.types.is_fixed_size_binary(table[name].type):
                    rows = np.frombuffer(b"".join(table[name].to_pylist()), "<u2").reshape(-1, 64)
                    found |= {tuple(tokens) for tokens in rows.tolist()}
    return found


def test_a_database_that_cannot_be_written_is_used_all_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Run.__enter__

    def refuse(self: Run) -> Run:
        if Path(self.storage.uri) == here / "database":
            raise StorageError(f"{self.storage.place}: Read-only file system")
        return enter(self)

    monkeypatch.setattr(Run, "__enter__", refuse)
    reported = run("neighbours", "database", "--queries", "training", "--name", "t", "--json")
    fields = json.loads(reported.stdout)
    assert fields["queries"] == len(read_plain(Path("training")).ids) and fields["unaware"] == ["database"]
    assert reported.stderr == (
        "database is not writable, so it can't record this store: an erase there won't list it.\n"
    )
    assert noted() == []

    def broken(self: Run) -> Run:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Run, "__enter__", broken)
    with pytest.raises(OSError, match="Input/output"):
        used(name="u")
