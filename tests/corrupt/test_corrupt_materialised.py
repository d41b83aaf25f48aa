"""Materialised neighbours that are what the log says and yet not what they should be: ``verify`` finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_corrupt_lies import PART, Liar

from retrotool import api
from retrotool.store import parts
from retrotool.store.materialised import Materialised, read_materialised, write_materialised
from retrotool.store.runs import Run
from retrotool.store.store import Store

Change = Callable[[Materialised], Any]


@pytest.fixture
def store(store_copy: Path) -> Path:
    api.neighbours(store_copy, materialise=True)
    assert api.verify(store_copy).problems == []
    return store_copy


def lie(store: Path, change: Change, **about: Any) -> list[str]:
    """Commit a part's file, changed, and return the problems that are found."""
    opened = Store.open(store)
    with Run(store) as run:
        liar = Liar(opened, run)
        old = liar.old("materialised", "main")
        stored = read_materialised(opened, old)
        copy = Materialised(*(np.array(v) for v in (stored.ids, stored.databases, stored.n_tokens, stored.tokens)))
        groups = [change(copy) or copy]
        told = {**old.about, **about}
        liar.commit(write_materialised(store, liar.name(old), 2, 128, groups, about=told), old)
    return api.verify(store).problems


def put(array: str, place: Any, value: Any) -> Change:
    return lambda stored: getattr(stored, array).__setitem__(place, value)


def swapped(stored: Materialised) -> None:
    """What a row has in place of its nearest neighbour is another chunk of the store."""
    stored.ids[:, 0] = stored.ids[::-1, 1]
    stored.n_tokens[:, 0], stored.tokens[:, 0] = stored.n_tokens[::-1, 1], stored.tokens[::-1, 1]


def emptied(stored: Materialised) -> None:
    stored.ids[4, 0] = -1
    stored.n_tokens[4, 0] = stored.tokens[4, 0] = 0


LIES: dict[str, tuple[Change, str]] = {
    "fewer rows": (lambda stored: stored.rows(slice(1, None)), "rows are not those of its part"),
    "an id that is none": (put("ids", (4, 0), -7), "an id is negative"),
    "an id of no part": (put("ids", (4, 0), 99 << 32), "1 ids are no chunks of the store"),
    "a neighbour twice": (lambda stored: put("ids", (4, 1), stored.ids[4, 0])(stored), "names a neighbour twice"),
    "a neighbour after none": (emptied, "a neighbour comes after there are none"),
    "a neighbour without tokens": (put("n_tokens", (4, 0), 0), "a neighbour has no tokens"),
    "tokens of nobody": (put("ids", (4, 1), -1), "a neighbour has no tokens, or none has some"),
    "more tokens than a chunk has": (put("n_tokens", (4, 0), 65), "has more tokens than it can"),
    "fewer than none": (put("n_tokens", (4, 0, 1), -1), "has more tokens than it can"),
    "padding": (lambda stored: put("n_tokens", (slice(None), 0, 0), 1)(stored), "padding is not zero"),
    "other tokens": (put("tokens", (slice(None), 0, 0, 0), 1), "tokens are not those of the chunks"),
    "other neighbours": (swapped, "a neighbour is not one of its table"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_about_materialised_neighbours_is_found(store: Path, what: str) -> None:
    change, expected = LIES[what]
    problems = lie(store, change)
    assert any(expected in problem for problem in problems), problems
    assert all("materialised/main" in problem for problem in problems)


def test_text_that_was_erased_and_is_still_there_is_found(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    old = opened.state.part_file("materialised", PART, "main")
    before = read_materialised(opened, old)
    for place in (0, 1):
        victim = int(before.ids[5, place])
        (tmp_path / "ids").write_text(f"{victim}\n")
        api.purge(store, api.Selectors(ids=str(tmp_path / "ids")), reason="test", erase=True)
        assert api.verify(store).problems == []
        assert any("it holds tokens of erased chunks" in problem for problem in lie(store, lambda _: before))
        api.materialise(store)
        assert api.verify(store).problems == []


def test_a_purge_alone_is_no_problem(store: Path) -> None:
    api.purge(store, api.Selectors(where="id = 'doc-3'"), reason="test")
    assert api.verify(store).problems == []


def test_files_of_tables_that_are_gone_are_no_problem(store: Path) -> None:
    api.index(store, name="other")
    api.neighbours(store, index="other")
    assert api.verify(store).problems == []


def test_chunks_that_are_no_keys_have_none(tmp_path: Path, tiny_encoder: Path) -> None:
    from key_values import Written, make_store

    rows = [Written(f"q{i}", f"store chunk {i}", f"token vector {'neighbour ' * 9}") for i in range(9)]
    store = make_store(tmp_path / "store", tiny_encoder, rows, [Written("d", "river mountain")])
    api.embed(store, encoder=str(tiny_encoder))
    api.index(store)
    api.neighbours(store, materialise=True)
    assert api.verify(store).problems == []
    opened = Store.open(store)
    value = int(np.flatnonzero(~parts.read_key(opened, 0))[0])
    with Run(store) as run:
        liar = Liar(opened, run)
        old = opened.state.part_file("materialised", 0, "main")
        stored = read_materialised(opened, old)
        copy = Materialised(*(np.array(v) for v in (stored.ids, stored.databases, stored.n_tokens, stored.tokens)))
        for array in (copy.ids, copy.databases, copy.n_tokens, copy.tokens):
            array[value] = array[value - 1]
        width = opened.identity.chunk_length * opened.identity.tokenizer.token_bytes
        liar.commit(write_materialised(store, liar.name(old), 2, width, [copy], about=old.about), old)
    assert any("a chunk that is no key has neighbours" in problem for problem in api.verify(store).problems)


def test_the_digest_is_of_what_is_materialised(store: Path) -> None:
    before = api.verify(store)
    assert len(before.materialised) == 64
    lie(store, lambda stored: stored)
    assert api.verify(store).materialised == before.materialised, "not of the file's name"
    lie(store, put("tokens", (0, 0, 0, 0), 1))
    after = api.verify(store)
    assert after.materialised != before.materialised and after.neighbours == before.neighbours
