"""Two commands on one store at once, in an order drawn at random: whichever is first, the store is whole.

The first runs to a step of its own, then the second to one of its own, then the first to its end, then the second.
So each meets the other's files, leases and commits at a place where it least expects them. RETROTOOL_KILLS sets how
often and RETROTOOL_SEED in which orders, as for the kills beside.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import Shared, make_rows, times, write_jsonl
from test_faults import listening
from test_kills import KILLS, SEED, Child, begin_child, in_child, make_stages

import retrotool
from retrotool import api
from retrotool.ann.choice import IndexOptions
from retrotool.chunk import run as chunk_run
from retrotool.errors import LostRunError, RetrotoolError, UsageError
from retrotool.index.run import Options
from retrotool.store import gc, leases, staging
from retrotool.store.folding import fold, writing
from retrotool.store.leases import Run
from retrotool.store.log import Draft
from retrotool.store.parts import part_of
from retrotool.store.paths import DATA_KINDS
from retrotool.store.storage import Storage
from retrotool.store.store import Store, checkpoint_files
from retrotool.store.sums import with_sums
from retrotool.store.verify_log import same_state

pytestmark = [pytest.mark.slow, pytest.mark.on_disk]

RACES = KILLS if "RETROTOOL_KILLS" in os.environ else times(1, 5)
WAIT_SECONDS = 20.0
"""How long a command may wait for the other, which waits, before that goes on."""
Work = Callable[[Path], object]
Action = Callable[[], object]
TARGETS = ("doc-3", "doc-20")
COPY = "again-3"
"""A document with the text of one of them."""


class Gate:
    """Stops a process at its step ``at`` (from 1) until it is let through; a listener for ``listening``."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0
        self._reached, self._come = os.pipe()
        self._go, self._let = os.pipe()

    def __call__(self, _step: str, _path: str) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.write(self._come, b"!")
            os.read(self._go, 1)

    def open(self) -> None:
        os.write(self._let, b"!")

    def wait(self, child: Child, seconds: float) -> None:
        """Wait until the process is at the gate, or has ended."""
        select.select([self._reached, child.pipe], [], [], seconds)

    def close(self) -> None:
        for descriptor in (self._reached, self._come, self._go, self._let):
            os.close(descriptor)


def reported(work: Callable[[], object]) -> Callable[[], object]:
    """``work``; an error of ours is what it returns, as a command line prints it and ends."""

    def done() -> object:
        try:
            work()
        except RetrotoolError as error:
            return type(error).__name__
        return ""

    return done


def at_once(
    first: Work,
    second: Work,
    store: Path,
    places: tuple[int, int],
    begins: Action = lambda: None,
    stands: Action = lambda: None,
) -> tuple[str, str]:
    """Run two commands at once, the one up to a step, then the other up to one; return the errors they ended with.

    ``begins`` is called before the second begins, and ``stands`` when it is at its step, or has ended.
    """
    gates = [Gate(place) for place in places]
    children = []
    try:
        for work, gate in zip((first, second), gates, strict=True):
            children.append(begin_child(listening(reported(lambda work=work: work(store)), gate)))  # type: ignore[misc]
            gate.wait(children[-1], WAIT_SECONDS)
            (begins if len(children) == 1 else stands)()
        gates[0].open()
        select.select([children[0].pipe], [], [], WAIT_SECONDS)
        gates[1].open()
        results = [child.end() for child in children]
    finally:
        for child in children:
            child.stop()
        for gate in gates:
            gate.close()
    assert not any(killed for killed, _ in results)
    return results[0][1], results[1][1]


def steps_of(work: Work, before: Path, store: Path) -> int:
    """How many steps a command has that runs alone."""
    shutil.copytree(before, store)
    killed, calls = in_child(lambda: work(store), None)
    assert not killed
    shutil.rmtree(store)
    return calls


@dataclass(frozen=True)
class Race:
    """Two commands on the store ``before`` them; ``may_end`` are the errors with which one may give way."""

    before: str
    first: Work
    second: Work
    may_end: tuple[type[RetrotoolError], ...] = ()
    gone: tuple[str, ...] = ()
    """Documents that no reader may return any more after both."""


def races(encoder: Path, inputs: Path) -> dict[str, Race]:
    def undo(store: Path) -> None:
        (purge,) = api.info(store).purges
        api.undo(store, purge, reason="test")

    def erase(store: Path) -> None:
        api.erase(store, list(api.info(store).purges))

    def purge(store: Path) -> None:
        api.purge(store, api.Selectors(document=TARGETS), reason="test")

    def purge_and_erase(store: Path) -> None:
        api.purge(store, api.Selectors(document=TARGETS), reason="test", erase=True)

    def embed(store: Path) -> None:
        api.embed(store, encoder=str(encoder), devices="cpu", name="again")

    def index(store: Path) -> None:
        api.index(store, name="new", options=Options(IndexOptions(nlist=4, code="sq8", shard_rows=12)))

    def neighbours(store: Path) -> None:
        api.neighbours(store, name="new", materialise=True)

    def finish(store: Path) -> None:
        api.chunk(store, [])

    def chunk(store: Path) -> None:
        api.chunk(store, [str(inputs / "extra.jsonl")], part_size=8)

    def clean(store: Path) -> None:
        opened = Store.open(store)
        with Run(opened.storage) as run:
            gc.clean(opened, run, thorough=True)

    def clean_elsewhere(seconds: float) -> Work:
        """Clean up as another machine would, which has not heard of any other run for so long."""

        def cleaned(store: Path) -> None:
            for lease in (store / "leases").glob("run-*"):
                fields = json.loads(lease.read_bytes())
                lease.write_text(json.dumps({**fields, "host": "elsewhere"}))
                then = time.time() - seconds
                os.utime(lease, (then, then))
            clean(store)

        return cleaned

    def fold_all(store: Path) -> None:
        opened = Store.open(store)
        with Run(opened.storage) as run:
            fold(opened, run)

    lost = (LostRunError,)
    return {
        "erase, undo": Race("undo", erase, undo, (UsageError,)),
        "undo, erase": Race("undo", undo, erase, (UsageError,)),
        "erase, erase": Race("undo", erase, erase, (UsageError,), TARGETS),
        "embed, clean": Race("purge", embed, clean),
        "purge, clean elsewhere": Race("purge", purge, clean_elsewhere(2 * 3600), (), TARGETS),
        "embed, clean elsewhere": Race("purge", embed, clean_elsewhere(2 * 3600)),
        "purge, clean a day later": Race("purge", purge, clean_elsewhere(leases.DEAD_SECONDS + 60), lost),
        "embed, clean a day later": Race("purge", embed, clean_elsewhere(leases.DEAD_SECONDS + 60), lost),
        "undo, clean a day later": Race("undo", undo, clean_elsewhere(leases.DEAD_SECONDS + 60), lost),
        "chunk, chunk": Race("purge", chunk, chunk),
        "chunk, purge": Race("purge", chunk, purge, (), TARGETS),
        "fold, fold": Race("staged", fold_all, fold_all),
        "fold, erase": Race("staged", fold_all, purge_and_erase, (), TARGETS),
        "finish, purge": Race("pending", finish, purge, (), (*TARGETS, COPY)),
        "purge, finish": Race("pending", purge, finish, (), (*TARGETS, COPY)),
        "finish, erase": Race("pending", finish, purge_and_erase, (), (*TARGETS, COPY)),
        "finish, finish": Race("pending", finish, finish, (UsageError,)),  # there may be nothing left to finish
        "embed, erase": Race("purge", embed, purge_and_erase, (), TARGETS),
        "erase, embed": Race("purge", purge_and_erase, embed, (), TARGETS),
        "index, erase": Race("purge", index, purge_and_erase, (), TARGETS),
        "erase, index": Race("purge", purge_and_erase, index, (), TARGETS),
        "neighbours, erase": Race("purge", neighbours, purge_and_erase, (), TARGETS),
        "erase, neighbours": Race("purge", purge_and_erase, neighbours, (), TARGETS),
        "repair, purge": Race("broken", api.repair, purge, (), TARGETS),
        "repair, repair": Race("broken", api.repair, api.repair),
        "purge, neighbours": Race("purge", purge, neighbours, (), TARGETS),
    }


BY_DEFAULT = ("erase, undo", "purge, clean elsewhere", "embed, clean a day later", "fold, fold", "finish, purge")
BY_DEFAULT += ("chunk, chunk", "erase, embed", "index, erase", "neighbours, erase")
EACH = [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.nightly) for name in races(Path(), Path())]


@pytest.fixture(scope="module")
def stages(shared: Shared[dict[str, Path]], tiny_encoder: Path) -> dict[str, Path]:
    """The store before each race."""
    made = dict(shared("kills", lambda root: make_stages(root, tiny_encoder)))
    return {**made, **shared("races", lambda root: make_more(root, made["purge"], tiny_encoder))}


class Stopped(Exception):
    pass


def stop(*_: object, **__: object) -> None:
    raise Stopped


def make_more(root: Path, whole: Path, encoder: Path) -> dict[str, Path]:
    """A store with an embedding of every part staged, and one with a plan that is all but finished.

    The plan has a document of ``TARGETS`` once more, by its text; and one that repeats another by its id.
    """
    staged = Path(shutil.copytree(whole, root / "staged"))
    with mock.patch("retrotool.store.log.append", stop), pytest.raises(Stopped):
        api.embed(staged, encoder=str(encoder), devices="cpu", name="again")
    assert len(list((staged / "staging").iterdir())) > 1
    pending = Path(shutil.copytree(whole, root / "pending"))
    rows = make_rows(24, words=60)
    again = [{**rows[3], "id": COPY}, rows[5], *make_rows(4, first=200, words=60)]
    with mock.patch.object(chunk_run, "finish_plans", stop), pytest.raises(Stopped):
        api.chunk(pending, [str(write_jsonl(root / "again.jsonl", again))], part_size=8)
    return {"staged": staged, "pending": pending}


@pytest.mark.parametrize("name", EACH)
def test_of_two_commands_at_once_neither_breaks_what_the_other_does(
    name: str, stages: dict[str, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    race = races(tiny_encoder, stages["inputs"])[name]
    before = stages[race.before]
    lengths = [steps_of(work, before, tmp_path / "without_neighbours") for work in (race.first, race.second)]
    draw = random.Random(f"{SEED} {name}")
    ends: Counter[tuple[str, str]] = Counter()
    for attempt in range(RACES):
        store = Path(shutil.copytree(before, tmp_path / f"store-{attempt}"))
        places = draw.randint(1, lengths[0]), draw.randint(1, lengths[1])
        errors = at_once(race.first, race.second, store, places)
        ends[errors] += 1
        allowed = {"", *(error.__name__ for error in race.may_end)}
        assert set(errors) <= allowed, (places, errors)
        assert "" in errors, "one of them did what it was to do"
        check(store, race, places, receipts=attempt % 4 == 0)
        shutil.rmtree(store)
    print(f"{name}: " + ", ".join(f"{n} × {one or 'done'}/{two or 'done'}" for (one, two), n in sorted(ends.items())))


def check(store: Path, race: Race, places: tuple[int, int], *, receipts: bool) -> None:
    """What holds after every race, whichever won; ``receipts`` are for what was erased, and take longest."""
    found = api.verify(store)
    assert found.problems == [], places
    reader, opened = retrotool.open(store), Store.open(store)
    ids = [int(i) for part in reader.parts() for i in reader.chunk_ids(part) if reader.is_live([i])[0]]
    documents = {reader.chunk(i).document for i in ids}
    chunks = [i for name in documents for i in reader.document(name)]
    assert sorted(chunks) == sorted(ids), "a document is there once"
    shown = api.info(store)
    for purge, record in shown.purges.items():
        assert not (record["erased"] and "undone" in record), places
        if record["erased"] and receipts:
            receipt = api.verify_purge(store, purge, out=store.parent).receipt
            assert receipt.ok, (places, receipt.problems)
        if race.before == "undo":
            assert all((name in documents) == ("undone" in record) for name in TARGETS), places
    assert documents.isdisjoint(race.gone), places
    for table in opened.state.names("neighbours"):
        parts = {entry.part for _, entry in opened.state.group("neighbours", table).items()}
        searchable = [i for i in ids if part_of(i) in parts and reader.is_searchable([i])[0]]
        near = {one for i in searchable for one, _ in reader.neighbour_ids(i, table, 2)}
        assert near <= set(ids), (places, table)
    # Whatever else there is to do, the next command that writes does it, and leaves nothing.
    with writing(Store.open(store)):
        pass
    for lease in (store / "leases").glob("*"):
        assert leases.RUN_PATH.fullmatch(lease.relative_to(store).as_posix()), places
    live = {path for entry in Store.open(store).state.files() for path in with_sums(entry.path)}
    files = {path.relative_to(store).as_posix() for kind in DATA_KINDS for path in (store / kind).rglob("*.*")}
    assert files == live, places
    assert staging.staged_keys(opened.storage) == frozenset(), places
    if Store.open(store).state.number > opened.state.number:
        assert api.verify(store).problems == [], places


class Behind:
    """A storage through which others commit as often as a checkpoint is about to be read: it is removed by then."""

    def __init__(self, storage: Storage, overtake: Action, times: int) -> None:
        self._storage, self._overtake, self.left = storage, overtake, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get(self, path: str) -> bytes:
        if path.startswith("checkpoints/") and self.left:
            self.left -= 1
            self._overtake()
        return self._storage.get(path)


@pytest.mark.parametrize("overtaken", [1, 2, 5])
def test_a_store_is_opened_while_its_checkpoints_are_removed(
    tmp_path: Path, stages: dict[str, Path], overtaken: int
) -> None:
    store = Store.open(Path(shutil.copytree(stages["purge"], tmp_path / "store")))
    with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1), Run(store.storage) as run:

        def overtake() -> None:
            for _ in range(3):  # of which the last two keep theirs
                store.commit(run, lambda _: Draft("test"))

        overtake()
        seen = store.state.number
        behind = Behind(store.storage, overtake, overtaken)
        opened = Store.open(behind)  # type: ignore[arg-type]
    assert behind.left == 0 or len(checkpoint_files(store.storage)) == 2
    assert opened.state.number >= seen
    assert same_state(opened.state, store.at(opened.state.number).state)


def test_a_store_that_is_opened_beside_a_writer_is_never_older_than_before(
    tmp_path: Path, stages: dict[str, Path]
) -> None:
    place = Path(shutil.copytree(stages["purge"], tmp_path / "store"))
    commits = 20 * RACES

    def write() -> None:
        store = Store.open(place)
        with mock.patch("retrotool.store.store.CHECKPOINT_EVERY", 1), Run(store.storage) as run:
            for number in range(commits):
                store.commit(run, lambda _, number=number: Draft("test", {"number": number}))  # type: ignore[misc]

    seen = [Store.open(place).state.number]
    writer = begin_child(write)
    while not select.select([writer.pipe], [], [], 0)[0]:
        seen.append(Store.open(place).state.number)
    writer.end()
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert Store.open(place).state.number == seen[0] + commits
    assert api.verify(place).problems == []
