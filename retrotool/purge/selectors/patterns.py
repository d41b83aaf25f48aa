"""Patterns in RE2's syntax, held against the text of documents: linear time, whatever the pattern and the text.

Where a pattern is found, the chunks that the match touches are meant, across their borders. A match may be 8 KiB long
(``spans``). One pattern costs next to nothing beside decoding; each of many is held against all text, at 0.5 to 3 GB/s
a core, so a thousand of them are slow, and a list of terms is quicker (``terms``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from retrotool.errors import UsageError
from retrotool.purge.selectors.document_text import Block
from retrotool.purge.selectors.selector import Hits
from retrotool.purge.selectors.selector_files import read_lines
from retrotool.purge.selectors.spans import compiled, find_all, hits
from retrotool.store.store import Store


@dataclass(frozen=True, slots=True)
class Patterns:
    """Chunks that any of some RE2 patterns touches."""

    patterns: tuple[str, ...]
    kind: ClassVar[str] = "pattern"
    reads_text: ClassVar[bool] = True

    def literal(self) -> dict[str, Any]:
        """The patterns."""
        return {"patterns": list(self.patterns)}

    def open(self, store: Store) -> PatternMatcher:  # noqa: ARG002
        """Compile them; ``UsageError`` names one that can't be."""
        return PatternMatcher(self.patterns)


class PatternMatcher:
    """Finds patterns."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._compiled = [compiled(pattern) for pattern in patterns]
        # Not the patterns themselves: names are printed, and kept.
        self.names = [f"pattern {number}" for number in range(1, len(patterns) + 1)] if len(patterns) > 1 else [""]

    def __call__(self, block: Block) -> Hits:
        """The chunks that matches touch."""
        return Hits.joined(
            [hits(block, *find_all(pattern, block), label) for label, pattern in enumerate(self._compiled)]
        )


def read_patterns(path: str) -> tuple[str, ...]:
    """The patterns of a file, one a line; ``UsageError`` names the line of one that can't be compiled."""
    found = []
    for number, pattern in enumerate(read_lines("--patterns", path, "pattern"), 1):
        if not pattern.strip():
            continue
        try:
            compiled(pattern)
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}", error.advice) from error
        found.append(pattern)
    return tuple(found)
