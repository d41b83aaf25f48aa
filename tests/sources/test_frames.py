"""zstd archives of many frames: cut between frames, read as one; what headers say wrongly is never believed."""

from __future__ import annotations

import itertools
import json
import random
import struct
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from source_help import PACK, input_of, read_slices, zstd

from retrotool.sources import WHOLE, Fields, Rejected, Slice, cut_input, read_input, streams
from retrotool.sources.streams import Frame, frames_of

SKIPPABLE = struct.pack("<II", 0x184D2A5A, 3) + b"abc"
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False)
LINES = b"".join(json.dumps({"text": f"line {i} " + "word " * (i % 7)}).encode() + b"\n" for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frames")


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut <= len(data))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


contents = st.one_of(
    st.binary(max_size=600),
    st.builds(lambda byte, n: byte * n, st.sampled_from([b"a", b"\0"]), st.integers(0, 400_000)),
    st.builds(lambda n: bytes(i * i % 251 for i in range(n)), st.integers(0, 3000)),
)


@given(st.lists(st.tuples(contents, st.sampled_from([1, 3, 19]), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_frames_are_found_where_they_were_written(folder, frames):
    data, expected = b"", []
    for content, level, checksum, skippable in frames:
        packed = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(content)
        data += SKIPPABLE * skippable
        expected.append(Frame(len(data), len(packed), len(content)))
        data += packed
    path = folder / "walk.zst"
    path.write_bytes(data)
    assert frames_of(path) == expected
    path.write_bytes(data + SKIPPABLE)
    assert frames_of(path) == expected


def test_frames_larger_than_a_block_are_found(folder):
    contents = [bytes(i * i * j % 253 for i in range(300_000)) for j in (1, 7)]
    path = folder / "blocks.zst"
    path.write_bytes(b"".join(map(zstd, contents)))
    first, second = map(zstd, contents)
    assert frames_of(path) == [Frame(0, len(first), 300_000), Frame(len(first), len(second), 300_000)]


def test_an_archive_cut_off_at_any_byte_is_not_cut_into_slices(folder):
    packed = [zstd(LINES[:100]), SKIPPABLE, zstd(LINES[100:300])]
    data = b"".join(packed)
    borders = set(itertools.accumulate(map(len, packed)))
    path = folder / "cut.zst"
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        assert (frames_of(path) is None) == (size not in borders)


@pytest.mark.parametrize(
    "data",
    [
        zstd(LINES) + NO_SIZE.compress(LINES),
        zstd(LINES) + b"\0",
        b"plain",
        zstd(b"x")[:4] + b"\x00" * 40,
        zstd(LINES) + zstd(LINES)[:6] + b"\x07\0\0" * 9,  # a reserved kind of block
    ],
)
def test_what_does_not_tell_its_sizes_or_is_no_frame_is_not_cut(folder, data):
    file = input_of(folder / "whole.jsonl.zst", data)
    found = frames_of(folder / "whole.jsonl.zst")
    assert found is None or not found[-1].is_declared
    assert cut_input(file, Fields(), 1) == [WHOLE]


def test_a_header_that_lies_is_found_out_when_its_frame_is_read(folder):
    pieces = pieces_of(LINES, [500, 1000])
    packed = [bytearray(zstd(piece)) for piece in pieces]
    packed[1][5] ^= 1  # the content size, whose two bytes are after magic and descriptor
    file = input_of(folder / "lie.jsonl.zst", b"".join(packed))
    contents = [frame.content for frame in frames_of(folder / "lie.jsonl.zst")]
    assert [content == len(piece) for content, piece in zip(contents, pieces, strict=True)] == [True, False, True]
    rows = [row for where in cut_input(file, Fields(), 500) for row in read_input(file, Fields(), where)]
    assert any(isinstance(row, Rejected) and row.damage for row in rows)


@given(
    st.lists(st.sampled_from([b"", b"{", b'{"text": "x"}', b'{"text": "' + b"long " * 30 + b'"}']), max_size=25),
    st.booleans(),
    st.lists(st.integers(0, 1500), max_size=12),
    st.integers(1, 400),
    st.integers(1, 80),
)
def test_slices_give_the_rows_of_the_whole(folder, lines, last_end, cuts, target, block):
    data = b"\n".join(lines) + b"\n" * last_end
    file = input_of(folder / "slices.jsonl.zst", SKIPPABLE.join(map(zstd, pieces_of(data, cuts))) or zstd(b""))
    slices = cut_input(file, Fields(), target)
    with patch.object(streams, "BLOCK_BYTES", block):
        assert read_slices(file, slices) == list(read_input(file, Fields()))


@given(
    st.lists(st.sampled_from([b"a", b"\n", b"\n\n", b"b\n", b"xyz" * 20]), max_size=25),
    st.lists(st.integers(0, 200), max_size=12),
    st.sampled_from(["\n\n", "b\nb", "yzx"]),
    st.integers(1, 80),
)
def test_slices_of_separated_text_give_the_documents_of_the_whole(folder, pieces, cuts, separator, target):
    file = input_of(folder / "slices.txt.zst", b"".join(map(zstd, pieces_of(b"".join(pieces), cuts))) or zstd(b"x"))
    fields = Fields(separator=separator, max_document=40)
    assert read_slices(file, cut_input(file, fields, target), fields) == list(read_input(file, fields))


def test_slices_are_of_about_the_size_asked_for(folder):
    pieces = [b"x" * 999 + b"\n"] * 100
    file = input_of(folder / "size.jsonl.zst", b"".join(map(zstd, pieces)))
    slices = cut_input(file, Fields(), 10_000)
    assert [where.last - where.first for where in slices] == [10_000] * 10
    assert (slices[0].start, slices[-1].end) == (0, file.size)
    assert all(one.end == two.start and one.last == two.first for one, two in itertools.pairwise(slices))
    assert cut_input(file, Fields(), 100_000) == [WHOLE]
    assert cut_input(input_of(folder / "one.jsonl.zst", zstd(LINES)), Fields(), 10) == [WHOLE]
    assert isinstance(slices[0], Slice)


def test_damage_in_a_frame_takes_only_what_is_cut_with_it(folder):
    frames = [zstd(LINES[i : i + 500]) for i in range(0, len(LINES), 500)]
    frames[2] = frames[2][:20] + bytes(byte ^ 0xFF for byte in frames[2][20:40]) + frames[2][40:]
    file = input_of(folder / "damaged.jsonl.zst", b"".join(frames))
    slices = cut_input(file, Fields(), 500)
    rows = [list(read_input(file, Fields(), where)) for where in slices]
    broken = [bool(found) and isinstance(found[-1], Rejected) and found[-1].damage for found in rows]
    assert broken[2]
    # The slice before it may lack the end of its last line.
    assert not any(broken[:1] + broken[3:])
    after = [row.text for found in rows[3:] for row in found]
    assert after
    assert after == [json.loads(line)["text"] for line in LINES.splitlines()[-len(after) :]]


@given(
    st.sampled_from(sorted(PACK)),
    st.lists(st.sampled_from([b"", b"{", b'{"text": "x"}', b'{"text": "' + b"long " * 30 + b'"}']), max_size=25),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 80),
)
def test_slices_of_a_stream_give_the_rows_of_the_whole(folder, kind, lines, last_end, slices, block):
    data = b"\n".join(lines) + b"\n" * last_end
    file = input_of(folder / f"stream.jsonl.{kind}", PACK[kind](data))
    with patch.object(streams, "BLOCK_BYTES", block):
        assert read_slices(file, cut_input(file, Fields(), 1 << 40, slices)) == list(read_input(file, Fields()))


@pytest.mark.parametrize(("kind", "most"), [("zst", 10), ("gz", 5), ("xz", 3), ("bz2", 1)])
def test_a_stream_has_few_slices_and_its_damage_is_reported_once(folder, kind, most):
    lines = [json.dumps({"text": f"{i} {random.Random(i).getrandbits(99)}"}).encode() for i in range(20_000)]
    packed = PACK[kind](b"\n".join(lines))
    file = input_of(folder / f"few.jsonl.{kind}", packed)
    slices = cut_input(file, Fields(), 1 << 40, 99)
    assert len(slices) == most
    counts = [len(list(read_input(file, Fields(), where))) for where in slices]
    assert sum(counts) == len(lines) and max(counts) < 3 * len(lines) / most, "they are about equal"
    whole = input_of(folder / f"broken.jsonl.{kind}", packed[: len(packed) * 2 // 3])
    rows = [row for where in slices for row in read_input(whole, Fields(), where)]
    (damage,) = (row for row in rows if isinstance(row, Rejected))
    assert damage.damage and damage.reason.startswith("broken off: " if most > 1 else "broken off after line ")
    expected = list(read_input(whole, Fields()))
    assert [row.text for row in rows[:-1]] == [row.text for row in expected[:-1]] or kind == "bz2"
