"""Estimates of recall: how often the interval that is printed holds the true value."""

from __future__ import annotations

import numpy as np
import pytest

from retrotool.index.recall import ratio


@pytest.mark.parametrize("queries", [20, 100, 2000])
@pytest.mark.parametrize("true", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("alike", [2.0, 50.0])
def test_the_printed_interval_holds_the_truth_about_19_times_in_20(queries: int, true: float, alike: float) -> None:
    """Queries have 1 to 10 neighbours each to find, and are easy or hard as a whole: ``alike`` small, more so."""
    rng = np.random.default_rng(queries)
    held = 0
    for _ in range(1000):
        chance = rng.beta(true * alike, (1 - true) * alike, queries)
        possible = rng.integers(1, 11, queries)
        hits = rng.binomial(possible, chance).astype(np.float64)
        recall, error = ratio(hits, possible.astype(np.float64))
        held += abs(recall - true) <= error
    assert held >= 900


def test_with_hardly_any_queries_little_is_known_and_with_all_of_them_everything() -> None:
    one, three = np.ones(1), np.full(3, 10.0)
    assert ratio(one, one)[1] > 0.3, "one that was found says little about others"
    assert ratio(three, three) == (1.0, pytest.approx(0.28, abs=0.02))
    assert ratio(three, three, sampled=False) == (1.0, 0.0)
    nothing = np.zeros(4)
    assert ratio(nothing, nothing) == (1.0, 1.0)
    assert ratio(nothing, nothing, sampled=False) == (1.0, 0.0)
