"""What a Python user sees: names, types and what objects say of themselves."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, write_jsonl

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.inspect.run import Choice


def test_the_module_has_its_public_names_alone() -> None:
    assert dir(retrotool) == sorted(retrotool.__all__)
    assert set(dir(retrotool)) == {"Reader", "RetroDataset", "__version__", "api", "errors", "open"}
    assert retrotool.__version__ == version("retrotool")
    assert all(getattr(retrotool, name) is not None for name in dir(retrotool))
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        retrotool.opne  # noqa: B018


def public_functions() -> Iterator[tuple[str, Any]]:
    """Functions of the public modules, and what they return and take: their classes, with all public methods."""
    seen: list[Any] = [getattr(retrotool, name) for name in ("open", "Reader", "RetroDataset")]
    seen += [value for name, value in vars(api).items() if not name.startswith("_")]
    for one in seen:
        if not getattr(one, "__module__", "").startswith("retrotool"):
            continue
        yield one.__qualname__, one
        for name, member in vars(one).items() if inspect.isclass(one) else ():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            written = name == "__init__" and not dataclasses.is_dataclass(one)
            if inspect.isfunction(function) and (written or not name.startswith("_")):
                yield function.__qualname__, function
        if inspect.isfunction(one):
            result = typing.get_type_hints(one).get("return")
            seen += [kind for kind in (result, *typing.get_args(result)) if inspect.isclass(kind) and kind not in seen]


def test_type_hints_can_be_resolved() -> None:
    found = dict(public_functions())
    assert {"open_store", "Reader.search", "RetroDataset.__init__", "InspectResult", "purge"} <= set(found)
    for name, function in found.items():
        assert typing.get_type_hints(function) or dataclasses.is_dataclass(function) or inspect.isclass(function), name


def test_objects_say_what_they_are_in_a_line_or_two(built_store: Path) -> None:
    reader = retrotool.open(built_store)
    facts = api.info(built_store)
    assert repr(reader) == (
        f"<Reader of {built_store}: {facts.documents} documents, {facts.chunks} chunks, {facts.tokens} tokens, "
        f"commit {facts.commit}>"
    )
    assert reader.totals == {"documents": facts.documents, "chunks": facts.chunks, "tokens": facts.tokens}
    chunk = reader.chunk(reader.document("doc-7")[0])
    assert "array" not in repr(chunk) and repr(chunk.text) in repr(chunk) and len(repr(chunk)) < 1000
    assert all("array" not in repr(near) for near in reader.neighbours(chunk.id))
    assert repr(next(reader.documents("id = 'doc-7'"))).startswith("DocumentEntry(id='doc-7', source='b', first_chunk=")
    dataset = retrotool.RetroDataset(built_store, sequence_length=128)
    assert repr(dataset).startswith(f"<RetroDataset of {built_store}: {dataset.sequences} sequences of 128 tokens, k=2")


def test_the_only_table_is_taken_and_of_several_one_must_be_named(
    built_store: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    store = tmp_path / "store"
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(6, first=200))
    api.chunk(store, [str(rows)], tokenizer=str(tiny_encoder))
    api.embed(store, encoder=str(tiny_encoder))
    api.neighbours(built_store, queries=store, name="only", saved=5)
    reader = retrotool.open(store)
    chunk = reader.document("doc-203")[0]
    assert [near.id for near in reader.neighbours(chunk)] == [i for i, _ in reader.neighbour_ids(chunk, "only")]
    assert len(reader.neighbour_places(chunk, k=5)) == 5
    assert retrotool.RetroDataset(store, sequence_length=64).name == "only"
    assert api.inspect(store, Choice()).name == api.export(store, tmp_path / "out").table == "only"
    assert api.affected(store).table == "only"
    api.neighbours(built_store, queries=store, name="second", saved=5)
    reader.refresh()
    for read in (lambda: reader.neighbours(chunk), lambda: retrotool.RetroDataset(store), lambda: api.affected(store)):
        with pytest.raises(UsageError, match="has no neighbours 'main'; it has: only, second"):
            read()
