"""Cutting tokens into chunks: against a plain loop, for documents and for key-value records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrotool.chunk.chunker import cut_chunks, tokenise
from retrotool.sources import Document, Rejected
from retrotool.sources.records import content_hash

token_lists = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=40), max_size=12)
lengths_of_chunks = st.integers(1, 9)


def flat(pieces: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return np.array([token for piece in pieces for token in piece], np.uint32), lengths


def rows_of(piece: list[int], length: int) -> list[list[int]]:
    return [piece[start : start + length] for start in range(0, len(piece), length)]


@given(token_lists, lengths_of_chunks)
def test_documents_are_cut_as_a_plain_loop_cuts_them(pieces, length):
    cut = cut_chunks(*flat(pieces), length, np.dtype("<u2"))
    expected = [(doc, i, row) for doc, piece in enumerate(pieces) for i, row in enumerate(rows_of(piece, length))]
    found = zip(cut.doc.tolist(), cut.index.tolist(), cut.n_tokens.tolist(), cut.tokens.tolist(), strict=True)
    assert [(doc, i, tokens[:n]) for doc, i, n, tokens in found] == expected
    assert all(not any(tokens[n:]) for n, tokens in zip(cut.n_tokens.tolist(), cut.tokens.tolist(), strict=True))
    assert cut.n_chunks.tolist() == [len(rows_of(piece, length)) for piece in pieces]
    assert cut.key is None


@given(token_lists.map(lambda pieces: pieces[: len(pieces) // 2 * 2]), lengths_of_chunks)
def test_a_record_is_its_key_in_one_chunk_and_then_its_value(pieces, length):
    pieces = [piece[:length] if i % 2 == 0 else piece for i, piece in enumerate(pieces)]
    cut = cut_chunks(*flat(pieces), length, np.dtype("<u4"), pieces=2)
    expected = []
    for doc in range(len(pieces) // 2):
        rows = [pieces[2 * doc], *rows_of(pieces[2 * doc + 1], length)]
        expected += [(doc, i, i == 0, row) for i, row in enumerate(rows)]
    columns = (cut.doc, cut.index, cut.key, cut.n_tokens, cut.tokens)
    found = zip(*(column.tolist() for column in columns), strict=True)
    assert [(doc, i, key, tokens[:n]) for doc, i, key, n, tokens in found] == expected


class Letters:
    """A tokenizer of which every letter is a token, and a space none."""

    def encode_flat(self, texts):
        encoded = [[ord(letter) for letter in text if letter != " "] for text in texts]
        return flat(encoded)


def document(text: str, line: int = 1, value: str | None = None, tokens: np.ndarray | None = None) -> Document:
    return Document(f"d{line}", text, "s", line, line, (), value, tokens)


def test_documents_without_a_token_are_set_aside_with_their_line():
    bad: list[Rejected] = []
    hashes = [(b"1", b"ab"), (b"2", b"  "), (b"3", b"c")]
    found = tokenise([document("ab", 1), document("  ", 2), document("c", 3)], Letters(), 256, 4, bad.append, hashes)
    assert [(row.line, row.reason) for row in bad] == [(2, "the text has no tokens")]
    assert [d.line for d in found.documents] == [1, 3]
    assert (found.ids.tolist(), found.lengths.tolist()) == ([97, 98, 99], [2, 1])
    assert found.hashes == [hashes[0], hashes[2]]


def test_a_key_that_is_longer_than_a_chunk_is_cut_and_counted():
    found = tokenise([document("abcdef", 1, "xyz"), document("ab", 2, "z")], Letters(), 256, 4, [].append)
    assert found.cut.tolist() == [True, False]
    assert found.lengths.tolist() == [4, 3, 2, 1]
    assert bytes(found.ids.tolist()) == b"abcdxyzabz"


def test_a_record_with_half_of_it_empty_is_set_aside():
    bad: list[Rejected] = []
    found = tokenise(
        [document("a", 1, " "), document(" ", 2, "b"), document("c", 3, "d")], Letters(), 256, 4, bad.append
    )
    assert [row.line for row in bad] == [1, 2]
    assert [d.line for d in found.documents] == [3]


def test_token_ids_that_the_tokenizer_has_not_are_set_aside():
    bad: list[Rejected] = []
    arrays = [np.array([1, 2]), np.array([3, 256]), np.array([255])]
    batch = [document("", line, tokens=tokens) for line, tokens in enumerate(arrays, 1)]
    found = tokenise(batch, Letters(), 256, 4, bad.append)
    assert [row.line for row in bad] == [2]
    assert "256" in bad[0].reason
    assert found.ids.tolist() == [1, 2, 255]


@pytest.mark.parametrize(("one", "other"), [(("ab", "c"), ("a", "bc")), (("a", ""), ("", "a"))])
def test_records_are_reported_apart_by_where_the_key_ends(one, other):
    hashes = {content_hash(key, value) for key, value in (one, other)}
    assert len(hashes) == 2
