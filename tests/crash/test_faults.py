"""Power cuts and failing calls at the n-th step of each command, then the same command again.

A power cut loses what was not made durable: the content of files without an fsync, and names that were made, or
removed, in a folder that was not fsynced after it. A random half of each is lost, as a file system may choose. A
failing call raises an error of the system in the place of a step; the command ends, or does without.

RETROTOOL_KILLS sets how many and RETROTOOL_SEED which ones, as for the kills beside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import times
from stored import copy_store
from test_kills import (  # noqa: F401 - a fixture is among them
    CASES,
    KILLS,
    SEED,
    cases,
    check_after,
    check_between,
    in_child,
    problems,
    stages,
    uninterrupted,
)

from retrotool.errors import RetrotoolError
from retrotool.store import disk

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]

CUTS = KILLS if "RETROTOOL_KILLS" in os.environ else 1
BY_DEFAULT = ("chunk", "lists", "erase", "undo")
EACH = [
    pytest.param(i, id=name, marks=[] if name in BY_DEFAULT else pytest.mark.nightly) for i, name in enumerate(CASES)
]
_listener: Callable[[str, str], object] | None = None


def _hook(event: str, arguments: tuple[str, ...]) -> None:
    if event == disk.EVENT and _listener is not None:
        _listener(*arguments)


sys.addaudithook(_hook)  # there is no way to remove one


def listening(work: Callable[[], object], listener: Callable[[str, str], object]) -> Callable[[], object]:
    def listened() -> object:
        global _listener
        _listener = listener
        return work()

    return listened


class Cut:
    """Notes every step of a process, keeps what it removes, and kills it at step ``fatal``."""

    def __init__(self, notes: Path, fatal: int) -> None:
        self.notes, self.kept, self.fatal, self.calls = notes / "steps", notes / "kept", fatal, 0
        self.kept.mkdir(parents=True)

    def __call__(self, step: str, path: str) -> None:
        self.calls += 1
        if self.calls == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "unlink" and Path(path).is_file():
            os.link(path, self.kept / str(self.calls))
        with self.notes.open("a") as notes:
            notes.write(f"{self.calls}\t{step}\t{path}\n")

    def lose(self, draw: random.Random) -> int:
        """Do to the folder what a loss of power does; return how much was lost."""
        steps = [line.split("\t") for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        dirty: dict[str, None] = {}
        made: dict[str, str] = {}
        removed: dict[str, Path] = {}
        for number, step, path in steps:
            if step == "write":
                dirty[path] = None
            elif step == "fsync":
                dirty.pop(path, None)
            elif step in ("rename", "link", "mkdir"):
                made[path] = step
            elif step == "unlink" and (self.kept / number).exists():
                removed[path] = self.kept / number
            elif step == "fsync_directory":
                made = {name: what for name, what in made.items() if str(Path(name).parent) != path}
                removed = {name: kept for name, kept in removed.items() if str(Path(name).parent) != path}
        lost = 0
        for path in [path for path in dirty if Path(path).is_file() and draw.random() < 0.5]:
            os.truncate(path, draw.randint(0, Path(path).stat().st_size))
            lost += 1
        for path, kept in removed.items():
            if draw.random() < 0.5 and not Path(path).exists() and Path(path).parent.is_dir():
                shutil.copy(kept, path)
                lost += 1
        for path, step in made.items():
            if draw.random() < 0.5 and Path(path).exists():
                shutil.rmtree(path) if step == "mkdir" else Path(path).unlink()
                lost += 1
        return lost


@pytest.mark.parametrize("number", EACH)
def test_after_a_power_cut_nothing_that_was_committed_is_lost(
    number: int,
    stages: dict[str, Path],  # noqa: F811
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    case = cases(stages, tiny_encoder)[number]
    before = stages[case.name.split()[0]]
    expected, calls = uninterrupted(case, before, tmp_path / "whole")
    known, draw = problems(before), random.Random(SEED + 100 + number)
    for attempt in range(times(CUTS, max(CUTS, 5)) if CUTS == 1 else CUTS):
        store = tmp_path / f"store-{attempt}"
        if before.exists():
            copy_store(before, store)
        cut = Cut(tmp_path / f"notes-{attempt}", draw.randint(1, calls))
        assert in_child(listening(lambda store=store: case.work(store), cut), None)[0]  # type: ignore[misc]
        cut.lose(draw)
        check_between(store, before, known, expected)
        in_child(lambda store=store: case.work(store), None)  # type: ignore[misc]
        check_after(store, case, expected)
        shutil.rmtree(store)


class Failing:
    """Raises an error of the system at step ``fatal`` and, if it ``stays``, at all that follow."""

    def __init__(self, fatal: int, code: int, *, stays: bool) -> None:
        self.fatal, self.code, self.stays, self.calls = fatal, code, stays, 0

    def __call__(self, _step: str, path: str) -> None:
        self.calls += 1
        if self.calls == self.fatal or (self.stays and self.calls > self.fatal):
            raise OSError(self.code, os.strerror(self.code), path)


@pytest.mark.parametrize("number", EACH)
def test_after_a_call_that_failed_there_is_the_old_state_or_the_new_one(
    number: int,
    stages: dict[str, Path],  # noqa: F811
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    case = cases(stages, tiny_encoder)[number]
    before = stages[case.name.split()[0]]
    expected, calls = uninterrupted(case, before, tmp_path / "whole")
    known, draw = problems(before), random.Random(SEED + 200 + number)
    for attempt in range(times(CUTS, max(CUTS, 5)) if CUTS == 1 else CUTS):
        store = tmp_path / f"store-{attempt}"
        if before.exists():
            copy_store(before, store)
        code = draw.choice((errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS))
        failing = Failing(draw.randint(1, calls), code, stays=draw.random() < 0.5)

        def work(store: Path = store) -> None:
            with contextlib.suppress(RetrotoolError, OSError):
                case.work(store)

        in_child(listening(work, failing), None)
        check_between(store, before, known, expected)
        in_child(lambda store=store: case.work(store), None)  # type: ignore[misc]
        check_after(store, case, expected)
        shutil.rmtree(store)
