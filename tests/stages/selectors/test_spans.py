"""Matches in blocks: those of Python's own ``re`` over each document, and how much RE2 is given to read for them."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from block_help import block_of, cut
from hypothesis import given
from hypothesis import strategies as st

from retrotool.errors import UsageError
from retrotool.purge.selectors import patterns
from retrotool.purge.selectors.patterns import Patterns, compiled, find_all, read_patterns
from retrotool.purge.selectors.selector import BlockHits, TextBlock


def expected(pattern: str, documents: list[list[bytes]]) -> list[tuple[int, int]]:
    """By Python's ``re`` over the characters of each document."""
    found, base = [], 0
    for document in documents:
        text = b"".join(document).decode()
        at = [base, *(base + n for n in itertools.accumulate(len(c.encode()) for c in text))]
        matches = re.finditer(as_python(pattern), text, re.ASCII)
        found += [(at[m.start()], at[m.end()]) for m in matches if m.group()]
        base = at[-1]
    return found


def found_by(pattern: Any, block: TextBlock) -> list[tuple[int, int]]:
    return find_all(pattern, block.text, itertools.pairwise(block.borders.tolist()))


class Counted:
    """A pattern that notes how many bytes each search may read: from where it begins to where the window ends."""

    def __init__(self, pattern: Any) -> None:
        self.pattern, self.read, self.searches = pattern, 0, 0

    def finditer(self, text: memoryview, position: int, end: int) -> Iterator[Any]:
        self.searches += 1
        self.read += end - position
        for match in self.pattern.finditer(text, position, end):
            yield match
            self.searches += 1
            self.read += end - match.end()


PATTERNS = (
    "ab", "^a+", "b+$", r"\bab\b", "a.*b", "(?s)a.*b", "a[^b]{0,5}b", r"\n", "(a|ab)(c|bcd)?", "é", "[é😀]+", ".",
)  # fmt: skip
documents = st.lists(
    st.tuples(st.text("ab \né😀", max_size=60).map(str.encode), st.integers(1, 9)).map(lambda one: cut(*one)),
    max_size=4,
)


def as_python(pattern: str) -> str:
    """The same pattern of ``re``, whose ``$`` also matches before a last line feed."""
    return pattern.replace("$", r"\Z")


@given(st.sampled_from(PATTERNS), documents)
def test_small_documents_are_searched_like_re(pattern: str, documents: list[list[bytes]]) -> None:
    assert found_by(compiled(pattern), block_of(documents)) == expected(pattern, documents)


@given(st.sampled_from(PATTERNS), st.text("ab \né😀", max_size=200), st.integers(1, 9), st.data())
def test_windows_change_nothing_for_matches_that_fit(pattern: str, text: str, size: int, data: Any) -> None:
    """Windows of a few bytes, over matches that are shorter than they overlap."""
    matches = list(re.finditer(as_python(pattern), text, re.ASCII))
    long = max((len(m.group().encode()) for m in matches), default=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NARROW", "WINDOW"):
            patch.setattr(patterns, name, data.draw(st.integers(8, 40)))
            patch.setattr(patterns, "OVERLAP" if name == "WINDOW" else "NARROW_OVERLAP", long + 4)
        patch.setattr(patterns, "CROWDED", data.draw(st.integers(1, 20)))
        found = found_by(compiled(pattern), block_of([cut(text.encode(), size)]))
    assert found == expected(pattern, [[text.encode()]])


@pytest.mark.parametrize("place", [0, 57_300, 56 << 10, 60_000, (64 << 10) - 3, 64 << 10, 114_000, 150_000 - 8000])
def test_a_match_of_eight_thousand_bytes_is_found_wherever_it_lies(place: int) -> None:
    text = bytearray("é".encode() * 75_000)
    place -= place % 2
    text[place : place + 8000] = b"<" + b"x" * 7998 + b">"
    assert found_by(compiled("<[^>]*>"), block_of([[b"<"], cut(bytes(text), 250)])) == [(place + 1, place + 8001)]


def test_many_ordinary_matches_are_all_found() -> None:
    text = b" ".join(b"name%d@example.org" % n for n in range(20_000))
    block = block_of([cut(text, 300)])
    counted = Counted(compiled(r"\w+@\w+\.\w+"))
    assert found_by(counted, block) == expected(r"\w+@\w+\.\w+", [[text]])


@pytest.mark.parametrize(
    ("pattern", "piece"),
    [
        ("x(.*y)?", b"x"),
        ("x*", b"x"),
        ("(x.*y)?", b"x"),
        (".*?y|x", b"x"),
        ("(x+x+)+y|x", b"x"),
        (r"\b|(\w.*y)", b"a b"),
    ],
)
def test_what_is_read_is_linear_for_hostile_patterns(pattern: str, piece: bytes) -> None:
    read = []
    for size in (30_000, 60_000):
        counted = Counted(compiled(pattern))
        found_by(counted, block_of([cut(piece * (size // len(piece)), 256)]))
        read.append(counted.read)
        assert counted.read < 2000 * size
        assert counted.searches < 1.1 * size
    assert read[1] < 2.2 * read[0]


def test_matches_of_hostile_patterns_are_found() -> None:
    text = b"x" * 100_000
    assert found_by(compiled("x(.*y)?"), block_of([cut(text, 250)])) == [(n, n + 1) for n in range(len(text))]


def test_documents_are_apart_and_rows_of_both_chunks_are_hit() -> None:
    block = block_of([[b"one se", b"", b"cret"], [b"se"], [b"cret secret"]])
    matches = found_by(compiled("secret"), block)
    assert matches == [(4, 10), (17, 23)]
    found = BlockHits.touched(block, matches, 3)
    assert found.rows.tolist() == [0, 2, 4]
    assert found.labels.tolist() == [3] * 3
    assert (found.begin.tolist(), found.end.tolist()) == ([4, 4, 17], [10, 10, 23])


def test_nothing_is_found_in_nothing() -> None:
    assert found_by(compiled("a"), block_of([])) == []
    assert len(BlockHits.touched(block_of([]), found_by(compiled("a"), block_of([])))) == 0


@pytest.mark.parametrize("pattern", ["(a", "a{2000}", "\ud800", "(?=x)", r"(a)\1"])
def test_what_re2_can_not_compile_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"the pattern can't be compiled: .+"):
        compiled(pattern)


def test_case_is_ignored_where_that_is_asked_for() -> None:
    assert found_by(compiled("straße", ignore_case=True), block_of([["STRAßE".encode()]])) == [(0, 7)]


@given(documents, st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=6))
def test_several_patterns_find_what_each_finds_alone(cut_documents, several):
    block = block_of(cut_documents)
    found = Patterns(tuple(several)).open(None)(block)
    alone = [BlockHits.touched(block, found_by(compiled(pattern), block), n) for n, pattern in enumerate(several)]
    wanted = BlockHits.joined(alone)
    for name in ("rows", "labels", "begin", "end"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()


def test_without_memory_for_a_set_every_pattern_is_searched(monkeypatch):
    several = tuple(f"word{i} (x.*y|z)*w{i}" for i in range(200))
    block = block_of([[b"so word7 zw7 is here, and word9 w9"]])
    found = Patterns(several).open(None)(block)
    assert found.labels.tolist() == [7, 9]
    monkeypatch.setattr(patterns, "_SET_BYTES", 1000)
    with pytest.raises(UsageError, match="too large together"):
        Patterns(several).open(None)
    monkeypatch.setattr(patterns, "_compiled_set", lambda _: SimpleNamespace(Match=lambda text: None))
    assert Patterns(several).open(None)(block).labels.tolist() == [7, 9]


@pytest.mark.parametrize(("count", "size"), [(10_001, 4), (5_000, 300)])
def test_too_many_patterns_are_refused(tmp_path, count, size):
    (tmp_path / "list").write_text("".join(f"{i:0{size}}\n" for i in range(count)))
    with pytest.raises(UsageError, match=f"{count:,} patterns: at most") as caught:
        read_patterns(tmp_path / "list")
    assert "--terms" in caught.value.advice


def test_ten_thousand_patterns_are_one_search():
    several = tuple(rf"\bname{i}\s+surname{i}\b" for i in range(10_000))
    block = block_of([[b"name77  surname77 and name5 surname6 " * 20]] * 50)
    started = time.process_time()
    found = Patterns(several).open(None)(block)
    assert set(found.labels.tolist()) == {77}
    assert len(found) == 50 * 20
    assert time.process_time() - started < 5, "one by one they take minutes"
