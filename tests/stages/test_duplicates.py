"""Of documents that repeat the first stays, whatever the parts, plans and workers; an oracle in plain Python agrees."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from stored import stored_files

import retrotool
from retrotool import api, engine
from retrotool.chunk import deduplicate, hash_partitions, update
from retrotool.chunk.chunk_plan import ChunkOptions, Duplicates, Existing, commit_plan
from retrotool.chunk.deduplicate import BY_ID, BY_TEXT, DIFFERING, DuplicateCounts, finish_plans
from retrotool.chunk.stage import ChunkStage
from retrotool.errors import DuplicatesError, RetrotoolError
from retrotool.info.run import info
from retrotool.info.verify import verify
from retrotool.sources import Fields, find_inputs
from retrotool.store.folding import writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.state import State
from retrotool.store.store import Store
from retrotool.tokenizers import Tokenizer, find_tokenizer

REPORTED = {BY_ID, BY_TEXT, DIFFERING}
Row = tuple[str, str]
"""An id and a text."""


def make_store(root: Path, tokenizer: Path) -> Store:
    made = Tokenizer(find_tokenizer(str(tokenizer)))
    return Store.create(root, made.identity, made.file.content, 4)


def add(
    store: Store, path: Path, rows: list[Row], *, part_size: int = 3, existing: Existing = "skip", **options: Any
) -> list[DuplicateCounts]:
    """Chunk rows from a file of their own as one plan, and finish it."""
    # A file that the store has already is left out as a whole, so no two are the same.
    only = {"only in": path.name}
    write_jsonl(path, [{"id": name, "text": text, "source": f"s-{name}", **only} for name, text in rows])
    with writing(store) as run:
        commit_plan(store, run, find_inputs([str(path)]), made_with(part_size, existing))
        engine.execute(ChunkStage(), store, run)
        return list(finish_plans(store, run, **options).values())


def made_with(part_size: int, existing: Existing) -> ChunkOptions:
    return ChunkOptions(Fields(), part_size, allow_purged=True, existing=existing)


def decided(stored: list[Row], rows: list[Row], existing: Existing, duplicates: Duplicates) -> list[str | None]:
    """For each row of a plan why it is left out, or None; takes replaced documents from the ``stored`` ones."""
    texts: dict[str, set[str]] = {}
    for name, text in stored:
        texts.setdefault(name, set()).add(text)
    seen: set[str] = set()
    chosen: dict[str, set[str]] = {}
    kinds: list[str | None] = []
    for name, text in rows:
        is_first = name not in seen or duplicates == "keep"
        seen.add(name)
        if name not in texts:
            kinds.append(None if name not in list(dict(rows[: len(kinds)])) else BY_ID)
        elif existing == "skip":
            kinds.append("unchanged" if text in texts[name] else DIFFERING)
        elif is_first:
            chosen.setdefault(name, set()).add(text)
            kinds.append("unchanged" if text in texts[name] else None)
        else:
            kinds.append(BY_ID)
    stored[:] = [(name, text) for name, text in stored if text in chosen.get(name, {text})]
    there = {text for _, text in stored}
    for i, (_, text) in enumerate(rows):
        if kinds[i] is None:
            kinds[i] = BY_TEXT if text in there else None
            there.add(text)
    return kinds


def first_come(rows: list[Row]) -> list[str | None]:
    """For each row why it goes, or None if it stays: ids first, then texts among those that are left."""
    ids: set[str] = set()
    reasons: list[str | None] = []
    for name, _ in rows:
        reasons.append(BY_ID if name in ids else None)
        ids.add(name)
    texts: set[str] = set()
    for i, (_, text) in enumerate(rows):
        if reasons[i] is None:
            reasons[i] = BY_TEXT if text in texts else None
            texts.add(text)
    return reasons


def rejected(store: Store) -> list[tuple[str, int, str]]:
    store.refresh()
    group = store.state.group("quarantine")
    tables = [pq.read_table(store.storage.local(entry.path)) for entry in group.entries()]
    rows = (row for table in tables for row in table.to_pylist())
    return sorted((Path(row["input"]).name, row["line"], row["reason"]) for row in rows)


def live(store: Store) -> list[Row]:
    """Ids and texts that are live, in order of chunk ids."""
    reader = retrotool.open(store.place)
    chunks = [reader.chunk(int(i)) for part in reader.parts() for i in reader.chunk_ids(part)]
    groups = itertools.groupby(chunks, lambda chunk: (chunk.id - chunk.index, chunk.document))
    return [(name, "".join(chunk.text for chunk in group)) for (_, name), group in groups]


rows_of = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["one two", "three", "four five six", "seven"]))
)


@given(
    plans=st.lists(rows_of.filter(bool), min_size=1, max_size=3), memory=st.sampled_from([1, 2, 5, 1 << 20]),
    existing=st.sampled_from(["skip", "replace"]), duplicates=st.sampled_from(["skip", "keep"]),
)  # fmt: skip
def test_what_stays_and_what_goes_does_not_depend_on_how_the_rows_are_cut_into_plans(
    plans: list[list[Row]], memory: int, existing: Existing, duplicates: Duplicates, byte_level_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("duplicates")
    store = make_store(folder / "store", byte_level_tokenizer)
    expected: list[tuple[str, int, str]] = []
    stay: list[Row] = []
    for number, rows in enumerate(plans):
        with patch.object(hash_partitions, "ROWS", memory), patch.object(update, "PASS", memory):
            (counts,) = add(store, folder / f"{number}.jsonl", rows, existing=existing, duplicates=duplicates)
        before = len(stay)
        why = decided(stay, rows, existing, duplicates)
        kept = (BY_ID, BY_TEXT) if duplicates == "keep" else ()
        expected += [(f"{number}.jsonl", line, kind) for line, kind in enumerate(why, 1) if kind in REPORTED - {*kept}]
        assert (counts.by_id, counts.by_text) == (why.count(BY_ID), why.count(BY_TEXT))
        assert (counts.unchanged, counts.differing) == (why.count("unchanged"), why.count(DIFFERING))
        assert counts.replaced == before - len(stay)
        by_text = [f"s-{name}" for (name, _), kind in zip(rows, why, strict=True) if kind == BY_TEXT]
        assert counts.sources == Counter(by_text)
        stay += [row for row, kind in zip(rows, why, strict=True) if kind is None or kind in kept]
        assert live(store) == stay
    assert rejected(store) == expected
    found = verify(store.place)
    assert found.problems == []
    assert found.documents == len(stay)
    assert info(store.place).rejected == [kind for _, _, kind in expected].count(BY_ID)
    assert not list(store.storage.unfinished())


def test_a_document_repeats_only_a_text_that_stays_of_those_with_one_id(
    byte_level_tokenizer: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    (counts,) = add(store, tmp_path / "a.jsonl", [("x", "first"), ("x", "second"), ("y", "second"), ("z", "first")])
    assert (counts.by_id, counts.by_text) == (1, 1)
    assert live(store) == [("x", "first"), ("y", "second")]
    record = next(iter(store.refresh().with_prefix("plan:").values()))
    assert (record["documents"], record["rejected"], record["finished"]) == (2, 1, True)
    assert (record["duplicates"], record["duplicates_by_id"], record["duplicates_by_text"]) == ("skip", 1, 1)
    assert counts.sources == {"s-z": 1}
    assert b"s-x" not in b"".join(file.read_bytes() for file in stored_files(store, "log/*"))


def test_a_document_purged_in_part_holds_its_id_and_not_its_text(byte_level_tokenizer: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    add(store, tmp_path / "a.jsonl", [("whole", "purged as a whole"), ("partly", "purged but for its first chunk")])
    reader = retrotool.open(store.place)
    targets = [*reader.document("whole"), *reader.document("partly")[1:]]
    (tmp_path / "ids").write_text("".join(f"{chunk}\n" for chunk in targets))
    api.purge(store.place, api.Selectors(chunk=tmp_path / "ids"), reason="test")
    again = [("whole", "x"), ("partly", "y"), ("a", "purged as a whole"), ("b", "purged but for its first chunk")]
    (counts,) = add(store, tmp_path / "b.jsonl", again)
    # Let in again, what is purged as a whole has its id free; its text was free before.
    assert (counts.by_id, counts.by_text, counts.differing) == (0, 0, 1)
    assert [name for name, _ in live(store)] == ["partly", "whole", "a", "b"]
    assert verify(store.place).problems == []


ROWS = [("a", "one"), ("b", "two"), ("a", "three"), ("c", "two"), ("d", "four")]


def test_kept_duplicates_are_counted_and_stay(byte_level_tokenizer: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    (counts,) = add(store, tmp_path / "a.jsonl", ROWS, duplicates="keep", part_size=100)
    assert (counts.by_id, counts.by_text) == (1, 1)
    assert live(store) == ROWS
    assert rejected(store) == []
    shown = info(store.place)
    assert (shown.documents, shown.rejected, shown.unfinished) == (5, 0, 0)
    assert verify(store.place).problems == []
    reader = retrotool.open(store.place)
    assert reader.document("a") == [0], "of documents with one id the first is found"
    (tmp_path / "ids").write_text("a\n")
    assert api.purge(store.place, api.Selectors(document=tmp_path / "ids"), reason="test").documents == 2
    (counts,) = add(store, tmp_path / "b.jsonl", [("e", "two"), ("a", "new")])
    assert (counts.by_id, counts.by_text) == (0, 1)
    assert live(store) == [("b", "two"), ("c", "two"), ("d", "four"), ("a", "new")], "what was kept stays kept"


def test_fail_names_the_first_and_changes_nothing_and_the_next_call_finishes(
    byte_level_tokenizer: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    (counts,) = add(store, tmp_path / "a.jsonl", ROWS[:2], duplicates="fail")
    assert counts == DuplicateCounts()
    with pytest.raises(DuplicatesError) as error:
        add(store, tmp_path / "b.jsonl", [*ROWS[2:], ("c", "five")], duplicates="fail")
    assert "2 duplicate documents: 1 by id, 1 by text only" in str(error.value)
    for line, reason in ((2, BY_TEXT), (4, BY_ID)):
        assert f"{tmp_path / 'b.jsonl'} line {line} ({reason})" in str(error.value)
    assert "--duplicates skip" in error.value.advice
    assert error.value.exit_code == 1
    assert isinstance(error.value, RetrotoolError)
    assert (info(store.place).unfinished, live(store)) == (1, ROWS[:2]), "it is not visible before it is finished"
    assert verify(store.place).problems == []
    with writing(store) as run:
        (counts,) = finish_plans(store, run).values()
    assert (counts.by_id, counts.by_text, counts.differing) == (1, 1, 1)
    assert live(store) == [("a", "one"), ("b", "two"), ("d", "four")]


def test_many_repeats_in_many_inputs_are_placed(byte_level_tokenizer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hash_partitions, "ROWS", 16)
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    draw = np.random.default_rng(0)
    folder = tmp_path / "inputs"
    folder.mkdir()
    inputs = [
        [(str(draw.integers(40)), f"text {draw.integers(30)}") for _ in range(draw.integers(1, 60))] for _ in range(6)
    ]
    for number, rows in enumerate(inputs):
        write_jsonl(folder / f"{number}.jsonl", [{"id": name, "text": text} for name, text in rows])
    with writing(store) as run:
        commit_plan(store, run, find_inputs([str(folder)]), ChunkOptions(Fields(), 20))
        engine.execute(ChunkStage(), store, run)
        (counts,) = finish_plans(store, run).values()
    reasons = iter(first_come([row for rows in inputs for row in rows]))
    expected = [
        (f"{number}.jsonl", line, why)
        for number, rows in enumerate(inputs)
        for line, why in enumerate(itertools.islice(reasons, len(rows)), 1)
        if why
    ]
    assert rejected(store) == expected
    assert counts.by_id + counts.by_text == len(expected)
    assert verify(store.place).problems == []


def test_sources_are_counted_in_bounded_memory_and_the_largest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrotool.chunk.deduplicate._COUNTED_SOURCES", 10)
    counts = DuplicateCounts()
    for small in range(100):
        sources = ["large", "large", "middle", f"small-{small}"]
        counts.add(np.array([1, 0, 1, 0], np.int8), sources)
        assert len(counts.sources) <= 10
    assert counts.sources.most_common(2) == [("large", 100), ("middle", 100)]
    assert (counts.by_id, counts.by_text) == (200, 200)


def test_a_plan_is_finished_however_often_others_commit(tmp_path: Path, byte_level_tokenizer: Path) -> None:
    store = make_store(tmp_path / "store", byte_level_tokenizer)
    find, left = deduplicate.find_repeated_ids, [50]

    def find_and_be_overtaken(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            with Run(store.storage) as run:
                Store.open(store.place).commit(run, purge_or_undo)
        return find(*args)

    def purge_or_undo(state: State) -> Draft:
        totals = state.records["totals"]
        return Draft("test", records={"totals": {**totals, "tokens": totals["tokens"] + (-1) ** left[0]}})

    with patch.object(deduplicate, "find_repeated_ids", find_and_be_overtaken):
        (counts,) = add(store, tmp_path / "a.jsonl", [("one", "a b c"), ("two", "a b c")])
    assert (left, counts.by_text) == ([0], 1)
    assert verify(store.place).ok
