"""Whether a run is alive: seen by its process here, by its silence from elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_help import exit_code, files_in, fork, make_store

from retrotool.errors import LostRunError
from retrotool.store import runs
from retrotool.store.runs import Run
from retrotool.store.store import Store

A_RUN_THAT_KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from retrotool.store.runs import Run
with Run(Path(sys.argv[1]), sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(root: Path, run: str) -> None:
    """Leave behind a run whose process, started for it, was killed."""
    ended = subprocess.run([sys.executable, "-c", A_RUN_THAT_KILLS_ITSELF, str(root), run])
    assert ended.returncode == -signal.SIGKILL


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def is_alive(root: Path, run: str) -> bool:
    """Whether another run takes this one for alive."""
    with Run(root) as other:
        return runs.is_alive(root, run, now=runs.beat(root, other.id))


def claim(run: Run, silent: float = 0.0, **fields: object) -> None:
    """Change what a run says of itself, and when it said so last."""
    run.path.write_text(json.dumps({**json.loads(run.path.read_text()), **fields}))
    os.utime(run.path, (time.time() - silent,) * 2)


def test_a_run_lives_from_its_beginning_to_its_end(store: Store) -> None:
    run = Run(store.root)
    assert not is_alive(store.root, run.id)
    with run:
        assert is_alive(store.root, run.id)
        assert files_in(store.root) == {f"staging/run-{run.id}.json"}
    assert not is_alive(store.root, run.id)
    assert files_in(store.root) == set()


def test_a_run_ends_with_an_error_too(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), Run(store.root) as run:
        raise KeyboardInterrupt
    assert not is_alive(store.root, run.id)


def test_runs_have_ids_of_their_own(store: Store) -> None:
    with Run(store.root) as one, Run(store.root) as other:
        assert one.id != other.id
        assert len(one.id) == len(other.id) == 8


def test_a_killed_run_is_dead(store: Store) -> None:
    kill_a_run(store.root, "0123abcd")
    assert runs.run_path(store.root, "0123abcd").exists()
    assert not is_alive(store.root, "0123abcd")


def test_a_killed_run_is_dead_even_if_nobody_has_asked_after_its_process(store: Store) -> None:
    def doomed() -> None:
        with Run(store.root, "0123abcd"):
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork(doomed)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as under a container's careless init
    alive = is_alive(store.root, "0123abcd")
    assert exit_code(child) == -signal.SIGKILL
    assert not alive


def test_a_process_that_has_only_the_number_of_a_run_is_not_the_run(store: Store) -> None:
    with Run(store.root) as run:
        claim(run, started="1")
        assert not is_alive(store.root, run.id)


def test_silence_does_not_kill_a_run_whose_process_is_there(store: Store) -> None:
    with Run(store.root) as run:
        claim(run, silent=10 * runs.SILENCE_SECONDS)
        assert is_alive(store.root, run.id)


@pytest.mark.parametrize("where", ["host", "boot", "namespace"])
def test_a_run_from_elsewhere_is_dead_after_an_hour_of_silence(store: Store, where: str) -> None:
    with Run(store.root) as run:
        claim(run, silent=runs.SILENCE_SECONDS - 60, **{where: "elsewhere"}, process=1 << 22)
        assert is_alive(store.root, run.id)
        claim(run, silent=runs.SILENCE_SECONDS + 60)
        assert not is_alive(store.root, run.id)


class OneBeat:
    """Stands in for the event that stops a run: lets its heart beat once."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return len(self.waited) > 1


def test_a_run_says_at_least_once_a_minute_that_it_lives(store: Store) -> None:
    with Run(store.root) as run:
        claim(run, silent=2 * runs.SILENCE_SECONDS, host="elsewhere")
        assert not is_alive(store.root, run.id)
        stop = OneBeat()
        Run(store.root, run.id, stop)._beat()
        assert is_alive(store.root, run.id)
        assert stop.waited[0] <= 60


def test_a_heart_does_not_beat_for_a_run_that_is_over(store: Store) -> None:
    Run(store.root, "0123abcd", OneBeat())._beat()
    assert files_in(store.root) == set()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"{}", b'{"process": null}'])
def test_a_run_whose_file_can_not_be_read_is_alive_for_an_hour(store: Store, data: bytes) -> None:
    with Run(store.root) as run:
        run.path.write_bytes(data)
        assert is_alive(store.root, run.id)
        os.utime(run.path, (time.time() - runs.SILENCE_SECONDS - 60,) * 2)
        assert not is_alive(store.root, run.id)


@pytest.mark.parametrize("error", [7200.0, -7200.0])
def test_the_clock_of_a_machine_makes_no_run_dead_or_alive(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    clock = time.time
    with Run(store.root) as run, Run(store.root) as silent:
        claim(run, host="elsewhere")
        claim(silent, silent=runs.SILENCE_SECONDS + 60, host="elsewhere")
        monkeypatch.setattr(time, "time", lambda: clock() + error)
        assert is_alive(store.root, run.id)
        assert not is_alive(store.root, silent.id)
        assert runs.others(store.root, silent.id) == [run.id]


def test_a_run_whose_file_was_removed_finds_out(store: Store) -> None:
    with Run(store.root) as run:
        runs.beat(store.root, run.id)
        run.path.unlink()
        with pytest.raises(LostRunError, match="took this run for dead") as caught:
            runs.beat(store.root, run.id)
    assert "Run the same command again" in caught.value.advice
