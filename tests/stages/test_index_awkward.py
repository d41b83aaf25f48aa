"""Indexes of awkward stores, asked for awkwardly: copies, hardly anything live, names that are not there, damage."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import Cli, make_rows, make_text, write_blank, write_jsonl
from oracle import read_plain
from stored import copy_store, stored_file

import retrotool.reader
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.ann.excluded import Queries
from retrotool.errors import CorruptError, UsageError
from retrotool.index.run import Options
from retrotool.index.searching import Database, Point
from retrotool.repair import run as repair_run
from retrotool.store.store import Store

LISTS = Options(IndexOptions(nlist=16, code="sq8", shard_rows=150))


@pytest.fixture
def lists(store_copy: Path) -> Path:
    """Another index "lists" in several shards."""
    api.index(store_copy, name="lists", options=LISTS)
    return store_copy


@pytest.mark.parametrize("different", [1, 3])
def test_copies_are_found_though_they_are_fewer_than_lists(tmp_path: Path, tiny_encoder: Path, different: int) -> None:
    rows = [{"id": f"{i}", "text": make_text(i % different, 30)} for i in range(90)]
    store = tmp_path / "store"
    inputs = [str(write_jsonl(tmp_path / "copies.jsonl", rows))]
    api.chunk(store, inputs, tokenizer=str(tiny_encoder), duplicates="keep")
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store, options=Options(IndexOptions(nlist=8, code="sq8")))
    reader = retrotool.open(store)
    for i in range(different):
        found = reader.search(make_text(i, 30), k=5)
        assert len(found) == 5 and {int(n.chunk.document) % different for n in found} == {i}
    one_by_one = Database(Store.open(store))
    plain = read_plain(store)
    for row in range(0, len(plain.ids), 17):
        best = one_by_one.search(Queries.plain(plain.vectors[row : row + 1]), 3, Point(1, 20))
        assert (best.ids >= 0).all() and (best.distances < 1e-3).all()


def test_more_lists_are_probed_where_they_hold_too_little(lists: Path, tmp_path: Path) -> None:
    database = Database(Store.open(lists), "lists")
    plain = read_plain(lists)
    queries = Queries.plain(plain.vectors[:5])
    assert (database.search(queries, len(plain.ids), Point(1, 10)).ids >= 0).all(), "all that there is"
    assert (database.search(queries, len(plain.ids) + 7, Point(1, 10)).ids >= 0).sum() == 5 * len(plain.ids)
    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in plain.ids[3:]))
    api.purge(lists, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    left = Database(Store.open(lists), "lists").search(queries, 10, Point(1, 10))
    assert all(sorted(row[row >= 0]) == sorted(plain.ids[:3]) for row in left.ids)


@pytest.mark.parametrize("what", ["tune", "retrain", "merge"])
def test_what_needs_an_index_makes_none(lists: Path, what: str) -> None:
    before = Store.open(lists).state.number
    with pytest.raises(UsageError, match=f"--{what}.*no index 'typo'; it has: lists, main") as error:
        api.index(lists, name="typo", options=Options(**{what: True}))  # type: ignore[arg-type]
    assert "--name typo" in error.value.advice
    assert Store.open(lists).state.number == before


def test_a_shard_is_not_mended_from_embeddings_that_are_broken(lists: Path) -> None:
    info = api.info(lists)
    shard = stored_file(lists, info.indexes["lists"]["shards"][0])
    embeddings = stored_file(lists, Store.open(lists).state.part_file("embeddings", 0, "tiny").path)  # type: ignore[union-attr]
    whole = embeddings.read_bytes()
    for path, place in ((shard, -30), (embeddings, -31)):
        data = bytearray(path.read_bytes())
        data[place] ^= 0x80
        path.write_bytes(data)
    with pytest.MonkeyPatch.context() as without_encoder:
        without_encoder.setattr(repair_run, "find_encoder", mock.Mock(side_effect=UsageError("no such encoder")))
        refused = api.repair(lists)
    assert not refused.ok and Store.open(lists).state.number == info.commit
    assert any(embeddings.name in problem.remedy for problem in refused.remaining if problem.kind == "index")
    embeddings.write_bytes(whole)
    repaired = api.repair(lists)
    assert [one.same for one in repaired.repaired] == [True]
    assert repaired.commit >= info.commit + 2, "shards, and what was measured of them"
    assert api.info(lists).indexes["lists"]["vectors"] == info.indexes["lists"]["vectors"]
    assert api.verify(lists).problems == []


@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_what_was_measured_is_mended_by_measuring(lists: Path, how: str) -> None:
    path = stored_file(lists, Store.open(lists).state.file("index", "recall", "lists").path)  # type: ignore[union-attr]
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(CorruptError, match="recall") as error:
        api.index(lists, name="lists")
    assert "retrotool verify" in error.value.advice
    assert api.repair(lists).ok
    assert api.verify(lists).problems == []


def test_a_training_that_is_gone_is_made_again(lists: Path) -> None:
    stored_file(lists, api.info(lists).indexes["lists"]["trained"]).unlink()
    with pytest.raises(CorruptError, match="missing") as error:
        api.index(lists, name="lists", options=Options(tune=True))
    assert "retrotool verify" in error.value.advice
    api.index(lists, name="lists", options=Options(retrain=True))
    assert api.verify(lists).problems == []


def test_the_size_of_shards_is_kept_and_not_changed_in_silence(lists: Path) -> None:
    with pytest.raises(UsageError, match="for shards of 150 vectors, not 80"):
        api.index(lists, name="lists", options=Options(IndexOptions(shard_rows=80)))
    before = api.info(lists).indexes["lists"]
    api.index(lists, name="lists", options=Options(retrain=True))
    assert len(api.info(lists).indexes["lists"]["shards"]) == len(before["shards"]) > 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "{}", "word", "--rerank", "99999999999999999999"),
        ("index", "{}", "--memory", "9" * 400),
        ("index", "{}", "--memory", "100000000TB"),
        ("index", "{}", "--memory", "1B"),
        ("index", "{}", "--shard-size", "9" * 23),
        ("index", "{}", "--retrain", "--merge"),
        ("index", "{}", "--nlist", "-1"),
        ("index", "{}", "--unknown"),
        ("plan", "--tokens", "1e99T"),
    ],
)
def test_values_that_make_no_sense_are_refused(built_store: Path, cli: Cli, arguments: tuple[str, ...]) -> None:
    ended = cli(*(str(a).format(built_store) for a in arguments), "--json")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    reported = json.loads(ended.stdout)
    assert reported["exit_code"] == 2 and reported["error"]


def test_deep_searches_take_no_more_than_there_is(lists: Path) -> None:
    best = Database(Store.open(lists), "lists").search(
        Queries.plain(read_plain(lists).vectors[:2]), 10, Point(16, 1_000_000)
    )
    assert (best.ids >= 0).all()


def test_a_search_that_meets_new_files_starts_again(lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process switches to a new training between opening the store and reading its shards."""
    from retrotool import app as command_line

    loads = []
    load = retrotool.reader.Reader.load_encoder

    def slow(*arguments: object, **options: object) -> object:
        loaded = load(*arguments, **options)  # type: ignore[arg-type]
        if not loads:
            api.index(lists, name="lists", options=Options(retrain=True))
        loads.append(1)
        return loaded

    monkeypatch.setattr(retrotool.reader.Reader, "load_encoder", slow)
    with pytest.raises(SystemExit) as end:
        command_line.app(["search", str(lists), "word", "--index", "lists"], prog_name="retrotool")
    assert (end.value.code, len(loads)) == (0, 2)


def test_nothing_is_said_of_recall_where_there_is_nothing_to_find(tmp_path: Path, tiny_encoder: Path, cli: Cli) -> None:
    empty = tmp_path / "empty"
    api.chunk(empty, [str(write_blank(tmp_path / "none.jsonl"))], tokenizer=str(tiny_encoder))
    with pytest.raises(UsageError, match="no chunks"):
        api.index(empty)
    one = tmp_path / "one"
    api.chunk(one, [str(write_jsonl(tmp_path / "one.jsonl", make_rows(1)))], tokenizer=str(tiny_encoder))
    api.embed(one, encoder=str(tiny_encoder))
    api.purge(one, api.Selectors(where="id = 'doc-0'"), reason="test", erase=True)
    reported = cli("index", one)
    assert reported.returncode == 0 and "Recall was not measured" in reported.stdout


def test_a_copy_of_a_store_is_measured_where_it_lies(lists: Path, tmp_path: Path) -> None:
    moved = copy_store(lists, tmp_path / "a place, with spaces")
    found = api.index(moved, name="lists", options=Options(IndexOptions(memory=20_000_000), tune=True))
    assert found.queries == int(np.prod(read_plain(moved).ids.shape))
