"""Copies of documents that were purged or erased in part: an erase takes nothing that is live, and can be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_text, write_jsonl

from retrotool import api
from retrotool.api import Selectors
from retrotool.errors import DuplicatesError
from retrotool.store.store import Store
from retrotool.store.tombstones import read_rejected


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Two inputs with documents of the same id and other text, of several chunks each."""
    one = [{"id": "a", "text": make_text(1, 150)}, {"id": "z", "text": make_text(9, 150)}]
    other = [{"id": "a", "text": make_text(2, 150)}, {"id": "b", "text": make_text(3, 150)}]
    return write_jsonl(tmp_path / "one.jsonl", one), write_jsonl(tmp_path / "other.jsonl", other)


def test_an_undo_leaves_no_live_chunk_of_a_document_that_repeats_and_an_erase_takes_all(
    inputs: tuple[Path, Path], tmp_path: Path, tiny_encoder: Path
) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(inputs[0])], tokenizer=str(tiny_encoder), part_size=100)
    with pytest.raises(DuplicatesError):
        api.chunk(store, [str(inputs[1])], existing="fail")
    first = 1 << 32
    purge = api.purge(store, Selectors(chunk=(first,)), reason="test").purge
    api.chunk(store, [str(inputs[1])], existing="skip")
    assert purge is not None
    api.undo(store, purge, reason="test")
    copy = read_rejected(Store.open(store)).ids
    assert len(copy) > 1 and copy[0] == first and not api.open_store(store).is_live(copy).any()
    assert api.purge(store, Selectors(chunk=(0,)), reason="test", erase=True).erased == 1 + len(copy)
    assert api.verify(store).problems == []


def test_an_erase_of_what_is_erased_is_no_error_when_a_copy_came_later(
    inputs: tuple[Path, Path], tmp_path: Path, tiny_encoder: Path
) -> None:
    store = tmp_path / "store"
    api.chunk(store, [str(inputs[0])], tokenizer=str(tiny_encoder), part_size=100)
    erased = api.purge(store, Selectors(chunk=(0,)), reason="test", erase=True).purge
    api.chunk(store, [str(inputs[1])])
    assert erased is not None
    assert api.erase(store, [erased]).files_rewritten == 0
    other = api.purge(store, Selectors(chunk=(1,)), reason="test").purge
    assert other is not None
    assert api.erase(store, [erased, other]).erased > 0
    assert api.verify(store).problems == []
