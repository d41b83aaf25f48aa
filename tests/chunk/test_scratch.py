"""Where scratch files are put: a folder that is named, else one of the environment, else the system's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from conftest import Cli, make_rows, write_jsonl

from retrotool.errors import UsageError
from retrotool.scratch import VARIABLE, scratch_file, scratch_folder, use_scratch


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # what a test sets is undone


def test_what_is_named_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scratch_folder() == tempfile.gettempdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one"))
    use_scratch(None)
    assert scratch_folder() == str(tmp_path / "one")
    use_scratch(tmp_path / "two")
    assert scratch_folder() == str(tmp_path / "two")
    with scratch_file() as file:
        assert Path(f"/proc/self/fd/{file.fileno()}").readlink().parent in (tmp_path / "two", tmp_path)
        assert list((tmp_path / "two").iterdir()) == [], "a kill leaves nothing"


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("no", "is not a writable folder"), ("file", "is not a writable folder"), ("store/x", "store")],
)
def test_a_folder_that_can_not_be_used_is_refused(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "store" / "x").mkdir(parents=True)
    (tmp_path / "store" / "store.json").write_text("{}")
    with pytest.raises(UsageError, match=reason):
        use_scratch(tmp_path / folder)


def test_chunk_puts_standard_input_there(tmp_path: Path, tiny_encoder: Path, cli: Cli) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", make_rows(5)).read_text()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o500)
    arguments = ["chunk", tmp_path / "store", "-", "--tokenizer", tiny_encoder, "--json"]
    ended = cli(*arguments, "--scratch", tmp_path / "gone", data=text.encode())
    assert ended.returncode == 2
    assert f"--scratch {tmp_path / 'gone'} is not a writable folder" in ended.stderr
    assert not (tmp_path / "store").exists()
    (tmp_path / "scratch").chmod(0o700)
    ended = cli(*arguments, "--scratch", tmp_path / "scratch", data=text.encode())
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "scratch").iterdir()) == []
