"""Names are a newcomer's map: one name, one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "retrotool"
SHARED = {"command", "run", "stage", "worker", "__init__"}
"""What each capability has one of."""


def names(kind: str) -> Iterator[tuple[str, str]]:
    """Public names of a kind, each with the module that it is in."""
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE))
        if kind == "module":
            yield path.stem, module
            continue
        of = ast.ClassDef if kind == "class" else ast.FunctionDef
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, of) and not node.name.startswith("_"):
                yield node.name, module


@pytest.mark.parametrize("kind", ["module", "class", "function"])
def test_a_name_stands_for_one_thing(kind: str) -> None:
    found = defaultdict(list)
    for name, module in names(kind):
        found[name].append(module)
    assert found
    assert {name: where for name, where in found.items() if len(where) > 1 and name not in SHARED} == {}
