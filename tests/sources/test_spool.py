"""Standard input: copied once to a file without a name, which is cut, read and read again like any input."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from source_help import PACK, read_slices

from retrotool.errors import StorageError, UsageError
from retrotool.sources import Fields, InputFile, cut_input, find_inputs, read_input
from retrotool.sources.inputs import is_spooled, spool

LINES = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(1000))
TEXTS = [f"line {i}" for i in range(1000)]


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time, as pipes do."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = io.BytesIO(data), step

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._step))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The folder for temporary files, which must be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 5, 1000, 1 << 20])
def test_a_stream_becomes_an_input_that_can_be_cut(scratch, step):
    with spool(Pipe(LINES, step)) as spooled:
        assert list(scratch.iterdir()) == []
        (file,) = find_inputs(["-"], spooled)
        assert (file.name, file.format, file.size) == ("stdin", "jsonl", len(LINES))
        assert is_spooled(file)
        slices = cut_input(file, Fields(), 5000)
        assert len(slices) > 2
        whole = list(read_input(file, Fields()))
        assert [row.text for row in whole] == TEXTS
        assert read_slices(file, slices) == whole
        fingerprint = file.fingerprint()
    assert not Path(file.path).exists()
    with spool(io.BytesIO(LINES)) as same, spool(io.BytesIO(LINES[:-1])) as other:
        assert same.fingerprint() == fingerprint != other.fingerprint()


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("step", [2, 1 << 20])
def test_compressed_streams_are_read_as_such_files(kind, step):
    with spool(Pipe(PACK[kind](LINES[:500]) + PACK[kind](LINES[500:]), step)) as file:
        assert file.format == f"jsonl.{kind}"
        assert [row.text for row in read_input(file, Fields())] == TEXTS


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_that_is_cut_off_is_damage(kind):
    with spool(io.BytesIO(PACK[kind](LINES)[:-5])) as file:
        *rows, last = read_input(file, Fields())
    assert [row.text for row in rows] == TEXTS[: len(rows)]
    assert last.damage


def test_another_process_reads_it():
    command = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    with spool(io.BytesIO(LINES)) as file:
        read_there = subprocess.run([sys.executable, "-c", command, file.path], capture_output=True, check=True)
    assert int(read_there.stdout) == len(LINES)


def test_a_file_of_that_name_is_not_standard_input(tmp_path):
    assert not is_spooled(InputFile(str(tmp_path / "stdin.jsonl"), "stdin.jsonl", 1, "jsonl"))


def closed() -> io.BytesIO:
    stream = io.BytesIO(LINES)
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("stream", "reason"),
    [(None, "is closed"), (closed(), "is closed"), (io.BytesIO(), "is empty")],
    ids=["none", "closed", "empty"],
)
def test_what_gives_nothing_is_refused(stream, reason):
    with pytest.raises(UsageError, match=f"standard input {reason}"), spool(stream):
        pass


def test_a_stream_that_the_system_stops_giving_is_refused():
    class Failing(Pipe):
        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            if data:
                return data
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UsageError, match="standard input can't be read: Input/output error"), spool(Failing(LINES, 99)):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_with_what_to_do(monkeypatch):
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(StorageError, match="No space left on device") as refused, spool(io.BytesIO(LINES)):
            pass
    assert "--scratch" in refused.value.advice


INTERRUPTED = """
import sys
from retrotool.sources.inputs import spool
print("ready", flush=True)
with spool(sys.stdin.buffer):
    pass
"""


@pytest.mark.parametrize("sent", [b"", LINES, b"x" * (3 << 20)], ids=["nothing", "little", "much"])
def test_an_interrupt_while_the_producer_is_idle_ends_the_process_and_leaves_nothing(scratch, sent):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], env=environment, **pipes) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(sent)
            process.stdin.flush()
            for _ in range(100):  # one that comes just before a read is seen when the read returns
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                    break
            process.kill()
            errors = process.stderr.read().decode()
        finally:
            process.kill()
    assert errors.endswith("KeyboardInterrupt\n")
    assert process.returncode == -signal.SIGINT
