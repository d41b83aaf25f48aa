"""Taking purges back in tests, and what stores then give."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from oracle import saved_neighbours
from stored import copy_store, remove_store

import retrotool
from retrotool import api
from retrotool.neighbours.run import SearchOptions
from retrotool.purge.run import PurgeResult
from retrotool.purge.undo import UndoResult, undo
from retrotool.store import disk

SAME = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "documents", "chunks", "tokens")


def purge(store: Path, *names: str, erase: bool = False) -> PurgeResult:
    return api.purge(store, api.Selectors(document=names), reason="test", erase=erase)


def back(store: Path, purged: str) -> UndoResult:
    return undo(store, purged, reason="it was another one")


def verified(store: Path) -> dict[str, object]:
    found = api.verify(store)
    assert found.problems == []
    return {name: getattr(found, name) for name in SAME}


def near(store: Path, name: str = "main") -> list[list[int]]:
    """Ids of all live neighbours of all live chunks, nearest first."""
    reader = retrotool.open(store)
    ids = [int(chunk) for part in reader.parts() for chunk in reader.chunk_ids(part)]
    saved = int(api.info(store).neighbours[name]["saved"])
    return [[chunk, *(i for i, _ in reader.neighbour_ids(chunk, name, saved))] for chunk in ids]


def exact(store: Path, scratch: Path, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """What exact search gives for a store as it is now, computed at once and elsewhere."""
    remove_store(scratch)
    copy_store(store, scratch)
    api.neighbours(scratch, name="truth", search=SearchOptions(exact=True), **options)
    return saved_neighbours(scratch, "truth")


def assert_exact(store: Path, scratch: Path, name: str = "main") -> None:
    ids, distances = saved_neighbours(store, name)
    true_ids, true_distances = exact(store, scratch)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-3, atol=1e-3)
    assert (ids == true_ids).mean() > 0.999


_listener: Callable[[str, str], object] | None = None


def _hook(event: str, arguments: tuple[str, ...]) -> None:
    if event == disk.EVENT and _listener is not None:
        _listener(*arguments)


sys.addaudithook(_hook)  # there is no way to remove one


@contextmanager
def once_before(operation: str, folder: Path, strike: Callable[[], object], slot: str = "") -> Iterator[None]:
    """Call ``strike`` just before the first announced ``operation`` on a file of ``slot`` in ``folder``.

    Without ``slot``, on any file there. Fail if there is none.
    """
    global _listener
    done, names = False, {operation, "rename"} if operation == "finish" else {operation}  # as a disk's end of a write

    def listener(announced: str, path: str) -> None:
        global _listener
        nonlocal done
        if announced in names and Path(path).parent == folder and Path(path).name.startswith(slot):
            _listener, done = None, True
            strike()

    assert _listener is None
    _listener = listener
    try:
        yield
    finally:
        _listener = None
    assert done, f"no {operation} in {folder}"
