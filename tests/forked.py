"""``retrotool`` in a forked process: as separate as one that is started, without its seconds of imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress

SECONDS = 300


def run_forked(
    arguments: list[str], *, data: bytes = b"", preexec_fn: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line with ``data`` on stdin; return its exit code and what it prints."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(data)
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _become(arguments, [file.fileno() for file in (stdin, stdout, stderr)], preexec_fn)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(_wait(child))
        printed = []
        for file in (stdout, stderr):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(["retrotool", *arguments], code, *printed)


def _wait(child: int) -> int:
    """The status of a child, which is killed if it does not end."""
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"no end after {SECONDS} s")
        time.sleep(0.002)


def _become(arguments: list[str], descriptors: list[int], preexec_fn: Callable[[], object] | None) -> int:
    """Be the command line, as far as it can be told; return its exit code."""
    import faiss
    import torch

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The thread pools of the parent did not survive the fork.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if preexec_fn is not None:
        preexec_fn()
    sys.argv = ["retrotool", *arguments]
    from retrotool.app import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
