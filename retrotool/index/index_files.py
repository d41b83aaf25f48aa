"""Read and write the files of an index: its training and its shards of codes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

from retrotool.ann import lists
from retrotool.ann.lists import InvertedLists, Trained
from retrotool.errors import CorruptError, StorageError
from retrotool.index.index_records import IndexFiles
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.store import Store
from retrotool.store.vectors import MappedFile


def read_trained(store: Store, name: str, generation: int | None = None) -> tuple[FileEntry, Trained]:
    """Read the training of an index; raise ``CorruptError`` if it does not match the log, to the byte."""
    entry = IndexFiles(store.state, name, generation).trained
    if entry is None:
        raise store.corrupt(f"index {name!r} has no training")
    store.check_sum(entry)
    with store.reading(entry) as storage:
        return entry, lists.read_lists(storage.local(entry.path)).trained


def read_shard(store: Store, entry: FileEntry, trained: Trained | None = None) -> InvertedLists:
    """Map a shard; raise ``ErasedError`` if erased since the store was opened, ``CorruptError`` if broken."""
    with store.reading(entry) as storage:
        path = storage.local(entry.path)
        file = MappedFile(store, entry, path)
        # faiss reads everything before the lists at once, and may crash on unexpected bytes.
        in_lists = 0 if trained is None or trained.centroids is None else entry.rows * (trained.codec.size + 8)
        file.check(0, entry.bytes - in_lists)
        shard = lists.read_lists(path, trained, file.check)
    if len(shard) != entry.rows:
        raise store.corrupt(f"{store.where(entry.path)} contains {len(shard):,} vectors, the log says {entry.rows:,}")
    return shard


def read_shards(
    store: Store,
    name: str,
    trained: Trained | None = None,
    missing: Callable[[FileEntry], object] | None = None,
    *,
    generation: int | None = None,
) -> Iterator[InvertedLists]:
    """Yield the shards of an index; pass broken ones to ``missing``, or raise ``CorruptError`` without it."""
    for entry in IndexFiles(store.state, name, generation).shards.values():
        try:
            shard = read_shard(store, entry, trained)
        except CorruptError:
            if missing is None:
                raise
            missing(entry)
        else:
            yield shard


def write_index(store: Store, index: Any, name: FileName, about: dict[str, Any] | None) -> FileEntry:
    """Write a faiss index to the store."""
    try:
        return store.write(name, lambda sink: lists.write_lists(index, sink.write), about=about)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise StorageError(
            f"{name.path}: {error.strerror}; earlier commits are unaffected",
            "The file system or a process limit (ulimit -f) does not allow files of this size.",
        ) from error
