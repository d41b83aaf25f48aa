"""The site's navigation has every page, and docs/settings.md every variable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
import yaml
from pages import ROOT
from test_links import with_members

from retrotool.app import app

DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def entries(navigation: Any) -> Iterator[str]:
    """Yield the pages of a navigation: a path, or lists of {title: path or list}."""
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, dict):
        for below in navigation.values():
            yield from entries(below)
    else:
        for below in navigation:
            yield from entries(below)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(entries(SITE["nav"])) == pages


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    assert SITE["theme"]["font"] is False
    assert SITE["site_dir"] == "build/site"
    assert not {"extra_javascript", "extra_css"} & set(SITE)


def documented_variables() -> dict[str, tuple[str, set[str]]]:
    """Return the option and the commands of each variable in the first table of docs/settings.md."""
    section = (DOCS / "settings.md").read_text("utf-8").split("\n## ")[1]
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)` )?\| ([^|]+) \|", section, re.MULTILINE)
    return {name: (option, set(re.findall(r"`(\w+)`", commands))) for name, option, commands in rows}


def test_settings_lists_the_variables_of_options() -> None:
    documented = documented_variables()
    root: Any = typer.main.get_command(app)
    found: dict[str, set[str]] = {}
    for command in with_members(root):
        for parameter in command.params:
            if parameter.envvar and parameter.envvar.startswith("RETROTOOL_"):
                assert documented[parameter.envvar][0] in parameter.opts
                found.setdefault(parameter.envvar, set()).add(command.name)
    for variable, commands in found.items():
        assert documented[variable][1] == commands, variable


def test_settings_lists_every_variable_that_is_read() -> None:
    page = (DOCS / "settings.md").read_text("utf-8")
    read = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)["'](\w+)""")
    for path in (ROOT / "retrotool").rglob("*.py"):
        # A shell sets these when it completes a command.
        for variable in set(read.findall(path.read_text("utf-8"))) - {"COMP_WORDS", "_TYPER_COMPLETE_ARGS"}:
            assert f"`{variable}`" in page, f"{path}: {variable}"
