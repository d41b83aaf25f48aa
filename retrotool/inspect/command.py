"""``retrotool inspect``."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, check_utf8
from retrotool.cli.output import one_line
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.inspect.inspect_result import InspectResult, TableRead
    from retrotool.inspect.inspected_rows import CommonRun, InspectedChunk, InspectedNeighbour
    from retrotool.tokenizers.split import Split

EPILOG = """\b
Examples:
  retrotool inspect store --chunk 4
  retrotool inspect store --document doc-7 -k 5
  retrotool inspect store --random 3 --seed 1 --json
  retrotool inspect store --random 1000 -k 10 --html neighbours.html"""

_WIDTH = 100
_HEAD, _BEGIN, _END = "\x01", "\x02", "\x03"
"""While lines are made: before a heading, and two each around a run, where they become [[ and ]]. Texts have none."""


def command(
    store: StoreArgument,
    chunk: Annotated[int | None, typer.Option(metavar="ID", min=0, help="Show this chunk.", show_default=False)] = None,
    document: Annotated[
        str | None, typer.Option(metavar="ID", help="Show the chunks of this document.", show_default=False)
    ] = None,
    random: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Show random chunks of all parts.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", min=0, help="Which random chunks.  [default: 0]", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the neighbour tables.")] = "main",
    k: Annotated[
        int | None,
        typer.Option("-k", metavar="K", min=1, help="Neighbours a chunk.  [default: as the table is used]"),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to read and search.")] = None,
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
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    several = len(result.tables) > 1
    lines = _wrapped(one_line(f"{result.store}, neighbours {result.name!r}: {result.chosen}.").split())
    for table in result.tables:
        lines += _wrapped(one_line(_table(table, several)).split(), "  ")
    if result.page:
        lines += [*_wrapped(_figures(result).split()), f"To read and search: {result.page}"]
    else:
        for chunk in result.chunks:
            lines += ["", *_chunk(chunk, several)]
    return "\n".join(_marked_lines(lines, colours))


def _table(table: TableRead, several: bool) -> str:
    how = f"index {table.index!r}" if table.index else "exact search"
    recall = f", recall@10 {table.recall_at_10:.4f}" if table.recall_at_10 is not None else ""
    weight = f", table {table.name!r}, weight {table.weight:g}" if several else ""
    unlike = "" if table.comparable else "; its tokens can't be compared with those of the store"
    return f"database {table.database}, {how}{recall}{weight}{unlike}"


def _figures(result: InspectResult) -> str:
    without = f", {result.without:,} without any" if result.without else ""
    return (
        f"{output.count(result.shown, 'chunk')} with {output.count(result.neighbours, 'neighbour')}{without}; "
        f"{result.marked:,} with {result.marked_from} tokens or more in common with one."
    )


def _chunk(chunk: InspectedChunk, several: bool) -> Iterator[str]:
    from retrotool.inspect.inspect_result import segments, why_none

    fields = [f"chunk {chunk.id}", *_from(chunk), output.count(chunk.n_tokens, "token")]
    yield from (_HEAD + line for line in _wrapped(fields, "", "      ", gap="  "))
    pieces = [(one_line(piece), bool(ranks)) for piece, ranks in segments(chunk)]
    text = "".join(_run(piece) if marked else piece for piece, marked in pieces)
    yield from _wrapped(text.replace(2 * _END + 2 * _BEGIN, "").split(), "   ")
    for rank, near in enumerate(chunk.neighbours, 1):
        yield from _neighbour(near, rank, several)
    if not chunk.neighbours:
        yield f"   ({why_none(chunk)})"


def _neighbour(near: InspectedNeighbour, rank: int, several: bool) -> Iterator[str]:
    fields = [f"{rank}. distance {near.distance:.4f}", f"chunk {near.id}", *_from(near)]
    if several:
        fields.append(f"database {one_line(near.database)}")
    yield from _wrapped(fields, "", "      ", gap="  ")
    if near.common is not None and near.common.marked:
        yield f"   {_position(near.common)}"
    common = near.common
    yield from _wrapped(_split(near.text, common.text if common else None, common).split(), "   ")
    if near.continuation is not None:
        text = _split(near.continuation, common.continuation if common else None, common)
        yield from _wrapped(["…", *text.split()], "     ")


def _from(one: InspectedChunk | InspectedNeighbour) -> list[str]:
    source = [f"source {one_line(one.source)}"] if one.source else []
    return [f"document {one_line(one.document)}", *source, f"{one.index + 1:,} of {one.of:,}"]


def _position(common: CommonRun) -> str:
    last, there = common.start + common.tokens - 1, common.start_in_neighbour + common.tokens - 1
    return (
        f"{output.count(common.tokens, 'token')} in common, r {common.r:.3f}: {common.start} to {last} of the chunk, "
        f"{common.start_in_neighbour} to {there} here"
    )


def _split(text: str, split: Split | None, common: CommonRun | None) -> str:
    from retrotool.inspect.inspect_result import trimmed

    if split is None or common is None or not common.marked or not split.run:
        return one_line(text)
    cut = trimmed(split)
    return one_line(cut.before) + _run(one_line(cut.run)) + one_line(cut.after)


def _run(text: str) -> str:
    return f"{2 * _BEGIN}{text}{2 * _END}"


def _wrapped(words: Iterable[str], indent: str = "", after: str | None = None, gap: str = " ") -> list[str]:
    """Lines of at most ``_WIDTH`` columns; ``after``: the indent of all but the first, if it is another one."""
    after = indent if after is None else after
    lines, line, bare = [], indent, True
    room = _WIDTH - max(len(indent), len(after))
    for word in words:
        for piece in _pieces(word, room):
            if not bare and _columns(line) + len(gap) + _columns(piece) > _WIDTH:
                lines.append(line)
                line, bare = after, True
            line += piece if bare else f"{gap}{piece}"
            bare = False
    return [*lines, line.rstrip()]


def _pieces(word: str, room: int) -> Iterator[str]:
    """A word, or as much of it at a time as there is room for."""
    if _columns(word) <= room:
        yield word
        return
    piece, used = "", 0
    for character in word:
        width = _columns(character)
        if used + width > room:
            yield piece
            piece, used = "", 0
        piece, used = piece + character, used + width
    yield piece


def _columns(text: str) -> int:
    """How many columns a terminal gives a text: two for the wide characters of East Asia, none for combining ones."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)


def _marked_lines(lines: Iterable[str], colours: bool) -> Iterator[str]:
    """Lines with [[ and ]] around runs, which go on from line to line; headings and runs in colour, too."""
    inside = False
    for line in lines:
        if line.startswith(_HEAD):
            yield typer.style(line[1:], bold=True) if colours else line[1:]
            continue
        shown = []
        for piece in re.split(f"([{_BEGIN}{_END}]+)", line):
            edge = piece[:1] in (_BEGIN, _END) and piece != ""
            text = piece.replace(_BEGIN, "[").replace(_END, "]")
            shown.append(_coloured(text) if colours and text.strip() and (inside or edge) else text)
            inside = piece[:1] == _BEGIN if edge else inside
        yield "".join(shown)


def _coloured(text: str) -> str:
    indent = text[: len(text) - len(text.lstrip())]
    return indent + typer.style(text.lstrip(), fg="yellow", bold=True)
