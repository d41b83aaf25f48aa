"""Damage to any file of a store is found by ``verify``, which names the file and never shows a traceback."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from conftest import times
from stored import copy_store, path_in_store, remove_stored, stored_file, stored_files

from retrotool import api
from retrotool.app import app
from retrotool.errors import CorruptError, ErasedError, RetrotoolError, StoreNotFoundError
from retrotool.info import verify as verifying

KINDS = {
    "documents": "documents/*",
    "chunks": "chunks/*",
    "embeddings": "embeddings/*/*.npy",
    "trained": "index/*/trained-*.faiss",
    "shard": "index/*/shard-*.faiss",
    "recall": "index/*/recall-*",
    "sums of embeddings": "embeddings/*/*.npy.xxh3",
    "sums of an index": "index/*/*.faiss.xxh3",
    "neighbours": "neighbours/*/*",
    "tombstones": "tombstones/*",
    "blocked": "blocked/*",
    "inputs": "inputs/*",
    "selectors": "selectors/*",
    "tokenizer": "tokenizer-*",
    "store.json": "store.json",
    "log": "log/*",
}
SUMS = ("sums of embeddings", "sums of an index")
FLIPS = times(2, 8)
PURGED = (5, 6, 7, 1 << 32 | 4)

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def purged_store(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``built_store`` after a purge, with a checkpoint."""
    folder = tmp_path_factory.mktemp("purged")
    ids = folder / "ids"
    ids.write_text("".join(f"{i}\n" for i in PURGED))
    store = copy_store(built_store, folder / "store")
    with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1):
        api.purge(store, api.Selectors(chunk=Path(ids)), reason="test")
    assert api.verify(store).problems == []
    return store


@pytest.fixture
def store(purged_store: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; without checkpoints, which would only be passed over."""
    copy = copy_store(purged_store, tmp_path / "store")
    remove_stored(copy, "checkpoints/*")
    return copy


def pick(store: Path, kind: str, draw: random.Random) -> Path:
    """A file of a kind."""
    return draw.choice(stored_files(store, KINDS[kind]))


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def problems(store: Path) -> list[str]:
    """What ``verify`` reports, or the error with which the store refuses to open."""
    try:
        return [problem.text for problem in api.verify(store).problems]
    except CorruptError as error:
        return [str(error)]


def assert_found(store: Path, path: Path) -> None:
    """A problem names the file; for an entry of the log, any problem will do: it names files, and its parent."""
    found = problems(store)
    name = path_in_store(store, path)
    assert any(name.startswith("log/") or name in problem for problem in found), found


@every_kind
@pytest.mark.parametrize("number", range(FLIPS))
def test_a_flipped_bit_is_found(store: Path, kind: str, number: int) -> None:
    draw = random.Random(f"{kind} {number}")
    path = pick(store, kind, draw)
    flip(path, draw)
    assert_found(store, path)


def verify_by_jobs(store: Path) -> list[verifying.Verification]:
    """What three jobs of an array find; every file is a task of its own."""
    found = []
    try:
        with mock.patch.object(verifying, "_TASK_BYTES", 1):
            for job in range(3):
                api.use_engine(shard=(job, 3))
                found.append(api.verify(store))
    finally:
        api.use_engine()
    return found


def test_jobs_check_each_file_once(store: Path) -> None:
    for change in (None, lambda: api.erase(store), lambda: api.purge(store, api.Selectors(chunk="1:1"), reason="test")):
        if change is not None:
            change()
        whole, jobs = api.verify(store), verify_by_jobs(store)
        assert [job.problems for job in jobs] == [[], [], []]
        assert [job.shard for job in jobs] == ["0/3", "1/3", "2/3"]
        assert sum(job.files for job in jobs) == whole.files
        assert sum(job.bytes for job in jobs) == whole.bytes
        assert min(job.files for job in jobs) > 0
        assert not any(job.content or job.tombstones or job.indexes for job in jobs)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"store.json"}))
def test_a_flipped_bit_is_found_by_a_job(store: Path, kind: str) -> None:
    path = pick(store, kind, random.Random(kind))
    flip(path, random.Random(kind))
    name, found = (
        path_in_store(store, path),
        [problem.text for job in verify_by_jobs(store) for problem in job.problems],
    )
    assert any(name.startswith("log/") or name in problem for problem in found), found


def keep(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: size(path.stat().st_size)])


def append(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes() + data)


def fill(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@every_kind
@pytest.mark.parametrize(
    "damage",
    [
        keep(lambda _: 0),
        keep(lambda size: size // 2),
        keep(lambda size: size - 1),
        append(b"\n"),
        append(b"\0" * 4096),
        fill,
    ],
    ids=["emptied", "halved", "a byte shorter", "a byte longer", "a page longer", "zeroed"],
)
def test_a_file_that_is_not_what_it_was_is_found(store: Path, kind: str, damage: Callable[[Path], None]) -> None:
    path = pick(store, kind, random.Random(kind))
    damage(path)
    assert_found(store, path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "store.json"])
def test_a_file_that_is_gone_is_found(store: Path, kind: str) -> None:
    path = stored_files(store, KINDS[kind])[0]  # no log can tell that its newest entry is gone
    path.unlink()
    assert_found(store, path)


def test_without_its_identity_it_is_no_store(store: Path) -> None:
    stored_file(store, "store.json").unlink()
    with pytest.raises(StoreNotFoundError):
        api.verify(store)


@pytest.mark.parametrize("kind", [kind for kind, pattern in KINDS.items() if "*" in pattern and kind != "tokenizer"])
def test_swapped_files_are_found(store: Path, kind: str) -> None:
    files = stored_files(store, KINDS[kind])
    other = next((path for path in files if path != files[0]), None) or stored_files(store, "chunks/*")[0]
    data = files[0].read_bytes()
    files[0].write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert_found(store, files[0])


def test_every_damage_is_reported_at_once(store: Path) -> None:
    draw = random.Random(0)
    damaged = [pick(store, kind, draw) for kind in KINDS if kind not in ("log", "store.json", *SUMS)]
    # Of a file that is damaged itself nobody knows the sums.
    sums = [path for kind in SUMS for path in stored_files(store, KINDS[kind])]
    damaged.append(next(path for path in sums if path.with_name(path.name.rpartition(".")[0]) not in damaged))
    for path in damaged:
        flip(path, draw)
    for path in damaged:
        assert_found(store, path)


@every_kind
def test_the_command_line_tells_and_exits_with_12(store: Path, kind: str, cli: Callable) -> None:
    draw = random.Random(f"{kind} on the command line")
    path = pick(store, kind, draw)
    flip(path, draw)
    done = cli("verify", store)
    assert done.returncode == 12
    assert "Traceback" not in done.stdout + done.stderr
    assert problems(store)[0] in done.stdout + done.stderr


@every_kind
def test_no_flipped_bit_makes_verify_stumble(store: Path, kind: str) -> None:
    # Past the sums there are parsers, each with errors of its own: only ours may come out.
    draw = random.Random(f"{kind} parsed")
    path = pick(store, kind, draw)
    good = path.read_bytes()
    for _ in range(times(2, 20)):
        flip(path, draw)
        try:
            assert api.verify(store).problems
        except RetrotoolError as error:
            assert error.exit_code in (10, 12), error
        path.write_bytes(good)
    assert api.verify(store).problems == []


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_in_the_header_of_embeddings_makes_verify_stumble(store: Path, bit: int) -> None:
    # A NumPy header is a Python expression; what is wrong with it can be wrong in many ways.
    path = stored_files(store, KINDS["embeddings"])[0]
    good = path.read_bytes()
    for place in range(8 * (bit % times(4, 1)) + bit, 128, times(32, 8)):
        data = bytearray(good)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        assert_found(store, path)


def test_damage_to_a_checkpoint_is_none_to_the_store(purged_store: Path, tmp_path: Path) -> None:
    copy = copy_store(purged_store, tmp_path / "store")
    checkpoints = stored_files(copy, "checkpoints/*")
    assert checkpoints
    for path in checkpoints:
        flip(path, random.Random(0))
    found, before = api.verify(copy), api.verify(purged_store)
    assert found == before
    assert found.ok


def erase_when(monkeypatch: pytest.MonkeyPatch, store: Path, name: str, times: int) -> None:
    """Have another document erased before each of the first calls of a function of ``verify``."""
    original, erased = getattr(verifying, name), 0

    def called(*arguments: object) -> object:
        nonlocal erased
        if erased < times:
            erased += 1
            api.purge(store, api.Selectors(where=f"id = 'doc-{10 + erased}'"), reason="test", erase=True)
        return original(*arguments)

    monkeypatch.setattr(verifying, name, called)


@pytest.mark.parametrize("name", ["_check_log", "_do_step", "_check_part", "_digest_files"])
def test_an_erase_beside_it_is_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    erase_when(monkeypatch, store, name, 2)
    found = api.verify(store)
    monkeypatch.undo()
    assert found == api.verify(store)
    assert found.ok


def test_where_files_are_erased_all_the_time_nothing_is_said_of_the_store(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verifying, "retry_overtaken", functools.partial(verifying.retry_overtaken, attempts=4))
    erase_when(monkeypatch, store, "_do_step", 100)
    with pytest.raises(ErasedError, match=r"replaced|erased"):
        api.verify(store)
    with pytest.raises(SystemExit) as end:
        app(["verify", str(store), "--json"])
    assert end.value.code == 12
    assert set(json.loads(capsys.readouterr().out)) == {"error", "advice", "exit_code"}


def test_an_erase_beside_it_hides_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not in what the erase rewrites, or the erase would fail.
    path = stored_files(store, KINDS["inputs"])[0]
    flip(path, random.Random(0))
    erase_when(monkeypatch, store, "_do_step", 1)
    assert_found(store, path)


@pytest.mark.parametrize("kind", ["log", "store.json"])
def test_a_store_that_can_not_be_opened_is_not_well(store: Path, kind: str, cli: Callable) -> None:
    path = stored_files(store, KINDS[kind])[1 if kind == "log" else 0]
    path.write_text("{}")
    found = api.verify(store)
    assert (found.ok, found.content, len(found.problems)) == (False, "", 1)
    done = cli("verify", store, "--json")
    reported = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (12, "")
    problems = [asdict(problem) for problem in found.problems]
    assert (reported["ok"], reported["content"], reported["problems"]) == (False, "", problems)
    assert "FAILED: " in cli("verify", store).stdout


@pytest.mark.parametrize("selector", ["where", "pattern", "document"])
def test_a_purge_over_broken_files_says_so(store: Path, tmp_path: Path, selector: str) -> None:
    (tmp_path / "names").write_text("doc-3\n")
    kind = {"where": "documents", "pattern": "chunks", "document": "documents"}[selector]
    value = {"where": "source = 'a'", "pattern": "store", "document": tmp_path / "names"}[selector]
    path = stored_files(store, KINDS[kind])[0]
    fill(path)
    with pytest.raises(CorruptError, match=path.name):
        api.purge(store, api.Selectors(**{selector: value}, allow_lossy=True), reason="test")
