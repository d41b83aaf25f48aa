"""``receipt``: what it says, and that every read path is taken."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import Cli, Shared, make_rows, write_jsonl
from receipt_help import NAMES, REASON, TEXTS, build, purge, receipt, verified
from stored import copy_store, move_store, stored_file, stored_files

import retrotool
from retrotool import api
from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.receipt import read_paths, run
from retrotool.store import leases
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.paths import FileName
from retrotool.store.storage import Sink
from retrotool.store.store import Store
from retrotool.store.tombstones import Tombstones


@pytest.fixture(scope="module")
def secret_store(shared: Shared[Path], tiny_encoder: Path) -> Path:
    """Not to be changed: copy it."""
    return shared("secret", lambda folder: build(folder, tiny_encoder))


@pytest.fixture
def store(secret_store: Path, tmp_path: Path) -> Path:
    return copy_store(secret_store, tmp_path / "store")


def shown_texts(page: str) -> str:
    return re.sub(r"<[^>]*>", "", page.partition("<body>")[2])


def test_a_receipt_of_an_erased_purge(store: Path, tmp_path: Path, cli: Cli) -> None:
    name = purge(store, erase=True)
    found = verified(store, name)
    it = found.receipt
    assert it.ok, it.problems
    assert (it.state, it.reason, it.who, it.selector) == ("erased", REASON, "somebody", "document")
    assert {path.name for path in it.read_paths} == {
        "chunks", "documents", "embeddings tiny", "exact search tiny", "search main", "leakage main", "neighbours main",
        "dataset main", "export main", "inspect main",
    }  # fmt: skip
    assert all(path.rows and not path.found and not path.note for path in it.read_paths if path.name != "documents")
    assert {one.kind for one in it.files.kinds if one.files} == {
        "documents", "chunks", "embeddings", "index", "neighbours", "quarantine",
    }  # fmt: skip
    assert not any(one.left for one in it.files.kinds)
    assert (it.files.unknown, it.files.in_progress, it.unread, it.dependents) == ((), 0, [], ())
    assert [one.kind for one in it.commits] == ["purge", *["erase"] * (len(it.commits) - 1)]
    for one in it.commits:
        assert hashlib.sha256(stored_file(store, f"log/{one.number:08d}.json").read_bytes()).hexdigest() == one.sha256
    data = Path(found.json).read_bytes()
    assert json.loads(data) == json.loads(json.dumps(asdict(it)))
    newest = next(iter(api.log_entries(store, 1)))
    assert found.commit == newest.number == it.log_commit + 1
    assert hashlib.sha256(data).hexdigest() == found.sha256
    assert found.sha256 in stored_file(store, f"log/{found.commit:08d}.json").read_text()
    assert api.verify_log(store, it.log_head).kept == it.log_commit
    assert api.verify(store).ok
    printed = cli("receipt", store, name, "--out", tmp_path).stdout
    assert "OK. Nothing of it is left in the store.\n" in printed
    said = Path(found.page).read_text() + data.decode() + printed
    assert not any(words in said for words in (*NAMES, *(word for text in TEXTS for word in text.split())))


def test_the_page_of_a_receipt_can_be_printed_and_signed(store: Path) -> None:
    found = verified(store, purge(store, erase=True))
    page = Path(found.page).read_text()
    shown = shown_texts(page)
    assert "Purged and erased. Nothing of it is left in the store." in shown
    assert "<17>" not in page and "&lt;17&gt;" in page
    digests = [found.sha256, found.receipt.log_head, *(one.sha256 for one in found.receipt.commits)]
    for digest in digests:
        groups = "".join(f"<span>{digest[i : i + 8]}</span>" for i in range(0, 64, 8))
        assert f'<code class="digest">{groups}</code>' in page, "whole, in groups that are not broken"
    assert re.search(r"\.digest span \{ display: inline-block;", page)
    assert re.findall("<th>(name|role|date|signature)</th><td></td>", page) == ["name", "role", "date", "signature"]
    assert all(limit.split(".")[0] in shown for limit in run.LIMITS)


def test_a_receipt_of_what_is_not_erased_is_not_ok(store: Path, tmp_path: Path, cli: Cli) -> None:
    name = purge(store)
    found = verified(store, name)
    assert (found.receipt.state, found.receipt.ok, found.receipt.erased) == ("purged", False, "")
    (problem,) = found.receipt.problems
    assert problem == f"the purge is not erased: its data is left in {len(found.receipt.files.left)} files"
    assert "Purged, not erased. FAILED: 1 problem" in shown_texts(Path(found.page).read_text())
    ended = cli("receipt", store, "last", "--out", tmp_path)
    assert ended.returncode == 12
    assert f"FAILED: 1 problem\n  problem: {problem}\nTo erase it: retrotool erase {store} {name}\n" in ended.stdout
    ended = cli("receipt", store, name, "--out", tmp_path, "--json")
    assert (ended.returncode, json.loads(ended.stdout)["receipt"]["ok"]) == (12, False)
    api.erase(store, [name])
    assert cli("receipt", store, "last", "--out", tmp_path).returncode == 0


@pytest.mark.parametrize("command", [("receipt",), ("erase",), ("undo", "--reason", "r"), ("affected",)])
def test_the_last_purge_of_a_store_without_purges(store: Path, cli: Cli, command: tuple[str, ...]) -> None:
    name, *options = command
    ended = cli(name, store, "last", *options)
    assert (ended.returncode, ended.stderr) == (
        2, f"error: {store} has no last purge; nothing was purged from it\n"
        "To see how to purge: retrotool purge --help\n",
    )  # fmt: skip
    api.undo(store, purge(store), reason="a mistake")
    ended = cli(name, store, "last", *options)
    assert (ended.returncode, ended.stderr) == (
        2, f"error: {store} has no last purge; all of its purges were undone\nList them: retrotool purge {store}\n",
    )  # fmt: skip


BLINDED = {
    ("reader",): {"chunks", "documents", "embeddings tiny", "inspect main"},
    ("index.searching",): {"search main", "exact search tiny"},
    ("neighbours.table_reader",): {"neighbours main"},
    ("train.dataset",): {"dataset main"},
    ("export.run",): {"export main"},
    ("leakage.run",): {"leakage main"},
}
"""What returns purged chunks when modules ignore the tombstones."""


@pytest.mark.parametrize("modules", BLINDED)
def test_a_reader_that_ignores_tombstones_is_found(
    store: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...]
) -> None:
    name = purge(store)
    nothing = Tombstones(np.zeros(0, np.int64))
    for module in modules:
        monkeypatch.setattr(f"retrotool.{module}.read_tombstones", lambda *_: nothing)
    found = receipt(store, name)
    assert not found.ok
    assert {path.name for path in found.read_paths if path.found} >= BLINDED[modules]
    assert all(any(path in problem for problem in found.problems) for path in BLINDED[modules])


def test_a_log_that_was_edited_is_found(store: Path) -> None:
    name = purge(store, erase=True)
    path = next(p for p in stored_files(store, "log/*") if '"kind":"purge"' in p.read_text())
    path.write_text(path.read_text().replace("somebody", "no one!!"))
    with pytest.raises(CorruptError, match="checksum"):
        verified(store, name)


def test_an_erase_that_was_begun_is_not_finished(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = purge(store)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="killed"):

        def killed(*_: object) -> None:
            raise OSError("killed")

        patched.setattr("retrotool.purge.purged_chunks.erased_purges", killed)
        api.erase(store, [name])
    found = receipt(store, name)
    assert (found.state, found.ok, found.erased) == ("partly erased", False, "")
    assert found.problems == ("the purge is not erased: its data is left in 2 files",)
    assert {one.kind for one in found.files.kinds if one.left} == {"index", "selectors"}, "measured, and asked for"
    api.erase(store, [name])
    assert receipt(store, name).state == "erased"


def test_two_purges_of_one_chunk(store: Path) -> None:
    one = api.purge(store, api.Selectors(document=NAMES[:2]), reason="a").purge
    two = api.purge(store, api.Selectors(document=NAMES[1:]), reason="b", erase=True).purge
    assert receipt(store, two).ok
    assert receipt(store, one).state == "partly erased"
    api.erase(store, [one])
    found = receipt(store, one)
    assert (found.ok, found.state) == (True, "erased")
    assert receipt(store, two).ok


def test_copies_are_checked_too(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [*make_rows(6), {"id": "one", "text": TEXTS[0]}]
    store = tmp_path / "store"
    for number, more in enumerate([rows, [{"id": "one", "text": TEXTS[1]}, *make_rows(3, first=20)]]):
        api.chunk(store, [str(write_jsonl(tmp_path / f"{number}.jsonl", more))], tokenizer=str(tiny_encoder))
    first = retrotool.open(store).document("one")  # by its chunks: so nothing else is named that has its id
    name = api.purge(store, api.Selectors(chunk=tuple(map(str, first))), reason="r", erase=True).purge
    found = receipt(store, name)
    assert found.ok, found.problems
    assert found.copies and found.chunks == found.newly_purged + found.copies
    assert next(one for one in found.files.kinds if one.kind == "chunks").rows == found.chunks


def test_dependents_are_listed(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    other = tmp_path / "queries"
    api.chunk(other, [str(write_jsonl(tmp_path / "q.jsonl", make_rows(9, first=200)))], tokenizer=str(tiny_encoder))
    api.embed(other, encoder=str(tiny_encoder))
    api.neighbours(store, queries=other, name="far")
    found = verified(store, purge(store, erase=True))
    (one,) = found.receipt.dependents
    assert (one.uuid, one.path, one.table) == (Store.open(other).identity.uuid, str(other), "far")
    assert one.uuid in shown_texts(Path(found.page).read_text())


def test_a_store_that_can_not_be_written_has_a_receipt(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = purge(store, erase=True)

    def refused(*_: object) -> Any:
        raise StorageError("read-only file system")

    monkeypatch.setattr(leases.Run, "__enter__", refused)
    found = verified(store, name)
    assert found.receipt.ok and found.commit is None
    assert "not recorded in the log, because the store is read-only" in shown_texts(Path(found.page).read_text())


def test_wrong_purges_and_places(store: Path, tmp_path: Path) -> None:
    name = purge(store)
    with pytest.raises(UsageError, match="no purge 'p0'; it has: " + name):
        verified(store, "p0")
    assert Path(api.verify_purge(store, "last", out=tmp_path / "a" / "new").json).name == f"receipt-{name}.json"
    api.undo(store, name, reason="a mistake")
    with pytest.raises(UsageError, match="was undone"):
        verified(store, name)


def test_a_read_path_that_is_damaged_is_a_problem(store: Path) -> None:
    name = purge(store)
    for path in stored_files(store, "index/main/trained-*"):
        path.unlink()
    problems = receipt(store, name).problems
    assert any("search main: can't be read" in problem for problem in problems)


def test_a_read_path_whose_database_is_elsewhere_is_named(store: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    other = tmp_path / "other"
    api.chunk(other, [str(write_jsonl(tmp_path / "o.jsonl", make_rows(20, first=200)))], tokenizer=str(tiny_encoder))
    api.embed(other, encoder=str(tiny_encoder))
    api.index(other)
    api.neighbours(other, queries=store, name="far")
    move_store(other, tmp_path / "gone")
    found = verified(store, purge(store, erase=True))
    assert found.receipt.ok
    assert found.receipt.unread == ["neighbours far", "dataset far", "export far", "inspect far"]
    assert "4 read paths could not be checked" in shown_texts(Path(found.page).read_text())


def test_everything_erased_is_no_problem(store: Path) -> None:
    name = api.purge(store, api.Selectors(where="n_tokens > 0"), reason="all of it", erase=True).purge
    found = receipt(store, name)
    assert found.ok, found.problems
    assert retrotool.open(store).chunk_ids(0).size == 0


def test_controls_in_a_reason_are_shown_on_the_page_and_not_obeyed(store: Path) -> None:
    name = api.purge(
        store, api.Selectors(document=NAMES[:1]), reason="a\x1b[31mb\u202ec", who="x\x07", erase=True
    ).purge
    page = Path(verified(store, name).page).read_text()
    assert not set("\x1b\x07\u202e") & set(page)
    assert r"a\x1b[31mb\u202ec" in page


def test_tables_that_are_replaced_as_they_are_read_are_checked_again(store: Path) -> None:
    name, opened, read = purge(store), Store.open(store), read_paths.read_blocks
    tables = opened.state.group("neighbours", "main").entries()

    def read_and_be_overtaken(*args: Any) -> Any:
        while tables:
            entry = tables.pop()
            data, old = stored_file(store, entry.path).read_bytes(), FileName.parse(entry.path)
            with Run(opened.storage) as run:
                new = FileName.new(run.id, "neighbours", old.slot, old.extension, old.name)
                written = opened.write(new, functools.partial(_write, data, entry.rows), about=entry.about)
                opened.commit(run, lambda _, new=written, old=entry: Draft("test", add=(new,), remove=(old.path,)))
        return read(*args)

    with patch.object(read_paths, "read_blocks", read_and_be_overtaken):
        found = receipt(store, name)
    assert not tables and all("not erased" in problem for problem in found.problems)


def _write(data: bytes, rows: int, sink: Sink) -> int:
    sink.write(data)
    return rows


@pytest.mark.on_disk
def test_a_receipt_in_the_store_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="is in the store"):
        api.verify_purge(store, purge(store), out=store)
