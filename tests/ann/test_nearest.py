"""The running nearest and the masks, against sorting everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrotool.ann.excluded import Excluded, Intervals, Mask
from retrotool.ann.ranking import Best, Heaps, largest


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32), st.data())
def test_the_running_nearest_are_those_of_all_scores(q: int, k: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    kept = Heaps(k, q)
    everything = np.full((q, 0), -np.inf)
    ids = np.zeros(0, np.int64)
    for step in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(1, 150))
        rows = np.sort(rng.choice(q, data.draw(st.integers(1, q)), replace=False))
        scores = rng.normal(size=(len(rows), n))
        scores[rng.random(scores.shape) < data.draw(st.sampled_from([0, 0.3, 1]))] = -np.inf
        scores = scores.astype(np.float32)
        some = np.arange(n) * 7 + step
        kept.offer(torch.from_numpy(rows), torch.from_numpy(scores.copy()), some)
        wide = np.full((q, n), -np.inf)
        wide[rows] = scores
        everything, ids = np.concatenate([everything, wide], 1), np.concatenate([ids, some])
    found, which = kept.best()
    expected = -np.sort(-everything, axis=1)[:, :k]
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    assert np.isneginf(found[:, expected.shape[1] :]).all()
    assert np.array_equal(which == -1, np.isneginf(found))
    for row in range(q):
        names = which[row][which[row] >= 0]
        assert len(np.unique(names)) == len(names)
        for name, score in zip(names, found[row], strict=False):
            assert score in everything[row][ids == name]


@given(st.integers(1, 30), st.integers(0, 2**32), st.booleans())
def test_masks_hide_just_what_is_excluded(q: int, seed: int, repeats: bool) -> None:
    rng = np.random.default_rng(seed)
    # Documents beside one another, some of them of several queries, as in a part.
    bounds = np.sort(rng.choice(200, q + 1, replace=False))
    first, last = bounds[:-1], bounds[1:] - 1
    rows = np.sort(rng.integers(0, q, q))
    first, last = first[rows], last[rows]
    nothing = int(rng.integers(0, q))
    first[:nothing], last[:nothing] = 0, -1
    of_whom = rng.integers(-1, 4, q) if repeats else None
    further = Intervals(np.array([205, 230]), np.array([210, 231]), np.array([2, 0])) if repeats else None
    excluded = Excluded(first, last, of_whom, further)
    lists = (rng.choice(240, 50, replace=False), rng.choice(240, 50, replace=False), 190 + rng.permutation(50))
    ids = np.concatenate([np.sort(some) for some in lists])  # the last has ids of hardly any first interval
    mask = Mask(excluded, ids)
    for low in (0, 50, 100):
        asked = np.sort(rng.choice(q, int(rng.integers(1, q + 1)), replace=False))
        scores = torch.zeros(len(asked), 50)
        mask.apply(scores, torch.from_numpy(asked), low, low + 50)
        some = ids[low : low + 50]
        hidden = (some >= first[asked, None]) & (some <= last[asked, None])
        if of_whom is not None:
            for name, begin, end in ((2, 205, 210), (0, 230, 231)):
                hidden |= (of_whom[asked, None] == name) & (some >= begin) & (some <= end)
        assert np.array_equal(np.isneginf(scores.numpy()), hidden)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 25), st.integers(0, 2**32))
def test_of_equal_distances_the_least_id_comes_first(q: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((q, n)), 1)
    distances = rng.choice([0.5, 1, 2, np.inf], (q, n)).astype(np.float32)
    ids[np.isinf(distances)] = -1
    found = Best(distances, ids).nearest(k)
    for row in range(q):
        expected = sorted(zip(distances[row].tolist(), ids[row].tolist(), strict=True))[:k]
        assert list(zip(found.distances[row].tolist(), found.ids[row].tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_come_first(dtype: torch.dtype) -> None:
    scores = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:2000].view(20, 100).to(dtype)
    found = scores.gather(1, torch.from_numpy(largest(scores, 9)))
    assert torch.equal(found, scores.sort(1, descending=True).values[:, :9])
