"""A folder as a storage: faults at every announced step of writing a file, which is there whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
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
    steps,
    temporary_files,
    viewing,
    write,
)  # fmt: skip
from stored import file_sha256

from retrotool.errors import CorruptError, StorageError
from retrotool.store import disk, leases
from retrotool.store.leases import Run
from retrotool.store.local_storage import PUT_ATTEMPTS, LocalStorage
from retrotool.store.log import FileEntry
from retrotool.store.paths import FileName
from retrotool.store.storage import Sink, storage_at
from retrotool.store.store import Store
from retrotool.store.vectors import write_vector_blocks, write_vectors

pytestmark = pytest.mark.on_disk

DATA = b"all of it"
RUN = "0123abcd"

WRITE = ["mkdir", "fsync_directory", "write", "fsync", "rename", "fsync_directory"]
PUT = ["mkdir", "fsync_directory", "write", "fsync", "link", "unlink", "fsync_directory"]
OVERWRITE = ["write", "fsync", "rename"]


def write_file(root: Path, run: str) -> FileEntry:
    return write(root, run, "chunks", "000000", DATA)


def written(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in (root / "chunks").glob("[!.]*")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def test_writing_a_file_announces_every_step(store: Store) -> None:
    assert announced(lambda: write_file(Path(store.place), RUN)) == WRITE


@steps(WRITE)
def test_a_full_disk_leaves_no_file_or_the_whole_one(store: Store, step: int) -> None:
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left") as caught:
        write_file(Path(store.place), RUN)
    assert "Free some space" in caught.value.advice
    assert written(Path(store.place)) == ([DATA] if step > WRITE.index("rename") else [])
    assert temporary_files(Path(store.place)) == []


@steps(WRITE)
def test_a_kill_leaves_no_file_or_the_whole_one_and_clean_removes_it(store: Store, step: int) -> None:
    kill_at_step(step, Path(store.place), lambda run: write_file(Path(store.place), run.id))
    assert written(Path(store.place)) == ([DATA] if step > WRITE.index("rename") else [])
    clean(store)
    assert files_in(Path(store.place)) == set()


def test_a_kill_within_a_write_leaves_a_temporary_file_that_clean_removes(store: Store) -> None:
    def write_half(sink: Sink) -> int:
        sink.write(DATA[:4])
        sink.sync()
        os.kill(os.getpid(), signal.SIGKILL)
        return 1

    def doomed() -> None:
        with Run(store.storage) as run:
            store.write(FileName.new(run.id, "chunks", "000000", "bin"), write_half)

    assert exit_code(fork(doomed)) == -signal.SIGKILL
    (left,) = store.storage.unfinished()
    assert [Path(store.place) / left.path] == temporary_files(Path(store.place))
    assert left.size == 4 and leases.run_path(left.run) in files_in(Path(store.place))
    assert written(Path(store.place)) == []
    clean(store)
    assert files_in(Path(store.place)) == set()


@pytest.mark.parametrize(("error", "shown"), [(full_disk, StorageError), (interrupt, KeyboardInterrupt)])
def test_a_writer_that_fails_half_way_leaves_nothing(
    store: Store, error: Callable[[], None], shown: type[BaseException]
) -> None:
    def write_half(sink: Sink) -> int:
        sink.write(DATA[:4])
        error()
        return 1

    with pytest.raises(shown):
        store.write(FileName.new(RUN, "chunks", "000000", "bin"), write_half)
    assert files_in(Path(store.place)) == set()


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.99])
def test_a_file_that_the_disk_cut_short_is_no_file(store: Store, monkeypatch: pytest.MonkeyPatch, keep: float) -> None:
    whole = disk.fsync

    def truncated(path: Path) -> None:
        os.truncate(path, int(keep * path.stat().st_size))
        whole(path)

    monkeypatch.setattr(disk, "fsync", truncated)
    name = FileName.new("0123abcd", "embeddings", "000000", "npy", "tiny")
    with pytest.raises(StorageError, match="bytes were written, but the file system has"):
        write_vectors(store, name, np.ones((50, 8), np.float16))
    assert files_in(Path(store.place)) == set()


def test_the_entry_tells_what_was_written(store: Store) -> None:
    entry = write_file(Path(store.place), RUN)
    assert (entry.rows, entry.bytes) == (1, len(DATA))
    assert_whole(viewing(store, entry))


STAGED = "staging/task.json"


def put(store: Store, data: bytes, run: str = RUN) -> bool:
    return store.storage.put_if_absent(STAGED, run, data)


def test_putting_announces_every_step(store: Store) -> None:
    assert announced(lambda: put(store, DATA)) == PUT


@steps(PUT)
def test_a_full_disk_puts_nothing_or_all_of_it(store: Store, step: int) -> None:
    target = Path(store.place) / STAGED
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left") as caught:
        put(store, DATA)
    assert "Free some space" in caught.value.advice
    assert target.exists() == (step > PUT.index("link"))
    assert not target.exists() or target.read_bytes() == DATA
    # A disk that refuses to remove the temporary file keeps it; nothing else does.
    assert len(temporary_files(Path(store.place))) == (step == PUT.index("unlink"))


@steps(PUT)
def test_a_kill_puts_nothing_or_all_of_it_and_clean_removes_the_rest(store: Store, step: int) -> None:
    target = Path(store.place) / STAGED
    kill_at_step(step, Path(store.place), lambda run: put(store, DATA, run.id))
    assert target.exists() == (step > PUT.index("link"))
    assert not target.exists() or target.read_bytes() == DATA
    target.unlink(missing_ok=True)  # a staged task would be for a fold to take away
    clean(store)
    assert files_in(Path(store.place)) == set()


@steps(PUT[2:])
def test_what_holds_a_name_stays_whatever_fails(store: Store, step: int) -> None:
    target = Path(store.place) / STAGED
    assert put(store, DATA)
    with at_step(step, full_disk), pytest.raises(StorageError):
        put(store, b"something else")
    assert target.read_bytes() == DATA
    assert put(store, b"something else") is False
    assert target.read_bytes() == DATA


LEASE = leases.run_path(RUN)


@pytest.fixture
def leased(store: Store) -> Path:
    """A lease that says "before"."""
    store.storage.overwrite(LEASE, RUN, b"before")
    return Path(store.place) / LEASE


def test_overwriting_announces_every_step(store: Store, leased: Path) -> None:
    assert announced(lambda: store.storage.overwrite(LEASE, RUN, DATA)) == OVERWRITE
    assert leased.read_bytes() == DATA


@steps(OVERWRITE)
def test_a_full_disk_keeps_what_was_to_be_overwritten(store: Store, leased: Path, step: int) -> None:
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left"):
        store.storage.overwrite(LEASE, RUN, DATA)
    assert leased.read_bytes() == b"before"
    assert temporary_files(Path(store.place)) == []


@steps(OVERWRITE)
def test_a_kill_keeps_what_was_to_be_overwritten_and_clean_removes_the_rest(store: Store, step: int) -> None:
    kill_at_step(step, Path(store.place), lambda run: store.storage.overwrite(leases.run_path(run.id), run.id, DATA))
    (lease,) = (Path(store.place) / "leases").glob("run-*")
    assert RUN not in lease.name and b"process" in lease.read_bytes()
    assert len(temporary_files(Path(store.place))) == (step > 0)
    clean(store)
    assert files_in(Path(store.place)) == set()


@pytest.mark.parametrize("how", ["put_if_absent", "overwrite"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_small_file_whose_temporary_one_is_taken_away_is_written_again(store: Store, how: str, step: int) -> None:
    """As by clean-up, of a run that begins just now and has no lease yet."""
    write_small = getattr(store.storage, how)
    with at_step(step, lambda: clean(store)):
        assert write_small(LEASE, RUN, DATA)
    assert (Path(store.place) / LEASE).read_bytes() == DATA
    assert files_in(Path(store.place)) == {LEASE}


def test_a_small_file_that_can_never_be_written_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []

    def lose(path: Path) -> None:
        tried.append(path)
        path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(disk, "fsync", lose)
    for write_small in (store.storage.put_if_absent, store.storage.overwrite):
        tried.clear()
        with pytest.raises(FileNotFoundError):
            write_small(LEASE, RUN, DATA)
        assert len(tried) == len(set(tried)) == PUT_ATTEMPTS


DELETED = ["plans/a-0123abcd00000000.json", "selectors/b-0123abcd00000000.json", "plans/c-0123abcd00000000.json"]
DELETE = ["unlink", "unlink", "unlink", "fsync_directory", "fsync_directory"]


def put_to_delete(store: Store) -> None:
    for path in DELETED:
        assert store.storage.put_if_absent(path, RUN, DATA)


def test_deleting_announces_every_step(store: Store) -> None:
    put_to_delete(store)
    assert announced(lambda: store.storage.delete(DELETED)) == DELETE, "each folder is made durable, once"
    assert announced(lambda: store.storage.delete(DELETED)) == DELETE, "what a kill has removed may not be durable"
    assert files_in(Path(store.place)) == set()
    assert announced(lambda: store.storage.delete(["scans/none/a-0123abcd00000000.json"])) == ["unlink"]


@steps(DELETE)
def test_deleting_on_a_full_disk_or_killed_goes_on_where_it_stopped(store: Store, step: int) -> None:
    put_to_delete(store)
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left"):
        store.storage.delete(DELETED)
    assert files_in(Path(store.place)) == set(DELETED[step:])
    kill_at_step(DELETE.index("unlink"), Path(store.place), lambda _: store.storage.delete(DELETED))
    store.storage.delete(DELETED)
    clean(store)
    assert files_in(Path(store.place)) == set()


@pytest.mark.parametrize("error", [30, 13, 1], ids=["read-only", "no rights", "not permitted"])
def test_a_disk_that_refuses_is_reported_with_advice(store: Store, error: int) -> None:
    def refuse() -> None:
        raise OSError(error, os.strerror(error))

    with at_step(WRITE.index("write"), refuse), pytest.raises(StorageError, match=os.strerror(error)) as caught:
        write_file(Path(store.place), RUN)
    assert caught.value.advice == "Check the store's permissions."


def test_an_error_that_no_person_can_mend_is_not_dressed_up(store: Store) -> None:
    with at_step(WRITE.index("fsync"), lambda: disk.os.close(-1)), pytest.raises(OSError, match="Bad file descriptor"):
        write_file(Path(store.place), RUN)
    assert files_in(Path(store.place)) == set()


BLOCKS = [np.full((n, 4), n, np.float16) for n in (3, 0, 50)]
WRITE_BLOCKS = [
    "mkdir", "fsync_directory", "mkdir", "fsync_directory",
    "write", "fsync", "fsync", "fsync", "fsync", "rename", "fsync_directory",  # the file, block by block
    "write", "fsync", "rename", "fsync_directory",  # its sums
]  # fmt: skip


def write_blocks(store: Store, run: str, blocks: Iterator[np.ndarray] | None = None, rows: int = 53) -> FileEntry:
    name = FileName.new(run, "embeddings", "000000", "npy", "tiny")
    return write_vector_blocks(store, name, rows, 4, iter(BLOCKS) if blocks is None else blocks)


def test_a_file_made_of_blocks_is_what_one_made_at_once_is(store: Store, tmp_path: Path) -> None:
    assert announced(lambda: write_blocks(store, RUN)) == WRITE_BLOCKS, "one fsync a block, and a last one"
    entry = write_blocks(store, RUN)
    whole = tmp_path / "whole.npy"
    with whole.open("xb") as file:
        np.lib.format.write_array(file, np.concatenate(BLOCKS), version=(1, 0))
    assert (Path(store.place) / entry.path).read_bytes() == whole.read_bytes()
    assert (entry.rows, entry.bytes) == (53, whole.stat().st_size)
    assert entry.sha256 == file_sha256(storage_at(tmp_path), whole.name)


def extensions(store: Store) -> list[str]:
    return sorted(Path(info.path).suffix for info in store.storage.list("embeddings/"))


@steps(WRITE_BLOCKS)
def test_blocks_on_a_full_disk_or_killed_leave_no_file_or_the_whole_one(store: Store, step: int) -> None:
    """Nor the sums of it; where both are there all the same, no commit names them."""
    file, sums = (place for place, name in enumerate(WRITE_BLOCKS) if name == "rename")
    with at_step(step, full_disk), pytest.raises(StorageError, match="no space left"):
        write_blocks(store, RUN)
    assert extensions(store) == ([".npy"] if step == file + 1 else [".xxh3"] if step == sums + 1 else [])
    assert temporary_files(Path(store.place)) == []
    other = make_store(Path(store.place).parent / "other")
    kill_at_step(step, Path(other.place), lambda run: write_blocks(other, run.id))
    assert extensions(other) == [".npy"] * (step > file) + [".xxh3"] * (step > sums)
    clean(other)
    assert files_in(Path(other.place)) == set()


@pytest.mark.parametrize("rows", [52, 54, 0])
def test_another_number_of_rows_than_was_said_is_no_file(store: Store, rows: int) -> None:
    with pytest.raises(ValueError, match=f"53 vectors, not {rows}"):
        write_blocks(store, RUN, rows=rows)
    assert files_in(Path(store.place)) == set()


def test_a_block_that_can_not_be_made_leaves_nothing(store: Store) -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield BLOCKS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_blocks(store, RUN, blocks())
    assert files_in(Path(store.place)) == set()


def test_the_sum_of_a_file_that_is_being_written_is_of_what_was_given(store: Store) -> None:
    """Pieces of any type and shape, as writers of Parquet, numpy and faiss give them."""
    pieces = [b"bytes", memoryview(b"view"), np.arange(6, dtype="<f4").reshape(2, 3).data, bytearray(b"array"), b""]
    whole = b"".join(memoryview(piece).tobytes() for piece in pieces)

    def write_pieces(sink: Sink) -> int:
        assert [sink.write(piece) for piece in pieces] == [memoryview(piece).nbytes for piece in pieces]
        assert sink.tell() == len(whole)
        return 1

    entry = store.write(FileName.new(RUN, "plans", "a", "bin"), write_pieces)
    assert (Path(store.place) / entry.path).read_bytes() == whole
    assert entry.bytes == len(whole)
    assert_whole(viewing(store, entry))


def test_a_folder_that_is_a_link_is_neither_listed_nor_written_to(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    (tmp_path / "outside" / "name").mkdir(parents=True)
    (tmp_path / "outside" / "name" / "000000-0123abcd00000000.npy").write_bytes(DATA)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "embeddings").symlink_to(tmp_path / "outside")
    (tmp_path / "store" / "scans").mkdir()
    (tmp_path / "store" / "scans" / "name").symlink_to(tmp_path / "outside" / "name")
    path = "embeddings/name/000000-0123abcd00000000.npy"
    for prefix in ("embeddings/", "embeddings/name/", "embeddings/name/0000", "scans/name/"):
        with pytest.raises(CorruptError, match="is a symbolic link"):
            list(storage.list(prefix))
    calls: list[Callable[[], object]] = [
        lambda: storage.get(path),
        lambda: storage.get_range(path, 0, 1),
        lambda: storage.open(path, 1),
        lambda: storage.local(path),
        lambda: storage.stat(path),
        lambda: storage.delete([path]),
        lambda: storage.put(path, RUN, lambda sink: sink.write(DATA)),
        lambda: storage.put_if_absent(path, RUN, DATA),
        lambda: storage.overwrite(path, RUN, DATA),
    ]
    for call in calls:
        with pytest.raises(CorruptError, match="embeddings is a symbolic link"):
            call()
    assert list(storage.list("")) == list(storage.list("scans/")) == []
    assert sorted(storage.irregular()) == ["embeddings", "scans/name"]
    assert list((tmp_path / "outside" / "name").iterdir()) == [tmp_path / "outside" / "name" / path.rpartition("/")[2]]
