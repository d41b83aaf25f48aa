"""Clocks that jump by two hours while two commands write: nothing is deleted, nothing lost, the digests are the same.

One command stands still at a step drawn at random and seems to be one of another machine, of which only silence can be
seen. Then a clock jumps, the other command runs, and the first goes on. The clock is that of the machine of either, or
that of the storage: of a folder, by the times of the leases; in memory, by its own. RETROTOOL_KILLS sets how often and
RETROTOOL_SEED where, as for the kills beside.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import make_rows, write_jsonl
from memory_storage import MemoryStorage, memory_server
from test_faults import listening
from test_kills import SEED, begin_child, in_child
from test_races import RACES, TARGETS, Work, at_once, stages  # noqa: F401 - one is a fixture

from retrotool import api
from retrotool.store import gc, leases, log
from retrotool.store.storage import Storage, storage_at
from retrotool.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]

JUMP = 2 * 3600.0
NEVER = 1 << 30
DIGESTS = ("content", "ids", "tombstones", "embeddings", "documents", "chunks", "tokens")
CLOCKS = [(whose, sign * JUMP) for whose in ("first", "second", "storage") for sign in (1, -1)]
CLOCKS += [(whose, leases.DEAD_SECONDS + JUMP) for whose in ("first", "second")]  # it is no machine's clock that counts


def commands(encoder: Path, inputs: Path) -> dict[str, Work]:
    def chunk(name: str) -> Work:
        return lambda store: api.chunk(store, [str(inputs / name)], part_size=8)

    return {
        "chunk": chunk("first.jsonl"),
        "chunk another": chunk("second.jsonl"),
        "embed": lambda store: api.embed(store, encoder=str(encoder), devices="cpu", name="again"),
        "purge --erase": lambda store: api.purge(store, api.Selectors(document=TARGETS), reason="test", erase=True),
    }


PAIRS = [
    ("chunk", "chunk another"),
    ("chunk", "embed"),
    ("embed", "chunk"),
    ("embed", "purge --erase"),
    ("purge --erase", "embed"),
]
BY_DEFAULT = PAIRS[:2]
EACH = [
    pytest.param(pair, id=", ".join(pair), marks=[] if pair in BY_DEFAULT else pytest.mark.nightly) for pair in PAIRS
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with memory_server(tmp_path_factory.mktemp("memory")):
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "first.jsonl", make_rows(12, first=300, words=60))
    write_jsonl(folder / "second.jsonl", make_rows(12, first=400, words=60))
    return folder


def copied(source: Path, place: str) -> str:
    """Put the files of a store at another place, a folder or in memory."""
    storage = storage_at(place)
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        storage.put_if_absent(path.relative_to(source).as_posix(), "0123abcd", path.read_bytes())
    return place


def with_clock(work: Work, error: float) -> Work:
    """``work`` on a machine whose clock is wrong by so many seconds."""

    def done(store: Path) -> object:
        clock = time.time
        time.time = lambda: clock() + error
        return work(store)

    return done


def seem_elsewhere(storage: Storage) -> None:
    """Let all runs be of another machine."""
    for lease in list(storage.list("leases/run-")):
        fields = {**json.loads(storage.get(lease.path)), "host": "elsewhere"}
        storage.overwrite(lease.path, lease.path.removeprefix("leases/run-"), json.dumps(fields).encode())


def jump(storage: Storage, seconds: float) -> None:
    """Let the clock of a storage jump: for its leases that is as if they had been written earlier, or later."""
    if isinstance(storage, MemoryStorage):
        storage.bucket.move_clock(seconds)
        return
    for lease in storage.list("leases/"):
        then = lease.modified - seconds
        os.utime(storage.local(lease.path), (then, then))


@dataclass
class Jump:
    """The moment at which one command stands still and the other begins; ``spares`` files, unless it erases."""

    storage: Storage
    seconds: float
    spares: bool
    there: set[str] = field(default_factory=set)

    def happen(self) -> None:
        seem_elsewhere(self.storage)
        if self.seconds:
            jump(self.storage, self.seconds)
        alive = {lease.path.removeprefix("leases/run-") for lease in self.storage.list("leases/run-")}
        self.there = {path for path in self._files() if gc.owner_of(self.storage, path) in alive}

    def check(self) -> None:
        """Whether all that the command which stands still has written is there yet, but for what a commit removed.

        What it has only begun to write is not looked at: a thread of it may end that.
        If it were removed, the
        command would end with an error.
        """
        commits = (log.read(self.storage, number) for number in range(Store.open(self.storage).state.number + 1))
        removed = {path for commit in commits if commit for path in commit.remove}
        lost = {path for path in self.there - self._files() - removed if self.spares or path.startswith("leases/")}
        assert lost == set()

    def _files(self) -> set[str]:
        return {info.path for info in self.storage.list("")}


def span_of_run(work: Work, store: Path | str) -> tuple[int, int]:
    """The first and the last step of a command at which the lease of its run is there."""
    leased: list[int] = []
    steps = itertools.count(1)

    def note(_step: str, path: str) -> None:
        number = next(steps)
        if "leases/run-" in path:
            leased.append(number)

    def done() -> str:
        listening(lambda: work(store), note)()  # type: ignore[arg-type]
        return f"{leased[0] + 1} {leased[-1]}"

    first, last = begin_child(done).end()[1].split()
    return int(first), int(last)


def digests(store: object) -> tuple[object, ...]:
    found = api.verify(store)
    assert found.problems == []
    return tuple(getattr(found, name) for name in DIGESTS)


@pytest.mark.parametrize("place", ["folder", "memory"])
@pytest.mark.parametrize("pair", EACH)
def test_a_clock_that_jumps_costs_nothing(
    pair: tuple[str, str],
    place: str,
    stages: dict[str, Path],  # noqa: F811
    tiny_encoder: Path,
    inputs: Path,
    server: None,
    tmp_path: Path,
) -> None:
    works = [commands(tiny_encoder, inputs)[name] for name in pair]
    before = stages["purge"]
    prefix = "memory://" if place == "memory" else ""

    def fresh(name: str) -> str:
        return copied(before, f"{prefix}{tmp_path}/{name}")

    expected = []
    for order in (works, works[::-1]):
        alone = fresh(f"alone-{len(expected)}")
        for work in (*order, *order):
            in_child(lambda work=work, alone=alone: work(alone), None)  # type: ignore[misc]
        expected.append(digests(alone))
    span = span_of_run(works[0], fresh("steps"))
    draw = random.Random(f"{SEED} {pair} {place}")
    clocks = draw.sample(CLOCKS, len(CLOCKS))
    for attempt in range(RACES):
        whose, error = clocks[attempt % len(clocks)]
        store = fresh(f"store-{attempt}")
        first, second = (
            with_clock(work, error) if whose == who else work
            for work, who in zip(works, ("first", "second"), strict=True)
        )
        at = draw.randint(*span)
        where = f"the clock of the {whose} {error:+} at step {at:,} of {span}"
        moment = Jump(storage_at(store), error if whose == "storage" else 0, spares="erase" not in pair[1])
        try:
            errors = at_once(first, second, store, (at, NEVER), moment.happen, moment.check)  # type: ignore[arg-type]
        except AssertionError as lost:
            raise AssertionError(where) from lost
        assert errors == ("", ""), where
        assert moment.there, where
        opened = Store.open(store)
        assert not opened.state.with_prefix("fenced:"), where
        for work in works:
            in_child(lambda work=work, store=store: work(store), None)  # type: ignore[misc]
        assert digests(store) in expected, where
