"""Compressed input: whole lines before a break come out, then one row that says where the file broke; never silence."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import resource
import struct
import threading
import time
from unittest.mock import patch

import pytest
import zstandard
from conftest import times
from hypothesis import given
from hypothesis import strategies as st
from source_help import PACK, input_of, rows_of, zstd

from retrotool.read_ahead import ahead
from retrotool.sources import Fields, Rejected, read_input, streams
from retrotool.sources.streams import BrokenStream

KINDS = sorted(PACK)
LINES = [json.dumps({"text": f"line {i} " + "words of the line " * (i % 5)}).encode() + b"\n" for i in range(12)]
PLAIN = b"".join(LINES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


def blocks_of(path, kind: str):
    return streams.blocks(lambda: path.open("rb"), kind)


def blocks_until_break(path, kind: str) -> tuple[bytes, bool]:
    """What comes out, and whether the stream breaks off."""
    given = []
    try:
        for block in blocks_of(path, kind):
            given.append(block)
    except BrokenStream:
        return b"".join(given), True
    return b"".join(given), False


def bytes_of_prefix(kind: str, data: bytes) -> bytes:
    """What the library gives of the beginning of a frame, fed at once."""
    return streams._DECOMPRESSORS[kind]().decompress(data, 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_a_file_cut_off_at_any_byte_gives_all_whole_lines_before_and_then_says_so(folder, kind, block):
    packed = PACK[kind](PLAIN)
    with patch.object(streams, "BLOCK_BYTES", block):
        for size in range(1, len(packed)):
            file = input_of(folder / f"cut.jsonl.{kind}", packed[:size])
            *rows, last = read_input(file, Fields())
            whole = bytes_of_prefix(kind, packed[:size]).count(b"\n")
            assert [row.text for row in rows] == [json.loads(line)["text"] for line in LINES[:whole]]
            assert last.damage
            assert last.line == whole + 1
            assert last.reason.startswith(f"broken off after line {whole:,}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_between_members_is_whole_and_inside_the_second_is_not(folder, kind):
    first, second = PACK[kind](PLAIN[:300]), PACK[kind](PLAIN[300:])
    for size in range(len(first), len(first + second) + 1):
        path = folder / f"two.jsonl.{kind}"
        path.write_bytes((first + second)[:size])
        given, broken = blocks_until_break(path, kind)
        assert given.startswith(PLAIN[:300])
        assert PLAIN.startswith(given)
        assert broken == (len(first) < size < len(first + second))


@given(st.sampled_from(KINDS), st.data(), st.sampled_from([1, 5, 64, 1 << 18]))
def test_a_changed_byte_is_never_silent(folder, kind, data, block):
    packed = bytearray(PACK[kind](PLAIN))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    path = folder / f"changed.jsonl.{kind}"
    path.write_bytes(packed)
    with patch.object(streams, "BLOCK_BYTES", block):
        given, broken = blocks_until_break(path, kind)
    # Some bytes mean nothing: gzip's time and system, for example.
    assert broken or given == PLAIN


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_the_middle_of_a_large_frame_keeps_all_before_it(folder, kind):
    rng = random.Random(0)
    text = b"".join(b"%d some words and %x\n" % (i, rng.getrandbits(64)) for i in range(60_000))
    packed = bytearray(PACK[kind](text))
    place = len(packed) * 2 // 3
    packed[place : place + 8] = b"\xff\0\xaa\x55\xff\0\xaa\x55"
    path = folder / f"large.{kind}"
    path.write_bytes(packed)
    given, broken = blocks_until_break(path, kind)
    assert broken
    # What is decompressed after the damage and before it is noticed may be wrong; before it, nothing is.
    whole = bytes_of_prefix(kind, bytes(packed[: place - streams._PIECE_BYTES]))
    assert whole or kind == "xz"  # xz gives nothing before the end of a block
    assert given.startswith(whole)
    assert text.startswith(whole)


@given(st.sampled_from(KINDS), st.lists(st.integers(0, len(PLAIN)), max_size=5), st.integers(0, 9), st.integers(1, 99))
def test_members_and_the_zeros_between_and_after_them_are_read_as_one(folder, kind, cuts, zeros, block):
    places = sorted({0, len(PLAIN), *cuts})
    members = [PACK[kind](PLAIN[a:b]) for a, b in itertools.pairwise(places)]
    path = folder / f"members.{kind}"
    path.write_bytes((b"\0" * zeros).join([*members, b""]))
    with patch.object(streams, "BLOCK_BYTES", block):
        assert blocks_until_break(path, kind) == (PLAIN, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [b"x", b"\0\0junk", b"\xff" * 70_000, b'{"text": "not packed"}\n'])
def test_junk_after_the_last_member_is_reported_after_all_lines(folder, kind, junk):
    file = input_of(folder / f"junk.jsonl.{kind}", PACK[kind](PLAIN) + junk)
    *rows, last = read_input(file, Fields())
    assert len(rows) == len(LINES)
    assert (type(last), last.damage, last.line) == (Rejected, True, len(LINES) + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"\0" * 100, b"plain text", b"x"])
def test_what_is_not_compressed_at_all_is_damage(folder, kind, data):
    (row,) = read_input(input_of(folder / f"not.jsonl.{kind}", data), Fields())
    assert (type(row), row.damage) == (Rejected, True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_of_nothing_has_no_rows(folder, kind):
    assert list(read_input(input_of(folder / f"nothing.jsonl.{kind}", PACK[kind](b"")), Fields())) == []


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_tiny_members_are_read_in_passing(folder, kind):
    count = 10_000 if kind != "xz" else 1_000
    path = folder / f"tiny.{kind}"
    path.write_bytes(PACK[kind](b"tiny\n") * count)
    assert blocks_until_break(path, kind) == (b"tiny\n" * count, False)


def test_skippable_frames_are_passed_over(folder):
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello"
    path = folder / "skippable.zst"
    path.write_bytes(skippable + zstd(PLAIN[:100]) + skippable * 2 + zstd(PLAIN[100:]) + skippable)
    assert blocks_until_break(path, "zst") == (PLAIN, False)
    path.write_bytes(zstd(PLAIN) + skippable[:-1])
    assert blocks_until_break(path, "zst") == (PLAIN, True)


def test_a_wrong_checksum_is_reported_after_the_lines_before_it(folder):
    lines = [json.dumps({"text": f"{i} {random.Random(i).getrandbits(99)}"}).encode() for i in range(20_000)]
    packed = bytearray(zstd(b"\n".join(lines)))
    packed[-1] ^= 1
    *rows, last = read_input(input_of(folder / "checksum.jsonl.zst", bytes(packed)), Fields())
    assert 15_000 < len(rows) < 20_000
    assert [row.text for row in rows] == [json.loads(line)["text"] for line in lines[: len(rows)]]
    assert (last.damage, last.line) == (True, len(rows) + 1)
    assert "checksum" in last.reason


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_libraries_give_at_once_comes_in_blocks(folder, kind):
    text = random.Random(1).randbytes(700_000) + b"\0" * 700_000
    path = folder / f"blocks.{kind}"
    path.write_bytes(PACK[kind](text))
    given = list(blocks_of(path, kind))
    assert b"".join(given) == text
    assert {len(block) for block in given[:-1]} == {streams.BLOCK_BYTES}


def test_frames_with_a_large_window_are_read(folder):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = folder / "window.zst"
    path.write_bytes(writer.compress(PLAIN) + writer.flush())
    assert blocks_until_break(path, "zst") == (PLAIN, False)


@pytest.mark.parametrize("kind", ["zst", "gz", "bz2", "xz"])
def test_a_bomb_is_one_row_set_aside_in_little_memory(folder, kind):
    size = times(1 << 28, 1 << 30) if kind in ("gz", "zst") else 1 << 28
    path = folder / f"bomb.jsonl.{kind}"
    if kind == "zst":
        writer = zstandard.ZstdCompressor().compressobj()
        zeros = b"\0" * (1 << 20)
        path.write_bytes(b"".join([*(writer.compress(zeros) for _ in range(size >> 20)), writer.flush()]))
    else:
        path.write_bytes(PACK[kind](b"\0" * (1 << 26)) * (size >> 26))
    assert path.stat().st_size < 2 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (row,) = rows_of(path, max_document=1 << 20)
    assert row.reason == f"line of {size:,} bytes, longer than {4 << 20:,}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 192 << 10


def test_blocks_before_an_error_come_first_and_the_error_once():
    def source():
        yield b"one"
        yield b"two"
        raise BrokenStream("here")

    stream = ahead(source(), 4, patience=2.0)
    assert [next(stream), next(stream)] == [b"one", b"two"]
    with pytest.raises(BrokenStream, match="here"):
        next(stream)
    assert list(stream) == []


def test_what_the_system_refuses_is_raised_as_it_is(folder):
    with pytest.raises(FileNotFoundError):
        next(blocks_of(folder / "missing.gz", "gz"))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_stream_left_early_ends_its_thread_and_closes_its_file(folder, taken):
    closed = threading.Event()

    def source():
        try:
            while True:
                yield b"x" * 1000
        finally:
            closed.set()

    stream = ahead(source(), 4, patience=2.0)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert closed.is_set() == (taken > 0)
    assert "retrotool-ahead" not in {thread.name for thread in threading.enumerate()}


def test_a_stream_left_while_its_thread_stands_in_a_read_is_left_soon():
    released = threading.Event()

    def source():
        yield b"one"
        released.wait(60)

    stream = ahead(source(), 4, patience=0.2)
    assert next(stream) == b"one"
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 5
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "retrotool-ahead")
    assert thread.daemon  # so that it can't hold up the end of the process
    released.set()
    thread.join()


def test_gzip_names_and_comments_in_headers_are_no_text(folder):
    path = folder / "named.gz"
    with path.open("wb") as raw, gzip.GzipFile("some name.jsonl", "wb", fileobj=raw) as file:
        file.write(PLAIN)
    assert blocks_until_break(path, "gz") == (PLAIN, False)
