"""Rows of token ids of different lengths, one after the other in one array, and how they are cut into batches.

Everything is done in numpy over all rows at once: about 20 million tokens a second a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from retrotool.errors import UsageError
from retrotool.ranges import expand_ranges, positions_within


@dataclass(frozen=True, slots=True)
class Rows:
    """``ids`` int32 [tokens] of all rows, one after the other; ``lengths`` int64 [n]."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Rows:
        """From a list a row."""
        ids = np.fromiter(chain.from_iterable(rows), np.int32)
        return cls(ids, np.fromiter(map(len, rows), np.int64, len(rows)))

    @classmethod
    def of_matrix(cls, tokens: npt.NDArray[Any], n_tokens: npt.NDArray[Any]) -> Rows:
        """From ``tokens`` [n, length], of which ``n_tokens`` [n] count."""
        used = np.arange(tokens.shape[1]) < n_tokens[:, None]
        return cls(tokens[used].astype(np.int32), n_tokens.astype(np.int64))

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each row begins in ``ids``, int64 [n]."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    def take(self, which: npt.NDArray[np.int64]) -> Rows:
        """Some of the rows, in the order given."""
        lengths = self.lengths[which]
        return Rows(self.ids[expand_ranges(self.starts[which], lengths)], lengths)

    def framed(self, before: Sequence[int], after: Sequence[int], longest: int) -> Rows:
        """The rows with special tokens around them, cut so that none is longer than ``longest``."""
        kept = np.minimum(self.lengths, max(longest - len(before) - len(after), 0))
        lengths = kept + len(before) + len(after)
        starts = np.cumsum(lengths) - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        ids[expand_ranges(starts + len(before), kept)] = self.ids[expand_ranges(self.starts, kept)]
        for i, token in enumerate(before):
            ids[starts + i] = token
        for i, token in enumerate(after):
            ids[starts + len(before) + kept + i] = token
        return Rows(ids, lengths)

    def positions(self) -> npt.NDArray[np.int32]:
        """Place of every token in its row, int32 [tokens]."""
        return positions_within(self.lengths).astype(np.int32)


def check_vocabulary(what: str, ids: npt.NDArray[Any], vocabulary: int | None) -> None:
    """``UsageError`` for a token id that a model of so many tokens has no vector of, which a GPU would not survive."""
    highest = int(ids.max(initial=0))
    if vocabulary is not None and highest >= vocabulary:
        raise UsageError(
            f"{what}: its tokenizer gives the token {highest}, its model has {vocabulary:,}",
            "Take the tokenizer.json that was made with the model.",
        )


def batches(
    lengths: npt.NDArray[np.int64], tokens: int, *, most_rows: int, padded: bool
) -> list[npt.NDArray[np.int64]]:
    """Places of rows, batch by batch, longest rows first; rows of length 0 are left out.

    A batch has at most ``tokens`` tokens (``padded``: counting padding to its longest row) and ``most_rows`` rows, and
    at least one row. Sorted by length, so that little or nothing is padding, and a batch that is too large for the
    device shows at once.
    """
    order = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    ends = np.cumsum(lengths[order])
    found = []
    start = 0
    while start < len(order):
        if padded:
            stop = start + tokens // int(lengths[order[start]])
        else:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + tokens, "right"))
        stop = max(start + 1, min(stop, start + most_rows, len(order)))
        found.append(order[start:stop])
        start = stop
    return found
