"""Tables that have the tokens of neighbours: written again when and only when they must be, never with purged text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from dataset_help import chunk, make_large, same, two_stores
from stored import copy_store, stored_file
from test_neighbour_filters import spied

import retrotool
from retrotool import RetroDataset, api, engine
from retrotool.errors import CorruptError, UsageError
from retrotool.neighbours import retrieved
from retrotool.neighbours.run import SearchOptions
from retrotool.neighbours.stage import NeighboursStage
from retrotool.neighbours.table_reader import NeighbourReader, TextReader
from retrotool.store import folding, neighbour_tables, staging
from retrotool.store.folding import writing
from retrotool.store.log import FileEntry
from retrotool.store.store import Store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Path]:
    """A database and a training store with materialised neighbours. Not to be changed."""
    return two_stores(tmp_path_factory.mktemp("two"), tiny_encoder)


@pytest.fixture
def copies(stores: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be changed."""
    database, training = (copy_store(store, tmp_path / store.name) for store in stores)
    api.neighbours(database, queries=training)
    return database, training


@pytest.fixture
def own(store_copy: Path) -> Path:
    """A store whose neighbours are its own chunks, with their tokens."""
    api.neighbours(store_copy, materialise=True)
    return store_copy


def entries(store: Path, name: str = "main") -> dict[str, FileEntry]:
    group = Store.open(store).state.group("neighbours", name)
    return {slot: group.get(slot) for slot in group}


def text_of(store: Path, entry: FileEntry) -> neighbour_tables.NeighbourText:
    return neighbour_tables.read_text(Store.open(store), entry)


def held_ids(store: Path, entry: FileEntry) -> set[int]:
    return set(text_of(store, entry).ids.flatten().tolist())


def text_bytes(store: Path) -> bytes:
    """All tokens of neighbours, decoded."""
    files = [entry for entry in Store.open(store).state.files() if entry.path.startswith("neighbours/")]
    found = [pq.read_table(stored_file(store, entry.path)) for entry in files]
    return b"".join(
        b"".join(table["text_tokens"].to_pylist()) for table in found if "text_tokens" in table.schema.names
    )


def everything_of(store: Path) -> bytes:
    chunks = [entry for entry in Store.open(store).state.files() if entry.path.startswith("chunks/")]
    return text_bytes(store) + b"".join(
        b"".join(pq.read_table(stored_file(store, e.path))["tokens"].to_pylist()) for e in chunks
    )


def tokens_of(store: Path, ids: list[int]) -> list[bytes]:
    found = retrotool.open(store).tokens(ids)
    return [row.tobytes() for row in found]


def purge_ids(store: Path, *ids: int, erase: bool = False) -> Any:
    (store.parent / "ids").write_text("".join(f"{i}\n" for i in ids))
    return api.purge(store, api.Selectors(chunk=store.parent / "ids"), reason="test", erase=erase)


def check_all(store: Path, name: str = "main") -> None:
    """What the tables have is what they and the database give."""
    opened = Store.open(store)
    reader = NeighbourReader(opened, name)
    for slot, entry in entries(store, name).items():
        stored = neighbour_tables.read_text(opened, entry)
        found = reader.read(int(slot), stored.ids.shape[1])
        pieces = reader.pieces(found)
        assert (stored.ids == found.ids).all() and (stored.distances == found.distances).all()
        assert (stored.n_tokens.reshape(-1, 2) == pieces.n_tokens).all()
        assert (stored.tokens.reshape(pieces.tokens.shape) == pieces.tokens).all()


def test_rows_are_the_nearest_with_their_tokens_as_other_tools_read_them(stores: tuple[Path, Path]) -> None:
    database, training = stores
    reader = retrotool.open(training)
    for part in api.info(training).parts:
        table = pq.read_table(stored_file(training, part["neighbours"]["main"]["path"]))
        assert table.num_rows == part["chunks"]["rows"]
        tokens = np.frombuffer(b"".join(table["text_tokens"].to_pylist()), "<u2").reshape(-1, 2, 2, 64)
        for row in range(table.num_rows):
            near = reader.neighbours((part["part"] << 32) + row)
            assert table["text_ids"][row].as_py() == [n.id for n in near]
            assert table["text_distances"][row].as_py() == table["distances"][row].as_py()[:2]
            counts = [c for n in near for c in (n.chunk.n_tokens, n.continuation.n_tokens if n.continuation else 0)]
            assert table["text_n_tokens"][row].as_py() == counts
            for place, n in enumerate(near):
                assert tokens[row, place, 0].tobytes() == tokens_of(database, [n.id])[0]
                follows = tokens_of(database, [n.continuation.id])[0] if n.continuation else b"\0" * 128
                assert tokens[row, place, 1].tobytes() == follows


def test_a_second_run_does_nothing_and_reads_nothing(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, training = copies
    before = Store.open(training).state.number
    monkeypatch.setattr(neighbour_tables, "read_text", None)
    monkeypatch.setattr(neighbour_tables, "read_ids", None)
    found = api.neighbours(database, queries=training, materialise=True)
    assert (found.commit, found.materialised) == (before, True)


def test_tables_that_are_there_get_the_tokens_and_nothing_is_searched(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.neighbours(store_copy, name="plain")
    before, files = api.verify(store_copy).neighbours, entries(store_copy, "plain")
    asked = spied(monkeypatch)
    found = api.neighbours(store_copy, name="plain", materialise=True)
    assert (found.queries, found.materialised, asked) == (0, True, [])
    assert api.verify(store_copy).neighbours == before
    assert not any(stored_file(store_copy, entry.path).exists() for entry in files.values())
    check_all(store_copy, "plain")


def test_later_runs_keep_the_tokens(copies: tuple[Path, Path], tiny_encoder: Path) -> None:
    database, training = copies
    before = entries(training)
    chunk(database, tiny_encoder, make_rows(30, first=300))
    api.index(database)
    assert api.neighbours(database, queries=training).materialised
    assert entries(training).keys() == before.keys()
    assert not any(stored_file(training, entry.path).exists() for entry in before.values())
    check_all(training)
    api.neighbours(database, queries=training, k=3)
    assert {neighbour_tables.text_size(entry) for entry in entries(training).values()} == {3}
    check_all(training)
    assert api.verify(training).problems == []


def test_a_part_that_came_later_is_added(copies: tuple[Path, Path], tiny_encoder: Path) -> None:
    database, training = copies
    before = entries(training)
    chunk(training, tiny_encoder, make_rows(5, first=300))
    api.neighbours(database, queries=training)
    after = entries(training)
    assert {slot: after[slot] for slot in before} == before and len(after) == 3
    check_all(training)


def test_only_tables_that_have_what_was_purged_are_written_again(copies: tuple[Path, Path]) -> None:
    database, training = copies
    ids = {slot: held_ids(training, entry) for slot, entry in entries(training).items()}
    everything = set().union(*ids.values())
    unused = next(
        i for part in (0, 1) for i in retrotool.open(database).chunk_ids(part).tolist() if not {i, i - 1} & everything
    )
    before = entries(training)
    purge_ids(database, unused)
    api.neighbours(database, queries=training)
    assert entries(training) == before, "it changed nothing that matters"
    target = next(i for i in ids["000000"] if not {i, i - 1} & ids["000001"])
    purge_ids(database, target)
    assert api.neighbours(database, queries=training).queries == 0
    after = entries(training)
    assert after["000001"] == before["000001"] and after["000000"] != before["000000"]
    assert target not in held_ids(training, after["000000"])
    check_all(training)
    api.neighbours(database, queries=training)
    assert entries(training) == after


def test_a_purge_of_a_continuation_alone_is_seen(copies: tuple[Path, Path]) -> None:
    database, training = copies
    everything = set().union(*(held_ids(training, entry) for entry in entries(training).values()))
    reader = retrotool.open(database)
    target = next(
        c.id for i in sorted(everything) if (c := reader.continuation(i)) is not None and c.id not in everything
    )
    trace = tokens_of(database, [target])[0]
    assert trace in text_bytes(training)
    purge_ids(database, target)
    api.neighbours(database, queries=training)
    assert trace not in text_bytes(training)
    check_all(training)


def test_tokens_that_the_table_before_has_are_copied(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, training = copies
    target = min(held_ids(training, entries(training)["000000"]))
    purge_ids(database, target)
    asked = []
    read = retrieved.read_pieces

    def counted(store: Any, tombstones: Any, ids: Any, into: Any = None) -> Any:
        asked.append(int((ids >= 0).sum()))
        return read(store, tombstones, ids, into)

    monkeypatch.setattr(retrieved, "read_pieces", counted)
    api.neighbours(database, queries=training)
    monkeypatch.undo()
    assert 0 < sum(asked) < entries(training)["000000"].rows
    check_all(training)


def test_blocks_of_several_row_groups_and_of_one_give_the_same(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_large(tmp_path / "store", tiny_encoder, [20_000, 9000], text=True)
    check_all(store)
    groups = [
        pq.read_metadata(stored_file(store, entry.path)).row_group(0).num_rows for entry in entries(store).values()
    ]
    assert groups == [8192, 8192]
    monkeypatch.setattr(retrieved, "BLOCK_BYTES", 1)
    other = make_large(tmp_path / "other", tiny_encoder, [20_000, 9000], text=True)
    for slot, entry in entries(other).items():
        assert pq.read_table(stored_file(other, entry.path)).equals(
            pq.read_table(stored_file(store, entries(store)[slot].path))
        )


# Purges and erases


def test_an_erase_in_the_same_store_zeroes_slots(own: Path) -> None:
    options = {"sequence_length": 256, "batch_size": 8}
    reader = retrotool.open(own)
    targets = reader.document("doc-9") + reader.document("doc-30")
    traces = tokens_of(own, targets)
    assert all(trace in text_bytes(own) for trace in traces[:2])
    purge_ids(own, *targets)
    masked = list(RetroDataset(own, **options))
    result = api.purge(own, api.Selectors(chunk=own.parent / "ids"), reason="test", erase=True)
    haystack = everything_of(own)
    assert [trace for trace in traces if trace in haystack] == []
    assert not any(held_ids(own, entry) & set(targets) for entry in entries(own).values())
    assert any(-2 in held_ids(own, entry) for entry in entries(own).values())
    assert result.files_rewritten >= len(entries(own))
    dataset = RetroDataset(own, **options)
    assert dataset.materialised_parts() == (4, 4)
    assert same(masked, list(dataset), but=())
    assert api.verify(own).problems == []
    for slot, entry in entries(own).items():
        rows = [i & 0xFFFFFFFF for i in targets if i >> 32 == int(slot)]
        text = text_of(own, entry)
        assert (text.ids[rows] == -1).all() and not text.tokens[rows].any() and not text.n_tokens[rows].any()
    api.neighbours(own)
    assert same(masked, list(RetroDataset(own, **options)), but=())
    check_all(own)


def test_an_erase_of_a_continuation_leaves_the_neighbour(own: Path) -> None:
    held = set().union(*(held_ids(own, entry) for entry in entries(own).values()))
    reader = retrotool.open(own)
    n, target = next((i, c.id) for i in sorted(held) if (c := reader.continuation(i)) is not None)
    others = held - {target}
    trace = tokens_of(own, [target])[0]
    purge_ids(own, target, erase=True)
    assert trace not in everything_of(own)
    assert n in set().union(*(held_ids(own, entry) for entry in entries(own).values())) <= others | {-1, -2}
    assert api.verify(own).problems == []


def test_each_table_of_a_mixture_has_the_tokens(copies: tuple[Path, Path], tiny_encoder: Path) -> None:
    database, training = copies
    books = chunk(database.with_name("books"), tiny_encoder, make_rows(20, first=400))
    search = SearchOptions(exact=True)
    options = {"queries": training, "name": "both", "search": search}
    api.neighbours(database, databases=[(books, 2.0)], materialise=True, **options)
    reader = NeighbourReader(Store.open(training), "both")
    rows = TextReader(reader, 2)
    assert rows.with_text(0)
    given = rows.read([(0, 0)])
    assert set(given.databases.flatten().tolist()) == {0, 1}
    found = reader.read(0, 2)
    pieces = reader.pieces(found)
    assert (given.ids == found.ids).all() and (given.databases == found.databases).all()
    assert (given.tokens.reshape(pieces.tokens.shape) == pieces.tokens).all()
    assert (given.n_tokens.reshape(-1, 2) == pieces.n_tokens).all()
    before = {table: entries(training, table) for table in ("both.database", "both.books")}
    api.neighbours(database, databases=[(books, 0.5)], **options)
    assert {table: entries(training, table) for table in before} == before, "weights change no file"
    target = int(given.ids[given.databases == 1][0])
    trace = tokens_of(books, [target])[0]
    assert trace in text_bytes(training)
    (one,) = purge_ids(books, target, erase=True).dependents
    assert one.table == "both.books"
    api.neighbours(database, **options)
    assert trace not in text_bytes(training)
    assert api.verify(training).problems == []


def test_an_erase_of_the_training_text_empties_its_rows(copies: tuple[Path, Path]) -> None:
    training = copies[1]
    targets = retrotool.open(training).document("doc-55")
    purge_ids(training, *targets, erase=True)
    for slot, entry in entries(training).items():
        stored = text_of(training, entry)
        rows = [i & 0xFFFFFFFF for i in targets if i >> 32 == int(slot)]
        assert (stored.ids[rows] == -1).all() and not stored.tokens[rows].any() and not stored.n_tokens[rows].any()
        others = np.delete(np.arange(len(stored.ids)), rows)
        assert (stored.ids[others] >= 0).all()
    assert api.verify(training).problems == []


def perform_late(store: Store, name: str, between: Callable[[], object]) -> folding.Folded:
    """Do the task of part 0, and let something happen before it is committed; then do all tasks."""
    stage = NeighboursStage(store.place, "main", name, 2, 2, text=True)
    with writing(store) as run:
        (task,) = (task for task in stage.plan(store) if task.inputs["part"] == 0)
        late = stage.open(store)(task, run.id, lambda _: None)
        between()
        staging.stage(store.storage, late)
        folded = folding.fold(store, run)
        engine.execute(stage, store, run)
    return folded


def test_tokens_that_were_read_before_an_erase_are_not_committed_after_it(store_copy: Path) -> None:
    """Also of a continuation alone: no table names it, so none is rewritten by the erase."""
    api.neighbours(store_copy, name="few", saved=2)
    reader = retrotool.open(store_copy)
    named = {
        n.id for part in reader.parts() for i in reader.chunk_ids(part).tolist() for n in reader.neighbours(i, "few")
    }
    near = {n.id for i in reader.chunk_ids(0).tolist() for n in reader.neighbours(i, "few")}
    target = next(c.id for i in sorted(near) if (c := reader.continuation(i)) is not None and c.id not in named)
    trace = tokens_of(store_copy, [target])[0]
    folded = perform_late(Store.open(store_copy), "few", lambda: purge_ids(store_copy, target, erase=True))
    assert folded.refused and not folded.committed
    assert trace not in everything_of(store_copy)
    check_all(store_copy, "few")


def test_a_database_of_other_tokens_is_refused(
    tmp_path: Path, tiny_encoder: Path, byte_level_tokenizer: Path, copies: tuple[Path, Path]
) -> None:
    from conftest import write_jsonl

    database = tmp_path / "bytes"
    api.chunk(database, [str(write_jsonl(tmp_path / "c.jsonl", make_rows(10)))], tokenizer=str(byte_level_tokenizer))
    api.embed(database, encoder=str(tiny_encoder))
    with pytest.raises(UsageError, match="one model can't read both"):
        api.neighbours(database, queries=copies[1], name="bytes", materialise=True)
    assert "neighbours:bytes" not in Store.open(copies[1]).state.records


def test_files_of_other_columns_are_corrupt(stores: tuple[Path, Path]) -> None:
    opened = Store.open(stores[1])
    entry = next(iter(entries(stores[1]).values()))
    other = replace(entry, about={**entry.about, "text": 3})
    with pytest.raises(CorruptError, match="no tokens of 3 neighbours per row"):
        neighbour_tables.read_text(opened, other)
    assert neighbour_tables.read_text(opened, entry).nearest(1).tokens.shape == (entry.rows, 1, 2, 64)
