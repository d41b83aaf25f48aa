"""Plain English: docstrings of functions begin with an imperative verb, and words of a private dialect are not used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "retrotool"
PROSE = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    *sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.rglob("*.html")), *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py")),
]  # fmt: skip
WORDS = re.compile(
    r"\b(told|tells|living|set[ -]aside|held against|holds against|taken back|takes back|anew|needles?|victims?"
    r"|whoever|meanwhile|by right)\b",
    re.IGNORECASE,
)
QUOTED = re.compile(r"“[^”]*”|^> .*$|`living`|`set_aside`|`needles`", re.MULTILINE)
"""Quotations, and the names that the changelog gives as before."""
VERBS = set(
    """
    accept acquire add adjust advance align allocate allow answer append apply arrange ask assemble assert
    assign attach await begin bind block bound break bring build bundle cache calculate call cancel cast change check
    choose claim clamp classify clean clear close coalesce code collect combine commit compact compare compile
    complete compress compute concatenate confirm connect consume continue convert copy count create cut decide
    declare decode decompress deduplicate define delete derive describe detect determine dispatch display
    distribute divide do download drain draw drop dump duplicate embed emit enable encode end enforce enqueue
    ensure enter enumerate erase escape estimate evaluate examine exclude execute exit expand explain export
    expose extend extract fail fall fetch fill filter find finish fit fix flag flatten flush fold forget format
    forward free freeze gather generate get give group guard guess handle hash hide hold identify ignore import
    include increment index infer initialise initialize insert inspect install interpolate interpret interrupt
    invert invoke iterate join keep label launch leave limit link list load locate lock log look lower make map
    mark mask match materialise materialize measure merge mock modify monitor move multiply name normalise
    normalize note notify number obtain offer omit open order override pack pad parse partition pass pause peek
    perform permute pick pin place plan plot poll pool pop populate post prefetch prepare print probe process
    produce project protect prove provide prune publish pull prefix purge push put query queue quit quote raise
    randomize rank re-rank reach read rebuild receive recognise recompute reconstruct record recover redirect
    reduce refer refill refine refresh refuse register reject release reload remember remove rename render renew
    reopen repair repeat replace replay report represent request require reserve reset reshape resolve restart
    restrict resume retrieve retry return reverse rewrite roll rotate round route run sample save scale scan
    schedule score scroll search see seek select send separate serialise serialize serve set shard share shift
    show shrink shuffle shut sign simulate size skip sleep slice sort split stack stage start state stop store
    stream strip submit subtract suggest sum supply support suspend swap switch sync take terminate test
    tokenise tokenize trace track train transfer transform translate traverse treat trim truncate try turn undo
    unescape unload unlock unpack untie update upload use validate verify visit wait walk warn weigh widen wrap
    write yield zero
    """.split()
)  # fmt: skip


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Line and docstring of each function that has one, and is no property."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            decorators = {getattr(one, "id", getattr(one, "attr", "")) for one in node.decorator_list}
            if not decorators & {"property", "cached_property"}:
                yield node.lineno, text


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_of_functions_begin_with_a_verb(path: Path) -> None:
    found = [(line, text.split()[0]) for line, text in functions(path) if first_word(text) not in VERBS]
    assert found == []


def first_word(text: str) -> str:
    return re.split(r"[^A-Za-z-]", text)[0].lower()


def test_words_of_a_private_dialect_are_not_used() -> None:
    found = []
    for path in [*PROSE, *CODE]:
        if path == Path(__file__):
            continue
        text = QUOTED.sub("", path.read_text())
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in WORDS.finditer(text)]
    assert found == []
