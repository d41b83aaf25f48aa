"""The log: a chain that shows what was done to it, and a number that only one writer gets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import times
from memory_storage import MemoryFile
from store_help import (
    assert_whole,
    before_entry,
    commit,
    exit_code,
    files_in,
    fork,
    live_files,
    make_store,
    temporary_files,
)
from stored import file_sha256, stored_file, stored_files, write_stored

from retrotool.errors import CorruptError, StorageError
from retrotool.info import verify
from retrotool.store import disk, gc, log
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.storage import storage_at
from retrotool.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


@pytest.fixture
def root(store: Store) -> Path:
    """A store with commits 0 to 5, each with a record of its number."""
    with Run(store.storage) as run:
        for number in range(6):
            commit(store, run, records={"number": number})
    return Path(store.place)


def entry_file(root: Path, number: int) -> Path | MemoryFile:
    return stored_file(root, log.commit_path(number))


def edit(root: Path, commit_number: int, **fields: object) -> None:
    """Rewrite a commit as a careful forger would: with a checksum that is right."""
    path = entry_file(root, commit_number)
    entry = {**json.loads(path.read_text()), **fields}
    del entry["sha256"]
    path.write_bytes(log.with_checksum(json.dumps(entry).encode()))


def test_a_chain_that_nobody_touched_is_folded(root: Path) -> None:
    state = Store.open(root).state
    assert (state.number, state.records) == (5, {"number": 5})
    entries = [log.read(storage_at(root), number) for number in range(6)]
    assert [entry.parent for entry in entries[1:]] == [entry.sha256 for entry in entries[:-1]]
    assert entries[0].parent == file_sha256(storage_at(root), "store.json")


@pytest.mark.parametrize("number", range(5))
def test_an_edited_commit_is_found(root: Path, number: int) -> None:
    edit(root, number, records={"number": 7})
    with pytest.raises(CorruptError, match=f"0000000{number + 1}.json.* not the child"):
        Store.open(root)


@pytest.mark.parametrize("number", range(6))
def test_a_commit_of_another_parent_is_found(root: Path, number: int) -> None:
    edit(root, number, parent="0" * 64)
    with pytest.raises(CorruptError, match="not the child"):
        Store.open(root)


@pytest.mark.parametrize("number", range(5))
def test_a_commit_that_is_missing_is_found(root: Path, number: int) -> None:
    entry_file(root, number).unlink()
    with pytest.raises(CorruptError, match=f"0000000{number}.json"):
        Store.open(root)


@pytest.mark.parametrize("number", range(5))
def test_swapped_commits_are_found(root: Path, number: int) -> None:
    one, other = (entry_file(root, n) for n in (number, number + 1))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    with pytest.raises(CorruptError, match="contains commit"):
        Store.open(root)
    edit(root, number, number=number)
    edit(root, number + 1, number=number + 1)
    with pytest.raises(CorruptError, match="not the child"):
        Store.open(root)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"number": 0}'], ids=lambda data: repr(data)
)
def test_what_is_no_commit_is_found(root: Path, number: int, data: bytes) -> None:
    entry_file(root, number).write_bytes(data)
    with pytest.raises(CorruptError, match="not a commit"):
        Store.open(root)


def test_an_invalid_commit_in_an_unbroken_chain_is_found(root: Path) -> None:
    state = Store.open(root).state
    gone = FileName.new("0123abcd", "tombstones", "p", "parquet").path
    with Run(storage_at(root)) as run:
        assert log.append(storage_at(root), run.id, 6, state.head, Draft("test", remove=(gone,)))
    with pytest.raises(CorruptError, match=r"commit 6 is invalid.*was replaced or removed"):
        Store.open(root)


def test_an_open_store_stays_where_it_is_when_the_next_commit_is_broken(root: Path) -> None:
    store = Store.open(root)
    entry_file(root, 6).write_bytes(b"{")
    with pytest.raises(CorruptError):
        store.refresh()
    assert store.state.number == 5


def test_fields_of_a_newer_version_are_ignored(root: Path) -> None:
    edit(root, 5, from_the_future={"a": 1})
    assert Store.open(root).state.records == {"number": 5}


def test_verify_folds_the_log_from_its_beginning(store: Store) -> None:
    with Run(store.storage) as run:
        for number in range(6):
            commit(store, run, records={"number": number})
    edit(Path(store.place), 2, records={"number": 7})
    problems = verify.check_store(store).problems
    assert any("00000003.json is not the child" in problem.text for problem in problems)


def test_a_number_is_given_once(store: Store) -> None:
    with Run(store.storage) as run, Run(store.storage) as rival:
        assert log.append(store.storage, run.id, 0, store.genesis, Draft("one"))
        assert not log.append(store.storage, rival.id, 0, store.genesis, Draft("other"))
    assert log.read(store.storage, 0, store.genesis).kind == "one"


def test_a_writer_that_is_overtaken_at_the_last_moment_goes_on_behind(store: Store) -> None:
    other = Store.open(store.place)
    with Run(store.storage) as run, Run(store.storage) as rival:
        seen: list[State] = []

        def build(state: State) -> Draft:
            seen.append(state)
            return Draft("mine", records={"last": "mine"})

        with before_entry(lambda: commit(other, rival, records={"last": "theirs"})):
            store.commit(run, build)
    assert [state.number for state in seen] == [-1, 0]
    assert seen[1].records == {"last": "theirs"}
    assert store.state.records == {"last": "mine"}
    assert Store.open(store.place).state.number == 1


def test_a_build_that_finds_nothing_left_to_do_commits_nothing(store: Store) -> None:
    other = Store.open(store.place)
    with Run(store.storage) as run, Run(store.storage) as rival:

        def build(state: State) -> Draft | None:
            return None if "done" in state.records else Draft("mine", records={"done": "mine"})

        with before_entry(lambda: commit(other, rival, records={"done": "theirs"})):
            store.commit(run, build)
    assert store.state.number == 0
    assert store.state.records == {"done": "theirs"}


@pytest.mark.on_disk
def test_a_writer_reported_that_its_own_entry_exists_knows_that_it_won(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = disk.link

    def lost_answer(source: Path, target: Path) -> bool:
        link(source, target)
        return False  # as over NFS, when the answer to a link is lost and it is asked for again

    monkeypatch.setattr(disk, "link", lost_answer)
    with Run(store.storage) as run:
        assert commit(store, run, records={"a": 1}).number == 0
        assert commit(store, run, records={"a": 2}).number == 1
    assert Store.open(store.place).state.number == 1


def refuse_links(error: int) -> Callable[[Path, Path], None]:
    def hardlink_to(_target: Path, _source: Path) -> None:
        raise OSError(error, os.strerror(error))

    return hardlink_to


@pytest.mark.on_disk
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK])
def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(Path, "hardlink_to", refuse_links(error))
    with pytest.raises(StorageError, match="no hard links") as caught:
        make_store(tmp_path / "store")
    assert "local disk" in caught.value.advice
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.on_disk
def test_a_store_moved_to_a_file_system_without_hard_links_takes_no_commit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(root)
    with Run(storage_at(root)) as run:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links(errno.EPERM))
        with pytest.raises(StorageError, match="no hard links"):
            commit(store, run, records={"number": 6})
    assert Store.open(root).state.number == 5


WRITERS, COMMITS = 16, times(25, 50)


@pytest.mark.slow
def test_sixteen_processes_lose_no_commit(store: Store) -> None:
    def work(writer: int) -> None:
        own = Store.open(store.place)
        with Run(store.storage) as run:
            for number in range(COMMITS):
                slot = f"{writer}.{number}"
                name = FileName.new(run.id, "tombstones", slot, "bin")
                write_stored(store, name.path, slot.encode())  # not durable: that is not at stake here, and slow
                entry = FileEntry(name.path, slot, 1, len(slot), hashlib.sha256(slot.encode()).hexdigest())
                commit(own, run, entry, settings={"slot": slot})

    children = [fork(lambda writer=writer: work(writer)) for writer in range(WRITERS)]
    assert [exit_code(child) for child in children] == [0] * WRITERS

    state = Store.open(store.place).state
    assert state.number == WRITERS * COMMITS - 1
    folded, order = State(-1, store.genesis), []
    for number in range(WRITERS * COMMITS):
        entry = log.read(store.storage, number, folded.head)
        folded = folded.fold([entry])
        order.append(entry.settings["slot"])
    assert not entry_file(Path(store.place), WRITERS * COMMITS).exists()
    assert len(stored_files(store, "log/*")) == WRITERS * COMMITS
    assert sorted(order) == sorted(state.group("tombstones")) == sorted(folded.group("tombstones"))
    for writer in range(WRITERS):
        own = [slot for slot in order if slot.startswith(f"{writer}.")]
        assert own == [f"{writer}.{number}" for number in range(COMMITS)]
    assert len({*order}) == WRITERS * COMMITS, "none was made twice"
    last = Store.open(store.place)
    assert_whole(last)
    assert temporary_files(Path(store.place)) == [] and list(store.storage.list("leases/")) == []
    assert gc.unnamed_files(last) == [] and files_in(Path(store.place)) == live_files(state)
    with Run(store.storage) as run:
        assert gc.clean(last, run) == 0, "nothing was left over"
