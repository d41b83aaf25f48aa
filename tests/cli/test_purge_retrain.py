"""``purge --erase --retrain-index``: what indexes have learned of victims goes, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrotool import api
from retrotool.ann.choice import IndexWishes
from retrotool.app import app
from retrotool.index.index_files import read_trained
from retrotool.index.run import Options
from retrotool.store.store import Store


def centroids(root: Path) -> np.ndarray:
    store = Store.open(root)
    found = read_trained(store, "lists")[1].centroids
    assert found is not None
    return np.asarray(found)


def purge(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        app(["purge", *map(str, arguments)], prog_name="retrotool")
    return int(end.value.code or 0)


def test_indexes_that_learn_are_trained_anew_after_an_erase(
    store_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.index(store_copy, name="lists", options=Options(IndexWishes(factory="IVF4,SQ8")))
    api.neighbours(store_copy, name="by-lists", index="lists")
    before, plain = centroids(store_copy), Store.open(store_copy).state.group("index", "main")
    assert purge(store_copy, "--document", "doc-1", "--reason", "r", "--erase", "--yes") == 0
    assert np.array_equal(before, centroids(store_copy)), "they stay as they are"
    trained = {slot for slot in plain if "trained" in slot}
    select = ("--document", "doc-2", "--document", "doc-3", "--reason", "r", "--erase", "--yes", "--retrain-index")
    capsys.readouterr()
    code = purge(store_copy, *select)
    assert code == 0, capsys.readouterr()
    told = capsys.readouterr().err
    assert "Index 'lists' was trained anew" in told
    assert "'main'" not in told.partition("Neighbours")[0], "it has learned nothing"
    assert f"Compute them anew: retrotool neighbours {store_copy}" in told
    after = centroids(store_copy)
    assert not np.array_equal(before, after)
    assert trained == {slot for slot in Store.open(store_copy).state.group("index", "main") if "trained" in slot}
    assert api.verify(store_copy).ok
    name = next(iter(api.info(store_copy).purges))
    assert api.verify_purge(store_copy, name, out=store_copy.parent).receipt.ok


def test_it_goes_with_an_erase_alone(store_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert purge(store_copy, "--document", "doc-1", "--reason", "r", "--retrain-index") == 2
    assert "--retrain-index goes with --erase" in capsys.readouterr().err
