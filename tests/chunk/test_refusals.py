"""What ``chunk`` refuses, in one message and without a trace in the store; and inputs that change under it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from chunk_helpers import documents, quarantine, run_chunk, verified, write_rows
from stored import contents_of, copy_store
from tokenizers import Tokenizer, models

from retrotool.chunk import chunk_plan
from retrotool.chunk import run as chunk_run

ROWS = [{"id": f"row-{i}", "text": f"Text of row {i}.", "body": f"Body {i}."} for i in range(4)]
NEW = [{"id": "new", "text": "Something new."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store of ROWS, new.jsonl for it, and things that are neither."""
    assert run_chunk(tmp_path / "store", write_rows(tmp_path / "rows.jsonl", ROWS)).exit_code == 0
    write_rows(tmp_path / "new.jsonl", NEW)
    (tmp_path / "file").write_text("not a store")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "no-tokenizer").mkdir()
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "text.json").write_text("no JSON")
    Tokenizer(models.BPE()).save(str(tmp_path / "untrained.json"))
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "other.json"))
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | contents_of(folder / "store")


REFUSALS = {
    "missing file": ("store gone.jsonl", "gone.jsonl: no such file or folder"),
    "one of many missing": ("store new.jsonl gone.jsonl", "gone.jsonl: no such file or folder"),
    "unknown format": ("store image.png", "image.png has an unknown format"),
    "folder without input": ("store no-tokenizer", "no-tokenizer has no file of a known format"),
    "no tokenizer of a name": ("fresh new.jsonl --tokenizer nobody/nothing", "'nobody/nothing' is not a local path"),
    "no name of a tokenizer": ("fresh new.jsonl --tokenizer no:name", "'no:name' is not a local path"),
    "no file of a tokenizer": ("fresh new.jsonl --tokenizer ./gone", "tokenizer './gone': no such file or directory"),
    "no tokenizer in a directory": ("fresh new.jsonl --tokenizer no-tokenizer", "has no tokenizer.json"),
    "no tokenizer in an object": ("fresh new.jsonl --tokenizer object.json", "'object.json' can't be loaded"),
    "no tokenizer in a text": ("fresh new.jsonl --tokenizer text.json", "text.json has an unknown format"),
    "no token in a tokenizer": ("fresh new.jsonl --tokenizer untrained.json", "'untrained.json' can't be loaded"),
    "another tokenizer": ("store new.jsonl --tokenizer other.json", "was made with the tokenizer 'bytes-32k'"),
    "another chunk length": ("store new.jsonl --chunk-length 32", "store has chunks of 64 tokens, not 32"),
    "no chunk length": ("fresh new.jsonl --chunk-length 0", "--chunk-length 0 is not between 1 and 4096"),
    "no part size": ("store new.jsonl --part-size 0", "--part-size 0 is not between 1 and 2^31 - 1"),
    "every file excluded": ("store new.jsonl --exclude *.jsonl", "--exclude matches every input"),
    "an empty pattern": ("store new.jsonl --exclude .", "--exclude: a pattern is empty"),
    "tokens and a key": ("store new.jsonl --tokens-field a --key-field b --value-field c", "--tokens-field can't be"),
    "a column twice": ("store new.jsonl --keep key", "--keep key: the store has its own column of this name"),
    "a store that is a file": ("file new.jsonl", "file is a file; a store is a directory"),
    "a directory of others": ("foreign new.jsonl", "foreign is not empty and not a store"),
}  # fmt: skip


ON_DISK = {"a directory of others"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.on_disk) if name in ON_DISK else name for name in REFUSALS]
)
def test_what_contradicts_itself_is_refused_and_changes_nothing(name, folder, monkeypatch):
    arguments, message = REFUSALS[name]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    result = run_chunk(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert snapshot(folder) == before


def test_json_tells_an_error_as_an_object(folder):
    result = run_chunk(folder / "store", folder / "gone.jsonl", "--json")
    error = json.loads(result.stdout)
    assert result.exit_code == error["exit_code"] == 2
    assert error["error"] == f"{folder}/gone.jsonl: no such file or folder"
    assert error["advice"]


@pytest.mark.parametrize(("there", "message"), [(True, "its name is not UTF-8"), (False, "no such file or folder")])
def test_a_name_that_is_not_utf8_is_refused(there, message, folder):
    path = os.fsencode(folder) + b"/caf\xe9.jsonl"
    if there:
        shutil.copy(folder / "new.jsonl", path)
    result = run_chunk(folder / "store", os.fsdecode(path), "--json")
    assert result.exit_code == 2
    assert message in json.loads(result.stdout)["error"]


@pytest.mark.parametrize("name", ["new.jsonl", "corpus/locked"])
def test_what_may_not_be_read_is_refused_by_name(name, folder):
    """Run without the rights of root, which may read everything."""
    drop = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can read every file, and there is no setpriv to take that from it")
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    (folder / "corpus" / "locked").mkdir(parents=True)
    write_rows(folder / "corpus" / "open.jsonl", NEW)
    write_rows(folder / "corpus" / "locked" / "more.jsonl", NEW)
    (folder / name).chmod(0)
    before = verified(folder / "store")
    command = [*drop, sys.executable, "-m", "retrotool", "chunk", folder / "store", folder / name.partition("/")[0]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (folder / name).chmod(0o700)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {folder / name}")
    assert "Permission denied" in result.stderr
    assert verified(folder / "store") == before


def test_an_input_that_stops_a_folder_can_be_excluded_as_the_error_says(folder):
    store, corpus = folder / "store", folder / "corpus"
    corpus.mkdir()
    for name, row in (("a.jsonl", NEW[0]), ("b.jsonl", {"id": 1, "words": "Other."}), ("c[1].jsonl", {"title": "x"})):
        write_rows(corpus / name, [row])
    (corpus / "page.html").write_text("<p>A page of text.</p>")
    before = snapshot(folder)
    given: list[str] = []
    with mock.patch.dict(sys.modules, {"fastwarc.warc": None}):
        for _ in range(3):
            refused = run_chunk(store, corpus, *given)
            assert (refused.exit_code, snapshot(folder)) == (2, before)
            assert "error: " in refused.stderr
            (pattern,) = re.findall(r"with --exclude (.*)\. Nothing was changed\.$", refused.stderr, re.MULTILINE)
            given += ["--exclude", *shlex.split(pattern)]
        assert given[1::2] == ["*.html", "corpus/b.jsonl", "corpus/c[[]1].jsonl"]
        added = run_chunk(store, corpus, *given)
    assert added.exit_code == 0
    assert f"3 paths excluded, such as {corpus}/b.jsonl.\n" in added.stderr
    assert [row["id"] for row in documents(store)] == [row["id"] for row in (*ROWS, *NEW)]


CHANGES = {
    "longer": (lambda path: path.write_text(path.read_text() * 2), "it had 40 bytes when it was planned, now 80"),
    "empty": (lambda path: path.write_text(""), "it had 40 bytes when it was planned, now 0"),
    "gone": (Path.unlink, "No such file or directory"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_between_plan_and_work_waits_until_it_is_back_or_given_up(how, folder, monkeypatch):
    change, reason = CHANGES[how]
    store, path = folder / "store", folder / "new.jsonl"
    before, data = verified(store).content, path.read_bytes()
    commit_plan = chunk_plan.commit_plan

    def plan_then_change(*arguments):
        made = commit_plan(*arguments)
        change(path)
        return made

    monkeypatch.setattr(chunk_plan, "commit_plan", plan_then_change)
    result = run_chunk(store, path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {path}: {reason}\n")
    assert f"leave it out with --exclude {path}." in result.stderr
    assert verified(store).content == before
    monkeypatch.undo()
    waiting = copy_store(store, folder / "waiting")

    given_up = run_chunk(store, folder / "rows.jsonl", "--exclude", "new.*")
    assert given_up.exit_code == 3
    assert given_up.stderr == f"Resuming interrupted work: {path}.\n"
    assert quarantine(store) == [(str(path), 0, f"given up: {reason}")]
    assert f"given up: {reason}  first: {path}\n" in given_up.stdout
    assert verified(store).content == before

    path.write_bytes(data)
    again = run_chunk(same := copy_store(waiting, folder / "same"), path)
    assert again.stderr == f"Next: retrotool embed {same}\n", "no word of what is resumed, as it is asked for"
    finished = run_chunk(waiting, folder / "rows.jsonl")
    assert finished.exit_code == 0
    assert finished.stderr == (
        f"Resuming interrupted work: {path}. To leave an input out, add --exclude.\nNext: retrotool embed {waiting}\n"
    )
    assert run_chunk(store, path).exit_code == 0  # what was given up can be given again
    assert verified(waiting).content == verified(store).content != before


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_duplicates_in_a_file_that_changes_before_its_plan_is_finished_are_still_counted(change, folder, monkeypatch):
    path = write_rows(folder / "twice.jsonl", [*NEW, *NEW, *ROWS])

    def finish_later(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(chunk_run, "finish_plans", finish_later)
    assert run_chunk(folder / "store", path).exit_code == 130
    monkeypatch.undo()
    if change == "gone":
        path.unlink()
    else:
        path.write_text("")
    assert run_chunk(folder / "store", folder / "rows.jsonl").exit_code == 0
    assert verified(folder / "store").documents == 5
    assert [(name, reason) for name, _, reason in quarantine(folder / "store")] == [
        (str(path), "duplicate document id")
    ]  # once: the other repeat what the store had, and are unchanged


def test_a_file_is_read_again_for_another_text_field(folder):
    path = write_rows(folder / "body.jsonl", [{"id": "b", "body": "Only a body."}])
    assert run_chunk(folder / "store", path).exit_code == 2
    result = run_chunk(folder / "store", path, "--text-field", "body")
    assert (result.exit_code, result.stdout.split(",")[0]) == (0, "1 document")


def test_a_column_that_is_kept_twice_is_kept_once(folder):
    assert run_chunk(folder / "store", folder / "new.jsonl", "--keep", "body", "--keep", "body").exit_code == 0
    assert documents(folder / "store")[-1]["body"] is None


def test_token_ids_need_their_tokenizer(folder):
    np.save(folder / "ids.npy", np.array([5, 6, 7, 102] * 3, np.uint16))
    result = run_chunk(folder / "new", folder / "ids.npy", "--end-of-document", 102)
    assert (result.exit_code, (folder / "new").exists()) == (2, False)
    assert "Name it: --tokenizer TOKENIZER" in result.stderr
    assert (
        run_chunk(folder / "new", folder / "ids.npy", "--end-of-document", 102, "--tokenizer", "minilm").exit_code == 0
    )
