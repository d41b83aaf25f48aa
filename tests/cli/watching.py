"""See what is done below some folders, and which file of the package does it, by an audit hook."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import retrotool

PACKAGE = Path(retrotool.__file__).parent
STORE = str(PACKAGE / "store") + os.sep
EVENTS = ("open", "os.", "shutil.", "pathlib.")
_watched: list[str] = []
_seen: list[str] = []


def _caller() -> str | None:
    """The innermost file of the package that is at work; None if it is the test."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(PACKAGE)):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or not event.startswith(EVENTS):
        return
    for argument in arguments:
        if not isinstance(argument, str | bytes | os.PathLike):
            continue
        path = os.path.join(os.getcwd(), os.fsdecode(argument))  # noqa: PTH109, PTH118 - a Path would be slower
        if any(path.startswith(store) for store in _watched):
            caller = _caller()
            _seen.append(f"{event} {path} by {caller}")


sys.addaudithook(_hook)  # there is no way to remove one


@contextmanager
def watching(*stores: Path) -> Iterator[list[str]]:
    """Collect what is done below some stores: the event, the path, and where in the package."""
    _seen.clear()
    _watched.extend(f"{store}{os.sep}" for store in stores)
    try:
        yield _seen
    finally:
        _watched.clear()


def outside(seen: list[str]) -> list[str]:
    return [what for what in seen if f"by {STORE}" not in what and not what.endswith("by None")]
