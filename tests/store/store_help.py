"""What the tests of the store share: small stores, files in them, and faults at announced disk operations."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from memory_storage import MemoryFile
from stored import age_stored, file_sha256, path_in_store, stored_file, stored_files, write_stored

from retrotool.store import disk, gc, leases, paths
from retrotool.store.identity import TokenizerIdentity
from retrotool.store.leases import Run
from retrotool.store.local_storage import TEMPORARY
from retrotool.store.log import Commit, Draft, FileEntry
from retrotool.store.paths import FileName
from retrotool.store.state import State
from retrotool.store.storage import Storage, storage_at
from retrotool.store.store import Store

Action = Callable[[], object]


def make_store(place: Path | str, vocabulary: int = 30_522, chunk_length: int = 8) -> Store:
    content = b'{"vocabulary": %d}' % vocabulary
    return Store.create(place, TokenizerIdentity.of("test", content, vocabulary, False), content, chunk_length)


def write(root: Path | Storage, run: str, kind: str, slot: str, data: bytes = b"data", name: str = "") -> FileEntry:
    """Write a file as ``Store.write`` does."""
    new = FileName.new(run, kind, slot, "bin", name)
    sink, _ = storage_at(root).put(new.path, run, lambda sink: sink.write(data))
    return FileEntry(new.path, slot, 1, sink.size, sink.sha256)


def commit(store: Store, run: Run, *add: FileEntry, **fields: Any) -> State:
    return store.commit(run, lambda _: Draft("test", add=add, **fields))


def clean(store: Store, *, thorough: bool = False) -> int:
    """Clean up as another process would."""
    with Run(store.storage) as run:
        return gc.clean(store, run, thorough=thorough)


def lease_file(root: Path, run: str) -> Path | MemoryFile:
    return stored_file(root, leases.run_path(run))


def move_elsewhere(root: Path, run: str, silent: float = 0.0) -> None:
    """Let a run be one of another machine, of which nothing was heard for so many seconds."""
    lease = lease_file(root, run)
    fields = json.loads(lease.read_text()) if lease.exists() else {}
    data = json.dumps({**fields, "host": "elsewhere"}).encode()
    age_stored(write_stored(root, leases.run_path(run), data), silent)


def clean_after_a_sleep(root: Path, silent: float = leases.DEAD_SECONDS + 60) -> None:
    """Clean up as another machine would that has heard nothing of any run for more than a day."""
    for lease in stored_files(root, "leases/run-*"):
        move_elsewhere(root, lease.name.removeprefix("run-"), silent)
    clean(Store.open(root))


def make_commit(number: int, **fields: Any) -> Commit:
    """A commit that stands in no log."""
    return Commit("test", number=number, uuid="", parent="", time="", tool="", sha256=f"{number:064x}", **fields)


def viewing(store: Store, *entries: FileEntry) -> Store:
    """The store as a reader would see it if ``entries`` were all that was ever committed."""
    state = State(-1, store.genesis).fold([make_commit(0, add=entries)])
    return Store(store.storage, store.identity, store.genesis, state)


def contents(state: State) -> tuple[dict[tuple[str, str, str], tuple[Any, ...]], dict[str, Any]]:
    """What a state says, whatever its files are called: files by slot, and records."""
    files = {}
    for entry in state.files():
        files[entry.place] = (entry.rows, entry.bytes, entry.sha256, entry.about)
    return files, dict(state.records)


def assert_whole(store: Store) -> None:
    """Every file of the store's state is there, and is what the log says."""
    for entry in store.state.files():
        assert file_sha256(store.storage, entry.path) == entry.sha256, entry.path


def files_in(root: Path) -> set[str]:
    """Paths of all files but the store's identity, log and checkpoints; unfinished ones of those too."""
    found = {path_in_store(root, file) for file in stored_files(root)}
    found |= {one.path for one in storage_at(root).unfinished()}
    fixed = ("store.json", "tokenizer-", "log/0", "checkpoints/0")
    return {path for path in found if not path.startswith(fixed)}


def live_files(state: State) -> set[str]:
    return {entry.path for entry in state.files()}


def temporary_files(root: Path) -> list[Path]:
    return list(root.rglob(f"{TEMPORARY}*"))


def steps(names: list[str]) -> pytest.MarkDecorator:
    """Run a test for ``step`` = the place of each of some disk operations."""
    return pytest.mark.parametrize("step", range(len(names)), ids=[f"{i}-{name}" for i, name in enumerate(names)])


_listener: Callable[[str, str], object] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == disk.EVENT and _listener is not None:
        _listener(*arguments)


sys.addaudithook(_hook)  # there is no way to remove one


@contextmanager
def listening(listener: Callable[[str, str], object]) -> Iterator[None]:
    global _listener
    assert _listener is None
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def announced(action: Action) -> list[str]:
    """Names of the disk operations of an action, in order."""
    steps: list[str] = []
    with listening(lambda operation, _: steps.append(operation)):
        action()
    return steps


@contextmanager
def at_step(number: int, strike: Action) -> Iterator[None]:
    """Call ``strike`` just before the announced operation ``number`` (from 0), once; fail if it never came."""
    left = number

    def listener(_operation: str, _path: str) -> None:
        global _listener
        nonlocal left
        left -= 1
        if left == -1:
            _listener = None  # what strikes may use the disk itself, and so may what clears up after it
            strike()

    with listening(listener):
        yield
    assert left == -1, f"step {number} was never reached"


@contextmanager
def before_entry(strike: Action) -> Iterator[None]:
    """Call ``strike`` just before an entry of the log gets its name, once; fail if none does."""
    struck = False

    def listener(operation: str, path: str) -> None:
        global _listener
        nonlocal struck
        if operation in ("link", "put_if_absent") and Path(path).parent.name == "log":
            _listener, struck = None, True
            strike()

    with listening(listener):
        yield
    assert struck, "there was no entry"


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


def fork(action: Action) -> int:
    """Do something in a child process, and return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child:
        return child
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_step(number: int, root: Path, action: Callable[[Run], object]) -> None:
    """Do ``action`` in a run of a child process that is killed just before its operation ``number``."""

    def doomed() -> None:
        with Run(storage_at(root)) as run, at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            action(run)

    assert exit_code(fork(doomed)) == -signal.SIGKILL


def new_token() -> str:
    return paths.new_token("0123abcd")
