"""What was built while a purge was in effect that is undone is known, reported and repaired."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, Cli, make_rows, write_jsonl
from oracle import saved_neighbours
from restore_help import assert_exact, back, exact, near, purge, verified
from stored import copy_store

import retrotool
from retrotool import RetroDataset, api
from retrotool.ann.choice import IndexOptions
from retrotool.index.run import Options
from retrotool.neighbours.filters import FilterOptions
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones


def test_exports_and_training_give_what_they_gave(store_copy: Path, tmp_path: Path) -> None:
    api.neighbours(store_copy, materialise=True)

    def exported(name: str) -> list[dict[str, object]]:
        api.export(store_copy, tmp_path / name)
        return [row for path in sorted((tmp_path / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]

    def trained() -> list[list[int]]:
        dataset = RetroDataset(store_copy, sequence_length=256, shuffle=False)
        return [[*item["chunk_ids"].tolist(), *item["neighbours"].flatten().tolist()] for item in dataset]

    rows, items = exported("before"), trained()
    purged = purge(store_copy, "doc-7", "doc-30").purge
    assert exported("between") != rows and trained() != items
    back(store_copy, purged)
    assert exported("after") == rows and trained() == items
    before = Store.open(store_copy).state.number
    assert api.neighbours(store_copy).commit == before, "what is materialised is as it was"


def test_what_was_materialised_before_an_undo_is_not_read(store_copy: Path) -> None:
    api.neighbours(store_copy, materialise=True)
    dataset = RetroDataset(store_copy, sequence_length=256, shuffle=False)
    before = [item["neighbours"].tolist() for item in dataset]
    purged = purge(store_copy, "doc-7").purge
    number = Store.open(store_copy).state.number
    assert api.neighbours(store_copy).commit > number, "text of it was taken out"
    assert [command for command in back(store_copy, purged).next if "--queries" not in command]
    again = RetroDataset(store_copy, sequence_length=256, shuffle=False)
    assert [item["neighbours"].tolist() for item in again] == before
    api.neighbours(store_copy)
    again = RetroDataset(store_copy, sequence_length=256, shuffle=False)
    assert again.materialised_parts() == (4, 4) and [item["neighbours"].tolist() for item in again] == before
    assert verified(store_copy)


def test_tables_made_before_an_undo_are_searched_again(store_copy: Path, tmp_path: Path) -> None:
    found, before = near(store_copy), verified(store_copy)
    purged = purge(store_copy, "doc-7", "doc-30").purge
    api.neighbours(store_copy, name="other")
    api.neighbours(store_copy, k=19, saved=20)  # refills
    commands = [command for command in back(store_copy, purged).next if "--queries" not in command]
    assert len(commands) == 2
    for command in commands:
        words = command.split()[3:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        again = functools.partial(
            api.neighbours, store_copy, name=options.get("--name", "main"), index=options["--index"]
        )
        assert again().queries > 0
        assert again().queries == 0
    api.neighbours(store_copy)
    assert near(store_copy) == found == near(store_copy, "other")
    assert {**verified(store_copy), "neighbours": ""} == {**before, "neighbours": ""}
    assert_exact(store_copy, tmp_path / "scratch")
    assert_exact(store_copy, tmp_path / "scratch", "other")


@pytest.mark.parametrize("wanted", [IndexOptions(), IndexOptions(nlist=4, code="sq8")], ids=["exact", "lists"])
def test_an_index_made_before_an_undo_has_what_was_purged_and_returns_it_after_the_undo(
    store_copy: Path, tmp_path: Path, wanted: IndexOptions
) -> None:
    purged = purge(store_copy, "doc-7", "doc-100")
    chunks = read_tombstones(Store.open(store_copy), purged.purge).ids
    made = api.index(store_copy, name="made", options=Options(replace(wanted, shard_rows=150)))
    assert made.vectors == 366 and made.shards > 2
    api.neighbours(store_copy, name="made", index="made")
    reader = retrotool.open(store_copy)
    assert not np.isin(saved_neighbours(store_copy, "made")[0], chunks).any()
    assert not {n.id for n in reader.search("river mountain", 300, index="made")} & set(chunks.tolist())
    assert made.recall_at_10 > 0.9, "of what is live"
    back(store_copy, purged.purge)
    assert verified(store_copy)
    assert set(chunks.tolist()) <= {
        n.id for n in retrotool.open(store_copy).search("river mountain", 400, index="made")
    }
    assert api.index(store_copy, name="made").added == 0
    done = api.neighbours(store_copy, name="made", index="made")
    assert done.queries > 0 and done.not_indexed == 0
    assert api.neighbours(store_copy, name="made", index="made").queries == 0
    ids, true = saved_neighbours(store_copy, "made")[0], exact(store_copy, tmp_path / "scratch")[0]
    common = [len(set(row) & set(also)) for row, also in zip(ids.tolist(), true.tolist(), strict=True)]
    assert np.mean(common) > 19.5
    assert np.isin(ids, chunks).sum() > 0.95 * np.isin(true, chunks).sum() > 0


def test_the_recall_of_an_index_is_that_of_live_chunks_where_half_are_purged(store_copy: Path, tmp_path: Path) -> None:
    api.purge(store_copy, api.Selectors(where="source = 'a'"), reason="test")
    purged = read_tombstones(Store.open(store_copy))
    assert len(purged) > 150
    made = api.index(store_copy, name="half", options=Options(IndexOptions(nlist=8, code="sq8")))
    assert made.vectors == 366 and made.target_met
    api.neighbours(store_copy, name="half", index="half")
    ids, true = saved_neighbours(store_copy, "half")[0], exact(store_copy, tmp_path / "scratch")[0]
    assert not purged.contains(ids).any()
    live = true[:, 0] >= 0
    common = [len(set(row) & set(also)) for row, also in zip(ids[live].tolist(), true[live].tolist(), strict=True)]
    assert len(common) == 366 - len(purged) and np.mean(common) > 19


def test_what_was_set_aside_is_not_indexed_and_what_is_erased_leaves_the_index(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = make_rows(8, words=60)
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[3], "id": "again"}])
    store = tmp_path / "store"
    api.chunk(store, [str(path)], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    purged = purge(store, "doc-5")
    live = api.info(store).chunks
    assert api.index(store).vectors == live + purged.chunks
    purge(store, "doc-5", erase=True)
    assert api.info(store).indexes["main"]["vectors"] == live
    assert verified(store)


def test_a_document_added_before_an_undo_is_reported_and_is_not_its_own_neighbour(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = make_rows(12, words=200)
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    two = write_jsonl(tmp_path / "two.jsonl", [{**rows[3], "text": rows[3]["text"] + " and more"}])
    store = tmp_path / "store"
    api.chunk(store, [str(one)], tokenizer=str(tiny_encoder))
    purged = purge(store, "doc-3").purge
    api.chunk(store, [str(two)], allow_purged=True)
    api.embed(store, encoder=str(tiny_encoder))
    assert back(store, purged).repeats == 1
    api.neighbours(store)
    reader = retrotool.open(store)
    versions = [
        int(i) for part in reader.parts() for i in reader.chunk_ids(part) if reader.chunk(int(i)).document == "doc-3"
    ]
    assert len(versions) > len(reader.document("doc-3"))
    for chunk in versions:
        assert not set(versions) & {i for i, _ in reader.neighbour_ids(chunk, k=20)}
    assert verified(store)


def test_another_purge_is_erased_in_between(store_copy: Path) -> None:
    one = purge(store_copy, "doc-7")
    other = purge(store_copy, "doc-8", erase=True)
    api.index(store_copy, name="lists", options=Options(IndexOptions(nlist=4, code="sq8")))
    assert back(store_copy, one.purge).chunks == one.chunks
    assert purge(store_copy, "doc-9", erase=True).erased
    shown = api.info(store_copy)
    assert not shown.purges[one.purge]["erased"] and shown.purges[other.purge]["erased"]
    assert shown.indexes["lists"]["vectors"] == shown.chunks
    assert verified(store_copy)


def test_an_epoch_begun_before_an_undo_goes_on_as_it_was(store_copy: Path) -> None:
    purged = purge(store_copy, "doc-7", "doc-30").purge
    dataset = RetroDataset(store_copy, sequence_length=256, seed=3)
    items = [item["chunk_ids"].tolist() for item in dataset]
    dataset = RetroDataset(store_copy, sequence_length=256, seed=3)
    reading = iter(dataset)
    begun = [next(reading)["chunk_ids"].tolist() for _ in range(5)]
    state = dataset.state_dict()
    back(store_copy, purged)
    resumed = RetroDataset(store_copy, sequence_length=256, seed=3)
    resumed.load_state_dict(state)
    assert begun + [item["chunk_ids"].tolist() for item in resumed] == items


def test_neighbours_in_another_store_are_reported_and_found_again(store_copy: Path, tmp_path: Path) -> None:
    queries = copy_store(store_copy, tmp_path / "queries")
    api.neighbours(store_copy, queries=queries, name="theirs")
    whole = near(queries, "theirs")
    theirs, ours = purge(store_copy, "doc-7").purge, purge(queries, "doc-9").purge
    api.neighbours(store_copy, queries=queries, name="theirs", saved=19, k=2)
    api.neighbours(store_copy, queries=queries, name="theirs")
    command = f"retrotool neighbours {store_copy} --queries {queries} --name theirs --index main"
    assert command in back(queries, ours).next, "rows of theirs are empty"
    assert command in back(store_copy, theirs).next, "theirs was made while chunks were purged"
    api.neighbours(store_copy, queries=queries, name="theirs")
    assert near(queries, "theirs") == whole
    assert api.neighbours(store_copy, queries=queries, name="theirs").queries == 0


def test_rows_of_queries_alone_are_filled_again(store_copy: Path, tmp_path: Path) -> None:
    queries = copy_store(store_copy, tmp_path / "queries")
    ours = purge(queries, "doc-9")
    api.neighbours(store_copy, queries=queries, name="theirs")
    back(queries, ours.purge)
    assert api.neighbours(store_copy, queries=queries, name="theirs").queries == ours.chunks
    api.neighbours(store_copy, queries=queries, name="again")
    assert near(queries, "theirs") == near(queries, "again")


def test_what_follows_a_neighbour_is_judged_again_when_it_is_back(tmp_path: Path, tiny_encoder: Path) -> None:
    """A neighbour whose continuation has the query word for word, and that was purged when it was judged."""
    query, likewise = " ".join(WORDS[:40]), " ".join((WORDS[:40][::-1] * 2)[:64])
    rows = [{"id": "asks", "text": query}, {"id": "reports", "text": f"{likewise} {query}"}]
    store = tmp_path / "store"
    for number, some in enumerate((make_rows(6, words=150), make_rows(5, first=20, words=150), rows)):
        path = write_jsonl(tmp_path / f"{number}.jsonl", some)
        api.chunk(store, [str(path)], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    filters = FilterOptions(max_overlap=0.3)
    reader = retrotool.open(store)
    (asking, *_), (before, *following) = reader.document("asks"), reader.document("reports")
    api.neighbours(store, filters=filters, saved=12, name="never")
    whole = near(store, "never")
    assert before not in next(row for row in whole if row[0] == asking)
    purged = api.purge(store, api.Selectors(chunk=tuple(following)), reason="test").purge
    api.neighbours(store, filters=filters, saved=12)
    assert before in next(row for row in near(store) if row[0] == asking), "nothing that follows it is purged"
    back(store, purged)
    api.neighbours(store, filters=filters, saved=12)
    assert near(store) == whole


def test_what_it_did_is_shown(store_copy: Path, cli: Cli) -> None:
    chunks = retrotool.open(store_copy).document("doc-7")
    two = api.purge(store_copy, api.Selectors(chunk=(chunks[0],)), reason="test").purge
    one = api.purge(store_copy, api.Selectors(chunk=tuple(chunks)), reason="test").purge
    api.neighbours(store_copy, name="other")
    text = cli("undo", store_copy, one, "--reason", "another").stdout
    assert f"Undid purge {one}: {len(chunks) - 1} chunks, 1 whole document, are live again" in text
    assert f"Still purged: 1 chunk of it: {two} purged them, too." in text
    assert f"  retrotool neighbours {store_copy} --name other --index main" in text.splitlines()
    assert f"retrotool neighbours {store_copy} --index main" not in text, "it was found before"
    shown = cli("undo", store_copy, two, "--reason", "another", "--json")
    assert orjson.loads(shown.stdout)["chunks"] == 1
    assert "purged and undone (another): test" in cli("info", store_copy).stdout
