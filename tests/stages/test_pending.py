"""Parts of a ``chunk`` that is not finished: they may be embedded and purged, and no reader sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import make_rows, write_jsonl

import retrotool
from retrotool import api
from retrotool.chunk import run as chunk_run
from retrotool.errors import UsageError
from retrotool.inspect.run import Choice
from retrotool.store.store import Store


class Stopped(Exception):
    pass


@pytest.fixture
def interrupted(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A store whose second ``chunk`` has read everything, and was stopped before it finished."""

    def make(*, first: bool = True) -> Path:
        store = tmp_path / "store"
        options = {"tokenizer": str(tiny_encoder), "part_size": 40}
        if first:
            api.chunk(store, [str(write_jsonl(tmp_path / "a.jsonl", make_rows(20)))], **options)
            api.embed(store, encoder=str(tiny_encoder))
            api.index(store)
            api.neighbours(store)

        def stop(*_: object, **__: object) -> None:
            raise Stopped

        again = make_rows(10, first=5)  # five documents repeat, five are new, and one of them comes twice
        new = write_jsonl(tmp_path / "b.jsonl", [*again, *make_rows(5, first=20), *make_rows(1, first=22)])
        with monkeypatch.context() as patch:
            patch.setattr(chunk_run, "finish_plans", stop)
            with pytest.raises(Stopped):
                api.chunk(store, [str(new)], **options)
        return store

    return make


def content(store: Path) -> tuple[object, ...]:
    found = api.verify(store)
    assert found.problems == []
    return found.content, found.ids, found.documents, found.chunks, found.tokens


def test_no_reader_sees_them_and_the_last_commit_shows_all(interrupted: Callable[..., Path]) -> None:
    store = interrupted()
    state = Store.open(store).state
    pending = sorted(set(state.all_parts()) - set(state.parts()))
    assert pending
    assert pending[0] == state.live
    before = api.info(store)
    assert (before.documents, before.unfinished) == (20, 1)
    assert [part["part"] for part in before.parts if part["pending"]] == pending
    assert retrotool.open(store).parts() == state.parts()
    first = pending[0] << 32
    with pytest.raises(UsageError, match="no chunk"):
        retrotool.open(store).chunk(first)
    with pytest.raises(UsageError):
        api.inspect(store, Choice(chunk=first))
    for read in (retrotool.open(store).chunk_ids, retrotool.open(store).embeddings):
        with pytest.raises(UsageError, match=f"no part {pending[0]}, or its chunk command has not finished"):
            read(pending[0])
    before_ids = content(store)
    api.chunk(store, [])
    after = api.info(store)
    assert (after.documents, after.unfinished) == (25, 0)
    assert not any(part["pending"] for part in after.parts)
    assert content(store) != before_ids
    assert retrotool.open(store).parts() == state.all_parts()


def test_they_are_embedded_and_neither_searched_nor_given_neighbours(
    interrupted: Callable[..., Path], tiny_encoder: Path
) -> None:
    store = interrupted()
    state = Store.open(store).state
    api.embed(store, encoder=str(tiny_encoder))
    now = Store.open(store).state
    assert len(now.group("embeddings", "tiny")) == len(now.all_parts())
    assert (
        api.index(store).vectors
        == api.info(store).keys
        == sum(p["chunks"]["rows"] for p in api.info(store).parts if not p["pending"])
    )
    api.neighbours(store)
    assert len(Store.open(store).state.group("neighbours", "main")) == len(state.parts())
    api.chunk(store, [])
    assert api.embed(store, encoder=str(tiny_encoder)).chunks == 0
    api.index(store)
    api.neighbours(store)
    assert len(Store.open(store).state.group("neighbours", "main")) == len(state.all_parts())
    assert api.verify(store).problems == []


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_of_which_a_part_is_selected_goes_as_a_whole(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """The text of a document that is taken down is not left in another that had a hit of its own."""
    store, (row,) = tmp_path / "store", make_rows(1, first=7)
    api.chunk(store, [str(write_jsonl(tmp_path / "a.jsonl", [row]))], tokenizer=str(tiny_encoder))
    with monkeypatch.context() as patch:
        patch.setattr(chunk_run, "finish_plans", Mock(side_effect=Stopped))
        with pytest.raises(Stopped):
            api.chunk(store, [str(write_jsonl(tmp_path / "b.jsonl", [{**row, "id": "copy"}]))])
    if earlier:
        api.purge(store, api.Selectors(chunk="1:1"), reason="test")
        api.purge(store, api.Selectors(document=row["id"]), reason="test")
    else:
        api.purge(store, api.Selectors(document=row["id"], chunk="1:1"), reason="test")
    api.chunk(store, [])
    reader = retrotool.open(store)
    assert not [i for part in reader.parts() for i in reader.chunk_ids(part)]
    with pytest.raises(UsageError):
        reader.document("copy")


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("document", ["doc-21", "doc-22", "doc-7"], ids=["new", "twice", "in both"])
def test_what_is_purged_meanwhile_does_not_come(
    interrupted: Callable[..., Path], tmp_path: Path, document: str, erase: bool
) -> None:
    store = interrupted()
    (tmp_path / "ids").write_text(document)
    api.purge(store, api.Selectors(document=tmp_path / "ids"), reason="asked", erase=erase)
    assert api.verify(store).problems == []
    api.chunk(store, [])
    assert api.verify(store).problems == []
    assert api.info(store).documents == 24
    assert retrotool.open(store).document("doc-23")
    with pytest.raises(UsageError):
        retrotool.open(store).document(document)


@pytest.mark.parametrize("finished", [False, True])
def test_a_purge_of_them_is_undone(interrupted: Callable[..., Path], tmp_path: Path, finished: bool) -> None:
    store = interrupted()
    (tmp_path / "ids").write_text("doc-21\ndoc-24")
    found = api.purge(store, api.Selectors(document=tmp_path / "ids"), reason="asked")
    if finished:
        api.chunk(store, [])
        assert api.info(store).documents == 23
    api.undo(store, found.purge, reason="not meant")
    if not finished:
        api.chunk(store, [])
    assert api.info(store).documents == 25
    assert api.verify(store).problems == []


def test_a_first_chunk_that_was_interrupted_shows_nothing(interrupted: Callable[..., Path], tiny_encoder: Path) -> None:
    store = interrupted(first=False)
    assert api.info(store).documents == 0
    assert api.embed(store, encoder=str(tiny_encoder)).chunks > 0
    with pytest.raises(UsageError):
        api.index(store)
    api.chunk(store, [])
    assert api.info(store).documents == 15
    assert api.index(store).vectors == api.info(store).keys
