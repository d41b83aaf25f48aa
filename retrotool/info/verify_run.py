"""Run ``verify``: check every file of a store, again where other processes remove what is checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrotool.ann import lists
from retrotool.errors import CorruptError
from retrotool.index.index_files import read_trained
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName, generation_in
from retrotool.store.store import Store, retry_overtaken
from retrotool.store.verify import Verification, check_store, total_bytes


def verify(root: str | Path, report: Callable[[int], object] = lambda _: None) -> Verification:
    """Check every file of a store, and give the hashes by which stores are compared.

    A store that can't be opened for what is in it is a problem too; ``ErasedError`` if other processes keep removing
    files that were to be checked.
    """
    reported = 0

    def counted(n: int) -> None:
        nonlocal reported
        reported += n
        report(n)

    try:
        return retry_overtaken(lambda: check_store(Store.open(root), counted, _read_lists), lambda: counted(-reported))
    except CorruptError as error:
        return Verification(False, -1, [f"{error}. {error.advice}".removesuffix(" ")])


def bytes_to_verify(root: str | Path) -> int:
    """How many bytes ``verify`` will report; 0 if the store can't be opened for what is in it."""
    try:
        return total_bytes(Store.open(root))
    except CorruptError:
        return 0


def _read_lists(store: Store, entry: FileEntry) -> Iterator[tuple[Any, Callable[[int, Any], bool]]]:
    name = FileName.parse(entry.path)
    # A training that is broken is noted as such: its shards are still read, by what they hold of it.
    trained = None
    with contextlib.suppress(CorruptError):
        trained = read_trained(store, name.name, generation_in(name.slot))[1]
    with store.reading(entry) as path:
        shard = lists.read_lists(path, trained)
    for number in shard.numbers:
        yield shard.ids(number), functools.partial(shard.may_stand_for, number)
