"""``retrotool inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrotool.cli import output
from retrotool.cli.command_lines import command_line
from retrotool.cli.options import Json, StoreArgument, TableOption, check_utf8, opt
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.inspect.run import InspectedChunk, InspectedNeighbour, InspectResult, TableRead
    from retrotool.tokenizers.tokenizer import Split

EPILOG = """\b
Examples:
  retrotool inspect store
  retrotool inspect store --chunk 0:4
  retrotool inspect store --document doc-7 -k 5
  retrotool inspect store --random 3 --seed 1 --json
  retrotool inspect store --random 1000 -k 10 --html neighbours.html"""


def command(
    store: StoreArgument,
    chunk: Annotated[str | None, opt("Show this chunk, by its part and row, or its id.", metavar="P:R")] = None,
    document: Annotated[str | None, opt("Show the chunks of this document.", metavar="ID")] = None,
    random: Annotated[int | None, opt("Show N random chunks.  [default: 3]", metavar="N", least=1)] = None,
    seed: Annotated[int | None, opt("Seed of the random choice.  [default: 0]", metavar="S", least=0)] = None,
    table: TableOption = None,
    k: Annotated[int | None, opt("Neighbours per chunk.  [default: the table's k]", "-k", metavar="K", least=1)] = None,
    html: Annotated[Path | None, opt("Write an HTML page to read and search.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Show chunks of a query store beside their neighbours, and mark the text that they share.

    For each neighbour and its continuation, the longest run of tokens in common with the chunk is found. A
    run of 5 or more tokens is marked in both texts, [[like this]]. r is its length divided by the length of a
    full chunk. --html writes the chunks to a page instead, which can hold a few thousand.
    """
    with output.errors(as_json):
        from retrotool.inspect import run as inspect_run
        from retrotool.inspect.run import Choice
        from retrotool.store.parts import parse_id

        if seed is not None and random is None:
            raise UsageError("--seed needs --random", "Give --random N, or leave --seed out.")
        number = parse_id(chunk) if chunk is not None else None
        if chunk is not None and number is None:
            raise UsageError(f"--chunk {chunk!r} is not a chunk id", "Give PART:ROW, such as 0:4, or a number.")
        if document is not None:
            check_utf8("--document", document)
        result = inspect_run.inspect(
            store, Choice(number, document, random, seed or 0), table=table, k=k, page=html,
            keep=as_json or html is None,
        )  # fmt: skip
        output.show(result, as_json, _text, styled=True)


def _text(result: InspectResult) -> str:
    text = output.laid_out(_paragraphs(result))
    return f"{text}\nPage: {output.visible(result.page)}" if result.page else text


def _paragraphs(result: InspectResult) -> Iterator[output.Paragraph]:
    several = len(result.tables) > 1
    name = f", neighbours {result.name!r}" if result.name else ""
    yield output.Paragraph(f"{result.store}{name}: {result.chosen}.")
    if not result.tables:
        yield output.Paragraph(f"No neighbours yet. Compute them: {command_line('neighbours', result.store)}", indent=2)
    for table in result.tables:
        yield output.Paragraph(_table(table, several), indent=2)
    if result.page:
        without = f", {result.without:,} without neighbours" if result.without else ""
        yield output.Paragraph(
            f"{output.count(result.shown, 'chunk')} with {output.count(result.neighbours, 'neighbour')}{without}; "
            f"{result.marked:,} of them with a common run of {result.marked_from} tokens or more."
        )
    for chunk in result.chunks:
        yield output.Paragraph()
        yield from _chunk(chunk, several, bool(result.tables))


def _table(table: TableRead, several: bool) -> str:
    how = f"index {table.index!r}" if table.index else "exact search"
    recall = f", recall@10 {table.recall_at_10:.4f}" if table.recall_at_10 is not None else ""
    weight = f", table {table.name!r}, weight {table.weight:g}" if several else ""
    unlike = "" if table.comparable else "; its tokens can't be compared with the store's"
    return f"database {table.database}, {how}{recall}{weight}{unlike}"


def _chunk(chunk: InspectedChunk, several: bool, has_tables: bool) -> Iterator[output.Paragraph]:
    yield output.Paragraph(*_from(chunk), output.count(chunk.n_tokens, "token"), after=6, style="bold")
    runs = groupby(chunk.segments(), lambda segment: bool(segment[1]))
    yield _marked([("".join(text for text, _ in some), marked) for marked, some in runs], 3)
    for rank, near in enumerate(chunk.neighbours, 1):
        yield from shown_neighbour(near, rank, several)
    if not chunk.neighbours and has_tables:
        yield output.Paragraph(f"({chunk.why_none()})", indent=3)


def shown_neighbour(near: InspectedNeighbour, rank: int, several: bool) -> Iterator[output.Paragraph]:
    """Yield the lines of a neighbour; ``several``: also name its database."""
    database = [f"database {near.database}"] if several else []
    yield output.Paragraph(f"{rank}. distance {near.distance:.4f}", *_from(near), *database, after=6)
    if (common := near.common) is not None and common.marked:
        last, there = common.start + common.tokens - 1, common.start_in_neighbour + common.tokens - 1
        yield output.Paragraph(
            f"{output.count(common.tokens, 'token')} in common, r {common.r:.3f}: tokens {common.start} to {last} of "
            f"the chunk, {common.start_in_neighbour} to {there} here",
            indent=3,
        )
    yield _cut(near.marked_text(), 3)
    if near.continuation is not None:
        yield _cut(near.marked_continuation(), 5, "… ")


def _from(one: InspectedChunk | InspectedNeighbour) -> list[str]:
    from retrotool.store.parts import format_id

    source = [f"source {one.source}"] if one.source else []
    return [f"chunk {format_id(one.id)}", f"document {one.document}", *source, f"{one.index + 1:,} of {one.of:,}"]


def _cut(split: Split, indent: int, before: str = "") -> output.Paragraph:
    return _marked([(before + split.before, False), (split.run, bool(split.run)), (split.after, False)], indent)


def _marked(pieces: Iterable[tuple[str, bool]], indent: int) -> output.Paragraph:
    shown = output.Paragraph(indent=indent)
    for text, marked in pieces:
        shown.append(f"[[{text}]]" if marked else text, "bold yellow" if marked else "")
    return shown
