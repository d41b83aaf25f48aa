"""A store is read whose files and records are from before a field of its format was added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_jsonl

from retrotool import api
from retrotool.chunk import chunk_plan
from retrotool.index import stage as index_stage
from retrotool.index.index_records import as_about
from retrotool.neighbours import run as neighbours_run
from retrotool.neighbours.dependents import register_dependent
from retrotool.neighbours.run import SearchOptions
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store


def without(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    assert name in fields
    return {key: value for key, value in fields.items() if key != name}


def test_a_training_without_the_number_of_vectors_that_were_held(
    store_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(record):
        about = as_about(record)
        return without("held", about) if "held" in about else about

    monkeypatch.setattr(index_stage, "as_about", before)
    made = api.index(store_copy, name="before")
    monkeypatch.undo()
    assert replace(api.index(store_copy, name="before"), added=made.added) == made
    assert made.drift.grown == 1.0
    assert not api.verify(store_copy).problems


def test_a_dependent_without_its_encoder(
    store_copy: Path, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = tmp_path / "queries"
    api.chunk(queries, [str(write_jsonl(tmp_path / "rows.jsonl", make_rows(3)))], tokenizer=str(tiny_encoder))
    api.embed(queries, encoder=str(tiny_encoder))
    monkeypatch.setattr(
        neighbours_run, "register_dependent",
        lambda database, store, table, again: register_dependent(database, store, table, without("encoder", again)),
    )  # fmt: skip
    api.neighbours(store_copy, queries=queries, name="before", search=SearchOptions(exact=True))
    (command,) = (one.command for one in api.info(store_copy).dependents if one.table == "before")
    assert command.endswith("--name before --exact")


def test_a_plan_without_its_owner(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, plans = chunk_plan.write_json_file, []

    def write(store: Store, name: FileName, content: dict[str, Any], rows: int) -> FileEntry:
        if name.kind == "plans":
            content = without("owner", content)
            plans.append(content)
        return written(store, name, content, rows)

    monkeypatch.setattr(chunk_plan, "write_json_file", write)
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    assert api.chunk(tmp_path / "store", [str(rows)], tokenizer=str(tiny_encoder)).documents == 3
    assert len(plans) == 1
