"""Lines and separated text: every row comes out once, with its place, however the file is cut and read."""

from __future__ import annotations

import itertools
import json
import resource
import threading
from collections import Counter
from unittest.mock import patch

import pytest
from conftest import times
from hypothesis import given
from hypothesis import strategies as st
from source_help import BOM, PACK, byte_ranges, input_of, read_slices, rows_of

from retrotool.errors import InputError
from retrotool.sources import WHOLE, Document, Fields, Rejected, Slice, cut_input, read_input, streams
from retrotool.sources.lines import JSON_OVERHEAD, LineCounter, count_lines, cut_lines
from retrotool.sources.records import content_hash

documents = st.builds(
    lambda text, plain: json.dumps({"text": text}, ensure_ascii=plain).encode(),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.booleans(),
)
junk = st.sampled_from(
    [b"", b"  ", b"\t", b"{", b"[1]", b"null", b"\xff", b"\0\0", b'{"text": 1}', b'{"body": "x"}', b'{"text"']
)
files = st.builds(
    lambda rows, bom, end: (BOM if bom else b"") + b"".join(row + end for row, end in rows) + end,
    st.lists(st.tuples(documents | junk, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    st.booleans(),
    documents | junk,  # a last line without an end
)
MANY = times(250_000, 1_000_000)
cuts = st.lists(st.floats(0, 1), max_size=6)
blocks = st.integers(1, 70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


def places(data: bytes) -> list[tuple[int, int, bytes]]:
    """(line, offset, content) of the lines of a file, found the simple way."""
    pieces = data.split(b"\n")
    offsets = [0, *itertools.accumulate(len(piece) + 1 for piece in pieces)]
    return list(zip(itertools.count(1), offsets[: len(pieces)], pieces, strict=False))


@given(files, cuts, blocks)
def test_every_row_comes_out_once_whatever_the_slices_and_blocks(folder, data, cuts, block):
    file = input_of(folder / "slices.jsonl", data)
    with patch.object(streams, "BLOCK_BYTES", block):
        whole = list(read_input(file, Fields()))
        assert not file.size or read_slices(file, byte_ranges(file.size, cuts)) == whole


@given(files, blocks)
def test_rows_are_the_lines_that_are_not_blank_at_their_own_place(folder, data, block):
    file = input_of(folder / "places.jsonl", data)
    with patch.object(streams, "BLOCK_BYTES", block):
        found = list(read_input(file, Fields()))
    if not data:
        assert found == [Rejected(0, "the file is empty")]
        return
    expected = [(n, offset, line) for n, offset, line in places(data) if line.removeprefix(BOM).strip()]
    assert [(row.line, row[3] if isinstance(row, Document) else row.offset) for row in found] == [
        (n, offset) for n, offset, _ in expected
    ]
    for row, (_, offset, line) in zip(found, expected, strict=True):
        if isinstance(row, Document):
            assert row.text == json.loads(line.removeprefix(BOM if offset == 0 else b""))["text"]


@given(files, blocks, st.data())
def test_lines_are_counted_as_they_are_numbered(folder, data, block, draw):
    file = input_of(folder / "count.jsonl", data)
    known = [(n, offset) for n, offset, line in places(data) if line]
    chosen = sorted(draw.draw(st.sets(st.sampled_from(known)))) if known else []
    with patch.object(streams, "BLOCK_BYTES", block):
        assert count_lines(file, [offset for _, offset in chosen]) == [n for n, _ in chosen]


@given(files, st.lists(st.floats(0, 1), max_size=6), st.sampled_from(["", "\n\n", "ab"]), st.randoms())
def test_lines_before_ranges_do_not_depend_on_the_order_of_asking(folder, data, cuts, separator, random):
    file, fields = input_of(folder / "order.txt", data), Fields(separator=separator)
    ranges, counter = byte_ranges(file.size, cuts), LineCounter()
    random.shuffle(ranges)
    for where in ranges:
        assert counter.before(file, where, fields) == LineCounter().before(file, where, fields)


def test_a_file_is_read_once_to_count_the_lines_before_all_ranges(tmp_path):
    file, read = input_of(tmp_path / "a.jsonl", b"0123456789\n" * 2000), 0
    ranges, counter = byte_ranges(file.size, [i / 50 for i in range(50)]), LineCounter()

    def counted(*given):
        nonlocal read
        for block in reading(*given):
            read += len(block)
            yield block

    reading = streams.blocks
    with patch.object(streams, "BLOCK_BYTES", 64), patch.object(streams, "blocks", counted):
        found = [counter.before(file, where, Fields()) for where in ranges]
    assert found == [0, *(1 + where.first // 11 for where in ranges[1:])]
    assert read < file.size + 64 * len(ranges)


@pytest.mark.parametrize("kind", PACK)
def test_lines_behind_damage_can_not_be_counted(tmp_path, kind):
    packed = PACK[kind](b"line\n" * 100) + PACK[kind](b"line\n" * 100)
    file = input_of(tmp_path / f"a.jsonl.{kind}", packed[:-6])
    assert count_lines(file, [0, 5, 250]) == [1, 2, 51]
    with pytest.raises(InputError, match="lines can't be counted: "):
        count_lines(file, [0, 999_999])


pieces_of_text = st.lists(
    st.sampled_from([b"a", b"-", b"\n", b"ab", b"\n\n", b"----", b"a-a", b"xyz" * 9]), max_size=25
)


@given(
    pieces_of_text,
    st.sampled_from([b"\n", b"\n\n", b"aba", b"\n--\n"]) | st.text("a-", min_size=1, max_size=5).map(str.encode),
    st.integers(1, 20),
    st.integers(0, 30),
)
def test_lines_are_what_no_occurrence_of_the_separator_covers(pieces, separator, block, limit):
    data = b"".join(pieces)
    covered = {
        place + i
        for place in range(len(data))
        if data.startswith(separator, place)
        for i in range(len(separator))
    }  # fmt: skip
    expected = []
    for free, run in itertools.groupby(range(len(data)), lambda place: place not in covered):
        if free:
            first, *_, last = [*(run := list(run)), run[-1]]
            expected.append((first, data[first : last + 1]))
    stream = (data[i : i + block] for i in range(0, len(data), block))
    found = [line for line in cut_lines(stream, 0, None, limit, separator) if line.data != b""]
    assert [line.offset for line in found] == [offset for offset, _ in expected]
    for line, (_, text) in zip(found, expected, strict=True):
        if len(text) > limit:
            assert (line.data, line.head, line.size) == (None, text[:1024], len(text))
        else:
            assert line.data == text


@given(pieces_of_text, st.sampled_from(["\n\n", "--", "aba", "\n--\n", "ab", "é"]), cuts, blocks)
def test_separated_text_comes_out_once_whatever_the_slices(folder, pieces, separator, cuts, block):
    file = input_of(folder / "separated.txt", b"".join(pieces) or b"x")
    fields = Fields(separator=separator, max_document=20)
    with patch.object(streams, "BLOCK_BYTES", block):
        whole = list(read_input(file, fields))
        assert read_slices(file, byte_ranges(file.size, cuts), fields) == whole


def test_separated_documents_have_offsets_and_ids_of_their_text(tmp_path):
    text = "one<|end|><|end|> \n<|end|>zwei ü<|end|>" + "x" * 50 + "<|end|>last"
    rows = rows_of(tmp_path / "a.txt", text.encode(), separator="<|end|>", max_document=40, keep=("k",))
    assert rows == [
        Document(content_hash("one").hex(), "one", "a.txt", 0, 1, (None,)),
        Document(content_hash("zwei ü").hex(), "zwei ü", "a.txt", 26, 4, (None,)),
        Rejected(5, "text has 50 bytes, more than --max-document 40", 40, "x" * 50),
        Document(content_hash("last").hex(), "last", "a.txt", 97, 6, (None,)),
    ]


def test_only_what_can_be_read_in_slices_is_cut(tmp_path):
    text = input_of(tmp_path / "a.txt", b"a\n\nb" * 100)
    assert cut_input(text, Fields(), 50) == [WHOLE]
    assert len(cut_input(text, Fields(separator="\n\n"), 50)) == 8
    assert cut_input(input_of(tmp_path / "a.csv", b"text\nx\n" * 100), Fields(), 50) == [WHOLE]
    slices = cut_input(input_of(tmp_path / "a.jsonl", b"{}\n" * 100), Fields(), 100)
    assert slices == [Slice(0, 100, 0, 100), Slice(100, 200, 100, 200), Slice(200, 300, 200, 300)]


long_lines = st.lists(
    st.sampled_from([b"x", b"x" * 30, b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 200, b"x" * 999]), min_size=1
)


@given(long_lines, st.booleans(), cuts, st.integers(1, 64))
def test_lines_over_the_limit_are_set_aside_and_what_follows_is_read(folder, lines, last_end, cuts, block):
    data = b"\n".join(lines) + b"\n" * last_end
    file = input_of(folder / "long.jsonl", data)
    with patch("retrotool.sources.lines.line_limit", lambda fields: 64), patch.object(streams, "BLOCK_BYTES", block):
        whole = list(read_input(file, Fields()))
        assert read_slices(file, byte_ranges(file.size, cuts)) == whole
    expected = ["line of" if len(line) > 64 else "not JSON" for line in lines]
    assert [row.reason[: len(start)] for row, start in zip(whole, expected, strict=True)] == expected


@pytest.mark.parametrize("size", [10, 100, 101])
def test_the_limit_is_on_the_text_in_bytes(tmp_path, size):
    text = "é" * (size // 2) + "x" * (size % 2)
    (row,) = rows_of(tmp_path / "a.jsonl", json.dumps({"text": text}).encode(), max_document=100)
    assert isinstance(row, Document) == (size <= 100)
    (row,) = rows_of(tmp_path / "a.txt", BOM + text.encode(), max_document=100)
    assert isinstance(row, Document) == (size <= 100)


def test_a_line_of_a_gigabyte_is_not_held():
    block = b"x" * (1 << 20)
    stream = itertools.chain(itertools.repeat(block, 1024), [b'"\n{}\n'])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long, short = cut_lines(stream, 0, None, 1 << 20)
    assert (long.data, long.size, long.head) == (None, (1 << 30) + 1, block[:1024])
    assert (short.data, short.offset, short.number) == (b"{}", (1 << 30) + 2, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_very_many_lines_of_nothing_are_no_rows(tmp_path):
    assert rows_of(tmp_path / "a.jsonl", b"\n" * MANY) == []
    (row,) = rows_of(tmp_path / "b.jsonl", b"\n" * MANY + b'{"text": "x"}')
    assert (row.line, row.position) == (MANY + 1, MANY)
    assert rows_of(tmp_path / "c.txt", b"\n" * MANY, separator="\n\n") == []


def test_very_many_empty_documents_are_each_set_aside(tmp_path):
    file = input_of(tmp_path / "a.jsonl", b'{"text":""}\n' * MANY)
    assert Counter(row.reason for row in read_input(file, Fields())) == {"'text' is empty": MANY}


STRANGE = {
    rb'{"text": "\ud800"}': "not JSON",
    rb'{"text": "\udc00\ud800"}': "not JSON",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8 at byte 10",
    b'{"text": NaN}': "not JSON",
    b'{"text": 1e999}': "not JSON",
    b'{"text": "a\0b"}': "not JSON",
    b"\0" * 100: "not JSON",
    b"[" * 5000: "not JSON",
    b'{"text": "x"} {"text": "y"}': "not JSON",
    b'{"text": ["x"]}': "'text' is not a string",
}


@pytest.mark.parametrize("line", STRANGE)
def test_strange_lines_are_set_aside_alone(tmp_path, line):
    good = b'{"text": "x"}\n'
    first, strange, last = rows_of(tmp_path / "a.jsonl", good + line + b"\n" + good)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert strange.reason.startswith(STRANGE[line])
    assert (strange.line, strange.offset, strange.damage) == (2, len(good), False)
    assert strange.excerpt.isprintable()


def test_equal_keys_and_large_numbers_are_what_orjson_makes_of_them(tmp_path):
    rows = rows_of(tmp_path / "a.jsonl", b'{"text":"x","text":"y","n":123456789012345678901}', keep=("n",))
    assert [(row.text, row.kept) for row in rows] == [("y", ("1.2345678901234568e+20",))]


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path):
    file = input_of(tmp_path / "a.jsonl", b'{"text": "x"}\n' * 500_000)
    rows = read_input(file, Fields())
    for _ in range(20_000):  # more than the first block
        next(rows)
    assert "retrotool-ahead" in {thread.name for thread in threading.enumerate()}
    rows.close()
    assert "retrotool-ahead" not in {thread.name for thread in threading.enumerate()}


def test_the_limit_leaves_room_for_json_escapes(tmp_path):
    text = "é" * 50
    assert len(json.dumps(text)) - 2 == JSON_OVERHEAD * len(text.encode())
    with patch("retrotool.sources.lines.line_limit", lambda fields: JSON_OVERHEAD * fields.max_document + 20):
        (row,) = rows_of(tmp_path / "a.jsonl", json.dumps({"text": text}).encode(), max_document=100)
    assert row.text == text
