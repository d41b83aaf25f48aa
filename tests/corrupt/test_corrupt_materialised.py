"""Tokens of neighbours that are what the log says and yet not what they should be: ``verify`` finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_corrupt_lies import PART, Liar

from retrotool import api
from retrotool.store import neighbour_tables
from retrotool.store.leases import Run
from retrotool.store.neighbour_tables import NeighbourText
from retrotool.store.store import Store

Change = Callable[[NeighbourText], Any]


@pytest.fixture
def store(store_copy: Path) -> Path:
    api.neighbours(store_copy, materialise=True)
    assert api.verify(store_copy).problems == []
    return store_copy


def lie(store: Path, change: Change) -> list[str]:
    """Commit a part's table with changed tokens, and return the problems that are found."""
    opened = Store.open(store)
    with Run(opened.storage) as run:
        liar = Liar(opened, run)
        old = liar.old("neighbours", "main")
        stored = neighbour_tables.read_text(opened, old)
        copy = NeighbourText(*(np.array(v) for v in (stored.ids, stored.distances, stored.n_tokens, stored.tokens)))
        record = opened.state.records["neighbours:main"]
        written = neighbour_tables.write_table(
            opened, liar.name(old), neighbour_tables.read_table(opened, old), database=record["database"], commit=0,
            uri=record["uri"], about=old.about, text=[change(copy) or copy],
        )  # fmt: skip
        liar.commit(written, old)
    return [problem.text for problem in api.verify(store).problems]


def put(array: str, place: Any, value: Any) -> Change:
    return lambda stored: getattr(stored, array).__setitem__(place, value)


def swapped(stored: NeighbourText) -> None:
    """What a row has in place of its nearest neighbour is another chunk of the store."""
    stored.ids[:, 0] = stored.ids[::-1, 1]
    stored.n_tokens[:, 0], stored.tokens[:, 0] = stored.n_tokens[::-1, 1], stored.tokens[::-1, 1]


def emptied(stored: NeighbourText) -> None:
    stored.ids[4, 0] = -1
    stored.n_tokens[4, 0] = stored.tokens[4, 0] = 0


LIES: dict[str, tuple[Change, str]] = {
    "an id that is none": (put("ids", (4, 0), -7), "the id of a text is negative"),
    "an id of no part": (put("ids", (4, 0), 99 << 32), "a row has the text of a chunk that is not its neighbour"),
    "a neighbour twice": (lambda stored: put("ids", (4, 1), stored.ids[4, 0])(stored), "the text of a neighbour twice"),
    "a neighbour after none": (emptied, "a text follows an empty place"),
    "a neighbour without tokens": (put("n_tokens", (4, 0), 0), "a neighbour has no tokens"),
    "tokens of nobody": (put("ids", (4, 1), -1), "a neighbour has no tokens, or an empty place has some"),
    "no distance": (put("distances", (4, 1), np.inf), "a neighbour with a text has no distance"),
    "more tokens than a chunk has": (put("n_tokens", (4, 0), 65), "more tokens than a chunk can"),
    "fewer than none": (put("n_tokens", (4, 0, 1), -1), "more tokens than a chunk can"),
    "padding": (lambda stored: put("n_tokens", (slice(None), 0, 0), 1)(stored), "padding of a text is not zero"),
    "other tokens": (put("tokens", (slice(None), 0, 0, 0), 1), "tokens differ from those of the chunks"),
    "other neighbours": (swapped, "a row has the text of a chunk that is not its neighbour"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_about_materialised_neighbours_is_found(store: Path, what: str) -> None:
    change, expected = LIES[what]
    problems = lie(store, change)
    assert any(expected in problem for problem in problems), problems
    assert all("neighbours/main" in problem for problem in problems)


def test_text_that_was_erased_and_is_still_there_is_found(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    before = neighbour_tables.read_text(opened, opened.state.part_file("neighbours", PART, "main"))
    row = int(np.flatnonzero(before.n_tokens[:, 1, 1])[0])
    continuation = int(before.ids[row, 1]) + 1
    (tmp_path / "ids").write_text(f"{continuation}\n")
    api.purge(store, api.Selectors(chunk=tmp_path / "ids"), reason="test", erase=True)
    assert api.verify(store).problems == []

    def with_it(stored: NeighbourText) -> None:
        stored.n_tokens[row, 1, 1], stored.tokens[row, 1, 1] = before.n_tokens[row, 1, 1], before.tokens[row, 1, 1]

    assert any("it has tokens of erased chunks" in problem for problem in lie(store, with_it))


def test_a_purge_alone_is_no_problem(store: Path) -> None:
    api.purge(store, api.Selectors(where="id = 'doc-3'"), reason="test")
    assert api.verify(store).problems == []


def test_the_digest_is_of_what_is_materialised(store: Path) -> None:
    before = api.verify(store)
    assert len(before.materialised) == 64
    lie(store, lambda stored: stored)
    assert api.verify(store).materialised == before.materialised, "not of the file's name"
    lie(store, put("tokens", (0, 0, 0, 0), 1))
    after = api.verify(store)
    assert after.materialised != before.materialised and after.neighbours in (before.neighbours, "")
    assert after.ok or not after.materialised, "where the sample shows the damage there is none"
