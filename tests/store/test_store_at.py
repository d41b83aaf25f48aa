"""A store as it was after an earlier commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrotool.errors import CorruptError
from retrotool.store import store as stores
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.store import Store


@pytest.mark.parametrize("every", [1000, 3])
def test_any_commit_can_be_looked_at_again(store_copy: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """With checkpoints, of which only the newest are kept, or without."""
    monkeypatch.setattr(stores, "CHECKPOINT_EVERY", every)
    store = Store.open(store_copy)
    states = {store.state.number: store.state}
    with Run(store.storage) as run:
        for i in range(8):
            state = store.commit(run, lambda _, i=i: Draft("test", records={"count": i}))  # type: ignore[misc]
            states[state.number] = state
    later = Store.open(store_copy)
    for number, state in states.items():
        seen = later.at(number)
        assert (seen.state.number, seen.state.head) == (number, state.head)
        assert dict(seen.state.records) == dict(state.records)
        assert {entry.path for entry in seen.state.files()} == {entry.path for entry in state.files()}
    assert later.at(-1).state.parts() == []
    assert later.at(later.state.number) is later
    assert Store.open(store_copy).state.number == max(states), "looking back changes nothing"


def test_a_commit_that_is_not_there_is_an_error(store_copy: Path) -> None:
    store = Store.open(store_copy)
    with pytest.raises(CorruptError, match="is missing"):
        store.at(store.state.number + 1)
