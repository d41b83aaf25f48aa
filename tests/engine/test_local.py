"""Worker processes: that starting them is not torn in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from retrotool.engine import local


def test_ctrl_c_that_another_thread_gets_waits_until_a_process_is_started() -> None:
    """A signal that the main thread blocks goes to another, and Python would raise it in the main thread at once."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()  # with Ctrl-C unblocked
    whole = False
    try:
        with pytest.raises(KeyboardInterrupt), local._interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 0.5  # the other thread takes its time to get it
            while time.monotonic() < end:
                pass
            whole = True
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        done.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    assert whole
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


_WHILE_A_LOCK_IS_TAKEN = """
import signal, threading, time
from retrotool import interrupts

class Taking(threading.Condition):
    def __enter__(self):
        taken = super().__enter__()
        signal.raise_signal(signal.SIGINT)
        return taken

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored
interrupts.install()
lock = threading.Lock()
try:
    with Taking(lock):
        time.sleep(30)
except KeyboardInterrupt:
    print("interrupted", lock.locked())
"""


def test_ctrl_c_while_a_lock_is_taken_does_not_keep_it() -> None:
    done = subprocess.run([sys.executable, "-c", _WHILE_A_LOCK_IS_TAKEN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted False\n", "")


_BEFORE_A_PROCESS_IS_STARTED = """
import signal, time
from retrotool import interrupts
from retrotool.engine import local

def __enter__():
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored
interrupts.install()
interrupts._LATER_SECONDS = 0.2
whole = False
try:
    __enter__()
    with local._interrupts_deferred():
        time.sleep(0.5)
        whole = True
except KeyboardInterrupt:
    print("interrupted", whole)
"""


def test_ctrl_c_while_a_lock_is_taken_waits_until_a_process_is_started() -> None:
    code = [sys.executable, "-c", _BEFORE_A_PROCESS_IS_STARTED]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\n", "")
