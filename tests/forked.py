"""``retrotool`` in a forked process: as separate as one that is started, without its seconds of imports."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from typing import Any

import retrotool
from retrotool.store import object_storage

SECONDS = 300


def run_forked(
    arguments: list[str], *, data: bytes = b"", preexec_fn: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line with ``data`` on stdin; return its exit code and what it prints."""
    process = Forked(arguments, data=data, before=preexec_fn)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(["retrotool", *arguments], process.poll() or 0, stdout, stderr)


class Forked:
    """A command line that runs beside this process, with the methods of ``subprocess.Popen`` that tests use.

    ``program`` is ``retrotool`` or the path of a script; ``before`` is called before it.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        program: str = "retrotool",
        data: bytes = b"",
        before: Callable[[], object] | None = None,
    ) -> None:
        _import_commands()
        self.returncode: int | None = None
        self._printed = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        stdin, given = os.pipe()
        printed = [file.fileno() for file in self._printed]
        if _has_workers(arguments):
            forkserver.ensure_running()  # or the child starts its own, which takes seconds to import what workers need
        if object_storage._process and before is None and program == "retrotool" and "://" in " ".join(arguments):
            # The threads of obstore, which has sent requests here, do not survive a fork.
            actions = [(os.POSIX_SPAWN_DUP2, own, number) for number, own in enumerate((stdin, *printed))]
            words = [sys.executable, "-m", "retrotool", *arguments]
            self.pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=actions)
        else:
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(given)
                code = _become([program, *arguments], [stdin, *printed], before)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                os._exit(code)
        os.close(stdin)
        threading.Thread(target=_give, args=(given, data), daemon=True).start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Wait for its end; return what it printed. It is killed if it does not end in time."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"no end after {timeout} s")
            time.sleep(0.002)
        printed = []
        for file in self._printed:
            with file:
                file.seek(0)
                printed.append(file.read().decode())
        return printed[0], printed[1]


@functools.cache
def _import_commands() -> None:
    """Import all that commands import, once, and not in every process that is forked."""
    for module in pkgutil.walk_packages(retrotool.__path__, "retrotool."):
        if module.name not in ("retrotool.__main__", "retrotool.ann.resident_kernels"):  # that is for GPUs alone
            importlib.import_module(module.name)
    for library in ("torch", "faiss", "pyarrow.pandas_compat"):
        importlib.import_module(library)


def _has_workers(arguments: list[str]) -> bool:
    return "--workers" in arguments and arguments[arguments.index("--workers") + 1] not in ("0", "1")


def _give(pipe: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(pipe, "wb") as file:
        file.write(data)


def _become(arguments: list[str], descriptors: list[int], preexec_fn: Callable[[], object] | None) -> int:
    """Be the command line, as far as it can be reported; return its exit code."""
    import faiss
    import torch

    gc.freeze()  # else a collection would write to, and so copy, all pages that it shares with its parent
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:
        server.ensure_running = lambda: None  # it runs: it is the parent's, of which only the parent may ask that
    # The thread pools of the parent did not survive the fork.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if preexec_fn is not None:
        preexec_fn()
    sys.argv = arguments
    from retrotool.app import main

    try:
        if arguments[0] == "retrotool":
            main()
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
