"""Whether a run is alive: seen by its process here, by its silence from elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_help import commit, exit_code, files_in, fork, lease_file, listening, make_store, write
from stored import age_stored

from retrotool.errors import LostRunError
from retrotool.store import leases, staging
from retrotool.store.leases import Run
from retrotool.store.staging import Staged
from retrotool.store.store import Store

A_RUN_THAT_KILLS_ITSELF = """
import os, signal, sys
from retrotool.store.leases import Run
from retrotool.store.storage import storage_at
with Run(storage_at(sys.argv[1]), sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(root: Path, run: str) -> None:
    """Leave behind a run whose process, started for it, was killed."""
    ended = subprocess.run([sys.executable, "-c", A_RUN_THAT_KILLS_ITSELF, str(root), run])
    assert ended.returncode == -signal.SIGKILL


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def is_alive(store: Store, run: str) -> bool:
    """Whether another run takes this one for alive."""
    with Run(store.storage) as other:
        return leases.is_alive(store.storage, run, now=leases.renew(store.storage, other.id))


def claim(store: Store, run: Run, silent: float = 0.0, **fields: object) -> None:
    """Change what a run says of itself, and when it said so last."""
    lease = lease_file(Path(store.place), run.id)
    lease.write_text(json.dumps({**json.loads(lease.read_text()), **fields}))
    age_stored(lease, silent)


def test_a_run_lives_from_its_beginning_to_its_end(store: Store) -> None:
    run = Run(store.storage)
    assert not is_alive(store, run.id)
    with run:
        assert is_alive(store, run.id)
        assert files_in(Path(store.place)) == {f"leases/run-{run.id}"}
    assert not is_alive(store, run.id)
    assert files_in(Path(store.place)) == set()


def test_a_run_ends_with_an_error_too(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), Run(store.storage) as run:
        raise KeyboardInterrupt
    assert not is_alive(store, run.id)


def test_runs_have_ids_of_their_own(store: Store) -> None:
    with Run(store.storage) as one, Run(store.storage) as other:
        assert one.id != other.id
        assert len(one.id) == len(other.id) == 8


def test_a_killed_run_is_dead(store: Store) -> None:
    kill_a_run(Path(store.place), "0123abcd")
    assert lease_file(Path(store.place), "0123abcd").exists()
    assert not is_alive(store, "0123abcd")


def test_a_killed_run_is_dead_even_if_nobody_has_asked_after_its_process(store: Store) -> None:
    def doomed() -> None:
        with Run(store.storage, "0123abcd"):
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork(doomed)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as under a container's careless init
    alive = is_alive(store, "0123abcd")
    assert exit_code(child) == -signal.SIGKILL
    assert not alive


def test_a_process_that_has_only_the_number_of_a_run_is_not_the_run(store: Store) -> None:
    with Run(store.storage) as run:
        claim(store, run, started="1")
        assert not is_alive(store, run.id)


def test_silence_does_not_kill_a_run_whose_process_is_there(store: Store) -> None:
    with Run(store.storage) as run:
        claim(store, run, silent=10 * leases.SILENCE_SECONDS)
        assert is_alive(store, run.id)


@pytest.mark.parametrize("where", ["host", "boot", "namespace"])
def test_a_run_from_elsewhere_is_dead_after_an_hour_of_silence(store: Store, where: str) -> None:
    with Run(store.storage) as run:
        claim(store, run, silent=leases.SILENCE_SECONDS - 60, **{where: "elsewhere"}, process=1 << 22)
        assert is_alive(store, run.id)
        claim(store, run, silent=leases.SILENCE_SECONDS + 60)
        assert not is_alive(store, run.id)


class OneBeat:
    """Stands in for the event that stops a run: lets its heart beat once."""

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.left = 1

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return len(self.waited) > self.left

    def set(self) -> None:
        pass


def test_a_run_says_at_least_once_a_minute_that_it_lives(store: Store) -> None:
    with Run(store.storage) as run:
        claim(store, run, silent=2 * leases.SILENCE_SECONDS, host="elsewhere")
        assert not is_alive(store, run.id)
        stop = OneBeat()
        Run(store.storage, run.id, stop)._beat()
        assert is_alive(store, run.id)
        assert stop.waited[0] <= 60


def test_a_heart_does_not_beat_for_a_run_that_is_over(store: Store) -> None:
    Run(store.storage, "0123abcd", OneBeat())._beat()
    assert files_in(Path(store.place)) == set()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"{}", b'{"process": null}'])
def test_a_run_whose_file_can_not_be_read_is_alive_for_an_hour(store: Store, data: bytes) -> None:
    with Run(store.storage) as run:
        lease = lease_file(Path(store.place), run.id)
        lease.write_bytes(data)
        assert is_alive(store, run.id)
        age_stored(lease, leases.SILENCE_SECONDS + 60)
        assert not is_alive(store, run.id)


@pytest.mark.parametrize("error", [7200.0, -7200.0])
def test_the_clock_of_a_machine_makes_no_run_dead_or_alive(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    clock = time.time
    with Run(store.storage) as run, Run(store.storage) as silent:
        claim(store, run, host="elsewhere")
        claim(store, silent, silent=leases.SILENCE_SECONDS + 60, host="elsewhere")
        monkeypatch.setattr(time, "time", lambda: clock() + error)
        assert is_alive(store, run.id)
        assert not is_alive(store, silent.id)
        assert leases.others(store.storage, silent.id) == [run.id]


def test_a_run_whose_lease_was_removed_finds_out(store: Store) -> None:
    with Run(store.storage) as run:
        leases.renew(store.storage, run.id)
        lease_file(Path(store.place), run.id).unlink()
        with pytest.raises(LostRunError, match="took this run for dead") as caught:
            leases.renew(store.storage, run.id)
        assert not lease_file(Path(store.place), run.id).exists(), "it does not rise again"
    assert "Run the same command again" in caught.value.advice


def test_a_run_that_slept_for_less_than_half_a_day_goes_on(store: Store) -> None:
    with Run(store.storage) as run:
        claim(store, run, silent=leases.LAPSED_SECONDS - 60)
        commit(store, run, write(Path(store.place), run.id, "tombstones", "p"))
        assert is_alive(store, run.id)


def test_a_run_that_slept_for_half_a_day_writes_nothing_any_more(store: Store) -> None:
    """Long before any other removes its files: whichever process of it looks first, all see it."""
    with Run(store.storage) as run:
        entry = write(Path(store.place), run.id, "tombstones", "p")
        claim(store, run, silent=leases.LAPSED_SECONDS + 60)
        for _ in range(2):
            with pytest.raises(LostRunError, match="took this run for dead"):
                commit(store, run, entry)
            with pytest.raises(LostRunError, match="took this run for dead"):
                staging.stage(store.storage, Staged("embed", add=(entry,), task="task", run=run.id))
            with pytest.raises(LostRunError):
                leases.claim_holders(store.storage, run.id)
        Run(store.storage, run.id, OneBeat())._beat()
        assert is_alive(store, run.id), "its process is; what it left goes when it has ended, or was fenced"
    assert Store.open(store.place).state.number == -1
    assert staging.read_staged(store.storage) == {}


def test_the_lapse_of_a_lease_is_measured_by_the_clock_of_the_storage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time
    with Run(store.storage) as run:
        monkeypatch.setattr(time, "time", lambda: clock() + 2 * leases.LAPSED_SECONDS)
        leases.renew(store.storage, run.id)


def test_a_run_that_ends_while_its_heart_beats_is_over(store: Store) -> None:
    """The last beat must not write the lease again after it was removed."""
    run = Run(store.storage, "0123abcd", OneBeat())
    ended = threading.Thread(target=run.__exit__, args=(None, None, None))

    def end(operation: str, path: str) -> None:
        if operation in ("touch", "overwrite") and threading.current_thread().name == "retrotool-heartbeat":
            ended.start()
            ended.join(0.2)

    with listening(end):
        run.__enter__()
        run._heart.join(60)
        ended.join(60)
    assert files_in(Path(store.place)) == set()


def test_leases_say_whose_they_are(store: Store) -> None:
    with Run(store.storage) as run:
        fields = json.loads(lease_file(Path(store.place), run.id).read_bytes())
    assert (fields["run"], fields["process"]) == (run.id, os.getpid())


def test_the_heart_goes_on_after_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fail(_storage: object, run: str) -> float:
        calls.append(run)
        raise OSError(5, "Input/output error") if len(calls) == 1 else LostRunError("lost")

    monkeypatch.setattr(leases, "renew", fail)
    stop = OneBeat()
    stop.left = 2
    Run(store.storage, "0123abcd", stop)._beat()
    assert calls == ["0123abcd"] * 2
