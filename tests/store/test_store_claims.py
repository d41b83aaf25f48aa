"""Claims: of runs that want one task at the same time, at most one has it, and a dead one has none."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_storage import MemoryStorage
from store_help import announced, at_step, clean, make_store, move_elsewhere

from retrotool.store import leases
from retrotool.store.leases import Run
from retrotool.store.storage import Storage
from retrotool.store.store import Store

KEY = "0123456789abcdef0123456789abcdef"
OTHER_KEY = "fedcba9876543210fedcba9876543210"
FAR = "89abcdef"
"""A run of another machine."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


@pytest.fixture
def runs(store: Store) -> Iterator[tuple[str, str]]:
    with Run(store.storage) as one, Run(store.storage) as two:
        yield one.id, two.id


def claims(store: Store) -> dict[str, str]:
    """The files of claims, and whose each is."""
    paths = [info.path for info in store.storage.list("leases/") if "run-" not in info.path]
    return {path.removeprefix("leases/"): leases.claimer(store.storage, path) for path in paths}


def claim_for(store: Store, run: str, epoch: int = 0, key: str = KEY) -> None:
    assert store.storage.put_if_absent(f"leases/{key}-{epoch:08d}", run, b'{"run":"%s"}' % run.encode())


def test_one_has_it_until_it_gives_it_back(store: Store, runs: tuple[str, str]) -> None:
    one, two = runs
    assert leases.take_claim(store.storage, KEY, one)
    assert leases.take_claim(store.storage, KEY, one), "a worker of the same run that died had it"
    assert claims(store) == {f"{KEY}-00000000": one}
    assert not leases.take_claim(store.storage, KEY, two)
    assert leases.take_claim(store.storage, OTHER_KEY, two)
    assert leases.claim_holders(store.storage, two).keys() == {KEY}
    assert leases.claim_holders(store.storage, one).keys() == {OTHER_KEY}
    leases.release_claim(store.storage, KEY, two)
    assert not leases.take_claim(store.storage, KEY, two), "what another has is not given back"
    leases.release_claim(store.storage, KEY, one)
    assert claims(store) == {f"{OTHER_KEY}-00000000": two}
    assert leases.take_claim(store.storage, KEY, two)
    leases.release_claim(store.storage, OTHER_KEY, two)
    leases.release_claim(store.storage, KEY, two)
    leases.release_claim(store.storage, KEY, two)
    assert claims(store) == {}


def test_what_a_killed_run_had_is_free_at_once_and_cleaned_away(store: Store) -> None:
    code = (
        "import sys, os, signal\n"
        "from retrotool.store.leases import Run, take_claim\n"
        "from retrotool.store.storage import storage_at\n"
        f"run = Run(storage_at(sys.argv[1]), {FAR!r}).__enter__(); assert take_claim(run.storage, {KEY!r}, run.id)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, store.place], timeout=60).returncode == -9
    assert claims(store) == {f"{KEY}-00000000": FAR}
    with Run(store.storage) as run:
        assert leases.claim_holders(store.storage, run.id).keys() == frozenset()
        assert leases.take_claim(store.storage, KEY, run.id)
        assert claims(store) == {f"{KEY}-00000000": FAR, f"{KEY}-00000001": run.id}, "it is of the next epoch"
        clean(store)
        assert claims(store) == {f"{KEY}-00000001": run.id}
        leases.release_claim(store.storage, KEY, run.id)
    assert claims(store) == {}


def test_a_run_of_another_machine_keeps_its_claims_while_it_is_heard_of(store: Store) -> None:
    move_elsewhere(Path(store.place), FAR)
    claim_for(store, FAR)
    with Run(store.storage) as run:
        assert not leases.take_claim(store.storage, KEY, run.id)
        assert leases.claim_holders(store.storage, run.id).keys() == {KEY}
        move_elsewhere(Path(store.place), FAR, leases.CLAIM_SILENCE_SECONDS - 30)
        assert not leases.take_claim(store.storage, KEY, run.id)
        move_elsewhere(Path(store.place), FAR, leases.CLAIM_SILENCE_SECONDS + 1)
        now = leases.renew(store.storage, run.id)
        assert leases.is_alive(store.storage, FAR, now=now), "its files are safe for a day"
        assert leases.claim_holders(store.storage, run.id).keys() == frozenset()
        assert leases.take_claim(store.storage, KEY, run.id), "its tasks are not"
        move_elsewhere(Path(store.place), FAR)
        assert not leases.take_claim(store.storage, KEY, FAR), "it is back, and has lost its claim"
        leases.release_claim(store.storage, KEY, FAR)
        assert claims(store)[f"{KEY}-00000001"] == run.id
        leases.release_claim(store.storage, KEY, run.id)
        assert claims(store) == {}, "of all epochs: the older ones count no more"


def test_only_the_newest_epoch_counts(store: Store, runs: tuple[str, str]) -> None:
    one, two = runs
    for epoch, owner in enumerate((one, "dead0123", one, two)):
        claim_for(store, owner, 9 + epoch)
    assert leases.claim_holders(store.storage, one).keys() == {KEY}
    assert leases.claim_holders(store.storage, two).keys() == frozenset()
    assert not leases.take_claim(store.storage, KEY, one)
    assert leases.take_claim(store.storage, KEY, two)
    assert sorted(claims(store))[-1] == f"{KEY}-00000012"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_claim_that_can_not_be_read_is_nobodys(store: Store, data: bytes) -> None:
    assert store.storage.put_if_absent(f"leases/{KEY}-00000003", FAR, data)
    with Run(store.storage) as run:
        assert leases.claim_holders(store.storage, run.id).keys() == frozenset()
        assert leases.take_claim(store.storage, KEY, run.id)
        clean(store)
        assert claims(store) == {f"{KEY}-00000004": run.id}


@pytest.mark.parametrize("before", [0, 1, 2])
def test_of_two_that_claim_at_once_one_has_it_at_any_step(store: Store, runs: tuple[str, str], before: int) -> None:
    """Also where both find the claims of runs that are dead."""
    one, two = runs
    for epoch in range(before):
        claim_for(store, "dead0123", epoch)
    # A renewal of the lease, to see whether the last owner lives; then the claim.
    renewal, claim = "touch", ["write", "fsync", "link", "unlink", "fsync_directory"]
    if isinstance(store.storage, MemoryStorage):
        renewal, claim = "overwrite", ["put_if_absent"]
    steps = ([renewal] if before else []) + claim
    for step in range(len(steps)):
        key = f"{step:032x}"
        for epoch in range(before):
            claim_for(store, "dead0123", epoch, key)
        taken: list[bool] = []
        with at_step(step, lambda key=key, taken=taken: taken.append(leases.take_claim(store.storage, key, two))):
            taken.append(leases.take_claim(store.storage, key, one))
        assert sorted(taken) == [False, True], steps[step]
        assert taken[0] == (step <= steps.index("link" if "link" in steps else "put_if_absent"))
        assert claims(store)[f"{key}-{before:08d}"] == (two if taken[0] else one)
    assert announced(lambda: leases.take_claim(store.storage, KEY, one)) == steps


def test_a_claim_that_is_given_back_before_its_run_ends_is_not_that_of_a_dead_run(
    store: Store, runs: tuple[str, str]
) -> None:
    """Else one that has just seen it would claim the next epoch, and another, who sees none, the first."""
    one, two = runs
    ending = contextlib.ExitStack()
    third = ending.enter_context(Run(store.storage))
    assert leases.take_claim(store.storage, KEY, third.id)

    def end() -> None:
        leases.release_claim(store.storage, KEY, third.id)
        ending.close()
        assert leases.take_claim(store.storage, KEY, two)

    with at_step(0, end):  # the renewal before it is asked whether the owner is alive
        assert not leases.take_claim(store.storage, KEY, one)
    assert claims(store) == {f"{KEY}-00000000": two}
    leases.release_claim(store.storage, KEY, two)
    assert leases.take_claim(store.storage, KEY, one)


@pytest.mark.parametrize("again", [False, True])
def test_who_finds_a_claim_that_is_given_back_just_now_looks_again(
    store: Store, runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    one, two = runs
    claim_for(store, one)
    get = type(store.storage).get

    def give_back(storage: Storage, path: str) -> bytes:
        monkeypatch.setattr(type(storage), "get", get)
        leases.release_claim(storage, KEY, one)
        if again:
            with pytest.raises(FileNotFoundError):
                storage.get(path)
            assert leases.take_claim(storage, KEY, one)
            raise FileNotFoundError(path)
        return storage.get(path)

    monkeypatch.setattr(type(store.storage), "get", give_back)
    assert leases.take_claim(store.storage, KEY, two) == (not again)
    assert claims(store) == {f"{KEY}-00000000": one if again else two}


def test_of_claims_that_are_given_back_the_newest_is_the_last(store: Store, runs: tuple[str, str]) -> None:
    """Else another that looks concurrently would find the older one, of a dead run, and make that epoch's claim."""
    one, two = runs
    taken: list[bool] = []
    steps = 1 if isinstance(store.storage, MemoryStorage) else 3  # there, all of them go at once
    for step in range(steps):
        for epoch, owner in enumerate(("dead0123", "dead4567", one)):
            claim_for(store, owner, epoch)
        with at_step(step, lambda: taken.append(leases.take_claim(store.storage, KEY, two))):
            leases.release_claim(store.storage, KEY, one)
        assert claims(store) == {}
    assert taken == [False] * steps


def test_of_many_at_once_never_two_have_it(store: Store) -> None:
    """Every thread is a run of its own; those that find it claimed try again."""
    holders: list[str] = []
    most = taken = 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal most, taken
        draw = random.Random(number)
        with Run(store.storage) as run:
            for _ in range(15):
                if leases.take_claim(store.storage, KEY, run.id):
                    with lock:
                        holders.append(run.id)
                        most, taken = max(most, len(holders)), taken + 1
                    time.sleep(draw.uniform(0, 0.004))
                    with lock:
                        holders.remove(run.id)
                    leases.release_claim(store.storage, KEY, run.id)
                time.sleep(draw.uniform(0, 0.004))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken > 10
