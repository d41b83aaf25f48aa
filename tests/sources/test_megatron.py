"""Megatron's indexed datasets: what a writer put in comes out, whole or in slices, and damage is named by its place."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_help import input_of
from token_help import CODES, CORPUS, MARK, blocks, comparable, corpora, ids_of, write_megatron

from retrotool.errors import UsageError
from retrotool.sources import Document, Fields, Rejected, check_input, cut_input, find_inputs, read_input, tokens
from retrotool.sources.records import content_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@given(corpora, st.sampled_from(sorted(CODES)), blocks)
def test_an_indexed_dataset_gives_its_documents(folder, corpus, dtype, block):
    write_megatron(folder / "data", corpus, dtype)
    file = input_of(folder / "data.idx")
    expected = [list(itertools.chain(*document)) for document in corpus]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BLOCK_BYTES", block)
        found = list(read_input(file, Fields(keep=("a",))))
    if not file.size:
        assert found == [Rejected(0, "the file is empty")]
        return
    assert ids_of(found) == expected
    for number, row in enumerate(found, 1):
        assert row.line == number
        if isinstance(row, Document):
            assert (row.text, row.position, row.source, row.kept) == ("", number, "data.bin", (None,))
            assert row.id == content_hash("", None, np.array(expected[number - 1])).hex()
        else:
            assert row.reason == "no tokens"


@given(corpora, st.integers(1, 60))
def test_slices_of_an_indexed_dataset_are_the_whole(folder, corpus, target):
    write_megatron(folder / "sliced", corpus, "<u2")
    file = input_of(folder / "sliced.bin")
    slices = cut_input(file, Fields(), target)
    assert slices[0].first == 0
    together = [row for where in slices for row in read_input(file, Fields(), where)]
    assert comparable(together) == comparable(read_input(file, Fields()))


def test_index_tokens_and_prefix_name_one_input(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2]]], "<u2")
    given = [str(tmp_path / name) for name in ("c", "c.bin", "c.idx")]
    (file,) = find_inputs(given)
    assert (file.name.rpartition("/")[2], file.base, file.size) == ("c.bin", "tokens", 4)
    assert find_inputs([str(tmp_path)])[0].path == file.path


def test_a_fingerprint_covers_the_index(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2]], [[3]]], "<u2")
    before = input_of(tmp_path / "c").fingerprint()
    write_megatron(tmp_path / "c", [[[1, 2], [3]]], "<u2")
    assert input_of(tmp_path / "c").fingerprint() != before


def test_exactly_one_end_mark_is_stripped(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2, MARK]], [[3]], [[4, MARK, MARK]], [[MARK]], [[MARK, 5]]], "<i4")
    found = list(read_input(input_of(tmp_path / "c"), Fields(end_of_document=MARK)))
    assert ids_of(found) == [[1, 2], [3], [4, MARK], [], [MARK, 5]]
    assert found[3] == Rejected(4, "no tokens before its end mark 9")


def test_sequences_that_do_not_follow_one_another_are_rejected(tmp_path):
    write_megatron(tmp_path / "c", [[[1, 2], [3]], [[4, 5]], [[6], [7]]], "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    places = 34 + 4 * 5
    index[places : places + 24] = np.array([4, 2, 0], "<i8").tobytes()  # of the first three, in bytes
    (tmp_path / "c.idx").write_bytes(index)
    first, *others = read_input(input_of(tmp_path / "c"), Fields())
    assert first == Rejected(1, "its sequence 1 does not follow the one before it")
    assert ids_of(others) == [[1, 2], [6, 7]]


def test_what_is_no_text_is_set_aside(tmp_path):
    write_megatron(tmp_path / "c", [[[1], [2]], [[3]], [[4], [5]]], "<u2", bytes([0, 0, 0, 0, 1]))
    found = list(read_input(input_of(tmp_path / "c"), Fields()))
    assert ids_of(found) == [[1, 2], [3], []]
    assert found[2] == Rejected(3, "its sequence 4 is not text: its mode is not 0")


def test_negative_ids_are_set_aside(tmp_path):
    write_megatron(tmp_path / "c", [[[1, -2]], [[3]]], "<i4")
    found = list(read_input(input_of(tmp_path / "c"), Fields()))
    assert found[0] == Rejected(1, "a negative token id at token 1")
    assert ids_of(found) == [[], [3]]


def test_documents_over_the_limit_are_set_aside_unread(tmp_path):
    write_megatron(tmp_path / "c", [[[1] * 26], [[2] * 25], [[3] * 10, [3] * 20]], "<u2")
    found = list(read_input(input_of(tmp_path / "c"), Fields(max_document=100)))
    assert found[0] == Rejected(1, "26 tokens, 4 bytes each, are more than --max-document 100")
    assert ids_of(found) == [[], [2] * 25, []]


LENGTHS, POINTERS, EDGES = 34, 34 + 16, 34 + 16 + 32


@pytest.mark.parametrize(
    ("offset", "value", "row", "reason"),
    [
        (LENGTHS, struct.pack("<i", -1), 1, "has sequence 0, which has a negative length or place"),
        (LENGTHS + 8, struct.pack("<i", 2**31 - 1), 2, "has sequence 2, which is beyond the end of the file, 12 bytes"),
        (POINTERS + 16, struct.pack("<q", -2), 2, "has sequence 2, which has a negative length or place"),
        (
            POINTERS + 16,
            struct.pack("<q", 2**63 - 1),
            2,
            "has sequence 2, which is beyond the end of the file, 12 bytes",
        ),
        (POINTERS + 16, struct.pack("<q", 12), 2, "has sequence 2, which is beyond the end of the file, 12 bytes"),
        (EDGES + 8, struct.pack("<q", -5), 1, "spans sequences 0 to -5 of 4"),
        (EDGES + 16, struct.pack("<q", 2**62), 2, f"spans sequences 2 to {2**62:,} of 4"),
        (EDGES + 16, struct.pack("<q", 1), 2, "spans sequences 2 to 1 of 4"),
    ],
)
def test_a_document_that_leads_outside_rejects_the_rest(tmp_path, offset, value, row, reason):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[offset : offset + len(value)] = value
    (tmp_path / "c.idx").write_bytes(index)
    *found, last = read_input(input_of(tmp_path / "c"), Fields())
    lost = f"broken off after document {row - 1}: the next {reason}; the rest of 3 documents is lost"
    assert last == Rejected(row, lost, damage=True)
    assert ids_of(found) == [[1, 2, 3], [4], [5, 6]][: row - 1]


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_a_damaged_index_never_leads_outside_and_loses_no_document_in_silence(folder, place, junk):
    write_megatron(folder / "junk", CORPUS, "<u2")
    path = folder / "junk.idx"
    index = bytearray(path.read_bytes())
    place %= len(index)
    index[place : place + len(junk)] = junk[: len(index) - place]
    path.write_bytes(index)
    found = list(read_input(input_of(folder / "junk"), Fields()))
    rows = [row for row in found if row.line]
    assert len(rows) == 3 or any(row.damage for row in found if isinstance(row, Rejected))
    allowed = {1, 2, 3, 4, 5, 6} | set(np.frombuffer((folder / "junk.bin").read_bytes(), "u1").tolist())
    for row in found:
        if isinstance(row, Document):
            assert set(row.tokens.astype("<u8").view("u1").tolist()) <= allowed | {0, 255}


@given(st.integers(0, 200))
def test_a_cut_off_index_is_damage(folder, left):
    write_megatron(folder / "short", CORPUS, "<u2")
    path = folder / "short.idx"
    index = path.read_bytes()
    path.write_bytes(index[: min(left, len(index) - 1)])
    (row,) = read_input(input_of(folder / "short"), Fields())
    assert isinstance(row, Rejected)
    assert row.damage
    assert "short.idx" in row.reason


def test_an_index_cut_off_to_the_size_of_one_without_documents_is_damage(tmp_path):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    index = (tmp_path / "c.idx").read_bytes()
    (tmp_path / "c.idx").write_bytes(index[: 26 + 12 * 4])
    (row,) = read_input(input_of(tmp_path / "c"), Fields())
    assert row.damage
    assert "c.idx is damaged" in row.reason


@pytest.mark.parametrize("kept", range(1, 12))
def test_of_a_cut_off_file_the_documents_before_come_out(tmp_path, kept):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    path = tmp_path / "c.bin"
    path.write_bytes(path.read_bytes()[:kept])
    *found, last = read_input(input_of(path), Fields())
    whole = sum(end <= kept for end in (6, 8, 12))
    assert ids_of(found) == [[1, 2, 3], [4], [5, 6]][:whole]
    assert last.damage
    assert last.line == whole + 1
    assert f"is beyond the end of the file, {kept} bytes" in last.reason


def test_what_belongs_to_no_document_is_reported(tmp_path):
    write_megatron(tmp_path / "c", CORPUS, "<u2")
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[EDGES : EDGES + 32] = np.array([1, 2, 3, 3], "<i8").tobytes()
    (tmp_path / "c.idx").write_bytes(index)
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes() + b"xy")
    found = list(read_input(input_of(tmp_path / "c"), Fields()))
    assert [row.reason for row in found if not row.line] == [
        "the first 1 of 4 sequences belong to no document",
        "the last 1 of 4 sequences belong to no document",
        "2 bytes after the last sequence belong to no document",
    ]


def test_other_indexes_are_refused(tmp_path):
    write_megatron(tmp_path / "floats", CORPUS, "<u4")
    index = bytearray((tmp_path / "floats.idx").read_bytes())
    index[17] = 7
    (tmp_path / "floats.idx").write_bytes(index)
    index[9] = 2
    (tmp_path / "version.idx").write_bytes(index)
    (tmp_path / "git.idx").write_bytes(b"\xfftOc" + bytes(100))
    (tmp_path / "older.idx").write_bytes(b"TNTIDX\0\0" + bytes(100))
    for name in ("version", "git", "older"):
        (tmp_path / f"{name}.bin").write_bytes(b"xx")
    (tmp_path / "alone.idx").write_bytes(b"x")
    reasons = {file.name: [row.reason for row in read_input(file, Fields())] for file in find_inputs([str(tmp_path)])}
    assert {Path(name).name: reason for name, (reason,) in reasons.items()} == {
        "alone.idx": "alone.bin is missing: an index has no tokens",
        "floats.bin": "floats.idx does not hold token ids: its type code is 7",
        "git.bin": "git.idx is not a Megatron index",
        "older.bin": "older.idx is not a Megatron index",
        "version.bin": "version.idx has the unknown version 2",
    }


ENDS = {
    "all end with one token": ([[[5, 6, 9]], [[7, 9]], [[9]]], True),
    "it is also inside one": ([[[5, 9, 6, 9]], [[7, 9]]], False),
    "one ends otherwise": ([[[5, 6, 9]], [[7, 9]], [[8]]], False),
    "there is one document": ([[[5, 6, 9]]], False),
}


@pytest.mark.parametrize("case", ENDS)
def test_documents_that_all_end_with_one_token_need_an_answer(case, tmp_path):
    corpus, is_asked = ENDS[case]
    write_megatron(tmp_path / "wiki", corpus, "<u2")
    file = input_of(tmp_path / "wiki.bin")
    check_input(file, Fields(end_of_document=9), keep_end=False)
    check_input(file, Fields(), keep_end=True)
    if not is_asked:
        check_input(file, Fields(), keep_end=False)
        return
    with pytest.raises(UsageError, match=r"all documents of wiki\.bin end with token 9") as caught:
        check_input(file, Fields(), keep_end=False)
    assert "--end-of-document 9" in caught.value.advice


def test_the_answer_is_given_on_the_command_line(tmp_path, cli):
    write_megatron(tmp_path / "wiki", ENDS["all end with one token"][0][:2], "<u2")
    asked = cli("chunk", tmp_path / "store", tmp_path / "wiki.idx", "--workers", "1")
    assert (asked.returncode, (tmp_path / "store").exists()) == (2, False)
    for answer, tokens_there in (("none", 5), ("9", 3)):
        options = ["--tokenizer", "minilm", "--end-of-document", answer]
        given_it = cli("chunk", tmp_path / answer, tmp_path / "wiki.idx", *options, "--json")
        assert json.loads(given_it.stdout)["tokens"] == tokens_there
    wrong = cli("chunk", tmp_path / "store", tmp_path / "wiki.idx", "--end-of-document", "x")
    assert (wrong.returncode, "give a token id, or none" in wrong.stderr) == (2, True)
