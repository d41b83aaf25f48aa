"""What the documentation points at exists: files, headings, commands, options, modules, names that are imported."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pages import PAGES, ROOT, blocks

from retrotool.app import app

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_MODULE = re.compile(r"retrotool(?:\.[a-z_]+)*")


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = (heading.lower().replace("`", "") for heading in _HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def each(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link} names no heading of {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _LINK.findall(prose(ROOT / "README.md"))}
    assert set(PAGES) - linked - {ROOT / "README.md"} == set()


def command_lines(page: Path) -> Iterator[str]:
    """All that is shown as a retrotool command: in blocks, and in prose as code."""
    for block in blocks(page):
        if block.language not in ("console", "sh", "text", "yaml"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            parts = re.split(r"^\$ |^entrypoint: | (?:&&|\||&|;) |; do | -- (?=retrotool )", line.strip())
            yield from (part for part in parts if part.startswith("retrotool "))
    for code in _CODE.findall(prose(page)):
        if code.startswith("retrotool "):
            yield code


def options_of(command: Any) -> dict[str, bool]:
    """The options of a command, and whether each takes a value."""
    found = {"--help": False, "-h": False}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found.update(dict.fromkeys((*parameter.opts, *parameter.secondary_opts), not parameter.is_flag))
    return found


def with_members(command: Any) -> list[Any]:
    """A command, and all commands that are in it if it is a group."""
    names = command.list_commands(None) if hasattr(command, "commands") else []
    members = [command.get_command(None, name) for name in names]
    return [command, *(one for member in members for one in with_members(member))]


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_commands_and_options_exist(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    for line in command_lines(page):
        words = shlex.split(line)[1:]
        if words[0].startswith("-") or words[0].startswith("["):
            assert words[0] in (*options_of(root), "[OPTIONS]"), line
            continue
        command = root
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            command = command.get_command(None, words.pop(0))
            assert command is not None, f"{page}: {line}"
        known = options_of(command)
        for word, after in itertools.pairwise([*words, ""]):
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in known, f"{page}: {line}: no option {word}"
                assert not known[word] or after, f"{page}: {line}: {word} wants a value"


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_options_named_in_prose_exist(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    known = set().union(*map(options_of, with_members(root)))
    # The changelog names what was removed, too.
    text = re.sub(r"^### Removed.*?(?=^###? )", "", prose(page), flags=re.MULTILINE | re.DOTALL)
    for code in _CODE.findall(text):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            if not code.startswith("pip "):
                assert option in known, f"{page}: {code}"


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = name.rpartition(".")
    return bool(module) and hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_modules_exist(page: Path) -> None:
    for code in _CODE.findall(prose(page)):
        # The format's keys of Parquet metadata look like modules.
        if _MODULE.fullmatch(code) and "." in code and page.name != "format.md":
            assert is_there(code), f"{page}: {code}"
        if code.startswith(("retrotool/", "tests/", "docs/", "examples/")) and " " not in code:
            assert (ROOT / code.partition("::")[0]).exists(), f"{page}: {code}"


def test_the_architecture_shows_the_layers_of_the_import_contract() -> None:
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [tuple(re.split(r" [|:] ", layer)) for layer in contract["layers"]]
    rows = re.findall(r"^\| (`retrotool\.[^|]+) \|", prose(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    assert [tuple(_CODE.findall(row)) for row in rows[: len(layers)]] == layers


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("python", "py"):
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retrotool"):
                for alias in node.names:
                    assert is_there(f"{node.module}.{alias.name}"), f"{page}: {node.module}.{alias.name}"


def test_nobody_is_reported_to_install_the_package_that_has_the_name_on_pypi() -> None:
    reported = re.compile(r"(?:pip3?|uv|pipx|pipenv|poetry) (?:pip )?(?:install|add) [^\n]*\bretrotool\b")
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", *PAGES]
    texts += [path for folder in ("retrotool", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in texts if reported.search(path.read_text("utf-8"))] == []


def test_yaml_can_be_read() -> None:
    found = [yaml.safe_load(block.text) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert found
    assert all(isinstance(one, dict) for one in found)


def test_blocks_are_of_known_languages() -> None:
    known = {"console", "python", "text", "sh", "py", "json", "yaml", "toml", ""}
    assert {block.language for page in PAGES for block in blocks(page)} <= known
