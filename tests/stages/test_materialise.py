"""Materialised neighbours: made anew when and only when they must be, rewritten by an erase, never with purged text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from dataset_help import chunk, flat, make_large, same, two_stores

import retrotool
from retrotool import RetroDataset, api, engine
from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours import materialise
from retrotool.neighbours.materialise import MaterialiseStage
from retrotool.neighbours.materialised import MaterialisedReader
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.table_reader import NeighbourReader
from retrotool.store import folding, parts, staging
from retrotool.store import materialised as files
from retrotool.store.atomic import FileEntry
from retrotool.store.log import Draft
from retrotool.store.runs import Run
from retrotool.store.session import writing
from retrotool.store.store import Store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Path]:
    """A database and a training store with materialised neighbours. Not to be changed."""
    return two_stores(tmp_path_factory.mktemp("two"), tiny_encoder)


@pytest.fixture
def copies(stores: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be changed."""
    database, training = (Path(shutil.copytree(store, tmp_path / store.name)) for store in stores)
    api.neighbours(database, queries=training)
    return database, training


@pytest.fixture
def own(store_copy: Path) -> Path:
    """A store whose neighbours are its own chunks, materialised."""
    api.neighbours(store_copy, materialise=True)
    return store_copy


def entries(store: Path, name: str = "main") -> dict[str, FileEntry]:
    group = Store.open(store).state.group("materialised", name)
    return {slot: group.get(slot) for slot in group}


def nothing(_: int) -> None:
    """Reports to nobody."""


def bytes_of(store: Path, *kinds: str) -> bytes:
    """All values of files of some kinds, decoded."""
    found = []
    for entry in Store.open(store).state.files():
        if entry.path.startswith(kinds):
            table = pq.read_table(store / entry.path)
            found += [b"".join(table["tokens"].to_pylist())]
    return b"".join(found)


def tokens_of(store: Path, ids: list[int]) -> list[bytes]:
    found = retrotool.open(store).tokens(ids)
    return [row.tobytes() for row in found]


def test_rows_are_the_nearest_with_their_tokens_as_other_tools_read_them(stores: tuple[Path, Path]) -> None:
    database, training = stores
    reader = retrotool.open(training)
    for part in api.info(training).parts:
        table = pq.read_table(training / part["materialised"]["main"]["path"])
        assert table.num_rows == part["chunks"]["rows"]
        tokens = np.frombuffer(b"".join(table["tokens"].to_pylist()), "<u2").reshape(-1, 2, 2, 64)
        for row in range(table.num_rows):
            near = reader.neighbours((part["part"] << 32) + row)
            assert table["ids"][row].as_py() == [n.id for n in near]
            assert table["databases"][row].as_py() == [0, 0]
            counts = [c for n in near for c in (n.chunk.n_tokens, n.continuation.n_tokens if n.continuation else 0)]
            assert table["n_tokens"][row].as_py() == counts
            for place, n in enumerate(near):
                assert tokens[row, place, 0].tobytes() == tokens_of(database, [n.id])[0]
                follows = tokens_of(database, [n.continuation.id])[0] if n.continuation else b"\0" * 128
                assert tokens[row, place, 1].tobytes() == follows


def test_a_second_run_does_nothing_and_reads_nothing(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = stores[1]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("reads a file")

    monkeypatch.setattr(files, "read_materialised", refuse)
    before = Store.open(training).state.number
    made = api.materialise(training)
    assert (made.made, made.k, made.parts, made.commit) == (0, 2, 2, before)
    assert made.rows == sum(part["chunks"]["rows"] for part in api.info(training).parts)


def test_a_file_is_made_anew_once_its_table_is(copies: tuple[Path, Path], tiny_encoder: Path) -> None:
    database, training = copies
    before = entries(training)
    chunk(database, tiny_encoder, make_rows(30, first=300))
    api.index(database)
    api.neighbours(database, queries=training)
    after = entries(training)
    assert after.keys() == before.keys(), "once there, it is kept up to date"
    assert not any((training / entry.path).exists() for entry in before.values())
    for slot, entry in after.items():
        assert entry.about["tables"] == [Store.open(training).state.file("neighbours", slot, "main").path]
    api.neighbours(database, queries=training, k=3, materialise=True)
    assert {entry.about["k"] for entry in entries(training).values()} == {3}
    assert api.verify(training).problems == []


def test_a_part_that_came_later_is_added(copies: tuple[Path, Path], tiny_encoder: Path) -> None:
    database, training = copies
    before = entries(training)
    chunk(training, tiny_encoder, make_rows(5, first=300))
    result = api.neighbours(database, queries=training, materialise=True)
    after = entries(training)
    assert {slot: after[slot] for slot in before} == before and len(after) == 3
    assert result.materialised.made == after["000002"].rows


def test_only_parts_that_hold_what_was_purged_are_made_anew(copies: tuple[Path, Path]) -> None:
    database, training = copies
    ids = {slot: held_ids(training, entry) for slot, entry in entries(training).items()}
    everything = set().union(*ids.values())
    unused = next(
        i for part in (0, 1) for i in retrotool.open(database).chunk_ids(part).tolist() if not {i, i - 1} & everything
    )
    before = entries(training)
    purge_ids(database, unused)
    assert api.materialise(training).made == 0
    assert entries(training) == before, "it changed nothing that matters"
    victim = next(i for i in ids["000000"] if not {i, i - 1} & ids["000001"])
    purge_ids(database, victim)
    made = api.materialise(training)
    assert made.made == before["000000"].rows
    assert entries(training)["000001"] == before["000001"]
    assert victim not in held_ids(training, entries(training)["000000"])
    assert api.materialise(training).made == 0


def held_ids(store: Path, entry: FileEntry) -> set[int]:
    return set(files.read_materialised(Store.open(store), entry, tokens=False).ids.flatten().tolist())


def purge_ids(store: Path, *ids: int, erase: bool = False) -> Any:
    (store.parent / "ids").write_text("".join(f"{i}\n" for i in ids))
    return api.purge(store, api.Selectors(ids=str(store.parent / "ids")), reason="test", erase=erase)


def test_a_purge_of_a_continuation_alone_makes_the_file_anew(copies: tuple[Path, Path]) -> None:
    database, training = copies
    everything = set().union(*(held_ids(training, entry) for entry in entries(training).values()))
    reader = retrotool.open(database)
    victim = next(
        c.id for i in sorted(everything) if (c := reader.continuation(i)) is not None and c.id not in everything
    )
    trace = tokens_of(database, [victim])[0]
    assert trace in bytes_of(training, "materialised")
    purge_ids(database, victim)
    assert api.materialise(training).made > 0
    assert trace not in bytes_of(training, "materialised")
    assert api.materialise(training).made == 0


def test_what_an_earlier_file_has_is_copied_and_not_read_again(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, training = copies
    victim = min(held_ids(training, entries(training)["000000"]))
    purge_ids(database, victim)
    asked = []
    pieces = NeighbourReader.pieces

    def counted(reader: NeighbourReader, found: Any, into: Any = None) -> Any:
        asked.append(int((found.ids >= 0).any(axis=1).sum()))
        return pieces(reader, found, into)

    monkeypatch.setattr(NeighbourReader, "pieces", counted)
    api.materialise(training)
    monkeypatch.undo()
    assert 0 < sum(asked) < entries(training)["000000"].rows
    check_all(training)


def check_all(store: Path, name: str = "main") -> None:
    """All files are what the tables and the databases give."""
    opened = Store.open(store)
    reader = NeighbourReader(opened, name)
    for slot, entry in entries(store, name).items():
        stored = files.read_materialised(opened, entry)
        found = reader.read(int(slot), stored.ids.shape[1])
        pieces = reader.pieces(found)
        assert (stored.ids == found.ids).all() and (stored.databases == found.databases).all()
        assert (stored.n_tokens.reshape(-1, 2) == pieces.n_tokens).all()
        assert (stored.tokens.reshape(pieces.tokens.shape) == pieces.tokens).all()


def test_blocks_of_several_row_groups_and_of_one_give_the_same(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_large(tmp_path / "store", tiny_encoder, [20_000, 9000])
    api.materialise(store)
    check_all(store)
    groups = [pq.read_metadata(store / entry.path).row_group(0).num_rows for entry in entries(store).values()]
    assert groups == [8192, 8192]
    sums = {slot: entry.sha256 for slot, entry in entries(store).items()}
    other = make_large(tmp_path / "other", tiny_encoder, [20_000, 9000])
    monkeypatch.setattr(materialise, "BLOCK_BYTES", 1)
    api.materialise(other)
    assert {slot: entry.sha256 for slot, entry in entries(other).items()} == sums
    api.materialise(store, workers=2)


def test_several_processes_share_the_parts(tmp_path: Path, tiny_encoder: Path) -> None:
    store = make_large(tmp_path / "store", tiny_encoder, [900, 800, 700, 600])
    made = api.materialise(store, workers=2)
    assert (made.parts, made.made) == (4, 3000)
    check_all(store)


def test_a_store_without_tables_is_told_how_to_make_them(store_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no neighbours 'none'") as error:
        api.materialise(store_copy, name="none")
    assert "retrotool neighbours" in error.value.advice


# Purges and erases


def everything_of(store: Path) -> bytes:
    return bytes_of(store, "chunks", "materialised")


def test_an_erase_in_the_same_store_zeroes_slots_and_keeps_the_file_current(own: Path) -> None:
    options = {"sequence_length": 256, "batch_size": 8}
    reader = retrotool.open(own)
    victims = reader.document("doc-9") + reader.document("doc-30")
    traces = tokens_of(own, victims)
    assert all(trace in bytes_of(own, "materialised") for trace in traces[:2])
    purge_ids(own, *victims)
    masked = list(RetroDataset(own, **options))
    result = api.purge(own, api.Selectors(ids=str(own.parent / "ids")), reason="test", erase=True)
    haystack = everything_of(own)
    assert [trace for trace in traces if trace in haystack] == []
    assert not any(held_ids(own, entry) & set(victims) for entry in entries(own).values())
    assert any(-2 in held_ids(own, entry) for entry in entries(own).values())
    assert result.files_rewritten >= len(entries(own))
    dataset = RetroDataset(own, **options)
    assert dataset.materialised_parts() == (4, 4), "the tables were rewritten, too, and are the same tables"
    assert same(masked, list(dataset), but=())
    assert api.verify(own).problems == []
    for part in api.info(own).parts:
        rows = [i & 0xFFFFFFFF for i in victims if i >> 32 == part["part"]]
        table = pq.read_table(own / part["materialised"]["main"]["path"])
        for row in rows:
            assert table["ids"][row].as_py() == [-1, -1]
            assert not any(table["tokens"][row].as_py())
    made = api.materialise(own)
    assert made.made > 0
    assert same(masked, list(RetroDataset(own, **options)), but=())
    check_all(own)


def test_an_erase_of_a_continuation_leaves_the_neighbour(own: Path) -> None:
    held = set().union(*(held_ids(own, entry) for entry in entries(own).values()))
    reader = retrotool.open(own)
    n, victim = next((i, c.id) for i in sorted(held) if (c := reader.continuation(i)) is not None)
    others = held - {victim}
    trace = tokens_of(own, [victim])[0]
    purge_ids(own, victim, erase=True)
    assert trace not in everything_of(own)
    assert n in set().union(*(held_ids(own, entry) for entry in entries(own).values())) <= others | {-1, -2}
    assert api.verify(own).problems == []


def test_a_mixture_is_materialised_with_its_tables_and_its_databases_know(
    copies: tuple[Path, Path], tiny_encoder: Path
) -> None:
    database, training = copies
    books = chunk(database.with_name("books"), tiny_encoder, make_rows(20, first=400))
    search = SearchOptions(exact=True)
    result = api.neighbours(
        database, queries=training, name="both", databases=[(books, 2.0)], search=search, materialise=True
    )
    assert result.materialised is not None and result.materialised.parts == 2
    check_all(training, "both")
    stored = files.read_materialised(Store.open(training), entries(training, "both")["000000"])
    assert set(stored.databases.flatten().tolist()) == {0, 1}
    assert api.materialise(training, name="both").made == 0
    victim = int(stored.ids[stored.databases == 1][0])
    trace = tokens_of(books, [victim])[0]
    assert trace in bytes_of(training, "materialised")
    (one,) = purge_ids(books, victim, erase=True).dependents
    assert one.table == "both.books"
    api.neighbours(database, queries=training, name="both", search=search)
    assert trace not in bytes_of(training, "materialised")
    assert api.verify(training).problems == []


def test_files_of_parts_that_have_no_table_any_more_go(own: Path) -> None:
    store = Store.open(own)
    with writing(store) as run:
        gone = store.state.part_file("neighbours", 1, "main")
        assert gone is not None
        store.commit(run, lambda _: Draft("test", remove=(gone.path,)))
    assert api.materialise(own).parts == 3
    assert "000001" not in entries(own)


def test_an_erase_of_the_training_text_empties_its_rows(copies: tuple[Path, Path]) -> None:
    training = copies[1]
    victims = retrotool.open(training).document("doc-55")
    purge_ids(training, *victims, erase=True)
    reader = Store.open(training)
    for slot, entry in entries(training).items():
        stored = files.read_materialised(reader, entry)
        rows = [i & 0xFFFFFFFF for i in victims if i >> 32 == int(slot)]
        assert (stored.ids[rows] == -1).all() and not stored.tokens[rows].any() and not stored.n_tokens[rows].any()
        others = np.delete(np.arange(len(stored)), rows)
        assert (stored.ids[others] >= 0).all()
    assert api.verify(training).problems == []


def perform_late(
    store: Store, run: Run, part: int, between: Callable[[], object], name: str = "main"
) -> folding.Folded:
    """Do a part's task, and let something happen before it is committed."""
    stage = MaterialiseStage(name)
    (task,) = (task for task in stage.plan(store) if task.inputs["part"] == part)
    late = stage.open(store)(task, run.id, nothing)
    between()
    staging.stage(store.root, late)
    return folding.fold(store, run)


def test_what_was_materialised_before_a_purge_of_the_same_store_is_not_committed_after_it(store_copy: Path) -> None:
    """Also of a continuation alone: no table of the part names it, so none is rewritten by the erase."""
    api.neighbours(store_copy, name="few", saved=2)
    reader = retrotool.open(store_copy)
    named = {
        n.id for part in reader.parts() for i in reader.chunk_ids(part).tolist() for n in reader.neighbours(i, "few")
    }
    near = {n.id for i in reader.chunk_ids(0).tolist() for n in reader.neighbours(i, "few")}
    victim = next(c.id for i in sorted(near) if (c := reader.continuation(i)) is not None and c.id not in named)
    trace = tokens_of(store_copy, [victim])[0]
    store = Store.open(store_copy)
    with writing(store) as run:
        folded = perform_late(store, run, 0, lambda: purge_ids(store_copy, victim, erase=True), "few")
        assert list(folded.refused.values()) == ["chunks were purged meanwhile"]
        assert not folded.committed
        engine.execute(MaterialiseStage("few"), store, run)
    assert trace not in everything_of(store_copy)
    check_all(store_copy, "few")


def test_a_purge_in_another_store_while_a_file_is_written_is_seen(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, training = copies
    victim = max(held_ids(training, entries(training)["000000"]))
    trace = tokens_of(database, [victim])[0]
    write, done = files.write_materialised, []

    def write_slowly(*arguments: Any, **options: Any) -> FileEntry:
        entry = write(*arguments, **options)
        if not done:
            done.append(entry.path)
            purge_ids(database, victim, erase=True)
        return entry

    monkeypatch.setattr(files, "write_materialised", write_slowly)
    api.neighbours(database, queries=training, k=3)
    assert done and not (training / done[0]).exists()
    assert trace not in bytes_of(training, "materialised")
    check_all(training)


def test_a_table_that_is_computed_again_meanwhile_is_materialised_again(store_copy: Path) -> None:
    api.index(store_copy, name="other")
    store = Store.open(store_copy)
    with writing(store) as run:
        folded = perform_late(store, run, 1, lambda: api.neighbours(store_copy, index="other"))
        assert list(folded.refused) and not folded.committed
        engine.execute(MaterialiseStage("main"), store, run)
    check_all(store_copy)


# What is on the disk


def test_files_of_other_columns_are_corrupt(stores: tuple[Path, Path], tmp_path: Path) -> None:
    opened = Store.open(stores[1])
    entry = next(iter(entries(stores[1]).values()))
    other = FileEntry(entry.path, entry.rows, entry.bytes, entry.sha256, {**entry.about, "k": 3})
    with pytest.raises(CorruptError, match="does not hold 3 neighbours"):
        files.read_materialised(opened, other)
    assert files.read_materialised(opened, entry).nearest(1).tokens.shape == (entry.rows, 1, 2, 64)


def test_a_plain_row_is_read_through_the_tables(stores: tuple[Path, Path]) -> None:
    reader = NeighbourReader(Store.open(stores[1]), "main")
    found = MaterialisedReader(reader, 2).read([(0, 0), (1, 0)])
    rows = [parts.part_entry(reader.store, "chunks", part).rows for part in (0, 1)]
    assert len(found) == sum(rows)
    assert len(flat([])) == 0
