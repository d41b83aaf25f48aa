"""Erasing purges that were made before, by their ids or by their age."""

from __future__ import annotations

from pathlib import Path

import pytest

import retrotool
from retrotool import api
from retrotool.errors import UsageError
from retrotool.store.store import Store


def purge(store: Path, name: str, **settings: object) -> str:
    return api.purge(store, api.Selectors(document=(name,)), reason="test", **settings).purge


def left(store: Path) -> set[str]:
    return {name for part in retrotool.open(store).parts() for name in ids_of(store, part)}


def ids_of(store: Path, part: int) -> list[str]:
    from retrotool.store import parts

    return [name for name in parts.read_documents(Store.open(store), part, ["id"])["id"].to_pylist() if name]


def test_purges_are_erased_by_their_ids_and_no_others(store_copy: Path) -> None:
    first, second = purge(store_copy, "doc-3"), purge(store_copy, "doc-9")
    assert {"doc-3", "doc-9"} <= left(store_copy)
    done = api.erase(store_copy, [first])
    assert done.purges == (first,) and done.erased == done.unerased > 0
    assert "doc-3" not in left(store_copy) and "doc-9" in left(store_copy)
    records = Store.open(store_copy).state.records
    assert (records[f"purge:{first}"]["erased"], records[f"purge:{second}"]["erased"]) == (True, False)
    again = api.erase(store_copy, [first])
    assert (again.unerased, again.files_rewritten) == (0, 0)
    assert api.verify(store_copy).ok


def test_old_purges_are_erased_and_young_ones_are_not(store_copy: Path) -> None:
    first = purge(store_copy, "doc-3")
    assert api.erase(store_copy, older_than=3600).purges == ()
    assert api.erase(store_copy, older_than=1e18).purges == ()
    assert "doc-3" in left(store_copy)
    assert api.erase(store_copy, older_than=0).purges == (first,)
    assert "doc-3" not in left(store_copy)
    assert api.verify(store_copy).ok


def test_what_is_declined_or_unknown_leaves_everything_as_it_is(store_copy: Path) -> None:
    first = purge(store_copy, "doc-3")
    before = Store.open(store_copy).state.number
    with pytest.raises(UsageError, match=f"no purge 'p0'; it has: {first}"):
        api.erase(store_copy, ["p0"])
    assert api.erase(store_copy, [first], confirm=lambda planned: planned.unerased == 0).erased == 0
    assert Store.open(store_copy).state.number == before
    assert "doc-3" in left(store_copy)
