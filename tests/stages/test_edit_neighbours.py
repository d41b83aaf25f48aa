"""Edited neighbours, against dictionaries: kept by later runs, masked by purges, removed by erases."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import Cli, make_rows, write_jsonl
from dataset_help import check_items, chunk, two_stores
from oracle import read_plain, saved_neighbours
from restore_help import once_before
from stored import copy_store

import retrotool
from retrotool import RetroDataset, api
from retrotool.errors import UsageError
from retrotool.neighbours.run import SearchOptions
from retrotool.purge.undo import undo
from retrotool.store import neighbour_tables
from retrotool.store.folding import writing
from retrotool.store.parts import format_id
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)
SAVED = 8


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Two parts, with the tokens of neighbours. Not to be changed: copy it."""
    store = chunk(tmp_path_factory.mktemp("edited") / "store", tiny_encoder, make_rows(14, words=90), part_size=20)
    api.neighbours(store, saved=SAVED, search=EXACT, materialise=True)
    return store


@pytest.fixture
def store(young: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_store(young, tmp_path / "store")


def edit(store: Path, *lines: dict[str, Any], name: str = "main") -> Any:
    """Edit by lines, whose ids are numbers here."""

    def shown(value: Any) -> Any:
        return value if value is True else format_id(value) if isinstance(value, int) else [*map(format_id, value)]

    file = store.parent / "edits.jsonl"
    file.write_text("".join(json.dumps({key: shown(value) for key, value in line.items()}) + "\n" for line in lines))
    return api.edit_neighbours(store, file, name=name)


def purge(store: Path, *chunks: int, erase: bool = False) -> str:
    return api.purge(store, api.Selectors(chunk=chunks), reason="test", erase=erase).purge


class Model:
    """A store, and what its edits should be: rows that were set, bans of pairs, and bans from all rows."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.rows: dict[int, list[int]] = {}
        self.bans: dict[int, set[int]] = {}
        self.banned: set[int] = set()
        self.purged: dict[str, set[int]] = {}
        self.look()

    def look(self) -> None:
        """Read ids, documents and vectors of the chunks by other code."""
        plain = read_plain(self.store)
        self.ids = plain.ids.tolist()
        self.vector = dict(zip(self.ids, plain.vectors.astype(np.float64), strict=True))
        self.document = dict(zip(self.ids, plain.documents.tolist(), strict=True))

    def gone(self) -> set[int]:
        return set().union(*self.purged.values())

    def draw(self, draw: random.Random) -> dict[str, Any]:
        """A valid line, applied to the model."""
        live = sorted(set(self.ids) - self.gone())
        one = draw.choice(live)
        others = [other for other in live if self.document[other] != self.document[one]]
        some = draw.sample(others, draw.choice([0, 1, 2, SAVED]))
        match draw.choice(["set", "set", "ban", "ban", "ban all", "reset", "reset all"]):
            case "set":
                self.rows[one] = some
                self.bans.pop(one, None)
                return {"chunk": one, "neighbours": some}
            case "ban":
                some += [other for other, _ in retrotool.open(self.store).neighbour_ids(one)[:1]]
                self.bans.setdefault(one, set()).update(some)
                return {"chunk": one, "ban": some}
            case "ban all":
                self.banned.update(some[:2])
                return {"ban": some[:2]}
            case "reset":
                one = draw.choice([*self.rows, *self.bans, one])
                self.rows.pop(one, None)
                self.bans.pop(one, None)
                return {"chunk": one, "reset": True}
        self.banned.clear()
        return {"reset": True}

    def check(self) -> None:
        reader, gone = retrotool.open(self.store), self.gone()
        saved = dict(zip(self.ids, saved_neighbours(self.store)[0].tolist(), strict=True))
        for one in self.ids:
            if one in gone:
                continue
            out = gone | self.banned | self.bans.get(one, set()) | {-1}
            right = [other for other in self.rows.get(one, saved[one]) if other not in out]
            found = reader.neighbour_ids(one, k=SAVED)
            assert [other for other, _ in found] == right
            distances = [((self.vector[one] - self.vector[other]) ** 2).sum() for other in right]
            assert [distance for _, distance in found] == pytest.approx(distances, abs=1e-3)
            assert reader.neighbour_ids(one) == found[:2]
        data = RetroDataset(self.store, sequence_length=64 * 8, rank=0, world_size=1)
        check_items(self.store, list(data))
        info = api.info(self.store).neighbours["main"].get("edits", {"rows": 0, "bans": 0})
        assert info == {"rows": len(self.rows), "bans": sum(map(len, self.bans.values())) + len(self.banned)}


@pytest.mark.parametrize(("seed", "rerank"), [(1, None), (2, "overlap")])
def test_edits_purges_undos_and_later_runs_in_any_order(
    store: Path, tiny_encoder: Path, seed: int, rerank: Literal["overlap"] | None
) -> None:
    api.neighbours(store, saved=SAVED, search=EXACT, rerank=rerank)
    draw, model = random.Random(seed), Model(store)
    for step in range(8):
        edit(store, *(model.draw(draw) for _ in range(4)))
        if step in (1, 4):
            some = draw.sample(sorted(set(model.ids) - model.gone()), 4)
            model.purged[purge(store, *some)] = set(some)
        if step == 3:
            undo(store, first := next(iter(model.purged)), reason="test")
            del model.purged[first]
        if step == 5:
            chunk(store, tiny_encoder, make_rows(4, first=40, words=60))
            api.neighbours(store, saved=SAVED, search=EXACT)
            model.look()
        model.check()
    assert model.rows and model.bans
    exported = api.export(store, store.parent / "exported")
    assert exported.neighbours == sum(
        len(retrotool.open(store).neighbour_ids(i)) for i in set(model.ids) - model.gone()
    )
    edit(store, {"reset": True}, *({"chunk": one, "reset": True} for one in {*model.rows, *model.bans}))
    model.rows, model.bans, model.banned = {}, {}, set()
    model.check()


BAD = {
    "[]": ": it is a list, not an object",
    "{": "is not JSON: unexpected end of data",
    '{"chunk": "0:5", "neighbour": ["0:9"]}': "is not an object with one of",
    '{"chunk": 5, "ban": ["0:9"]}': ": chunk is 5, not text of the form",
    '{"chunk": "0:x", "ban": ["0:9"]}': ': chunk is "0:x", not text',
    '{"chunk": "0:5", "ban": ["0:9", null]}': ": ban[1] is null, not text",
    '{"neighbours": ["0:9"]}': ": chunk is missing",
    '{"ban": "12"}': ': ban is "12", not a list',
    '{"chunk": "0:5", "reset": false}': ": reset is false, not one of True",
    '{"chunk": "0:5", "ban": ["0:9"], "reset": true}': "is not an object with one of",
    '{"chunk": "0:999", "ban": ["0:9"]}': ": store has no chunk 0:999",
    '{"chunk": "0:5", "neighbours": ["7:0"]}': ": store has no chunk 7:0",
    '{"ban": ["0:16"]}': ": chunk 0:16 of store is not live: it was purged, or is a duplicate",
    '{"chunk": "0:16", "ban": ["0:5"]}': ": chunk 0:16 of store is not live: it was purged, or is a duplicate",
    '{"chunk": "FIRST", "neighbours": ["0:12", "NEXT"]}': ": NEXT is in the same document as FIRST",
    '{"chunk": "0:5", "neighbours": ["0:12", "0:12"]}': ": a neighbour occurs twice",
    '{"chunk": "0:0", "neighbours": ["0:6","0:7","0:8","0:9","0:10","0:11","0:12","0:13","0:14"]}':
        ": 9 neighbours, the table has 8",
    '{"chunk": "LATE", "ban": ["0:5"]}': ": chunk LATE of store has no vector of the encoder 'tiny'",
}  # fmt: skip


def test_a_line_that_can_not_be_applied_is_named_and_nothing_is_changed(store: Path, tiny_encoder: Path) -> None:
    reader = retrotool.open(store)
    first = next(i for i in range(10) if reader.chunk(i).document == reader.chunk(i + 1).document)
    purge(store, 16)
    added = api.chunk(store, [str(write_jsonl(store.parent / "late.jsonl", make_rows(1, first=90, words=60)))])
    commit, file = added.commit, store.parent / "bad.jsonl"
    names = {"FIRST": format_id(first), "NEXT": format_id(first + 1)}
    names["LATE"] = format_id(int(retrotool.open(store).chunk_ids(len(api.info(store).parts) - 1)[0]))
    for line, why in BAD.items():
        for name, number in names.items():
            line, why = line.replace(name, number), why.replace(name, number)
        file.write_text(f'{{"ban": ["0:7"]}}\n{line}\n')
        with pytest.raises(UsageError) as raised:
            api.edit_neighbours("store", file)
        assert f"{file}, line 2" in str(raised.value) and why in str(raised.value), line
    assert api.info(store).commit == commit
    with pytest.raises(UsageError, match="has no neighbours 'other'"):
        api.edit_neighbours(store, file, name="other")


def test_an_erase_removes_what_names_its_chunks_and_the_receipt_checks_it(store: Path) -> None:
    gone, kept = 9, [12, 15]
    sets = [{"chunk": i, "neighbours": near} for i, near in ((2, [12, gone, 15]), (gone, [2]), (5, [gone]))]
    edit(store, *sets, {"chunk": 4, "ban": [gone]}, {"ban": [gone, 16]})
    before = neighbour_tables.read_edits(Store.open(store), "main")
    named = purge(store, gone, erase=True)
    opened = Store.open(store)
    edits = neighbour_tables.read_edits(opened, "main")
    assert gone not in (*edits["chunk"], *edits["neighbour"])
    assert (opened.state.group("edits", "main").entries()[0].about or {}) == {"rows": 2, "bans": 1}
    reader = retrotool.open(store)
    assert [i for i, _ in reader.neighbour_ids(2, k=SAVED)] == kept
    assert reader.neighbour_ids(5) == []  # still set: what was computed does not come back
    assert api.verify(store).ok
    receipt = api.verify_purge(store, named, out=store.parent).receipt
    assert receipt.ok, receipt.problems
    (checked,) = (one for one in receipt.files.kinds if one.kind == "edits")
    assert (checked.rows, checked.left) == (len(edits), 0)
    with writing(opened) as run:  # the old entries again, past all checks
        neighbour_tables.commit_edits(opened, run, "main", before)
    receipt = api.verify_purge(store, named, out=store.parent).receipt
    assert list(receipt.files.left.values()) == [6], receipt.problems


def test_affected_are_the_rows_that_readers_had(store: Path) -> None:
    near = retrotool.open(store).neighbour_ids(4)[0][0]
    far = next(i for i in (9, 12, 15) if all(i != one for one, _ in retrotool.open(store).neighbour_ids(2, k=SAVED)))
    edit(store, {"chunk": 2, "neighbours": [near, far]}, {"chunk": 4, "ban": [near]})
    purge(store, far)
    assert {2: 2}.items() <= {one.chunk: one.neighbour for one in api.affected(store).examples}.items()
    purge(store, near)
    found = {one.chunk: one.neighbour for one in api.affected(store).examples}
    assert found[2] == 1
    assert found.get(4) != 1


def test_edits_of_a_table_in_another_database_and_in_a_mixture(tmp_path: Path, tiny_encoder: Path) -> None:
    database, training = two_stores(tmp_path, tiny_encoder)
    api.neighbours(database, queries=training, name="m", databases=[(training, 2.0)])
    names = [member["table"] for member in Store.open(training).state.records["neighbours:m"]["mix"]]
    reader, theirs = retrotool.open(training), retrotool.open(database)
    chosen = [i for i in range(40) if theirs.chunk(i).document != reader.chunk(0).document][:3]
    edit(training, {"chunk": 0, "neighbours": chosen}, {"ban": [chosen[1]]}, name=names[0])
    edit(training, {"chunk": 0, "neighbours": []}, name=names[1])
    found = retrotool.open(training).neighbour_places(0, "m", k=9)
    assert sorted(found) == sorted((str(database), i, d) for _, i, d in found if i in (chosen[0], chosen[2]))
    assert [d for *_, d in found] == sorted(d for *_, d in found)  # a mixture is ordered by distance
    with pytest.raises(UsageError, match="are a mixture of"):
        edit(training, {"chunk": 0, "neighbours": []}, name="m")
    purge(database, chosen[2], erase=True)
    assert [i for _, i, _ in retrotool.open(training).neighbour_places(0, "m")] == [chosen[0]]
    api.neighbours(database, queries=training, name="m")
    left = neighbour_tables.read_edits(Store.open(training), names[0])
    assert sorted(left["neighbour"].tolist()) == sorted([-1, chosen[0], chosen[1], chosen[1]])


def test_edits_of_two_processes_are_both_kept(store: Path) -> None:
    other = store.parent / "other"
    other.mkdir()
    (other / "e.jsonl").write_text('{"chunk": "0:7", "neighbours": []}\n')
    edit(store, {"chunk": 2, "neighbours": [12]})
    with once_before("write", store / "edits" / "main", lambda: api.edit_neighbours(store, other / "e.jsonl")):
        edit(store, {"chunk": 4, "ban": [12]})
    assert api.info(store).neighbours["main"]["edits"] == {"rows": 2, "bans": 1}


def test_story_on_the_command_line(store: Path, tiny_encoder: Path, cli: Cli) -> None:
    Path("edits.jsonl").write_text(
        '{"chunk": "0:2", "neighbours": ["0:12", "0:15"]}\n{"chunk": "0:4", "ban": ["0:12"]}\n{"ban": ["0:16"]}\n'
    )
    done = cli("neighbours", "store", "--edit", "edits.jsonl")
    assert (done.returncode, done.stdout) == (0, "Edits of 'main': 1 row set, 2 bans (commit 6).\n"), done.stderr
    assert "main: 8 saved for" in (info := cli("info", "store").stdout) and "; edited: 1 row set, 2 bans\n" in info
    assert "edit        +1 edits/main (5)" in cli("log", "store").stdout
    shown = json.loads(cli("inspect", "store", "--chunk", "0:2", "--json").stdout)["chunks"][0]["neighbours"]
    assert [near["id"] for near in shown] == [12, 15]
    Path("reset.jsonl").write_text('{"chunk": "0:2", "reset": true}\n')
    done = cli("neighbours", "store", "--edit", "reset.jsonl", "--json")
    assert json.loads(done.stdout) == {"commit": 7, "rows": 0, "bans": 2}
    api.embed("store", encoder=str(tiny_encoder), name="other", pooling="cls")
    other = cli("neighbours", "store", "--exact", "--encoder", "other")
    assert other.returncode == 2 and "the neighbours 'main' were edited, with distances by" in other.stderr
    wrong = cli("neighbours", "store", "--edit", "reset.jsonl", "--exact")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --edit can't be combined with options other than --name\n")
    Path("empty.jsonl").write_text("\n\n")
    empty = cli("neighbours", "store", "--edit", "empty.jsonl")
    assert (empty.returncode, empty.stderr.splitlines()[0]) == (2, "error: empty.jsonl is empty")
    missing = cli("neighbours", "store", "--edit", "nothing.jsonl")
    assert missing.returncode == 2 and "nothing.jsonl: No such file" in missing.stderr
