"""The runner itself: what passes as the same output, and that a wrong one is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import run_page, same_lines


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("16 chunks (commit 3).", "16 chunks (commit 4)."),
        ("purge p1d02527a1", "purge pffffffff0"),
        ("distance 1.2842", "distance 1.2801"),
        ("uuid 0f1ce4b2-c96e-44f8-8f13-330757b1932a", "uuid aaaaaaaa-c96e-44f8-8f13-330757b19320"),
        ("first\n...\nlast", "first\none\ntwo\nlast"),
    ],
)
def test_outputs_that_are_the_same(shown: str, printed: str) -> None:
    assert same_lines(shown.splitlines(), printed.splitlines())


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("16 chunks", "17 chunks"),
        ("chunk 4294967296", "chunk 4294967297"),
        ("distance 1.2842", "distance 1.9"),
        ("one", "one\ntwo"),
        ("one\ntwo", "one"),
        ("first\n...\nlast", "first\nlast\nmore"),
        ("", "warning"),
    ],
)
def test_outputs_that_are_not(shown: str, printed: str) -> None:
    assert not same_lines(shown.splitlines(), printed.splitlines())


def page(text: str) -> Path:
    path = Path("page.md").resolve()
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ echo 1\n2\n```\n",
        "```console\n$ false\n```\n",
        "```console\n$ exit 3\n$ echo $?\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```console\n$ retrotool info nothing\n```\n",
    ],
)
def test_a_wrong_page_is_noticed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pages.ROOT", tmp_path)
    monkeypatch.delenv("RETROTOOL_UPDATE_SNAPSHOTS", raising=False)
    with pytest.raises(AssertionError):
        run_page(page(text))


def test_outputs_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pages.ROOT", tmp_path)
    monkeypatch.setenv("RETROTOOL_UPDATE_SNAPSHOTS", "1")
    path = page("```console\n$ echo 1\n$ pwd\nold\n```\n\n```python\nprint(2)\n```\n\n```text\n```\n")
    run_page(path)
    assert (
        path.read_text()
        == "```console\n$ echo 1\n1\n$ pwd\n/home/me\n```\n\n```python\nprint(2)\n```\n\n```text\n2\n```\n"
    )
    monkeypatch.delenv("RETROTOOL_UPDATE_SNAPSHOTS")
    run_page(path)
