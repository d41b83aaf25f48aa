"""Terms in blocks and stores, against a search of normalised text that tries every place."""

from __future__ import annotations

import itertools
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from block_help import block_of, cut
from conftest import write_jsonl
from hypothesis import example, given
from hypothesis import strategies as st

from retrotool import api
from retrotool.errors import UsageError
from retrotool.purge.selectors.selector import Decoder, text_blocks
from retrotool.purge.selectors.terms import Normal, TermMatcher, Terms, normalised, read_terms
from retrotool.store.store import Store


def flat(text: str) -> str:
    """NFKC without case, with single spaces, by the library alone."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def is_wordy(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"


def occurs(term: str, text: str) -> int:
    """How often, overlapping or not, each at word borders."""
    term, text, count = flat(term), flat(text), 0
    for at in range(len(text)):
        after = at + len(term)
        if text[at:after] == term:
            count += not any(map(is_wordy, text[max(at - 1, 0) : at] + text[after : after + 1]))
    return count


def spans(terms: list[str], documents: list[list[bytes]]) -> list[bytes]:
    """The original text of every match."""
    block = block_of(documents)
    found = TermMatcher(terms)(block)
    places = sorted(set(zip(found.begin.tolist(), found.end.tolist(), strict=True)))
    return [bytes(block.text[begin:end]) for begin, end in places]


PIECES = [
    *"aAbB .-_'+", "\n", "\t ", "  ", "ab", "Ab", "é", "e\u0301", "É", "ß", "SS", "ﬁ", "fi", "™", "½", "İ", "i\u0307",
    "Ⅳ", "中", "ｶﾞ", "\u00a0", "\u3000", "\u2028", "\u200d", "\u0301", "\u0338", "¨", "ᄀ", "ᅡ", "Å", "\u0345", "😀", "1",
    "ſ", "ﬆ", "\u1e9b\u0323", "ΣΑΣ", "σας", "<", "\x1c", "ﷺ", "\0", "\0é", "\x7f",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)
terms = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
good_terms = terms.filter(lambda term: any(map(is_wordy, flat(term))))


@given(texts, good_terms, st.integers(1, 7))
@example("a ab", "ab", 1)
@example("¨a", "a", 1)
def test_each_occurrence_is_found_once(text: str, term: str, size: int) -> None:
    found = TermMatcher([term])(block_of([cut(text.encode(), size)]))
    assert len({*zip(found.begin.tolist(), found.end.tolist(), strict=True)}) <= occurs(term, text)
    assert (len(found) > 0) == (occurs(term, text) > 0)


@given(st.lists(texts, max_size=5), st.lists(good_terms, max_size=5), st.integers(1, 7))
def test_a_match_reads_as_the_term_and_lies_in_one_document(documents: list[str], terms: list[str], size: int) -> None:
    block = block_of([cut(text.encode(), size) for text in documents])
    found = TermMatcher(terms)(block)
    borders = block.starts[block.documents].tolist()
    for begin, end in zip(found.begin.tolist(), found.end.tolist(), strict=True):
        read = flat(bytes(block.text[begin:end]).decode())
        assert any(flat(term) in read for term in terms)
        assert any(low <= begin < end <= high for low, high in itertools.pairwise(borders))
    wanted = [any(occurs(term, text) for term in terms) for text in documents]
    rows = np.searchsorted(block.documents, found.rows, side="right") - 1
    assert [number in rows for number in range(len(documents))] == wanted


@given(st.lists(texts, max_size=4), st.integers(1, 7))
def test_text_normalised_in_islands_is_that_normalised_as_a_whole(documents: list[str], size: int) -> None:
    normal = Normal.of(block_of([cut(text.encode(), size) for text in documents]))
    assert normal.text.decode() == "\n" + "".join(normalised(text) + "\n" for text in documents)
    words = np.repeat([is_wordy(c) for c in normal.text.decode()], [len(c.encode()) for c in normal.text.decode()])
    assert normal.is_word.astype(bool).tolist() == words.tolist()


@given(texts.filter(bool), st.data())
def test_places_hold_what_was_normalised(text: str, data: st.DataObject) -> None:
    """Any span of the normalised text lies within the normalised text of its place, and places cover what they must."""
    block = block_of([[text.encode()]])
    normal = Normal.of(block)
    new = normal.text.decode()
    begin = data.draw(st.integers(1, len(new) - 2))
    end = data.draw(st.integers(begin + 1, len(new) - 1))
    at = [len(new[:place].encode()) for place in (begin, end)]
    low, high = normal.places(np.array([at]))[0].tolist()
    read = normalised(bytes(block.text[low:high]).decode())
    assert new[begin:end] in read
    before, after = (normalised(bytes(part).decode()) for part in (block.text[:low], block.text[high:]))
    assert before + read + after == new[1:-1]
    assert len(before) < begin
    assert len(new) - 2 - len(after) >= end - 1


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("Müller", "MÜLLER, Mu\u0308ller's muller Müllers", ["MÜLLER", "Mu\u0308ller"]),
        ("new york", "New\n  York, New-York, New\u00a0York", ["New\n  York", "New\u00a0York"]),
        ("c++", "C++, C++11 (c++) c+", ["C++", "c++"]),
        (".net", "ASP.NET .NET", [".NET"]),
        ("straße", "STRASSE strasse", ["STRASSE", "strasse"]),
        ("file", "ﬁle x ﬁles", ["ﬁle"]),
        ("o'brien", "O'Brien O’Brien", ["O'Brien"]),
        ("(a) b", "x (A)   b", ["(A)   b"]),
        ("a a", "a a  a", ["a a", "a  a"]),
        ("北京", "北京、大学 北京大学", ["北京"]),
        ("( a )", "( \n a  )", ["( \n a  )"]),
        ("longer than eight", "longer thaN eight longed than eight", ["longer thaN eight"]),
        ("x" * 100, "x" * 100 + " " + "x" * 99 + " " + "x" * 101, ["x" * 100]),
    ],
)
def test_what_is_a_match(term: str, text: str, found: list[str]) -> None:
    expected = [one.encode() for one in found]
    assert spans([term], [cut(text.encode(), 5)]) == expected
    # Beside text of another script, and with other terms in the list.
    around = "Ещё раз: ".encode()
    assert spans([term, "zebra", "an other"], [cut(around + text.encode(), 3)]) == expected


def test_documents_end_words_and_terms() -> None:
    assert spans(["new york", "york"], [[b"new"], [b"york"], [b"new yo", b"", b"rk"]]) == [
        b"york",
        b"new york",
        b"york",
    ]
    assert TermMatcher(["new york"])(block_of([[b"a new yo", b"", b"rk"]])).rows.tolist() == [0, 2]


def test_bytes_that_are_no_text_are_borne() -> None:
    assert spans(["term"], [[b"\xe2\x82 term \xff\xc3", b"term\xa9 term"]]) == [b"term"] * 3


def test_a_long_list_finds_each_of_its_terms() -> None:
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 12, 3000)]
    listed = [" ".join(words[i] for i in rng.integers(0, 1500, size)) for size in rng.integers(1, 5, 2000)]
    document = " ".join(words)
    matcher = TermMatcher(listed)
    block = block_of([cut(document.encode(), 250), *([term.encode()] for term in listed)])
    rows = set(matcher(block).rows.tolist())
    first = int(block.documents[1])
    assert rows >= set(range(first, first + len(listed)))
    assert {occurs(term, document) > 0 for term in listed[:200]} == {True, False}


def test_words_are_looked_up_exactly() -> None:
    """Also those that are alike by length, beginning and end."""
    known = ["a", "b", "abcdefgh", "abcdefghi", "12345678x12345678", "12345678y12345678", "aa"]
    looked = [*known, "c", "ab", "abcdefgx", "12345678z12345678", "abcdefghj", *known[::-1]]
    found = spans(known, [["|".join(looked).encode()]])
    assert found == [word.encode() for word in looked if word in known]


def test_nothing_is_found_in_nothing() -> None:
    assert len(TermMatcher([])(block_of([[b"a"]]))) == 0
    assert len(TermMatcher(["a"])(block_of([]))) == 0
    assert len(TermMatcher(["a"])(block_of([[b""]]))) == 0


def test_no_white_space_is_left_by_normalising() -> None:
    left = [chr(n) for n in range(sys.maxunicode + 1) if chr(n).isspace() and normalised(chr(n)) != " "]
    assert left == []


def test_a_file_of_terms_is_read(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_bytes("\ufeff# names\nMüller\r\n\n  New York \n#x\nC++".encode())
    assert read_terms(path) == ("Müller", "New York", "C++")
    path.write_text("a\n---\n")
    with pytest.raises(UsageError, match=r"terms\.txt, line 2: a term needs a letter or a digit"):
        read_terms(path)
    path.write_bytes(b"M\xfcller\n")
    with pytest.raises(UsageError, match="line 1 is not UTF-8"):
        read_terms(path)


DOCUMENTS = [
    "Write to MÜLLER & Sons , New  York about C++ .",
    "The mullers of new yorkshire write c + + ; Ünder the river",
    "harbour castle ( New York )",
]


def rows_in(path: Path, terms: tuple[str, ...]) -> list[int]:
    store = Store.open(path)
    matcher, decoder = Terms(terms).open(store), Decoder(store)
    return sorted({int(block.first + row) for block in text_blocks(store, decoder, 0) for row in matcher(block).rows})


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, byte_level_tokenizer: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("terms")
    corpus = write_jsonl(folder / "corpus.jsonl", [{"id": f"d{n}", "text": t} for n, t in enumerate(DOCUMENTS)])
    tokenizers = {"folded": tiny_encoder, "whole": byte_level_tokenizer}
    for name, tokenizer in tokenizers.items():
        api.chunk(folder / name, [str(corpus)], tokenizer=str(tokenizer))
    return {name: folder / name for name in tokenizers}


@pytest.mark.parametrize(
    ("term", "whole", "folded"),
    [
        ("new york", [0, 2], [0, 2]),
        ("Müller & Sons", [0], [0]),
        ("muller", [], [0]),  # accents are lost there
        ("under the RIVER", [], [1]),
        ("c++", [0], [0, 1]),  # and spacing
        ("c + +", [1], [0, 1]),
        ("(new york)", [], [2]),
        ("york)", [], [2]),
        ("& so", [], []),
    ],
)
def test_terms_in_stores(stores: dict[str, Path], term: str, whole: list[int], folded: list[int]) -> None:
    assert rows_in(stores["whole"], (term,)) == whole
    assert rows_in(stores["folded"], (term,)) == folded


def test_what_the_tokenizer_can_not_write_is_refused(stores: dict[str, Path]) -> None:
    assert rows_in(stores["whole"], ("castle", "北京")) == [2]
    with pytest.raises(UsageError, match="can't represent term 2"):
        rows_in(stores["folded"], ("castle", "北京"))
