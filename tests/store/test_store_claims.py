"""Claims: of runs that want one task at the same time, at most one has it, and a dead one has none."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import pytest
from store_help import clean, make_store

from retrotool.store import runs
from retrotool.store.runs import Run
from retrotool.store.store import Store

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def test_one_has_it_until_it_gives_it_back(store: Store) -> None:
    with Run(store.root) as one, Run(store.root) as two:
        assert runs.take_claim(store.root, KEY, one.id)
        assert runs.take_claim(store.root, KEY, one.id), "a worker of the same run that died had it"
        assert not runs.take_claim(store.root, KEY, two.id)
        assert runs.take_claim(store.root, "another", two.id)
        assert runs.claimed_elsewhere(store.root, two.id) == {KEY}
        assert runs.claimed_elsewhere(store.root, one.id) == {"another"}
        runs.release_claim(store.root, KEY, one.id)
        assert runs.take_claim(store.root, KEY, two.id)


def test_what_a_killed_run_had_is_free_at_once_and_cleaned_away(store: Store) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from retrotool.store.runs import Run, take_claim\n"
        f"root = Path(sys.argv[1]); run = Run(root).__enter__(); assert take_claim(root, {KEY!r}, run.id)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(store.root)], timeout=60).returncode == -9
    assert len(list((store.root / "staging" / "claims").iterdir())) == 1
    with Run(store.root) as run:
        assert runs.claimed_elsewhere(store.root, run.id) == frozenset()
        assert runs.take_claim(store.root, KEY, run.id)
        clean(store)
        assert [path.name for path in (store.root / "staging" / "claims").iterdir()] == [f"{KEY}-{run.id}"]


def test_a_run_of_another_machine_keeps_its_claims_while_it_is_heard_of(store: Store) -> None:
    other = "89abcdef"
    path = runs.run_path(store.root, other)
    path.parent.mkdir(exist_ok=True)
    fields = {"host": "elsewhere", "boot": "b", "namespace": "n", "process": 1, "started": "1"}
    path.write_bytes(orjson.dumps(fields))
    (store.root / "staging" / "claims").mkdir()
    (store.root / "staging" / "claims" / f"{KEY}-{other}").touch()
    with Run(store.root) as run:
        assert not runs.take_claim(store.root, KEY, run.id)
        long_ago = time.time() - runs.CLAIM_SILENCE_SECONDS - 1
        os.utime(path, (long_ago, long_ago))
        assert runs.is_alive(store.root, other, now=runs.beat(store.root, run.id)), "its files are safe for an hour"
        assert runs.take_claim(store.root, KEY, run.id), "its tasks are not"


def test_of_many_at_once_never_two_have_it(store: Store) -> None:
    """Every thread is a run of its own; those that step back from each other try again."""
    holders: list[str] = []
    most = taken = 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal most, taken
        draw = random.Random(number)
        with Run(store.root) as run:
            for _ in range(15):
                if runs.take_claim(store.root, KEY, run.id):
                    with lock:
                        holders.append(run.id)
                        most, taken = max(most, len(holders)), taken + 1
                    time.sleep(draw.uniform(0, 0.004))
                    with lock:
                        holders.remove(run.id)
                    runs.release_claim(store.root, KEY, run.id)
                time.sleep(draw.uniform(0, 0.004))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken > 10
