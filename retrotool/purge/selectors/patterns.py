"""``--pattern``: RE2 patterns over the text of documents, in linear time for any pattern and text.

A match selects all chunks that it touches. Each pattern is searched in all text, so a thousand of them are
slow; a list of terms is faster (``terms``). Empty matches are dropped.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from retrotool.errors import UsageError
from retrotool.purge.selectors.selector import BlockHits, Matcher, Offsets, Selector, TextBlock, Values, read_values
from retrotool.store.store import Store

Pattern = Any
WINDOW, OVERLAP = 56 << 10, 8 << 10
"""Bytes in which the matches of a window begin, and bytes after them in which they may end."""
CROWDED = 256
"""Matches of a window, including empty ones, after which it is searched in narrow windows."""
NARROW, NARROW_OVERLAP = 512, 1 << 10
"""``WINDOW`` and ``OVERLAP`` of a narrow window."""


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
        several = [compiled(pattern) for pattern in self.patterns]

        def match(block: TextBlock) -> BlockHits:
            found = (find_all(pattern, block) for pattern in several)
            return BlockHits.joined([BlockHits.touched(block, *spans, label) for label, spans in enumerate(found)])

        return match


def read_patterns(given: Values) -> tuple[str, ...]:
    """Read patterns, those of files line by line; ``UsageError`` names one that can't be compiled."""
    patterns = read_values("--pattern", given, "pattern")
    for pattern in patterns:
        try:
            compiled(pattern.text)
        except UsageError as error:
            raise pattern.error(str(error), error.advice) from error
    return tuple(pattern.text for pattern in patterns)


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


def find_all(pattern: Pattern, block: TextBlock) -> tuple[Offsets, Offsets]:
    r"""Return all matches that don't overlap: begin and end in ``TextBlock.text``, int64 [h] each.

    ``^``, ``$`` and ``\b`` match at the beginning and end of each document, not of windows.
    """
    text = block.text
    found: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(block.starts[block.documents].tolist()):
        found += ((begin + b, begin + e) for b, e in find_in(pattern, text[begin:end]))
    spans = np.array(found, np.int64).reshape(-1, 2)
    return spans[:, 0].copy(), spans[:, 1].copy()


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
