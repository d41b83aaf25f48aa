"""Files outside of a store that commands write, such as pages: refused before work begins, and written whole or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrotool.errors import StorageError, UsageError
from retrotool.store.identity import FILE as IDENTITY


def check_file(option: str, file: str | Path) -> None:
    """Raise ``UsageError`` if ``file`` can't be written: it has no folder, is something else, or is in a store.

    In a store it might replace one of its files, and an erase would not reach its text.
    """
    path = Path(file)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {folder}", "Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{option} {file}: you may not write into {folder}", "Name a file in another folder.")
    if path.is_dir():
        raise UsageError(f"{option} {file} is a folder", "Name a file in it.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {file} is a device or a pipe, not a file", "Name a file.")
    for above in path.resolve().parents:
        if (above / IDENTITY).exists():
            raise UsageError(f"{option} {file} is in the store {above}", "Name a file outside of it.")


@contextmanager
def written(file: str | Path) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to, which replaces ``file`` at the end, and is removed after an error.

    ``StorageError`` if the disk is full, and the like.
    """
    path = Path(file)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        if error.filename is not None and not _is_ours(error.filename, scratch):
            raise  # it is about another file
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _is_ours(name: object, scratch: Path) -> bool:
    """Whether an error names ``scratch`` or its folder, of which a user knows nothing."""
    if not isinstance(name, str | bytes):
        return False
    return Path(os.fsdecode(name)).absolute() in (scratch.absolute(), scratch.absolute().parent)
