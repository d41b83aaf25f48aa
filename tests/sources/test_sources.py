"""Sources: every row of an input comes out once, with its place, however the file is cut, packed or broken."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retrotool.errors import UsageError
from retrotool.sources import Document, Fields, SetAside, find_inputs, lines, read
from retrotool.sources.lines import count_lines, lines_before
from retrotool.sources.records import content_id

BOM = b"\xef\xbb\xbf"

documents = st.builds(
    lambda text, plain: json.dumps({"text": text}, ensure_ascii=plain).encode(),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.booleans(),
)
junk = st.sampled_from(
    [b"", b"  ", b"\t", b"{", b"[1]", b"null", b"\xff", b'{"text": 1}', b'{"body": "x"}', b'{"text"']
)
files = st.builds(
    lambda rows, bom, end: (BOM if bom else b"") + b"".join(row + end for row, end in rows) + end,
    st.lists(st.tuples(documents | junk, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    st.booleans(),
    documents | junk,  # a last line without an end
)
cuts = st.lists(st.floats(0, 1), max_size=6)
blocks = st.integers(1, 70)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def input_of(path: Path, data: bytes | None = None):
    if data is not None:
        path.write_bytes(data)
    return find_inputs([str(path)])[0]


def ranges_of(size: int, cuts: list[float]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(sorted({0, size, *(int(cut * size) for cut in cuts)})))


def read_in_ranges(file, cuts: list[float]) -> list[tuple[int, Document | SetAside]]:
    """(line in the file, row) of all ranges."""
    found = []
    for start, end in ranges_of(file.size, cuts):
        before = lines_before(Path(file.path), start)
        found += [(row.line + before, row) for row in read(file, Fields(), start, end)]
    return found


@contextmanager
def row_limit(limit: int) -> Iterator[None]:
    """A smaller MAX_ROW_BYTES in every module that imports it."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("retrotool.") and hasattr(module, "MAX_ROW_BYTES"):
                stack.enter_context(patch.object(module, "MAX_ROW_BYTES", limit))
        yield


def places(data: bytes) -> list[tuple[int, int, bytes]]:
    """(line, offset, content) of the lines of a file, found the simple way."""
    pieces = data.split(b"\n")
    offsets = [0, *itertools.accumulate(len(piece) + 1 for piece in pieces)]
    return list(zip(itertools.count(1), offsets[: len(pieces)], pieces, strict=False))


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


@settings(deadline=None, max_examples=150)
@given(files, cuts, blocks)
def test_every_row_comes_out_once_whatever_the_ranges_and_blocks(folder, data, cuts, block):
    file = input_of(folder / "ranges.jsonl", data)
    with patch.object(lines, "BLOCK_BYTES", block):
        whole = list(read(file, Fields()))
        cut = read_in_ranges(file, cuts) if file.size else [(row.line, row) for row in whole]
    assert [line for line, _ in cut] == [row.line for row in whole]
    for (_, row), same in zip(cut, whole, strict=True):
        assert type(row) is type(same)
        if isinstance(row, SetAside):
            assert row.reason == same.reason
        else:
            assert (row.id, row.text, row.position) == (same.id, same.text, same.position)


@settings(deadline=None, max_examples=100)
@given(files, blocks)
def test_rows_are_the_lines_that_are_not_blank_at_their_own_place(folder, data, block):
    file = input_of(folder / "places.jsonl", data)
    expected = [(n, offset, line) for n, offset, line in places(data) if not is_blank(line)]
    with patch.object(lines, "BLOCK_BYTES", block):
        found = list(read(file, Fields()))
    if not data:
        assert found == [SetAside(0, "the file is empty")]
        return
    assert [row.line for row in found] == [n for n, _, _ in expected]
    for row, (_, offset, line) in zip(found, expected, strict=True):
        if isinstance(row, Document):
            assert row.position == offset
            assert row.text == json.loads(line.removeprefix(BOM if offset == 0 else b""))["text"]


@settings(deadline=None, max_examples=50)
@given(files, blocks, st.data())
def test_lines_are_counted_as_they_are_numbered(folder, data, block, draw):
    path = folder / "count.jsonl"
    path.write_bytes(data)
    known = [(n, offset) for n, offset, line in places(data) if line]
    chosen = sorted(draw.draw(st.sets(st.sampled_from(known)))) if known else []
    with patch.object(lines, "BLOCK_BYTES", block):
        assert count_lines(path, "jsonl", [offset for _, offset in chosen]) == [n for n, _ in chosen]


long_lines = st.lists(st.sampled_from([b"x", b"x" * 30, b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 200, b"x" * 999]))


@settings(deadline=None, max_examples=100)
@given(long_lines, st.booleans(), cuts, st.integers(1, 64))
def test_lines_over_the_limit_are_set_aside_and_what_follows_is_read(folder, sizes, last_end, cuts, block):
    data = b"\n".join(b'"%s"' % line[2:] if len(line) > 2 else line for line in sizes) + b"\n" * last_end
    file = input_of(folder / "long.jsonl", data or b"x")
    with row_limit(64), patch.object(lines, "BLOCK_BYTES", block):
        found = read_in_ranges(file, cuts)
        whole = list(read(file, Fields()))
    assert [(line, row.reason) for line, row in found] == [(row.line, row.reason) for row in whole]
    reasons = {row.line: row.reason for row in whole}
    for number, line in enumerate(sizes, 1):
        assert ("line longer than 64 bytes" in reasons[number]) == (len(line) > 64)


def test_long_texts_are_set_aside_in_every_format(folder):
    rows = [{"text": "x" * 50}, {"text": "y" * 101}, {"text": "z" * 50}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "long.parquet")
    (folder / "long.txt").write_text("t" * 101)
    with row_limit(100):
        found = list(read(input_of(folder / "long.parquet"), Fields()))
        (text,) = read(input_of(folder / "long.txt"), Fields())
    assert [row.line for row in found] == [1, 2, 3]
    assert [type(row) for row in found] == [Document, SetAside, Document]
    assert found[1] == SetAside(2, "text of 101 characters, more than 100")
    assert text == SetAside(0, "text of 101 bytes, more than 100")


ROWS = [
    {"id": "a", "text": "one\ntwo", "source": "s", "year": 2001, "tags": ["x", "y"], "note": None},
    {"id": "7", "text": "ünïcödé 🎈 \u2028", "source": None, "year": 2002, "tags": [], "note": "n"},
    {"id": None, "text": "no id", "source": "s", "year": None, "tags": None, "note": ""},
]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CUT = PLAIN.index(b"\n") + 5  # members and frames end inside a line
WRITERS: dict[str, Callable[[Path], object]] = {
    "plain.jsonl": lambda path: path.write_bytes(PLAIN),
    "plain.ndjson": lambda path: path.write_bytes(PLAIN.rstrip(b"\n")),
    "one.jsonl.gz": lambda path: path.write_bytes(gzip.compress(PLAIN)),
    "members.jsonl.gz": lambda path: path.write_bytes(b"".join(map(gzip.compress, (PLAIN[:CUT], PLAIN[CUT:])))),
    "one.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(PLAIN)),
    "frames.jsonl.zst": lambda path: path.write_bytes(b"".join(map(zstandard.compress, (PLAIN[:CUT], PLAIN[CUT:])))),
    "UPPER.JSONL": lambda path: path.write_bytes(BOM + PLAIN.replace(b"\n", b"\r\n")),
    "table.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_formats_give_equal_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    found = list(read(input_of(tmp_path / name), Fields(keep=("year", "tags", "note", "missing"))))
    assert [(d.id, d.text, d.source, d.line, d.kept) for d in found] == [
        ("a", "one\ntwo", "s", 1, ("2001", '["x","y"]', None, None)),
        ("7", "ünïcödé 🎈 \u2028", name, 2, ("2002", "[]", "n", None)),
        (content_id("no id"), "no id", "s", 3, (None, None, "", None)),
    ]


@pytest.mark.parametrize("name", ["one.jsonl.gz", "members.jsonl.gz", "one.jsonl.zst", "frames.jsonl.zst"])
def test_offsets_in_compressed_files_are_those_of_what_they_hold(tmp_path, name):
    WRITERS[name](tmp_path / name)
    file = input_of(tmp_path / name)
    offsets = [document.position for document in read(file, Fields())]
    assert offsets == [offset for _, offset, line in places(PLAIN) if line]
    assert count_lines(tmp_path / name, file.format, offsets) == [1, 2, 3]


def test_a_text_file_is_one_document_named_by_its_path(tmp_path):
    inner = tmp_path / "books" / "a" / "one.txt"
    inner.parent.mkdir(parents=True)
    inner.write_bytes(BOM + "línea\r\n".encode())
    (file,) = find_inputs([str(tmp_path / "books")])
    assert list(read(file, Fields(keep=("k",)))) == [Document("books/a/one.txt", "línea\r\n", "books/a", 0, 0, (None,))]
    (alone,) = find_inputs([str(inner)])
    (document,) = read(alone, Fields())
    assert (document.id, document.source) == ("one.txt", "one.txt")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("x", "x"), (5, "5"), (-5, "-5"), (0, "0"), (2**63, str(2**63)), (None, content_id("t"))],
)
def test_ids_are_strings_whole_numbers_or_made_of_the_text(tmp_path, given, expected):
    file = input_of(tmp_path / "ids.jsonl", json.dumps({"id": given, "text": "t"}).encode())
    assert [row.id for row in read(file, Fields())] == [expected]


@pytest.mark.parametrize("given", [1.5, True, [], {}, ""])
def test_other_ids_are_set_aside(tmp_path, given):
    file = input_of(tmp_path / "ids.jsonl", json.dumps({"id": given, "text": "t"}).encode())
    assert list(read(file, Fields())) == [SetAside(1, "'id' is neither a string nor a whole number")]


def test_fields_are_found_by_the_names_given(tmp_path):
    row = {"doi": "10/x", "body": "b", "text": "not this", "id": "not this", "source": "s"}
    file = input_of(tmp_path / "fields.jsonl", json.dumps(row).encode())
    assert list(read(file, Fields("body", "doi", ("text",)))) == [Document("10/x", "b", "s", 0, 1, ("not this",))]


def test_folders_give_files_of_known_formats_once_in_order(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", ".hidden.txt", ".git/d.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([str(tmp_path / "b.jsonl"), str(tmp_path), str(tmp_path / "a.txt")])
    assert [Path(file.path).name for file in found] == ["b.jsonl", "a.txt", "c.parquet"]


@pytest.mark.parametrize("name", ["missing.jsonl", "image.png", "empty-folder"])
def test_what_can_be_no_input_is_named(tmp_path, name):
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "empty-folder").mkdir()
    with pytest.raises(UsageError, match=name):
        find_inputs([str(tmp_path / name)])


def test_fingerprints_tell_content_from_names(tmp_path):
    one, copy, other = (input_of(tmp_path / f"{n}.jsonl", data) for n, data in enumerate([b"x1", b"x1", b"x2"]))
    assert one.fingerprint() == copy.fingerprint() != other.fingerprint()
    texts = [input_of(tmp_path / name, b"same") for name in ("a.txt", "b.txt")]
    assert texts[0].fingerprint() != texts[1].fingerprint()  # of a text file the name is the document's id
