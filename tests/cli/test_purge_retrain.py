"""``index --retrain`` after an erase: what an index has learned from erased vectors is removed, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.app import app
from retrotool.index.run import Options
from retrotool.index.searching import read_trained
from retrotool.store.store import Store


def centroids(root: Path) -> np.ndarray:
    store = Store.open(root)
    found = read_trained(store, "lists")[1].centroids
    assert found is not None
    return np.asarray(found)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments], prog_name="retrotool")
    return int(end.value.code or 0)


def test_an_index_that_learns_is_trained_again_after_an_erase(store_copy: Path) -> None:
    api.index(store_copy, name="lists", options=Options(IndexOptions(factory="IVF4,SQ8")))
    api.neighbours(store_copy, name="by-lists", index="lists")
    before = centroids(store_copy)
    assert run("purge", store_copy, "--document", "doc-1", "--reason", "r", "--erase", "--yes") == 0
    assert np.array_equal(before, centroids(store_copy)), "they stay as they are"
    assert run("purge", store_copy, "--document", "doc-2", "--document", "doc-3", "--reason", "r", "--yes") == 0
    assert run("erase", store_copy, "last", "--yes") == 0
    assert run("index", store_copy, "--name", "lists", "--retrain") == 0
    assert not np.array_equal(before, centroids(store_copy))
    assert api.verify(store_copy).ok
    name = next(iter(api.info(store_copy).purges))
    assert api.verify_purge(store_copy, name, out=store_copy.parent).receipt.ok
