"""One flipped bit, or one cut, in any file of a store: ``verify`` finds it, and commands do right or refuse.

Every kind of file is damaged some times at a place drawn at random; RETROTOOL_DAMAGES sets how many times and
RETROTOOL_SEED which places (``make torture``: as many as kills). Each time

* ``verify`` ends with exit code 12 and names the file, but for kinds that are harmless by design (``HARMLESS``),
  at which nothing else stops either;
* commands that read give what they gave before, or end with exit code 12 and a message: never another row;
* of every second damage, a command that writes does its work or ends with exit code 12. Whichever it does, once the
  file has its bytes back the store is whole, and what the command made is what it makes of an undamaged store.

What was tried, and what came of it, is printed: pytest -rP.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Shared, times
from damage_help import (
    HARMLESS,
    KINDS,
    Everything,
    Refused,
    make_everything,
    reads,
    run_command,
    writes,
)

from retrotool import api
from retrotool.errors import RetrotoolError

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]  # it is a disk that damages files

DAMAGES = int(os.environ.get("RETROTOOL_DAMAGES", times(2, 8)))
SEED = int(os.environ.get("RETROTOOL_SEED", "2026"))
CORRUPT = 12
DIGESTS = ("content", "ids", "tombstones", "embeddings", "neighbours", "materialised", "documents", "chunks")
AGAIN = ("staging", "staged files")
"""Kinds of which a damage costs a task that was finished: it is done again."""


@pytest.fixture(scope="module")
def made(shared: Shared[Everything], tiny_encoder: Path) -> Everything:
    return shared("everything", lambda root: make_everything(root, tiny_encoder))


@dataclass
class Bench:
    """A store that is damaged and made good again, and what is expected of it."""

    made: Everything
    folder: Path
    _read: dict[str, object] = field(default_factory=dict)
    _written: dict[tuple[str, bool], tuple[object, ...]] = field(default_factory=dict)

    def copy(self) -> Path:
        return Path(shutil.copytree(self.made.store, Path(tempfile.mkdtemp(dir=self.folder)) / "store"))

    def read(self, name: str) -> object:
        """What a command that reads gives of the whole store."""
        if name not in self._read:
            self._read[name] = reads(self.made, self.folder)[name]()
        return self._read[name]

    def written(self, name: str, *, again: bool) -> tuple[object, ...]:
        """What a command that writes makes of the whole store."""
        if (name, again) not in self._written:
            store = self.copy()
            run_command(*writes(self.made, store)[name])
            self._written[name, again] = self.digests(store, again=again)
            shutil.rmtree(store.parent)
        return self._written[name, again]

    def digests(self, store: Path, *, again: bool) -> tuple[object, ...]:
        if again:
            run_command("embed", store, "--encoder", self.made.encoder, "--devices", "cpu", "--name", "again")
        found = api.verify(store)
        assert found.problems == []
        return tuple(getattr(found, name) for name in DIGESTS)


@pytest.fixture(scope="module")
def bench(made: Everything, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tests of one process share a copy, each leaves it as it was."""
    folder = tmp_path_factory.mktemp("bench")
    store = Path(shutil.copytree(made.store, folder / "store"))
    return Bench(Everything(store, made.inputs, made.encoder, made.purges), folder)


def damage(good: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A flipped bit, or, one time in three, what is before a cut."""
    place = draw.randrange(len(good))
    if draw.random() < 1 / 3:
        return f"cut at {place:,} of {len(good):,}", good[:place]
    bit = draw.randrange(8)
    return f"bit {bit} of byte {place:,} of {len(good):,}", good[:place] + bytes([good[place] ^ 1 << bit]) + good[
        place + 1 :
    ]


def refused(action: Callable[[], object]) -> tuple[bool, object]:
    """Whether a command refused to go on with a store that is damaged, as it must; and what it gave if it did not."""
    try:
        return False, action()
    except Refused as error:
        assert error.code == CORRUPT, error
        assert "error" in error.printed or "FAILED: " in error.printed
        assert "Traceback" not in error.printed
    except RetrotoolError as error:
        assert error.exit_code == CORRUPT, error
    return True, None


def found_by_verify(store: Path, path: Path, kind: str) -> bool:
    """Whether ``verify`` ends with an error, and names the file; of the log it may name the entry behind."""
    try:
        run_command("verify", store)
    except Refused as error:
        assert error.code == CORRUPT, error
        assert "Traceback" not in error.printed
        assert kind == "log" or path.relative_to(store).as_posix() in error.printed, error
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_found_and_never_read_as_something_else(bench: Bench, kind: str) -> None:
    store, draw = bench.made.store, random.Random(f"{SEED} {kind}")
    counts: Counter[str] = Counter()
    for number in range(DAMAGES):
        path = draw.choice(sorted(store.glob(KINDS[kind])))
        good = path.read_bytes()
        what, bad = damage(good, draw)
        where = f"{path.relative_to(store)}, {what}"
        some = draw.sample(sorted(reads(bench.made, bench.folder)), 3)
        expected = {name: bench.read(name) for name in some}
        path.write_bytes(bad)
        try:
            found = found_by_verify(store, path, kind)
            assert found or kind in HARMLESS, f"{where}: verify did not find it"
            counts["cuts" if "cut" in what else "flips"] += 1
            counts["found"] += found
            for name in some:
                stopped, given = refused(reads(bench.made, bench.folder)[name])
                assert stopped or given == expected[name], f"{where}: {name} gives something else"
                assert not (stopped and kind in HARMLESS), f"{where}: {name} stops at it"
                counts["refused" if stopped else "same"] += 1
            copy = bench.copy() if number % 2 == 0 else None
        finally:
            path.write_bytes(good)
        if copy is not None:
            name = draw.choice(sorted(writes(bench.made, copy)))
            write(bench, copy, copy / path.relative_to(store), good, kind, name, f"{where}: {name}", counts)
    print(f"{kind}: {', '.join(f'{counts[name]:,} {name}' for name in COUNTED)}")


COUNTED = ("flips", "cuts", "found", "same", "refused", "made", "not made")


def write(
    bench: Bench, store: Path, path: Path, good: bytes, kind: str, name: str, where: str, counts: Counter[str]
) -> None:
    """Do a command that writes to a damaged copy; make the damage good, and compare."""
    again = kind in AGAIN or name == "repair"  # which commits what is staged only if there is something to repair
    expected = bench.written(name, again=again)
    stopped, _ = refused(lambda: run_command(*writes(bench.made, store)[name]))
    # What a task has staged may be committed by the command, which then reads it like any other file.
    assert not (stopped and kind in HARMLESS and kind != "staged files"), f"{where} stops at it"
    counts["not made" if stopped else "made"] += 1
    if path.exists():
        path.write_bytes(good)
    if stopped:
        assert api.verify(store).problems == [], where
        run_command(*writes(bench.made, store)[name])
    found = bench.digests(store, again=again)
    if name == "repair" and kind.startswith("neighbours"):  # a table that is made again lacks what was purged since
        found, expected = (
            tuple(one for one, of in zip(some, DIGESTS, strict=True) if of not in ("neighbours", "materialised"))
            for some in (found, expected)
        )
    assert found == expected, where
    shutil.rmtree(store.parent)
