"""Chunks beside their neighbours as one page: written block by block, readable without its script.

The chunks go to a nameless file first; the page's head, which says how many there are, is put before them at the end.
Memory: a block of chunks. Disk: twice the page while it is put together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from retrotool.cli import html
from retrotool.cli.html import attribute, text
from retrotool.cli.result_file import written
from retrotool.inspect.inspect_result import InspectResult, TableRead, segments, trimmed, why_none
from retrotool.inspect.inspect_script import SCRIPT, STYLE, TOOLS
from retrotool.inspect.inspected_rows import CommonRun, InspectedChunk, InspectedNeighbour
from retrotool.tokenizers.split import Split

_BINS = 8
_OVERVIEW = 20
"""Chunks from which the page shows how many have which r."""


class PageWriter:
    """A page in the making."""

    def __init__(self, scratch: Path, body: BinaryIO) -> None:
        self._scratch, self._body = scratch, body

    def write(self, chunks: Iterable[InspectedChunk], several: bool) -> None:
        """Add chunks; ``several``: neighbours are of several databases, so each says of which it is."""
        for chunk in chunks:
            self._body.write(_bytes(_article(chunk, several)))

    def finish(self, result: InspectResult) -> None:
        """Write the page of the chunks that were added."""
        self._body.seek(0)
        with self._scratch.open("wb") as file:
            file.write(_bytes(_head(result)))
            shutil.copyfileobj(self._body, file)
            file.write(_bytes(f"</main>{html.foot(SCRIPT)}"))


@contextmanager
def writing(page: str | Path) -> Iterator[PageWriter]:
    """A page that takes the place of the file ``page`` once it is finished."""
    with written(page) as scratch, tempfile.TemporaryFile(dir=scratch.parent) as body:
        yield PageWriter(scratch, body)


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "backslashreplace")  # a path may be no UTF-8


def _head(result: InspectResult) -> str:
    facts = "".join(f"<dt>{text(what)}</dt><dd>{value}</dd>" for what, value in _facts(result))
    far = f"\n:root {{ --far: {max(result.farthest, 1e-6):.6f}; }}\n"
    return (
        html.head(f"Neighbours of chunks of {result.store}", style=STYLE + far, script=SCRIPT)
        + f'<dl class="facts">{facts}</dl>\n{_overview(result)}{_tools(result)}<main>\n'
    )


def _facts(result: InspectResult) -> Iterator[tuple[str, str]]:
    yield "store", f"{text(result.store)}, commit {result.commit:,}"
    without = f"; {result.without:,} without neighbours" if result.without else ""
    yield "chunks", f"{text(result.chosen)}{without}"
    yield "neighbours", f"table {text(repr(result.name))}, the {result.k:,} nearest; {result.neighbours:,} in all"
    for table in result.tables:
        yield "database", _database(table, several=len(result.tables) > 1)
    if any(table.comparable for table in result.tables):
        yield (
            "in common",
            f"{result.marked:,} of {result.shown:,} chunks have a run of {result.marked_from} tokens or more in common "
            "with a neighbour and its continuation: it is <mark>marked</mark>. "
            f"r is the longest such run over the {result.chunk_length} tokens of a chunk.",
        )


def _database(table: TableRead, *, several: bool) -> str:
    how = f"index {text(repr(table.index))}" if table.index else "exact search"
    recall = f", recall@10 {table.recall_at_10:.4f}" if table.recall_at_10 is not None else ""
    weight = f", table {text(repr(table.name))}, weight {table.weight:g}" if several else ""
    unlike = "" if table.comparable else "; its tokens can't be compared with those of the store"
    return f"{text(table.database)}, {how} of {text(table.encoder)}{recall}{weight}{unlike}"


def _overview(result: InspectResult) -> str:
    if result.shown - result.without < _OVERVIEW or not any(table.comparable for table in result.tables):
        return ""
    rows = [(f"{i / _BINS:g} to {(i + 1) / _BINS:g}", n, f"{n:,}") for i, n in enumerate(result.histogram)]
    return (
        '<details class="overview"><summary>Chunks by r, of their longest run</summary>'
        f"{html.bars('Chunks by r', rows)}</details>\n"
    )


def _tools(result: InspectResult) -> str:
    """The search box and the choices; the script fills them in, and shows them."""
    runs = [(0, "any run"), (result.marked_from, f"{result.marked_from} tokens or more")]
    for share, name in ((0.25, "1/4"), (0.5, "1/2")):
        if result.chunk_length * share > result.marked_from:
            runs.append((round(result.chunk_length * share), f"r ≥ {name}"))
    runs.append((result.chunk_length, "r = 1"))
    options = "".join(f'<option value="{tokens}">{text(name)}</option>' for tokens, name in runs)
    return TOOLS.replace("RUNS", options)


def _article(chunk: InspectedChunk, several: bool) -> str:
    pieces = [
        f'<article id="c{chunk.id}" data-source="{attribute(chunk.source)}">\n<section class="chunk">'
        f'<h2><a href="#c{chunk.id}">chunk {chunk.id}</a></h2>{_from(chunk)}'
        f'<div class="text" dir="auto">{_segments(chunk)}</div></section>\n'
    ]
    if chunk.neighbours:
        lines = (_neighbour(near, rank, several) for rank, near in enumerate(chunk.neighbours, 1))
        pieces.append(f'<ol class="near">\n{"".join(lines)}</ol>\n')
    else:
        pieces.append(f'<p class="none">{text(why_none(chunk))}</p>\n')
    pieces.append("</article>\n")
    return "".join(pieces)


def _neighbour(near: InspectedNeighbour, rank: int, several: bool) -> str:
    common = near.common
    run = common.tokens if common is not None else 0
    database = f' data-database="{attribute(near.database)}"' if several else ' data-database=""'
    shown = f'<div class="text" dir="auto">{_marked(near.text, common.text if common else None, common)}</div>'
    if near.continuation is not None:
        split = common.continuation if common is not None else None
        opened = ' open=""' if split is not None and common is not None and common.marked and split.run else ""
        shown += (
            f'<details class="next"{opened}><summary>continuation</summary>'
            f'<div class="text" dir="auto">{_marked(near.continuation, split, common)}</div></details>'
        )
    return (
        f'<li data-rank="{rank}" data-source="{attribute(near.source)}"{database} data-run="{run}">'
        f'<div class="measures"><span class="rank">{rank}</span>'
        f'<span class="distance" style="--d: {near.distance:.6f}">distance <b>{near.distance:.4f}</b></span>'
        f"{_run(common)}</div>\n<div>{_from(near, several)}{shown}</div></li>\n"
    )


def _run(common: CommonRun | None) -> str:
    if common is None:
        return "<span>not comparable</span>"
    if not common.marked:
        return f"<span>{common.tokens} in common</span>"
    here = f"tokens {common.start} to {common.start + common.tokens - 1} of the chunk"
    there = f"{common.start_in_neighbour} to {common.start_in_neighbour + common.tokens - 1} here"
    return f'<span title="{here}, {there}"><b>{common.tokens}</b> in common<br/>r <b>{common.r:.3f}</b></span>'


def _from(one: InspectedChunk | InspectedNeighbour, several: bool = False) -> str:
    fields = [f"<b><bdi>{text(one.document)}</bdi></b>"]
    if one.source:
        fields.append(f"<bdi>{text(one.source)}</bdi>")
    fields.append(f'<span class="whole">{one.index + 1:,} of {one.of:,}</span>')
    if isinstance(one, InspectedChunk):
        fields.append(f"{one.n_tokens:,} tokens" if one.n_tokens != 1 else "1 token")
    else:
        fields.append(f"chunk {one.id}")
        if several:
            fields.append(f"in <bdi>{text(one.database)}</bdi>")
    return f'<p class="from">{" · ".join(fields)}</p>'


def _segments(chunk: InspectedChunk) -> str:
    return "".join(
        f'<mark data-of="{" ".join(map(str, ranks))}">{text(piece)}</mark>' if ranks else text(piece)
        for piece, ranks in segments(chunk)
    )


def _marked(value: str, split: Split | None, common: CommonRun | None) -> str:
    if split is None or common is None or not common.marked:
        return text(value)
    cut = trimmed(split)
    return f"{text(cut.before)}<mark>{text(cut.run)}</mark>{text(cut.after)}" if cut.run else text(value)
