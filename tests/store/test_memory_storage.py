"""The process behind the storage in memory: it is shared, forgets what is over, and ends with its starter."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import memory_storage
import pytest
from store_help import exit_code, fork

from retrotool.store.storage import storage_at

HOLDER = """
import sys, time
from pathlib import Path
from memory_storage import memory_server
with memory_server(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(100)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    with memory_storage.memory_server(tmp_path):
        yield f"memory://{tmp_path}/{secrets.token_hex(4)}"


def test_a_forked_process_gets_its_own_answers(place: str) -> None:
    storage = storage_at(place)
    for number in range(4):
        storage.put_if_absent(f"{number}", "0123abcd", b"%d" % number * 10_000)

    def read(number: int) -> None:
        for _ in range(200):
            assert storage.get(f"{number}") == b"%d" % number * 10_000

    children = [fork(lambda number=number: read(number)) for number in range(3)]
    read(3)
    assert [exit_code(child) for child in children] == [0] * 3


def test_what_is_interrupted_leaves_no_answer_to_the_next(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_at(place)
    for name in ("one", "other"):
        storage.put_if_absent(name, "0123abcd", name.encode())
    connection = storage.bucket._proxy._tls.connection
    receive = type(connection).recv

    def interrupted(*_: object) -> object:
        monkeypatch.setattr(type(connection), "recv", receive)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(connection), "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.get("one")
    assert storage.get("other") == b"other"


def test_what_is_over_is_forgotten(place: str, tmp_path: Path) -> None:
    storage = storage_at(place)
    storage.put_if_absent("file", "0123abcd", b"data")
    memory_storage.forget(tmp_path / "elsewhere")
    assert storage.stat("file") is not None
    memory_storage.forget(tmp_path)
    kept = memory_storage._connection(os.environ[memory_storage.ADDRESS], os.getpid()).buckets().names()
    assert not [name for name in kept if name.startswith(str(tmp_path))]


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    here = {name: value for name, value in os.environ.items() if name != memory_storage.ADDRESS}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    path = os.pathsep.join([str(Path(memory_storage.__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**here, "PYTHONPATH": path}) as process:
        assert process.stdout is not None and process.stdout.readline()
        (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if Path(f"/proc/{server}").exists():
        os.kill(int(server), signal.SIGKILL)
        pytest.fail("it did not end")
