"""What every writing command begins with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from retrotool.store import folding
from retrotool.store.clean import clean
from retrotool.store.runs import Run
from retrotool.store.store import Store


@contextlib.contextmanager
def writing(store: Store) -> Iterator[Run]:
    """A run on a store, after cleaning up what dead runs left."""
    with Run(store.root) as run:
        clean(store, run)
        # What dead runs had finished is kept; what an erase has overtaken since must not stay on the disk.
        folding.fold(store, run)
        yield run
