"""Plain token files: documents are what stands between marks, whole or in slices; damage is named once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_help import input_of
from token_help import MARK, blocks, comparable, ids_of, sequences, write_megatron

from retrotool.errors import UsageError
from retrotool.sources import (
    Document,
    Fields,
    Rejected,
    Slice,
    check_input,
    cut_input,
    read_input,
    tokens,
)
from retrotool.sources.records import content_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


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
        whole = list(read_input(file, fields))
        slices = cut_input(file, Fields(), target)
        together = [row for where in slices for row in read_input(file, fields, where)]
    if not file.size:
        assert whole == [Rejected(0, "the file is empty")]
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
    slices = cut_input(input_of(path), Fields(), 100)
    assert len(slices) == 21
    fields = Fields(end_of_document=MARK)
    assert [len(list(read_input(input_of(path), fields, where))) for where in slices].count(1) == 3
    over = list(read_input(input_of(path), Fields(end_of_document=MARK, max_document=3000)))
    assert over[1] == Rejected(2, "899 tokens, 4 bytes each, are more than --max-document 3,000", 200)
    assert [len(ids) for ids in ids_of(over)] == [99, 0, 1]


def test_of_a_cut_off_plain_file_the_documents_before_come_out(tmp_path):
    path = tmp_path / "c.u16"
    path.write_bytes(np.arange(10, dtype="<u2").tobytes()[:-1])
    *found, last = read_input(input_of(path), Fields(end_of_document=5))
    assert ids_of(found) == [[0, 1, 2, 3, 4], [6, 7, 8]]
    assert last == Rejected(3, "broken off inside a token: 1 bytes after token 9", damage=True)


@given(st.lists(sequences, min_size=1, max_size=30), st.floats(0, 1), st.integers(4, 60))
def test_a_file_cut_off_anywhere_is_damage_however_it_is_sliced(folder, corpus, left, target):
    path = folder / "cut.bin"
    write_megatron(path, [[document] for document in corpus], "<u2")
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    file = input_of(path)
    if not file.size:
        return
    whole = list(read_input(file, Fields()))
    together = [row for where in cut_input(file, Fields(), target) for row in read_input(file, Fields(), where)]
    assert [row.tokens.tolist() for row in together if isinstance(row, Document)] == [
        row.tokens.tolist() for row in whole if isinstance(row, Document)
    ]
    assert any(row.damage for row in together if isinstance(row, Rejected)) == (file.size < len(data))
    ends = np.cumsum([len(document) for document in corpus]) * 2
    before = sum(1 for end in ends if end <= file.size)
    assert ids_of(whole[:before]) == corpus[:before]
    reported = [row.damage for row in whole[before:]]
    assert reported == [True] * (file.size < len(data))


def test_each_slice_rejects_the_documents_that_it_lost(tmp_path):
    write_megatron(tmp_path / "c", [[list(range(i, i + 5))] for i in range(0, 100, 5)], "<u2")
    with (tmp_path / "c.bin").open("r+b") as stream:
        stream.truncate(100)
    file = input_of(tmp_path / "c.bin")
    slices = [Slice(a, b, a, b) for a, b in ((0, 8), (8, 14), (14, 20))]
    first, second, third = ([*read_input(file, Fields(), where)] for where in slices)
    assert ids_of(first) == [list(range(i, i + 5)) for i in range(0, 40, 5)]
    assert ids_of(second) == [list(range(40, 45)), list(range(45, 50)), []]
    assert [(row.line, row.damage) for row in (second[-1], *third)] == [(3, True), (1, True)]
    assert "broken off after document 10: the next has sequence 10, which is beyond the end" in second[-1].reason


def test_a_list_of_fewer_documents_than_when_it_was_planned_is_damage(tmp_path):
    write_megatron(tmp_path / "c", [[[0, 1]], [[2, 3]]], "<u2")
    (row,) = read_input(input_of(tmp_path / "c.bin"), Fields(), Slice(2, 3, 2, 3))
    assert row == Rejected(1, "2 documents are listed, 3 were when it was planned", damage=True)


def test_of_a_cut_off_array_the_documents_before_come_out(tmp_path):
    np.save(tmp_path / "c.npy", np.arange(10, dtype="<i8"))
    data = (tmp_path / "c.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(data[:-20])
    *found, last = read_input(input_of(tmp_path / "c.npy"), Fields(end_of_document=3))
    assert ids_of(found) == [[0, 1, 2], [4, 5, 6]]
    assert last == Rejected(3, "its header says 10 tokens, it has 7 and 4 bytes", damage=True)


@pytest.mark.parametrize("array", [np.zeros((2, 2), int), np.zeros(3), np.array(["a"]), np.array(1)])
def test_arrays_that_are_no_token_ids_are_set_aside(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    (row,) = read_input(input_of(tmp_path / "a.npy"), Fields(end_of_document=0))
    assert row.damage
    assert "not token ids in one dimension" in row.reason


def test_big_endian_arrays_come_out_in_the_machine_order(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 258, 0, 3], ">u2"))
    found = list(read_input(input_of(tmp_path / "a.npy"), Fields(end_of_document=0)))
    assert ids_of(found) == [[1, 258], [3]]
    assert all(row.tokens.dtype.isnative for row in found)
    assert found[0].id == content_hash("", None, np.array([1, 258])).hex()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("c.bin", Fields(), "the type of the tokens in c.bin is not specified"),
        ("c.bin", Fields(end_of_document=1), "the type of the tokens in c.bin is not specified"),
        ("c.bin", Fields(token_dtype="uint16"), "the ends of documents in c.bin are not specified"),
        ("c.u16", Fields(), "the ends of documents in c.u16 are not specified"),
        ("c.bin", Fields(token_dtype="float32", end_of_document=1), "'float32' is not a type of token ids"),
        ("c.bin", Fields(token_dtype="words", end_of_document=1), "'words' is not a type of token ids"),
    ],
)
def test_what_must_be_given_is_named_before_the_work_and_ends_reading(tmp_path, name, fields, message):
    (tmp_path / name).write_bytes(b"\1\0")
    file = input_of(tmp_path / name)
    with pytest.raises(UsageError, match=message) as caught:
        check_input(file, fields)
    assert "--" in caught.value.advice
    (row,) = read_input(file, fields)
    assert row.damage
    assert message in row.reason


def with_header(path: Path) -> None:
    np.save(path, np.arange(9, dtype="u2"))


def with_index(path: Path) -> None:
    write_megatron(path, [[[1, 2]], [[3]]], "<u2")


def alone(path: Path) -> None:
    path.write_bytes(bytes(18))


@pytest.mark.parametrize(
    ("name", "write", "by"),
    [("c.npy", with_header, "header"), ("c.bin", with_index, "index"), ("c.u16", alone, "suffix")],
)
def test_a_type_that_the_file_contradicts_is_refused(tmp_path, name, write, by):
    write(tmp_path / name)
    file = input_of(tmp_path / name)
    for same in (None, "uint16", "int16"):
        check_input(file, Fields(token_dtype=same, end_of_document=3))
        assert any(isinstance(row, Document) for row in read_input(file, Fields(token_dtype=same, end_of_document=3)))
    other = Fields(token_dtype="uint32", end_of_document=3)
    with pytest.raises(UsageError, match=f"{name} holds uint16 by its {by}, not uint32 as given"):
        check_input(file, other)
    (row,) = read_input(file, other)
    assert row.damage
    assert "not uint32 as given" in row.reason


@pytest.mark.parametrize(
    ("name", "write"), [("c.npy", with_header), ("c.bin", with_index), ("c.u16", alone), ("d.bin", alone)]
)
def test_an_end_mark_that_the_type_has_not_is_refused(tmp_path, name, write):
    write(tmp_path / name)
    file = input_of(tmp_path / name)
    dtype = "uint16" if name == "d.bin" else None
    check_input(file, Fields(token_dtype=dtype, end_of_document=65535))
    for mark in (65536, 70_000, -1):
        with pytest.raises(UsageError, match=f"--end-of-document {mark} is not in the range of uint16"):
            check_input(file, Fields(token_dtype=dtype, end_of_document=mark))
