"""Faults at every announced step of a commit: the old or the new state is there, never neither, never half."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from memory_storage import is_everywhere
from store_help import (
    announced,
    assert_whole,
    at_step,
    clean,
    commit,
    contents,
    files_in,
    full_disk,
    interrupt,
    kill_at_step,
    live_files,
    make_store,
    steps,
    write,
)  # fmt: skip
from stored import file_sha256, stored_file

from retrotool.errors import StorageError
from retrotool.store.leases import Run
from retrotool.store.log import Draft, FileEntry
from retrotool.store.storage import storage_at
from retrotool.store.store import Store

DATA = b"all of it"

ON_DISK = [
    "touch",  # the lease is renewed
    "write", "fsync", "link", "unlink", "fsync_directory",  # the entry of the log
    "unlink", "fsync_directory",  # the file that was removed: it must not come back
    "write", "fsync", "link", "unlink", "fsync_directory",  # a checkpoint
    "unlink", "fsync_directory",  # an old one's end
]  # fmt: skip
IN_MEMORY = ["overwrite", "put_if_absent", "delete", "put_if_absent", "delete"]
COMMIT, NAMING = (IN_MEMORY, "put_if_absent") if is_everywhere() else (ON_DISK, "link")

FIRST_AFTER = 2 if is_everywhere() else 6  # the first step after the commit is in the log


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of commits 0 to 5 with two checkpoints, whose next commit makes a third; see ``replace``."""
    monkeypatch.setattr("retrotool.store.store.CHECKPOINT_EVERY", 2)
    store = make_store(tmp_path / "store")
    with Run(store.storage) as run:
        commit(store, run, write(Path(store.place), run.id, "tombstones", "p", b"old"))
        for number in range(1, 6):
            commit(store, run, records={"number": number})
        write(Path(store.place), run.id, "chunks", "", DATA)
    return store


def replace(store: Store, run: Run) -> None:
    """Remove the tombstones, and give the file that was written its place."""
    old = store.state.file("tombstones", "p")
    (written,) = store.storage.list("chunks/")
    entry = FileEntry(written.path, "000000", 1, len(DATA), file_sha256(store.storage, written.path))
    store.commit(run, lambda _: Draft("test", add=(entry,), remove=(old.path,), records={"number": 6}))


def assert_old_or_new(root: Path, step: int) -> None:
    """The log has the change or not; its files are whole; the same change can be made; and nothing else stays."""
    store = Store.open(root)
    made = step > COMMIT.index(NAMING)
    assert store.state.number == (6 if made else 5)
    assert store.state.records["number"] == store.state.number
    assert (store.state.file("tombstones", "p") is None) == made
    assert_whole(store)
    if not made:
        with Run(storage_at(root)) as run:
            replace(store, run)
    clean(store)
    assert contents(store.state)[1] == {"number": 6}
    assert [stored_file(root, path).read_bytes() for path in live_files(store.state)] == [DATA]
    assert files_in(root) == live_files(store.state)
    assert_whole(Store.open(root))


def test_a_commit_announces_every_step(prepared: Store) -> None:
    with Run(prepared.storage) as run:
        assert announced(lambda: replace(prepared, run)) == COMMIT


@steps(COMMIT)
def test_a_commit_on_a_full_disk_is_made_or_not(prepared: Store, step: int) -> None:
    """Once it is in the log there is no error: who reads one runs the command again."""
    is_logged = step >= FIRST_AFTER
    expected = nullcontext() if is_logged else pytest.raises(StorageError, match="no space left")
    with Run(prepared.storage) as run, at_step(step, full_disk), expected as caught:
        replace(prepared, run)
    assert caught is None or "Free some space" in caught.value.advice  # type: ignore[attr-defined]
    assert_old_or_new(Path(prepared.place), step)


@steps(COMMIT)
def test_an_interrupted_commit_is_made_or_not(prepared: Store, step: int) -> None:
    with Run(prepared.storage) as run, at_step(step, interrupt), pytest.raises(KeyboardInterrupt):
        replace(prepared, run)
    assert_old_or_new(Path(prepared.place), step)


@steps(COMMIT)
def test_a_killed_commit_is_made_or_not(prepared: Store, step: int) -> None:
    kill_at_step(step, Path(prepared.place), lambda run: replace(prepared, run))
    assert_old_or_new(Path(prepared.place), step)
