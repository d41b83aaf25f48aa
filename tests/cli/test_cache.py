"""Commands on a store in a bucket: they copy what they map, once, and keep to the size and folder that are given."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import buckets
import pytest
from conftest import make_rows, write_jsonl
from typer.testing import CliRunner, Result

from retrotool import RetroDataset
from retrotool.app import app
from retrotool.store.paths import PROBE, FileName
from retrotool.store.store import Store

pytestmark = [pytest.mark.sends_requests, pytest.mark.on_disk]  # the store is made in a folder, and copied

MAPPED = (".npy", ".faiss")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("served")
    with buckets.local_bucket(folder) as address, buckets.settings_of(address):
        yield folder / buckets.BUCKET


@pytest.fixture
def store(served: Path, built_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished store in a bucket; nothing is cached."""
    shutil.copytree(built_store, served / tmp_path.name)
    monkeypatch.setenv("RETROTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RETROTOOL_CACHE_SIZE", "1GB")
    monkeypatch.setenv("RETROTOOL_TRAFFIC", str(tmp_path / "traffic"))
    return f"s3://{buckets.BUCKET}/{tmp_path.name}"


@pytest.fixture
def downloads(tmp_path: Path) -> Callable[[], list[str]]:
    """Return the mapped files that were read since the last call."""

    def read() -> list[str]:
        lines = (tmp_path / "traffic").read_text().splitlines()
        (tmp_path / "traffic").write_text("")
        requests = [line.split()[:2] for line in lines]
        return [path for operation, path in requests if operation == "get" and path.endswith(MAPPED)]

    return read


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answers(store: Path | str, *options: object) -> list[tuple[int, str]]:
    done = run("search", store, "river stone", "--json", *options)
    assert done.exit_code == 0, done.stderr
    return [(one["id"], one["text"]) for one in json.loads(done.stdout)["results"]]


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("files/*/*"))


def test_a_search_copies_what_it_maps_once(
    store: str, built_store: Path, tmp_path: Path, downloads: Callable[[], list[str]]
) -> None:
    expected = answers(built_store)
    assert answers(store) == expected
    found = downloads()
    assert len(set(found)) == len(found) == len(copies(tmp_path / "cache"))
    assert {Path(path).suffix for path in found} == set(MAPPED)
    assert answers(store) == expected
    assert downloads() == []


def test_another_folder_has_its_own_copies(store: str, tmp_path: Path) -> None:
    answers(store, "--cache-dir", tmp_path / "other")
    assert not copies(tmp_path / "cache")
    assert copies(tmp_path / "other")


def test_an_index_that_does_not_fit_is_refused_before_anything_is_copied(store: str, tmp_path: Path) -> None:
    done = run("search", store, "river stone", "--cache-size", "4kB")
    assert done.exit_code == 2
    assert "which may have 4 kB" in done.stderr
    assert all(option in done.stderr for option in ("--cache-size", "--cache-dir"))
    assert not copies(tmp_path / "cache")


def test_a_size_that_is_none_is_a_usage_error() -> None:
    done = run("search", "store", "river stone", "--cache-size", "much")
    assert done.exit_code == 2
    assert "--cache-size much: not a size" in done.stderr


def test_exact_search_needs_room_for_a_few_parts_only(store: str, built_store: Path, tmp_path: Path) -> None:
    sizes = [entry.bytes for entry in Store.open(built_store).state.files() if entry.kind == "embeddings"]
    assert len(sizes) > 3
    done = run("neighbours", store, "--exact", "--name", "exact", "--cache-size", 3 * max(sizes))
    assert done.exit_code == 0, done.stderr
    assert sum(path.stat().st_size for path in copies(tmp_path / "cache")) <= 3 * max(sizes)


def test_after_an_erase_no_copy_has_what_it_removed(store: str, tmp_path: Path) -> None:
    answers(store)
    before = {path.stem for path in copies(tmp_path / "cache")}
    done = run("purge", store, "--where", "id = 'doc-3'", "--reason", "test", "--erase", "--yes")
    assert done.exit_code == 0, done.stderr
    live = {entry.sha256 for entry in Store.open(store).state.files()}
    after = {path.stem for path in copies(tmp_path / "cache")}
    assert after <= live
    assert before - live, "the erase replaced files that were copied"


def test_a_machine_that_only_reads_loses_its_copies_when_it_opens_the_store(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(store)
    with monkeypatch.context() as other:
        other.setenv("RETROTOOL_CACHE", str(tmp_path / "other"))
        assert run("purge", store, "--where", "id = 'doc-3'", "--reason", "test", "--erase", "--yes").exit_code == 0
    live = {entry.sha256 for entry in Store.open(store).state.files()}
    assert {path.stem for path in copies(tmp_path / "cache")} <= live


def test_a_store_can_be_created_where_a_killed_command_has_left_its_probe(served: Path, tmp_path: Path) -> None:
    """The first request of a new store tests the server, and the next removes that file."""
    place = served / tmp_path.name
    (place / "plans").mkdir(parents=True)
    (place / "plans" / FileName.new("0a1b2c3d", "plans", PROBE, "bin").path.rpartition("/")[2]).write_bytes(b"first")
    file = write_jsonl(tmp_path / "new.jsonl", make_rows(2))
    done = run("chunk", f"s3://{buckets.BUCKET}/{tmp_path.name}", file)
    assert done.exit_code == 0, done.stderr
    assert not list(place.glob(f"plans/{PROBE}-*"))


def test_a_copy_that_rotted_is_an_error_once(store: str, tmp_path: Path) -> None:
    expected = answers(store, "-k", 100)
    for copy in copies(tmp_path / "cache"):
        data = bytearray(copy.read_bytes())
        data[len(data) // 2] ^= 1
        copy.write_bytes(data)
        done = run("search", store, "river stone", "-k", 100)
        assert done.exit_code == 12, (copy, done.stderr)
        assert f"{copy}, a copy that is now removed: the block at byte" in done.stderr
        assert not copy.exists()
        assert answers(store, "-k", 100) == expected


def test_a_file_that_is_damaged_in_the_bucket_is_named(store: str, served: Path, tmp_path: Path) -> None:
    shard = next(entry for entry in Store.open(store).state.files() if entry.kind == "index" and entry.rows > 1)
    file = served / tmp_path.name / shard.path
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    done = run("search", store, "river stone")
    assert done.exit_code == 12
    assert f"{store}/{shard.path}: its SHA-256 is not what the log says" in done.stderr
    assert "retrotool verify" in done.stderr


def test_doctor_says_where_the_cache_is_and_how_large(store: str, tmp_path: Path) -> None:
    answers(store)
    held = sum(path.stat().st_size for path in copies(tmp_path / "cache"))
    checks = {check["name"]: check["found"] for check in json.loads(run("doctor", "--json").stdout)["checks"]}
    assert checks["cache"] == f"{tmp_path}/cache: {held / 1000:.1f} kB of at most 1.0 GB copied from buckets"


def test_files_are_copied_while_those_before_are_in_use(store: str, tmp_path: Path, served: Path) -> None:
    opened = Store.open(store)
    entries = [entry for entry in opened.state.files() if entry.kind == "embeddings"]
    (served / tmp_path.name / entries[1].path).unlink()
    reading = iter(opened.copied_ahead(entries, lambda entry: entry))
    assert next(reading) == entries[0]
    copied = [path.stem for path in copies(tmp_path / "cache")]
    assert entries[0].sha256 in copied
    while entries[2].sha256 not in [path.stem for path in copies(tmp_path / "cache")]:
        time.sleep(0.02)
    assert list(reading) == entries[1:], "the reader of the missing file says what is wrong"


@pytest.mark.parametrize("packed", [True, False])
def test_training_reads_the_same_from_a_bucket(store: str, built_store: Path, tmp_path: Path, packed: bool) -> None:
    there, here = (
        list(RetroDataset(place, sequence_length=256, batch_size=4, packed=packed)) for place in (store, built_store)
    )
    assert len(there) == len(here) > 1
    for one, other in zip(there, here, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one)
    assert not copies(tmp_path / "cache"), "Parquet files are read in place"


def test_measuring_an_index_that_does_not_fit_is_refused_before_it_is_built(store: str, tmp_path: Path) -> None:
    done = run("index", store, "--name", "another", "--cache-size", "4kB")
    assert done.exit_code == 2
    assert "which may have 4 kB" in done.stderr
    assert Store.open(store).state.names("index") == ["main"]
