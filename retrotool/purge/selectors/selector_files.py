"""Files that selectors are given: UTF-8, with or without a byte order mark, as editors on Windows write one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retrotool.errors import UsageError

_BOM = b"\xef\xbb\xbf"


def read_text(option: str, path: str | Path) -> str:
    """What stands in a file; ``UsageError`` if it can't be read, with the line where it is no UTF-8."""
    try:
        data = Path(path).read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise UsageError(f"{option} {path} can't be read: {error.strerror or error}", "Nothing was purged.") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{option} {path} can't be read: line {line:,} is not UTF-8", "Save it as UTF-8.") from error


def read_lines(
    option: str, path: str | Path, what: str, *, says: Callable[[str], object] = str.strip
) -> tuple[str, ...]:
    """The lines of a file, without their ends; ``what`` stands on each that ``says`` something.

    ``UsageError`` if none does: who gives a file means to select by it.
    """
    lines = tuple(line.removesuffix("\r") for line in read_text(option, path).split("\n"))
    if not any(map(says, lines)):
        raise UsageError(f"{option} {path} has no {what}", f"Give a file with one {what} a line.")
    return lines
