"""Files of a part with key-value records that do not agree with each other: ``verify`` finds that too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from key_values import Written, make_store
from stored import copy_store
from test_corrupt_lies import PART, Liar, put

from retrotool import api
from retrotool.store import parts
from retrotool.store.leases import Run
from retrotool.store.store import Store


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Part 1: the record of rows 0 (key) and 1 (value), and others like it."""
    content = [Written(f"record-{i}", f"key {i}", "a value") for i in range(5)]
    store = make_store(
        tmp_path_factory.mktemp("reported") / "store", tiny_encoder, [Written("plain", "one chunk")], content
    )
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    api.neighbours(store)
    assert api.verify(store).problems == []
    return store


def neighbour_of_key(ids: np.ndarray) -> np.ndarray:
    ids[1] = ids[0]
    return ids


def value_for_a_key(ids: np.ndarray) -> np.ndarray:
    """A value of another record of the part."""
    ids[0, 0] = PART << 32 | 3
    return ids


def count(liar: Liar, about: dict[str, int] | None) -> None:
    old = liar.old("chunks")
    liar.commit(dataclasses.replace(liar.copy(old), about=about), old)


def lose_column(liar: Liar) -> None:
    old = liar.old("chunks")
    table = parts.read_parquet(liar.store, old).drop_columns(["key"])
    liar.commit(parts.write_parquet(liar.store, liar.name(old), table, about=old.about), old)


def vector_of_key(matrix: np.ndarray) -> np.ndarray:
    matrix[1] = matrix[0]
    return matrix


LIES: dict[str, tuple[Callable[[Liar], None], str]] = {
    "a value with a vector": (lambda liar: liar.embeddings(vector_of_key), "erased or not a key has a vector"),
    "a value in the index": (
        lambda liar: liar.shard(np.array([0, PART << 32, PART << 32 | 1])), "has chunks that are erased or not keys",
    ),
    "a value with neighbours": (
        lambda liar: liar.neighbours(neighbour_of_key, lambda distances: distances), "not a key has neighbours",
    ),
    "a value that is a neighbour": (
        lambda liar: liar.neighbours(value_for_a_key, lambda distances: distances), "a neighbour is not a key",
    ),
    "a key that is said to be none": (
        lambda liar: liar.column("chunks", "key", put(0, False)), "the first chunk of a document is not a key",
    ),
    "a log that counts other keys": (lambda liar: count(liar, {"keys": 4}), "the log has a different number of keys"),
    "a log that counts no keys": (lambda liar: count(liar, None), "the log says missing"),
    "a file that lost the column": (
        lambda liar: lose_column(liar), "column 'key' is missing, the log says bool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_keys_is_found(reported: Path, tmp_path: Path, lie: str) -> None:
    tell, expected = LIES[lie]
    copy = copy_store(reported, tmp_path / "store")
    store = Store.open(copy)
    with Run(store.storage) as run:
        tell(Liar(store, run))
    problems = [problem.text for problem in api.verify(copy).problems]
    assert any(expected in problem for problem in problems), problems
