"""Faults at every announced step of writing a file: it is not there or it is whole, never half."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_help import (
    announced,
    assert_whole,
    at_step,
    clean,
    exit_code,
    files_in,
    fork,
    full_disk,
    interrupt,
    kill_at_step,
    make_store,
    new_token,
    steps,
    temporary_files,
    viewing,
    write,
)  # fmt: skip

from retrotool.errors import CorruptError, StorageError
from retrotool.store import atomic, disk, parts
from retrotool.store.atomic import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.runs import Run
from retrotool.store.store import Store

DATA = b"all of it"

WRITE = ["mkdir", "fsync_directory", "write", "fsync", "rename", "fsync_directory"]
PUT = ["mkdir", "fsync_directory", "write", "fsync", "link", "unlink", "fsync_directory"]


def write_file(root: Path, run: str) -> FileEntry:
    return write(root, run, "chunks", "000000", DATA)


def written(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in (root / "chunks").glob("[!.]*")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def test_writing_a_file_announces_every_step(store: Store) -> None:
    assert announced(lambda: write_file(store.root, "0123abcd")) == WRITE


@steps(WRITE)
def test_a_full_disk_leaves_no_file_or_the_whole_one(store: Store, step: int) -> None:
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left") as caught:
        write_file(store.root, "0123abcd")
    assert "Free some space" in caught.value.advice
    assert written(store.root) == ([DATA] if step > WRITE.index("rename") else [])
    assert temporary_files(store.root) == []


@steps(WRITE)
def test_a_kill_leaves_no_file_or_the_whole_one_and_clean_removes_it(store: Store, step: int) -> None:
    kill_at_step(step, store.root, lambda run: write_file(store.root, run.id))
    assert written(store.root) == ([DATA] if step > WRITE.index("rename") else [])
    clean(store)
    assert files_in(store.root) == set()


def test_a_kill_within_a_write_leaves_a_temporary_file_that_clean_removes(store: Store) -> None:
    def write_half(path: Path) -> int:
        path.write_bytes(DATA[:4])
        os.kill(os.getpid(), signal.SIGKILL)
        return 1

    def doomed() -> None:
        with Run(store.root) as run:
            atomic.write_file(store.root, FileName.new(run.id, "chunks", "000000", "bin"), write_half)

    assert exit_code(fork(doomed)) == -signal.SIGKILL
    assert len(temporary_files(store.root)) == 1
    assert written(store.root) == []
    clean(store)
    assert files_in(store.root) == set()


@pytest.mark.parametrize(("error", "shown"), [(full_disk, StorageError), (interrupt, KeyboardInterrupt)])
def test_a_writer_that_fails_half_way_leaves_nothing(
    store: Store, error: Callable[[], None], shown: type[BaseException]
) -> None:
    def write_half(path: Path) -> int:
        path.write_bytes(DATA[:4])
        error()
        return 1

    with pytest.raises(shown):
        atomic.write_file(store.root, FileName.new("0123abcd", "chunks", "000000", "bin"), write_half)
    assert files_in(store.root) == set()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_table_is_found_by_the_check(store: Store, monkeypatch: pytest.MonkeyPatch, keep: float) -> None:
    class Truncated(pq.ParquetWriter):
        def close(self) -> None:
            super().close()
            os.truncate(self.where, int(keep * Path(self.where).stat().st_size))

    monkeypatch.setattr(pq, "ParquetWriter", Truncated)
    name = FileName.new("0123abcd", "tombstones", "p", "parquet")
    with pytest.raises((CorruptError, ValueError)):
        parts.write_parquet(store.root, name, pa.table({"chunk": range(1000)}))
    assert files_in(store.root) == set()


def test_a_table_that_lacks_rows_is_found_by_the_check(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(pq.ParquetWriter):
        def write_table(self, table: pa.Table, **options: object) -> None:
            super().write_table(table.slice(1), **options)

    monkeypatch.setattr(pq, "ParquetWriter", Lossy)
    name = FileName.new("0123abcd", "tombstones", "p", "parquet")
    with pytest.raises(CorruptError, match="wrote 1,000 rows, found 999"):
        parts.write_parquet(store.root, name, pa.table({"chunk": range(1000)}))
    assert files_in(store.root) == set()


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.99])
def test_truncated_vectors_are_found_by_the_check(store: Store, monkeypatch: pytest.MonkeyPatch, keep: float) -> None:
    whole = disk.fsync

    def truncated(path: Path) -> None:
        os.truncate(path, int(keep * path.stat().st_size))
        whole(path)

    monkeypatch.setattr(disk, "fsync", truncated)
    name = FileName.new("0123abcd", "embeddings", "000000", "npy", "tiny")
    with pytest.raises((CorruptError, ValueError, EOFError)):
        parts.write_vectors(store.root, name, np.ones((50, 8), np.float16))
    assert files_in(store.root) == set()


def test_the_entry_tells_what_was_written(store: Store) -> None:
    entry = write_file(store.root, "0123abcd")
    assert (entry.rows, entry.bytes) == (1, len(DATA))
    assert_whole(viewing(store, entry))


def put(target: Path, data: bytes) -> bool:
    return atomic.put_if_absent(target, new_token(), data)


def test_putting_announces_every_step(store: Store) -> None:
    assert announced(lambda: put(store.root / "staging" / "task.json", DATA)) == PUT


@steps(PUT)
def test_a_full_disk_puts_nothing_or_all_of_it(store: Store, step: int) -> None:
    target = store.root / "staging" / "task.json"
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left") as caught:
        put(target, DATA)
    assert "Free some space" in caught.value.advice
    assert target.exists() == (step > PUT.index("link"))
    assert not target.exists() or target.read_bytes() == DATA
    # A disk that refuses to remove the temporary file keeps it; nothing else does.
    assert len(temporary_files(store.root)) == (step == PUT.index("unlink"))


@steps(PUT[2:])  # the run has made the directory
def test_a_kill_puts_nothing_or_all_of_it_and_clean_removes_the_rest(store: Store, step: int) -> None:
    target = store.root / "staging" / "task.json"
    kill_at_step(step, store.root, lambda run: atomic.put_if_absent(target, run.id + "0000", DATA))
    assert target.exists() == (step > PUT[2:].index("link"))
    assert not target.exists() or target.read_bytes() == DATA
    target.unlink(missing_ok=True)  # a staged task would be for a fold to take away
    clean(store)
    assert files_in(store.root) == set()


@steps(PUT[2:])
def test_what_holds_a_name_stays_whatever_fails(store: Store, step: int) -> None:
    target = store.root / "staging" / "task.json"
    assert put(target, DATA)
    with at_step(step, full_disk), pytest.raises(StorageError):
        put(target, b"something else")
    assert target.read_bytes() == DATA
    assert put(target, b"something else") is False
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("error", [30, 13, 1], ids=["read-only", "no rights", "not permitted"])
def test_a_disk_that_refuses_is_told_with_advice(store: Store, error: int) -> None:
    def refuse() -> None:
        raise OSError(error, os.strerror(error))

    with at_step(WRITE.index("write"), refuse), pytest.raises(StorageError, match=os.strerror(error)) as caught:
        write_file(store.root, "0123abcd")
    assert caught.value.advice == "Check the rights on the store."


def test_an_error_that_no_person_can_mend_is_not_dressed_up(store: Store) -> None:
    with at_step(WRITE.index("fsync"), lambda: disk.os.close(-1)), pytest.raises(OSError, match="Bad file descriptor"):
        write_file(store.root, "0123abcd")
    assert files_in(store.root) == set()


BLOCKS = [np.full((n, 4), n, np.float16) for n in (3, 0, 50)]
WRITE_BLOCKS = ["mkdir", "fsync_directory"] * 2 + ["write", "fsync", "fsync", "rename", "fsync_directory"]


def write_blocks(root: Path, run: str) -> FileEntry:
    name = FileName.new(run, "embeddings", "000000", "npy", "tiny")
    return parts.write_vector_blocks(root, name, 53, 4, iter(BLOCKS))


def test_a_file_made_of_blocks_is_what_one_made_at_once_is(store: Store) -> None:
    assert announced(lambda: write_blocks(store.root, "0123abcd")) == WRITE_BLOCKS, "one fsync a block that has rows"
    entry = write_blocks(store.root, "0123abcd")
    whole = store.root.parent / "whole.npy"
    with whole.open("xb") as file:
        np.lib.format.write_array(file, np.concatenate(BLOCKS), version=(1, 0))
    assert (store.root / entry.path).read_bytes() == whole.read_bytes()
    assert (entry.rows, entry.bytes, entry.sha256) == (53, whole.stat().st_size, atomic.file_sha256(whole))


@steps(WRITE_BLOCKS)
def test_blocks_on_a_full_disk_or_killed_leave_no_file_or_the_whole_one(store: Store, step: int) -> None:
    due = int(step > WRITE_BLOCKS.index("rename"))
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left"):
        write_blocks(store.root, "0123abcd")
    assert len(files_in(store.root)) == due
    assert temporary_files(store.root) == []
    other = make_store(store.root.parent / "other")
    kill_at_step(step, other.root, lambda run: write_blocks(other.root, run.id))
    assert len(list((other.root / "embeddings").glob("*/0*.npy"))) == due
    clean(other)
    assert files_in(other.root) == set()


@pytest.mark.parametrize("rows", [52, 54, 0])
def test_another_number_of_rows_than_was_said_is_no_file(store: Store, rows: int) -> None:
    name = FileName.new("0123abcd", "embeddings", "000000", "npy", "tiny")
    with pytest.raises(CorruptError):
        parts.write_vector_blocks(store.root, name, rows, 4, iter(BLOCKS))
    assert files_in(store.root) == set()


def test_a_block_that_can_not_be_made_leaves_nothing(store: Store) -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield BLOCKS[0]
        raise KeyboardInterrupt

    name = FileName.new("0123abcd", "embeddings", "000000", "npy", "tiny")
    with pytest.raises(KeyboardInterrupt):
        parts.write_vector_blocks(store.root, name, 53, 4, blocks())
    assert files_in(store.root) == set()
