"""Mixtures of databases against brute force over all of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_encoder, make_rows, make_text, write_jsonl
from oracle import read_plain
from stored import copy_store, move_store, stored_files
from test_neighbour_filters import grow, is_copy, run, spied

import retrotool
from retrotool import api, engine
from retrotool.errors import UsageError
from retrotool.neighbours import run as neighbours_run
from retrotool.neighbours.filters import FilterOptions
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.store.folding import writing
from retrotool.store.log import Draft
from retrotool.store.store import Store

EXACT = SearchOptions(exact=True)
NAMES = ("wiki", "books", "training")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A folder with three stores that have some documents in common, by their ids; not to be changed."""
    folder = tmp_path_factory.mktemp("mixtures")
    for number, name in enumerate(NAMES):
        own = [{**row, "id": f"{name}-{row['id']}"} for row in make_rows(14, first=40 * number, words=60)]
        copied = [{**row, "id": f"{name} copy {row['id']}"} for row in make_rows(4, first=300, words=60)]
        same = [{"id": f"same-{i}", "text": f"{make_text(i, 70)} {name}"} for i in range(5)]
        rows = [{**row, "source": "abc"[i % 3]} for i, row in enumerate([*own, *copied, *same])]
        grow(folder / name, tiny_encoder, rows)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        copy_store(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mix(*databases: tuple[str, float | None], first: str = "wiki", name: str = "m", **options: Any) -> Any:
    return api.neighbours(first, queries="training", name=name, databases=databases, search=EXACT, **options)


def expected(weights: dict[str, float], *, copies: bool = True) -> list[list[tuple[str, int, float]]]:
    """Of each row of the training store all (database, id, distance), by brute force over all databases."""
    ours, queries = retrotool.open("training"), read_plain(Path("training"))
    merged: list[list[tuple[float, str, int, float]]] = [[] for _ in queries.ids]
    for name, weight in weights.items():
        reader, plain = retrotool.open(name), read_plain(Path(name))
        distances = ((queries.vectors[:, None, :] - plain.vectors[None, :, :]) ** 2).sum(-1)
        bad = (queries.documents[:, None] == plain.documents[None, :]) | ~reader.is_searchable(plain.ids)
        for row, chunk in enumerate(queries.ids.tolist()):
            for place in np.argsort(distances[row], kind="stable") if ours.is_searchable([chunk])[0] else ():
                i = int(plain.ids[place])
                if bad[row, place] or (not copies and near(ours, chunk, reader, i)):
                    continue
                merged[row].append((float(distances[row, place]) / weight, name, i, float(distances[row, place])))
    return [[one[1:] for one in sorted(row)] for row in merged]


def near(ours: retrotool.Reader, chunk: int, theirs: retrotool.Reader, i: int) -> bool:
    following = theirs.continuation(i)
    after = following.tokens.tolist() if following else []
    return is_copy(ours.chunk(chunk).tokens.tolist(), theirs.chunk(i).tokens.tolist(), after)


def check(weights: dict[str, float], name: str = "m", *, copies: bool = True, k: int = 6) -> None:
    """What the API and the reader of tables give is what is expected, ties aside."""
    reader, true = retrotool.open("training"), expected(weights, copies=copies)
    opened = functools.cache(retrotool.open)
    tables = NeighbourReader(Store.open("training"), name)
    found = [tables.read(part, k) for part in tables.parts()]
    ids, which = (np.concatenate([getattr(one, field) for one in found]) for field in ("ids", "databases"))
    rows = read_plain(Path("training")).ids.tolist()
    for row, chunk in enumerate(rows):
        if not reader.is_live([chunk])[0]:
            continue
        places = reader.neighbour_places(chunk, name, k)
        assert [d for _, _, d in places] == pytest.approx([d for _, _, d in true[row][:k]], abs=1e-4)
        of = {one[:2]: one[2] for one in true[row]}
        assert [of[Path(path).name, i] for path, i, _ in places] == pytest.approx([d for _, _, d in places], abs=1e-4)
        assert len({(path, i) for path, i, _ in places}) == len(places)
        assert [
            (Path(tables.databases[w].place).name, i) for w, i in zip(which[row], ids[row], strict=True) if i >= 0
        ] == [(Path(path).name, i) for path, i, _ in places]
        for neighbour in reader.neighbours(chunk, name, 3):
            own = opened(neighbour.database)
            assert own.chunk(neighbour.id).text == neighbour.chunk.text
            assert neighbour.chunk.document != reader.chunk(chunk).document
    pieces = tables.pieces(found[0])
    flat = list(zip(found[0].databases.ravel().tolist(), found[0].ids.ravel().tolist(), strict=True))
    for place in range(0, len(flat), 7):
        database, i = flat[place]
        tokens = opened(tables.databases[database].place).chunk(i).tokens.tolist() if i >= 0 else []
        assert pieces.tokens[place, 0, : pieces.n_tokens[place, 0]].tolist() == tokens


def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    return spied(monkeypatch)


def record(name: str = "m") -> Any:
    return Store.open("training").state.records.get(f"neighbours:{name}")


@pytest.mark.usefixtures("here")
def test_of_several_databases_the_nearest_by_distance_over_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The query store is one of them; a document of an id that it has is nobody's, in whichever it lies."""
    found = mix(("books", 0.5), ("training", 2.0))
    assert [(one.table, one.weight) for one in found.mix] == [("m.wiki", 1.0), ("m.books", 0.5), ("m.training", 2.0)]
    assert record() == {
        "mix": [{"table": f"m.{name}", "weight": w} for name, w in (("wiki", 1.0), ("books", 0.5), ("training", 2.0))]
    }
    check({"wiki": 1.0, "books": 0.5, "training": 2.0})
    assert all(api.verify(name).problems == [] for name in NAMES)
    asked = searched(monkeypatch)
    files = stored_files("training", "neighbours/*")
    reported = run(
        "neighbours", "wiki", "--queries", "training", "--name", "m", "--exact", "--database", "training=1",
        "--database", "books=3", "--database", "wiki=0.25",
    )  # fmt: skip
    assert reported.stdout.startswith(
        "All embedded chunks have their neighbours ('m': 20 saved, 2 used, a mixture of 3 databases"
    )
    assert asked == [] and stored_files("training", "neighbours/*") == files
    check({"wiki": 0.25, "training": 1.0, "books": 3.0})
    before = Store.open("training").state.number
    assert [one.weight for one in mix(("books", None), ("training", None)).mix] == [0.25, 3.0, 1.0], "as they were"
    assert mix().commit == Store.open("training").state.number, "and with no database named"
    assert Store.open("training").state.number == before + 1, "the order of the databases is another one, that is all"
    shown = run("info", "training").stdout
    assert "a mixture of m.wiki (weight 0.25), m.books (weight 3), m.training (weight 1) for" in shown
    reader = retrotool.open("training")
    with pytest.raises(UsageError, match="come from several databases") as error:
        reader.neighbour_ids(int(reader.chunk_ids(0)[0]), "m")
    assert "neighbour_places" in error.value.advice


@pytest.mark.usefixtures("here")
def test_filters_hold_in_every_database_and_for_one_that_comes_later() -> None:
    found = mix(("training", None), filters=FilterOptions(near_copies=True))
    assert [one.filters for one in found.mix] == [{"near_copies": True}] * 2
    found = mix(("training", None), ("books", None))
    assert [one.filters for one in found.mix] == [{"near_copies": True}] * 3 and found.filters_kept
    assert [one.queries > 0 for one in found.mix] == [False, False, True], "only the new one is searched"
    check(dict.fromkeys(NAMES, 1.0), copies=False)
    with pytest.raises(UsageError, match="wiki and books and training: no document has the source 'z'"):
        mix(("books", None), ("training", None), filters=FilterOptions(only_sources=("z",)))


@pytest.mark.usefixtures("here")
def test_purges_and_growth_in_the_databases(tiny_encoder: Path) -> None:
    mix(("books", 2.0), ("training", 1.0), saved=6)
    Path("names").write_text("wiki-doc-3\nsame-1\n")
    api.purge("wiki", api.Selectors(document=Path("names")), reason="test", erase=True)
    Path("names").write_text("training-doc-83\n")
    api.purge("training", api.Selectors(document=Path("names")), reason="test")
    check({"wiki": 1.0, "books": 2.0, "training": 1.0}, k=2)
    rows = [{**row, "id": f"late-{row['id']}"} for row in make_rows(8, first=500, words=60)]
    grow(Path("books"), tiny_encoder, rows)
    found = mix(saved=6)
    assert [one.table for one in found.mix] == ["m.wiki", "m.books", "m.training"] and found.queries > 0
    check({"wiki": 1.0, "books": 2.0, "training": 1.0}, k=2)
    grow(Path("training"), tiny_encoder, [{**row, "id": f"x-{row['id']}"} for row in rows[:3]])
    mix(saved=6)
    check({"wiki": 1.0, "books": 2.0, "training": 1.0}, k=2)
    assert all(api.verify(name).problems == [] for name in NAMES)


@pytest.mark.usefixtures("here")
def test_a_plain_table_does_not_become_a_mixture_nor_a_mixture_a_plain_table() -> None:
    mix()
    before = record()
    with pytest.raises(UsageError, match=r"'m' are a table of .*wiki") as error:
        mix(("books", 4.0))
    assert error.value.advice == "Give the mixture another --name."
    assert record() == before and record("m.books") is None, "nothing was changed"
    mix(("books", 4.0), name="both")
    check({"wiki": 1.0, "books": 4.0}, name="both")
    with pytest.raises(UsageError, match="a mixture needs another database"):
        mix(("wiki", None), name="both")
    with pytest.raises(UsageError, match=r"'both' are a mixture of .*wiki, .*books") as error:
        mix(first="training", name="both")
    assert "--database" in error.value.advice
    assert api.verify("training").problems == []


@pytest.mark.usefixtures("here")
def test_what_a_mixture_no_longer_names_stays_as_a_plain_table(monkeypatch: pytest.MonkeyPatch) -> None:
    mix(("books", 2.0))
    shown = run("neighbours", "books", "--queries", "training", "--name", "m", "--exact", "--database", "training")
    assert "No longer in 'm', but kept as tables: m.wiki." in shown.stdout
    check({"books": 2.0, "training": 1.0})
    assert retrotool.open("training").neighbours(int(retrotool.open("training").chunk_ids(0)[0]), "m.wiki")
    asked = searched(monkeypatch)
    found = mix(("books", None))
    assert found.queries == 0 and asked == [] and found.left_out == ("m.training",), "what it left out is used again"
    check({"wiki": 1.0, "books": 2.0})
    assert api.verify("training").problems == []


def test_weights_may_be_as_far_apart_as_weights_can_be(here: Path) -> None:
    for weights in ({"wiki": 1e30, "books": 1e-30}, {"wiki": 1e-30, "books": 1e30}):
        mix(("wiki", weights["wiki"]), ("books", weights["books"]))
        check(weights)


def test_a_mixture_whose_database_moved(here: Path) -> None:
    mix(("books", 2.0))
    move_store(here / "wiki", here / "moved")
    reader = retrotool.open("training")
    with pytest.raises(
        retrotool.errors.StoreNotFoundError, match=r"the database of the neighbours 'm\.wiki' of .*training is missing"
    ) as error:
        reader.neighbours(0, "m")
    reported = error.value.advice.split(": ")[-1].replace("DATABASE", "moved").split()
    assert run(*reported[1:]).stdout.startswith("All embedded chunks have their neighbours")
    check({"moved": 1.0, "books": 2.0})
    found = mix(first="moved")
    assert found.queries == 0 and [Path(one.database).name for one in found.mix] == ["moved", "books"]
    check({"moved": 1.0, "books": 2.0})


def test_a_run_that_was_killed_leaves_the_mixture_that_there_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix(("training", 1.0))
    execute = engine.execute

    def killed(stage: Any, *arguments: Any, **options: Any) -> None:
        if stage.table == "m.books":
            raise KeyboardInterrupt
        execute(stage, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "execute", killed)
        with pytest.raises(KeyboardInterrupt):
            mix(("books", None))
    check({"wiki": 1.0, "training": 1.0})
    mix(("books", None))
    check({"wiki": 1.0, "books": 1.0})
    assert api.verify("training").problems == []


def test_databases_that_do_not_go_together_are_refused(
    here: Path, tiny_encoder: Path, byte_level_tokenizer: Path
) -> None:
    def made_of(name: str, **options: Any) -> None:
        source = str(write_jsonl(here / f"{name}.jsonl", make_rows(3)))
        api.chunk(name, [source], **{"tokenizer": str(tiny_encoder), **options})
        api.embed(name, encoder=str(tiny_encoder))

    made_of("bytes", tokenizer=str(byte_level_tokenizer))
    made_of("short", chunk_length=32)
    copy_store("books", "copy of books")
    for databases, said in (
        ((("bytes", None),), "have different tokenizers"),
        ((("short", 1.0),), "wiki has chunks of 64 tokens, short of 32"),
        ((("books", 1.0), ("books", 2.0)), "books: this database, or a copy of it, was given before"),
        ((("books", 1.0), ("copy of books", 2.0)), "copy of books: this database, or a copy of it"),
        ((("wiki", 1.0), ("wiki", None), ("books", None)), "wiki: this database"),
        ((("books", 0.0),), "is not between 1e-30"),
        ((("books", -1.0),), "is not between 1e-30"),
        ((("books", float("nan")),), "is not between 1e-30"),
        ((("books", float("inf")),), "is not between 1e-30"),
        ((("books", 1e-40),), "between 1e-30 and 1e\\+30"),
        ((("books", 1e39),), "between 1e-30 and 1e\\+30"),
        ((("wiki", 2.0),), "a mixture needs another database"),
    ):
        with pytest.raises(UsageError, match=said):
            mix(*databases)
    with pytest.raises(retrotool.errors.StoreNotFoundError):
        mix(("nowhere", None))
    assert record() is None and not Path("training/neighbours").exists(), "nothing was changed"
    other = make_encoder(here / "models" / "other", 3)
    for name in ("books", "training"):
        api.embed(name, encoder=str(other))
    api.index("books", encoder="other")
    api.index("wiki")
    with pytest.raises(UsageError, match="searched with different encoders \\(other and tiny\\)"):
        api.neighbours("wiki", queries="training", databases=[("books", None)])
    api.neighbours(
        "wiki", queries="training", name="a", databases=[("training", None)],
        search=SearchOptions(exact=True, encoder="tiny"),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"'a\.wiki' are a table"):
        mix(("books", None), name="a.wiki")


def test_at_most_255_databases(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert neighbours_run.MOST_DATABASES == 255
    monkeypatch.setattr(neighbours_run, "MOST_DATABASES", 2)
    with pytest.raises(UsageError, match="3 databases; a mixture can have 2"):
        mix(("books", None), ("training", None))


def test_folders_of_one_name_get_tables_of_different_ones(here: Path) -> None:
    for name, folder in (("books", "one"), ("wiki", "two")):
        (here / folder).mkdir()
        move_store(here / name, here / folder / "my store=2!")
    found = mix(("two/my store=2!", None), first="one/my store=2!")
    assert [one.table for one in found.mix] == ["m.my-store-2", "m.my-store-2-2"]
    reported = run("neighbours", "one/my store=2!", "--queries", "training", "--name", "m", "--exact",
               "--database", "two/my store=2!=0.5")  # fmt: skip
    assert reported.exit_code == 0 and [member["weight"] for member in record()["mix"]] == [1.0, 0.5]


def test_verify_notes_a_mixture_that_is_not_one(here: Path) -> None:
    mix(("books", None))
    store = Store.open("training")
    for broken, said in (
        ([{"table": "m.wiki", "weight": 1.0}, {"table": "gone", "weight": 1.0}], "names a table that doesn't exist"),
        ([{"table": "m.wiki", "weight": 1.0}] * 2, "two of the same database"),
        ([{"table": "m.wiki", "weight": 0}], "has a weight that is not a positive number"),
    ):
        with writing(store) as run_:
            store.commit(run_, lambda _: Draft("neighbours", records={"neighbours:m": {"mix": broken}}))  # noqa: B023
        (problem,) = map(str, api.verify("training").problems)
        assert problem == f"neighbours m: the mixture {problem.partition('mixture ')[2]}" and said in problem


def test_an_index_can_be_dropped_where_there_are_mixtures(here: Path) -> None:
    mix(("books", None))
    api.index("training")
    reported = run("index", "training", "--drop", "--name", "main")
    assert reported.exit_code == 0 and "are kept" not in reported.stdout
