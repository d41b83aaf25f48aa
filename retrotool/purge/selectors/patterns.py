"""Patterns in RE2's syntax, searched in the text of documents: in linear time, whatever the pattern and the text.

Where a pattern matches, the chunks that the match touches are meant, across their borders. Each of many patterns is
searched in all text, so a thousand of them are slow, and a list of terms is quicker (``terms``).

A document is searched in windows: matches that begin in ``WINDOW`` bytes, and end at most ``OVERLAP`` bytes behind
them. A search that finds something may have read all of the window for it, as ``x(.*y)?`` does where there is no y; so
after ``CROWDED`` matches the rest of the window is searched in narrow windows. RE2 reads no byte more than 2,000 times,
whatever the pattern and the text, and of ordinary ones once or twice. So what is found is what ``finditer`` finds in
the whole document, as long as matches have at most ``OVERLAP`` bytes, and where they crowd ``NARROW_OVERLAP`` bytes.
Some longer ones are missed, and others end too early, as those of ``x.*y`` where the last y is far.

Cost: 0.2 to 1 GB/s a core for what matches nowhere, one or two microseconds a match; RE2 runs without Python's lock.
Matches of no bytes are dropped.
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
"""A compiled pattern of ``re2``, over bytes."""
WINDOW, OVERLAP = 56 << 10, 8 << 10
"""Bytes in which the matches of a window begin, and bytes behind them in which they may end."""
CROWDED = 256
"""Matches of a window, those of no bytes too, after which it is searched in narrow ones."""
NARROW, NARROW_OVERLAP = 512, 1 << 10
"""The same two as of a window, of a narrow one."""


@dataclass(frozen=True, slots=True)
class Patterns(Selector):
    """Chunks that any of some RE2 patterns touches."""

    kind: ClassVar[str] = "pattern"
    reads_text: ClassVar[bool] = True
    patterns: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Numbers, as the patterns themselves may be personal data."""
        return [f"pattern {number}" for number in range(1, len(self.patterns) + 1)] if len(self.patterns) > 1 else [""]

    def open(self, store: Store) -> Matcher:  # noqa: ARG002
        """Compile them; ``UsageError`` names one that can't be."""
        several = [compiled(pattern) for pattern in self.patterns]

        def match(block: TextBlock) -> BlockHits:
            found = (find_all(pattern, block) for pattern in several)
            return BlockHits.joined([BlockHits.touched(block, *spans, label) for label, spans in enumerate(found)])

        return match


def read_patterns(given: Values) -> tuple[str, ...]:
    """Return patterns, those of files line by line; ``UsageError`` names one that can't be compiled."""
    patterns = read_values("--pattern", given, "pattern")
    for pattern in patterns:
        try:
            compiled(pattern.text)
        except UsageError as error:
            raise pattern.error(str(error), error.advice) from error
    return tuple(pattern.text for pattern in patterns)


def compiled(pattern: str, *, ignore_case: bool = False) -> Pattern:
    """An RE2 pattern over UTF-8 without groups, which are slow; ``UsageError`` if it can't be compiled."""
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
    r"""Return all matches that don't overlap, from the first on: begin and end in ``TextBlock.text``, int64 [h] each.

    Each document is a text of its own: ``^``, ``$`` and ``\b`` see where it begins and ends, and see no window.
    """
    text = block.text
    found: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(block.starts[block.documents].tolist()):
        found += ((begin + b, begin + e) for b, e in find_in(pattern, text[begin:end]))
    spans = np.array(found, np.int64).reshape(-1, 2)
    return spans[:, 0].copy(), spans[:, 1].copy()


def find_in(pattern: Pattern, text: memoryview) -> list[tuple[int, int]]:
    """The same of the text of one document: begin and end of each match."""
    found: list[tuple[int, int]] = []
    position = 0
    for until, end in _windows(text, 0, len(text), WINDOW, OVERLAP):
        position = _find_from(pattern, text, position, until, end, CROWDED, found)
        if position < until:
            for soon, close in _windows(text, position, until, NARROW, NARROW_OVERLAP):
                position = _find_from(pattern, text, position, soon, close, NARROW, found)
    return found


def _windows(text: memoryview, begin: int, end: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Where the matches of each window have to begin before, and where they have to end, at borders of characters."""
    for start in range(begin, end, size):
        yield min(_whole(text, start + size), end), _whole(text, start + size + overlap)


def _find_from(
    pattern: Pattern, text: memoryview, position: int, until: int, end: int, most: int, found: list[tuple[int, int]]
) -> int:
    """Add the matches that begin from ``position`` and before ``until`` and end by ``end`` to those ``found``.

    Returns where to go on: before ``until`` if it gave up after so many as ``most``.
    """
    if position >= until:  # a match reaches over the window
        return position
    for number, match in enumerate(pattern.finditer(text, position, end), 1):
        begin, stop = match.span()
        if begin >= until:
            break
        if stop > begin:
            found.append((begin, stop))
        position = max(stop, begin + 1)  # as finditer does
        if number == most and position < until:
            return position
    return max(position, until)


def _whole(text: memoryview, place: int) -> int:
    """Where the character begins that has the byte at ``place``, or the text ends."""
    if place >= len(text):
        return len(text)
    for back in range(min(4, place + 1)):
        if text[place - back] & 0xC0 != 0x80:
            return place - back
    return place
