"""What ``inspect`` gives, and how the text of a chunk is marked where its neighbours have the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from retrotool.inspect.inspected_rows import InspectedChunk
from retrotool.tokenizers.split import Split

_BINS = 8


@dataclass(frozen=True, slots=True)
class TableRead:
    """A table that neighbours were read of, and the database that they are chunks of.

    ``index`` is "" for exact search; ``recall_at_10`` is what was measured of it, None: nothing. ``comparable``:
    whether tokens of the database can be compared with those of the query store.
    """

    name: str
    database: str
    weight: float
    index: str
    encoder: str
    recall_at_10: float | None
    comparable: bool


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What ``inspect`` shows: ``shown`` chunks, ``without`` neighbours or with some, ``neighbours`` in all.

    ``marked`` chunks have a run of ``marked_from`` tokens or more in common with a neighbour. ``histogram`` counts
    chunks by r, of their longest run, in eighths; r = 1 is with the last.
    """

    store: str
    commit: int
    name: str
    chosen: str
    k: int
    tables: tuple[TableRead, ...]
    chunk_length: int
    marked_from: int
    shown: int = 0
    neighbours: int = 0
    without: int = 0
    marked: int = 0
    farthest: float = 0.0
    histogram: tuple[int, ...] = (0,) * _BINS
    chunks: tuple[InspectedChunk, ...] = ()
    page: str = ""

    def adding(self, block: Sequence[InspectedChunk]) -> InspectResult:
        """With the figures of some more chunks; the chunks themselves are not kept."""
        histogram = list(self.histogram)
        for chunk in block:
            if chunk.neighbours:
                histogram[min(int(longest_run(chunk) * _BINS / self.chunk_length), _BINS - 1)] += 1
        distances = [near.distance for chunk in block for near in chunk.neighbours]
        return replace(
            self,
            shown=self.shown + len(block),
            neighbours=self.neighbours + len(distances),
            without=self.without + sum(not chunk.neighbours for chunk in block),
            marked=self.marked + sum(longest_run(chunk) >= self.marked_from for chunk in block),
            farthest=max(self.farthest, *distances) if distances else self.farthest,
            histogram=tuple(histogram),
        )


def longest_run(chunk: InspectedChunk) -> int:
    """Tokens of the longest run that a chunk has in common with one of its neighbours; 0 where none can be compared."""
    return max((near.common.tokens for near in chunk.neighbours if near.common is not None), default=0)


def why_none(chunk: InspectedChunk) -> str:
    """Why a chunk has no neighbours, as a sentence."""
    if not chunk.key:
        return f"No key: a value of a key-value record is never searched. Its key is chunk {chunk.id - chunk.index}."
    return "No neighbours: none was found, or those that were saved are purged."


def trimmed(split: Split) -> Split:
    """As a run looks best: white space at its ends is outside of it, unless there is nothing else in it."""
    run = split.run.strip()
    if not run or run == split.run:
        return split
    low = len(split.run) - len(split.run.lstrip())
    return Split(split.before + split.run[:low], run, split.run[low + len(run) :] + split.after)


def segments(chunk: InspectedChunk) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The text of a chunk in pieces, each with the ranks, from 1, of the neighbours whose marked run it is part of."""
    spans = list(_spans(chunk))
    cuts = sorted({0, len(chunk.text), *(cut for _, low, high in spans for cut in (low, high))})
    for low, high in pairwise(cuts):
        yield chunk.text[low:high], tuple(rank for rank, start, stop in spans if start <= low and high <= stop)


def _spans(chunk: InspectedChunk) -> Iterable[tuple[int, int, int]]:
    for rank, near in enumerate(chunk.neighbours, 1):
        if near.common is not None and near.common.marked:
            split = trimmed(near.common.chunk)
            if split.run:
                yield rank, len(split.before), len(split.before) + len(split.run)
