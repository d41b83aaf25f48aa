"""The texts of tokens cut in three: before a run of tokens, the run, and after it, as they read in their context.

A token's text depends on its place: WordPiece writes a space before it or not, and with a byte-level tokenizer it can
be part of a character. So the run is not decoded by itself. What comes before its first and its last token is decoded
as the beginning of the whole text, and the whole text is cut there. A character that the run has only a part of is left
outside of it. This holds for every decoder that gives a beginning of the text for a beginning of the tokens.

Cost: each text is decoded three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.tokenizers.tokenizer import Tokenizer

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """A text in three pieces, of which any may be empty; without a run all of it is ``before``."""

    before: str
    run: str
    after: str

    @property
    def text(self) -> str:
        """All of it."""
        return self.before + self.run + self.after


def split_texts(
    tokenizer: Tokenizer, tokens: npt.NDArray[Any], n_tokens: Lengths, start: Lengths, stop: Lengths
) -> list[Split]:
    """Cut the text of each row of ``tokens`` [n, w], of which ``n_tokens`` [n] count, around tokens [start, stop)."""
    whole = tokenizer.decode_text(tokens, n_tokens)
    found = [Split(text, "", "") for text in whole]
    some = np.flatnonzero(start < stop)
    heads = tokenizer.decode_text(tokens[some], start[some])
    tails = tokenizer.decode_text(tokens[some], stop[some])
    for row, head, tail in zip(some.tolist(), heads, tails, strict=True):
        text = whole[row]
        low, inside = _cut(text, head)
        high = max(low + inside, _cut(text, tail)[0])
        found[row] = Split(text[: low + inside], text[low + inside : high], text[high:])
    return found


def _cut(text: str, beginning: str) -> tuple[int, bool]:
    """How much of a text a beginning has, as decoded by itself; and whether it ends inside the next character."""
    if text.startswith(beginning):
        return len(beginning), False
    pairs = enumerate(zip(text, beginning, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(text), len(beginning))), True
