"""The files of an index: the training, and shards of codes; reading and writing them."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from retrotool.ann import lists
from retrotool.ann.lists import InvertedLists
from retrotool.ann.trained import Trained
from retrotool.errors import CorruptError, StorageError
from retrotool.index.index_records import IndexFiles
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.vectors import MappedFile


def is_unchanged(store: Store, entry: FileEntry | None) -> bool:
    """Whether a file is there, and its bytes are what the log says."""
    if entry is None:
        return False
    try:
        store.check_sum(entry)
    except CorruptError:
        return False
    return True


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Give a ``CorruptError`` this advice."""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(str(error), advice) from error


def _anew(what: str, store: Store, name: str, option: str) -> str:
    return f"{what} it anew: {shlex.join(['retrotool', 'index', store.place, option, '--name', name])}"


def read_trained(store: Store, name: str, generation: int | None = None) -> tuple[FileEntry, Trained]:
    """The training of an index; ``CorruptError`` if it is not, to the bit, what the log says.

    All that is indexed and searched depends on it, and it is small beside the shards: its sum is checked each time.
    """
    entry = IndexFiles(store.state, name, generation).trained
    with advising(_anew("Train", store, name, "--retrain")):
        if entry is None:
            raise CorruptError(f"index {name!r} has no training")
        store.check_sum(entry)
        with store.reading(entry) as storage:
            return entry, lists.read_lists(storage.local(entry.path)).trained


def read_shard(store: Store, entry: FileEntry, trained: Trained | None = None) -> InvertedLists:
    """Map a shard; ``ErasedError`` if it was erased since the store was opened, ``CorruptError`` if it is broken."""
    with store.reading(entry) as storage:
        path = storage.local(entry.path)
        file = MappedFile(store, entry, path)
        # What is before the lists is read at once, and faiss may crash on what it does not expect.
        in_lists = 0 if trained is None or trained.centroids is None else entry.rows * (trained.codec.size + 8)
        file.check(0, entry.bytes - in_lists)
        shard = lists.read_lists(path, trained, file.check)
    if len(shard) != entry.rows:
        raise CorruptError(f"{store.where(entry.path)} holds {len(shard):,} vectors, the log says {entry.rows:,}")
    return shard


def read_shards(
    store: Store,
    name: str,
    trained: Trained | None = None,
    missing: Callable[[FileEntry], object] | None = None,
    *,
    generation: int | None = None,
) -> Iterator[InvertedLists]:
    """The shards of an index, of its current generation or another one.

    ``missing`` is told of those that are broken; without it, the first raises its ``CorruptError``.
    """
    for entry in IndexFiles(store.state, name, generation).shards.values():
        try:
            with advising(_anew("Make", store, name, "--repair")):
                shard = read_shard(store, entry, trained)
        except CorruptError:
            if missing is None:
                raise
            missing(entry)
        else:
            yield shard


def check_sum(store: Store, name: str, entry: FileEntry) -> None:
    """``CorruptError`` if a shard's bytes are not what the log says: what is made of it would be as wrong."""
    with advising(_anew("Make", store, name, "--repair")):
        store.check_sum(entry)


def write_index(store: Store, index: Any, name: FileName, about: dict[str, Any] | None) -> FileEntry:
    """Write a faiss index."""
    try:
        return store.write(name, lambda sink: lists.write_lists(index, sink.write), about=about)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise StorageError(
            f"{name.path}: {error.strerror}; what was committed before is untouched",
            "The file system, or a limit of the process (ulimit -f), allows no file of this size.",
        ) from error
