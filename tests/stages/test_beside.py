"""Two commands at once on one store, and tasks that were overtaken: nothing is mixed, nothing is there twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_encoder, make_rows, write_jsonl
from stored import copy_store, stored_file, stored_files

import retrotool
from retrotool import api, engine
from retrotool.ann import lists
from retrotool.ann.choice import IndexOptions
from retrotool.embed.stage import EmbedStage
from retrotool.encoder import find_encoder
from retrotool.engine.task import Task
from retrotool.errors import UsageError
from retrotool.index.index_records import IndexFiles
from retrotool.index.run import Options
from retrotool.index.stage import IndexStage
from retrotool.neighbours import run as neighbours_run
from retrotool.neighbours.filters import FilterOptions
from retrotool.store import folding, staging
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.store import Store


def nothing(*_: int) -> None:
    """Ignores reports."""


def one_by_one(stage: EmbedStage | IndexStage, store: Store, run: Run, task: Task) -> folding.Folded:
    engine.perform(stage.open(store), store.storage, task, run.id, nothing)
    return folding.fold(store, run)


@pytest.fixture
def chunked(tmp_path: Path, corpus: Path, tiny_encoder: Path) -> Path:
    """A store of four parts, chunked only."""
    api.chunk(tmp_path / "store", [str(corpus)], tokenizer=str(tiny_encoder), part_size=100)
    return tmp_path / "store"


def test_no_part_gets_into_two_shards(chunked: Path, tiny_encoder: Path) -> None:
    embedding = EmbedStage(str(tiny_encoder), find_encoder(str(tiny_encoder))[1], ("cpu",))
    stage = IndexStage("main", "tiny", IndexOptions(shard_rows=40))
    one, other = Store.open(chunked), Store.open(chunked)
    with writing(one) as run, writing(other) as rival:
        tasks = {task.inputs["part"]: task for task in embedding.plan(one)}
        one_by_one(embedding, one, run, tasks[0])
        one_by_one(embedding, one, run, tasks[2])
        one_by_one(stage, one, run, stage.plan(one)[0])
        early = stage.plan(one)
        one_by_one(embedding, other, rival, tasks[1])
        late = stage.plan(other)
        assert [t.inputs["parts"] for t in early] == [[0], [2]]
        assert [t.inputs["parts"] for t in late] == [[0], [1], [2]]
        for task in early:
            one_by_one(stage, one, run, task)
        refused = [reason for task in late for reason in one_by_one(stage, other, rival, task).refused.values()]
    assert not refused, "what the other process did is not done again"
    assert IndexFiles(one.refresh(), "main").parts == [0, 1, 2], "what it did not is kept"
    api.embed(chunked, encoder=str(tiny_encoder))
    api.index(chunked, options=Options(IndexOptions(shard_rows=40)))
    assert IndexFiles(Store.open(chunked).state, "main").parts == [0, 1, 2, 3]
    assert api.verify(chunked).ok
    reader = retrotool.open(chunked)
    found = reader.search(reader.chunk(2 << 32).text, 10)
    assert len({neighbour.id for neighbour in found}) == 10


def test_vectors_of_two_encoders_do_not_mix_under_one_name(chunked: Path, tmp_path: Path) -> None:
    one, other = (make_encoder(tmp_path / str(seed) / "same", seed) for seed in (1, 2))
    stages = [EmbedStage(str(path), find_encoder(str(path))[1], ("cpu",)) for path in (one, other)]
    store = Store.open(chunked)
    with writing(store) as run:
        first, second = stages[0].plan(store)[0], stages[1].plan(store)[1]
        for stage, task in zip(stages, (first, second), strict=True):
            engine.perform(stage.open(store), store.storage, task, run.id, nothing)
        folded = folding.fold(store, run)
        assert len(folded.committed) == 1 and len(folded.refused) == 1
    with pytest.raises(UsageError, match="another encoder under the name"):
        api.embed(chunked, encoder=str(other if first.key in folded.committed else one))


def test_an_index_is_gone_on_with_by_the_encoder_it_was_trained_for(
    chunked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    other = make_encoder(tmp_path / "models" / "other", 5)
    api.embed(chunked, encoder=str(tiny_encoder))
    api.embed(chunked, encoder=str(other))
    store = Store.open(chunked)
    with writing(store) as run:
        engine.execute(IndexStage("main", "tiny"), store, run)  # killed before its record was committed
    assert IndexFiles(store.state, "main").encoder == "tiny"
    with pytest.raises(UsageError, match="was built for encoder 'tiny', not 'other'"):
        api.index(chunked, encoder="other")
    assert api.index(chunked).encoder == "tiny"
    assert api.index(chunked, name="second", encoder="other").encoder == "other"


def test_a_neighbour_table_is_of_one_database(built_store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    queries, another = tmp_path / "queries", copy_store(built_store, tmp_path / "another")
    for store, first in ((queries, 300), (tmp_path / "foreign", 400)):
        api.chunk(
            store, [str(write_jsonl(tmp_path / "c.jsonl", make_rows(6, first=first)))], tokenizer=str(tiny_encoder)
        )
        api.embed(store, encoder=str(tiny_encoder))
    api.index(tmp_path / "foreign")
    api.neighbours(built_store, queries=queries)
    with pytest.raises(UsageError, match="from another database"):
        api.neighbours(tmp_path / "foreign", queries=queries)
    assert api.neighbours(tmp_path / "foreign", queries=queries, name="foreign").queries > 0
    assert api.neighbours(another, queries=queries).queries == 0, "a copy is the same database"


def test_a_document_purged_at_both_ends_is_still_its_own_document(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    database = copy_store(built_store, tmp_path / "database")
    reader = retrotool.open(database)
    name = next(f"doc-{i}" for i in range(120) if len(reader.document(f"doc-{i}")) >= 4)
    chunks = reader.document(name)
    (tmp_path / "ids").write_text(f"{chunks[0]}\n{chunks[-1]}\n")
    api.purge(database, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    queries = tmp_path / "queries"
    rows = [row for row in make_rows(120) if row["id"] == name]
    api.chunk(queries, [str(write_jsonl(tmp_path / "q.jsonl", rows))], tokenizer=str(tiny_encoder))
    api.embed(queries, encoder=str(tiny_encoder))
    api.neighbours(database, queries=queries)
    reader = retrotool.open(queries)
    found = [n.chunk.document for chunk in reader.document(name) for n in reader.neighbours(chunk, k=20)]
    assert found and name not in found


def test_patterns_see_characters_not_bytes(tmp_path: Path, byte_level_tokenizer: Path) -> None:
    texts = ["une ÉCOLE ouverte", "so naïve", "漢字 here", "plain"]
    rows = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    store = tmp_path / "store"
    api.chunk(store, [str(write_jsonl(tmp_path / "c.jsonl", rows))], tokenizer=str(byte_level_tokenizer))
    for pattern, row in ((r"(?i)école", 0), (r"na.ve$", 1), (r"\p{Han}{2}", 2)):
        assert api.purge(store, api.Selectors(pattern=pattern), reason="test", dry_run=True).examples == (row,)


def test_an_erase_of_chunks_that_others_had_purged_goes_on_after_a_kill(store_copy: Path, tmp_path: Path) -> None:
    """Killed when its parts are erased and its shard is not: the documents can't be found any more, the vectors can."""
    targets = retrotool.open(store_copy).document("doc-3")
    (tmp_path / "names").write_text("doc-3\n")
    api.purge(store_copy, api.Selectors(where="id = 'doc-3'"), reason="by another selector")
    child = os.fork()
    if child == 0:
        from retrotool.purge import erase

        erase.EraseWorker._shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        api.purge(store_copy, api.Selectors(document=tmp_path / "names"), reason="test", erase=True)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    api.purge(store_copy, api.Selectors(document=tmp_path / "names"), reason="test", erase=True)
    store = Store.open(store_copy)
    found = [
        lists.read_lists(store.storage.local(entry.path)) for entry in IndexFiles(store.state, "main").shards.values()
    ]
    ids = np.concatenate([shard.ids(number) for shard in found for number in shard.numbers])
    assert not np.isin(targets, ids).any()
    assert all(purge["erased"] for purge in api.info(store_copy).purges.values())
    assert api.verify(store_copy).ok


def test_a_task_overtaken_by_an_erase_leaves_no_file(chunked: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """A shard read before the erase is staged after it, and its process dies: the next command takes it away."""
    api.embed(chunked, encoder=str(tiny_encoder))
    stage, store = IndexStage("main", "tiny"), Store.open(chunked)
    with writing(store) as run:
        one_by_one(stage, store, run, stage.plan(store)[0])
        late = stage.open(store)(stage.plan(store)[0], run.id, nothing)
        api.purge(chunked, api.Selectors(where="id = 'doc-3'"), reason="test", erase=True)
        staging.stage(store.storage, late)
    assert stored_file(chunked, late.add[0].path).exists()
    api.purge(chunked, api.Selectors(where="id = 'doc-9'"), reason="test")
    assert not stored_file(chunked, late.add[0].path).exists()


def test_workers_end_with_their_parent_and_the_store_goes_on(tmp_path: Path, tiny_encoder: Path) -> None:
    store = tmp_path / "store"
    rows = [{**row, "text": f"{row['id']} {row['text']}"} for row in make_rows(8000)]  # of a word or two many are equal
    inputs = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows[2000 * i : 2000 * (i + 1)])) for i in range(4)]
    command = [
        sys.executable,
        "-m",
        "retrotool",
        "chunk",
        str(store),
        *inputs,
        "--workers",
        "2",
        "--tokenizer",
        str(tiny_encoder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not stored_files(store, "staging/*") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(process.pid), "its workers are gone too"
    api.chunk(store, inputs)
    assert api.info(store).documents == 8000
    assert api.verify(store).ok


def members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_a_duplicate_that_was_partly_purged_is_counted_by_what_was_left(tmp_path: Path, tiny_encoder: Path) -> None:
    store, rows = tmp_path / "store", make_rows(30)
    long = max(rows, key=lambda row: len(row["text"]))
    api.chunk(store, [str(write_jsonl(tmp_path / "a.jsonl", rows))], tokenizer=str(tiny_encoder))
    again = write_jsonl(tmp_path / "b.jsonl", [{**long, "year": 1}])
    opened = Store.open(store)
    with writing(opened) as run:
        from retrotool.chunk.chunk_plan import ChunkOptions, commit_plan
        from retrotool.chunk.deduplicate import finish_plans
        from retrotool.chunk.stage import ChunkStage
        from retrotool.sources import Fields, find_inputs

        commit_plan(opened, run, find_inputs([str(again)]), ChunkOptions(Fields(), 1000))
        engine.execute(ChunkStage(), opened, run)
        (tmp_path / "ids").write_text(f"{1 << 32}\n")
        api.purge(
            store, api.Selectors(chunk=tmp_path / "ids"), reason="test"
        )  # a chunk of the copy, before it is found
        finish_plans(opened, run)
    assert api.verify(store).problems == []


def test_neighbours_are_reported_though_an_erase_takes_what_is_read_for_that(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then all of them are committed."""
    count, erased = neighbours_run.count_left, list[str]()

    def overtaken(*arguments: Any) -> int:
        if not erased:
            erased.append("doc-3")
            api.purge(store_copy, api.Selectors(document=("doc-3",)), reason="test", erase=True)
        return count(*arguments)

    monkeypatch.setattr(neighbours_run, "count_left", overtaken)
    result = api.neighbours(store_copy, name="other", filters=FilterOptions(exclude_sources=("b",)))
    assert erased == ["doc-3"]
    assert result.filters == {"exclude_sources": ["b"]}
    assert api.verify(store_copy).problems == []
