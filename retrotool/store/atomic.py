"""The one door through which files enter a store.

``write_file`` gives a temporary path in the target's directory to any writer (numpy, pyarrow, faiss, bytes), then
checks, hashes, fsyncs, renames and fsyncs the directory. A kill at any moment leaves either the whole file under
its name, or a ``.tmp-`` file that clean-up removes; the file counts only once a commit names it.

Cost: one extra read of the file for its SHA-256 (about 1.5 GB/s, from the page cache). ``write_blocks`` pays it block
by block, while the next one is made.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrotool.store import disk, paths
from retrotool.store.paths import FileName

TEMPORARY = ".tmp-"
PUT_ATTEMPTS = 5
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a commit names it. ``rows`` is what its kind counts; ``about`` is small, JSON-like, or None."""

    path: str
    rows: int
    bytes: int
    sha256: str
    about: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The entry as it stands in a commit."""
        entry = {"path": self.path, "rows": self.rows, "bytes": self.bytes, "sha256": self.sha256}
        return entry if self.about is None else {**entry, "about": self.about}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> FileEntry:
        """Inverse of ``as_json``; fields it does not know are ignored."""
        return cls(
            str(entry["path"]), int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]), entry.get("about")
        )


def is_there(root: Path, entry: FileEntry) -> bool:
    """Whether a file of the store at ``root`` exists with the size that its entry says."""
    try:
        return paths.inside(root, entry.path).stat().st_size == entry.bytes
    except FileNotFoundError:
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(
    root: Path,
    name: FileName,
    write: Callable[[Path], int],
    *,
    about: dict[str, Any] | None = None,
    check: Callable[[Path, int], None] | None = None,
) -> FileEntry:
    """Write one new file of a store and return its entry.

    ``write(path)`` writes to the temporary path and returns the number of rows; ``check(path, rows)`` may raise if what
    lies there is not what was meant. On any error the temporary file is removed and nothing else has changed.
    """
    with _new_file(root, name) as temporary:
        rows = write(temporary)
        if check is not None:
            check(temporary, rows)
        size = temporary.stat().st_size
        disk.fsync(temporary)
        # Hashed after fsync: what is read back is what the commit will promise.
        sha256 = file_sha256(temporary)
    return FileEntry(name.path, rows, size, sha256, about)


def write_blocks(
    root: Path, name: FileName, blocks: Iterable[bytes | memoryview], rows: int, *, check: Callable[[Path, int], None]
) -> FileEntry:
    """As ``write_file``, for a file that is made block by block.

    Each block is made durable, read back and hashed before the next is taken, so a file that takes minutes to make is
    finished in the time of its last block.
    """
    digest = hashlib.sha256()
    with _new_file(root, name) as temporary:
        with temporary.open("xb") as file, temporary.open("rb") as written:
            for block in blocks:
                file.write(block)
                file.flush()
                disk.fsync(temporary)
                while data := written.read(_READ_BYTES):
                    digest.update(data)
            size = written.tell()
        check(temporary, rows)
    return FileEntry(name.path, rows, size, digest.hexdigest())


@contextmanager
def _new_file(root: Path, name: FileName) -> Iterator[Path]:
    """A temporary path, which gets the name once it was written without an error; durable then."""
    target = paths.inside(root, name.path)
    if target.exists():
        raise FileExistsError(f"{target}: a name is never written twice")
    with temporary_file(target, name.token) as temporary:
        disk.announce("write", temporary)
        yield temporary
        disk.rename(temporary, target)
        disk.fsync_directory(target.parent)


def put_if_absent(target: Path, token: str, data: bytes, check: Callable[[], object] = lambda: None) -> bool:
    """Write a small file under a name that must be free; False if it is taken. Durable on return.

    ``check`` is called between the write of the temporary file and the link that gives it its name, each time that
    this is tried; what it raises prevents the link.
    """
    for attempt in itertools.count(1):
        try:
            with temporary_file(target, token) as temporary:
                disk.write(temporary, data)
                disk.fsync(temporary)
                check()
                won = disk.link(temporary, target)
            break
        except FileNotFoundError:
            # Clean-up by another process takes the temporary file of a run that it can't see yet.
            if attempt == PUT_ATTEMPTS:
                raise
    with disk.told(target):
        disk.fsync_directory(target.parent)
    return won


@contextmanager
def temporary_file(target: Path, token: str) -> Iterator[Path]:
    """A temporary path beside ``target``, removed afterwards if it is still there."""
    with disk.told(target):
        disk.make_directory(target.parent)
        temporary = target.parent / f"{TEMPORARY}{token}{secrets.token_hex(4)}"
        try:
            yield temporary
        finally:
            if temporary.exists():
                disk.unlink(temporary)
