"""Write docs/cli.md: the ``--help`` of every command.

    python docs/make_cli.py

The width is fixed, so that the page does not depend on the terminal. A test compares it with ``page()``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from retrotool.app import app

WIDTH = 100
PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

This page is made from `--help` by `docs/make_cli.py`; run `make docs` after a change.

Results go to stdout, as text or with `--json` as one JSON object; errors, advice and progress go to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: the disk is full, a task failed every time, a bug |
| 2 | usage: what was asked for contradicts itself, the store or the machine |
| 3 | `chunk` finished, with rows rejected or an input broken off; repeated documents are not rejected |
| 10 | there is no store at that path |
| 11 | another process committed what this work conflicts with, or took this run for dead; run the command again |
| 12 | a file is not what the log says, or was erased under a reader; `receipt`: something of the purge is left |
| 14 | what is left is being done by other running commands, and `--no-wait` was given |
| 130 | interrupted; what is finished is kept, and the same command goes on from there |
"""


def command_names() -> list[str]:
    """Return the commands that ``--help`` lists, in its order; a group is followed by its members."""
    return list(_names(typer.main.get_command(app)))


def _names(group: Any, before: str = "") -> Iterator[str]:
    context = group.make_context("retrotool", [], resilient_parsing=True)
    for name in group.list_commands(context):
        yield before + name
        command = group.get_command(context, name)
        if hasattr(command, "commands"):
            yield from _names(command, f"{before}{name} ")


def help_text(*command: str) -> str:
    """Return what ``retrotool COMMAND --help`` prints in a terminal of the fixed width."""
    environment = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "NO_COLOR": "1"}
    result = CliRunner().invoke(
        app, [*command, "--help"], prog_name="retrotool", env=environment, terminal_width=WIDTH, color=False
    )
    if result.exit_code:
        raise RuntimeError(f"retrotool {' '.join(command)} --help failed: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


def page() -> str:
    """Return the page as it should be."""
    sections = [HEAD, f"## retrotool\n\n```text\n{help_text()}\n```\n"]
    sections += [f"## retrotool {name}\n\n```text\n{help_text(*name.split())}\n```\n" for name in command_names()]
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    sys.stdout.write(f"{PAGE} written\n")
