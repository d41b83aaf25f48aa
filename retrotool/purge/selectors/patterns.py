"""``--pattern``: RE2 patterns over the text of documents, in linear time for any pattern and text.

A match selects all chunks that it touches. Empty matches are dropped. Several patterns are first searched as
one set, which says which of them a document has. A list of terms is faster still, and unlimited (``terms``).

A document is searched in windows. Matches begin within ``WINDOW`` bytes and end at most ``OVERLAP`` bytes
after them. A match may read the whole window, like ``x(.*y)?`` without a y, so after ``CROWDED`` matches the
rest of the window is searched in narrow windows. RE2 reads no byte more than 2,000 times, with ordinary
patterns once or twice.

So the result equals ``finditer`` over the whole document for matches of at most ``OVERLAP`` bytes,
``NARROW_OVERLAP`` where matches crowd. Some longer matches are missed or end too early, like ``x.*y`` with a
distant last y.

Cost: 0.2 to 1 GB/s per core without matches, 1 to 2 µs per match. RE2 releases the GIL.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from retrotool.errors import UsageError
from retrotool.purge.selectors.selector import BlockHits, Matcher, Selector, TextBlock, Values, read_values
from retrotool.store.store import Store

Pattern = Any
MOST, MOST_CHARACTERS = 10_000, 1 << 20  # patterns, and characters of all of them together
_SET_BYTES = 128 << 20
WINDOW, OVERLAP = 56 << 10, 8 << 10
"""Bytes in which the matches of a window begin, and bytes after them in which they may end."""
CROWDED = 256  # matches of a window, including empty ones, after which it is searched in narrow windows
NARROW, NARROW_OVERLAP = 512, 1 << 10  # ``WINDOW`` and ``OVERLAP`` of a narrow window


@dataclass(frozen=True, slots=True)
class Patterns(Selector):
    """Chunks that any of some RE2 patterns touches."""

    kind: ClassVar[str] = "pattern"
    reads_text: ClassVar[bool] = True
    patterns: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Numbers, because the patterns may be personal data."""
        return [f"pattern {number}" for number in range(1, len(self.patterns) + 1)] if len(self.patterns) > 1 else [""]

    def open(self, store: Store) -> Matcher:  # noqa: ARG002
        """Compile the patterns; ``UsageError`` names one that can't be compiled."""
        several, together = [compiled(pattern) for pattern in self.patterns], _compiled_set(self.patterns)

        def match(block: TextBlock) -> BlockHits:
            where: dict[int, list[tuple[int, int]]] = {}
            for begin, end in itertools.pairwise(block.borders.tolist()):
                found = together.Match(block.text[begin:end]) or ()
                # The empty pattern, the last, is always found, unless the set's memory did not suffice.
                for label in found if len(several) in found else range(len(several)):
                    where.setdefault(label, []).append((begin, end))
            hits = [
                BlockHits.touched(block, find_all(pattern, block.text, where[label]), label)
                for label, pattern in enumerate(several)
                if label in where
            ]
            return BlockHits.joined(hits)

        return match


def read_patterns(given: Values) -> tuple[str, ...]:
    """Read patterns, those of files line by line; ``UsageError`` names one that can't be compiled."""
    patterns = read_values("--pattern", given, "pattern")
    if len(patterns) > MOST or sum(len(pattern.text) for pattern in patterns) > MOST_CHARACTERS:
        raise UsageError(
            f"{len(patterns):,} patterns: at most {MOST:,} of {MOST_CHARACTERS:,} characters together are allowed",
            "Give words and names with --terms, which has no limit, or purge in several commands.",
        )
    for pattern in patterns:
        try:
            compiled(pattern.text)
        except UsageError as error:
            raise pattern.error(str(error), error.advice) from error
    return tuple(pattern.text for pattern in patterns)


def _compiled_set(patterns: Sequence[str]) -> Any:
    """Compile patterns, and an empty one after them, to a set whose ``Match`` lists those in a text."""
    import re2

    options = re2.Options()
    options.never_capture, options.log_errors, options.max_mem = True, False, _SET_BYTES
    together = re2.Set.SearchSet(options)
    for pattern in (*patterns, ""):
        together.Add(pattern.encode())
    try:
        together.Compile()
    except re2.error as error:
        raise UsageError("the patterns are too large together", "Purge in several commands.") from error
    return together


def compiled(pattern: str, *, ignore_case: bool = False) -> Pattern:
    """Compile an RE2 pattern over UTF-8, without captures, which are slow; ``UsageError`` if invalid."""
    import re2

    options = re2.Options()
    options.never_capture = True
    options.log_errors = False
    options.case_sensitive = not ignore_case
    try:
        return re2.compile(pattern.encode(), options)
    except (re2.error, UnicodeEncodeError) as error:
        said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise UsageError(f"the pattern can't be compiled: {said}", "Patterns are in RE2's syntax.") from error


def find_all(pattern: Pattern, text: memoryview, documents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    r"""Return (begin, end) in ``text`` of all matches in ``documents``, given likewise, that don't overlap.

    ``^``, ``$`` and ``\b`` match at the beginning and end of each document, not of windows.
    """
    return [(begin + b, begin + e) for begin, end in documents for b, e in find_in(pattern, text[begin:end])]


def find_in(pattern: Pattern, text: memoryview) -> list[tuple[int, int]]:
    """Return (begin, end) of each match in the text of a document."""
    found: list[tuple[int, int]] = []
    position = 0
    for until, end in _windows(text, 0, len(text), WINDOW, OVERLAP):
        position = _find_from(pattern, text, position, until, end, CROWDED, found)
        if position < until:
            for soon, close in _windows(text, position, until, NARROW, NARROW_OVERLAP):
                position = _find_from(pattern, text, position, soon, close, NARROW, found)
    return found


def _windows(text: memoryview, begin: int, end: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield for each window where matches must begin before, and end by, at borders of characters."""
    for start in range(begin, end, size):
        yield min(_whole(text, start + size), end), _whole(text, start + size + overlap)


def _find_from(
    pattern: Pattern, text: memoryview, position: int, until: int, end: int, most: int, found: list[tuple[int, int]]
) -> int:
    """Append the matches that begin in [``position``, ``until``) and end by ``end`` to ``found``.

    Returns where to continue: before ``until`` if it stopped after ``most`` matches.
    """
    if position >= until:  # a match extends beyond the window
        return position
    for number, match in enumerate(pattern.finditer(text, position, end), 1):
        begin, stop = match.span()
        if begin >= until:
            break
        if stop > begin:
            found.append((begin, stop))
        position = max(stop, begin + 1)  # like finditer
        if number == most and position < until:
            return position
    return max(position, until)


def _whole(text: memoryview, place: int) -> int:
    """Return where the character with the byte at ``place`` begins, or where the text ends."""
    if place >= len(text):
        return len(text)
    for back in range(min(4, place + 1)):
        if text[place - back] & 0xC0 != 0x80:
            return place - back
    return place
