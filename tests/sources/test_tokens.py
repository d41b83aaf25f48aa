"""Token files: what a writer put in comes out, whole or in slices, and what is damaged is named with its place."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrotool.errors import UsageError
from retrotool.sources import Document, Fields, SetAside, cut, find_inputs, megatron, read, token_ranges, tokens
from retrotool.sources.records import tokens_id

MARK = 9
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8, "<u4": 9, "<u8": 10}

sequences = st.lists(st.integers(0, 8), max_size=5)
corpora = st.lists(st.lists(sequences, max_size=3), max_size=12)
"""Documents of sequences of ids; 9 is left free as a mark."""
blocks = st.sampled_from([8, 16, 64, 1 << 20])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def write_megatron(prefix: Path, corpus: Sequence, dtype: str, modes: bytes | None = None) -> None:
    """The layout of Megatron's index from its definition, one field after the other."""
    flat = [sequence for document in corpus for sequence in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in flat))
    width = np.dtype(dtype).itemsize
    ends = np.cumsum([0, *map(len, corpus)])
    starts = np.cumsum([0, *map(len, flat)])[:-1] * width
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, CODES[dtype], len(flat), len(ends))
        + np.array([len(s) for s in flat], "<i4").tobytes()
        + starts.astype("<i8").tobytes()
        + ends.astype("<i8").tobytes()
        + (modes or b"")
    )


def write_torchnet(prefix: Path, corpus: Sequence, dtype: str) -> None:
    """The layout of the older index."""
    flat = [sequence for document in corpus for sequence in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in flat))
    longs = [
        np.arange(len(flat) + 1), np.cumsum([0, *map(len, flat)]), np.array([len(s) for s in flat]),
        np.cumsum([0, *map(len, corpus)]),
    ]  # fmt: skip
    prefix.with_suffix(".idx").write_bytes(
        b"TNTIDX\0\0"
        + struct.pack("<QQQ", 1, CODES[dtype], np.dtype(dtype).itemsize)
        + struct.pack("<QQQ", len(flat), len(flat), len(longs[3]))
        + b"".join(part.astype("<i8").tobytes() for part in longs)
    )


def write_fairseq(prefix: Path, corpus: Sequence, dtype: str) -> None:
    """fairseq's memory-mapped index, which has no documents: a document is a sequence."""
    write_megatron(prefix, corpus, dtype)
    index = prefix.with_suffix(".idx").read_bytes()
    count = sum(map(len, corpus))
    prefix.with_suffix(".idx").write_bytes(index[:26] + index[34 : 34 + 12 * count])


def input_of(path: Path):
    return find_inputs([str(path)])[0]


def ids_of(rows) -> list[list[int]]:
    """Ids of each row, [] for one set aside."""
    return [row.tokens.tolist() if isinstance(row, Document) else [] for row in rows]


def comparable(rows) -> list:
    return [
        (row.id, row.tokens.tolist(), row.position, row.source) if isinstance(row, Document) else row.reason
        for row in rows
    ]


@settings(deadline=None, max_examples=120)
@given(corpora, st.sampled_from(sorted(CODES)), st.sampled_from([write_megatron, write_torchnet]), blocks)
def test_an_indexed_dataset_gives_its_documents(folder, corpus, dtype, write, block):
    write(folder / "data", corpus, dtype)
    file = input_of(folder / "data.idx")
    expected = [list(itertools.chain(*document)) for document in corpus]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_ranges, "BLOCK_BYTES", block)
        patch.setattr(megatron, "WINDOW_DOCUMENTS", 3)
        patch.setattr(megatron, "WINDOW_SEQUENCES", 4)
        found = list(read(file, Fields(keep=("a",))))
    if not file.size:
        assert found == [SetAside(0, "the file is empty")]
        return
    assert ids_of(found) == expected
    for number, row in enumerate(found, 1):
        assert row.line == number
        if isinstance(row, Document):
            assert (row.text, row.position, row.source, row.kept) == ("", number, "data.bin", (None,))
            assert row.id == tokens_id(np.array(expected[number - 1]))
        else:
            assert row.reason == "no tokens"


@settings(deadline=None, max_examples=100)
@given(corpora, st.sampled_from([write_megatron, write_torchnet, write_fairseq]), st.integers(1, 60))
def test_slices_of_an_indexed_dataset_are_the_whole(folder, corpus, write, target):
    write(folder / "sliced", corpus, "<u2")
    file = input_of(folder / "sliced.bin")
    slices = cut(file, Fields(), target)
    assert slices[0].first == 0
    together = [row for where in slices for row in read(file, Fields(), where)]
    assert comparable(together) == comparable(read(file, Fields()))


@settings(deadline=None, max_examples=50)
@given(corpora)
def test_a_sequence_is_a_document_where_the_index_has_none(folder, corpus):
    write_fairseq(folder / "fairseq", corpus, "<i4")
    file = input_of(folder / "fairseq")
    if file.size:
        assert ids_of(read(file, Fields())) == [sequence for document in corpus for sequence in document]


def test_index_tokens_and_prefix_name_one_input(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2]]], "<u2")
    given = [str(tmp_path / name) for name in ("c", "c.bin", "c.idx")]
    (file,) = find_inputs(given)
    assert (file.name, file.base, file.size) == ("c.bin", "tokens", 4)
    assert find_inputs([str(tmp_path)])[0].path == file.path


def test_a_fingerprint_covers_the_index(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2]], [[3]]], "<u2")
    before = input_of(tmp_path / "c").fingerprint()
    write_megatron(tmp_path / "c", [[[1, 2], [3]]], "<u2")
    assert input_of(tmp_path / "c").fingerprint() != before


@pytest.mark.parametrize("write", [write_megatron, write_torchnet])
def test_exactly_one_end_mark_is_stripped(tmp_path, write):
    write(tmp_path / "c", [[[1, 2, MARK]], [[3]], [[4, MARK, MARK]], [[MARK]], [[MARK, 5]]], "<i4")
    found = list(read(input_of(tmp_path / "c"), Fields(end_of_document=MARK)))
    assert ids_of(found) == [[1, 2], [3], [4, MARK], [], [MARK, 5]]
    assert found[3] == SetAside(4, "no tokens before its end mark 9")


def test_sequences_out_of_order_are_put_together(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2], [3]], [[4, 5]]], "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[34 + 12 : 34 + 12 + 24] = np.array([4, 2, 0], "<i8").tobytes()  # the sequences' places, in bytes
    (tmp_path / "c.idx").write_bytes(index)
    # Behind the last sequence that the index names lie four bytes that the first one takes.
    assert ids_of(read(input_of(tmp_path / "c"), Fields()))[:2] == [[3, 4, 2], [1, 2]]


def test_what_is_no_text_is_set_aside(tmp_path):
    write_megatron(tmp_path / "c", [[[1], [2]], [[3]], [[4], [5]]], "<u2", bytes([0, 0, 0, 0, 1]))
    found = list(read(input_of(tmp_path / "c"), Fields()))
    assert ids_of(found) == [[1, 2], [3], []]
    assert found[2] == SetAside(3, "its sequence 4 is no text: its mode is not 0")


def test_negative_ids_are_set_aside(tmp_path):
    write_megatron(tmp_path / "c", [[[1, -2]], [[3]]], "<i4")
    found = list(read(input_of(tmp_path / "c"), Fields()))
    assert found[0] == SetAside(1, "a negative token id, -2, at token 1")
    assert ids_of(found) == [[], [3]]


def test_documents_over_the_limit_are_set_aside_unread(tmp_path):
    write_megatron(tmp_path / "c", [[[1] * 26], [[2] * 25], [[3] * 10, [3] * 20]], "<u2")
    found = list(read(input_of(tmp_path / "c"), Fields(max_document=100)))
    assert found[0] == SetAside(1, "26 tokens, 4 bytes each, are more than --max-document 100")
    assert ids_of(found) == [[], [2] * 25, []]


CORPUS = [[[1, 2], [3]], [[4]], [[5, 6]]]
LENGTHS, POINTERS, EDGES = 34, 34 + 16, 34 + 16 + 32


@pytest.mark.parametrize(
    ("offset", "value", "row", "reason"),
    [
        (LENGTHS, struct.pack("<i", -1), 1, "its sequence 0 has a negative length or place"),
        (LENGTHS + 8, struct.pack("<i", 2**31 - 1), 2, "its sequence 2 lies beyond the end of the file, 12 bytes"),
        (POINTERS + 16, struct.pack("<q", -2), 2, "its sequence 2 has a negative length or place"),
        (POINTERS + 16, struct.pack("<q", 2**63 - 1), 2, "its sequence 2 lies beyond the end of the file, 12 bytes"),
        (POINTERS + 16, struct.pack("<q", 12), 2, "its sequence 2 lies beyond the end of the file, 12 bytes"),
        (EDGES + 8, struct.pack("<q", -5), 1, "it spans sequences 0 to -5 of 4"),
        (EDGES + 16, struct.pack("<q", 2**62), 2, f"it spans sequences 2 to {2**62:,} of 4"),
        (EDGES + 16, struct.pack("<q", 1), 2, "it spans sequences 2 to 1 of 4"),
    ],
)
def test_a_document_that_leads_outside_is_set_aside(tmp_path, offset, value, row, reason):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[offset : offset + len(value)] = value
    (tmp_path / "c.idx").write_bytes(index)
    found = list(read(input_of(tmp_path / "c"), Fields()))
    assert SetAside(row, reason) in found
    expected = [[1, 2, 3], [4], [5, 6]]
    for number, ids in enumerate(ids_of([r for r in found if r.line]), 1):
        if ids and number not in (row, row + 1):
            assert ids == expected[number - 1]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8), st.sampled_from([write_megatron, write_torchnet]))
def test_a_damaged_index_never_leads_outside_and_loses_no_document_in_silence(folder, place, junk, write):
    write(folder / "junk", CORPUS, "<u2")
    path = folder / "junk.idx"
    index = bytearray(path.read_bytes())
    place %= len(index)
    index[place : place + len(junk)] = junk[: len(index) - place]
    path.write_bytes(index)
    found = list(read(input_of(folder / "junk"), Fields()))
    rows = [row for row in found if row.line]
    assert len(rows) == 3 or any(row.damage for row in found if isinstance(row, SetAside))
    allowed = {1, 2, 3, 4, 5, 6} | set(np.frombuffer((folder / "junk.bin").read_bytes(), "u1").tolist())
    for row in found:
        if isinstance(row, Document):
            assert set(row.tokens.astype("<u8").view("u1").tolist()) <= allowed | {0, 255}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.sampled_from([write_megatron, write_torchnet]))
def test_a_cut_off_index_is_damage(folder, left, write):
    write(folder / "short", CORPUS, "<u2")
    path = folder / "short.idx"
    index = path.read_bytes()
    path.write_bytes(index[: min(left, len(index) - 1)])
    (row,) = read(input_of(folder / "short"), Fields())
    assert isinstance(row, SetAside)
    assert row.damage
    assert "short.idx" in row.reason


@pytest.mark.parametrize("kept", range(1, 12))
def test_of_a_cut_off_file_the_documents_before_come_out(tmp_path, kept):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    path = tmp_path / "c.bin"
    path.write_bytes(path.read_bytes()[:kept])
    *found, last = read(input_of(path), Fields())
    whole = sum(end <= kept for end in (6, 8, 12))
    assert ids_of(found) == [[1, 2, 3], [4], [5, 6]][:whole]
    assert last.damage
    assert last.line == whole + 1
    assert f"{3 - whole} documents lie beyond the file's end at {kept} bytes" in last.reason


def test_what_belongs_to_no_document_is_told(tmp_path):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[EDGES : EDGES + 32] = np.array([1, 2, 3, 3], "<i8").tobytes()
    (tmp_path / "c.idx").write_bytes(index)
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes() + b"xy")
    found = list(read(input_of(tmp_path / "c"), Fields()))
    assert [row.reason for row in found if not row.line] == [
        "the first 1 of 4 sequences belong to no document",
        "the last 1 of 4 sequences belong to no document",
        "2 bytes after the last sequence belong to no document",
    ]


def test_other_indexes_are_refused(tmp_path):
    write_torchnet(tmp_path / "fairseq", CORPUS, "<i4")
    index = (tmp_path / "fairseq.idx").read_bytes()
    (tmp_path / "fairseq.idx").write_bytes(index[:48] + index[56:-32])  # fairseq's has no documents
    write_megatron(tmp_path / "floats", CORPUS, "<u4")
    index = bytearray((tmp_path / "floats.idx").read_bytes())
    index[17] = 7
    (tmp_path / "floats.idx").write_bytes(index)
    index[9] = 2
    (tmp_path / "version.idx").write_bytes(index)
    (tmp_path / "git.idx").write_bytes(b"\xfftOc" + bytes(100))
    for name in ("version", "git"):
        (tmp_path / f"{name}.bin").write_bytes(b"xx")
    (tmp_path / "alone.idx").write_bytes(b"x")
    reasons = {file.name: [row.reason for row in read(file, Fields())] for file in find_inputs([str(tmp_path)])}
    assert {Path(name).name: reason for name, (reason,) in reasons.items()} == {
        "alone.idx": "alone.bin is missing: an index has no tokens",
        "fairseq.bin": "fairseq.idx was written by fairseq, with ids one higher than the tokenizer's and no documents",
        "floats.bin": "floats.idx holds no token ids: its type code is 7",
        "git.bin": "git.idx is no index of Megatron's: it begins with b'\\xfftOc\\x00\\x00\\x00\\x00\\x00'",
        "version.bin": "version.idx has version 2, of which nothing is known",
    }


# Plain files

marked = st.lists(st.integers(7, 10), max_size=60)
"""Ids among which the mark is frequent."""


def split(ids: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(place, ids) of the documents between marks, found the simple way; an empty one at the beginning is none."""
    found, begin = [], 0
    for place, token in enumerate(ids):
        if token == MARK:
            found.append((begin, list(ids[begin:place])))
            begin = place + 1
    if begin < len(ids):
        found.append((begin, list(ids[begin:])))
    return found[1:] if found[:1] == [(0, [])] else found


@settings(deadline=None, max_examples=150)
@given(marked, st.sampled_from(["<u2", "<u4"]), st.sampled_from(["bin", "suffix", "npy"]), blocks, st.integers(8, 60))
def test_marks_end_documents_whole_or_in_slices(folder, ids, dtype, kind, block, target):
    suffix = {"bin": ".bin", "npy": ".npy", "suffix": ".u16" if dtype == "<u2" else ".u32"}[kind]
    path = folder / f"plain{suffix}"
    if kind == "npy":
        np.save(path, np.array(ids, dtype))
    else:
        path.write_bytes(np.array(ids, dtype).tobytes())
    file = input_of(path)
    header = file.size - len(ids) * np.dtype(dtype).itemsize
    fields = Fields(token_dtype=np.dtype(dtype).name if kind == "bin" else None, end_of_document=MARK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BLOCK_BYTES", block)
        whole = list(read(file, fields))
        slices = cut(file, Fields(), target)
        together = [row for where in slices for row in read(file, fields, where)]
    if not file.size:
        assert whole == [SetAside(0, "the file is empty")]
        return
    expected = split(ids)
    assert ids_of(whole) == [document for _, document in expected]
    assert [row.line for row in whole] == list(range(1, len(expected) + 1))
    for row, (place, _) in zip(whole, expected, strict=True):
        at = row.position if isinstance(row, Document) else row.offset
        assert at == header + place * np.dtype(dtype).itemsize
    assert comparable(together) == comparable(whole)


def test_long_documents_are_cut_into_several_slices(tmp_path):
    path = tmp_path / "long.u16"
    path.write_bytes(np.array([1] * 99 + [MARK] + [2] * 899 + [MARK, 3], "<u2").tobytes())
    slices = cut(input_of(path), Fields(), 100)
    assert len(slices) == 21
    fields = Fields(end_of_document=MARK)
    assert [len(list(read(input_of(path), fields, where))) for where in slices].count(1) == 3
    over = list(read(input_of(path), Fields(end_of_document=MARK, max_document=3000)))
    assert over[1] == SetAside(2, "899 tokens, 4 bytes each, are more than --max-document 3,000", 200)
    assert [len(ids) for ids in ids_of(over)] == [99, 0, 1]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=10), st.sampled_from(["bin", "npy"]), blocks)
def test_offsets_beside_a_file_tell_its_documents(folder, corpus, kind, block):
    path = folder / f"placed.{kind}"
    flat = np.array(list(itertools.chain(*corpus)), "<u4")
    if kind == "npy":
        np.save(path, flat)
    else:
        path.write_bytes(flat.tobytes())
    np.save(folder / "placed.offsets.npy", np.cumsum([0, *map(len, corpus)]))
    file = input_of(path)
    fields = Fields(token_dtype="uint32", end_of_document=MARK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_ranges, "BLOCK_BYTES", block)
        patch.setattr(tokens, "WINDOW_DOCUMENTS", 3)
        whole = list(read(file, fields))
        together = [row for where in cut(file, fields, 16) for row in read(file, fields, where)]
    if file.size:
        assert ids_of(whole) == [ids[:-1] if ids[-1:] == [MARK] else ids for ids in corpus]
        assert comparable(together) == comparable(whole)


def test_offsets_that_lead_outside_are_told(tmp_path):
    path = tmp_path / "c.u16"
    path.write_bytes(np.arange(10, dtype="<u2").tobytes())
    np.save(tmp_path / "c.offsets.npy", np.array([1, 3, 2, -4, 99, 5, 8]))
    found = list(read(input_of(path), Fields()))
    assert [(row.line, row.reason) for row in found if isinstance(row, SetAside)] == [
        (0, "the first 1 of 10 tokens belong to no document"),
        (2, "it spans tokens 3 to 2 of 10"),
        (3, "it spans tokens 2 to -4 of 10"),
        (4, "it spans tokens -4 to 99 of 10"),
        (5, "it spans tokens 99 to 5 of 10"),
        (0, "the last 2 of 10 tokens belong to no document"),
    ]
    assert [ids for ids in ids_of(found) if ids] == [[1, 2], [5, 6, 7]]


def test_of_a_cut_off_plain_file_the_documents_before_come_out(tmp_path):
    path = tmp_path / "c.u16"
    path.write_bytes(np.arange(10, dtype="<u2").tobytes()[:-1])
    *found, last = read(input_of(path), Fields(end_of_document=5))
    assert ids_of(found) == [[0, 1, 2, 3, 4], [6, 7, 8]]
    assert last == SetAside(3, "broken off inside a token: 1 bytes after token 9", damage=True)
    np.save(tmp_path / "c.offsets.npy", np.array([0, 4, 8, 10]))
    *found, last = read(input_of(path), Fields())
    assert ids_of(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (last.line, last.damage) == (3, True)
    assert "1 documents lie beyond the file's end at 19 bytes" in last.reason


def test_of_a_cut_off_array_the_documents_before_come_out(tmp_path):
    np.save(tmp_path / "c.npy", np.arange(10, dtype="<i8"))
    data = (tmp_path / "c.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(data[:-20])
    *found, last = read(input_of(tmp_path / "c.npy"), Fields(end_of_document=3))
    assert ids_of(found) == [[0, 1, 2], [4, 5, 6]]
    assert last == SetAside(3, "its header tells 10 tokens, it has 7 and 4 bytes", damage=True)


@pytest.mark.parametrize("array", [np.zeros((2, 2), int), np.zeros(3), np.array(["a"]), np.array(1)])
def test_arrays_that_are_no_token_ids_are_set_aside(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    (row,) = read(input_of(tmp_path / "a.npy"), Fields(end_of_document=0))
    assert row.damage
    assert "not token ids in one dimension" in row.reason


def test_big_endian_arrays_come_out_in_the_machine_order(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 258, 0, 3], ">u2"))
    found = list(read(input_of(tmp_path / "a.npy"), Fields(end_of_document=0)))
    assert ids_of(found) == [[1, 258], [3]]
    assert all(row.tokens.dtype.isnative for row in found)
    assert found[0].id == tokens_id(np.array([1, 258]))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("c.bin", Fields(), "does not say how its tokens are stored"),
        ("c.bin", Fields(end_of_document=1), "does not say how its tokens are stored"),
        ("c.bin", Fields(token_dtype="uint16"), "does not say where its documents end"),
        ("c.u16", Fields(), "does not say where its documents end"),
        ("c.bin", Fields(token_dtype="float32", end_of_document=1), "'float32' is no type of token ids"),
        ("c.bin", Fields(token_dtype="words", end_of_document=1), "'words' is no type of token ids"),
    ],
)
def test_what_must_be_given_is_named_before_the_work_and_while_reading(tmp_path, name, fields, message):
    (tmp_path / name).write_bytes(b"\1\0")
    file = input_of(tmp_path / name)
    for use in (tokens.check_tokens, lambda *given: list(read(*given))):
        with pytest.raises(UsageError, match=message) as caught:
            use(file, fields)
        assert "--" in caught.value.advice


def test_offsets_are_no_input(tmp_path):
    (tmp_path / "c.u16").write_bytes(b"\1\0")
    np.save(tmp_path / "c.offsets.npy", np.array([0, 1]))
    assert [file.name for file in find_inputs([str(tmp_path)])] == [f"{tmp_path.name}/c.u16"]
