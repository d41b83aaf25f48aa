"""What every storage promises, on a local disk, in memory and in a bucket: the same calls, the same answers."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import buckets
import pytest
from faulty_proxy import KINDS, set_fault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_storage import MemoryStorage, memory_server
from stored import file_sha256

from retrotool.errors import CorruptError
from retrotool.store import object_storage
from retrotool.store.local_storage import LocalStorage
from retrotool.store.storage import PART_BYTES, Sink, Storage, Unfinished, storage_at

pytestmark = pytest.mark.sends_requests

RUN, OTHER = "0123abcd", "4567abcd"
PATH = "tombstones/a-0123abcd00000000.parquet"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with memory_server(tmp_path_factory.mktemp("memory")):
        yield


@pytest.fixture(scope="module", params=["disk", "memory", "localbucket", "moto"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: None) -> Iterator[str]:
    if request.param in ("disk", "memory"):
        yield request.param
        return
    folder = tmp_path_factory.mktemp("buckets")
    server = buckets.local_bucket(folder) if request.param == "localbucket" else buckets.moto()
    with server as address, buckets.settings_of(address):
        yield request.param


@pytest.fixture
def storage(kind: str, tmp_path: Path) -> Storage:
    places = {"disk": tmp_path / "store", "memory": f"memory://{tmp_path.name}"}
    return storage_at(places.get(kind, f"s3://{buckets.BUCKET}/a folder/{tmp_path.name}"))


def writing(*pieces: bytes) -> Callable[[Sink], int]:
    def write(sink: Sink) -> int:
        for piece in pieces:
            sink.write(piece)
            sink.sync()
        return len(pieces)

    return write


def paths(storage: Storage, prefix: str = "", after: str = "") -> list[str]:
    return [info.path for info in storage.list(prefix, after)]


def test_what_is_put_can_be_read_in_every_way(storage: Storage) -> None:
    sink, pieces = storage.put(PATH, RUN, writing(b"one ", b"", b"two"))
    assert (pieces, sink.size, sink.sha256) == (3, 7, hashlib.sha256(b"one two").hexdigest())
    assert storage.get(PATH) == b"one two"
    assert storage.get_range(PATH, 2, 3) == b"e t"
    assert storage.get_range(PATH, 5, 100) == b"wo"
    with storage.open(PATH, 7) as file:
        file.seek(4)
        assert (file.read(), file.size()) == (b"two", 7)
    assert (path := storage.local(PATH)) is None or path.read_bytes() == b"one two"
    assert b"".join(storage.blocks(PATH)) == b"one two"
    assert file_sha256(storage, PATH) == sink.sha256
    info = storage.stat(PATH)
    assert info is not None
    assert (info.path, info.size) == (PATH, 7)


def test_what_is_not_there(storage: Storage) -> None:
    assert storage.stat(PATH) is None
    assert paths(storage) == []
    readers = (
        storage.get,
        lambda path: storage.open(path, 1),
        lambda path: storage.get_range(path, 0, 1),
        lambda path: [*storage.blocks(path)],
    )
    for read in readers:
        with pytest.raises(FileNotFoundError):
            read(PATH)
    with pytest.raises(FileNotFoundError):
        storage.get_range(PATH, 0, 1)
    storage.delete([PATH])


def test_a_path_is_written_once(storage: Storage) -> None:
    storage.put(PATH, RUN, writing(b"one"))
    with pytest.raises(FileExistsError):
        storage.put(PATH, RUN, writing(b"two"))
    assert not storage.put_if_absent(PATH, RUN, b"two")
    assert storage.put_if_absent(PATH, RUN, b"one"), "as after an answer that was lost"
    assert storage.get(PATH) == b"one"


def test_a_long_listing_has_each_file_once_and_in_order(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "_PAGE", 50)
    names = [f"staging/{number:032x}.json" for number in range(125)]  # more than a page of the storage in memory
    for name in reversed(names):
        storage.put_if_absent(name, RUN, b"{}")
    assert [info.path for info in storage.list("staging/")] == names
    assert [info.path for info in storage.list("staging/", names[49])] == names[50:]


def test_of_many_that_put_at_once_one_wins(storage: Storage) -> None:
    won: list[int] = []

    def put(number: int) -> None:
        if storage.put_if_absent("log/00000000.json", RUN, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [storage.get("log/00000000.json")]
    assert list(storage.unfinished()) == []


def test_what_is_overwritten_has_a_new_tag_and_no_earlier_time(storage: Storage) -> None:
    first = storage.overwrite("leases/run-0123abcd", RUN, b"one")
    second = storage.overwrite("leases/run-0123abcd", RUN, b"two")
    assert storage.get("leases/run-0123abcd") == b"two"
    assert second.modified >= first.modified
    assert second.tag != first.tag
    found = storage.stat("leases/run-0123abcd")
    assert found is not None
    assert (found.tag, found.modified) == (second.tag, second.modified)
    assert storage.overwrite("leases/run-0123abcd", RUN, b"two").modified >= second.modified


def test_after_an_error_there_is_nothing(storage: Storage) -> None:
    def fail(sink: Sink) -> None:
        sink.write(b"half")
        sink.sync()
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        storage.put(PATH, RUN, fail)
    assert storage.stat(PATH) is None
    assert list(storage.unfinished()) == []
    assert paths(storage) == []


def test_a_write_that_is_dropped_fails_and_leaves_nothing(kind: str, storage: Storage) -> None:
    if kind == "localbucket":
        pytest.skip("the server does not list uploads")
    half = b"half" * (PART_BYTES // 4 + 1)  # a bucket has something unfinished only of a large file
    seen: list[Unfinished] = []

    def write(sink: Sink) -> None:
        sink.write(half)
        sink.sync()
        seen.extend(storage.unfinished())
        assert paths(storage) == [], "it is not there before it is whole"
        storage.drop(seen)

    with pytest.raises(FileNotFoundError):
        storage.put(PATH, RUN, write)
    assert [(one.run, one.size) for one in seen] == [(RUN, 0 if kind == "moto" else len(half))]
    assert storage.stat(PATH) is None
    assert list(storage.unfinished()) == []
    storage.drop(seen)


def test_what_is_deleted_is_gone_and_may_be_deleted_again(storage: Storage) -> None:
    for slot in "abc":
        storage.put_if_absent(f"inputs/{slot}", RUN, b"data")
    storage.delete(["inputs/a", "inputs/c", "inputs/d"])
    storage.delete(iter(["inputs/a"]))
    assert paths(storage) == ["inputs/b"]


NAMES = st.lists(st.sampled_from("ab-.0/"), min_size=1, max_size=6).map("".join).filter(
    lambda name: all(piece and piece[0] not in "-." for piece in name.split("/"))
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
@given(names=st.sets(NAMES, max_size=12), prefix=st.sampled_from(["", "a", "a/", "a-", "b/a"]), after=NAMES)
def test_a_listing_is_in_the_order_of_paths(storage: Storage, names: set[str], prefix: str, after: str) -> None:
    storage = storage_at(f"{storage.place}/{secrets.token_hex(8)}")
    # On a disk a name can't be a folder and a file.
    names = {name for name in names if not any(other.startswith(name + "/") for other in names)}
    kept = sorted(f"plans/{name}" for name in names)
    for path in kept:
        storage.put_if_absent(path, RUN, path.encode())
    found = list(storage.list(f"plans/{prefix}", f"plans/{after}"))
    due = [path for path in kept if path.startswith(f"plans/{prefix}") and path > f"plans/{after}"]
    assert [info.path for info in found] == due
    assert [info.size for info in found] == [len(path) for path in due]
    assert paths(storage) == kept


def test_it_is_the_same_in_another_process(storage: Storage) -> None:
    storage.put(PATH, RUN, writing(b"data"))
    again = pickle.loads(pickle.dumps(storage))
    assert again.get(PATH) == b"data"
    assert (again.uri, again.place) == (storage.uri, storage.place)


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", "", "a//b", "log/.hidden"])
def test_no_path_leads_out_of_a_folder(tmp_path: Path, path: str) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    calls: list[Callable[[str], object]] = [
        storage.get,
        storage.local,
        lambda path: storage.open(path, 1),
        storage.stat,
        lambda path: storage.delete([path]),
        functools.partial(storage.put, run=RUN, write=writing(b"data")),
        lambda path: storage.put_if_absent(path, RUN, b""),
        lambda path: storage.overwrite(path, RUN, b""),
    ]
    for call in calls:
        with pytest.raises(CorruptError, match="leads out"):
            call(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.on_disk  # it is about which place is a folder
def test_a_place_is_a_path_or_what_its_scheme_says(tmp_path: Path) -> None:
    assert isinstance(storage_at(tmp_path), LocalStorage)
    assert isinstance(storage_at("folder/a:b"), LocalStorage)
    assert isinstance(storage_at("memory://name"), MemoryStorage)
    storage = storage_at(tmp_path)
    assert storage_at(storage) is storage


def test_large_pieces_pass_whole(storage: Storage) -> None:
    pieces = [random.Random(i).randbytes(size) for i, size in enumerate((1, 1 << 20, 3_000_001, 0, 17))]
    sink, _ = storage.put(PATH, RUN, writing(*pieces))
    assert storage.get(PATH) == b"".join(pieces)
    assert sink.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.mark.on_disk
@pytest.mark.parametrize("kind", ["localbucket"], indirect=True)
def test_an_upload_in_parts_survives_every_fault(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = 5 << 20  # bytes of a part in S3
    monkeypatch.setattr(object_storage, "PART_BYTES", least)
    data = random.Random(0).randbytes(least + 1)
    with buckets.faulty(os.environ["AWS_ENDPOINT_URL"]) as proxy, monkeypatch.context() as patch, buckets.short_waits():
        patch.setenv("AWS_ENDPOINT_URL", proxy)
        storage = storage_at(f"s3://{buckets.BUCKET}/parts {tmp_path.name}")
        storage.put(f"plans/whole-{RUN}00000000.json", RUN, writing(data))
        requests, _ = set_fault(proxy)
        assert requests >= 4, "it begins, sends two parts and ends"
        for fault in ("503", "late 500", "cut", "refuse"):
            for at in range(1, requests + 1):
                path = f"plans/{at}-{RUN}{KINDS.index(fault):08d}.json"
                set_fault(proxy, fault, at)
                sink, _ = storage.put(path, RUN, writing(data))
                assert set_fault(proxy)[1], "the fault was due"
                assert file_sha256(storage, path) == sink.sha256 == hashlib.sha256(data).hexdigest(), (fault, at)
                storage.delete([path])
