"""Copies of a bucket's files: made once for all processes, right to the byte, evicted by use, within a budget."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import random
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_help import announced, at_step, exit_code, fork, full_disk

from retrotool.errors import CorruptError, StorageError, UsageError
from retrotool.store import cache
from retrotool.store.cache import FileCache
from retrotool.store.log import FileEntry

UUID = "0f0f0f0f-0000-4000-8000-000000000000"
OTHER_UUID = "0f0f0f0f-1111-4000-8000-000000000000"


class Bucket:
    """Files elsewhere; ``reads`` has the paths of those that were read."""

    place, latent = "s3://bucket/store", True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.reads: list[str] = []
        self.wrong = 0  # readings whose bytes are not those of the file

    def add(self, data: bytes) -> FileEntry:
        digest = hashlib.sha256(data).hexdigest()
        path = f"embeddings/enc/{digest[:8]}.npy"
        self.files[path] = data
        return FileEntry(path, "", 1, len(data), digest)

    def blocks(self, path: str) -> Iterator[bytes]:
        self.reads.append(path)
        self.wrong -= 1
        data = b"wrong, and longer than the file" if self.wrong >= 0 else self.files.get(path)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        for start in range(0, len(data), 10):
            yield data[start : start + 10]


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "1GB")
    return tmp_path / "cache" / "files"


def cached(bucket: Bucket, uuid: str = UUID) -> FileCache:
    storage: Any = bucket
    return FileCache(storage, uuid)


def use(bucket: Bucket, entry: FileEntry, **given: bool) -> bytes:
    with cached(bucket).file(entry, **given) as path:
        return path.read_bytes()


def copies(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.glob("*/*")}


def test_a_file_is_read_once_for_all_that_use_it(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"some bytes" * 7)
    assert use(bucket, entry) == use(bucket, entry) == b"some bytes" * 7
    with cached(bucket).file(entry) as path:
        assert path == folder / UUID / f"{entry.sha256}.npy"
    assert bucket.reads == [entry.path]
    cached(bucket, OTHER_UUID)
    with cached(bucket, OTHER_UUID).file(entry) as other:
        assert other.parent == folder / OTHER_UUID, "each store has its own copies"


def test_bytes_that_are_wrong_are_read_once_more(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"right")
    bucket.wrong = 1
    assert use(bucket, entry) == b"right"
    assert len(bucket.reads) == 2


def test_bytes_that_stay_wrong_are_an_error_that_says_where(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"right")
    bucket.wrong = 2
    with pytest.raises(CorruptError, match=f"{bucket.place}/{entry.path}: its SHA-256") as caught:
        use(bucket, entry)
    assert "retrotool verify" in caught.value.advice
    assert copies(folder) == set()
    assert use(bucket, entry) == b"right"


def test_a_file_that_is_missing_in_the_bucket_is_missing(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"gone")
    del bucket.files[entry.path]
    with pytest.raises(FileNotFoundError):
        use(bucket, entry)
    assert copies(folder) == set()


def test_a_full_disk_names_the_option(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"x" * 35)
    for step in range(len(announced(lambda: use(bucket, bucket.add(b"y" * 35))))):
        with at_step(step, full_disk), pytest.raises(StorageError, match="No space left") as caught:
            use(bucket, entry)
        assert "--cache-dir" in caught.value.advice
        assert entry.sha256 not in copies(folder)
    assert use(bucket, entry) == b"x" * 35


def test_a_cache_that_cannot_be_a_folder_names_the_option(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path / "file"))
    assert cached(bucket).names() == []
    with pytest.raises(StorageError, match="Not a directory") as caught:
        use(bucket, bucket.add(b"x"))
    assert "--cache-dir" in caught.value.advice


@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=8),
    budget=st.integers(40, 100),
    accesses=st.lists(st.integers(0, 7), max_size=30),
)
def test_those_used_least_recently_are_evicted(sizes: list[int], budget: int, accesses: list[int]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETROTOOL_CACHE", folder)
        patch.setenv("RETROTOOL_CACHE_SIZE", str(budget))
        bucket, kept = Bucket(), OrderedDict[str, int]()
        entries = [bucket.add(bytes([number]) * size) for number, size in enumerate(sizes)]
        for entry in (entries[number % len(entries)] for number in accesses):
            use(bucket, entry)
            if entry.sha256 not in kept:
                while sum(kept.values()) + entry.bytes > budget:
                    kept.popitem(last=False)
            kept[entry.sha256] = entry.bytes
            kept.move_to_end(entry.sha256)
            assert copies(Path(folder) / "files") == set(kept)
            assert cache.usage() == (sum(kept.values()), budget)


def test_the_budget_is_for_all_stores(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "100")
    first, second = bucket.add(b"a" * 60), bucket.add(b"b" * 60)
    with cached(bucket, OTHER_UUID).file(first):
        pass
    use(bucket, second)
    assert copies(folder) == {second.sha256}


def test_by_default_there_may_be_half_of_what_is_free_without_copies(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETROTOOL_CACHE_SIZE")
    free = [1000]
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    assert cache.usage() == (0, 500)
    use(bucket, bucket.add(b"x" * 100))
    free[0] -= 100
    assert cache.usage() == (100, 500)


def test_what_is_mapped_is_not_evicted(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "100")
    first, second, third = (bucket.add(letter * 40) for letter in (b"a", b"b", b"c"))
    with cached(bucket).file(first) as path, path.open("rb") as file:
        cache.pin(file)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    use(bucket, second)
    use(bucket, third)
    assert copies(folder) == {first.sha256, third.sha256}, "a map pins its file, though the file object is closed"
    mapped.close()
    use(bucket, second)
    assert copies(folder) == {second.sha256, third.sha256}


def test_copies_in_use_that_leave_no_room_are_an_error(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "100")
    first, second = bucket.add(b"a" * 60), bucket.add(b"b" * 60)
    with cached(bucket).file(first):
        with pytest.raises(StorageError, match="in use") as caught:
            use(bucket, second)
        assert copies(folder) == {first.sha256}
    assert "--cache-size" in caught.value.advice
    assert use(bucket, second) == b"b" * 60


def test_what_is_copied_ahead_evicts_nothing_that_was_used_just_now(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "100")
    first, second = bucket.add(b"a" * 60), bucket.add(b"b" * 60)
    use(bucket, first)
    with pytest.raises(StorageError):
        use(bucket, second, needed=False)
    (copy,) = (folder / UUID).iterdir()
    os.utime(copy, (time.time() - 120,) * 2)
    assert use(bucket, second, needed=False) == b"b" * 60
    assert copies(folder) == {second.sha256}


def test_files_that_can_never_be_mapped_together_are_refused(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "3MB")
    entries = [FileEntry("index/main/a.faiss", "", 1, 2_000_000, letter * 64) for letter in "ab"]
    cached(bucket).check_room([entries[0], entries[0]], "the index")
    with pytest.raises(UsageError, match=r"the index needs 4 MB in the cache .*, which may have 3 MB") as caught:
        cached(bucket).check_room(entries, "the index")
    assert all(option in caught.value.advice for option in ("--cache-size", "--cache-dir"))


def test_copies_that_are_not_live_are_removed(bucket: Bucket, folder: Path) -> None:
    entries = [bucket.add(letter) for letter in (b"a", b"b")]
    for entry in entries:
        use(bucket, entry)
    own = cached(bucket)
    with own.file(entries[0]) as path, path.open("rb") as file:
        own.remove_others(own.names(), {entries[1].sha256})
        assert copies(folder) == {entries[1].sha256}, "although it is in use"
        assert file.read() == b"a"


Child = Callable[[float], int]


@pytest.fixture
def child(tmp_path: Path, folder: Path) -> Iterator[Child]:
    """Fork processes that use the file with ``shared bytes``, which takes them some seconds a block to read."""
    begun: list[int] = []

    def start(seconds: float) -> int:
        begun.append(fork(lambda: use_slowly(tmp_path / "log", seconds)))
        return begun[-1]

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def use_slowly(log: Path, seconds: float) -> None:
    bucket = Bucket()
    entry, blocks = bucket.add(b"shared bytes"), bucket.blocks

    def slow(path: str) -> Iterator[bytes]:
        with log.open("a") as file:
            file.write("begun\n")
        for block in blocks(path):
            yield block
            time.sleep(seconds)

    bucket.blocks = slow  # type: ignore[method-assign]
    assert use(bucket, entry) == b"shared bytes"


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def test_of_several_processes_one_reads_the_file(child: Child, tmp_path: Path) -> None:
    processes = [child(0.1) for _ in range(3)]
    assert [exit_code(process) for process in processes] == [0] * 3
    assert (tmp_path / "log").read_text() == "begun\n"


def test_when_a_process_is_killed_another_takes_over(child: Child, tmp_path: Path, folder: Path) -> None:
    first = child(3600)
    wait_for(tmp_path / "log")
    second = child(0)
    time.sleep(0.2)
    assert os.waitpid(second, os.WNOHANG) == (0, 0), "it waits"
    os.kill(first, signal.SIGKILL)
    assert exit_code(second) == 0
    assert (tmp_path / "log").read_text() == "begun\nbegun\n"
    assert [path.suffix for path in folder.glob("*/*")] == [".npy"]


def test_what_a_killed_process_left_is_removed_by_the_next_that_copies(
    child: Child, tmp_path: Path, folder: Path, bucket: Bucket
) -> None:
    entry, writing = bucket.add(b"another"), bucket.add(b"shared bytes")
    process = child(3600)
    wait_for(tmp_path / "log")
    use(bucket, entry)
    assert copies(folder) == {entry.sha256, writing.sha256}, "it is being written"
    assert cache.usage()[0] == entry.bytes + writing.bytes, "and counts with its whole size"
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    use(bucket, bucket.add(b"one more"))
    assert writing.sha256 not in copies(folder)


def test_a_kill_at_any_moment_leaves_nothing_wrong(bucket: Bucket, folder: Path) -> None:
    entry = bucket.add(b"some bytes" * 3)
    for step in range(len(announced(lambda: use(bucket, bucket.add(b"other text" * 3))))):

        def action(step: int = step) -> None:
            with at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                use(bucket, entry)

        assert exit_code(fork(action)) == -signal.SIGKILL
        assert use(bucket, entry) == b"some bytes" * 3
        assert {path.suffix for path in folder.glob("*/*")} == {".npy"}
        cached(bucket).remove_others(cached(bucket).names(), ())


def test_many_at_once_get_the_right_bytes_within_the_budget(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread holds one copy at a time, so that there is room for another one."""
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "1000")
    entries = [bucket.add(bytes([number]) * 100) for number in range(20)]

    def work(seed: int) -> int:
        most = 0
        for entry in random.Random(seed).choices(entries, k=100):
            assert use(bucket, entry) == bucket.files[entry.path]
            with (folder / "lock").open("ab") as lock:  # or it would count files that come and go
                fcntl.flock(lock, fcntl.LOCK_EX)
                most = max(most, cache.usage()[0])
        return most

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) <= 1000
    assert len(bucket.reads) > len(entries), "some were evicted and copied again"
