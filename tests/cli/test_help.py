"""Help that needs no second reading: few options, nothing cut at 80 columns, plain metavars; values are completed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from retrotool import api
from retrotool.app import app
from retrotool.cli.options import WORK

COMMANDS = list(typer.main.get_command(app).list_commands(None))  # type: ignore[attr-defined, arg-type]
MOST_OPTIONS = 20


def help_of(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0
    return shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_few_options(command: str) -> None:
    group = typer.main.get_command(app)
    options = [
        one.opts[0]
        for one in group.get_command(None, command).params  # type: ignore[attr-defined]
        if one.param_type_name == "option" and getattr(one, "rich_help_panel", None) != WORK
    ]
    assert 0 < len({*options} - {"--json", "--help"}) <= MOST_OPTIONS or {*options} == {"--json"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_cuts_nothing(command: str) -> None:
    shown, _, examples = help_of(command).partition("Examples:")
    assert all(len(line) <= 80 for line in shown.splitlines()), [line for line in shown.splitlines() if len(line) > 80]
    assert examples
    assert not re.search(r"[{}]|<\w+>", shown), "metavars are plain"


def test_the_list_of_commands_has_whole_sentences() -> None:
    listed = help_of().partition("Commands:")[2]
    assert "..." not in listed and "…" not in listed
    entries = re.split(r"\n  (?=\w)", "\n" + listed.strip("\n"))
    assert [entry.split()[0] for entry in entries if entry.split()] == COMMANDS
    assert all(entry.rstrip().endswith(".") for entry in entries if entry.split())


def completions(words: str) -> list[str]:
    environment = {
        "_RETROTOOL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    return CliRunner().invoke(app, [], env=environment, prog_name="retrotool").stdout.split()


@pytest.mark.on_disk
def test_values_are_completed(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purge = api.purge(store_copy, api.Selectors(document="doc-3"), reason="test").purge
    monkeypatch.chdir(store_copy.parent)
    name = store_copy.name
    assert completions(f"retrotool erase {name} ") == ["last", purge]
    assert completions(f"retrotool receipt {name} {purge[:3]}") == [purge]
    assert completions(f"retrotool search {name} --index ") == ["main"]
    assert completions(f"retrotool affected {name} --table m") == ["main"]
    assert completions(f"retrotool index {name} --encoder ") == ["tiny"]
    assert name in completions(f"retrotool info {name[:2]}")
    assert completions("retrotool erase nowhere ") == []
