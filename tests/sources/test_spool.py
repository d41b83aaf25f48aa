"""Standard input: stored once as an archive that is cut, read and read again like any input."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import time

import pytest
from source_help import PACK, read_slices

from retrotool.errors import UsageError
from retrotool.sources import WHOLE, Fields, cut, find_inputs, read
from retrotool.sources.frames import frames_of
from retrotool.sources.spool import spool

LINES = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(1000))


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time, as pipes do."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = io.BytesIO(data), step

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._step))


@pytest.fixture
def small_frames(monkeypatch):
    monkeypatch.setattr("retrotool.sources.spool.FRAME_BYTES", 5000)


@pytest.mark.parametrize("step", [1, 5, 1000, 1 << 20])
def test_a_stream_becomes_an_input_that_can_be_cut(tmp_path, small_frames, step):
    path = spool(Pipe(LINES, step), tmp_path / "new" / "folder")
    assert [frame.content for frame in frames_of(path)] == [5000] * (len(LINES) // 5000) + [len(LINES) % 5000]
    (file,) = find_inputs(["-"], path)
    assert (file.name, file.format) == ("stdin.jsonl.zst", "jsonl.zst")
    slices = cut(file, Fields(), 5000)
    assert len(slices) > 2
    whole = list(read(file, Fields()))
    assert [row.text for row in whole] == [f"line {i}" for i in range(1000)]
    assert read_slices(file, slices) == whole
    assert [left.name for left in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("step", [2, 1 << 20])
def test_compressed_streams_are_decompressed_on_the_way(tmp_path, kind, step):
    plain = spool(io.BytesIO(LINES), tmp_path)
    assert spool(Pipe(PACK[kind](LINES[:500]) + PACK[kind](LINES[500:]), step), tmp_path) == plain


def test_the_same_stream_gives_the_same_file_and_another_another(tmp_path):
    one, same, other = (spool(io.BytesIO(data), tmp_path) for data in (LINES, LINES, LINES[:-1]))
    assert one == same != other


@pytest.mark.parametrize("data", [b"", PACK["gz"](b"")], ids=["empty", "packed"])
def test_an_empty_stream_is_refused(tmp_path, data):
    with pytest.raises(UsageError, match="standard input is empty"):
        spool(io.BytesIO(data), tmp_path)
    assert list(tmp_path.iterdir()) == []


BREAKS = {"cut off": lambda data: data[:-5], "junk behind it": lambda data: data + b"junk" * 9}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("kind", PACK)
def test_of_a_stream_that_breaks_off_what_came_before_is_kept_and_the_break_is_damage(
    tmp_path, small_frames, kind, how
):
    packed = b"".join(PACK[kind](LINES[i : i + 3000]) for i in range(0, len(LINES), 3000))
    path = spool(io.BytesIO(BREAKS[how](packed)), tmp_path)
    (file,) = find_inputs(["-"], path)
    assert cut(file, Fields(), 100) == [WHOLE]
    *rows, last = read(file, Fields())
    assert [row.text for row in rows] == [f"line {i}" for i in range(len(rows))]
    assert 850 < len(rows) <= 1000
    assert last.damage
    assert f"broken off after line {len(rows):,}" in last.reason
    assert path.name != spool(io.BytesIO(packed), tmp_path).name


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_that_breaks_off_before_any_text_is_damage(tmp_path, kind):
    path = spool(io.BytesIO(PACK[kind](LINES)[:12]), tmp_path)
    (row,) = read(find_inputs(["-"], path)[0], Fields())
    assert (row.damage, row.line) == (True, 1)


def closed() -> io.BytesIO:
    stream = io.BytesIO(LINES)
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed()], ids=["none", "closed"])
def test_a_closed_stream_is_refused(tmp_path, stream):
    with pytest.raises(UsageError, match="standard input is closed"):
        spool(stream, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_the_system_stops_giving_is_refused_and_leaves_nothing(tmp_path):
    class Failing(Pipe):
        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            if data:
                return data
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UsageError, match="standard input can't be read: Input/output error"):
        spool(Failing(LINES, 5000), tmp_path)
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys, pathlib
from retrotool.sources.spool import spool
print("ready", flush=True)
spool(sys.stdin.buffer, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("sent", [b"", LINES, b"x" * (3 << 20)], ids=["nothing", "little", "much"])
def test_an_interrupt_while_the_producer_is_idle_ends_the_process_and_leaves_nothing(tmp_path, sent):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(sent)
            process.stdin.flush()
            time.sleep(0.3)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read().decode()
            process.wait(20)
        finally:
            process.kill()
    assert time.monotonic() - begun < 5
    assert errors.endswith("KeyboardInterrupt\n")
    assert "Fatal" not in errors
    assert process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_formats_that_can_not_be_piped_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.parquet"):
        spool(io.BytesIO(b"x"), tmp_path, ".parquet")
    assert spool(io.BytesIO(b"text\nx\n"), tmp_path, ".csv").name.endswith(".csv.zst")
