"""docs/cli.md is what docs/make_cli.py writes."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(make_cli: ModuleType) -> None:
    shown = make_cli.PAGE.read_text("utf-8")
    assert shown == make_cli.page(), "run: make docs"


def test_page_does_not_depend_on_the_terminal(make_cli: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_cli.page()
    for name, value in {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert make_cli.page() == before


def test_every_command_is_there(make_cli: ModuleType) -> None:
    known = {"chunk", "embed", "index", "neighbours", "purge", "search", "info", "verify", "plan"}
    assert known <= set(make_cli.command_names())
    headings = re.findall(r"^## retrotool (.+)$", make_cli.page(), re.MULTILINE)
    assert headings == make_cli.command_names()
