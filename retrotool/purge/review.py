"""Looking at a selection before it is purged: by selector, source and document, examples, and what an erase will touch.

Text is read for the examples only. Cost: the documents of the parts concerned, and a row group an example.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrotool.index.generations import all_shards
from retrotool.index.index_files import parts_in_shard
from retrotool.purge.erase import part_files
from retrotool.purge.purged_chunks import Ids
from retrotool.purge.select import Selection
from retrotool.purge.selectors.document_text import Decoder, TextBlock
from retrotool.store import parts
from retrotool.store.atomic import FileEntry
from retrotool.store.parts import PART_SHIFT, ROW_GROUP
from retrotool.store.store import Store

EXAMPLES, LARGEST = 10, 10
_REWRITTEN, _PROVEN = 20e6, 0.25e-3
"""Bytes of files that an erase reads and rewrites a second, and seconds a chunk to keep what it is looked for by:
``benchmarks/purging.py``, on a core."""


@dataclass(frozen=True, slots=True)
class Count:
    """So many of the chunks are of this source, or document."""

    name: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Example:
    """A chunk that a selector means: its text, and from which to which character the match lies (both 0: nowhere).

    ``figure``: its distance to what it is like, or its score, where the selector measures one.
    """

    selector: str
    chunk: int
    document: str
    source: str
    text: str
    begin: int
    end: int
    figure: float | None = None


@dataclass(frozen=True, slots=True)
class Touched:
    """What an erase would rewrite: so many parts, shards, tables of neighbours; and bytes of files.

    ``rows`` are those of the tables, and ``seconds`` how long all of it may take, by the rates of one core.
    """

    parts: int
    shards: int
    tables: int
    bytes: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Review:
    """What a selection would take: ``sources`` and ``documents``, those with the most chunks; examples."""

    sources: tuple[Count, ...]
    documents: tuple[Count, ...]
    examples: tuple[Example, ...]
    touched: Touched


def review(store: Store, selection: Selection) -> Review:
    """Look at what is live of a selection."""
    sources: dict[str, int] = {}
    documents: dict[str, int] = {}
    for part in np.unique(selection.live >> PART_SHIFT).tolist():
        table = parts.read_documents(store, part, ["id", "source", "first_row"])
        rows = selection.live[selection.live >> PART_SHIFT == part] - (part << PART_SHIFT)
        numbers, counts = np.unique(
            np.searchsorted(table["first_row"].to_numpy(), rows, side="right") - 1, return_counts=True
        )
        some = table.take(numbers)
        for name, source, n in zip(some["id"].to_pylist(), some["source"].to_pylist(), counts.tolist(), strict=True):
            sources[source or ""] = sources.get(source or "", 0) + n
            documents[name or ""] = documents.get(name or "", 0) + n
    return Review(_most(sources), _most(documents), tuple(_examples(store, selection)), _touched(store, selection))


def _most(counts: dict[str, int]) -> tuple[Count, ...]:
    return tuple(Count(name, n) for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:LARGEST])


def _examples(store: Store, selection: Selection) -> list[Example]:
    """Up to ten of each selector, from all over what it means; in the order of their figures, if they have some."""
    found = selection.found
    decoder = Decoder(store)
    examples = []
    for number, selector in enumerate(selection.request.scanned):
        places = np.flatnonzero((found.selectors == number) & np.isin(found.chunks, selection.live))
        places = places[np.argsort(found.figures[places], kind="stable")]
        for place in places[_spread(len(places))].tolist():
            span, figure = (int(found.begin[place]), int(found.end[place])), float(found.figures[place])
            example = _example(store, decoder, selector.kind, int(found.chunks[place]), span)
            examples.append(example if np.isnan(figure) else replace(example, figure=figure))
    if not examples:
        some = selection.live[_spread(len(selection.live))].tolist()
        examples = [_example(store, decoder, selection.request.kind, chunk, (0, 0)) for chunk in some]
    return examples


def _spread(n: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, n - 1, min(EXAMPLES, n)).astype(np.int64))


def _example(store: Store, decoder: Decoder, selector: str, chunk: int, span: tuple[int, int]) -> Example:
    part, row = chunk >> PART_SHIFT, chunk & ((1 << PART_SHIFT) - 1)
    total = parts.part_entry(store, "chunks", part).rows
    first, last = max(row - 1, 0), min(row + 1, total - 1)  # beside others its text is as it was when it was scanned
    groups = range(first // ROW_GROUP, last // ROW_GROUP + 1)
    chunks = parts.read_chunks(store, part, list(groups))
    low = groups[0] * ROW_GROUP
    same = [i for i in range(first - low, last - low + 1) if chunks.doc[i] == chunks.doc[row - low]]
    few = chunks.between(same[0], same[-1] + 1)
    block = TextBlock(few, same[0] + low, np.array([0, len(few)]), decoder)
    place = row - low - same[0]
    start, stop = int(block.starts[place]), int(block.starts[place + 1])
    data = bytes(block.text[start:stop])
    begin, end = (len(data[: max(at, 0)].decode(errors="replace")) for at in span)
    documents = parts.read_documents(store, part, ["id", "source"]).slice(int(few.doc[place]), 1)
    text = data.decode(errors="replace")
    name, source = documents["id"][0].as_py(), documents["source"][0].as_py()
    return Example(selector, chunk, name or "", source or "", text, begin, min(end, len(text)))


def _touched(store: Store, selection: Selection) -> Touched:
    state = store.state
    numbers: Ids = np.unique(selection.live >> PART_SHIFT)
    wanted = set(numbers.tolist())
    files: list[FileEntry] = [entry for part in wanted for entry in part_files(store, part)]
    shards = [
        entry
        for name in state.names("index")
        for entry in all_shards(state, name).values()
        if not wanted.isdisjoint(parts_in_shard(entry))
    ]
    groups = [state.group("neighbours", name) for name in state.names("neighbours")]
    tables = [entry for group in groups for entry in group.entries()]
    size = sum(entry.bytes for entry in (*files, *shards, *tables))
    return Touched(
        len(wanted), len(shards), len(tables), size, sum(entry.rows for entry in tables),
        size / _REWRITTEN + len(selection.live) * _PROVEN if len(selection.live) else 0.0,
    )  # fmt: skip
