"""Damage to any file of a store is found by ``verify``, which names the file and never shows a traceback."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from retrotool import commands
from retrotool.errors import CorruptError, RetrotoolError, StoreNotFoundError

KINDS = {
    "documents": "documents/*",
    "keys": "keys/*",
    "chunks": "chunks/*",
    "embeddings": "embeddings/*/*",
    "trained": "index/*/trained-*",
    "shard": "index/*/shard-*",
    "recall": "index/*/recall-*",
    "neighbours": "neighbours/*/*",
    "tombstones": "tombstones/*",
    "blocked": "blocked/*",
    "inputs": "inputs/*",
    "selectors": "selectors/*",
    "tokenizer": "tokenizer-*",
    "store.json": "store.json",
    "log": "log/*",
}
FLIPS = 4
PURGED = (5, 6, 7, 1 << 32 | 4)

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def purged_store(built_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``built_store`` after a purge, with a checkpoint."""
    folder = tmp_path_factory.mktemp("purged")
    ids = folder / "ids"
    ids.write_text("".join(f"{i}\n" for i in PURGED))
    store = shutil.copytree(built_store, folder / "store")
    with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1):
        commands.purge(store, "ids", str(ids), reason="test")
    assert commands.verify(store).problems == []
    return store


@pytest.fixture
def store(purged_store: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged; without checkpoints, which would only be passed over."""
    copy = Path(shutil.copytree(purged_store, tmp_path / "store"))
    shutil.rmtree(copy / "checkpoints")
    return copy


def pick(store: Path, kind: str, draw: random.Random) -> Path:
    """A file of a kind."""
    return draw.choice(sorted(store.glob(KINDS[kind])))


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def problems(store: Path) -> list[str]:
    """What ``verify`` reports, or the error with which the store refuses to open."""
    try:
        return commands.verify(store).problems
    except CorruptError as error:
        return [str(error)]


def assert_found(store: Path, path: Path) -> None:
    """A problem names the file; for an entry of the log, any problem will do: it tells of files, and of its parent."""
    found = problems(store)
    name = "" if path.parent.name == "log" else path.relative_to(store).as_posix()
    assert any(name in problem for problem in found), found


@every_kind
@pytest.mark.parametrize("number", range(FLIPS))
def test_a_flipped_bit_is_found(store: Path, kind: str, number: int) -> None:
    draw = random.Random(f"{kind} {number}")
    path = pick(store, kind, draw)
    flip(path, draw)
    assert_found(store, path)


def keep(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


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
    path = sorted(store.glob(KINDS[kind]))[0]  # no log can tell that its newest entry is gone
    path.unlink()
    assert_found(store, path)


def test_without_its_identity_it_is_no_store(store: Path) -> None:
    (store / "store.json").unlink()
    with pytest.raises(StoreNotFoundError):
        commands.verify(store)


@pytest.mark.parametrize("kind", [kind for kind, pattern in KINDS.items() if "*" in pattern and kind != "tokenizer"])
def test_swapped_files_are_found(store: Path, kind: str) -> None:
    files = sorted(store.glob(KINDS[kind]))
    other = next((path for path in files if path != files[0]), None) or sorted(store.glob("chunks/*"))[0]
    data = files[0].read_bytes()
    files[0].write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert_found(store, files[0])


def test_every_damage_is_reported_at_once(store: Path) -> None:
    draw = random.Random(0)
    damaged = [pick(store, kind, draw) for kind in KINDS if kind not in ("log", "store.json")]
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
    for _ in range(6):
        flip(path, draw)
        try:
            assert commands.verify(store).problems
        except RetrotoolError as error:
            assert error.exit_code in (10, 12), error
        path.write_bytes(good)
    assert commands.verify(store).problems == []


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_in_the_header_of_embeddings_makes_verify_stumble(store: Path, bit: int) -> None:
    # A NumPy header is a Python expression; what is wrong with it can be wrong in many ways.
    path = sorted(store.glob(KINDS["embeddings"]))[0]
    good = path.read_bytes()
    for place in range(bit, 128, 8):
        data = bytearray(good)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        assert_found(store, path)


def test_damage_to_a_checkpoint_is_none_to_the_store(purged_store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(purged_store, tmp_path / "store"))
    checkpoints = list((copy / "checkpoints").iterdir())
    assert checkpoints
    for path in checkpoints:
        flip(path, random.Random(0))
    found, before = commands.verify(copy), commands.verify(purged_store)
    assert found == before
    assert found.ok
