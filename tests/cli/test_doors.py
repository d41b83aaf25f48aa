"""Nothing but ``retrotool.store`` touches the files of a store.

Every command runs while an audit hook looks at what Python opens, lists, renames and removes; what faiss, numpy and
pyarrow open by themselves has no event, so their calls are looked for in the code. That everything works on a storage
that has no files, ``tests/memory_storage.py``, shows the same from the other side.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_cli import Run, ordered_examples, run, words_of, workplace  # noqa: F401 - fixtures

import retrotool
from retrotool import api
from retrotool.train.dataset import RetroDataset

PACKAGE = Path(retrotool.__file__).parent
STORE = str(PACKAGE / "store") + os.sep
EVENTS = ("open", "os.", "shutil.", "pathlib.")
BY_THEMSELVES = re.compile(r"faiss\.(read|write)_index|memory_map|mmap_mode|np\.memmap|np\.load\(|read_metadata\(")
"""Calls by which libraries open files."""
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


@pytest.mark.on_disk
def test_every_command_reaches_a_store_through_its_storage_alone(workplace: Path, run: Run) -> None:  # noqa: F811
    stores = [workplace / name for name in ("store", "database", "training", "papers", "evaluation", "pairs")]
    with watching(*stores) as seen:
        for example in ordered_examples():
            words = words_of(example)
            code, out, err = run(*words)
            assert code in (0, 2), (example, out, err)
        purge = next(iter(api.info("store").purges))
        for more in (["receipt", "store", purge], ["log", "store"], ["verify", "store"]):
            run(*more)
        for _ in RetroDataset("store", sequence_length=128, batch_size=2):
            break
    assert sum("by " + STORE in what for what in seen) > 1000, "it sees what is done"
    assert outside(seen) == []


@pytest.mark.on_disk
def test_the_hook_sees_what_goes_round_the_storage(built_store: Path) -> None:
    with watching(built_store) as seen:
        api.info(built_store)
        assert seen
        assert outside(seen) == []
        source = "open(path).close()"
        exec(compile(source, str(PACKAGE / "info" / "run.py"), "exec"), {"path": built_store / "store.json"})
    assert len(outside(seen)) == 1


def test_libraries_open_no_file_by_themselves() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith("store/") and (calls := len(BY_THEMSELVES.findall(file.read_text()))):
            found[name] = calls
    assert found == {"ann/lists.py": 2}, "which reads a path that the storage gives, and writes to what it is given"
