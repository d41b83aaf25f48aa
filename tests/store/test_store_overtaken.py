"""A reader whose file is replaced under it, by a commit between looking the file up in the log and opening it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_help import Action, at_step, commit, make_store
from stored import stored_file

from retrotool.chunk.chunk_plan import read_json_file, write_json_file
from retrotool.errors import ConflictError, CorruptError, ErasedError
from retrotool.store import parts, tombstones
from retrotool.store.leases import Run
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.vectors import read_vectors, write_vectors

Write = Callable[[Store, str, int], FileEntry]
Read = Callable[[Store, FileEntry], object]


def write_ids(store: Store, run: str, value: int) -> FileEntry:
    return tombstones.write_tombstones(store, FileName.new(run, "tombstones", "one", "parquet"), np.array([value]))


def write_matrix(store: Store, run: str, value: int) -> FileEntry:
    name = FileName.new(run, "embeddings", "000000", "npy", "model")
    return write_vectors(store, name, np.array([[value]], np.float16))


def write_json(store: Store, run: str, value: int) -> FileEntry:
    return write_json_file(store, FileName.new(run, "selectors", "one", "json"), {"value": value}, 1)


KINDS: dict[str, tuple[Write, Read]] = {
    "Parquet": (write_ids, lambda store, entry: parts.read_parquet(store, entry)["chunk"].to_pylist()[0]),
    "Parquet by row group": (write_ids, lambda store, entry: next(parts.read_tables(store, entry))["chunk"][0].as_py()),
    "vectors": (write_matrix, lambda store, entry: int(read_vectors(store, entry)[0, 0])),
    "JSON": (write_json, lambda store, entry: read_json_file(store, entry, {})["value"]),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


@pytest.fixture(params=KINDS)
def stored(request: pytest.FixtureRequest, store: Store) -> tuple[Store, Action, Read]:
    """A view of a store with one file of value 1, what replaces that by one of value 2, and how it is read."""
    write, read = KINDS[request.param]
    with Run(store.storage) as run:
        first = write(store, run.id, 1)
        commit(store, run, first)

    def replace() -> None:
        with Run(store.storage) as run:
            commit(Store.open(store.place), run, write(store, run.id, 2), remove=(first.path,))

    return store, replace, read


def read_live(store: Store, read: Read) -> object:
    (entry,) = store.state.files()
    return read(store, entry)


def test_a_file_that_is_replaced_as_it_is_opened_is_not_damage(stored: tuple[Store, Action, Read]) -> None:
    store, replace, read = stored
    with at_step(0, replace), pytest.raises(ErasedError, match="was replaced or erased"):
        read_live(store, read)


def test_reading_goes_on_with_the_file_that_took_its_place(stored: tuple[Store, Action, Read]) -> None:
    store, replace, read = stored
    with at_step(0, replace):
        assert retry_overtaken(lambda: read_live(store, read), store.renew) == 2


@pytest.mark.parametrize("when", ["before", "as it is opened"])
def test_a_file_that_no_commit_removed_is_damage_at_once(stored: tuple[Store, Action, Read], when: str) -> None:
    store, _, read = stored
    (entry,) = store.state.files()
    attempts = []

    def attempt() -> object:
        attempts.append(None)
        return read(store, entry)

    def lose() -> None:
        stored_file(store, entry.path).unlink()

    if when == "before":
        lose()
    with pytest.raises(CorruptError, match=f"{entry.path} is missing") as caught:
        if when == "before":
            retry_overtaken(attempt, store.renew)
        else:
            with at_step(0, lose):
                retry_overtaken(attempt, store.renew)
    assert "retrotool verify" in caught.value.advice and len(attempts) == 1


def test_a_conflict_is_tried_again_as_long_as_others_commit(store: Store) -> None:
    with Run(store.storage) as run:
        left = [3]

        def conflicting() -> str:
            left[0] -= 1
            if left[0] < 0:
                return "done"
            commit(Store.open(store.place), run, records={"left": left[0]})
            raise ConflictError("overtaken")

        assert retry_overtaken(conflicting, store.renew) == "done"


@pytest.mark.parametrize("error", [ConflictError, ErasedError])
def test_what_does_not_end_is_raised(store: Store, error: type[Exception]) -> None:
    attempts = []

    def fail() -> None:
        attempts.append(None)
        raise error("never")

    with pytest.raises(error, match="never"):
        retry_overtaken(fail, functools.partial(len, attempts) if error is ErasedError else store.renew)
    assert len(attempts) == (20 if error is ErasedError else 2)
