"""Purges, erases and undoes in any order, against sets of chunk ids."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows, write_jsonl
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from stored import copy_store, remove_store

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.purge.undo import undo
from retrotool.store.store import Store
from retrotool.store.tombstones import read_tombstones

CHUNKS = st.sets(st.integers(0, 11), min_size=1, max_size=5)
"""Places among the chunks of the store."""


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """More than twelve chunks, in some parts. Not to be changed."""
    root = tmp_path_factory.mktemp("small")
    write_jsonl(root / "rows.jsonl", make_rows(7, words=120))
    api.chunk(root / "store", [str(root / "rows.jsonl")], tokenizer=str(tiny_encoder), part_size=7)
    return root / "store"


class Purging(RuleBasedStateMachine):
    """A store, and the chunks that each purge named."""

    source: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = copy_store(self.source, self.folder / "store")
        reader = retrotool.open(self.store)
        self.chunks = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
        self.tokens = {chunk: len(reader.chunk(chunk).tokens) for chunk in self.chunks}
        self.document = {chunk: reader.chunk(chunk).document for chunk in self.chunks}
        self.named: dict[str, set[int]] = {}
        self.erased: set[int] = set()
        self.over: set[str] = set()
        """Purges that were undone."""

    def teardown(self) -> None:
        """Remove the store."""
        remove_store(self.store)
        shutil.rmtree(self.folder)

    @property
    def purged(self) -> set[int]:
        """What standing purges name."""
        return set().union(*(chunks for purge, chunks in self.named.items() if purge not in self.over))

    @rule(places=CHUNKS, erase=st.booleans())
    def purge(self, places: set[int], erase: bool) -> None:
        chunks = {self.chunks[place] for place in places}
        selectors = api.Selectors(chunk=tuple(sorted(chunks)))
        result = api.purge(self.store, selectors, reason="test", erase=erase)
        assert result.chunks == len(chunks - self.purged)
        if result.purge:
            self.named[result.purge] = chunks
        if erase:
            self.erased |= chunks

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        purge = data.draw(st.sampled_from(sorted(self.named)))
        if purge in self.over or self.named[purge] <= self.erased:
            with pytest.raises(UsageError, match="was undone" if purge in self.over else "is erased"):
                undo(self.store, purge, reason="test")
            return
        before = self.purged
        self.over.add(purge)
        result = undo(self.store, purge, reason="test")
        assert result.chunks == len(before - self.purged)
        assert result.still_purged == len(self.named[purge] & self.purged)

    @invariant()
    def is_as_the_sets_say(self) -> None:
        live = [chunk for chunk in self.chunks if chunk not in self.purged]
        store, reader = Store.open(self.store), retrotool.open(self.store)
        assert [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)] == live
        assert set(read_tombstones(store).ids.tolist()) == self.purged
        totals = store.state.records["totals"]
        assert totals["chunks"] == len(live)
        assert totals["tokens"] == sum(self.tokens[chunk] for chunk in live)
        assert totals["documents"] == len({self.document[chunk] for chunk in live})
        records = store.state.with_prefix("purge:")
        assert {purge for purge, record in records.items() if "undone" in record} == self.over
        gone = {purge for purge in set(self.named) - self.over if self.named[purge] <= self.erased}
        assert {purge for purge, record in records.items() if record["erased"]} == gone
        assert np.isin(sorted(self.erased), sorted(self.purged)).all()

    @invariant()
    def is_whole(self) -> None:
        assert api.verify(self.store).problems == []


def test_purges_erases_and_restores_in_any_order(small_store: Path) -> None:
    Purging.source = small_store
    how = settings(
        max_examples=settings.default.max_examples // 3,
        stateful_step_count=12,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Purging, settings=how)  # type: ignore[no-untyped-call]
