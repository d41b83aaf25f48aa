"""Texts that tests expect, kept in files so that wording can be changed: ``make update-snapshots``, and read the diff.

The texts of ``test_x.py`` are in ``snapshots/test_x.txt`` beside it: under ``## NAME OF THE TEST`` each line, indented.
"""

from __future__ import annotations

import fcntl
import os
import textwrap
from pathlib import Path

UPDATE = bool(os.environ.get("RETROTOOL_UPDATE_SNAPSHOTS"))


class Snapshots:
    """``snapshots(text)`` in a test: the text is the one that is kept; the n-th of a test is the n-th that is kept.

    ``snapshots(text, "name")``: all parameters of a test have this text.
    """

    def __init__(self, module: Path, test: str) -> None:
        self._file = module.parent / "snapshots" / f"{module.stem}.txt"
        self._test = test
        self._asked = 0

    def __call__(self, text: str, of_all: str = "", **places: object) -> None:
        """Compare ``text``, in which the paths ``places`` are written as their names."""
        for name, place in places.items():
            text = text.replace(str(place), name)
        self._asked += not of_all
        key = self._test if self._asked < 2 else f"{self._test} ({self._asked})"
        if of_all:
            key = f"{self._test.partition('[')[0]} {of_all}"
        if UPDATE:
            self._keep(key, text)
        kept = read_snapshots(self._file) if self._file.exists() else {}
        assert key in kept, f"{self._file} has no text of {key}: make update-snapshots"
        assert text == kept[key], f"{self._file} has another text of {key}"

    def _keep(self, key: str, text: str) -> None:
        self._file.parent.mkdir(exist_ok=True)
        with self._file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = {**read_snapshots(self._file), key: text}
            self._file.write_text("".join(_section(key, kept[key]) for key in sorted(kept)), "utf-8")


def _section(key: str, text: str) -> str:
    if not text.endswith("\n") or text.endswith("~\n"):
        text += "~\n"  # what has no end of line is kept with one
    return f"## {key}\n{textwrap.indent(text, '    ', lambda _: True)}"


def read_snapshots(file: Path) -> dict[str, str]:
    """The texts of a file, by name."""
    found: dict[str, str] = {}
    key = ""
    for line in file.read_text("utf-8").splitlines(keepends=True):
        if line.startswith("## "):
            key = line[3:-1]
            found[key] = ""
        else:
            found[key] += line[4:]
    return {key: text.removesuffix("~\n") for key, text in found.items()}
