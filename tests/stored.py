"""What is in a store, looked at and damaged by tests: alike for stores in folders and in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from fnmatch import fnmatchcase
from pathlib import Path

from memory_storage import MemoryFile, MemoryStorage, forget

from retrotool.store.local_storage import TEMPORARY, LocalStorage
from retrotool.store.storage import Storage, storage_at
from retrotool.store.store import Store

Place = str | os.PathLike[str] | Store | Storage


def _storage(store: Place) -> Storage:
    return store.storage if isinstance(store, Store) else storage_at(store)


def file_sha256(storage: Storage, path: str) -> str:
    """The SHA-256 of what a storage reads of a file, block by block."""
    return hashlib.sha256(b"".join(storage.blocks(path))).hexdigest()


def stored_file(store: Place, path: str | os.PathLike[str]) -> Path | MemoryFile:
    """A file of a store, by its path there; also one that is not there."""
    storage = _storage(store)
    if isinstance(storage, MemoryStorage):
        return MemoryFile(storage.uri, os.fspath(path))
    return Path(storage.place) / path


def stored_files(store: Place, pattern: str = "*") -> list[Path | MemoryFile]:
    """The files of a store whose paths there match, in their order; ``*`` is any text, ``/`` too.

    In a folder, whatever is there, not only what the store lists.
    """
    storage = _storage(store)
    if isinstance(storage, MemoryStorage):
        return [MemoryFile(storage.uri, info.path) for info in storage.list("") if fnmatchcase(info.path, pattern)]
    files = sorted(path for path in Path(storage.place).rglob("*") if path.is_file())
    return [file for file in files if fnmatchcase(path_in_store(storage, file), pattern)]


def path_in_store(store: Place, file: Path | MemoryFile) -> str:
    """The path of a file in its store."""
    return file.path if isinstance(file, MemoryFile) else file.relative_to(_storage(store).place).as_posix()


def contents_of(store: Place, pattern: str = "*") -> dict[str, bytes]:
    """All files of a store, by their paths there."""
    return {path_in_store(store, file): file.read_bytes() for file in stored_files(store, pattern)}


def write_stored(store: Place, path: str, data: bytes) -> Path | MemoryFile:
    """Write a file of a store past its storage, as nobody should."""
    file = stored_file(store, path)
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def age_stored(file: Path | MemoryFile, seconds: float) -> None:
    """Have a file of a store written so many seconds ago, by the clock of its storage."""
    if isinstance(file, MemoryFile):
        file.store.bucket.age(file.path, seconds)
    else:
        os.utime(file, (time.time() - seconds,) * 2)


def leave_unfinished(store: Place, folder: str, run: str, number: int = 0) -> str:
    """Leave what a run writes to a folder of a store that it never ends; return what the storage calls it."""
    storage = _storage(store)
    if isinstance(storage, MemoryStorage):
        upload: str = storage.bucket.begin(f"{folder}{number}", run)
        storage.bucket.append(upload, b"half")
        return upload
    name = f"{folder}{TEMPORARY}{run}{number:08x}"
    write_stored(store, name, b"half")
    return name


def remove_stored(store: Place, pattern: str) -> None:
    """Remove all files of a store whose paths match; none need be there."""
    for file in stored_files(store, pattern):
        file.unlink()


def copy_store(store: Place, target: str | Path) -> Path:
    """Copy a store; return ``target``."""
    source = _storage(store)
    if isinstance(source, LocalStorage):
        return Path(shutil.copytree(source.place, target))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    for info in source.list(""):
        write_stored(target, info.path, source.get(info.path))
    return Path(target)


def take_in(folder: Path, target: Path) -> Path:
    """Make a store of a copy of one in a folder of the tests; return ``target``."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        write_stored(target, file.relative_to(folder).as_posix(), file.read_bytes())
    return target


def folder_of(store: Place, folder: Path) -> Path:
    """The folder of a store, for other tools; of one in memory, ``folder``, with a copy of its files."""
    storage = _storage(store)
    if not isinstance(storage, MemoryStorage):
        return Path(storage.place)
    for info in storage.list(""):
        (folder / info.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / info.path).write_bytes(storage.get(info.path))
    return folder


def move_store(store: Place, target: str | Path) -> Path:
    """Move a store; return ``target``."""
    source = _storage(store)
    if isinstance(source, LocalStorage):
        return Path(source.place).rename(target)
    moved = copy_store(store, target)
    remove_stored(store, "*")
    return moved


def remove_store(store: Place) -> None:
    """Remove a store, if there is one."""
    storage = _storage(store)
    if isinstance(storage, MemoryStorage):
        forget(Path(storage.uri))
    else:
        shutil.rmtree(storage.place, ignore_errors=True)
