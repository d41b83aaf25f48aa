"""Centroids that are searched through lists themselves, as those of very large indexes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, write_jsonl
from oracle import saved_neighbours

from retrotool import api
from retrotool.ann import kmeans
from retrotool.ann.choice import IndexOptions
from retrotool.ann.codes import Whole
from retrotool.ann.lists import Trained
from retrotool.ann.resident import Centroids
from retrotool.ann.search import nearest_lists
from retrotool.index.run import Options


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hundred centroids count as very many, here and where the name was imported."""
    monkeypatch.setattr(kmeans, "TWO_LEVELS", 100)
    monkeypatch.setattr("retrotool.index.stage.TWO_LEVELS", 100)


def test_nearly_always_the_nearest_lists_are_found(few: None) -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(60, 16))
    centroids = (groups[rng.integers(0, 60, 4000)] + 0.4 * rng.normal(size=(4000, 16))).astype(np.float32)
    asked = centroids[rng.integers(0, 4000, 300)] + 0.2 * rng.normal(size=(300, 16)).astype(np.float32)
    trained = Trained(16, Whole(16), centroids, None, 4000)
    true = np.argsort(((asked[:, None] - centroids) ** 2).sum(2), axis=1)[:, :20]
    for found in (
        nearest_lists(trained, torch.from_numpy(asked), 20),
        Centroids(trained, torch.device("cpu")).nearest(torch.from_numpy(asked), 20).numpy(),
    ):
        assert all(len(set(row)) == 20 for row in found.tolist())
        assert (found[:, 0] == true[:, 0]).mean() > 0.97
        shared = [len(set(one) & set(other)) for one, other in zip(found.tolist(), true.tolist(), strict=True)]
        assert np.mean(shared) > 0.97 * 20


def test_more_lists_than_the_upper_ones_have_are_found_all_the_same(few: None) -> None:
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(2000, 8)).astype(np.float32)
    trained = Trained(8, Whole(8), centroids, None, 2000)
    found = nearest_lists(trained, torch.from_numpy(centroids[:3]), 2000)
    assert [sorted(row) for row in found.tolist()] == [list(range(2000))] * 3


def test_an_index_of_very_many_lists_is_built_measured_searched_and_verified(
    few: None, tmp_path: Path, tiny_encoder: Path
) -> None:
    store = tmp_path / "store"
    inputs = [str(write_jsonl(tmp_path / "rows.jsonl", make_rows(150, words=80)))]
    api.chunk(store, inputs, tokenizer=str(tiny_encoder), part_size=60)
    api.embed(store, encoder=str(tiny_encoder))
    found = api.index(store, options=Options(IndexOptions(nlist=130, code="sq8"), sample=100))
    assert found.nlist == 130 and found.recall_at_10 > 0.9
    api.neighbours(store, saved=5)
    assert (saved_neighbours(store)[0] >= 0).all()
    assert api.verify(store).ok
