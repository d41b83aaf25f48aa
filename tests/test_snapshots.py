"""Snapshots: another text is noticed, an updated one is kept, and none is left of a test that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import snapshots as module
from snapshots import Snapshots, read_snapshots

TEXTS = ["one line\n", "no end", "", "two\n\n## lines~\n", "~\n", "  spaces \n"]


def test_texts_come_back_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPDATE", True)
    for number, text in enumerate(TEXTS):
        Snapshots(tmp_path / "test_it.py", f"test_{number}")(text)
    monkeypatch.setattr(module, "UPDATE", False)
    for number, text in enumerate(TEXTS):
        Snapshots(tmp_path / "test_it.py", f"test_{number}")(text)
        with pytest.raises(AssertionError, match="another text of"):
            Snapshots(tmp_path / "test_it.py", f"test_{number}")(f"{text}x")


def test_a_test_may_have_several_and_paths_are_written_as_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "UPDATE", True)
        some = Snapshots(tmp_path / "test_it.py", "test_a")
        some(f"in {tmp_path}/store\n", STORE=tmp_path / "store")
        some("second")
    some = Snapshots(tmp_path / "test_it.py", "test_a")
    some("in STORE\n")
    some("second")
    with pytest.raises(AssertionError, match=r"no text of test_a \(3\)"):
        some("third")


def test_every_text_is_of_a_test_that_is_there() -> None:
    for file in Path(__file__).parent.glob("**/snapshots/*.txt"):
        source = (file.parents[1] / f"{file.stem}.py").read_text("utf-8")
        for key in read_snapshots(file):
            assert f"def {key.split('[')[0].split(' ')[0]}(" in source, f"{file}: {key}"
