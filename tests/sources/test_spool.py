"""Standard input: stored once as an archive that is cut, read and read again like any input."""

from __future__ import annotations

import io
import json

import pytest
from source_help import PACK, read_slices

from retrotool.errors import InputError, UsageError
from retrotool.sources import Fields, cut, find_inputs, read
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


@pytest.mark.parametrize("data", [b"", PACK["gz"](b"")])
def test_an_empty_stream_is_refused(tmp_path, data):
    with pytest.raises(UsageError, match="standard input is empty"):
        spool(io.BytesIO(data), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_that_breaks_off_leaves_nothing(tmp_path, kind):
    with pytest.raises(InputError, match="standard input breaks off"):
        spool(io.BytesIO(PACK[kind](LINES)[:-5]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_formats_that_can_not_be_piped_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.parquet"):
        spool(io.BytesIO(b"x"), tmp_path, ".parquet")
    assert spool(io.BytesIO(b"text\nx\n"), tmp_path, ".csv").name.endswith(".csv.zst")
