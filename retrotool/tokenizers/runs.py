r"""Runs of one character between two others, which a fast tokenizer may not look across.

Splitting rules such as ``\s*[\r\n]+`` join white space of any length with the newline after it. Whether an
implementation gets that right no pair of neighbouring characters shows, and tokens show it at some lengths only. So
runs of many lengths are tried, in all surroundings of a few kinds of characters.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_KINDS = {
    " ": " ", "\n": r"\n", "\r": r"\r", "\t": r"\t", "a": r"[^\W\d_]", "1": r"\d", ".": r"[^\w\s]", "-": r"[^\w\s]",
}  # fmt: skip
"""Characters that are tried, and what they stand for at the ends of a run."""
_SHORT = (*range(1, 10), 12, 15, 16, 17, 20, 24, 31, 32, 33)
_LONG = (40, 48, 63, 64, 65, 80, 96, 127, 128, 129, 200, 256)
_BYTES_A_CHARACTER = 3
"""Of white space in UTF-8, at most."""


class Run(NamedTuple):
    """``length`` or more of one character after one and before another."""

    before: str
    inside: str
    length: int
    after: str

    def pattern(self, *, ascii_only: bool) -> re.Pattern[str]:
        """Where the run is in a text; outside ASCII a run of white space may be of any kinds, in as many bytes."""
        inside, length = re.escape(self.inside), self.length
        if self.inside.isspace() and not ascii_only:
            inside, length = r"\s", -(-length // _BYTES_A_CHARACTER)
        return re.compile(f"{_KINDS[self.before]}{inside}{{{length},}}{_KINDS[self.after]}")


def unlike_runs(
    differing: Callable[[Sequence[str]], npt.NDArray[np.bool_]], known: Callable[[str], bool]
) -> tuple[Run, ...]:
    """Runs that ``differing`` tells apart, each at its least length; what is ``known`` by other signs is left out."""
    least = []
    ways = [way for way in itertools.product(_KINDS, repeat=3) if way[1] not in (way[0], way[2])]
    tried = {way: [(n, text) for n, text in _texts(*way) if not known(text)] for way in ways}
    # All lengths in one text first; of what that shows, each by itself.
    wrong = differing(["".join(text for _, text in tried[way]) for way in ways])
    for way in itertools.compress(ways, wrong):
        alone = differing([text for _, text in tried[way]])
        if alone.any():
            least.append(
                Run(way[0], way[1], min(n for (n, _), bad in zip(tried[way], alone, strict=True) if bad), way[2])
            )
    return tuple(least)


def _texts(before: str, inside: str, after: str) -> list[tuple[int, str]]:
    return [
        (length, f"x{before * left}{inside * length}{after * right}y ")
        for length in (*_SHORT, *_LONG)
        for left, right in (((1, 1), (1, 2), (2, 1)) if length in _SHORT else ((1, 1),))
    ]
