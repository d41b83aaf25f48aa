"""docs/reliability.md: every promise of the README is there, with tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(page: Path, section: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = page.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_promise_of_the_readme_has_its_tests() -> None:
    promised = [row[0] for row in rows(ROOT / "README.md", "What is promised")]
    tested = {
        row[0]: _TEST.findall(row[1]) for row in rows(ROOT / "docs" / "reliability.md", "Promises and their tests")
    }
    assert list(tested) == promised
    assert all(tested.values())


def test_every_test_that_the_documentation_names_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for file, name in _TEST.findall(page.read_text()):
            assert name in functions(ROOT / file), f"{page}: {file}::{name}"
