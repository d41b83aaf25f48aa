"""``retrotool inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, check_utf8, opt
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.inspect.run import InspectedChunk, InspectedNeighbour, InspectResult, TableRead
    from retrotool.tokenizers.tokenizer import Split

EPILOG = """\b
Examples:
  retrotool inspect store --chunk 4
  retrotool inspect store --document doc-7 -k 5
  retrotool inspect store --random 3 --seed 1 --json
  retrotool inspect store --random 1000 -k 10 --html neighbours.html"""


def command(
    store: StoreArgument,
    chunk: Annotated[int | None, opt("Show this chunk.", metavar="ID", least=0)] = None,
    document: Annotated[str | None, opt("Show the chunks of this document.", metavar="ID")] = None,
    random: Annotated[int | None, opt("Show random chunks of all parts.", metavar="N", least=1)] = None,
    seed: Annotated[int | None, opt("Which random chunks.  [default: 0]", metavar="S", least=0)] = None,
    name: Annotated[str, opt("Name of the neighbour tables.")] = "main",
    k: Annotated[
        int | None, opt("Neighbours a chunk.  [default: as the table is used]", "-k", metavar="K", least=1)
    ] = None,
    html: Annotated[Path | None, opt("Write a page to read and search.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show chunks of a query store beside their neighbours, and what they have in common word for word.

    Of a chunk and a neighbour with its continuation the longest common run of tokens is found. From 5 tokens on it
    is marked in both, as [[this]], and in the chunk once for all neighbours; r is its length over the tokens of a
    whole chunk. With --html the chunks go to a page instead, which has room for some thousand.
    """
    with output.errors(as_json):
        from retrotool.inspect import run as inspect_run
        from retrotool.inspect.run import Choice

        if seed is not None and random is None:
            raise UsageError("--seed is of --random", "Give --random N, or no --seed.")
        if document is not None:
            check_utf8("--document", document)
        result = inspect_run.inspect(
            store, Choice(chunk, document, random, seed or 0), name=name, k=k, page=html, keep=as_json or html is None
        )
        output.show(result, as_json, _text, styled=True)


def _text(result: InspectResult) -> str:
    text = output.laid_out(_paragraphs(result))
    return f"{text}\nTo read and search: {output.visible(result.page)}" if result.page else text


def _paragraphs(result: InspectResult) -> Iterator[output.Paragraph]:
    several = len(result.tables) > 1
    yield output.Paragraph(f"{result.store}, neighbours {result.name!r}: {result.chosen}.")
    for table in result.tables:
        yield output.Paragraph(_table(table, several), indent=2)
    if result.page:
        without = f", {result.without:,} without any" if result.without else ""
        yield output.Paragraph(
            f"{output.count(result.shown, 'chunk')} with {output.count(result.neighbours, 'neighbour')}{without}; "
            f"{result.marked:,} with {result.marked_from} tokens or more in common with one."
        )
    for chunk in result.chunks:
        yield output.Paragraph()
        yield from _chunk(chunk, several)


def _table(table: TableRead, several: bool) -> str:
    how = f"index {table.index!r}" if table.index else "exact search"
    recall = f", recall@10 {table.recall_at_10:.4f}" if table.recall_at_10 is not None else ""
    weight = f", table {table.name!r}, weight {table.weight:g}" if several else ""
    unlike = "" if table.comparable else "; its tokens can't be compared with those of the store"
    return f"database {table.database}, {how}{recall}{weight}{unlike}"


def _chunk(chunk: InspectedChunk, several: bool) -> Iterator[output.Paragraph]:
    fields = [f"chunk {chunk.id}", *_from(chunk), output.count(chunk.n_tokens, "token")]
    yield output.Paragraph(*fields, after=6, style="bold")
    runs = groupby(chunk.segments(), lambda segment: bool(segment[1]))
    yield _marked([("".join(text for text, _ in some), marked) for marked, some in runs], 3)
    for rank, near in enumerate(chunk.neighbours, 1):
        yield from _neighbour(near, rank, several)
    if not chunk.neighbours:
        yield output.Paragraph(f"({chunk.why_none()})", indent=3)


def _neighbour(near: InspectedNeighbour, rank: int, several: bool) -> Iterator[output.Paragraph]:
    fields = [f"{rank}. distance {near.distance:.4f}", f"chunk {near.id}", *_from(near)]
    if several:
        fields.append(f"database {near.database}")
    yield output.Paragraph(*fields, after=6)
    if (common := near.common) is not None and common.marked:
        last, there = common.start + common.tokens - 1, common.start_in_neighbour + common.tokens - 1
        yield output.Paragraph(
            f"{output.count(common.tokens, 'token')} in common, r {common.r:.3f}: {common.start} to {last} of the "
            f"chunk, {common.start_in_neighbour} to {there} here",
            indent=3,
        )
    yield _cut(near.marked_text(), 3)
    if near.continuation is not None:
        yield _cut(near.marked_continuation(), 5, "… ")


def _from(one: InspectedChunk | InspectedNeighbour) -> list[str]:
    source = [f"source {one.source}"] if one.source else []
    return [f"document {one.document}", *source, f"{one.index + 1:,} of {one.of:,}"]


def _cut(split: Split, indent: int, before: str = "") -> output.Paragraph:
    return _marked([(before + split.before, False), (split.run, bool(split.run)), (split.after, False)], indent)


def _marked(pieces: Iterable[tuple[str, bool]], indent: int) -> output.Paragraph:
    """Put [[ and ]] around the pieces of a text that are marked, and show them in colour."""
    shown = output.Paragraph(indent=indent)
    for text, marked in pieces:
        shown.append(f"[[{text}]]" if marked else text, "bold yellow" if marked else "")
    return shown
