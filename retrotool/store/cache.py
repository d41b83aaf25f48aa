"""Copies on this machine of a store's files elsewhere, for what is mapped: embeddings and index files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from retrotool.errors import CorruptError
from retrotool.store.log import FileEntry

VARIABLE = "RETROTOOL_CACHE"


def cache_folder() -> Path:
    """Return the folder of everything that is kept for later runs on this machine and can be deleted."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrotool"


class FileCache:
    """The copies of one store's files; ``uuid`` is the store's."""

    def __init__(self, uuid: str) -> None:
        self.folder = cache_folder() / "files" / uuid

    def file(self, entry: FileEntry, blocks: Callable[[], Iterator[bytes]]) -> Path:
        """Return a file with an entry's bytes; without one, write ``blocks()`` to it.

        ``CorruptError`` if their SHA-256 is not the one in the entry.
        """
        path = self.folder / f"{entry.sha256}{Path(entry.path).suffix}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                for block in blocks():
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != entry.sha256:
                raise CorruptError(f"{entry.path}: its SHA-256 is not what the log says")
            Path(file.name).replace(path)
        return path


def pin(file: IO[bytes]) -> None:
    """Keep an open copy from being evicted for as long as it is open or mapped."""
    fcntl.flock(file, fcntl.LOCK_SH)
