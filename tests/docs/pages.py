"""Run the examples of a Markdown page, in order, and compare what they print with what the page shows.

* In a ``console`` block, a line ``$ COMMAND`` is run (``> `` goes on with it), and the lines below it are its output.
  A command that fails must be followed by ``$ echo $?``.
* A ``python`` block is run in the page's one namespace; a ``text`` block right below it is what it prints. If its first
  line is a comment that names a file, such as ``# job.py``, the block is written to that file instead, as is a ``toml``
  block.
* Other blocks are not run.

Pages show the current directory as ``/home/me``. Outputs are compared loosely: hexadecimal digits (8 or more) and the
numbers of commits may be others, numbers with a decimal point may differ by 10 % or 0.05, a line ``...`` stands for any
lines. With RETROTOOL_UPDATE_SNAPSHOTS=1 in the environment (``make update-snapshots``), outputs that differ are written
into the page.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import select
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from forked import Forked
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)$")
_FILE = re.compile(r"^# ([\w-]+\.\w+)$")
_LOOSE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8,}|\d+\.\d+|(?<=commit )\d+)")
_CRASHED = "Traceback (most recent call last)"
_SHELL = re.compile(r"[|<>;&$`]")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``first`` is the line number, from 0, of the line after the opening fence."""

    language: str
    lines: list[str]
    first: int

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Step:
    """Something to run, and the output that lines [start, end) of the page show."""

    kind: str
    source: str
    start: int
    end: int


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    opened: Block | None = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened = Block(fence[1], [], number + 1)
        elif opened is not None and line == "```":
            found.append(opened)
            opened = None
        elif opened is not None:
            opened.lines.append(line)
    assert opened is None, f"{page}: a block is not closed"
    return found


def commands(block: Block) -> list[Step]:
    """The commands of a console block."""
    starts = [i for i, line in enumerate(block.lines) if line.startswith("$ ")]
    assert starts[:1] == [0], f"line {block.first}: a console block begins with a command"
    found = []
    for start, end in zip(starts, [*starts[1:], len(block.lines)], strict=True):
        source = [block.lines[start][2:]]
        output = start + 1
        while output < end and block.lines[output].startswith("> "):
            source.append(block.lines[output][2:])
            output += 1
        found.append(Step("shell", "\n".join(source), block.first + output, block.first + end))
    return found


def steps(page: Path) -> list[Step]:
    found: list[Step] = []
    all_blocks = blocks(page)
    for block, after in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if block.language == "console":
            found += commands(block)
        elif block.language in ("python", "toml"):
            end = block.first + len(block.lines)
            shown = after is not None and after.language == "text" and after.first <= end + 3
            start, stop = (after.first, after.first + len(after.lines)) if shown and after else (end, end)
            kind = "file" if block.lines and _FILE.match(block.lines[0]) else "python"
            found.append(Step(kind, "\n" * block.first + block.text, start, stop))
    return found


def run_page(page: Path) -> None:
    """Run a page in the current directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("COLUMNS", "100")
        _run_page(page)


def _run_page(page: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    lines = page.read_text("utf-8").splitlines()
    records: list[tuple[Step, list[str]]] = []
    problems: list[str] = []
    code = 0
    for step in steps(page):
        where = f"{page.relative_to(ROOT)}, line {step.start}"
        if code and step.source != "echo $?":
            raise AssertionError(f"{where}: the command before failed with {code}; show it with: $ echo $?")
        if step.kind == "shell":
            output, code = (f"{code}\n", 0) if step.source == "echo $?" else run_command(step.source)
        else:
            output = run_python(page, step, names)
        # Not even what is being recorded may show one: commands in the background report no exit code.
        assert _CRASHED not in output, f"{where}: {output}"
        expected, actual = lines[step.start : step.end], tidy(output)
        if not same_lines(expected, actual):
            records.append((step, actual))
            problems.append("\n".join([f"{where}: {step.source.strip()}", "shown:", *expected, "printed:", *actual]))
    if os.environ.get("RETROTOOL_UPDATE_SNAPSHOTS"):
        for step, actual in reversed(records):
            lines[step.start : step.end] = actual
        page.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        assert not problems, "\n\n" + "\n\n".join(problems)
    assert not code, f"{page}: the last command failed with {code}"


def run_python(page: Path, step: Step, names: dict[str, Any]) -> str:
    if step.kind == "file":
        text = step.source.lstrip("\n") + "\n"
        name = _FILE.match(text.splitlines()[0])
        assert name is not None
        Path(name[1]).write_text(text, "utf-8")
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(step.source, str(page), "exec"), names)
    return printed.getvalue()


def run_command(source: str) -> tuple[str, int]:
    """Output and exit code of a command.

    Every ``retrotool`` in it runs in this process, which has torch loaded, but those that run beside one another, and
    scripts, which run in forked ones.
    """
    if source.startswith("retrotool ") and not _SHELL.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", source)):
        result = run_retrotool([path for word in shlex.split(source)[1:] for path in _expand(word)])
        return result.output, result.exit_code
    running: dict[Path, Forked] = {}
    with tempfile.TemporaryDirectory() as calls, tempfile.TemporaryFile() as printed:
        os.mkfifo(f"{calls}/made")
        made = os.open(f"{calls}/made", os.O_RDWR | os.O_NONBLOCK)
        environment = {**os.environ, "CALLS": calls}
        command = ["bash", "-c", _CALL + source]
        with subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment) as process:
            while process.poll() is None:
                if select.select([made], [], [], 0.01)[0]:
                    for call in map(Path, os.read(made, 4096).decode().split()):
                        folder, program, *arguments = (call / "words").read_text().split("\0")[:-1]
                        if program == "retrotool" and " & " not in source:
                            with contextlib.chdir(folder):
                                result = run_retrotool(arguments)
                            answer(call, result.stdout, result.stderr, result.exit_code)
                        else:
                            before = functools.partial(os.chdir, folder)
                            running[call] = Forked(arguments, program=program, before=before)
                for call, forked in list(running.items()):
                    if forked.poll() is not None:
                        del running[call]
                        answer(call, *forked.communicate(), forked.returncode)
        os.close(made)
        printed.seek(0)
        return printed.read().decode(), process.returncode


_CALL = """call() {
  local call code
  call=$(mktemp -d "$CALLS/XXXXXX") && mkfifo "$call/code"
  printf '%s\\0' "$PWD" "$@" > "$call/words"
  echo "$call" > "$CALLS/made"
  read -r code < "$call/code"
  cat "$call/out"
  cat "$call/err" >&2
  return "$code"
}
retrotool() { call retrotool "$@"; }
python() { call "$@"; }
"""
"""``retrotool`` and ``python SCRIPT`` in a shell, which has this process do it and waits for the code."""


def answer(call: Path, stdout: str, stderr: str, code: int | None) -> None:
    """Give a shell what it has called for."""
    (call / "out").write_text(stdout)
    (call / "err").write_text(stderr)
    (call / "code").write_text(f"{code}\n")


def run_retrotool(arguments: list[str]) -> Result:
    from retrotool.app import app

    result = CliRunner().invoke(app, arguments, prog_name="retrotool")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _expand(argument: str) -> list[str]:
    """What a shell makes of a pattern of file names."""
    if "*" not in argument or " " in argument or argument.startswith("-"):
        return [argument]
    return sorted(map(str, Path().glob(argument))) or [argument]


def tidy(output: str) -> list[str]:
    return [line.rstrip() for line in output.replace(str(Path.cwd()), "/home/me").rstrip("\n").splitlines()]


def same_lines(expected: list[str], actual: list[str]) -> bool:
    """Whether an output is the one shown, loosely."""
    if not expected:
        return not actual
    if expected[0] == "...":
        return any(same_lines(expected[1:], actual[i:]) for i in range(len(actual) + 1))
    return bool(actual) and same_line(expected[0].rstrip(), actual[0]) and same_lines(expected[1:], actual[1:])


def same_line(expected: str, actual: str) -> bool:
    one, other = _LOOSE.split(expected), _LOOSE.split(actual)
    # Every second piece is a loose one.
    if len(one) != len(other) or one[::2] != other[::2]:
        return False
    return all(
        before.endswith(("commit ", "p"))
        or _close(a, b)  # a purge is p and 8 hexadecimal digits, maybe without a letter
        for before, a, b in zip(one[::2], one[1::2], other[1::2], strict=False)
    )


def _close(one: str, other: str) -> bool:
    if "." in one and "." in other:
        return abs(float(one) - float(other)) <= max(0.05, 0.1 * abs(float(one)))
    # Hexadecimal names are random; numbers, which have no letter, are not.
    return one == other or not (one.isdigit() or "." in one + other)
